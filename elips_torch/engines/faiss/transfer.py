"""Moving indexes of faiss between the CPU and GPUs."""

from collections.abc import Sequence
from typing import Any

from elips_torch.core.errors import ArgumentError, DtypeError, ImplementationError
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.engines.faiss.cuvs import cuvs_state
from elips_torch.engines.faiss.gpu_options import GpuOptions, cloner_options, index_config
from elips_torch.engines.faiss.gpu_resources import check_gpu, device_resources, on_current_stream
from elips_torch.engines.faiss.messages import reason_of
from elips_torch.engines.faiss.row_kinds import BITS, kind_of

# What is made of which, where faiss does not copy by itself.
_MADE_ONE_BY_ONE = {
    "IndexFlat": "GpuIndexFlat",
    "IndexFlatL2": "GpuIndexFlat",
    "IndexFlatIP": "GpuIndexFlat",
    "IndexIVFFlat": "GpuIndexIVFFlat",
    "IndexIVFScalarQuantizer": "GpuIndexIVFScalarQuantizer",
    "IndexIVFPQ": "GpuIndexIVFPQ",
}
_GROUPS = ("IndexReplicas", "IndexShards")


def to_gpu(
    build: FaissBuild,
    index: Any,
    devices: Sequence[int] = (0,),
    options: GpuOptions | None = None,
) -> Any:
    """Copy an index of faiss to one GPU or several.

    Args:
        build: the faiss that made the index.
        index: an index on the CPU.
        devices: numbers of the GPUs; several share the vectors where the options say so, or repeat them.
        options: how it is laid out there.

    Returns:
        The copy; it uses memory of the resources that `device_resources` keeps.

    Raises:
        ElipsError: no such GPU, no GPU code, or an index or options that faiss does not take.
    """
    numbers = isinstance(devices, Sequence) and all(type(device) is int for device in devices)
    if not numbers or isinstance(devices, str | bytes):
        raise DtypeError(f"devices is {devices!r}, expected the numbers of GPUs, such as [0]")
    if not devices or len(set(devices)) != len(devices):
        raise ArgumentError(f"devices is {list(devices)}, expected the numbers of different GPUs")
    for device in devices:
        check_gpu(build, device)
    options = options or GpuOptions()
    if options.needs_config and len(devices) > 1:
        raise ImplementationError("faiss sets interleaved_layout and memory_space on one GPU only")
    of_bits = kind_of(build, index) is BITS
    if of_bits and len(devices) > 1:
        raise ImplementationError("faiss puts an index of bits on one GPU only")
    cuvs = cuvs_state(options.use_cuvs, build).enabled
    kind = _kind_to_make(build, index) if options.needs_config else ""
    held = [device_resources(build, device, options) for device in devices]
    try:
        if kind:
            with on_current_stream(build, devices[0], held[0]):
                made = _make(build, index, kind, devices[0], options, held[0].resources)
        elif of_bits:
            with on_current_stream(build, devices[0], held[0]):
                made = build.module.index_binary_cpu_to_gpu(held[0].resources, devices[0], index)
        elif len(devices) == 1:
            with on_current_stream(build, devices[0], held[0]):
                made = build.module.index_cpu_to_gpu(
                    held[0].resources, devices[0], index, cloner_options(build, options, several=False)
                )
        else:
            made = build.module.index_cpu_to_gpu_multiple_py(
                [each.resources for each in held],
                index,
                cloner_options(build, options, several=True),
                list(devices),
            )
    except RuntimeError as error:
        raise ImplementationError(
            f"faiss has no {type(index).__name__} on a GPU: {reason_of(error)}"
        ) from error
    # What searches need to know, and faiss does not say of what it has made; some of its classes refuse
    # attributes that they do not know.
    made.__dict__.update(uses_cuvs=cuvs, lies_on=tuple(devices))
    return made


def _kind_to_make(build: FaissBuild, index: Any) -> str:
    name = type(build.module.downcast_index(index)).__name__
    if name not in _MADE_ONE_BY_ONE:
        raise ImplementationError(
            f"index is {name}; faiss sets interleaved_layout and memory_space for "
            f"{', '.join(_MADE_ONE_BY_ONE)} only"
        )
    return _MADE_ONE_BY_ONE[name]


def _make(build: FaissBuild, index: Any, kind: str, device: int, options: GpuOptions, resources: Any) -> Any:
    source = build.module.downcast_index(index)
    made = getattr(build.module, kind)(resources, source, index_config(build, options, kind, device))
    if options.reserve_vectors and not source.ntotal and kind != "GpuIndexFlat":
        made.reserveMemory(options.reserve_vectors)
    return made


def to_cpu(build: FaissBuild, index: Any) -> Any:
    """Copy an index of faiss from the GPUs it is on to the CPU; one on the CPU comes back as it is."""
    if kind_of(build, index) is BITS:
        return build.module.index_binary_gpu_to_cpu(index) if hasattr(index, "getDevice") else index
    groups = tuple(getattr(build.module, name) for name in _GROUPS if hasattr(build.module, name))
    if build.has_gpu and (hasattr(index, "getDevice") or isinstance(index, groups)):
        return build.module.index_gpu_to_cpu(index)
    return index
