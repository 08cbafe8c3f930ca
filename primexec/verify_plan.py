"""What is legal in a plan: regions that run in their order and make every value, on executors that claim them."""

from __future__ import annotations

import operator
from collections.abc import Sequence

from torch import fx

from primexec import effects
from primexec.errors import VerificationError
from primexec.executors.base import Executor, Region
from primexec.partition import Plan
from primexec.placement import is_free
from primexec.program import Program
from primexec.verify import broken, verify_graph


def verify_planned(plan: Plan, executors: Sequence[Executor]) -> None:
    """Check the laws of a planned program.

    Each node runs in exactly one region, or is made again wherever it is used; a region takes what earlier regions and
    the program's inputs make, and returns what it makes; the program's outputs are made; operators with effects, and
    those that touch memory that is written to, keep their order; an executor claims every operator of its regions,
    whose graphs obey the laws of captured programs.

    Raises:
        VerificationError: naming the law, the node, its neighbours and the user's line.
    """
    graph = plan.program.graph_module.graph
    made = set(graph.find_nodes(op="placeholder"))
    home: dict[fx.Node, str] = {}
    claiming = {e.name: e for e in executors}
    for region, nodes, inputs, outputs in zip(plan.regions, plan.nodes, plan.inputs, plan.outputs, strict=True):
        _check_region(region, claiming[region.executor], inputs, outputs)
        for n in inputs:
            if n not in made:
                raise broken(n, f"is taken by {region.name} before it is made")
        for n in nodes:
            if n in home:
                raise broken(n, f"runs in {home[n]} and in {region.name}")
            home[n] = region.name
        for n in outputs:
            if n.op == "call_function" and home.get(n) != region.name:
                raise broken(n, f"is returned by {region.name}, which does not run it")
        made.update(outputs)
    for n in plan.program.nodes:
        if n not in home and not is_free(n):
            raise broken(n, "runs in no region")
    for n in plan.program.outputs:
        if n not in made:
            raise broken(n, "is returned by the program, and by no region")
    _check_order([n for nodes in plan.nodes for n in nodes], plan.program)


def _check_region(region: Region, executor: Executor, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> None:
    graph = region.graph_module.graph
    verify_graph(graph)
    taken, returned = len(graph.find_nodes(op="placeholder")), len(graph.output_node().args[0])  # type: ignore[arg-type]
    if (taken, returned) != (len(inputs), len(outputs)):
        raise VerificationError(
            f"{region.name} takes {taken} values and returns {returned}; it is given {len(inputs)}, and "
            f"{len(outputs)} are asked for"
        )
    for n in graph.nodes:
        if executor.name != "aten" and n.op == "call_function" and n.target is not operator.getitem:
            support = executor.supports(n)
            if not support:
                raise broken(n, f"stands in {region.name}, but {executor.name} declines it: {support.reason}")


def _check_order(ran: list[fx.Node], program: Program) -> None:
    """Effects run in the program's order, and so do an operator that writes to memory and one that uses that memory."""
    number = {n: i for i, n in enumerate(program.nodes)}
    before = None
    for n in ran:
        if effects.has_effect(n):
            if before is not None and number[n] < number[before]:
                raise broken(n, f"has an effect and runs after {before.name}, before which it stands")
            before = n
    memory = effects.memory_of(program.graph_module.graph)
    for storage in {memory(w) for n in program.nodes for w in effects.writes(n)}:
        last = write = -1  # of those that have run
        for n in ran:
            if storage in map(memory, (n, *n.all_input_nodes)) and not is_free(n):
                writes = any(memory(w) == storage for w in effects.writes(n))
                if number[n] < (last if writes else write):
                    raise broken(
                        n, "runs after an operator before which it stands, and one of them writes to its memory"
                    )
                last, write = max(last, number[n]), number[n] if writes else write
