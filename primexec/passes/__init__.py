"""Program → Program. PIPELINE lists every pass, in the order in which they run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from torch import Tensor, fx

from primexec.config import verifies_passes
from primexec.passes.again import ComputeAgain, DrawsAsBits
from primexec.passes.attention import ShareKeys
from primexec.passes.channels_last import ChannelsLast
from primexec.passes.common import MergeEqual, RemoveNoOps
from primexec.passes.constants import FoldConstants, ShareConstants
from primexec.passes.copies import RemoveLastCopies
from primexec.passes.dead_code import RemoveDeadCode
from primexec.passes.freeze import FoldNorms, PackWeights
from primexec.passes.functionalize import Functionalize
from primexec.passes.instead import Call, Instead
from primexec.passes.pools import PoolsChannelsLast
from primexec.passes.renames import RemoveRenames
from primexec.passes.results import ViewsApart
from primexec.passes.scalars import NumbersAsTensors
from primexec.program import Program
from primexec.verify import verify_captured, verify_prims


class Pass(Protocol):
    """A frozen dataclass whose fields are its options; changes the graph, and returns the program that goes on."""

    def __call__(self, program: Program) -> Program: ...


# Programs as eager runs them: nothing here changes strides, aliasing, errors or API calls.
PIPELINE: tuple[Pass, ...] = (RemoveRenames(), RemoveLastCopies(), RemoveDeadCode(), ShareConstants(), FoldConstants())
# Programs in prims, whose results alone count.
PRIMS: tuple[Pass, ...] = (RemoveNoOps(), MergeEqual())


def run(program: Program) -> Program:
    """Run the PIPELINE on a captured program."""
    return _run(PIPELINE, program, verify_captured)


def run_functional(program: Program, *, strict: bool = False, again: bool = False) -> Program:
    """Run what executors ask for that take operators without effects only; the graph stays as it is.

    Args:
        strict: whether `aten` may only place results: what is written to inputs is then computed apart, and copied.
        again: whether a backward pass inside of the program computes cheap values again.
    """
    passes = (
        Functionalize(copy_back=strict),
        ViewsApart(),
        NumbersAsTensors(),
        *((DrawsAsBits(), ComputeAgain()) if again else ()),
    )
    return _run(passes, program, verify_captured)


def run_layouts(
    program: Program, frozen: Mapping[str, Tensor] | None = None, runs: Callable[[fx.Node], bool] = lambda node: False
) -> Program:
    """Run what chooses layouts, and what ATen's kernels are given, on what `run_functional` left; its graph stays.

    Args:
        frozen: what the inputs hold that are promised not to change, by name; None where nothing is promised.
        runs: whether an executor runs an operator on memory of any layout.
    """
    if frozen is None:
        return _run((ChannelsLast(), PoolsChannelsLast(), ShareKeys()), program, verify_captured)
    layouts = ChannelsLast(frozenset(frozen)), PoolsChannelsLast()
    return _run((FoldNorms(frozen), *layouts, ShareKeys(), PackWeights(frozen, runs)), program, verify_captured)


def run_instead(program: Program, finds: Sequence[Callable[[fx.Node], Call | None]]) -> Program:
    """Run, in place of operators with effects, what executors know of that does the same."""
    return _run(tuple(map(Instead, finds)), program, verify_captured)


def run_prims(program: Program) -> Program:
    """Run PRIMS on a program in prims."""
    return _run(PRIMS, program, verify_prims)


def _run(pipeline: tuple[Pass, ...], program: Program, verify: Callable[[Program], None]) -> Program:
    for step in pipeline:
        program = step(program)
        if verifies_passes():
            verify(program)
    return program
