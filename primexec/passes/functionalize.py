"""Takes writing in place out of a program, where nobody outside can see the memory.

Executors other than `aten` take operators without effects only. Memory that the program makes itself, and that no
other result shares, is followed from write to write: an operator in place becomes its functional form, a write
through a view is carried to the view's base by the view's inverse, and views read later are taken anew.
Writes to inputs stay as they are, in their order.
"""

from __future__ import annotations

import functools
import itertools
import operator
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from primexec import _torch, effects, numbers
from primexec.passes.emission import copied, emit, result
from primexec.program import Program, base_name

_RENAMED = {
    "aten.normal_.default": "aten.normal_functional.default",
    "aten.bernoulli_.float": "aten.bernoulli.p",
    **{f"aten.__i{s}__.{n}": f"aten.__{s}__.{n}" for s in ("lshift", "rshift") for n in ("Scalar", "Tensor")},
}
# Operators that write to several arguments: the form that returns their new values last, and how many come before.
_SEVERAL = {
    "aten.native_batch_norm.default": ("aten._native_batch_norm_legit_functional.default", 3),
    "aten._native_batch_norm_legit.default": ("aten._native_batch_norm_legit_functional.default", 3),
    "aten._batch_norm_with_update.default": ("aten._batch_norm_with_update_functional.default", 4),
}
_RESHAPED = frozenset(["view", "_unsafe_view", "reshape", "unsqueeze", "squeeze", "alias", "detach", "lift_fresh"])
_SPLITS = frozenset(["split", "split_with_sizes", "unsafe_split", "unsafe_split_with_sizes"])
_Emit = Callable[..., fx.Node]


@dataclass(frozen=True, slots=True)
class Functionalize:
    """Functional forms for operators that write to memory made inside of the program and seen by one result only.

    Attributes:
        copy_back: writes to other memory, and to complex numbers, which PyTorch alone has kernels for, become
            functional, too: the former with an `aten.copy_` of the result.
    """

    copy_back: bool = False

    def __call__(self, program: Program) -> Program:
        program = _parts_as_slices(_views_out_of_place(program))
        bases = _bases(program, complex_too=self.copy_back)
        back = {n for n in program.nodes if self.copy_back and _can_copy_back(n)}
        return _Rewrite(program, bases, back).run() if bases or back else program


def _draws_in_order(node: fx.Node) -> bool:
    """Whether random draws, if any, fall in the order of the elements: in place they fall in that of memory."""
    return not effects.is_random(node) or all(w.meta["val"].is_contiguous() for w in effects.writes(node))


def _can_copy_back(node: fx.Node) -> bool:
    if str(node.target) in _SEVERAL:
        return len(effects.writes(node)) == 2
    is_copy = node.target is torch.ops.aten.copy_.default
    fits = len(effects.writes(node)) == 1 and functional(node.target) is not None and _draws_in_order(node)
    return fits and not node.users and not is_copy and _may_be_written(node)


def _may_be_written(node: fx.Node) -> bool:
    """Whether PyTorch's kernel casts its result to what it writes to: no float to an int, which copies convert."""
    written = node.args[0].meta["val"].dtype  # type: ignore[union-attr]
    others = [n.meta["val"] for n in node.all_input_nodes if isinstance(n.meta.get("val"), torch.Tensor)]
    real = not any(isinstance(a, complex) for a in (*node.args, *node.kwargs.values()))
    if written.is_floating_point and real and all(t.dtype == written for t in others):
        return True
    out = result(functional(node.target), [*node.args, *_defaults(node, len(node.args))], node.kwargs)
    return torch.can_cast(out.dtype, written)


def _views_out_of_place(program: Program) -> Program:
    """`squeeze` for `squeeze_`, where the tensor is the program's own: what changed shape is known by a new name."""
    changed = [n for n in program.nodes if effects.view_form(n.target) and n.args[0].op == "call_function"]  # type: ignore[union-attr]
    if not changed:
        return program
    graph, copies = copied(program.graph_module.graph)
    for node in changed:
        copies[node].target = effects.view_form(node.target)  # type: ignore[assignment]
    touched = {*changed, *(n.args[0] for n in changed)}
    kept = (c for c in program.calls if touched.isdisjoint((*c.nodes, *c.inputs, *c.results)))
    module = _torch.graph_module(program.graph_module, graph)
    return replace(program, graph_module=module, calls=tuple(c.renamed(copies) for c in kept))


