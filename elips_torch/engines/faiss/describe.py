"""From an index of faiss to a description of it."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import ConversionError, DamagedIndexError, DtypeError
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.engines.faiss.descriptions import (
    BitsDescription,
    CentringDescription,
    CodedDescription,
    Description,
    FlatDescription,
    IDMapDescription,
    IVFDescription,
    LinearDescription,
    NormalizationDescription,
    PreTransformDescription,
    ProductDescription,
    RefineDescription,
    ScalarDescription,
    TransformDescription,
)
from elips_torch.engines.faiss.messages import expected_instead_of
from elips_torch.engines.faiss.transfer import to_cpu

# By the names of faiss.
METRICS = {
    "METRIC_L2": "l2",
    "METRIC_INNER_PRODUCT": "ip",
    "METRIC_L1": "l1",
    "METRIC_Linf": "linf",
    "METRIC_Lp": "lp",
    "METRIC_Canberra": "canberra",
    "METRIC_BrayCurtis": "braycurtis",
    "METRIC_JensenShannon": "jensenshannon",
    "METRIC_GOWER": "gower",
}
QTYPES = {"QT_8bit": "int8", "QT_6bit": "int6", "QT_4bit": "int4", "QT_fp16": "fp16", "QT_bf16": "bf16"}
_NBITS = (4, 8)
# What no index has lists for.
_MOST_PROBES = 2**31
_OFFER = "FaissIndex(index), or FaissIndex.read(path), serves the index as it is"
_GROUPS_OF_GPU_INDEXES = ("IndexShards", "IndexReplicas", "IndexShardsIVF")


def describe(build: FaissBuild, index: Any) -> Description:
    """Describe an index of faiss; tensors are copies.

    Args:
        build: the faiss whose index it is.
        index: the index; one on GPUs is copied to the CPU first.

    Raises:
        DtypeError: no index of faiss.
        ConversionError: it, or an index inside it, is of a kind or has settings that have no description; the
            message names them.
    """
    faiss = build.module
    if isinstance(index, faiss.IndexBinary):
        return _describe_bits(build, index)
    if not isinstance(index, faiss.Index):
        raise DtypeError(f"index is of type {type(index).__name__}, expected {expected_instead_of(index)}")
    # Casts own nothing: what owns the memory keeps its name.
    copy = to_cpu(build, index) if _lies_on_gpus(faiss, faiss.downcast_index(index)) else index
    found = faiss.downcast_index(copy)
    name = type(found).__name__
    if name not in _READERS:
        raise ConversionError(f"index is {name}, which has no counterpart in this library; {_OFFER}")
    if found.d < 1:
        raise ConversionError(f"index is {name} of dim {found.d}, expected at least 1")
    return _READERS[name](build, found)


def _describe_inside(build: FaissBuild, index: Any, member: str) -> Description:
    """Describe an index inside another; errors name both."""
    try:
        return describe(build, getattr(index, member))
    except ConversionError as error:
        what = str(error).removeprefix("index is ")
        raise type(error)(f"index is {type(index).__name__}, its {member} is {what}") from error


def _describe_bits(build: FaissBuild, index: Any) -> Description:
    """Describe an index of bits, whose classes are none of those for floats."""
    copy = to_cpu(build, index)
    found = build.module.downcast_IndexBinary(copy)
    name = type(found).__name__
    if name not in _READERS_OF_BITS:
        raise ConversionError(
            f"index is {name}, whose vectors are bits; {', '.join(_READERS_OF_BITS)} come over; {_OFFER}"
        )
    return _READERS_OF_BITS[name](build, found)


def _lies_on_gpus(faiss: Any, index: Any) -> bool:
    name = type(index).__name__
    if name in _GROUPS_OF_GPU_INDEXES and index.count():
        name = type(faiss.downcast_index(index.at(0))).__name__
    return name.startswith("GpuIndex")


def _refuse(index: Any, what: str) -> ConversionError:
    return ConversionError(
        f"index is {type(index).__name__} with {what}, which has no counterpart in this library; {_OFFER}"
    )


def _metric(build: FaissBuild, index: Any, *kinds: str) -> tuple[str, float | None]:
    """Return the name and p of a metric; only of these kinds, where some are given."""
    codes = {
        getattr(build.module, name): ours for name, ours in METRICS.items() if hasattr(build.module, name)
    }
    metric = codes.get(index.metric_type)
    if metric is None or (kinds and metric not in kinds):
        raise _refuse(index, f"metric_type={index.metric_type}")
    # What was float64 before it was float32 is most likely the shortest number that rounds to that.
    return metric, float(f"{index.metric_arg:.7g}") if metric == "lp" else None


def _array(build: FaissBuild, vector: Any, *shape: int) -> Tensor:
    """Return a copy of a vector of C++, which what its owner says of itself gives a shape."""
    values = torch.from_numpy(build.module.vector_to_array(vector))
    if min(shape) < 0 or values.numel() != math.prod(shape):
        size = " x ".join(map(str, shape))
        raise DamagedIndexError(f"index is damaged: it holds {values.numel()} values where {size} belong")
    return values.view(shape)


def _flat(build: FaissBuild, index: Any) -> FlatDescription:
    metric, p = _metric(build, index)
    codes = _array(build, index.codes, index.ntotal, 4 * index.d)
    return FlatDescription(metric, p, codes.view(torch.float32))


def _bits(build: FaissBuild, index: Any) -> BitsDescription:
    if index.d % 8:
        raise DamagedIndexError(f"index is damaged: its vectors have {index.d} bits, which fill no bytes")
    return BitsDescription(_array(build, index.xb, index.ntotal, index.d // 8))


def _codes(build: FaissBuild, index: Any) -> Tensor:
    return _array(build, index.codes, index.ntotal, index.code_size)


def _scalar(build: FaissBuild, index: Any) -> ScalarDescription:
    sq = index.sq
    names = {getattr(build.module.ScalarQuantizer, name): name for name in QTYPES}
    if sq.qtype not in names:
        raise _refuse(index, f"sq.qtype={sq.qtype}")
    qtype = QTYPES[names[sq.qtype]]
    if qtype in ("fp16", "bf16") or not sq.trained.size():
        return ScalarDescription(sq.d, qtype, None, None)
    minimum, extent = _array(build, sq.trained, 2, sq.d)
    return ScalarDescription(sq.d, qtype, minimum.clone(), extent.clone())


def _product(build: FaissBuild, index: Any) -> ProductDescription:
    pq = index.pq
    if pq.nbits not in _NBITS:
        raise _refuse(index, f"pq.nbits={pq.nbits}")
    codebooks = _array(build, pq.centroids, pq.M, pq.ksub, pq.dsub) if index.is_trained else None
    return ProductDescription(pq.d, pq.M, pq.nbits, codebooks)


def _scalar_quantized(build: FaissBuild, index: Any) -> CodedDescription:
    metric, _ = _metric(build, index, "l2", "ip")
    return CodedDescription(metric, _scalar(build, index), _codes(build, index))


def _product_quantized(build: FaissBuild, index: Any) -> CodedDescription:
    if index.search_type != build.module.IndexPQ.ST_PQ:
        raise _refuse(index, f"search_type={index.search_type}")
    metric, _ = _metric(build, index, "l2", "ip")
    return CodedDescription(metric, _product(build, index), _codes(build, index))


def _ivf_flat(build: FaissBuild, index: Any) -> IVFDescription:
    return _inverted_file(build, index, None)


def _ivf_scalar(build: FaissBuild, index: Any) -> IVFDescription:
    return _inverted_file(build, index, _scalar(build, index))


def _ivf_product(build: FaissBuild, index: Any) -> IVFDescription:
    if index.polysemous_ht:
        raise _refuse(index, f"polysemous_ht={index.polysemous_ht}")
    return _inverted_file(build, index, _product(build, index))


def _inverted_file(
    build: FaissBuild, index: Any, quantizer: ScalarDescription | ProductDescription | None
) -> IVFDescription:
    if not 1 <= index.nprobe < _MOST_PROBES:
        raise DamagedIndexError(f"index is damaged: its nprobe is {index.nprobe}, expected at least 1")
    if index.max_codes:
        raise _refuse(index, f"max_codes={index.max_codes}")
    metric, p = _metric(build, index) if quantizer is None else _metric(build, index, "l2", "ip")
    assignments, ids, codes = _lists(build, index)
    return IVFDescription(
        index.d,
        metric,
        p,
        index.nlist,
        index.nprobe,
        _describe_inside(build, index, "quantizer"),
        assignments,
        ids,
        codes if quantizer is not None else codes.view(torch.float32).view(-1, index.d),
        quantizer,
        bool(index.by_residual) and quantizer is not None,
    )


def _lists(build: FaissBuild, index: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Return the list, the label and the code of every row, list by list."""
    faiss = build.module
    if index.invlists is None:
        raise _refuse(index, "no inverted lists")
    lists = faiss.downcast_InvertedLists(index.invlists)
    if lists.nlist != index.nlist:
        raise DamagedIndexError(f"index is damaged: it holds {lists.nlist} lists where {index.nlist} belong")
    sizes = torch.tensor([lists.list_size(number) for number in range(index.nlist)], device="cpu")
    n = int(sizes.sum())
    ids = torch.empty(n, dtype=torch.int64, device="cpu")
    codes = torch.empty(n, index.code_size, dtype=torch.uint8, device="cpu")
    stop = 0
    for number in sizes.nonzero().flatten().tolist():
        start, stop = stop, stop + int(sizes[number])
        labels, entries = lists.get_ids(number), lists.get_codes(number)
        try:
            ids[start:stop] = torch.from_numpy(faiss.rev_swig_ptr(labels, stop - start))
            flat = faiss.rev_swig_ptr(entries, (stop - start) * index.code_size)
            codes[start:stop] = torch.from_numpy(flat).view(stop - start, -1)
        finally:
            lists.release_ids(number, labels)
            lists.release_codes(number, entries)
    return torch.repeat_interleave(sizes), ids, codes


