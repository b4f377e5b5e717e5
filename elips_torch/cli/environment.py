"""What surrounds a measurement: machine, versions, and variables that slow things."""

import os
import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

import torch

from elips_torch.core.hardware import device_facts

_PACKAGES = {
    "elips_torch": "elips-torch",
    "torch": "torch",
    "triton": "triton",
    "lightning": "lightning",
    "torchmetrics": "torchmetrics",
    "safetensors": "safetensors",
    "numpy": "numpy",
    "matplotlib": "matplotlib",
}
_SLOWING = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


def versions() -> dict[str, str | None]:
    """Return the version of Python and of each package that matters; None where it is missing."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name, distribution in _PACKAGES.items():
        try:
            found[name] = version(distribution)
        except PackageNotFoundError:
            found[name] = None
    # The metadata of torch lacks the build, such as +cu128.
    found["torch"] = str(torch.__version__)
    return found


def hardware() -> dict[str, object]:
    """Return what the machine offers, for JSON."""
    cpu = device_facts("cpu")
    gpus = [device_facts(f"cuda:{i}") for i in range(torch.cuda.device_count())]
    return {
        "machine": platform.machine(),
        "system": platform.system(),
        "cores": os.cpu_count(),
        "torch_threads": torch.get_num_threads(),
        "capability": cpu.capability,
        "vnni": cpu.vnni,
        "gpus": [
            {"name": gpu.name, "capability": gpu.capability, "memory_bytes": gpu.memory_bytes} for gpu in gpus
        ],
    }


def slowing_variables(environment: Mapping[str, str] = os.environ) -> list[str]:
    """Return a line for each environment variable that can slow faiss and numpy."""
    return [
        f"{name}={environment[name]} replaces what OpenBLAS chooses for this CPU, which can slow faiss "
        f"and numpy; unset {name} for a fair comparison"
        for name in _SLOWING
        if name in environment
    ]
