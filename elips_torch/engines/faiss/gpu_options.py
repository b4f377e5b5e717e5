"""How an index of faiss is laid out on GPUs, as plain keywords."""

import dataclasses
from typing import Any

from elips_torch.core.errors import ArgumentError, ParameterError
from elips_torch.core.validation import check_count, check_flag
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.engines.faiss.cuvs import cuvs_state

_INDICES = {"cpu": "INDICES_CPU", "ivf": "INDICES_IVF", "32bit": "INDICES_32_BIT", "64bit": "INDICES_64_BIT"}
_MEMORY = ("device", "unified")


@dataclasses.dataclass(frozen=True)
class GpuOptions:
    """What faiss lets callers choose on a GPU.

    Attributes:
        use_float16: store vectors, or the tables of product codes, in half precision.
        use_float16_coarse: store centroids of lists in half precision.
        precomputed_tables: keep tables of product codes per list.
        interleaved_layout: whether rows of a list lie interleaved, which product codes of other than 8 bits
            need; default: as faiss does by itself.
        indices_options: where ids lie: "cpu", "ivf", "32bit" or "64bit".
        reserve_vectors: room to make for so many vectors in lists; faiss does so for an index that is empty.
        temp_memory_bytes: scratch memory that faiss keeps for itself on a GPU.
        pinned_memory_bytes: pinned memory for copies between CPU and GPU.
        memory_space: "device", or "unified" memory, which may exceed the GPU's.
        allow_cpu_coarse: whether a coarse quantizer that has no GPU code may stay on the CPU.
        use_cuvs: "auto", "require" or "off", see `cuvs_state`.
        shard: with several GPUs, whether each holds a part of the vectors, with one coarse quantizer for all,
            instead of all of them.

    Raises:
        ElipsError: a value outside what is allowed.
    """

    use_float16: bool = False
    use_float16_coarse: bool = False
    precomputed_tables: bool = False
    interleaved_layout: bool | None = None
    indices_options: str = "64bit"
    reserve_vectors: int = 0
    temp_memory_bytes: int = 256 * 2**20
    pinned_memory_bytes: int = 64 * 2**20
    memory_space: str = "device"
    allow_cpu_coarse: bool = False
    use_cuvs: str = "auto"
    shard: bool = False

    def __post_init__(self) -> None:
        for name in ("use_float16", "use_float16_coarse", "precomputed_tables", "allow_cpu_coarse", "shard"):
            check_flag(name, getattr(self, name))
        if self.interleaved_layout is not None:
            check_flag("interleaved_layout", self.interleaved_layout)
        if self.indices_options not in tuple(_INDICES):
            known = ", ".join(map(repr, _INDICES))
            raise ArgumentError(f"indices_options is {self.indices_options!r}, expected one of {known}")
        if self.memory_space not in _MEMORY:
            raise ArgumentError(f"memory_space is {self.memory_space!r}, expected 'device' or 'unified'")
        for name in ("reserve_vectors", "temp_memory_bytes", "pinned_memory_bytes"):
            check_count(name, getattr(self, name), least=0)

    @property
    def needs_config(self) -> bool:
        """Whether faiss takes these options for one index after the other only, and not where it copies."""
        return self.interleaved_layout is not None or self.memory_space != "device"


def read_options(**options: Any) -> GpuOptions:
    """Return options from keywords.

    Raises:
        ParameterError: one that there is not.
    """
    known = [field.name for field in dataclasses.fields(GpuOptions)]
    for name in options:
        if name not in known:
            raise ParameterError(f"no option {name!r} of indexes on GPUs, there are {', '.join(known)}")
    return GpuOptions(**options)


def cloner_options(build: FaissBuild, options: GpuOptions, *, several: bool) -> Any:
    """Return the options as faiss wants them where it copies an index, for one GPU or for several.

    Raises:
        ImplementationError: cuVS is required and not there.
    """
    cuvs = cuvs_state(options.use_cuvs, build)
    made = build.module.GpuMultipleClonerOptions() if several else build.module.GpuClonerOptions()
    made.useFloat16 = options.use_float16
    made.useFloat16CoarseQuantizer = options.use_float16_coarse
    made.usePrecomputed = options.precomputed_tables
    made.indicesOptions = getattr(build.module, _INDICES[options.indices_options])
    made.reserveVecs = options.reserve_vectors
    if options.allow_cpu_coarse or hasattr(made, "allowCpuCoarseQuantizer"):
        made.allowCpuCoarseQuantizer = options.allow_cpu_coarse
    if hasattr(made, "use_cuvs"):
        made.use_cuvs = cuvs.enabled
    if several:
        made.shard = options.shard
        # One copy of the coarse quantizer serves all shards.
        made.common_ivf_quantizer = options.shard
    return made


def index_config(build: FaissBuild, options: GpuOptions, kind: str, device: int) -> Any:
    """Return the options as faiss wants them where it makes one index.

    Args:
        build: the faiss to use.
        options: as keywords.
        kind: what is made, such as "GpuIndexIVFPQ".
        device: number of the GPU.

    Raises:
        ImplementationError: cuVS is required and not there.
    """
    cuvs = cuvs_state(options.use_cuvs, build)
    made = getattr(build.module, f"{kind}Config")()
    made.device = device
    # Faiss names the kinds of memory in C++ only: 1 is the GPU's own, 2 unified.
    made.memorySpace = 1 + _MEMORY.index(options.memory_space)
    if hasattr(made, "use_cuvs"):
        made.use_cuvs = cuvs.enabled
    if kind == "GpuIndexFlat":
        made.useFloat16 = options.use_float16
        return made
    made.indicesOptions = getattr(build.module, _INDICES[options.indices_options])
    made.flatConfig.useFloat16 = options.use_float16_coarse
    if options.allow_cpu_coarse or hasattr(made, "allowCpuCoarseQuantizer"):
        made.allowCpuCoarseQuantizer = options.allow_cpu_coarse
    if options.interleaved_layout is not None:
        made.interleavedLayout = options.interleaved_layout
    if kind == "GpuIndexIVFPQ":
        made.useFloat16LookupTables = options.use_float16
        made.usePrecomputedTables = options.precomputed_tables
    return made
