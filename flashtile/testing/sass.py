"""A look into the machine code of a kernel (SASS, as nvdisasm prints it), for what ptxas does not report."""

import re

_INSTRUCTION = re.compile(r"\s+/\*[0-9a-f]{4,}\*/\s+(?:@(!?U?P\w+)\s+)?([\w.]+) ?(.*?)\s*;")
_LABEL = re.compile(r"(\.L_x_\d+):")


def unwritten_registers(sass: str) -> list[str]:
    """Instructions that read a uniform register which some path to them has not written: ptxas 12.8 makes such code
    (tile_widths in kernels/attention.py). A write under a predicate counts as one."""
    code: list[tuple[str, str, str]] = []  # predicate, opcode, operands
    labels: dict[str, int] = {}
    for line in sass.splitlines():
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := _INSTRUCTION.match(line):
            code.append((instruction[1] or "", instruction[2], instruction[3]))
    written: list[set[int] | None] = [None] * len(code)  # on all paths that lead to an instruction; None: no path yet
    if code:
        written[0] = set()
    pending = [0] if code else []
    while pending:
        i = pending.pop()
        before = written[i]
        assert before is not None
        after = before | _written(*code[i][1:])
        for j in _next(i, code, labels):
            known = written[j]
            if known is None or not known <= after:
                written[j] = set(after) if known is None else known & after
                pending.append(j)
    return [
        f"{opcode} {operands}"
        for (_, opcode, operands), known in zip(code, written, strict=True)
        if known is not None and not _read(opcode, operands) <= known
    ]


def _next(i: int, code: list[tuple[str, str, str]], labels: dict[str, int]) -> list[int]:
    predicate, opcode, operands = code[i]
    following = [i + 1] if i + 1 < len(code) else []
    name = opcode.partition(".")[0]
    if name in ("EXIT", "RET"):
        return following if predicate else []
    if name == "BRA":
        target = re.search(r"\.L_x_\d+", operands)
        conditional = predicate or "," in operands
        return ([labels[target[0]]] if target else []) + (following if conditional else [])
    return following


def _destination(operands: str) -> str:
    """The operand that is written, if it is a uniform register: the first, or the first after a predicate."""
    match = re.match(r"(?:U?P\w+, )?(UR\d+)\b", operands)
    return match[1] if match else ""


def _written(opcode: str, operands: str) -> set[int]:
    register = _destination(operands)
    if not register:
        return set()
    n = int(register[2:])
    return {n, n + 1} if ".64" in opcode or ".WIDE" in opcode else {n}


def _read(opcode: str, operands: str) -> set[int]:
    if re.fullmatch(r"R\d+, RZ, RZ, UR\d+", operands):
        return set()  # a copy: Triton's PTX itself leaves the other half of a pair of fp8 undefined where there is none
    read = set()
    sources = operands.replace(_destination(operands), "", 1)
    for match in re.finditer(r"(gdesc\[|desc\[)?UR(\d+)\b", sources):
        kind, n = match[1], int(match[2])
        if kind == "gdesc[":  # descriptors of A and B, or of B alone where A is in registers
            read |= {n + 2, n + 3} if re.match(r"R\w+, R\d", operands) else set(range(n, n + 4))
        else:
            read |= {n, n + 1} if kind or opcode == "UIADD3.64" else {n}
    return read
