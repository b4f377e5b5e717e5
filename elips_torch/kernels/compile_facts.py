"""What a Triton kernel becomes on a GPU that is not there: registers, shared memory, instructions.

Kernels are compiled ahead of time, and facts are read from the machine code.
"""

import dataclasses
import re
import subprocess
import tempfile
from collections.abc import Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from elips_torch.kernels.address_width import narrow_products

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
_TENSOR_PTX = r"wgmma\.mma_async[\w.]*|tcgen05\.mma[\w.:]*|mma\.sync[\w.]*"
_TENSOR_SASS = r"\b(?:HGMMA|IGMMA|HMMA|IMMA|DMMA|UTC\w*MMA)\b"
_SASS_LINE = r"/\*[0-9a-f]{4,5}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_]+)"
_AMD_LINE = r"^\s+((?:v|s|ds|global|buffer|flat|scratch)_\w+)"


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel with one configuration, as it would be launched.

    Attributes:
        name: kernel and configuration, for people.
        kernel: the jit function.
        types: Triton type of each argument; None for one that is left out.
        constants: the constexpr arguments.
        warps: warps per program.
        stages: pipeline stages.
        unaligned: arguments that are not known to be multiples of 16.
        scores: scores that one program reduces; 0 where the epilogue is not counted.
        budget: instructions per score that the epilogue may take.
        tensor: how the tensor instructions must begin; "" for kernels without tensor cores.
        wide_loads: whether rows are read 16 bytes at a time.
    """

    name: str
    kernel: Any
    types: Mapping[str, str | None]
    constants: Mapping[str, Any]
    warps: int = 4
    stages: int = 2
    unaligned: tuple[str, ...] = ()
    scores: int = 0
    budget: float = 0.0
    tensor: str = ""
    wide_loads: bool = True


@dataclasses.dataclass(frozen=True)
class Facts:
    """What a case compiles to.

    Attributes:
        registers: 32-bit vector registers per thread.
        threads: threads per program.
        shared_bytes: shared memory per program.
        spills: instructions (NVIDIA) or registers (AMD) that keep a register's value in memory.
        tensor: the kinds of tensor instructions.
        tf32: whether any product is computed in TF32.
        epilogue: instructions per score behind the last tensor instruction; 0 where not counted.
        wide_loads: whether 16-byte loads from global memory are there.
        narrow_products: 32-bit products with the length of a row; there must be none.
    """

    registers: int
    threads: int
    shared_bytes: int
    spills: int
    tensor: tuple[str, ...]
    tf32: bool
    epilogue: float
    wide_loads: bool
    narrow_products: tuple[str, ...]


def compile_case(case: Case, target: str) -> Any:
    """Compile a case for a target; Triton keeps the result in its cache on disk."""
    names = case.kernel.arg_names
    constants = {name: None for name, kind in case.types.items() if kind is None} | dict(case.constants)
    signature = {name: "constexpr" if name in constants else str(case.types[name]) for name in names}
    aligned = [
        place
        for place, name in enumerate(names)
        if name not in constants
        and name not in case.unaligned
        and (signature[name].startswith("*") or signature[name] in ("i32", "i64"))
    ]
    source = ASTSource(
        fn=case.kernel,
        signature=signature,
        constexprs={(names.index(name),): value for name, value in constants.items()},
        attrs={(place,): [["tt.divisibility", 16]] for place in aligned},
    )
    options = {"num_warps": case.warps, "num_stages": case.stages, "enable_fp_fusion": True}
    return triton.compile(source, target=TARGETS[target], options=options)


def facts_of(case: Case, target: str) -> Facts:
    """Compile a case and read its facts."""
    compiled = compile_case(case, target)
    read = _amd_facts if target.startswith("gfx") else _nvidia_facts
    facts = read(compiled)
    threads = case.warps * TARGETS[target].warp_size
    behind_tensor = facts.pop("behind_tensor")
    return Facts(
        threads=threads,
        shared_bytes=compiled.metadata.shared,
        tf32=any(re.search("tf32|_xf32", compiled.asm.get(form, "")) for form in ("ttir", "ptx", "amdgcn")),
        narrow_products=narrow_products(compiled.asm["ttir"]),
        epilogue=round(behind_tensor * threads / case.scores, 2) if case.scores else 0.0,
        **facts,
    )


def _nvidia_facts(compiled: Any) -> dict[str, Any]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = _output(triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name)
        code = _output(triton.knobs.nvidia.nvdisasm.path, "-c", file.name)
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)", usage)
    if found is None:
        raise RuntimeError(f"cuobjdump gives no resource usage: {usage}")
    lines = [line for line in code.splitlines() if re.search(_SASS_LINE, line)]
    return {
        "registers": int(found[1]),
        "spills": sum(bool(re.search(r"\b(?:STL|LDL)\b", line)) for line in lines),
        "tensor": _kinds(_TENSOR_PTX, compiled.asm["ptx"]),
        "behind_tensor": _behind([line for line in lines if " NOP" not in line], _TENSOR_SASS),
        "wide_loads": bool(re.search(r"\b(?:LDG|LDGSTS)\S*\.128|UTMALDG", code)),
    }


def _amd_facts(compiled: Any) -> dict[str, Any]:
    code = compiled.asm["amdgcn"]
    lines = [line for line in code.splitlines() if re.search(_AMD_LINE, line)]

    def number(name: str) -> int:
        return int(re.findall(rf"\.{name}:\s*(\d+)", code)[-1])

    return {
        "registers": number("vgpr_count"),
        # Scalar registers spill into lanes of vector registers, not into memory.
        "spills": number("vgpr_spill_count"),
        "tensor": _kinds(r"v_mfma\w+", code),
        "behind_tensor": _behind([line for line in lines if "s_nop" not in line], r"v_mfma"),
        "wide_loads": bool(re.search(r"(?:global|buffer)_load_dwordx4", code)),
    }


def _output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _kinds(pattern: str, code: str) -> tuple[str, ...]:
    return tuple(sorted(set(re.findall(pattern, code))))


def _behind(lines: list[str], pattern: str) -> int:
    places = [place for place, line in enumerate(lines) if re.search(pattern, line)]
    return len(lines) - 1 - places[-1] if places else len(lines)
