"""Keeps chains of convolutions in channels-last memory inside of a program, where that saves more than it costs.

On CPUs convolutions work on channels-last memory; they bring other memory there and back at each call. A chain is
made of convolutions and of operators that give their result the layout of their operand. It is entered and left
through copies, so that what shows outside, and what other operators are given, is laid out as eager lays it out.
"""

from __future__ import annotations

import operator
from collections.abc import Set
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch, effects
from primexec.passes.emission import emit, infer
from primexec.program import MADE_WHILE_TRACING, ApiCall, Program

_CONVOLUTION = torch.ops.aten.convolution.default
_CLONE = torch.ops.aten.clone.default
_VIEW, _PERMUTE = torch.ops.aten.view.default, torch.ops.aten.permute.default
_MM, _ADDMM = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
_FORMATS = (torch.contiguous_format, torch.channels_last)
# Beside pointwise operators: what lays its result out as its operand is laid out.
_FOLLOW = frozenset(
    {
        "aten.native_batch_norm.default",
        "aten.constant_pad_nd.default",
        "aten.max_pool2d_with_indices.default",
        "aten.avg_pool2d.default",
        "aten._adaptive_avg_pool2d.default",
        "aten.mean.dim",
        "aten.cat.default",
        "aten.hardswish.default",
        "aten.upsample_nearest2d.default",
        "aten.upsample_nearest2d.vec",
        "aten.upsample_bilinear2d.default",
        "aten.upsample_bilinear2d.vec",
    }
)
# What lays its result out in one way, unless that is an image, too.
_ABSORB = frozenset({"aten.native_layer_norm.default", "aten.mean.dim"})
# Views that can be taken of memory in any layout.
_VIEWS = frozenset({"aten.permute.default", "aten.transpose.int", "aten.alias.default", "aten.detach.default"})


@dataclass(frozen=True, slots=True)
class ChannelsLast:
    """Lays chains of convolutions out channels-last in programs without autograd on CPUs.

    A depthwise convolution saves that its input and its result are reordered; a kernel of one point gains and costs
    nothing; others cost that their weight is reordered at each call, and stay outside where it is larger than their
    input and result. Each copy at a border costs its bytes. A chain is laid out so where it saves more than it costs.

    Attributes:
        frozen: inputs whose values do not change: weights that are packed once, which is saved at each call.
    """

    frozen: frozenset[str] | None = None

    def __call__(self, program: Program) -> Program:
        if program.extras or program.backward is not None or any(i.kind in _OF_BACKWARD for i in program.inputs):
            return program
        packed: Set[str] = frozenset()
        if self.frozen is not None:
            packed = self.frozen.union(i.name for i in program.inputs if i.label == MADE_WHILE_TRACING)
        graph = program.graph_module.graph
        flow = _Flow.of(graph, _convolutions(graph, packed), packed)
        if not flow.convolutions:
            return program
        chains = flow.chains()
        chosen = [c for c in chains if c.saved > c.cost]
        left = [c for c in chains if c.saved <= c.cost]
        notes = (*program.notes, *(c.note("") for c in chosen), *_left(left))
        program = replace(program, notes=notes)
        if not chosen:
            return program
        kept = {n for c in chosen for n in c.convolutions}
        return _Rewrite(program, _Flow.of(graph, kept, packed)).run()


_OF_BACKWARD = frozenset({"saved", "tangent"})


@dataclass
class _Chain:
    """Convolutions that hang together, and bytes that are not reordered or are copied if they are channels-last."""

    convolutions: list[fx.Node] = field(default_factory=list)
    saved: int = 0
    cost: int = 0

    def note(self, said: str) -> str:
        count = len(self.convolutions)
        return (
            f"channels-last{said}: {count} convolution{'s' * (count > 1)}, "
            f"{self.saved:,} bytes of reorders saved, {self.cost:,} bytes copied at borders and of weights"
        )


