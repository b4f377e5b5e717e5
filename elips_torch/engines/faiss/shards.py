"""Inverted files of faiss in parts: shards on disk, and lists that somebody else has chosen."""

import dataclasses
import importlib
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import (
    ArgumentError,
    ConversionError,
    DtypeError,
    DuplicateIdError,
    IndexFileError,
    ShapeError,
)
from elips_torch.core.validation import check_device, check_flag, check_k, check_vectors
from elips_torch.engines.faiss.builds import FaissBuild, load_installed, standing_as_faiss
from elips_torch.engines.faiss.forked import use_one_thread_if_forked
from elips_torch.engines.faiss.index_files import check_path, read_index, write_index
from elips_torch.engines.faiss.messages import reason_of
from elips_torch.engines.faiss.opaque import describe_refusal, list_labels, to_bytes, without_labels
from elips_torch.engines.faiss.search_parameters import ignores_nprobe_of_calls
from elips_torch.engines.faiss.stats import SEARCHES

_CPU = torch.device("cpu")
_changing_nprobe = threading.Lock()


def merge_faiss_shards(
    shards: Sequence[str | os.PathLike[str]],
    path: str | os.PathLike[str],
    *,
    data_path: str | os.PathLike[str] | None = None,
    shift_ids: bool = False,
) -> int:
    """Merge files of inverted files that share centroids into one whose lists stay on disk.

    By ``faiss.contrib.ondisk``: memory holds no list, only the ids of shards while they are compared.
    `read_faiss` and ``faiss.read_index`` read the result; it refers to its data by their path.

    Args:
        shards: files of faiss, each an inverted file, also behind transforms or under an id map, with the
            same training.
        path: the index file to write; it must not exist.
        data_path: where the lists go, default ``path`` with ".ivfdata" at its end; it must not exist.
        shift_ids: number the vectors of each shard after those of the ones before; for shards that each
            count from 0, which are refused otherwise.

    Returns:
        Number of vectors.

    Raises:
        ArgumentError: no shards, several that count from 0, or a file to write is there already.
        DuplicateIdError: vectors of one shard or of two would have the same id.
        FileNotFoundError: there is no such shard.
        IndexFileError: a shard is damaged or foreign, or trained otherwise than the first.
        ConversionError: a shard has no inverted lists, or of a kind that faiss does not leave on disk.
        DtypeError: shards is no list, or something else no path.
        ImportError: faiss is not installed.

    >>> import tempfile
    >>> import faiss
    >>> index = faiss.index_factory(2, "IVF1,Flat")
    >>> index.train(torch.zeros(39, 2).numpy())
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     for number in range(3):
    ...         shard = faiss.clone_index(index)
    ...         shard.add(torch.rand(10, 2).numpy())
    ...         faiss.write_index(shard, f"{folder}/{number}.faiss")
    ...     shards = [f"{folder}/{number}.faiss" for number in range(3)]
    ...     merge_faiss_shards(shards, f"{folder}/all.faiss", shift_ids=True)
    30
    """
    if isinstance(shards, str | bytes) or not isinstance(shards, Sequence):
        raise DtypeError(f"shards is {shards!r}, expected a list of files to merge")
    check_flag("shift_ids", shift_ids)
    if not shards:
        raise ArgumentError("shards is empty, expected files to merge")
    index_path = check_path("path", path)
    data = Path(f"{index_path}.ivfdata") if data_path is None else check_path("data_path", data_path)
    for target in (index_path, data):
        if target.exists():
            raise ArgumentError(f"{os.fspath(target)!r} is there already")
    build = load_installed()
    faiss = build.module
    first = _read_shard(build, shards[0])[0]
    _check_labels(build, shards, shift_ids)
    nprobe = faiss.extract_index_ivf(first).nprobe
    for shard in shards[1:]:
        _check_same_training(build, first, _read_shard(build, shard)[0], shard)
    _empty(build, first)
    faiss.extract_index_ivf(first).nprobe = nprobe
    use_one_thread_if_forked(build)
    with standing_as_faiss(build):
        ondisk = importlib.import_module("faiss.contrib.ondisk")
    try:
        ondisk.merge_ondisk(first, [os.fspath(shard) for shard in shards], os.fspath(data), shift_ids)
        _put_labels(build, first, shards, shift_ids)
        write_index(build, first, path)
    except RuntimeError as error:
        raise IndexFileError(f"faiss could not merge the shards: {reason_of(error)}") from error
    finally:
        if not Path(path).exists():
            data.unlink(missing_ok=True)
    return int(faiss.extract_index_ivf(first).ntotal)


