"""From a description to an index of faiss."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from elips_torch.core.errors import ConversionError
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.engines.faiss.describe import METRICS, QTYPES
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
from elips_torch.engines.faiss.forked import use_one_thread_if_forked

# Of what adds up over features or parts.
_CODED_METRICS = ("l2", "ip")


def construct(build: FaissBuild, description: Description) -> Any:
    """Make an index of faiss on the CPU; it shares no memory with the description.

    What lies inside belongs to the index, as in one from ``faiss.index_factory``.

    Raises:
        ConversionError: faiss does not have this metric for this kind of index, or would score wrongly.
    """
    use_one_thread_if_forked(build)
    # A rejected inner description is noticed before the memory of the outer one is filled.
    return _BUILDERS[type(description)](build, description)


def _owned(child: Any) -> Any:
    """Hand an object over to the one that takes it."""
    child.this.disown()
    return child


def _metric(build: FaissBuild, metric: str) -> int:
    codes = {ours: name for name, ours in METRICS.items()}
    if metric not in codes or not hasattr(build.module, codes[metric]):
        raise ConversionError(f"metric {metric!r} has no counterpart in faiss {build.version}")
    return int(getattr(build.module, codes[metric]))


def _check_coded(metric: str) -> None:
    # Other metrics are computed as another one by some indexes of faiss; in others they end the process.
    if metric not in _CODED_METRICS:
        raise ConversionError(f"faiss searches codes under 'l2' and 'ip', the metric is {metric!r}")


def _flat(build: FaissBuild, description: FlatDescription) -> Any:
    index = build.module.IndexFlat(description.dim, _metric(build, description.metric))
    if description.p is not None:
        index.metric_arg = description.p
    if len(description.vectors):
        index.add(description.vectors.contiguous().numpy())
    return index


def _bits(build: FaissBuild, description: BitsDescription) -> Any:
    index = build.module.IndexBinaryFlat(description.dim)
    if len(description.codes):
        index.add(description.codes.contiguous().numpy())
    return index


def _coded(build: FaissBuild, description: CodedDescription) -> Any:
    _check_coded(description.metric)
    faiss, quantizer, metric = build.module, description.quantizer, _metric(build, description.metric)
    if isinstance(quantizer, ScalarDescription):
        index = faiss.IndexScalarQuantizer(quantizer.dim, _qtype(build, quantizer), metric)
    else:
        index = faiss.IndexPQ(quantizer.dim, quantizer.m, quantizer.nbits, metric)
    index.is_trained = _teach(build, index, quantizer)
    if len(description.codes):
        index.add_sa_codes(description.codes.contiguous().numpy())
    return index


def _qtype(build: FaissBuild, quantizer: ScalarDescription) -> int:
    names = {ours: name for name, ours in QTYPES.items()}
    return int(getattr(build.module.ScalarQuantizer, names[quantizer.qtype]))


def _teach(build: FaissBuild, index: Any, quantizer: ScalarDescription | ProductDescription | None) -> bool:
    """Write into the quantizer of an index what was learned; return whether it is trained."""
    if isinstance(quantizer, ProductDescription):
        if quantizer.codebooks is not None:
            _write(build, quantizer.codebooks, index.pq.centroids)
        return quantizer.codebooks is not None
    if quantizer is None or quantizer.qtype in ("fp16", "bf16"):
        return True
    if quantizer.minimum is None or quantizer.extent is None:
        return False
    _write(build, torch.cat([quantizer.minimum, quantizer.extent]), index.sq.trained)
    return True


def _write(build: FaissBuild, tensor: Tensor, vector: Any) -> None:
    build.module.copy_array_to_vector(tensor.contiguous().view(-1).numpy(), vector)


def _inverted_file(build: FaissBuild, description: IVFDescription) -> Any:
    faiss, quantizer = build.module, description.quantizer
    metric = _metric(build, description.metric)
    if quantizer is not None:
        _check_coded(description.metric)
        if description.by_residual and description.metric == "ip" and description.coarse.metric != "ip":
            raise ConversionError(
                "faiss adds the score of the centroid to that of the residual: a coarse index under "
                f"{description.coarse.metric!r} does not fit the metric 'ip'"
            )
    coarse = construct(build, description.coarse)
    arguments = (coarse, description.dim, description.nlist)
    if quantizer is None:
        index = faiss.IndexIVFFlat(*arguments, metric)
    elif isinstance(quantizer, ScalarDescription):
        index = faiss.IndexIVFScalarQuantizer(
            *arguments, _qtype(build, quantizer), metric, description.by_residual
        )
    else:
        index = faiss.IndexIVFPQ(*arguments, quantizer.m, quantizer.nbits, metric)
        index.by_residual = description.by_residual
    _owned(coarse)
    index.own_fields = True
    if description.p is not None:
        index.metric_arg = description.p
    index.nprobe = description.nprobe
    index.is_trained = _teach(build, index, quantizer) and coarse.ntotal == description.nlist
    if isinstance(quantizer, ProductDescription):
        if description.precomputed_tables is not None:
            index.use_precomputed_table = 1 if description.precomputed_tables else -1
        if index.is_trained and description.by_residual and description.metric == "l2":
            index.precompute_table()
    _fill_lists(build, index, description)
    return index


def _fill_lists(build: FaissBuild, index: Any, description: IVFDescription) -> None:
    """Put rows into the lists, in their order within each."""
    faiss, lists = build.module, index.invlists
    sizes = torch.bincount(description.assignments, minlength=description.nlist)
    order = description.assignments.argsort(stable=True)
    stop = 0
    for number in sizes.nonzero().flatten().tolist():
        start, stop = stop, stop + int(sizes[number])
        rows = order[start:stop]
        ids = description.ids[rows].numpy()
        entries = description.rows.index_select(0, rows).view(torch.uint8).numpy()
        lists.add_entries(number, stop - start, faiss.swig_ptr(ids), faiss.swig_ptr(entries))
    index.ntotal = len(description.ids)


def _pre_transform(build: FaissBuild, description: PreTransformDescription) -> Any:
    inner = construct(build, description.index)
    index = build.module.IndexPreTransform(_owned(inner))
    index.own_fields = True
    for transform in reversed(description.chain):
        index.prepend_transform(_owned(_TRANSFORMS[type(transform)](build, transform)))
    return index


def _linear(build: FaissBuild, description: LinearDescription) -> Any:
    faiss, sizes = build.module, (description.dim_in, description.dim_out)
    matrix, bias = description.matrix, description.bias
    if description.kind == "pca":
        transform = faiss.PCAMatrix(*sizes, -0.5 if description.whiten else 0.0)
        if description.mean is not None and description.variances is not None:
            _write(build, description.mean, transform.mean)
            _write(build, description.variances, transform.eigenvalues)
    elif description.kind == "opq":
        transform = faiss.OPQMatrix(description.dim_in, description.m, description.dim_out)
    elif description.kind == "rotation":
        transform = faiss.RandomRotationMatrix(*sizes)
    elif description.kind == "itq":
        transform = faiss.ITQMatrix(description.dim_in)
        transform.d_out = description.dim_out
    else:
        transform = faiss.LinearTransform(*sizes)
    transform.have_bias = bias is not None or (description.kind == "pca")
    transform.is_trained = matrix is not None
    if matrix is not None:
        _write(build, matrix, transform.A)
        if bias is not None:
            _write(build, bias, transform.b)
        # Lets faiss go back through it.
        transform.set_is_orthonormal()
    return transform


def _centring(build: FaissBuild, description: CentringDescription) -> Any:
    transform = build.module.CenteringTransform(description.dim_in)
    transform.is_trained = description.mean is not None
    if description.mean is not None:
        _write(build, description.mean, transform.mean)
    return transform


def _normalization(build: FaissBuild, description: NormalizationDescription) -> Any:
    return build.module.NormalizationTransform(description.dim_in, 2.0)


def _id_map(build: FaissBuild, description: IDMapDescription) -> Any:
    inner = construct(build, description.index)
    # Faiss takes an empty index only; what the inner one holds is said right after.
    rows, inner.ntotal = inner.ntotal, 0
    of_bits = isinstance(inner, build.module.IndexBinary)
    kind = build.module.IndexBinaryIDMap2 if of_bits else build.module.IndexIDMap2
    index = kind(_owned(inner))
    inner.ntotal = index.ntotal = rows
    index.own_fields = True
    _write(build, description.ids, index.id_map)
    index.construct_rev_map()
    return index


def _refine(build: FaissBuild, description: RefineDescription) -> Any:
    refine = construct(build, description.refine)
    inner = construct(build, description.index)
    # `IndexRefineFlat` would do the same; it cannot hold what is not an `IndexFlat`.
    index = build.module.IndexRefine(_owned(inner), _owned(refine))
    index.own_fields = index.own_refine_index = True
    index.k_factor = description.k_factor
    return index


_BUILDERS: dict[type[Any], Callable[[FaissBuild, Any], Any]] = {
    FlatDescription: _flat,
    BitsDescription: _bits,
    CodedDescription: _coded,
    IVFDescription: _inverted_file,
    PreTransformDescription: _pre_transform,
    IDMapDescription: _id_map,
    RefineDescription: _refine,
}
_TRANSFORMS: dict[type[TransformDescription], Callable[[FaissBuild, Any], Any]] = {
    LinearDescription: _linear,
    CentringDescription: _centring,
    NormalizationDescription: _normalization,
}