def _pre_transform(build: FaissBuild, index: Any) -> Description:
    chain: list[TransformDescription] = []
    for number in range(index.chain.size()):
        chain += _transform(build, index, build.module.downcast_VectorTransform(index.chain.at(number)))
    inner = _describe_inside(build, index, "index")
    return PreTransformDescription(tuple(chain), inner) if chain else inner


def _transform(build: FaissBuild, index: Any, transform: Any) -> list[TransformDescription]:
    name = type(transform).__name__
    linear = _linear(build, transform, _LINEAR[name]) if name in _LINEAR else None
    # What is not trained yet will be trained here.
    if linear is not None and (linear.matrix is not None or linear.kind in ("pca", "opq", "rotation")):
        return [linear]
    if name == "NormalizationTransform" and transform.norm == 2.0:
        return [NormalizationDescription(transform.d_in)]
    if name == "CenteringTransform":
        return [_centring(build, transform)]
    if name == "ITQTransform" and transform.is_trained:
        # It also normalises what it has centred.
        linear = _linear(build, transform.pca_then_itq, "linear")
        return [_centring(build, transform), NormalizationDescription(transform.d_in), linear]
    trained = "" if transform.is_trained else " that is not trained"
    raise _refuse(index, f"{name}{trained} in front")


def _centring(build: FaissBuild, transform: Any) -> CentringDescription:
    d = transform.d_in
    return CentringDescription(d, _array(build, transform.mean, d) if transform.is_trained else None)