def _read_shard(build: FaissBuild, path: str | os.PathLike[str]) -> tuple[Any, Tensor | None]:
    """Return a shard without the id map around it, and the label ``(N,)`` of each row that the map has."""
    index, labels = read_index(build, path, on_disk=True), None
    if isinstance(index, build.module.IndexIDMap):
        index, labels = without_labels(build, index)
    inner = index
    while isinstance(inner, build.module.IndexPreTransform):
        inner = build.module.downcast_index(inner.index)
    if not isinstance(inner, build.module.IndexIVF) or isinstance(inner, build.module.IndexIVFPQR):
        raise ConversionError(
            f"{os.fspath(path)!r} holds {type(index).__name__}, expected an inverted file whose lists are "
            "all that it has of its vectors"
        )
    return index, labels


def _labels_of(build: FaissBuild, path: str | os.PathLike[str]) -> Iterator[Tensor]:
    """Yield the labels of each list of a shard that holds any."""
    index, labels = _read_shard(build, path)
    for each in list_labels(build, build.module.extract_index_ivf(index)):
        rows = torch.as_tensor(each)
        if labels is not None and not 0 <= int(rows.min()) <= int(rows.max()) < len(labels):
            raise IndexFileError(
                f"{os.fspath(path)!r} is damaged: its lists hold rows that its id map has not"
            )
        yield rows if labels is None else labels[rows]


def _put_labels(
    build: FaissBuild, merged: Any, shards: Sequence[str | os.PathLike[str]], shift_ids: bool
) -> None:
    """Give the rows of shards under id maps, which are merged by their numbers, their labels."""
    lists = build.module.extract_index_ivf(merged).invlists
    done, before = [0] * lists.nlist, 0
    for path in shards:
        index, labels = _read_shard(build, path)
        part = build.module.extract_index_ivf(index).invlists
        shift = before if shift_ids else 0
        for number, start in enumerate(done):
            done[number] = stop = start + int(part.list_size(number))
            if labels is not None and start < stop:
                held = torch.as_tensor(build.module.rev_swig_ptr(lists.get_ids(number), stop))
                held[start:] = labels[held[start:] - shift] + shift
        before += int(index.ntotal)


@dataclasses.dataclass(frozen=True)
class _Labels:
    """Where the labels of the vectors in a shard begin and end, after they are shifted."""

    path: str
    shift: int
    low: int
    high: int

    def read(self, build: FaissBuild) -> Tensor:
        """Return them, in the order of the lists."""
        return torch.cat([each.clone() for each in _labels_of(build, self.path)]) + self.shift


def _check_labels(build: FaissBuild, shards: Sequence[str | os.PathLike[str]], shift_ids: bool) -> None:
    """Raise `ArgumentError` where two shards number their vectors from 0, or two vectors have one label."""
    found, counting, before = [], [], 0
    for shard in shards:
        spans = [(int(each.min()), int(each.max()), len(each)) for each in _labels_of(build, shard)]
        if not spans:
            continue
        low, high = min(low for low, _, _ in spans), max(high for _, high, _ in spans)
        total = sum(size for _, _, size in spans)
        shift = before if shift_ids else 0
        found.append(_Labels(os.fspath(shard), shift, low + shift, high + shift))
        before += total
        if (low, high) == (0, total - 1):
            counting.append(repr(os.fspath(shard)))
    if len(counting) > 1 and not shift_ids:
        raise ArgumentError(
            f"{counting[0]} and {counting[1]} both number their vectors from 0; "
            "shift_ids=True numbers those of each shard after the ones before"
        )
    group: list[_Labels] = []
    for each in sorted(found, key=lambda labels: labels.low):
        # Those that overlap with none of the others are in memory alone.
        if group and each.low > max(labels.high for labels in group):
            _check_different(build, group)
            group = []
        group.append(each)
    _check_different(build, group)


def _check_different(build: FaissBuild, group: Sequence[_Labels]) -> None:
    """Raise `DuplicateIdError` where two vectors of these shards have one label."""
    if not group:
        return
    ordered = torch.cat([each.read(build) for each in group]).sort().values
    twice = ordered[1:][ordered[1:] == ordered[:-1]]
    if not len(twice):
        return
    label = int(twice[0])
    holders = [repr(each.path) for each in group if bool((each.read(build) == label).any())]
    raise DuplicateIdError(
        f"shards hold the id {label} {'more than once' if len(holders) == 1 else 'each'}: "
        f"{' and '.join(holders)}; ids of merged vectors must differ"
    )