def _left(chains: list[_Chain]) -> list[str]:
    if not chains:
        return []
    convolutions = [n for c in chains for n in c.convolutions]
    together = _Chain(convolutions, sum(c.saved for c in chains), sum(c.cost for c in chains))
    return [together.note(" would not gain")]


# What may be laid out anew --------------------------------------------------------------------------------


def _convolutions(graph: fx.Graph, packed: Set[str]) -> set[fx.Node]:
    written = effects.written_memory(graph)
    return {n for n in graph.nodes if n.target is _CONVOLUTION and _fits(n, written, packed)}


def _fits(node: fx.Node, written: set[int | None], packed: Set[str]) -> bool:
    x, weight = (effects.argument(node, k) for k in ("input", "weight"))
    if effects.argument(node, "transposed") or x is weight:
        return False
    if not written.isdisjoint(map(effects.storage_of, (x, node))):
        return False
    if not all(_is_plain(n.meta["val"]) for n in (x, weight, node)):
        return False
    _, channels, height, width = x.meta["val"].shape
    return channels > 1 < height * width and _weight_cost(node, packed) < _bytes(x) + _bytes(node)


def _is_plain(t: Tensor) -> bool:
    """Whether a tensor is a contiguous image."""
    known = all(type(n) is int for n in t.shape) and t.dim() == 4 and t.numel() > 0
    if not known or t.dtype is not torch.float32 or t.device.type != "cpu" or t.layout is not torch.strided:
        return False
    return t.stride() == _strides(t, torch.contiguous_format) and not t.is_neg()


def _strides(t: Tensor, form: torch.memory_format) -> tuple[int, ...]:
    _, c, h, w = t.shape
    return (c * h * w, h * w, w, 1) if form is torch.contiguous_format else (c * h * w, 1, w * c, c)


def _format(t: Any) -> torch.memory_format | None:
    """The format that gives a copy of the tensor its strides; None where there is none."""
    if not isinstance(t, Tensor) or t.dim() != 4:
        return None
    return next((f for f in _FORMATS if t.stride() == _strides(t, f)), None)


def _bytes(node: fx.Node) -> int:
    t: Tensor = node.meta["val"]
    return t.numel() * t.element_size()


def _weight_cost(node: fx.Node, packed: Set[str]) -> int:
    """Bytes of a weight that is not channels-last already, as those of one point or of one channel are, or packed."""
    weight = effects.argument(node, "weight")
    return (
        0
        if weight.name in packed or weight.meta["val"].is_contiguous(memory_format=torch.channels_last)
        else _bytes(weight)
    )


def _saving(node: fx.Node, packed: Set[str]) -> int:
    """Bytes that need not be reordered: the images of a depthwise convolution, a packed weight."""
    x, weight = (effects.argument(node, k) for k in ("input", "weight"))
    depthwise: bool = weight.meta["val"].shape[1] == 1 < effects.argument(node, "groups")
    return (_bytes(x) + _bytes(node)) * depthwise + _bytes(weight) * (weight.name in packed)


def _follows(node: fx.Node, written: set[int | None]) -> bool:
    """Whether an operator takes operands in another layout, and what its result would be copied back to is known."""
    name = str(node.target)
    value = node.meta.get("val")
    if name in _VIEWS:
        return effects.storage_of(node) not in written
    pointwise = torch.Tag.pointwise in getattr(node.target, "tags", ()) and node.target is not _CLONE
    if not (pointwise or name in _FOLLOW) or effects.has_effect(node) or effects.storage_of(node) in written:
        return False
    first, *others = _tensors(value)
    return _format(first) is not None and all(t.dim() < 4 or _format(t) is not None for t in others)


def _absorbs(node: fx.Node) -> bool:
    """Whether the result is laid out in one way whatever the operand's layout."""
    if node.target is _CLONE:
        return node.kwargs.get("memory_format") is torch.contiguous_format
    return str(node.target) in _ABSORB


