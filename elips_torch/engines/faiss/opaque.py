"""Indexes of faiss as they are: made, filled, asked for vectors, and turned into bytes."""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from elips_torch.core.errors import (
    ArgumentError,
    ConversionError,
    DamagedIndexError,
    DtypeError,
    FactoryError,
    ImplementationError,
    IndexFileError,
    MetricError,
    NotFittedError,
)
from elips_torch.core.metric import Metric, resolve_metric
from elips_torch.core.validation import check_count
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.engines.faiss.consistency import indexes_inside
from elips_torch.engines.faiss.fast_scan import mend_fast_scan
from elips_torch.engines.faiss.forked import use_one_thread_if_forked
from elips_torch.engines.faiss.graphs_in_bytes import check_bytes, label_lists_in_hash
from elips_torch.engines.faiss.lists_on_disk import check_lists_on_disk
from elips_torch.engines.faiss.messages import expected_instead_of, reason_of
from elips_torch.engines.faiss.row_kinds import (
    BITS,
    FLOATS,
    LARGEST_HASH,
    MARK_OF_BITS,
    RowKind,
    downcast,
    kind_of,
)
from elips_torch.engines.faiss.search import cuda_device, index_gpu, placed
from elips_torch.engines.faiss.transfer import to_cpu
from elips_torch.engines.faiss.written import prepare_to_train, prepare_to_write

# "cosine" is the inner product of normalised vectors.
_METRICS = {
    "l2": "METRIC_L2",
    "ip": "METRIC_INNER_PRODUCT",
    "cosine": "METRIC_INNER_PRODUCT",
    "l1": "METRIC_L1",
    "linf": "METRIC_Linf",
    "lp": "METRIC_Lp",
    "canberra": "METRIC_Canberra",
    "braycurtis": "METRIC_BrayCurtis",
    "jensenshannon": "METRIC_JensenShannon",
    "gower": "METRIC_GOWER",
}

# A dim is an int of C++.
_LARGEST_DIM = 2**31 - 1


def build_index(build: FaissBuild, dim: int, description: str, metric: Metric) -> Any:
    """Return an empty index that a description in faiss's grammar stands for; of bits, if that begins with B.

    Raises:
        FactoryError: faiss cannot make it; with what faiss says.
        DtypeError: the dim is no int, or the description no string.
        ArgumentError: a dim that faiss does not have.
        MetricError: this faiss has no such metric.
    """
    if check_count("dim", dim) > _LARGEST_DIM:
        raise ArgumentError(f"dim is {dim}, faiss has at most {_LARGEST_DIM}")
    if not isinstance(description, str):
        raise DtypeError(f"description is {description!r}, expected a string such as 'HNSW32'")
    of_bits = description.startswith("B")
    if of_bits and metric.name != "l2":
        raise MetricError(
            f"metric is {metric.name!r}, an index of bits has Hamming distances, which are 'l2'"
        )
    kind = getattr(build.module, _METRICS[metric.name], None)
    if kind is None:
        raise MetricError(f"metric is {metric.name!r}, which {build} does not have")
    try:
        if of_bits:
            return build.module.index_binary_factory(dim, description)
        index = build.module.index_factory(dim, description, kind)
    except RuntimeError as error:
        raise FactoryError(
            f"faiss makes no index of {description!r} for dim {dim}: {reason_of(error)}"
        ) from error
    if metric.name == "lp":
        index.metric_arg = metric.p
    return index


def check_index(build: FaissBuild, index: Any) -> None:
    """Check that this is an index of this build.

    Raises:
        DtypeError: it is none.
        ArgumentError: a hash of no bits, or of more than there are.
    """
    if not isinstance(index, build.module.Index | build.module.IndexBinary):
        expected = expected_instead_of(index)
        raise DtypeError(f"faiss_index is of type {type(index).__name__}, expected {expected}")
    if isinstance(index, build.module.IndexBinaryHash | build.module.IndexBinaryMultiHash):
        most = min(int(index.d), LARGEST_HASH)
        if not 1 <= index.b <= most:
            raise ArgumentError(f"faiss_index hashes {index.b} bits, expected 1 to {most}")


