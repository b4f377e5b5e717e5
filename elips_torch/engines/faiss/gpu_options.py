"""How an index of faiss is laid out on GPUs, as plain keywords."""

import dataclasses
from typing import Any

from elips_torch.core.errors import ArgumentError, ImplementationError
from elips_torch.core.validation import check_count
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
        interleaved_layout: how lists lie in memory; faiss offers it for cloned indexes only as its default,
            True.
        indices_options: where ids lie: "cpu", "ivf", "32bit" or "64bit".
        reserve_vectors: room to make for so many vectors in lists.
        temp_memory_bytes: scratch memory that faiss keeps for itself on a GPU.
        pinned_memory_bytes: pinned memory for copies between CPU and GPU.
        memory_space: "device", or "unified" memory, which may exceed the GPU's; faiss does not take the
            latter for cloned indexes.
        allow_cpu_coarse: whether a coarse quantizer that has no GPU code may stay on the CPU.
        use_cuvs: "auto", "require" or "off", see `cuvs_state`.

    Raises:
        ElipsError: a value outside what is allowed.
    """

    use_float16: bool = False
    use_float16_coarse: bool = False
    precomputed_tables: bool = False
    interleaved_layout: bool = True
    indices_options: str = "64bit"
    reserve_vectors: int = 0
    temp_memory_bytes: int = 256 * 2**20
    pinned_memory_bytes: int = 64 * 2**20
    memory_space: str = "device"
    allow_cpu_coarse: bool = False
    use_cuvs: str = "auto"

    def __post_init__(self) -> None:
        if self.indices_options not in _INDICES:
            known = ", ".join(map(repr, _INDICES))
            raise ArgumentError(f"indices_options is {self.indices_options!r}, expected one of {known}")
        if self.memory_space not in _MEMORY:
            raise ArgumentError(f"memory_space is {self.memory_space!r}, expected 'device' or 'unified'")
        for name in ("reserve_vectors", "temp_memory_bytes", "pinned_memory_bytes"):
            check_count(name, getattr(self, name), least=0)


def cloner_options(build: FaissBuild, options: GpuOptions, *, several: bool, shard: bool = False) -> Any:
    """Return the options as faiss wants them, for one GPU or for several.

    Raises:
        ImplementationError: this build has no such option, or cuVS is required and not there.
    """
    cuvs = cuvs_state(options.use_cuvs, build)
    made = build.module.GpuMultipleClonerOptions() if several else build.module.GpuClonerOptions()
    for name, value, usual in (
        ("interleavedLayout", options.interleaved_layout, True),
        ("memorySpace", options.memory_space, "device"),
    ):
        if value != usual:
            raise ImplementationError(f"{build} cannot set {name} to {value!r} for an index that it copies")
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
        made.shard = shard
        # One copy of the coarse quantizer serves all shards.
        made.common_ivf_quantizer = shard
    return made