def _parts_as_slices(program: Program) -> Program:
    """`unsafe_split` and its like as slices, each a view by itself: so PyTorch's recurrent cells change their gates."""
    graph = program.graph_module.graph
    written = {effects.storage_of(w) for n in program.nodes for w in effects.writes(n)}
    written -= {effects.storage_of(n) for n in graph.find_nodes(op="placeholder")}
    returned = set(program.outputs)
    splits = {n for n in program.nodes if base_name(n) in _SPLITS and returned.isdisjoint(n.users)}
    splits = {n for n in splits if effects.storage_of(n.all_input_nodes[0]) in written}
    if not splits:
        return program
    made = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for node in graph.nodes:
        if node in splits:
            copies[node] = list(_slices(made, node, copies[node.args[0]]))
        elif node.target is operator.getitem and node.args[0] in splits:
            copies[node] = copies[node.args[0]][node.args[1]]
        else:
            copies[node] = made.node_copy(node, copies.__getitem__)
    touched = splits.union(*(n.users for n in splits))
    calls = tuple(c.renamed(copies) for c in program.calls if touched.isdisjoint((*c.nodes, *c.inputs, *c.results)))
    return replace(program, graph_module=_torch.graph_module(program.graph_module, made), calls=calls)


def _slices(graph: fx.Graph, node: fx.Node, source: fx.Node) -> Iterator[fx.Node]:
    dim: Any = node.args[2] if len(node.args) > 2 else node.kwargs.get("dim", 0)
    ends = itertools.accumulate((part.shape[dim] for part in node.meta["val"]), initial=0)
    for start, end in itertools.pairwise(ends):
        yield emit(graph, node, torch.ops.aten.slice.Tensor, source, dim, start, end)


# Which memory ------------------------------------------------------------------------------------------


def _bases(program: Program, *, complex_too: bool) -> dict[int, fx.Node]:
    """Storage → the node that made it, for memory that can be followed."""
    graph = program.graph_module.graph
    targets = [w for n in program.nodes for w in effects.writes(n) if complex_too or not effects.is_complex(w)]
    written = {s for w in targets if (s := effects.storage_of(w)) is not None}
    if not written:
        return {}
    for n in graph.find_nodes(op="placeholder"):
        written.discard(effects.storage_of(n))
    returned: Any = graph.output_node().args[0]
    outputs = [effects.storage_of(n) for n in returned]
    written = {s for s in written if outputs.count(s) <= 1}
    bases: dict[int, fx.Node] = {}
    for node in program.nodes:
        storage = effects.storage_of(node)
        if storage in written:
            if storage not in bases:
                bases[storage] = node
            elif not _is_plain_view(node):
                written.discard(storage)
        for w in effects.writes(node):
            s = effects.storage_of(w)
            if s in written and not _can_carry(node, w, bases[s]):
                written.discard(s)
    return {s: base for s, base in bases.items() if s in written and not effects.aliases_input(base)}


def _is_plain_view(node: fx.Node) -> bool:
    viewed = [n for n in node.all_input_nodes if effects.storage_of(n) == effects.storage_of(node)]
    placed = any(numbers.symbol_of(n.meta.get("val")) for n in node.all_input_nodes)  # where a number says
    return node.target is not operator.getitem and len(viewed) == 1 and node.args[0] is viewed[0] and not placed


def _can_carry(node: fx.Node, written: fx.Node, base: fx.Node) -> bool:
    if len(effects.writes(node)) != 1 or functional(node.target) is None or node.users or not _draws_in_order(node):
        return False
    if not _may_be_written(node):
        return False
    while written is not base:
        name, viewed = base_name(written), written.args[0]
        if name not in _INVERSES or (name == "as_strided" and viewed is not base):
            return False
        if name in _RESHAPED and any(type(n) is not int for n in viewed.meta["val"].shape):  # type: ignore[union-attr]
            return False
        written = viewed  # type: ignore[assignment]
    return True


