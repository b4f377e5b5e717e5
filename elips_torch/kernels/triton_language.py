"""What the Triton kernels share: device functions, and how their launchers find the device."""

# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-decorators

import contextlib

import torch
import triton
import triton.language as tl
from torch import Tensor

from elips_torch.core.hardware import device_facts

# What a row that may not be found counts as. Finite: sums and comparisons with it stay ordinary.
LOWEST_BOUND = -3.0e38
LOWEST = tl.constexpr(LOWEST_BOUND)
HIGHEST_DISTANCE = 3.0e38
HIGHEST = tl.constexpr(HIGHEST_DISTANCE)
# True where kernels run in Triton's interpreter, on the CPU.
INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))

# Programs of the interpreter run one after another; a few exercise every path.
_INTERPRETED_PROGRAMS = 3


@triton.jit
def dot(left, right, accumulator):
    """Return left @ right + accumulator, without TF32."""
    # The interpreter multiplies bfloat16 operands as the integers that hold their bits.
    if INTERPRETED and left.dtype == tl.bfloat16:
        return tl.dot(left.to(tl.float32), right.to(tl.float32), accumulator, input_precision="ieee")
    else:
        return tl.dot(left, right, accumulator, input_precision="ieee")


@triton.jit
def zeros_for(SHAPE: tl.constexpr, dtype: tl.constexpr):
    """Return an accumulator for products of a dtype: int32 for int8, float32 for floats."""
    if dtype == tl.int8:
        return tl.zeros(SHAPE, tl.int32)
    else:
        return tl.zeros(SHAPE, tl.float32)


@triton.jit
def ordered_bits(values):
    """Map float32 to int32 such that the order is kept; the two zeros are one."""
    bits = (values + 0.0).to(tl.int32, bitcast=True)
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


@triton.jit
def floats_of_bits(bits):
    """Invert `ordered_bits`."""
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


def device_family(device: torch.device) -> str:
    """Return the architecture whose block sizes suit a device: "sm_80", "sm_90", "sm_100", "gfx942".

    GPUs without an entry of their own get the blocks that need the least shared memory.
    """
    capability = device_facts(device).capability
    if capability.startswith("gfx"):
        return "gfx942"
    if capability in ("sm_100", "sm_103"):
        return "sm_100"
    return "sm_90" if capability == "sm_90" else "sm_80"


def resident_programs(device: torch.device, per_processor: int) -> int:
    """Return how many programs to launch where each takes several tiles."""
    if device.type != "cuda":
        return _INTERPRETED_PROGRAMS
    return torch.cuda.get_device_properties(device).multi_processor_count * per_processor


def launch_scope(tensor: Tensor) -> contextlib.AbstractContextManager[object]:
    """Return the context in which kernels on a tensor are launched: its device is the current one."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def launch_options(warps: int, stages: int = 1) -> dict[str, int | bool]:
    """Return the options of a launch. Multiply-adds are fused, whatever Triton's version defaults to."""
    return {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}


def power_of_two(number: int, least: int = 1) -> int:
    """Return the smallest power of two that is at least ``number`` and ``least``."""
    return max(least, 1 << max(0, number - 1).bit_length())
