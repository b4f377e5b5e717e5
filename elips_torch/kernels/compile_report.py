"""Write what every Triton kernel compiles to into the README beside this file.

Run as ``python -m elips_torch.kernels.compile_report``; no GPU is needed. With ``--check`` nothing is
compiled: it fails when the table lists other kernels or configurations than there are.
"""

import argparse
import dataclasses
import json
import pathlib
import sys

from elips_torch.kernels.compile_cases import cases
from elips_torch.kernels.compile_facts import TARGETS, Case, Facts, facts_of

README = pathlib.Path(__file__).with_name("README.md")
BEGIN, END = "<!-- compiled: begin -->", "<!-- compiled: end -->"
_HEAD = "| kernel | target | registers | threads | shared, KiB | spills | tensor instructions | epilogue |"


def row(case: Case, target: str, facts: Facts) -> str:
    """Return a line of the table."""
    kinds = ", ".join(f"`{kind}`" for kind in facts.tensor) or "-"
    epilogue = f"{facts.epilogue:.1f}" if facts.epilogue else "-"
    numbers = (facts.registers, facts.threads, facts.shared_bytes // 1024, facts.spills)
    return f"| {case.name} | {target} | {' | '.join(map(str, numbers))} | {kinds} | {epilogue} |"


def table(text: str) -> list[str]:
    """Return the lines between the markers of the README."""
    return text.split(BEGIN)[1].split(END)[0].strip().splitlines()


def listed(text: str) -> list[tuple[str, str]]:
    """Return kernel and target of each line of the table."""
    cells = [line.split("|") for line in table(text)[2:]]
    return [(cell[1].strip(), cell[2].strip()) for cell in cells]


def expected() -> list[tuple[str, str]]:
    """Return kernel and target of each line that the table must have."""
    return [(case.name, target) for target in TARGETS for case in cases(target)]


def main() -> None:
    """Write the table, check it, or print the facts of one target as JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--check", action="store_true", help="only compare which lines there are")
    parser.add_argument("--json", choices=TARGETS, help="print the facts of one target, write nothing")
    options = parser.parse_args()
    if options.json:
        found = [(case, facts_of(case, options.json)) for case in cases(options.json)]
        print(json.dumps([_record(case, facts) for case, facts in found]))
        return
    text = README.read_text()
    if options.check:
        sys.exit(0 if listed(text) == expected() else "the table lists other kernels than there are")
    lines = [_HEAD, "|" + " --- |" * _HEAD[1:].count("|")]
    lines += [row(case, target, facts_of(case, target)) for target in TARGETS for case in cases(target)]
    before, after = text.split(BEGIN)[0], text.split(END)[1]
    README.write_text("\n".join([before + BEGIN, *lines, END + after]))


def _record(case: Case, facts: Facts) -> dict[str, object]:
    asked = {"name": case.name, "needs": case.tensor, "budget": case.budget, "must_be_wide": case.wide_loads}
    return asked | dataclasses.asdict(facts)


if __name__ == "__main__":
    main()
