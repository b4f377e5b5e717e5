"""Moving indexes of faiss between the CPU and GPUs."""

from collections.abc import Sequence
from typing import Any

from elips_torch.core.errors import ArgumentError
from elips_torch.engines.faiss.builds import FaissBuild
from elips_torch.engines.faiss.gpu_options import GpuOptions, cloner_options
from elips_torch.engines.faiss.gpu_resources import check_gpu, device_resources


def to_gpu(
    build: FaissBuild,
    index: Any,
    devices: Sequence[int] = (0,),
    options: GpuOptions | None = None,
    *,
    shard: bool = False,
) -> Any:
    """Copy an index of faiss to one GPU or several.

    Args:
        build: the faiss that made the index.
        index: an index on the CPU.
        devices: numbers of the GPUs.
        options: how it is laid out there.
        shard: with several GPUs, whether each holds a part of the vectors, with one coarse quantizer for all,
            instead of all of them.

    Returns:
        The copy; it uses memory of the resources that `device_resources` keeps.

    Raises:
        ElipsError: no such GPU, no GPU code, or options that faiss does not take.
    """
    if not devices or len(set(devices)) != len(devices):
        raise ArgumentError(f"devices is {list(devices)}, expected the numbers of different GPUs")
    for device in devices:
        check_gpu(build, device)
    options = options or GpuOptions()
    made = cloner_options(build, options, several=len(devices) > 1, shard=shard)
    resources = [device_resources(build, device, options).resources for device in devices]
    if len(devices) == 1:
        return build.module.index_cpu_to_gpu(resources[0], devices[0], index, made)
    return build.module.index_cpu_to_gpu_multiple_py(resources, index, made, list(devices))


def to_cpu(build: FaissBuild, index: Any) -> Any:
    """Copy an index of faiss from the GPUs it is on to the CPU; one on the CPU comes back as it is."""
    proxies = tuple(
        getattr(build.module, name)
        for name in ("IndexReplicas", "IndexShards")
        if hasattr(build.module, name)
    )
    if build.has_gpu and (hasattr(index, "getDevice") or isinstance(index, proxies)):
        return build.module.index_gpu_to_cpu(index)
    return index
