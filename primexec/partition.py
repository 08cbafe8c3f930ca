"""Which executor runs which node, and why: claims, and the regions they form."""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch, effects, refusals
from primexec.decisions import decide
from primexec.errors import ExecutorError
from primexec.executors.base import YES, Executor, Region, Support, no
from primexec.lowering.expand import Expansion, expand, inline, why_not
from primexec.placement import Group, is_free, place
from primexec.prims import is_prim, lookup
from primexec.program import Program, base_name, op_name
from primexec.value_checks import CHECK

CHEAP_PRIMS = 2  # so many pointwise prims alone in a region gain nothing over ATen's own kernel


@dataclass(frozen=True, slots=True)
class Claim:
    """The executor that runs a node, and what the executors before it in the user's order said.

    Attributes:
        refusals: (executor, reason), in the user's order.
        expansion: the prims that the executor runs in place of the node; None where it runs the node itself.
    """

    executor: str
    refusals: tuple[tuple[str, str], ...]
    expansion: Expansion | None = None


@dataclass(frozen=True, eq=False)
class Plan:
    """The regions of a program in the order in which they run.

    Attributes:
        nodes: for each region the nodes of the program that run there; views that it makes again do not count.
        inputs: for each region the nodes of the program that it takes.
        outputs: for each region the nodes of the program that it returns.
    """

    program: Program
    claims: dict[fx.Node, Claim]
    regions: tuple[Region, ...]
    nodes: tuple[tuple[fx.Node, ...], ...]
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
        declined = Counter(
            (executor, op_name(node.target), reason)
            for node, claim in self.claims.items()
            for executor, reason in claim.refusals
        )
        for (executor, name, reason), count in sorted(declined.items()):
            lines.append(f"  {executor} declined {count} x {name}: {reason}")
        return "\n".join(lines)


def partition(program: Program, executors: Sequence[Executor], *, allowed: Set[str] | None, inference: bool) -> Plan:
    """Ask the executors in order, and put the nodes of each into few regions.

    Raises:
        ExecutorError: where a node is left to an executor that is not among the allowed ones.
    """
    pinned = _pinned(program, inference)
    judged: dict[tuple[str, Expansion], Support] = {}
    claims = {node: _claim(node, executors, pinned, judged, gainful=allowed is None) for node in program.nodes}
    if allowed is not None:
        _check_strict({n: c for n, c in claims.items() if not _only_places(n, pinned)}, allowed)
    groups = _groups(program, claims, pinned, gainful=allowed is None)
    placeholders = tuple(n for n in program.graph_module.graph.nodes if n.op == "placeholder")
    returned = tuple(program.graph_module.graph.output_node().args[0])  # type: ignore[arg-type]
    tensors_only = all(isinstance(n.meta.get("val"), Tensor) for n in placeholders)  # `aten` takes generators, too
    if not groups or (len(groups) == 1 and (tensors_only or groups[0].executor == "aten")):
        name = groups[0].executor if groups else executors[-1].name
        if any(claim.expansion is not None for claim in claims.values()):
            region = _region(program, 0, groups[0], claims, inference, placeholders, returned)
        else:
            region = Region("region0", name, program.graph_module, program.calls, inference)
        return Plan(program, claims, (region,), (tuple(program.nodes),), (placeholders,), (returned,))
    inputs = [_taken(group) for group in groups]
    wanted = {n for taken in inputs for n in taken} | set(returned)
    outputs = [tuple(n for n in group.own if n in wanted) for group in groups]
    regions = tuple(
        _region(program, i, group, claims, inference, inputs[i], outputs[i]) for i, group in enumerate(groups)
    )
    return Plan(program, claims, regions, tuple(tuple(g.own) for g in groups), tuple(inputs), tuple(outputs))


