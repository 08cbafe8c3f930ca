"""Bytecode as it reads on every version of Python: one instruction for each variable, and its line."""

from __future__ import annotations

import dis
import types

# Python 3.13 reads and writes two variables in one instruction; 3.14 borrows those that nothing else can change.
_PARTS = {
    "LOAD_FAST_LOAD_FAST": ("LOAD_FAST", "LOAD_FAST"),
    "LOAD_FAST_BORROW_LOAD_FAST_BORROW": ("LOAD_FAST", "LOAD_FAST"),
    "STORE_FAST_LOAD_FAST": ("STORE_FAST", "LOAD_FAST"),
    "STORE_FAST_STORE_FAST": ("STORE_FAST", "STORE_FAST"),
}
VARIABLE = frozenset({"LOAD_FAST", "LOAD_FAST_BORROW", "LOAD_FAST_CHECK", "LOAD_DEREF"})


def instructions(code: types.CodeType) -> list[dis.Instruction]:
    """The instructions of code; those of two variables as two."""
    found: list[dis.Instruction] = []
    for x in dis.get_instructions(code):
        if (names := _PARTS.get(x.opname)) is None:
            found.append(x)
        else:
            found += [
                x._replace(opname=name, opcode=dis.opmap[name], argval=variable)
                for name, variable in zip(names, x.argval, strict=True)
            ]
    return found


def line_of(instruction: dis.Instruction, before: int) -> int:
    """The line of an instruction; that of the one before it where it does not begin one, or has none."""
    line = getattr(instruction, "line_number", instruction.starts_line)  # Python 3.13 tells in `starts_line` whether
    return before if line is None else int(line)
