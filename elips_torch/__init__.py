"""Vector retrieval inside PyTorch: indexes are modules, databases are tensors, scores have gradients."""

import importlib
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

from elips_torch.core.dispatch import Explanation
from elips_torch.core.errors import (
    ArgumentError,
    ConversionError,
    DeviceError,
    DtypeError,
    DuplicateIdError,
    ElipsError,
    FactoryError,
    ImplementationError,
    IndexFileError,
    MetricError,
    NonFiniteError,
    NotEmptyError,
    NotFittedError,
    ParameterError,
    ProcessError,
    ShapeError,
    UnknownIdError,
)
from elips_torch.core.metric import METRICS
from elips_torch.core.results import RangeResult, SearchResult
from elips_torch.distributed import prepare_for_ddp
from elips_torch.indexes.base import Index
from elips_torch.indexes.flat import FlatIndex
from elips_torch.ops.explain import explain
from elips_torch.ops.knn import knn
from elips_torch.ops.pairwise_distance import pairwise_distance
from elips_torch.ops.range_search import range_search

if TYPE_CHECKING:
    from elips_torch.engines.faiss.cuvs import CuvsState, cuvs_state
    from elips_torch.engines.faiss.gpu_options import GpuOptions
    from elips_torch.engines.faiss.shards import add_preassigned, merge_faiss_shards, search_preassigned
    from elips_torch.engines.faiss.stats import EngineStats, faiss_stats
    from elips_torch.evaluation.vector_files import (
        read_bvecs,
        read_fvecs,
        read_ivecs,
        write_bvecs,
        write_fvecs,
        write_ivecs,
    )
    from elips_torch.indexes.catalog import load_index
    from elips_torch.indexes.factory import index_factory
    from elips_torch.indexes.faiss_conversion import from_faiss, read_faiss, write_faiss
    from elips_torch.indexes.faiss_index import FaissIndex
    from elips_torch.indexes.ivf_flat import IVFFlatIndex
    from elips_torch.indexes.ivf_pq import IVFPQIndex
    from elips_torch.indexes.ivf_sq import IVFSQIndex
    from elips_torch.indexes.pq import PQIndex
    from elips_torch.indexes.refine import RefineIndex
    from elips_torch.indexes.sq import SQIndex
    from elips_torch.indexes.suggestion import suggest_index
    from elips_torch.indexes.wrappers import PreTransformIndex
    from elips_torch.quantizers.affine import AffineMap, Centring
    from elips_torch.quantizers.bits import pack_bits, unpack_bits
    from elips_torch.quantizers.itq import ITQ
    from elips_torch.quantizers.kmeans import KMeans
    from elips_torch.quantizers.opq import OPQ
    from elips_torch.quantizers.pca import PCA
    from elips_torch.quantizers.transforms import L2Normalize, RandomRotation

# Imported when first asked for: importing the library stays quick however many indexes there are.
_LAZY = {
    "CuvsState": "elips_torch.engines.faiss.cuvs",
    "cuvs_state": "elips_torch.engines.faiss.cuvs",
    "GpuOptions": "elips_torch.engines.faiss.gpu_options",
    "add_preassigned": "elips_torch.engines.faiss.shards",
    "merge_faiss_shards": "elips_torch.engines.faiss.shards",
    "search_preassigned": "elips_torch.engines.faiss.shards",
    "EngineStats": "elips_torch.engines.faiss.stats",
    "faiss_stats": "elips_torch.engines.faiss.stats",
    "read_bvecs": "elips_torch.evaluation.vector_files",
    "read_fvecs": "elips_torch.evaluation.vector_files",
    "read_ivecs": "elips_torch.evaluation.vector_files",
    "write_bvecs": "elips_torch.evaluation.vector_files",
    "write_fvecs": "elips_torch.evaluation.vector_files",
    "write_ivecs": "elips_torch.evaluation.vector_files",
    "load_index": "elips_torch.indexes.catalog",
    "index_factory": "elips_torch.indexes.factory",
    "from_faiss": "elips_torch.indexes.faiss_conversion",
    "read_faiss": "elips_torch.indexes.faiss_conversion",
    "write_faiss": "elips_torch.indexes.faiss_conversion",
    "FaissIndex": "elips_torch.indexes.faiss_index",
    "IVFFlatIndex": "elips_torch.indexes.ivf_flat",
    "IVFPQIndex": "elips_torch.indexes.ivf_pq",
    "IVFSQIndex": "elips_torch.indexes.ivf_sq",
    "PQIndex": "elips_torch.indexes.pq",
    "RefineIndex": "elips_torch.indexes.refine",
    "SQIndex": "elips_torch.indexes.sq",
    "suggest_index": "elips_torch.indexes.suggestion",
    "PreTransformIndex": "elips_torch.indexes.wrappers",
    "AffineMap": "elips_torch.quantizers.affine",
    "Centring": "elips_torch.quantizers.affine",
    "pack_bits": "elips_torch.quantizers.bits",
    "unpack_bits": "elips_torch.quantizers.bits",
    "ITQ": "elips_torch.quantizers.itq",
    "KMeans": "elips_torch.quantizers.kmeans",
    "OPQ": "elips_torch.quantizers.opq",
    "PCA": "elips_torch.quantizers.pca",
    "L2Normalize": "elips_torch.quantizers.transforms",
    "RandomRotation": "elips_torch.quantizers.transforms",
}

try:
    __version__ = version("elips-torch")
except PackageNotFoundError:
    __version__ = "0+unknown"

__all__ = [
    "ITQ",
    "METRICS",
    "OPQ",
    "PCA",
    "AffineMap",
    "ArgumentError",
    "Centring",
    "ConversionError",
    "CuvsState",
    "DeviceError",
    "DtypeError",
    "DuplicateIdError",
    "ElipsError",
    "EngineStats",
    "Explanation",
    "FactoryError",
    "FaissIndex",
    "FlatIndex",
    "GpuOptions",
    "IVFFlatIndex",
    "IVFPQIndex",
    "IVFSQIndex",
    "ImplementationError",
    "Index",
    "IndexFileError",
    "KMeans",
    "L2Normalize",
    "MetricError",
    "NonFiniteError",
    "NotEmptyError",
    "NotFittedError",
    "PQIndex",
    "ParameterError",
    "PreTransformIndex",
    "ProcessError",
    "RandomRotation",
    "RangeResult",
    "RefineIndex",
    "SQIndex",
    "SearchResult",
    "ShapeError",
    "UnknownIdError",
    "__version__",
    "add_preassigned",
    "cuvs_state",
    "explain",
    "faiss_stats",
    "from_faiss",
    "index_factory",
    "knn",
    "load_index",
    "merge_faiss_shards",
    "pack_bits",
    "pairwise_distance",
    "prepare_for_ddp",
    "range_search",
    "read_bvecs",
    "read_faiss",
    "read_fvecs",
    "read_ivecs",
    "search_preassigned",
    "suggest_index",
    "unpack_bits",
    "write_bvecs",
    "write_faiss",
    "write_fvecs",
    "write_ivecs",
]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