def _groups(
    program: Program, claims: dict[fx.Node, Claim], pinned: dict[fx.Node, str], *, gainful: bool
) -> list[Group]:
    """The nodes of each region; where `gainful`, what gains nothing alone is left to `aten`, also in the claims."""
    written = effects.written_memory(program.graph_module.graph)

    def movable(node: fx.Node) -> bool:
        again = is_free(node) and node not in pinned
        return again and (bool(node.all_input_nodes) or effects.storage_of(node) not in written)

    def placed() -> list[Group]:
        return place(
            program.graph_module.graph,
            {n: c.executor for n, c in claims.items()},
            movable,
        )

    groups = placed()
    if not gainful or len(groups) < 2:
        return groups
    idle = {n: g.executor for g in groups if g.executor != "aten" and gains_nothing(g.own, claims) for n in g.own}
    for node, executor in idle.items():
        claims[node] = Claim(
            "aten", (*claims[node].refusals, (executor, "alone between other regions it gains nothing"))
        )
    return placed() if idle else groups


SMALL_PRODUCT = 1 << 22  # multiplications


def gains_nothing(nodes: Iterable[fx.Node], claims: dict[fx.Node, Claim]) -> bool:
    """Whether the nodes of a region are one cheap operator, which ATen runs as fast, and small products of matrices.

    On these another executor gains less than a node of autograd costs.
    """
    working = [n for n in nodes if not is_free(n)]
    if sum(not _is_small_product(n) for n in working) > 1:
        return False
    expansions = [claims[n].expansion for n in working]
    prims = [p for e, n in zip(expansions, working, strict=True) for p in (e.prims if e else (n,))]
    costs = [
        row.recompute if (row := lookup(p.target)) else "dear"
        for p in prims
        if _is_work(p) and not _is_small_product(p)
    ]
    return "dear" not in costs and costs.count("cheap") <= CHEAP_PRIMS


def _is_small_product(node: fx.Node) -> bool:
    if base_name(node) not in ("mm", "bmm"):
        return False
    arguments: Any = node.args
    a, b = (n.meta["val"] for n in arguments)
    return bool(a.numel() * b.shape[-1] < SMALL_PRODUCT)


def _is_work(prim: fx.Node) -> bool:
    """Whether code of another executor may gain over ATen: it adds up rows or columns of a whole tensor as fast."""
    if base_name(prim) != "sum":
        return bool(prim.all_input_nodes)
    t: Tensor = prim.args[0].meta["val"]  # type: ignore[union-attr]
    given: Any = prim.args[1] if len(prim.args) > 1 else None
    dims = sorted(range(t.dim()) if given is None else (d % max(t.dim(), 1) for d in given))
    at_edge = dims in (list(range(len(dims))), list(range(t.dim() - len(dims), t.dim())))
    return not (at_edge and t.is_floating_point() and t.is_contiguous())


def _taken(group: Group) -> tuple[fx.Node, ...]:
    """What the nodes take from outside of their region."""
    inside = set(group.nodes)
    used = (a for n in group.nodes for a in n.all_input_nodes if a not in inside and a.op != "get_attr")
    return tuple(dict.fromkeys(used))


def _claim(
    node: fx.Node,
    executors: Sequence[Executor],
    pinned: dict[fx.Node, str],
    judged: dict[tuple[str, Expansion], Support],
    *,
    gainful: bool,
) -> Claim:
    if node.target is operator.getitem:
        node = node.args[0]  # type: ignore[assignment]
    declined: list[tuple[str, str]] = []
    for executor in executors[:-1]:
        reason = pinned.get(node) if executor.name != "aten" else None
        if not reason and gainful and (leaves := getattr(executor, "leaves", None)) is not None:
            reason = leaves(node)
        if not reason:
            support = _ask(executor, node)
            expansion = None
            reason = support.reason
            if not support and executor.name != "aten" and not is_prim(node.target):
                expansion = expand(node)
            if expansion is not None:
                if (executor.name, expansion) not in judged:  # equal layers share their expansions
                    judged[executor.name, expansion] = _ask_prims(executor, expansion)
                support = judged[executor.name, expansion]
                reason = f"{reason}; in its expansion, {support.reason}"
            if support:  # only then are PyTorch's kernels asked: some trust that their operands fit together
                reason = refusals.why(node) if executor.name != "aten" else ""
                if not reason:
                    return Claim(executor.name, tuple(declined), expansion)
            elif expansion is None and executor.name != "aten" and not is_prim(node.target):
                reason = why_not(node) or reason
        declined.append((executor.name, reason))
    return Claim(executors[-1].name, tuple(declined))