# Chains ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Flow:
    """How far channels-last memory goes from convolutions.

    Attributes:
        laid: the nodes whose results are laid out anew: the convolutions, and what follows them.
        given: the nodes that take such results as they are.
        packed: the names of weights that are packed.
    """

    convolutions: dict[fx.Node, None]
    laid: set[fx.Node]
    given: set[fx.Node]
    packed: Set[str]

    @classmethod
    def of(cls, graph: fx.Graph, convolutions: set[fx.Node], packed: Set[str]) -> _Flow:
        written = effects.written_memory(graph)
        laid: set[fx.Node] = set()
        given: set[fx.Node] = set()
        for node in graph.nodes:
            if node in convolutions:
                laid.add(node)
                given.add(node)
            elif node.op == "call_function" and not laid.isdisjoint(node.all_input_nodes):
                part = node.target is operator.getitem
                if _follows(node, written) or (part and _format(node.meta["val"])):
                    laid.add(node)
                if node in laid or part or _absorbs(node):
                    given.add(node)
        return cls(dict.fromkeys(n for n in graph.nodes if n in convolutions), laid, given, packed)

    def leaves(self, node: fx.Node) -> bool:
        """Whether a result that is laid out anew is needed as it was."""
        return any(u not in self.given or (u.target is _CONVOLUTION and node is not u.args[0]) for u in node.users)

    def chains(self) -> list[_Chain]:
        """What hangs together through results that are laid out anew, in the order of its first convolution."""
        leader = {n: n for n in self.laid}

        def find(n: fx.Node) -> fx.Node:
            while leader[n] is not n:
                n = leader[n]
            return n

        for node in self.laid:
            for source in node.all_input_nodes:
                if source in self.laid:
                    leader[find(node)] = find(source)
        chains: dict[fx.Node, _Chain] = {}
        entered: set[fx.Node] = set()
        for node in self.convolutions:
            chain = chains.setdefault(find(node), _Chain())
            chain.convolutions.append(node)
            chain.saved += _saving(node, self.packed)
            chain.cost += _weight_cost(node, self.packed)
            x = effects.argument(node, "input")
            if x not in self.laid and x not in entered:
                entered.add(x)
                chain.cost += _bytes(x)
        for node in self.laid:
            if isinstance(node.meta["val"], Tensor) and self.leaves(node):
                chains[find(node)].cost += _bytes(node)
        return list(chains.values())


# The rewriting --------------------------------------------------------------------------------------------