def metric_of_index(build: FaissBuild, index: Any) -> Metric:
    """Return the metric of an index.

    The Hamming distance of bits is "l2", the squared distance of zeros and ones.

    Raises:
        MetricError: one that the library does not have.
    """
    if isinstance(index, build.module.IndexBinaryFromFloat):
        kind = metric_of_index(build, downcast(build, index.index))
        if kind.name != "l2":
            raise MetricError(f"faiss_index has bits over an index of metric {kind.name!r}, expected 'l2'")
    if kind_of(build, index) is BITS:
        return resolve_metric("l2")
    for name, constant in _METRICS.items():
        if getattr(build.module, constant, None) == index.metric_type:
            return resolve_metric(name, float(index.metric_arg) if name == "lp" else None)
    raise MetricError(
        f"faiss_index has faiss's metric number {index.metric_type}, expected one of {', '.join(_METRICS)}"
    )


def without_labels(build: FaissBuild, index: Any) -> tuple[Any, Tensor | None]:
    """Take the users' labels off an index, so that its rows count from 0.

    Returns:
        An index whose labels are row numbers, and the label ``(N,)`` of each row, None where they were
        that already. An index that keeps labels of its own in its lists, or behind transforms, is copied, any
        other is not.
    """
    faiss = build.module
    if isinstance(index, faiss.IndexIDMap | faiss.IndexBinaryIDMap):
        labels = torch.from_numpy(faiss.vector_to_array(index.id_map).copy())
        inner = downcast(build, index.index)
        # Whoever frees the map frees the index within. It takes no attribute but this.
        inner.referenced_objects = [index]
        return inner, labels
    if isinstance(index, faiss.IndexPreTransform) and isinstance(
        faiss.downcast_index(index.index), faiss.IndexIDMap
    ):
        index = copied(build, index)
        id_map = faiss.downcast_index(index.index)
        labels = torch.from_numpy(faiss.vector_to_array(id_map.id_map).copy())
        # What it had goes to the transforms, and it is freed here.
        id_map.own_fields, index.index = False, id_map.index
        id_map.this.own(True)
        return index, labels
    if isinstance(index, faiss.IndexBinaryFromFloat):
        inner = downcast(build, index.index)
        if isinstance(inner, faiss.IndexIDMap) or without_labels(build, inner)[1] is not None:
            raise ConversionError(
                f"index has labels of its own in {type(inner).__name__} under its bits; "
                "an IndexBinaryIDMap around it keeps them"
            )
        return index, None
    if isinstance(index, faiss.IndexBinaryHash):
        return _without_labels_in_hash(build, index)
    lists = None if index.ntotal == 0 else inverted_file(build, index)
    if lists is None:
        return index, None
    labels = torch.cat([torch.as_tensor(each) for each in list_labels(build, lists)]).sort().values
    rows = torch.arange(len(labels))
    if torch.equal(labels, rows):
        return index, None
    try:
        index = copied(build, index)
    except ConversionError as error:
        raise ConversionError(
            f"the labels are not 0 to N - 1 and are to be kept apart, but {error}, as read_faiss does"
        ) from error
    lists = inverted_file(build, index)
    lists.set_direct_map_type(faiss.DirectMap.NoMap)
    for each in list_labels(build, lists):
        each[:] = torch.searchsorted(labels, torch.as_tensor(each)).numpy()
    return index, labels


def _without_labels_in_hash(build: FaissBuild, index: Any) -> tuple[Any, Tensor | None]:
    content = build.module.serialize_index_binary(index)
    lists = label_lists_in_hash(content.data)
    labels = torch.as_tensor(np.concatenate([np.empty(0, np.int64), *lists])).sort().values
    if len(labels) != index.ntotal:
        raise DamagedIndexError(f"index is damaged: it has {index.ntotal} vectors and {len(labels)} labels")
    if torch.equal(labels, torch.arange(len(labels))):
        return index, None
    for each in lists:
        each[:] = torch.searchsorted(labels, torch.as_tensor(each)).numpy()
    return from_bytes(build, torch.as_tensor(content)), labels


