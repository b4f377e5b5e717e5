"""The command ``doctor``: what is installed, what the machine offers, what serves, and whether it works."""

import argparse
import dataclasses
import json
from typing import Any

import torch

from elips_torch.cli.environment import hardware, slowing_variables, versions
from elips_torch.cli.smoke_test import smoke_test
from elips_torch.core.compilation import find_cpp_compiler
from elips_torch.core.dispatch import Request, explain_choice
from elips_torch.core.hardware import device_facts
from elips_torch.core.metric import resolve_metric
from elips_torch.core.native import instruction_options
from elips_torch.engines.faiss.builds import faster_build, is_installed, load_installed
from elips_torch.engines.faiss.cuvs import cuvs_state
from elips_torch.kernels.screen_choice import choose_screen
from elips_torch.kernels.search_native import LIBRARY, library_is_ready, library_reasons
from elips_torch.ops import coded_search, ivf_search
from elips_torch.ops.explain import OPERATIONS

# Operation, number of queries, number of database vectors, k; all with dim 384.
_SEARCHES: dict[str, tuple[str, int, int, int | None]] = {
    "knn, small": ("knn", 1, 1_000, 10),
    "knn, medium": ("knn", 32, 100_000, 10),
    "knn, large": ("knn", 4_096, 1_000_000, 100),
    "ivf_search": ("ivf_search", 32, 1_000_000, 10),
    "coded_search": ("coded_search", 1, 1_000_000, 10),
    "range_search": ("range_search", 32, 100_000, None),
    "pairwise_distance": ("pairwise_distance", 32, 10_000, None),
}
_DIM = 384
# Product codes of a vector: bytes, one for each part.
_PARTS = 48
_IMPLEMENTATIONS = {
    **OPERATIONS,
    "ivf_search": ivf_search.IMPLEMENTATIONS,
    "coded_search": coded_search.IMPLEMENTATIONS,
}


def run(options: argparse.Namespace) -> int:
    """Print the findings; return 0 when the smoke test passes and no part is broken, else 1."""
    report = examine()
    print(json.dumps(report, indent=2) if options.json else format_report(report))
    return 0 if report["passed"] else 1


def examine() -> dict[str, Any]:
    """Return everything that ``doctor`` says, for JSON."""
    devices = [torch.device("cpu"), *(torch.device("cuda", i) for i in range(torch.cuda.device_count()))]
    outcomes = {
        str(device): [dataclasses.asdict(each) for each in smoke_test(device)] for device in devices[:2]
    }
    faiss = _faiss()
    broken = None if faiss is None else faiss.get("broken")
    return {
        "versions": versions(),
        "faiss": faiss,
        "compiler": find_cpp_compiler(),
        "native": _native(),
        "hardware": hardware(),
        "devices": {str(device): str(device_facts(device)) for device in devices},
        "operations": {str(device): _operations(device, broken) for device in devices},
        "warnings": slowing_variables(),
        "smoke_test": outcomes,
        "passed": broken is None
        and all(outcome["passed"] for steps in outcomes.values() for outcome in steps),
    }


def _faiss() -> dict[str, Any] | None:
    if not is_installed():
        return None
    try:
        build = load_installed()
    except ImportError as error:
        return {"broken": str(error)}
    return {
        "version": build.version,
        "level": build.level,
        "compile_options": build.compile_options,
        "blas": build.blas,
        "gpu": build.has_gpu,
        "faster": faster_build(build),
        "cuvs": cuvs_state("auto", build).reason,
    }


def _native() -> dict[str, Any]:
    """Return whether the library's C++ is compiled or can be, for which instructions, and its file."""
    device = torch.device("cpu")
    options = instruction_options(device_facts(device))
    return {
        "compiled": library_is_ready(device),
        "reasons": library_reasons(device),
        "instructions": options[-1].removeprefix("-m") if options else None,
        "file": str(LIBRARY.path(options)),
    }


def _operations(device: torch.device, broken: str | None) -> dict[str, Any]:
    """Return for each kind of call what serves it and why the others do not, such as a broken faiss."""
    served = {}
    for name, (operation, n_queries, n_rows, k) in _SEARCHES.items():
        request = _request(device, operation, n_queries, n_rows, k)
        found = explain_choice(operation, _IMPLEMENTATIONS[operation], request, "auto")
        if broken is not None and "faiss" in found.reasons:
            # Choosing imports nothing, and so does not know.
            found.reasons["faiss"] = ["faiss is broken", *found.reasons["faiss"]]
        served[name] = {"request": found.request, "chosen": found.chosen, "reasons": found.reasons}
    return served