def _empty(build: FaissBuild, index: Any) -> None:
    """Leave an index what it has learned; its lists are those of a file, which are not to change."""
    ivf = build.module.extract_index_ivf(index)
    lists = build.module.ArrayInvertedLists(ivf.nlist, ivf.code_size)
    ivf.replace_invlists(lists, True)
    lists.this.disown()
    index.reset()
    ivf.set_direct_map_type(build.module.DirectMap.NoMap)


def _check_same_training(build: FaissBuild, first: Any, other: Any, path: str | os.PathLike[str]) -> None:
    faiss = build.module
    ours, theirs = faiss.extract_index_ivf(first), faiss.extract_index_ivf(other)
    where = os.fspath(path)
    for name in ("d", "nlist", "code_size", "metric_type"):
        if getattr(ours, name) != getattr(theirs, name):
            raise IndexFileError(
                f"{where!r} has {name} {getattr(theirs, name)}, the first shard has {getattr(ours, name)}"
            )
    # All that was learned, centroids, codebooks and transforms, is what is left without lists.
    learned = []
    for index, ivf in ((first, ours), (other, theirs)):
        _empty(build, index)
        ivf.nprobe = 1
        learned.append(to_bytes(build, index))
    if not torch.equal(*learned):
        raise IndexFileError(f"{where!r} was trained otherwise than the first shard")


def search_preassigned(
    index: Any,
    queries: Tensor,  # (Q, D)
    k: int,
    lists: Tensor,  # (Q, P)
    coarse_scores: Tensor | None = None,  # (Q, P)
) -> tuple[Tensor, Tensor]:  # (Q, K) float32, (Q, K) int64
    """Search an inverted file of faiss in chosen lists.

    The index itself is not changed: several threads may search it so. (Before faiss 1.14 a fast scan of
    residuals takes the number of lists from the index, which ordinary searches beside it then see.)

    Args:
        index: an inverted file of faiss on the CPU, also behind transforms.
        queries: ``(Q, D)`` float dtype, on the CPU.
        k: number of neighbours.
        lists: ``(Q, P)`` int64, the numbers of the lists that each query reads; -1 for none. P is at most
            the number of lists.
        coarse_scores: ``(Q, P)`` float32, the scores of the centroids of these lists, which product-quantized
            residuals and inner products of residuals need.

    Returns:
        Scores and ids, as faiss gives them.

    Raises:
        ElipsError: an argument of wrong type, shape or dtype; no inverted file.
    """
    build = load_installed()
    ivf = _inverted_file(build, index)
    check_vectors("queries", queries, dim=int(index.d), device=_CPU)
    check_k(k)
    _check_lists("lists", lists, len(queries), ivf.nlist, least=-1)
    if lists.ndim != 2:
        raise ShapeError(f"lists has shape {tuple(lists.shape)}, expected (Q, P)")
    if not 1 <= lists.shape[1] <= ivf.nlist:
        raise ShapeError(
            f"lists has {lists.shape[1]} columns, expected 1 to {ivf.nlist}, the number of lists"
        )
    if coarse_scores is None and ivf.by_residual and not type(ivf).__name__.startswith("IndexIVFFlat"):
        raise ArgumentError("coarse_scores is missing, which an inverted file of residuals needs")
    if coarse_scores is not None:
        check_vectors("coarse_scores", coarse_scores, dim=lists.shape[1], owner="lists", device=_CPU)
        if len(coarse_scores) != len(lists):
            raise ShapeError(f"coarse_scores has {len(coarse_scores)} rows, lists has {len(lists)}")
    use_one_thread_if_forked(build)
    given = torch.zeros(lists.shape) if coarse_scores is None else coarse_scores.detach().float()
    rows = queries.detach().float().contiguous()
    # Its own way past transforms takes one only.
    for transform in _transforms(build, index):
        rows = torch.as_tensor(transform.apply(rows.numpy()))
    found = _search_lists(build, ivf, rows, k, lists.contiguous(), given.contiguous())
    SEARCHES.count(queries=len(queries), nbytes=rows.nbytes + found[0].nbytes + found[1].nbytes)
    return found


