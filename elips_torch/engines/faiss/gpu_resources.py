"""Scratch memory and streams of faiss on GPUs: made once per device, shared with torch."""

import functools
import importlib.util
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from elips_torch.core.errors import ArgumentError, DeviceError, ImplementationError
from elips_torch.engines.faiss.builds import FaissBuild, standing_as_faiss
from elips_torch.engines.faiss.gpu_options import GpuOptions

MOST_NEIGHBOURS = 2048
_TORCH_UTILS = "faiss.contrib.torch_utils"
_making = threading.Lock()


class DeviceResources:
    """The resources of faiss on one device, and the lock that those who use them hold."""

    def __init__(self, build: FaissBuild, options: GpuOptions) -> None:
        self.resources: Any = build.module.StandardGpuResources()
        self.pinned_memory_bytes = options.pinned_memory_bytes
        # Pinned memory can be set once only, and before anything else.
        self.resources.setPinnedMemory(options.pinned_memory_bytes)
        self.temp_memory_bytes = -1
        # The stream is a property of the resources: two threads would overwrite each other's.
        self.lock = threading.RLock()
        self.set_temp_memory(options.temp_memory_bytes)

    def set_temp_memory(self, nbytes: int) -> None:
        """Bound the scratch memory; torch's allocator keeps the rest of the device."""
        with self.lock:
            if nbytes != self.temp_memory_bytes:
                self.resources.setTempMemory(nbytes)
                self.temp_memory_bytes = nbytes


_made: dict[tuple[FaissBuild, int], DeviceResources] = {}


def check_gpu(build: FaissBuild, device: int) -> None:
    """Check that faiss and torch both have a GPU of this number.

    Raises:
        ImplementationError: faiss has no GPU code.
        DeviceError: there is no such GPU.
    """
    if not build.has_gpu:
        raise ImplementationError(f"{build} has no GPU code")
    count = min(torch.cuda.device_count(), int(build.module.get_num_gpus()))
    if not 0 <= device < count:
        raise DeviceError(f"device is GPU {device}, there are {count} that faiss and torch can use")


def device_resources(build: FaissBuild, device: int, options: GpuOptions | None = None) -> DeviceResources:
    """Return the resources of a device; making them takes about a tenth of a second, and happens once.

    Args:
        build: the faiss to use.
        device: number of the GPU.
        options: how much memory they may take; None leaves it as it is.

    Raises:
        ArgumentError: another amount of pinned memory than they were made with.
    """
    with _making:
        found = _made.get((build, device))
        if found is None:
            found = _made[build, device] = DeviceResources(build, options or GpuOptions())
            return found
    if options is not None:
        if options.pinned_memory_bytes != found.pinned_memory_bytes:
            raise ArgumentError(
                f"pinned_memory_bytes is {options.pinned_memory_bytes}, faiss took "
                f"{found.pinned_memory_bytes} on GPU {device} and cannot change it"
            )
        found.set_temp_memory(options.temp_memory_bytes)
    return found


@contextmanager
def on_current_stream(build: FaissBuild, device: int, resources: DeviceResources) -> Iterator[None]:
    """Run faiss on the stream that torch has current on a device, which need not be the current device."""
    using_stream = _torch_utils(build).using_stream
    stream = torch.cuda.current_stream(device)
    # It sets the stream of the current device, and given none it would take that device's, too.
    with resources.lock, torch.cuda.device(device), using_stream(resources.resources, stream):
        yield


@functools.cache
def _torch_utils(build: FaissBuild) -> Any:
    """Return faiss's code for streams, and leave faiss as it was.

    Importing it makes methods take tensors, and no longer parameters of searches: whoever wants that imports
    it for himself.
    """
    with standing_as_faiss(build):
        if _TORCH_UTILS in sys.modules:
            return sys.modules[_TORCH_UTILS]
        owners = [build.module, *(each for each in vars(build.module).values() if isinstance(each, type))]
        before = [dict(vars(owner)) for owner in owners]
        spec = importlib.util.find_spec(_TORCH_UTILS)
        if spec is None or spec.loader is None:
            raise ImplementationError(f"{build} has no {_TORCH_UTILS}, which knows torch's streams")
        module = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(module)
        finally:
            for owner, members in zip(owners, before, strict=True):
                _restore(owner, members)
    return module


def _restore(owner: Any, members: dict[str, Any]) -> None:
    for name, value in list(vars(owner).items()):
        if name not in members:
            delattr(owner, name)
        elif value is not members[name]:
            setattr(owner, name, members[name])
