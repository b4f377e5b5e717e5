"""Indexes of faiss as they are: made, filled, asked for vectors, and turned into bytes."""

from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import (
    ConversionError,
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
from elips_torch.engines.faiss.fast_scan import mend_fast_scan
from elips_torch.engines.faiss.forked import use_one_thread_if_forked
from elips_torch.engines.faiss.messages import reason_of
from elips_torch.engines.faiss.search import cuda_device, index_gpu, placed
from elips_torch.engines.faiss.transfer import to_cpu

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


def build_index(build: FaissBuild, dim: int, description: str, metric: Metric) -> Any:
    """Return an empty index that a description in faiss's grammar stands for.

    Raises:
        FactoryError: faiss cannot make it; with what faiss says.
        DtypeError: the dim is no int, or the description no string.
        MetricError: this faiss has no such metric.
    """
    check_count("dim", dim)
    if not isinstance(description, str):
        raise DtypeError(f"description is {description!r}, expected a string such as 'HNSW32'")
    kind = getattr(build.module, _METRICS[metric.name], None)
    if kind is None:
        raise MetricError(f"metric is {metric.name!r}, which {build} does not have")
    try:
        index = build.module.index_factory(dim, description, kind)
    except RuntimeError as error:
        raise FactoryError(
            f"faiss makes no index of {description!r} for dim {dim}: {reason_of(error)}"
        ) from error
    if metric.name == "lp":
        index.metric_arg = metric.p
    return index


def check_float_index(build: FaissBuild, index: Any) -> None:
    """Raise `DtypeError` unless this is an index of float vectors of this build."""
    name = type(index).__name__
    if isinstance(index, build.module.IndexBinary):
        raise DtypeError(
            f"faiss_index is a {name}, which holds bits, expected an index of float vectors; "
            "from_faiss makes a FlatIndex of an IndexBinaryFlat"
        )
    if not isinstance(index, build.module.Index):
        raise DtypeError(f"faiss_index is a {name}, expected an index of faiss")


def metric_of_index(build: FaissBuild, index: Any) -> Metric:
    """Return the metric of an index.

    Raises:
        MetricError: one that the library does not have.
    """
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
    if isinstance(index, faiss.IndexIDMap):
        labels = torch.from_numpy(faiss.vector_to_array(index.id_map).copy())
        inner = faiss.downcast_index(index.index)
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
                f"index is a {type(index).__name__} with {type(kind).__name__}, which faiss does not copy; "
                "read the index into memory first"
            )
    use_one_thread_if_forked(build)
    try:
        return mend_fast_scan(build, faiss.clone_index(index))
    except RuntimeError:
        # Some families are written but not cloned.
        return from_bytes(build, to_bytes(build, index))


def prepare_to_reconstruct(build: FaissBuild, index: Any) -> None:
    """Let an inverted file find its rows by their number; 8 bytes a row."""
    lists = inverted_file(build, index)
    if lists is not None and hasattr(lists, "make_direct_map") and lists.direct_map.no():
        lists.make_direct_map()


def inverted_file(build: FaissBuild, index: Any) -> Any:
    """Return the inverted file inside an index, None where there is none."""
    return build.module.try_extract_index_ivf(index)


def train(build: FaissBuild, index: Any, vectors: Tensor) -> None:
    """Teach an index on ``(N, D)`` float32 vectors.

    Raises:
        ImplementationError: faiss refuses, with what it says.
    """
    rows = _rows_for(index, vectors)
    try:
        with placed(build, index):
            index.train_c(len(rows), build.module.cast_integer_to_float_ptr(rows.data_ptr()))
    except RuntimeError as error:
        raise _refused("train", index, error) from error


def append(build: FaissBuild, index: Any, vectors: Tensor) -> Tensor:
    """Add ``(N, D)`` float32 vectors and return the rows ``(N,)`` that they became.

    Raises:
        NotFittedError: the index must be trained first.
        ImplementationError: faiss refuses, with what it says.
    """
    if not index.is_trained:
        raise NotFittedError(f"{type(index).__name__} takes no vectors before fit(vectors)")
    first = int(index.ntotal)
    if len(vectors):
        rows = _rows_for(index, vectors)
        try:
            with placed(build, index):
                index.add_c(len(rows), build.module.cast_integer_to_float_ptr(rows.data_ptr()))
        except RuntimeError as error:
            raise _refused("add", index, error) from error
    return torch.arange(first, first + len(vectors))


def reconstruct(build: FaissBuild, index: Any, rows: Tensor) -> Tensor:
    """Return the vectors ``(M, D)`` of rows ``(M,)``, as the index has kept them.

    Raises:
        ImplementationError: the family cannot.
    """
    if not rows.numel():
        return torch.empty(0, int(index.d))
    keys = rows.cpu().contiguous()
    vectors = torch.empty((len(keys), int(index.d)), dtype=torch.float32, device="cpu")
    pointers = (
        build.module.cast_integer_to_idx_t_ptr(keys.data_ptr()),
        build.module.cast_integer_to_float_ptr(vectors.data_ptr()),
    )
    try:
        with placed(build, index):
            index.reconstruct_batch_c(len(keys), *pointers)
    except RuntimeError as error:
        raise _refused("reconstruct", index, error) from error
    return vectors


def to_bytes(build: FaissBuild, index: Any) -> Tensor:
    """Return an index as faiss writes it to files, uint8 ``(M,)``."""
    try:
        return torch.as_tensor(build.module.serialize_index(to_cpu(build, index)))
    except RuntimeError as error:
        raise _refused("write", index, error) from error


def from_bytes(build: FaissBuild, content: Tensor) -> Any:
    """Return the index that `to_bytes` wrote.

    Raises:
        IndexFileError: faiss cannot read it.
    """
    # Tables are computed anew.
    use_one_thread_if_forked(build)
    try:
        return mend_fast_scan(build, build.module.deserialize_index(content.contiguous().cpu().numpy()))
    except (RuntimeError, MemoryError) as error:
        raise IndexFileError(f"faiss cannot read the index: {reason_of(error)}") from error


def count_bytes(build: FaissBuild, index: Any) -> int:
    """Return how many bytes `to_bytes` would take, without taking them."""
    counted = 0

    def count(chunk: bytes) -> None:
        nonlocal counted
        counted += len(chunk)

    writer = build.module.PyCallbackIOWriter(count)
    build.module.write_index(to_cpu(build, index), build.module.BufferedIOWriter(writer))
    return counted


def describe_refusal(verb: str, index: Any, error: RuntimeError) -> ImplementationError:
    """Return the error that says what faiss did not do."""
    return _refused(verb, index, error)


def _refused(verb: str, index: Any, error: RuntimeError) -> ImplementationError:
    return ImplementationError(f"faiss's {type(index).__name__} does not {verb}: {reason_of(error)}")


def _rows_for(index: Any, vectors: Tensor) -> Tensor:
    """Return vectors as an index reads them; themselves where it can."""
    number = index_gpu(index)
    device = torch.device("cpu") if number is None else cuda_device(number)
    return vectors.detach().to(device, torch.float32).contiguous()


def list_labels(build: FaissBuild, lists: Any) -> list[Any]:
    """Return the labels of each list, as arrays on the memory of the index."""
    inverted = lists.invlists
    sizes = [int(inverted.list_size(number)) for number in range(inverted.nlist)]
    return [
        build.module.rev_swig_ptr(inverted.get_ids(number), size) for number, size in enumerate(sizes) if size
    ]
