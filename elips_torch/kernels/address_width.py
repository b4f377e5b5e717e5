"""Whether addresses are computed in 64 bits: what Triton's intermediate code multiplies.

A row's place is its number times the length of a row. In 32 bits that product wraps from 2**31
elements on, silently, also where it is widened afterwards.
"""

import re

# Arguments that say how many elements lie between rows.
_ROW_LENGTH = re.compile(r"%(?:\w+_stride|dim|n_groups)$")
_DEFINITION = re.compile(r"^\s*(%\w+)(?::\d+)? = ([\w.]+)(.*)$")


def narrow_products(code: str) -> tuple[str, ...]:
    """Return the names of 32-bit products with the length of a row, in code as `ttir` has it.

    >>> narrow_products("%place = arith.muli %row, %code_stride : i32")
    ('%place',)
    >>> narrow_products("%place = arith.muli %row, %code_stride : i64")
    ()
    """
    operands: dict[str, list[str]] = {}
    products: list[str] = []
    for line in code.splitlines():
        found = _DEFINITION.match(line.split(" loc(")[0])
        if found is None:
            continue
        name, operation, rest = found.groups()
        # What is read at an address is no address.
        operands[name] = [] if operation == "tt.load" else re.findall(r"%\w+", rest)
        if operation == "arith.muli" and re.search(r"(?:: |x)i32(?:>|$)", rest.strip()):
            products.append(name)
    return tuple(name for name in products if _is_from_row_length(name, operands))


def _is_from_row_length(name: str, operands: dict[str, list[str]]) -> bool:
    pending, seen = [name], set()
    while pending:
        value = pending.pop()
        if _ROW_LENGTH.match(value):
            return True
        if value not in seen:
            seen.add(value)
            pending += operands.get(value, [])
    return False
