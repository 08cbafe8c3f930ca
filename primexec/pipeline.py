"""The pipeline after a capture: passes, laws, plan, executable. The same one for traced functions and for the door."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from primexec import effects, passes
from primexec._torch_capture import collector_paused
from primexec.config import Options, logger, verifies_passes
from primexec.executors import registry
from primexec.executors.base import Executor
from primexec.partition import partition
from primexec.program import Program
from primexec.runtime import Executable, compile_plan, without_views
from primexec.verify import verify_captured
from primexec.verify_plan import verify_planned

_log = logger("plan")


@collector_paused()
def compile_program(
    program: Program,
    options: Options,
    executors: tuple[Executor, ...],
    *,
    inference: bool = False,
    boxed: bool = False,
    frozen: Mapping[str, Tensor] | None = None,
) -> Executable:
    """The program after all passes (`executable.plan.program`), planned and compiled.

    Args:
        executors: in the user's order, `aten` last, which runs programs alone whose tensors change their memory.
        inference: whether the program is called inside inference mode.
        boxed: whether the executable takes its inputs in one list, which it empties.
        frozen: what the inputs hold that are promised not to change, by name; None where nothing is promised.

    Raises:
        ExecutorError: where an executor fails, or a strict program would fall back.
    """
    allowed = registry.allowed(options, executors, device_of(program))
    exact = passes.run(program)
    functional = program = exact
    if any(map(effects.moves_memory, exact.nodes)):
        executors = executors[-1:]
    if len(executors) > 1:
        functional = program = passes.run_functional(
            exact, strict=allowed is not None, again=registry.saving(options, executors) == "less"
        )
    if flexible := [e for e in executors if getattr(e, "any_layout", False)]:
        program = passes.run_layouts(functional, frozen, lambda node: any(_runs(e, node) for e in flexible))
    program = passes.run_instead(program, [e.instead for e in executors if hasattr(e, "instead")])
    verify_captured(program)
    plan = partition(program, executors, allowed=allowed, inference=inference)
    only_aten = all(region.executor == "aten" for region in plan.regions)
    if only_aten and program.graph_module is functional.graph_module is not exact.graph_module:
        plan = partition(replace(exact, notes=program.notes), executors, allowed=allowed, inference=inference)
    if verifies_passes():
        verify_planned(plan, executors)
    _log.debug("%s", plan)
    executable = compile_plan(plan, {e.name: e for e in executors}, options.for_executors(), boxed=boxed)
    views = _new_views(exact, plan.program)
    return replace(executable, run=without_views(executable.run, views)) if views else executable


def _runs(executor: Executor, node: fx.Node) -> bool:
    leaves: Any = getattr(executor, "leaves", None)
    return bool(executor.supports(node)) and not (leaves and leaves(node))


def _new_views(exact: Program, program: Program) -> list[int]:
    """Positions of results that are views in functional form alone, of memory that the program makes.

    In graphs of AOTAutograd no fake tensor says that it is a view. Of gradients, the operator that makes them tells.
    """
    given = {effects.storage_of(n) for n in program.graph_module.graph.find_nodes(op="placeholder")}
    outputs = enumerate(zip(exact.outputs, program.outputs, strict=True))
    made = [(i, a, b) for i, (a, b) in outputs if effects.is_view(b) and effects.storage_of(b) not in given]
    return [i for i, a, _ in made if not (a.meta["val"]._is_view() or (exact.is_backward and effects.is_view(a)))]


def device_of(program: Program) -> torch.device:
    """The device of the program's first tensor."""
    values = (n.meta.get("val") for n in program.graph_module.graph.nodes)
    return next((v.device for v in values if isinstance(v, Tensor)), torch.get_default_device())
