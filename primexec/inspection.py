"""What executors make of the regions that they run: lines for people."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from primexec import passes
from primexec.config import Options
from primexec.executors import registry
from primexec.executors.base import Executor
from primexec.partition import Plan, partition
from primexec.pipeline import device_of
from primexec.program import Program, stage

NOTHING = "nothing of this program runs on llvm"


@stage("inspect")
def inspect(program: Program, form: str, parameters: Mapping[str, object]) -> str:
    """The program, and its backward program, as `loops`, `llvm` or `asm`."""
    blocks = list(_blocks(program, form, Options.of(("llvm", "aten"), parameters)))
    return "\n".join(blocks) or NOTHING


def _blocks(program: Program, form: str, options: Options) -> Iterator[str]:
    executors = registry.resolve(options, device_of(program))
    laid_out = passes.run_layouts(passes.run_functional(passes.run(program)))
    plan = partition(laid_out, executors, allowed=None, inference=False)
    lower: Any = importlib.import_module("primexec.executors.llvm.executor").lower
    host: Any = importlib.import_module("primexec.executors.llvm.target").host
    kernel_graphs: Any = importlib.import_module("primexec.executors.llvm.library").kernel_graphs
    for region in plan.regions:
        graph = region.graph_module.graph
        for part, donated in kernel_graphs(graph, frozenset()) if region.executor == "llvm" else ():
            made = lower(part, options.for_executors(), donated, host())
            comment = {"loops": "", "llvm": "; ", "asm": "# "}[form]
            yield f"{comment}{region.name}\n{made.schedule if form == 'loops' else getattr(made, form)}"
    if program.backward is not None:
        for block in _blocks(program.backward, form, options):
            yield f"backward {block}" if form == "loops" else block


def described(plan: Plan, executors: Sequence[Executor], options: Options) -> tuple[str, ...]:
    """What the executors tell about the regions of a plan."""
    tellers = {e.name: getattr(e, "describe", None) for e in executors}
    lines: list[str] = []
    for region in plan.regions:
        teller = tellers.get(region.executor)
        if teller is not None:
            lines += teller(region, options.for_executors())
    return tuple(lines)