def _search_lists(
    build: FaissBuild, ivf: Any, rows: Tensor, k: int, lists: Tensor, coarse_scores: Tensor
) -> tuple[Tensor, Tensor]:
    faiss, n_probes = build.module, lists.shape[1]
    scores = torch.empty((len(rows), k), dtype=torch.float32, device="cpu")
    ids = torch.empty((len(rows), k), dtype=torch.int64, device="cpu")
    floats, labels = faiss.cast_integer_to_float_ptr, faiss.cast_integer_to_idx_t_ptr
    arguments = (
        len(rows),
        floats(rows.data_ptr()),
        k,
        labels(lists.data_ptr()),
        floats(coarse_scores.data_ptr()),
        floats(scores.data_ptr()),
        labels(ids.data_ptr()),
        False,
    )
    try:
        if not ignores_nprobe_of_calls(build, ivf):
            ivf.search_preassigned_c(
                *arguments, faiss.SearchParametersIVF(nprobe=n_probes, max_codes=ivf.max_codes)
            )
            return scores, ids
        with _changing_nprobe:
            before, ivf.nprobe = ivf.nprobe, n_probes
            try:
                ivf.search_preassigned_c(*arguments)
            finally:
                ivf.nprobe = before
    except RuntimeError as error:
        raise describe_refusal("search in chosen lists", ivf, error) from error
    return scores, ids


def add_preassigned(
    index: Any,
    vectors: Tensor,  # (N, D)
    lists: Tensor,  # (N,)
    ids: Tensor | None = None,  # (N,)
) -> None:
    """Add vectors to chosen lists of an inverted file of faiss, by ``faiss.contrib.ivf_tools``.

    Args:
        index: an inverted file of faiss on the CPU, not behind a transform.
        vectors: ``(N, D)``, on the CPU.
        lists: ``(N,)`` int64, the number of the list of each vector.
        ids: ``(N,)`` int64; default are the numbers from ``index.ntotal`` on.

    Raises:
        ElipsError: an argument of wrong type, shape or dtype; no inverted file.
    """
    build = load_installed()
    ivf = _inverted_file(build, index)
    if _transforms(build, index):
        raise ConversionError("index transforms its vectors; transform them and add them to what is behind")
    check_vectors("vectors", vectors, dim=int(index.d), device=_CPU)
    _check_lists("lists", lists, len(vectors), ivf.nlist, least=0)
    if lists.ndim != 1:
        raise ShapeError(f"lists has shape {tuple(lists.shape)}, expected (N,)")
    if ids is not None:
        _check_numbers("ids", ids, len(vectors))
        if ids.ndim != 1:
            raise ShapeError(f"ids has shape {tuple(ids.shape)}, expected (N,)")
    use_one_thread_if_forked(build)
    _ivf_tools(build).add_preassigned(
        ivf,
        vectors.detach().float().contiguous().numpy(),
        lists.contiguous().numpy(),
        None if ids is None else ids.contiguous().numpy(),
    )


def _inverted_file(build: FaissBuild, index: Any) -> Any:
    faiss = build.module
    if not isinstance(index, faiss.Index):
        raise DtypeError(
            f"index is of type {type(index).__name__}, expected an inverted file of faiss that holds "
            "floats, such as the faiss_index of a FaissIndex"
        )
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexIVF):
        return index
    if isinstance(index, faiss.IndexPreTransform):
        return _inverted_file(build, index.index)
    raise ConversionError(f"index is {type(index).__name__}, expected an inverted file of faiss")


def _transforms(build: FaissBuild, index: Any) -> list[Any]:
    """Return the transforms in front of an inverted file, the first one first."""
    faiss = build.module
    index = faiss.downcast_index(index)
    if not isinstance(index, faiss.IndexPreTransform):
        return []
    chain = [faiss.downcast_VectorTransform(index.chain.at(i)) for i in range(index.chain.size())]
    return chain + _transforms(build, index.index)


def _check_numbers(name: str, numbers: Tensor, n: int) -> None:
    if not isinstance(numbers, Tensor) or numbers.dtype != torch.int64:
        got = numbers.dtype if isinstance(numbers, Tensor) else type(numbers).__name__
        raise DtypeError(f"{name} is {got}, expected an int64 tensor")
    # Faiss reads them where they lie.
    check_device(name, numbers, _CPU, "the index")
    if not numbers.ndim or len(numbers) != n:
        raise ShapeError(f"{name} has shape {tuple(numbers.shape)}, expected {n} rows")


def _check_lists(name: str, lists: Tensor, n: int, nlist: int, *, least: int) -> None:
    _check_numbers(name, lists, n)
    if lists.numel() and not least <= int(lists.min()) <= int(lists.max()) < nlist:
        span = f"{int(lists.min())} to {int(lists.max())}"
        raise ArgumentError(f"{name} has {span}, expected {least} <= list < {nlist}")


def _ivf_tools(build: FaissBuild) -> Any:
    with standing_as_faiss(build):
        return importlib.import_module("faiss.contrib.ivf_tools")