def _request(device: torch.device, operation: str, n_queries: int, n_rows: int, k: int | None) -> Request:
    """Describe a search of an index: one for "knn" has its plane."""
    metric = resolve_metric("l2")
    sizes = device, torch.float32, torch.float32, n_queries, n_rows, _DIM, metric, k
    if operation == "coded_search":
        return coded_search.CodedRequest(*sizes, code_size=_PARTS, parts=_PARTS)
    if operation == "knn":
        return Request(*sizes, choose_screen("auto", metric, torch.float32, _DIM, device))
    return Request(*sizes)


def format_report(report: dict[str, Any]) -> str:
    """Return the findings as text."""
    lines = ["installed"]
    for name, version in report["versions"].items():
        lines.append(_line(name, version or "not installed"))
    lines += _faiss_lines(report["faiss"])
    lines.append(
        _line("C++ compiler", report["compiler"] or "none found: nothing can be compiled for the CPU")
    )
    lines += _native_lines(report["native"])
    lines += ["", "hardware"]
    facts = report["hardware"]
    lines.append(
        _line("CPU", f"{facts['machine']}, {facts['cores']} cores, {facts['torch_threads']} threads in torch")
    )
    lines.append(
        _line("instructions", f"{facts['capability']}, {'with' if facts['vnni'] else 'without'} VNNI")
    )
    if not facts["gpus"]:
        lines.append(_line("GPU", "none that torch can use"))
    for number, gpu in enumerate(facts["gpus"]):
        memory = f"{gpu['memory_bytes'] / 2**30:.0f} GiB"
        lines.append(_line(f"GPU {number}", f"{gpu['name']}, {gpu['capability']}, {memory}"))
    for device, operations in report["operations"].items():
        lines += ["", f"what serves on {device}"]
        for name, found in operations.items():
            lines.append(_line(name, f"{found['chosen'] or 'nothing'}  ({found['request']})"))
            for other, reasons in found["reasons"].items():
                if reasons:
                    lines.append(_line("", f"not {other}: {'; '.join(reasons)}"))
    lines += ["", "environment"]
    lines += [f"  warning: {warning}" for warning in report["warnings"]] or [
        "  no variable that slows searches"
    ]
    for device, outcomes in report["smoke_test"].items():
        lines += ["", f"smoke test on {device}"]
        for outcome in outcomes:
            verdict = "PASS" if outcome["passed"] else "FAIL"
            lines.append(
                f"  {verdict}  {outcome['step']} ({outcome['seconds']:.2f} s) {outcome['detail']}".rstrip()
            )
    return "\n".join([*lines, "", _verdict(report)])


def _verdict(report: dict[str, Any]) -> str:
    if report["passed"]:
        return "elips_torch works here"
    if all(outcome["passed"] for outcomes in report["smoke_test"].values() for outcome in outcomes):
        return "elips_torch works here, faiss does NOT: it is broken, see above"
    return "elips_torch does NOT work here"


def _native_lines(native: dict[str, Any]) -> list[str]:
    if native["reasons"]:
        return [_line("C++ search", f"not available: {'; '.join(native['reasons'])}")]
    if native["compiled"]:
        return [_line("C++ search", f"compiled for {native['instructions']}, {native['file']}")]
    text = f"will be compiled for {native['instructions']} at the first large search, once, into"
    return [_line("C++ search", f"{text} {native['file']}")]


def _faiss_lines(faiss: dict[str, Any] | None) -> list[str]:
    if faiss is None:
        return [_line("faiss", "not installed")]
    if "broken" in faiss:
        return [_line("faiss", f"broken: {faiss['broken']}")]
    gpu = ", GPU code" if faiss["gpu"] else ""
    options = faiss["compile_options"] or "no options"
    lines = [
        _line(
            "faiss",
            f"{faiss['version']}, level {faiss['level']}{gpu}, {faiss['blas']}, compiled with {options}",
        )
    ]
    lines.append(_line("", faiss["faster"] or "no build is known to be faster on this CPU"))
    if faiss["gpu"]:
        lines.append(_line("", f"cuVS: {faiss['cuvs']}"))
    return lines


def _line(name: str, text: str) -> str:
    return f"  {name:<18}{text}"