def _linear(build: FaissBuild, transform: Any, kind: str) -> LinearDescription:
    d_in, d_out = transform.d_in, transform.d_out
    facts: dict[str, Any] = {}
    if kind == "opq":
        facts["m"] = transform.M
    if kind == "pca":
        facts["whiten"] = transform.eigen_power != 0
        if transform.eigen_power and transform.random_rotation:
            # Its rows are no directions, which have variances.
            kind, facts = "linear", {}
    if not transform.is_trained:
        return LinearDescription(kind, d_in, d_out, None, **facts)
    if kind == "pca":
        facts["mean"] = _array(build, transform.mean, d_in)
        n_values = transform.eigenvalues.size()
        facts["variances"] = _array(build, transform.eigenvalues, n_values)[:d_out].clone()
    matrix = _array(build, transform.A, d_out, d_in)
    bias = _array(build, transform.b, d_out) if transform.have_bias else None
    return LinearDescription(kind, d_in, d_out, matrix, bias, **facts)


def _id_map(build: FaissBuild, index: Any) -> IDMapDescription:
    return IDMapDescription(
        _describe_inside(build, index, "index"), _array(build, index.id_map, index.id_map.size())
    )


def _refine(build: FaissBuild, index: Any) -> RefineDescription:
    inner = _describe_inside(build, index, "base_index")
    refine = _describe_inside(build, index, "refine_index")
    return RefineDescription(inner, refine, float(index.k_factor))


_LINEAR = {
    "LinearTransform": "linear",
    "PCAMatrix": "pca",
    "OPQMatrix": "opq",
    "RandomRotationMatrix": "rotation",
    "ITQMatrix": "itq",
}
_READERS: dict[str, Callable[[FaissBuild, Any], Description]] = {
    "IndexFlat": _flat,
    "IndexFlatL2": _flat,
    "IndexFlatIP": _flat,
    "IndexScalarQuantizer": _scalar_quantized,
    "IndexPQ": _product_quantized,
    "IndexIVFFlat": _ivf_flat,
    "IndexIVFScalarQuantizer": _ivf_scalar,
    "IndexIVFPQ": _ivf_product,
    "IndexPreTransform": _pre_transform,
    "IndexIDMap": _id_map,
    "IndexIDMap2": _id_map,
    "IndexRefine": _refine,
    "IndexRefineFlat": _refine,
}
_READERS_OF_BITS: dict[str, Callable[[FaissBuild, Any], Description]] = {
    "IndexBinaryFlat": _bits,
    "IndexBinaryIDMap": _id_map,
    "IndexBinaryIDMap2": _id_map,
}