def functional(op: Any) -> Any | None:
    """The operator that returns the tensor which `op` writes; None where there is none."""
    if not isinstance(op, _torch.OpOverload) or torch.Tag.inplace_view in op.tags:
        return None
    name, overload = op._schema.name.partition("::")[2], op._overloadname
    if str(op) in _RENAMED:
        return _torch.operator(_RENAMED[str(op)])
    if op.namespace != "aten" or not name.endswith("_") or name.endswith("__"):
        return None
    packet = getattr(torch.ops.aten, name.removesuffix("_"), None)
    if packet is None:
        return None
    wanted = _formals(op)
    others = sorted(
        packet.overloads(), key=lambda o: o != overload
    )  # pow_.Scalar writes what pow.Tensor_Scalar returns
    found = (getattr(packet, o) for o in others)
    return next((f for f in found if _formals(f) == wanted and _returns_a_tensor(f._schema)), None)


def _returns_a_tensor(schema: Any) -> bool:
    """Whether an operator makes one new tensor, not a list as those on several parameters do."""
    return not schema.is_mutable and [str(r.type) for r in schema.returns] == ["Tensor"]


def _defaults(node: fx.Node, given: int) -> list[Any]:
    """Positional arguments that the node leaves to its schema: the functional operator may have no default."""
    rest: list[Any] = node.target._schema.arguments[given:]  # type: ignore[union-attr]
    return [a.default_value for a in rest if not a.kwarg_only and a.name not in node.kwargs]


def _formals(op: Any) -> list[tuple[str, str, str]]:
    return [(a.name, str(a.type), repr(a.default_value)) for a in op._schema.arguments]


# Views backwards ----------------------------------------------------------------------------------------


def _reshape(emit: _Emit, base: fx.Node, part: fx.Node, view: fx.Node) -> fx.Node:
    return emit(torch.ops.aten.reshape.default, part, list(base.meta["val"].shape))


def _transpose(emit: _Emit, base: fx.Node, part: fx.Node, view: fx.Node) -> fx.Node:
    return emit(view.target, part, *view.args[1:])


def _permute(emit: _Emit, base: fx.Node, part: fx.Node, view: fx.Node) -> fx.Node:
    dims = [d % len(view.args[1]) for d in view.args[1]]  # type: ignore[arg-type,operator,union-attr]
    return emit(view.target, part, sorted(range(len(dims)), key=dims.__getitem__))


def _scatter(name: str) -> Callable[[_Emit, fx.Node, fx.Node, fx.Node], fx.Node]:
    def carry(emit: _Emit, base: fx.Node, part: fx.Node, view: fx.Node) -> fx.Node:
        return emit(_torch.operator(name), base, part, *view.args[1:], **view.kwargs)

    return carry


_INVERSES: dict[str, Callable[[_Emit, fx.Node, fx.Node, fx.Node], fx.Node]] = {
    **dict.fromkeys(_RESHAPED, _reshape),
    "t": _transpose,
    "transpose": _transpose,
    "permute": _permute,
    "slice": _scatter("aten.slice_scatter.default"),
    "select": _scatter("aten.select_scatter.default"),
    "diagonal": _scatter("aten.diagonal_scatter.default"),
    "as_strided": _scatter("aten.as_strided_scatter.default"),
}


# The rewriting ------------------------------------------------------------------------------------------