class _Rewrite:
    """Copies a program node by node; copies tensors where they enter or leave channels-last memory."""

    def __init__(self, program: Program, flow: _Flow) -> None:
        self.program, self.flow = program, flow
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.entered: dict[fx.Node, fx.Node] = {}
        self.left: dict[fx.Node, fx.Node] = {}
        self.products: set[fx.Node] = set()

    def run(self) -> Program:
        for node in self.program.graph_module.graph.nodes:
            if node in self.flow.convolutions and self._is_product(node):
                self.copies[node] = self._product(node)
                self.products.add(node)
                continue
            copy = self.copies[node] = self.graph.node_copy(node, partial(self._operand, node))
            if node in self.flow.given or self._shares(node):
                infer(copy)
        module = _torch.graph_module(self.program.graph_module, self.graph)
        calls = (c.renamed(self._renamed(c)) for c in self.program.calls if self._is_whole(c))
        count = len(self.products)
        notes = [f"channels-last: matrix products in place of {count} convolution{'s' * (count > 1)}"] * (count > 0)
        return replace(self.program, graph_module=module, calls=tuple(calls), notes=(*self.program.notes, *notes))

    def _operand(self, user: fx.Node, node: fx.Node) -> fx.Node:
        """What the copy of a node takes."""
        if user in self.flow.convolutions:
            return self._enter(node) if node is user.args[0] else self._leave(node)
        return self.copies[node] if user in self.flow.given else self._leave(node)

    def _enter(self, node: fx.Node) -> fx.Node:
        if node in self.flow.laid:
            return self.copies[node]
        if node not in self.entered:
            self.entered[node] = self._clone(node, self.copies[node], torch.channels_last)
        return self.entered[node]

    def _leave(self, node: fx.Node) -> fx.Node:
        """The value laid out as it was: a copy, or a view of one."""
        if node not in self.flow.laid:
            return self.copies[node]
        if node not in self.left:
            if str(node.target) in _VIEWS:
                source: Any = node.args[0]
                self.left[node] = emit(self.graph, node, node.target, self._leave(source), *node.args[1:])
            else:
                form = _format(node.meta["val"])
                assert form is not None
                self.left[node] = self._clone(node, self.copies[node], form)
        return self.left[node]

    def _is_product(self, node: fx.Node) -> bool:
        """Whether a convolution multiplies each point's channels by its weight."""
        names = ("input", "weight", "stride", "padding", "groups")
        x, weight, stride, padding, groups = (effects.argument(node, k) for k in names)
        points = weight.meta["val"].shape[2:] == (1, 1) and {*stride} == {1} and {*padding} == {0} and groups == 1
        return points and _rows(self._enter(x).meta["val"]).is_contiguous()

    def _product(self, node: fx.Node) -> fx.Node:
        """Such a convolution as a matrix product, which is called faster, and computed faster where oneDNN gains."""
        x, weight, bias = (effects.argument(node, k) for k in ("input", "weight", "bias"))
        inner, (count, columns, height, width) = x.meta["val"].shape[1], node.meta["val"].shape
        make = partial(emit, self.graph, node)
        rows = make(_VIEW, make(_PERMUTE, self._enter(x), [0, 2, 3, 1]), [count * height * width, inner])
        matrix = make(_PERMUTE, make(_VIEW, self._leave(weight), [columns, inner]), [1, 0])
        added = [] if bias is None else [self._leave(bias)]
        made = make(_ADDMM if added else _MM, *added, rows, matrix)
        return make(_PERMUTE, make(_VIEW, made, [count, height, width, columns]), [0, 3, 1, 2])

    def _clone(self, origin: fx.Node, node: fx.Node, form: torch.memory_format) -> fx.Node:
        return emit(self.graph, origin, torch.ops.aten.clone.default, node, memory_format=form)

    def _shares(self, node: fx.Node) -> bool:
        """Whether a result shares memory with an operand that is a copy now."""
        if node.op != "call_function":
            return False
        moved = [n for n in node.all_input_nodes if not _same(self._leave(n).meta.get("val"), n.meta.get("val"))]
        memory = {_torch.storage_key(t) for n in moved for t in _tensors(n.meta.get("val"))}
        return not memory.isdisjoint(_torch.storage_key(t) for t in _tensors(node.meta.get("val")))

    # A call of the API is replayed where it is one operator: with other layouts, it may choose others inside.

    def _is_whole(self, call: ApiCall) -> bool:
        if not self.products.isdisjoint(call.nodes):
            return False
        if all(self.flow.laid.isdisjoint((n, *n.all_input_nodes)) for n in call.nodes):
            return True
        return sum(n.target is not operator.getitem for n in call.nodes) == 1

    def _renamed(self, call: ApiCall) -> dict[fx.Node, fx.Node]:
        """The copies of a call's nodes, and of what they take, as they take it."""
        taken: dict[fx.Node, fx.Node] = {}
        for node in call.nodes:
            taken.update(zip(node.all_input_nodes, self.copies[node].all_input_nodes, strict=True))
        return self.copies | taken | {n: self.copies[n] for n in call.nodes}


def _rows(t: Tensor) -> Tensor:
    return t.permute(0, 2, 3, 1)


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in _torch.pytree.tree_leaves(value) if isinstance(t, Tensor)]


def _same(a: Any, b: Any) -> bool:
    return all(s is t for s, t in zip(_tensors(a), _tensors(b), strict=True))
