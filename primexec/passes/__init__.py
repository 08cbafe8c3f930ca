"""Program → Program. PIPELINE lists every pass, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from primexec.config import verifies_passes
from primexec.passes.channels_last import ChannelsLast
from primexec.passes.common import MergeEqual, RemoveNoOps
from primexec.passes.constants import FoldConstants, ShareConstants
from primexec.passes.copies import RemoveLastCopies
from primexec.passes.dead_code import RemoveDeadCode
from primexec.passes.functionalize import Functionalize
from primexec.passes.renames import RemoveRenames
from primexec.program import Program
from primexec.verify import verify_captured, verify_prims


class Pass(Protocol):
    """A frozen dataclass whose fields are its options; changes the graph, and returns the program that goes on."""

    def __call__(self, program: Program) -> Program: ...


# Programs as eager runs them: nothing here changes strides, aliasing, errors or API calls.
PIPELINE: tuple[Pass, ...] = (RemoveRenames(), RemoveLastCopies(), RemoveDeadCode(), ShareConstants(), FoldConstants())
# What executors other than `aten`, which take operators without effects only, ask for besides.
FUNCTIONAL: tuple[Pass, ...] = (Functionalize(),)
# What executors ask for whose kernels run as well on memory in another layout.
LAYOUTS: tuple[Pass, ...] = (ChannelsLast(),)
# Programs in prims, whose results alone count.
PRIMS: tuple[Pass, ...] = (RemoveNoOps(), MergeEqual())


def run(program: Program) -> Program:
    """Run the PIPELINE on a captured program."""
    return _run(PIPELINE, program, verify_captured)


def run_functional(program: Program) -> Program:
    """Run FUNCTIONAL on what the PIPELINE left; its graph stays as it is."""
    return _run(FUNCTIONAL, program, verify_captured)


def run_layouts(program: Program) -> Program:
    """Run LAYOUTS on what FUNCTIONAL left; its graph stays as it is."""
    return _run(LAYOUTS, program, verify_captured)


def run_prims(program: Program) -> Program:
    """Run PRIMS on a program in prims."""
    return _run(PRIMS, program, verify_prims)


def _run(pipeline: tuple[Pass, ...], program: Program, verify: Callable[[Program], None]) -> Program:
    for step in pipeline:
        program = step(program)
        if verifies_passes():
            verify(program)
    return program
