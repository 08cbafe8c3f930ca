"""The pipeline after a capture: passes, laws, plan, executable. The same one for traced functions and for the door."""

from __future__ import annotations

import torch
from torch import Tensor

from primexec import passes
from primexec.config import Options, logger, verifies_passes
from primexec.executors import registry
from primexec.executors.base import Executor
from primexec.partition import partition
from primexec.program import Program
from primexec.runtime import Executable, compile_plan
from primexec.verify import verify_captured
from primexec.verify_plan import verify_planned

_log = logger("plan")


def compile_program(
    program: Program,
    options: Options,
    executors: tuple[Executor, ...],
    *,
    inference: bool = False,
    boxed: bool = False,
) -> Executable:
    """The program after all passes (`executable.plan.program`), planned and compiled.

    Args:
        executors: in the user's order, `aten` last.
        inference: whether the program is called inside inference mode.
        boxed: whether the executable takes its inputs in one list, which it empties.

    Raises:
        ExecutorError: where an executor fails, or a strict program would fall back.
    """
    program = passes.run(
        program,
        functional=any(e.name != "aten" for e in executors),
        layouts=any(getattr(e, "any_layout", False) for e in executors),
    )
    verify_captured(program)
    allowed = registry.allowed(options, executors, device_of(program))
    plan = partition(program, executors, allowed=allowed, inference=inference)
    if verifies_passes():
        verify_planned(plan, executors)
    _log.debug("%s", plan)
    return compile_plan(plan, {e.name: e for e in executors}, options.for_executors(), boxed=boxed)


def device_of(program: Program) -> torch.device:
    """The device of the program's first tensor."""
    values = (n.meta.get("val") for n in program.graph_module.graph.nodes)
    return next((v.device for v in values if isinstance(v, Tensor)), torch.get_default_device())