class _Rewrite:
    """Copies a program node by node, with the present value of each followed storage."""

    def __init__(self, program: Program, bases: dict[int, fx.Node], back: set[fx.Node]) -> None:
        self.program = program
        self.back = back
        self.bases = bases
        self.graph = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.versions: dict[int, int] = dict.fromkeys(bases, 0)
        self.taken: dict[fx.Node, int] = {}  # view of a followed storage → the version it was taken from

    def run(self) -> Program:
        changed: set[fx.Node] = set()
        for node in self.program.graph_module.graph.nodes:
            followed = [w for w in effects.writes(node) if effects.storage_of(w) in self.bases]
            if followed:
                self._write(node, followed[0])
                changed.add(node)
            elif node in self.back:
                self._write_back(node)
                changed.add(node)
            else:
                storage: Any = effects.storage_of(node)
                if storage in self.bases:
                    changed.add(node)
                    self.taken[node] = self.versions[storage]
                if self.versions.get(storage):
                    self.copies[node] = self._take(node)
                else:
                    self.copies[node] = self.graph.node_copy(node, self._value)
        module = _torch.graph_module(self.program.graph_module, self.graph)
        kept = (c for c in self.program.calls if changed.isdisjoint((*c.nodes, *c.inputs)))
        return replace(self.program, graph_module=module, calls=tuple(c.renamed(self.copies) for c in kept))

    def _value(self, node: fx.Node) -> fx.Node:
        """The copy of a node, a view taken anew if its memory has been written since."""
        storage: Any = effects.storage_of(node)
        if storage in self.bases and node is not self.bases[storage] and self.taken[node] != self.versions[storage]:
            self.copies[node] = self._take(node)
            self.taken[node] = self.versions[storage]
        return self.copies[node]

    def _take(self, node: fx.Node) -> fx.Node:
        """The view again, of memory that may be laid out in another way by now."""
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
        op = torch.ops.aten.reshape.default if node.target is torch.ops.aten.view.default else node.target
        return self._emit(node, op, *args, **kwargs)

    def _write(self, node: fx.Node, written: fx.Node) -> None:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
        first: Any = args[0]
        if effects.is_random(node) and not first.meta["val"].is_contiguous():  # as the memory that eager writes to is
            clone = self._emit(node, torch.ops.aten.clone.default, first, memory_format=torch.contiguous_format)
            args = (clone, *args[1:])
        value = self._emit(node, functional(node.target), *args, *_defaults(node, len(args)), **kwargs)
        dtype = written.meta["val"].dtype
        if value.meta["val"].dtype != dtype:
            value = self._emit(node, torch.ops.aten._to_copy.default, value, dtype=dtype)
        part = written
        storage = effects.storage_of(written)
        assert storage is not None
        base = self.bases[storage]
        while part is not base:
            view, part = part, part.args[0]  # type: ignore[assignment]
            inverse = _INVERSES[base_name(view)]
            value = inverse(functools.partial(self._emit_inverse, node), self._value(part), value, view)
        self.copies[base] = value
        self.versions[storage] += 1

    def _write_back(self, node: fx.Node) -> None:
        args, kwargs = fx.node.map_arg((node.args, node.kwargs), self._value)
        if str(node.target) in _SEVERAL:
            name, own = _SEVERAL[str(node.target)]
            value = self.copies[node] = self._emit(node, _torch.operator(name), *args, **kwargs)
            news = [self._part(value, own + i) for i in range(len(effects.writes(node)))]
        else:
            news = [self._emit(node, functional(node.target), *args, *_defaults(node, len(args)), **kwargs)]
        for written, new in zip(effects.writes(node), news, strict=True):
            copy = self.graph.call_function(torch.ops.aten.copy_.default, (self._value(written), new))
            copy.meta = dict(new.meta)

    def _emit_inverse(self, origin: fx.Node, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """What the inverse of a view is made of is copied already, but for sizes among the view's own arguments."""
        args, kwargs = fx.node.map_arg((args, kwargs), lambda n: self.copies.get(n, n))
        return self._emit(origin, op, *args, **kwargs)

    def _part(self, node: fx.Node, index: int) -> fx.Node:
        part = self.graph.call_function(operator.getitem, (node, index))
        part.meta = dict(node.meta, val=node.meta["val"][index], spec=node.meta["spec"][index])
        return part

    def _emit(self, origin: fx.Node, op: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return emit(self.graph, origin, op, *args, **kwargs)
