"""A stand-in for the GPU part of faiss: it records what it is called with and calls no driver.

Tensors stay on the CPU, so that pointers are real; what torch and faiss say about GPUs is replaced.
"""

import contextlib
import ctypes
import types
from pathlib import Path

import torch

from elips_torch.engines.faiss.builds import FaissBuild

_FAMILIES = (
    "IndexPreTransform",
    "IndexRefine",
    "IndexIVF",
    "IndexHNSW",
    "IndexNSG",
    "GpuIndexIVF",
    "IndexBinaryFromFloat",
    "IndexBinaryIVF",
    "IndexBinaryHNSW",
    "IndexBinaryHash",
    "IndexBinaryMultiHash",
)


class Options(types.SimpleNamespace):
    allowCpuCoarseQuantizer = False  # noqa: N815
    use_cuvs = False


class ListsConfig(types.SimpleNamespace):
    allowCpuCoarseQuantizer = False  # noqa: N815
    use_cuvs = False

    def __init__(self):
        super().__init__(flatConfig=types.SimpleNamespace())


class Resources:
    made = 0

    def __init__(self):
        type(self).made += 1
        self.calls = []

    def setPinnedMemory(self, nbytes):  # noqa: N802
        self.calls.append(("pinned", nbytes))

    def setTempMemory(self, nbytes):  # noqa: N802
        self.calls.append(("temp", nbytes))


class GpuIndex:
    """An index on a GPU that notes where it was called, and finds rows that it was told to."""

    is_trained = True

    def __init__(self, faiss, dim, number, found=(), ntotal=0):
        self.faiss, self.d, self.number, self.calls = faiss, dim, number, []
        self.found, self.ntotal = found, ntotal

    def getDevice(self):  # noqa: N802
        return self.number

    def reserveMemory(self, n):  # noqa: N802
        self.reserved = n

    def train_c(self, n, x):
        self.calls.append({"name": "train", "n": n, "x": x} | self.faiss.now)

    def add_c(self, n, x):
        self.calls.append({"name": "add", "n": n, "x": x} | self.faiss.now)

    def reconstruct_batch_c(self, n, keys, x):
        self.calls.append({"name": "reconstruct", "n": n, "x": x} | self.faiss.now)

    def search_c(self, n, x, k, scores, ids, params):
        self.calls.append(
            {"n": n, "x": x, "k": k, "scores": scores, "ids": ids, "params": params} | self.faiss.now
        )
        if self.found:
            # The score of a row is its number.
            row = [*self.found, *[-1] * k][:k]
            (ctypes.c_int64 * (n * k)).from_address(ids)[:] = row * n
            (ctypes.c_float * (n * k)).from_address(scores)[:] = [float(each) for each in row] * n


class CpuSide:
    """An index over several GPUs, which takes rows from the CPU and notes what was locked meanwhile."""

    def __init__(self, faiss, dim):
        self.faiss, self.d, self.calls = faiss, dim, []

    def search_c(self, n, x, k, scores, ids, params):
        self.calls.append({"n": n, "x": x, "k": k})


class RecordingFaiss(types.SimpleNamespace):
    """The module: constants, options, and functions that record."""

    def __init__(self, gpus=2):
        super().__init__(
            METRIC_L2=1,
            METRIC_INNER_PRODUCT=0,
            INDICES_64_BIT=3,
            INDICES_CPU=0,
            DistanceDataType_F32=1,
            DistanceDataType_F16=2,
            DistanceDataType_BF16=3,
            IndicesDataType_I64=1,
            IndexBinary=type("IndexBinary", (), {}),
            GpuClonerOptions=type("GpuClonerOptions", (Options,), {}),
            GpuMultipleClonerOptions=type("GpuMultipleClonerOptions", (Options,), {}),
            GpuDistanceParams=types.SimpleNamespace,
            GpuIndexFlatConfig=type("GpuIndexFlatConfig", (types.SimpleNamespace,), {}),
            **{f"GpuIndex{kind}Config": ListsConfig for kind in ("IVFFlat", "IVFPQ", "IVFScalarQuantizer")},
            **{name: type(name, (), {}) for name in _FAMILIES},
            downcast_index=lambda index: index,
            StandardGpuResources=type("StandardGpuResources", (Resources,), {"made": 0}),
            cast_integer_to_float_ptr=int,
            cast_integer_to_void_ptr=int,
            cast_integer_to_idx_t_ptr=int,
        )
        # What is set while faiss runs: the device, and the stream that it was given.
        self.now, self.copies, self.products, self.gpus = {}, [], [], gpus

    def get_num_gpus(self):
        return self.gpus

    def index_cpu_to_gpu(self, resources, device, index, options):
        self.copies.append((resources, device, index, options))
        return GpuIndex(self, index.d, device)

    def index_cpu_to_gpu_multiple_py(self, resources, index, options, gpus):
        self.copies.append((resources, gpus, index, options))
        return CpuSide(self, index.d)

    def __getattr__(self, name):
        # Constructors of the kinds of index there are on GPUs.
        if not name.startswith("GpuIndex"):
            raise AttributeError(name)

        def make(resources, index, config):
            self.copies.append((resources, name, index, config))
            return GpuIndex(self, index.d, config.device)

        return make

    def bfKnn(self, resources, call):  # noqa: N802
        self.products.append((resources, call, dict(self.now)))

    def bfKnn_tiling(self, resources, call, vectors, queries):  # noqa: N802
        self.products.append((resources, call, dict(self.now), vectors, queries))


def recording_build(monkeypatch, gpus=2):
    """Return a build made of the stand-in, with torch's GPU functions recording into it."""
    from elips_torch.engines.faiss import gpu_resources, opaque, search

    faiss = RecordingFaiss(gpus)

    @contextlib.contextmanager
    def device(number):
        faiss.now["device"] = number
        yield
        del faiss.now["device"]

    @contextlib.contextmanager
    def using_stream(resources, stream=None):
        faiss.now.update(stream=stream, resources=resources)
        yield
        faiss.now.pop("stream"), faiss.now.pop("resources")

    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda number: f"stream of GPU {number}")
    utils = types.SimpleNamespace(using_stream=using_stream)
    monkeypatch.setattr(gpu_resources, "_torch_utils", lambda build: utils)
    monkeypatch.setattr(gpu_resources, "_made", {})
    for module in (search, opaque):
        monkeypatch.setattr(module, "cuda_device", lambda number: torch.device("cpu"))
    return FaissBuild(faiss, {}, "0", "generic", "GPU", "unknown", Path("."))
