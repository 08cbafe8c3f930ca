"""Program → Program. PIPELINE lists every pass, in the order in which they run."""

from __future__ import annotations

from typing import Protocol

from primexec.passes.constants import ShareConstants
from primexec.passes.dead_code import RemoveDeadCode
from primexec.program import Program


class Pass(Protocol):
    """A frozen dataclass whose fields are its options; changes the graph, and returns the program that goes on."""

    def __call__(self, program: Program) -> Program: ...


PIPELINE: tuple[Pass, ...] = (RemoveDeadCode(), ShareConstants())


def run(program: Program) -> Program:
    """Run the PIPELINE on a program."""
    for step in PIPELINE:
        program = step(program)
    return program
