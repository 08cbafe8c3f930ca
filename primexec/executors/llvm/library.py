"""Matrix products through oneDNN, where that was measured to be faster than ATen's own, between kernels of one region.

Products of 16-bit numbers go to oneDNN either way where it has code for them; elsewhere they are kernels.

The gradient of a weight is the product of a transposed matrix, which oneDNN and MKL both read slowly: a kernel
transposes it first (256 x 256 x 1024 in two threads: MKL 1137 µs, oneDNN 830, and 677 of rows).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from primexec import effects
from primexec.executors.base import Region, RegionFunction
from primexec.executors.llvm.launch import Operand
from primexec.executors.llvm.measured import Shape, dtypes, fastest, linear
from primexec.executors.llvm.own import with_copies
from primexec.executors.llvm.products import is_large, widened_from
from primexec.placement import Group, is_free, place, with_what_is_made_again

PART_BYTES = 1 << 18  # of inputs that are needed no more, for which a region is cut
PARTS = 32  # into about as many at most

_ADDMM, _MM = torch.ops.aten.addmm.default, torch.ops.aten.mm.default


def takes(node: fx.Node) -> bool:
    """Whether the node is a product that oneDNN computes faster."""
    if node.target not in (_ADDMM, _MM) or node.kwargs or len(node.args) != (3 if node.target is _ADDMM else 2):
        return False
    operands = [n.meta.get("val") if isinstance(n, fx.Node) else None for n in node.args]
    if not all(_fit(t) for t in operands) or len({t.dtype for t in operands}) > 1:  # type: ignore[union-attr]
        return False
    if any(map(widened_from, node.args)):  # the product of the 16-bit numbers is the faster one, or a kernel
        return False
    bias, _, weight = [None, *operands][-3:]
    if bias is not None and (tuple(bias.shape) != (weight.shape[1],) or bias.stride() != (1,)):  # type: ignore[union-attr]
        return False
    shape = _shape(node)
    if not shape.fits_library or (shape.is_turned and node.target is not _MM):
        return False
    return fastest(shape) == "oneDNN"


def _shape(node: fx.Node) -> Shape:
    arguments: Any = node.args
    return Shape.of(*(n.meta["val"] for n in arguments[-2:]))


def has_products(graph: fx.Graph) -> bool:
    """Whether a region holds a product that oneDNN computes faster."""
    return any(map(takes, graph.nodes))


def _fit(t: Any) -> bool:
    return (
        isinstance(t, Tensor)
        and t.dtype in dtypes()
        and t.device.type == "cpu"
        and t.layout is torch.strided
        and all(type(n) is int for n in (*t.shape, *t.stride()))
        and not t.is_neg()
    )


# A region with products --------------------------------------------------------------------------------------


# From the graph of a part, the positions of inputs that it may write over, and of results that live on.
CompileKernels = Callable[[fx.Graph, frozenset[int], frozenset[int]], RegionFunction]


@dataclass(frozen=True)
class _Step:
    """Products, or nodes that run as kernels: a graph of their own."""

    group: Group
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]

    @property
    def is_product(self) -> bool:
        return self.group.executor == "product"

    def graph(self) -> fx.Graph:
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        for node in self.inputs:
            copies[node] = graph.placeholder(node.name)
            copies[node].meta = dict(node.meta)
        for node in self.group.nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        graph.output(tuple(copies[n] for n in self.outputs))
        return graph


def _by_rows(graph: fx.Graph) -> tuple[fx.Graph, set[fx.Node]]:
    """A copy of a region where its products read rows: what was transposed is copied before. And these products."""
    chosen = {n for n in graph.nodes if takes(n)}
    made, copies = with_copies(
        graph,
        lambda n: n in chosen and _shape(n).is_turned,
        lambda n: n.args[0].meta["val"].contiguous(),  # type: ignore[union-attr]
    )
    return made, {copies[n] for n in chosen}


def empties(region: Region) -> bool:
    """Whether a region can free its inputs while it runs: it has products between which it can be cut."""
    graph = region.graph_module.graph
    if has_products(graph):
        return True
    given = sum(effects.nbytes(n) for n in _freed(region, graph))
    return given >= 2 * PART_BYTES and sum(map(is_large, graph.nodes)) > 1


def _freed(region: Region, graph: fx.Graph) -> frozenset[fx.Node]:
    """The inputs that are freed, in the region's graph or a copy of it."""
    inputs = graph.find_nodes(op="placeholder")
    return frozenset(inputs[i] for i in region.freed)