def copied(build: FaissBuild, index: Any) -> Any:
    """Return a copy of an index on the CPU.

    Raises:
        ConversionError: its inverted lists lie in a file, which a copy would share.
    """
    faiss = build.module
    lists = inverted_file(build, index)
    if lists is not None and lists.invlists is not None:
        kind = faiss.downcast_InvertedLists(lists.invlists)
        if not isinstance(kind, faiss.ArrayInvertedLists | faiss.BlockInvertedLists):
            raise ConversionError(
                f"index is {type(index).__name__} with {type(kind).__name__}, which faiss does not copy; "
                "read the index into memory first"
            )
    use_one_thread_if_forked(build)
    if not _is_mapped(build, index):
        try:
            return mend_fast_scan(build, getattr(faiss, kind_of(build, index).clone)(index))
        except RuntimeError:
            # Some families are written but not cloned.
            pass
    return from_bytes(build, to_bytes(build, index))


def _is_mapped(build: FaissBuild, index: Any) -> bool:
    """Whether an index reads codes from a mapped file, as clones would, where none can be written."""
    index = downcast(build, index)
    held = [getattr(index, "codes", None)]
    lists = getattr(index, "invlists", None)
    # Those of a hash are no such lists.
    if isinstance(lists, build.module.InvertedLists):
        lists = build.module.downcast_InvertedLists(lists)
        if isinstance(lists, build.module.ArrayInvertedLists) and lists.nlist:
            held.append(lists.codes.at(0))
    if any(getattr(each, "is_owned", True) is False for each in held):
        return True
    return any(_is_mapped(build, inner) for _, inner in indexes_inside(build, index))


def prepare_to_reconstruct(build: FaissBuild, index: Any) -> None:
    """Let an inverted file find its rows by their number; 8 bytes a row."""
    lists = inverted_file(build, index)
    if lists is not None and hasattr(lists, "make_direct_map") and lists.direct_map.no():
        lists.make_direct_map()


def inverted_file(build: FaissBuild, index: Any) -> Any:
    """Return the inverted file inside an index, None where there is none."""
    if kind_of(build, index) is FLOATS:
        return build.module.try_extract_index_ivf(index)
    return index if isinstance(index, build.module.IndexBinaryIVF) else None


def train(build: FaissBuild, index: Any, vectors: Tensor) -> None:
    """Teach an index on vectors ``(N, D)`` or bits ``(N, D / 8)``.

    Raises:
        ImplementationError: faiss refuses, with what it says.
    """
    kind = kind_of(build, index)
    rows = _rows_for(index, vectors, kind)
    try:
        with placed(build, index):
            index.train_c(len(rows), kind.pointer_to(build, rows))
    except RuntimeError as error:
        raise _refused("train", index, error) from error


def append(build: FaissBuild, index: Any, vectors: Tensor) -> Tensor:
    """Add vectors ``(N, D)`` or bits ``(N, D / 8)`` and return the rows ``(N,)`` that they became.

    Raises:
        NotFittedError: the index must be trained first.
        ImplementationError: faiss refuses, with what it says.
    """
    if not index.is_trained:
        raise NotFittedError(f"{type(index).__name__} takes no vectors before fit(vectors)")
    first = int(index.ntotal)
    if len(vectors):
        kind = kind_of(build, index)
        rows = _rows_for(index, vectors, kind)
        try:
            with placed(build, index):
                index.add_c(len(rows), kind.pointer_to(build, rows))
        except RuntimeError as error:
            raise _refused("add", index, error) from error
    return torch.arange(first, first + len(vectors))


def emptied(build: FaissBuild, index: Any) -> Any:
    """Return an index without its rows: itself, where faiss forgets them all."""
    if not isinstance(index, build.module.IndexBinaryMultiHash):
        index.reset()
        return index
    # Up to 1.14 its maps go on with the rows that are gone.
    made = build.module.IndexBinaryMultiHash(index.d, index.nhash, index.b)
    made.nflip = index.nflip
    return made


