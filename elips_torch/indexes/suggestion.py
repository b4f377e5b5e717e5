"""Which index to take for so many vectors in so much memory."""

import dataclasses
import math
from collections.abc import Iterator

from elips_torch.core.errors import ArgumentError, DtypeError
from elips_torch.core.metric import resolve_metric
from elips_torch.core.validation import check_count
from elips_torch.indexes.factory import index_factory
from elips_torch.indexes.memory_estimate import estimate_memory_bytes

# Up to so many vectors, looking at all is about as fast as looking for the right ones.
_FEW = 20_000
# Vectors to learn a centroid from; fewer teach little.
_PER_CENTROID = 39
_CENTROIDS_OF_A_PART = 256


class Suggestion(str):
    """A description of an index for `index_factory`, and what speaks for it.

    Attributes:
        memory_bytes: what `Index.memory_bytes` will be, about.
        reason: why this one, in a sentence.
    """

    memory_bytes: int
    reason: str

    def __new__(cls, description: str, memory_bytes: int, reason: str) -> "Suggestion":
        """Make one."""
        made = super().__new__(cls, description)
        made.memory_bytes, made.reason = memory_bytes, reason
        return made

    def __getnewargs__(self) -> tuple[str, int, str]:  # type: ignore[override]
        return str(self), self.memory_bytes, self.reason


@dataclasses.dataclass(frozen=True)
class _Storage:
    """How vectors can be stored.

    Attributes:
        name: in words.
        recall: share of the 10 true neighbours that are found when all lists are read: measured on made-up
            clusters of 64 features, on which codes do worse than on embeddings.
        features_per_part: of product quantization; 0 for others.
        text: in a description; ``{m}`` is the number of parts.
    """

    name: str
    recall: float
    text: str
    features_per_part: int = 0


# From the best to the smallest.
_STORAGES: tuple[_Storage, ...] = (
    _Storage("as they are", 1.0, "Flat"),
    _Storage("in 16 bits per feature", 0.999, "SQfp16"),
    _Storage("in 8 bits per feature", 0.98, "SQ8"),
    _Storage("in 6 bits per feature", 0.94, "SQ6"),
    _Storage("in 8 bits per 2 features", 0.85, "PQ{m}", 2),
    _Storage("in 8 bits per 4 features", 0.65, "PQ{m}", 4),
    _Storage("in 8 bits per 8 features", 0.4, "PQ{m}", 8),
)


@dataclasses.dataclass(frozen=True)
class _Candidate:
    storage: _Storage
    description: str
    memory_bytes: int