def _cut(group: Group, given: Set[fx.Node]) -> list[Group]:
    """Parts of a group of kernels: one ends before a product, if inputs of many bytes are needed no more by then."""
    last = {a: n for n in group.nodes for a in n.all_input_nodes}
    dead: dict[fx.Node, int] = {}
    for a in given & last.keys():
        dead[last[a]] = dead.get(last[a], 0) + effects.nbytes(a)
    least = max(PART_BYTES, sum(dead.values()) // PARTS)
    parts, freed = [Group(group.executor)], 0
    own, loose = set(group.own), set(group.nodes) - set(group.own)
    for node in group.nodes:
        if is_large(node) and freed >= least:
            parts.append(Group(group.executor))
            freed = 0
        freed += dead.get(node, 0)
        if node in own:
            parts[-1].own.append(node)
    for part in parts:
        found = with_what_is_made_again(part.own, loose)
        part.nodes = [n for n in group.nodes if n in found]
    return [part for part in parts if part.own]


def _split(graph: fx.Graph, products: set[fx.Node], freed: Set[fx.Node] = frozenset()) -> list[_Step]:
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    returned: tuple[fx.Node, ...] = tuple(graph.output_node().args[0])  # type: ignore[arg-type]
    products = products | {n for n in returned if _base(n) in products}
    homes = {n: "product" if n in products else "kernels" for n in nodes}
    fed: set[fx.Node] = set()  # what products read, through views
    for node in reversed(nodes):
        if any(u in products or (u in fed and (_is_plain_view(u) or is_free(u))) for u in node.users):
            fed.add(node)
    groups = place(graph, homes, lambda n: _is_plain_view(n) or (n not in fed and is_free(n)), anywhere="product")
    if freed:
        groups = [part for g in groups for part in (_cut(g, freed) if g.executor == "kernels" else [g])]
    taken = [_inputs(group) for group in groups]
    wanted = set(returned).union(*taken)
    return [
        _Step(group, inputs, tuple(n for n in group.own if n in wanted))
        for group, inputs in zip(groups, taken, strict=True)
    ]


def kernel_graphs(graph: fx.Graph, donated: Set[int]) -> list[tuple[fx.Graph, frozenset[int]]]:
    """The parts of a region that run as kernels, in order, and the positions of inputs that each may write over.

    The region itself where it holds no product.

    Args:
        donated: positions of the region's inputs that it may write over.
    """
    if not has_products(graph):
        return [(graph, frozenset(donated))]
    graph, products = _by_rows(graph)
    steps = _split(graph, products)
    free = _free(graph, steps, donated)
    return [(s.graph(), _given(s, free)) for s in steps if not s.is_product]


def _free(graph: fx.Graph, steps: Sequence[_Step], donated: Set[int]) -> dict[fx.Node, _Step]:
    """What nobody needs after a step, and that step: products, and inputs that are donated, in memory of their own."""
    returned: Any = graph.output_node().args[0]
    placeholders = [n for n in graph.nodes if n.op == "placeholder"]
    made = {n for s in steps if s.is_product for n in s.group.own if takes(n)} | {placeholders[i] for i in donated}
    views: dict[fx.Node, list[fx.Node]] = {}
    for n in graph.nodes:
        views.setdefault(_base(n), []).append(n)
    last = {n: s for s in steps for n in s.inputs}
    kept = {_base(n) for n in returned}
    free = {}
    for base in made - kept:
        users = {id(last[n]): last[n] for n in views[base] if n in last}
        if len(users) == 1:
            free[base] = next(iter(users.values()))
    return free


def _given(step: _Step, free: Mapping[fx.Node, _Step]) -> frozenset[int]:
    return frozenset(i for i, n in enumerate(step.inputs) if free.get(n) is step)


def joined(region: Region, compile_kernels: CompileKernels) -> RegionFunction:
    """A function that runs the products of a region, and its other nodes compiled as kernels, in few steps."""
    graph, products = _by_rows(region.graph_module.graph)
    returned: tuple[fx.Node, ...] = tuple(graph.output_node().args[0])  # type: ignore[arg-type]
    scope: dict[str, Any] = {"linear": linear()}
    steps: list[tuple[str, tuple[fx.Node, ...], tuple[fx.Node, ...]]] = []
    parts = _split(graph, products, _freed(region, graph))
    free = _free(graph, parts, region.donated)
    ends = set(returned)
    kept = {_base(n) for i, n in enumerate(returned) if region.kept is None or i in region.kept}
    for i, step in enumerate(parts):
        if step.is_product:
            steps += [_product(node, scope) for node in step.group.own]
            continue
        seen = frozenset(i for i, n in enumerate(step.outputs) if n in kept)
        scope[f"kernels{i}"] = compile_kernels(step.graph(), _given(step, free), seen)
        steps.append((f"[{_names(step.outputs)}] = kernels{i}({_names(step.inputs)})", step.inputs, step.outputs))
    last = {n: i for i, (_, used, made) in enumerate(steps) for n in (*used, *made)}
    inputs = _names([n for n in graph.nodes if n.op == "placeholder"])
    lines = ["def run(args):", f"  [{inputs}] = args; args.clear()"] if region.boxed else [f"def run({inputs}):"]
    for i, (text, used, made) in enumerate(steps):
        dead = [n for n in dict.fromkeys((*used, *made)) if last[n] == i and n not in ends]
        lines += [f"  {text}"] + [f"  del {_names(dead)}"] * bool(dead)
    lines.append(f"  return [{_names(returned)}]")
    exec(compile("\n".join(lines), "<primexec region>", "exec"), scope)
    return scope.pop("run")  # type: ignore[no-any-return]


def _names(nodes: Sequence[fx.Node]) -> str:
    return ", ".join(n.name for n in nodes)


# Views that start where their argument starts: whoever reads them needs their sizes and strides only.
_PLAIN_VIEWS = frozenset(
    {
        "aten.view.default",
        "prims.transpose.default",
        "prims.broadcast_in_dim.default",
        "prims.squeeze.default",
        "prims.view_of.default",
    }
)


def _is_plain_view(node: fx.Node) -> bool:
    return str(node.target) in _PLAIN_VIEWS


def _base(node: fx.Node) -> fx.Node:
    """The tensor that plain views, which a product makes of it itself, look at."""
    while node.op == "call_function" and _is_plain_view(node):
        node = node.args[0]  # type: ignore[assignment]
    return node


def _product(node: fx.Node, scope: dict[str, Any]) -> tuple[str, tuple[fx.Node, ...], tuple[fx.Node, ...]]:
    """The line of a product, or of a view of one, the tensors that they use and the one that they make."""
    if _is_plain_view(node):
        base, value = _base(node), node.meta["val"]
        return f"{node.name} = {base.name}.as_strided({tuple(value.shape)}, {value.stride()})", (base,), (node,)
    *bias, x, weight = node.args
    arguments: list[str] = []
    bases: list[fx.Node] = []
    for operand, transpose in ((x, False), (weight, True), *((b, False) for b in bias)):
        base, value = _base(operand), operand.meta["val"]  # type: ignore[arg-type,union-attr]
        size, strides = tuple(value.shape), value.stride()
        if transpose:
            size, strides = size[::-1], strides[::-1]
        like = base.meta["val"]
        fitted = f"fitted_{base.name}"
        scope[fitted] = _fitting(Operand(tuple(like.shape), like.stride(), like.dtype), len(bases))
        text = f"{fitted}({base.name})"
        if (size, strides) != (tuple(like.shape), like.stride()):
            text += f".as_strided({size}, {strides})"
        arguments.append(text)
        bases.append(base)
    arguments += ["None"] * (not bias)
    line = f"{node.name} = linear({', '.join(arguments)}, 'none', [], '')"
    return line, tuple(dict.fromkeys(bases)), (node,)


def _fitting(operand: Operand, place: int) -> Callable[[Tensor], Tensor]:
    strides = operand.strides

    def fitted(t: Tensor) -> Tensor:
        return t if t.stride() == strides else operand.fitted(t, place)

    return fitted


def _inputs(group: Group) -> tuple[fx.Node, ...]:
    if group.executor == "product":
        return tuple(dict.fromkeys(_base(n) for node in group.own for n in node.all_input_nodes if n not in group.own))
    inside = set(group.nodes)
    return tuple(dict.fromkeys(a for n in group.nodes for a in n.all_input_nodes if a not in inside))