def reconstruct(build: FaissBuild, index: Any, rows: Tensor) -> Tensor:
    """Return the vectors ``(M, D)``, or bits ``(M, D / 8)``, of rows ``(M,)``, as the index has kept them.

    Raises:
        ImplementationError: the family cannot.
    """
    kind = kind_of(build, index)
    vectors = torch.empty((len(rows), kind.row_size(int(index.d))), dtype=kind.rows, device="cpu")
    if not rows.numel():
        return vectors
    keys = rows.cpu().contiguous()
    try:
        with placed(build, index):
            if kind is FLOATS:
                numbers = build.module.cast_integer_to_idx_t_ptr(keys.data_ptr())
                index.reconstruct_batch_c(len(keys), numbers, kind.pointer_to(build, vectors))
            else:
                # Of these there is no batch.
                for key, vector in zip(keys.tolist(), vectors, strict=True):
                    index.reconstruct_c(key, kind.pointer_to(build, vector))
    except RuntimeError as error:
        raise _refused("reconstruct", index, error) from error
    return vectors


def to_bytes(build: FaissBuild, index: Any) -> Tensor:
    """Return an index as faiss writes it to files, uint8 ``(M,)``.

    Raises:
        ImplementationError: the family does not come back from bytes.
    """
    on_cpu = to_cpu(build, index)
    prepare_to_write(build, on_cpu)
    try:
        return torch.as_tensor(getattr(build.module, kind_of(build, index).serialize)(on_cpu))
    except RuntimeError as error:
        raise _refused("write", index, error) from error


def from_bytes(build: FaissBuild, content: Tensor) -> Any:
    """Return the index that `to_bytes` wrote.

    Raises:
        IndexFileError: faiss cannot read it.
    """
    # Tables are computed anew.
    use_one_thread_if_forked(build)
    held = content.contiguous().cpu().numpy()
    kind = BITS if held[: len(MARK_OF_BITS)].tobytes() == MARK_OF_BITS else FLOATS
    try:
        check_bytes(held.data)
        index = getattr(build.module, kind.deserialize)(held)
        check_lists_on_disk(build, index)
    except (RuntimeError, MemoryError, DamagedIndexError) as error:
        raise IndexFileError(f"faiss cannot read the index: {reason_of(error)}") from error
    return prepare_to_train(build, mend_fast_scan(build, index))


def count_bytes(build: FaissBuild, index: Any) -> int:
    """Return how many bytes `to_bytes` would take, without taking them."""
    counted = 0

    def count(chunk: bytes) -> None:
        nonlocal counted
        counted += len(chunk)

    writer = build.module.PyCallbackIOWriter(count)
    write = getattr(build.module, kind_of(build, index).write)
    write(to_cpu(build, index), build.module.BufferedIOWriter(writer))
    return counted


def describe_refusal(verb: str, index: Any, error: RuntimeError) -> ImplementationError:
    """Return the error that says what faiss did not do."""
    return _refused(verb, index, error)


def _refused(verb: str, index: Any, error: RuntimeError) -> ImplementationError:
    return ImplementationError(f"faiss's {type(index).__name__} does not {verb}: {reason_of(error)}")


def _rows_for(index: Any, vectors: Tensor, kind: RowKind) -> Tensor:
    """Return vectors as an index reads them; themselves where it can."""
    number = index_gpu(index)
    device = torch.device("cpu") if number is None else cuda_device(number)
    return vectors.detach().to(device, kind.rows).contiguous()


def list_labels(build: FaissBuild, lists: Any) -> list[Any]:
    """Return the labels of each list, as arrays on the memory of the index."""
    inverted = lists.invlists
    sizes = [int(inverted.list_size(number)) for number in range(inverted.nlist)]
    return [
        build.module.rev_swig_ptr(inverted.get_ids(number), size) for number, size in enumerate(sizes) if size
    ]