def suggest_index(
    n: int,
    dim: int,
    *,
    memory_bytes: int | None = None,
    target_recall: float = 0.95,
    metric: str = "l2",
) -> Suggestion:
    """Say which index to take.

    Few vectors are searched exactly. More are kept in lists, as they are where memory allows, and else in
    the finest code that fits. What recall a search reaches depends on ``nprobe``, which is to be raised until
    it is enough; the storage only limits it.

    Args:
        n: N, number of vectors that the index will hold.
        dim: D, size of a vector.
        memory_bytes: what the index may occupy on a CPU, in bytes, its centroids included; temporary memory
            of a search comes on top (``workspace_bytes`` of the index). Default: no limit.
        target_recall: share of the 10 true nearest neighbours that is to be found, above 0. 1 asks for
            exact search.
        metric: name of the distance kind, or an alias. For those that are no product, vectors are not
            coded by parts.

    Returns:
        Suggestion: a string for `index_factory`, with ``memory_bytes`` and ``reason``.

    Raises:
        ArgumentError: nothing that reaches the recall fits into the memory; the message says the least
            that would be enough.
        ElipsError: an argument has a wrong type or value.

    >>> suggestion = suggest_index(1_000_000, 128, memory_bytes=200 * 2**20)
    >>> suggestion
    'IVF4096,SQ8'
    >>> suggestion.memory_bytes < 200 * 2**20
    True
    """
    n, dim = check_count("n", n), check_count("dim", dim)
    limit = math.inf if memory_bytes is None else check_count("memory_bytes", memory_bytes)
    if isinstance(target_recall, bool) or not isinstance(target_recall, (int, float)):
        raise DtypeError(f"target_recall is {target_recall!r}, expected a number")
    if not 0.0 < target_recall <= 1.0:
        raise ArgumentError(f"target_recall is {target_recall}, expected a share above 0 and up to 1")
    candidates = list(_candidates(n, dim, metric, exact=n <= _FEW or target_recall == 1.0))
    good = [each for each in candidates if each.storage.recall >= target_recall]
    fitting = [each for each in good if each.memory_bytes <= limit]
    if not fitting:
        least = min(good, key=lambda each: each.memory_bytes)
        fault = (
            f"memory_bytes is {limit:,}, expected at least {least.memory_bytes:,} for {n:,} vectors of dim "
            f"{dim} and a recall of {target_recall:g} ({least.description!r})"
        )
        rest = [each for each in candidates if each.memory_bytes <= limit]
        if rest:
            fault += f"; {rest[0].description!r} fits, for a recall of about {rest[0].storage.recall:g}"
        raise ArgumentError(fault)
    best = fitting[0]
    return Suggestion(
        best.description, best.memory_bytes, _reason(best, candidates[0], n, memory_bytes, target_recall)
    )


def _candidates(n: int, dim: int, metric: str, *, exact: bool) -> Iterator[_Candidate]:
    """Yield what there is for these vectors, from the best to the smallest."""
    is_product = resolve_metric(metric).form == "product"
    lists = "" if exact else f"IVF{usual_nlist(n)},"
    for storage in _STORAGES:
        if not storage.features_per_part:
            text = storage.text
        elif is_product and n >= _PER_CENTROID * _CENTROIDS_OF_A_PART and dim >= storage.features_per_part:
            m = dim // storage.features_per_part
            kept = m * storage.features_per_part
            text = f"OPQ{m}{'' if kept == dim else f'_{kept}'},{lists}{storage.text.format(m=m)}"
        else:
            continue
        description = text if storage.features_per_part else lists + text
        yield _Candidate(
            storage, description, estimate_memory_bytes(index_factory(dim, description, metric), n)
        )


def usual_nlist(n: int) -> int:
    """Return a power of two near 4 roots of n, with enough vectors in each list to learn from."""
    wanted = round(math.log2(4 * math.sqrt(n)))
    return int(2 ** min(wanted, int(math.log2(n / _PER_CENTROID))))


def _reason(
    best: _Candidate, whole: _Candidate, n: int, memory_bytes: int | None, target_recall: float
) -> str:
    """Return why this one, in a sentence."""
    size = _readable(best.memory_bytes)
    if best.description == "Flat":
        few = (
            f"{n:,} vectors are few enough to look at all" if n <= _FEW else "Recall 1 asks for exact search"
        )
        return f"{few}: this finds exactly the nearest, and takes about {size}."
    probes = f"; raise nprobe until recall reaches {target_recall:g}" if "IVF" in best.description else ""
    if best is whole:
        allowed = "" if memory_bytes is None else f" of the {_readable(memory_bytes)} allowed"
        return (
            f"Lists spare looking at all {n:,} vectors, which take about {size}{allowed} as they are{probes}."
        )
    return (
        f"The vectors as they are take {_readable(whole.memory_bytes)}, more than the "
        f"{_readable(memory_bytes or 0)} allowed; {best.storage.name}, the finest that fits, the index takes "
        f"about {size} and can reach a recall of about {best.storage.recall:g}{probes}."
    )


def _readable(size: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if size >= unit:
            # Three digits would write 1000 MiB as 1e+03.
            return f"{size / unit:.{3 if size < 1000 * unit else 4}g} {name}"
    return f"{size} bytes"
