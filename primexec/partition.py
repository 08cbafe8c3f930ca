"""Which executor runs which node, and why: claims, and the regions they form."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Sequence, Set
from dataclasses import dataclass

from torch import fx

from primexec import _torch, effects
from primexec.errors import ExecutorError
from primexec.executors.base import Executor, Region, Support
from primexec.program import ApiCall, Program, op_name


@dataclass(frozen=True, slots=True)
class Claim:
    """The executor that runs a node, and what the executors before it in the user's order said."""

    executor: str
    refusals: tuple[tuple[str, str], ...]  # (executor, reason)


@dataclass(frozen=True, eq=False)
class Plan:
    """The regions of a program in the order in which they run.

    Attributes:
        inputs: for each region the nodes of the program that it takes.
        outputs: for each region the nodes of the program that it returns.
    """

    program: Program
    claims: dict[fx.Node, Claim]
    regions: tuple[Region, ...]
    inputs: tuple[tuple[fx.Node, ...], ...]
    outputs: tuple[tuple[fx.Node, ...], ...]

    def __str__(self) -> str:
        lines = []
        for region in self.regions:
            ops = [n for n in region.graph_module.graph.nodes if n.op == "call_function"]
            counts = Counter(op_name(n.target) for n in ops if n.target is not operator.getitem)
            common = ", ".join(f"{count} {name}" for name, count in counts.most_common(8))
            rest = len(counts) - 8
            more = f", {rest} kinds more" if rest > 0 else ""
            lines.append(f"{region.name} on {region.executor}: {sum(counts.values())} operators ({common}{more})")
        refusals = Counter(
            (executor, op_name(node.target), reason)
            for node, claim in self.claims.items()
            for executor, reason in claim.refusals
        )
        for (executor, name, reason), count in sorted(refusals.items()):
            lines.append(f"  {executor} declined {count} x {name}: {reason}")
        return "\n".join(lines)


def partition(program: Program, executors: Sequence[Executor], *, allowed: Set[str] | None, inference: bool) -> Plan:
    """Ask the executors in order, and join consecutive nodes of one executor into regions.

    Raises:
        ExecutorError: where a node is left to an executor that is not among the allowed ones.
    """
    pinned = _pinned(program)
    claims = {node: _claim(node, executors, pinned) for node in program.nodes}
    if allowed is not None:
        _check_strict(claims, allowed)
    groups: list[tuple[str, list[fx.Node]]] = []
    for node in program.nodes:
        name = claims[node].executor
        if not groups or groups[-1][0] != name:
            groups.append((name, []))
        groups[-1][1].append(node)
    if len(groups) <= 1:
        name = groups[0][0] if groups else executors[-1].name
        region = Region("region0", name, program.graph_module, program.calls, inference)
        placeholders = tuple(n for n in program.graph_module.graph.nodes if n.op == "placeholder")
        returned = tuple(program.graph_module.graph.output_node().args[0])  # type: ignore[arg-type]
        return Plan(program, claims, (region,), (placeholders,), (returned,))
    parts = [_region(program, i, name, nodes, inference) for i, (name, nodes) in enumerate(groups)]
    regions, inputs, outputs = zip(*parts, strict=True)
    return Plan(program, claims, regions, inputs, outputs)


def _claim(node: fx.Node, executors: Sequence[Executor], pinned: dict[fx.Node, str]) -> Claim:
    if node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    refusals: list[tuple[str, str]] = []
    for executor in executors[:-1]:
        reason = pinned.get(node) if executor.name != "aten" else ""
        if not reason:
            support = _ask(executor, node)
            if support:
                return Claim(executor.name, tuple(refusals))
            reason = support.reason
        refusals.append((executor.name, reason))
    return Claim(executors[-1].name, tuple(refusals))


def _ask(executor: Executor, node: fx.Node) -> Support:
    try:
        return executor.supports(node)
    except Exception as error:
        raise ExecutorError(
            f"the executor {executor.name!r} failed to judge {op_name(node.target)}: {error}"
        ) from error


def _pinned(program: Program) -> dict[fx.Node, str]:
    """Nodes that only `aten` may run, with the reason: what they do shows outside of their own result."""
    nodes = program.nodes
    written = {effects.storage_of(w) for n in nodes for w in effects.writes(n)}
    returned = list(program.graph_module.graph.output_node().all_input_nodes)
    inputs = [n for n in program.graph_module.graph.nodes if n.op == "placeholder"]
    visible = {effects.storage_of(n) for n in (*returned, *inputs)}
    pinned: dict[fx.Node, str] = {}
    for node in nodes:
        results = [u for u in node.users if u.target is operator.getitem] or [node]
        if isinstance(node.meta.get("val"), _torch.SYMBOLS):
            pinned[node] = "it computes a size"
        elif effects.has_effect(node):
            pinned[node] = "it has effects"
        elif any(effects.aliases_input(r) and effects.storage_of(r) in written for r in results):
            pinned[node] = "it aliases memory that is changed in place"
        elif any(effects.aliases_input(r) and r in returned and effects.storage_of(r) in visible for r in results):
            pinned[node] = "it returns an alias"
    # An alias that is returned shares its memory along the whole chain of views it came through.
    for node in reversed(nodes):
        if pinned.get(node) == "it returns an alias":
            for source in node.all_input_nodes:
                if (
                    source.op == "call_function"
                    and effects.storage_of(source) == effects.storage_of(node)
                    and effects.aliases_input(source)
                ):
                    pinned.setdefault(source, "it returns an alias")
    return pinned


def _check_strict(claims: dict[fx.Node, Claim], allowed: Set[str]) -> None:
    for node, claim in claims.items():
        if claim.executor not in allowed:
            said = "; ".join(f"{name}: {reason}" for name, reason in claim.refusals)
            raise ExecutorError(
                f"strict: {op_name(node.target)} would fall back to {claim.executor} ({said})\n"
                f"  {node.meta.get('source')}"
            )


def _region(
    program: Program, index: int, executor: str, nodes: list[fx.Node], inference: bool
) -> tuple[Region, tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """The nodes as a graph of their own, with the program's nodes that it takes and returns."""
    inside = set(nodes)
    constants = {n for node in nodes for n in node.all_input_nodes if n.op == "get_attr"}
    inputs = tuple(dict.fromkeys(a for n in nodes for a in n.all_input_nodes if a not in inside | constants))
    outputs = tuple(n for n in nodes if any(u not in inside for u in n.users))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in (*constants, *nodes):
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[n] for n in outputs))
    module = fx.GraphModule(program.graph_module, graph)
    calls = tuple(_copy_call(c, copies) for c in program.calls if inside.issuperset(c.nodes))
    return Region(f"region{index}", executor, module, calls, inference), inputs, outputs


def _copy_call(call: ApiCall, copies: dict[fx.Node, fx.Node]) -> ApiCall:
    copied = fx.node.map_arg((call.args, call.kwargs), copies.__getitem__)
    return ApiCall(
        function=call.function,
        args=copied[0],
        kwargs=copied[1],
        nodes=tuple(copies[n] for n in call.nodes),
        results=tuple(copies.get(n, n) for n in call.results),
        sequence=call.sequence,
        inputs=frozenset(copies[n] for n in call.inputs),
    )