def _ask_prims(executor: Executor, expansion: Expansion) -> Support:
    """Yes if the executor takes every prim of an expansion; else which one it declined, and why."""
    for prim in expansion.prims:
        support = _ask(executor, prim)
        if not support:
            return no(f"{op_name(prim.target)}: {support.reason}")
    return YES


def _ask(executor: Executor, node: fx.Node) -> Support:
    try:
        support = executor.supports(node)
    except Exception as error:
        raise ExecutorError(
            f"the executor {executor.name!r} failed to judge {op_name(node.target)}: {error}"
        ) from error
    if not isinstance(support, Support):
        raise ExecutorError(
            f"the executor {executor.name!r} answered {support!r} for {op_name(node.target)}, not YES or no(reason)"
        )
    return support


def _pinned(program: Program, inference: bool) -> dict[fx.Node, str]:
    """Nodes that only `aten` may run, with the reason: what they do shows outside of their own result."""
    nodes = program.nodes
    written = effects.written_memory(program.graph_module.graph)
    returned = set(program.outputs)
    pinned: dict[fx.Node, str] = {}
    for node in nodes:
        results = effects.results_of(node)
        if isinstance(node.meta.get("val"), _torch.SYMBOLS):
            pinned[node] = "it computes a number"
        elif effects.has_effect(node) and not _only_raises(node):
            pinned[node] = "it has effects"
        elif node.meta.get("inference", inference) != inference:
            pinned[node] = "it runs in another inference mode"
        elif any(effects.aliases_input(r) and effects.storage_of(r) in written for r in results):
            pinned[node] = "it aliases memory that is changed in place"
        elif any(effects.aliases_input(r) and r in returned for r in results):
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


def _only_raises(node: fx.Node) -> bool:
    row = lookup(node.target)
    return row is not None and row.effects == "raises"


def _only_places(node: fx.Node, pinned: dict[fx.Node, str]) -> bool:
    """Whether a pinned node computes no number: a returned view, a size, a value check, a copy to a result's place."""
    node = node.args[0] if node.target is operator.getitem else node  # type: ignore[assignment]
    reason = pinned.get(node)
    return reason in ("it returns an alias", "it computes a size") or (
        reason is not None and node.target in (torch.ops.aten.copy_.default, CHECK, decide)
    )


def _check_strict(claims: dict[fx.Node, Claim], allowed: Set[str]) -> None:
    for node, claim in claims.items():
        if claim.executor not in allowed:
            said = "; ".join(f"{name}: {reason}" for name, reason in claim.refusals)
            raise ExecutorError(
                f"strict: {op_name(node.target)} would fall back to {claim.executor} ({said})\n"
                f"  {node.meta.get('source')}"
            )


def _region(
    program: Program,
    index: int,
    group: Group,
    claims: dict[fx.Node, Claim],
    inference: bool,
    inputs: tuple[fx.Node, ...],
    outputs: tuple[fx.Node, ...],
) -> Region:
    """The nodes as a graph of their own, with expansions in place of those that were claimed so."""
    graph = fx.Graph()
    nodes, executor = group.nodes, group.executor
    copies: dict[fx.Node, fx.Node] = {}
    parts: dict[fx.Node, tuple[fx.Node | None, ...]] = {}  # results of operators with several ones
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    constants = dict.fromkeys(n for node in nodes for n in node.all_input_nodes if n.op == "get_attr")
    for node in (*constants, *nodes):
        expansion = claims[node].expansion if node in claims and executor != "aten" else None
        if node.target is operator.getitem and node.args[0] in parts:
            copies[node] = parts[node.args[0]][node.args[1]]  # type: ignore[assignment,index]
        elif expansion is not None:
            results = inline(expansion, node, graph, [copies[n] for n in node.all_input_nodes])
            if isinstance(node.meta.get("val"), (tuple, list)):
                parts[node] = results
            else:
                copies[node] = results[0]  # type: ignore[assignment]
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[n] for n in outputs))
    module = _torch.graph_module(program.graph_module, graph)
    whole = {n for n in nodes if executor == "aten" or claims[n].expansion is None}
    calls = tuple(c.renamed(copies) for c in program.calls if whole.issuperset(c.nodes))
    return Region(f"region{index}", executor, module, calls, inference)
