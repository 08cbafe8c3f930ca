"""What may be computed once where weights are promised not to change: norms inside of convolutions, packed weights.

The values are those of the capture. The names of the inputs that went into constants stand in `Program.frozen`: they
are compared at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch, effects
from primexec.higher_order import add_placeholder
from primexec.passes.emission import copied, infer
from primexec.program import MADE_WHILE_TRACING, Input, Program, TensorSpec

_CONVOLUTION = torch.ops.aten.convolution.default
_NORM = torch.ops.aten.native_batch_norm.default


@dataclass(frozen=True)
class FoldNorms:
    """Batch norms of inference that follow a convolution become its weight and bias.

    Attributes:
        values: what the program's frozen inputs hold, by name.
    """

    values: Mapping[str, Tensor]

    def __call__(self, program: Program) -> Program:
        program = _copied(program)
        graph, frozen = program.graph_module.graph, _Frozen(program, self.values)
        for norm in graph.find_nodes(op="call_function", target=_NORM):
            convolution = norm.args[0]
            parts = list(norm.users)
            if not _can_fold(convolution, norm, parts) or not frozen.knows(*_operands(convolution, norm)):
                continue
            made = _folded(convolution, norm, frozen)
            if not all(bool(t.isfinite().all()) for t in made):
                continue  # eager's infinities would arise elsewhere
            weight, bias = (frozen.constant(t, f"{convolution.name}_folded") for t in made)
            frozen.use(_operands(convolution, norm), (convolution, norm, *parts))
            convolution.args = (convolution.args[0], weight, bias, *convolution.args[3:])
            parts[0].replace_all_uses_with(convolution)
            for node in (*parts, norm):
                graph.erase_node(node)
        return frozen.program("{} batch norm{} folded into convolutions")


@dataclass(frozen=True)
class PackWeights:
    """Weights of convolutions in channels-last memory are brought once into the form that oneDNN works on.

    Attributes:
        values: what the program's frozen inputs hold, by name.
        runs: whether an executor that does not pack weights runs a convolution.
    """

    values: Mapping[str, Tensor]
    runs: Callable[[fx.Node], bool]

    def __call__(self, program: Program) -> Program:
        operators = _torch.packed_convolution()
        if operators is None:
            return program
        pack, run = operators
        program = _copied(program)
        frozen = _Frozen(program, self.values)
        for node in program.graph_module.graph.find_nodes(op="call_function", target=_CONVOLUTION):
            x, weight, bias, stride, padding, dilation, transposed, _, groups = node.args
            if transposed or not frozen.knows(weight) or not _is_channels_last(x) or not _is_channels_last(node):
                continue
            if self.runs(node):
                continue
            size = list(x.meta["val"].shape)
            with _torch.quiet_modes(), torch.no_grad():
                packed = pack(frozen.values[weight].detach().contiguous(), padding, stride, dilation, groups, size)
            name = frozen.constant(packed, f"{node.name}_packed", like=weight)
            frozen.use((weight,), (node,))
            node.target = run
            node.args = (x, name, bias, padding, stride, dilation, groups, "none", [], "")
            infer(node)
        return frozen.program("{} weight{} packed for oneDNN")


def _copied(program: Program) -> Program:
    """The program on a graph of its own."""
    graph, copies = copied(program.graph_module.graph)
    calls = tuple(c.renamed(copies) for c in program.calls)
    return replace(program, graph_module=_torch.graph_module(program.graph_module, graph), calls=calls)


class _Frozen:
    """A program whose inputs give way to constants."""

    def __init__(self, program: Program, values: Mapping[str, Tensor]) -> None:
        self._program, self._graph = program, program.graph_module.graph
        placeholders = dict(zip(program.inputs, self._graph.find_nodes(op="placeholder"), strict=True))
        constants = [(i, n) for i, n in placeholders.items() if i.kind == "constant"]
        held = zip(constants, program.constants, strict=True)
        made = {n: t for (i, n), t in held if i.label == MADE_WHILE_TRACING}
        written = effects.written_memory(self._graph)
        given = {n: values[i.name] for i, n in placeholders.items() if i.name in values}
        fits = {n: t for n, t in (made | given).items() if effects.storage_of(n) not in written}
        self.values = {n: t for n, t in fits.items() if t.dtype is torch.float32 and t.device.type == "cpu"}
        self._states = set(given)
        self._used: set[str] = set()
        self._touched: set[fx.Node] = set()
        self._made: dict[fx.Node, Tensor] = {}
        self._count = 0

    def knows(self, *nodes: Any) -> bool:
        return all(n is None or n in self.values for n in nodes)

    def constant(self, value: Tensor, name: str, like: fx.Node | None = None) -> fx.Node:
        """A new input that holds a value; where it is packed, its metadata is that of what it was made of."""
        node = add_placeholder(self._graph, name)
        mode = next(n.meta["val"] for n in self.values).fake_mode
        node.meta["val"] = fake = mode.from_tensor(value) if like is None else like.meta["val"]
        node.meta["spec"] = TensorSpec.of(fake)
        self._made[node] = value
        if like is None:
            self.values[node] = value
        return node

    def use(self, inputs: Iterable[Any], changed: Iterable[fx.Node]) -> None:
        """Inputs stand in a constant now, and nodes compute something else."""
        self._used.update(n.name for n in inputs if n in self._states)
        self._touched.update(changed)
        self._count += 1

    def program(self, note: str) -> Program:
        """The program with its constants."""
        if not self._count:
            return self._program
        p = self._program
        kept = [c for c in p.calls if self._touched.isdisjoint((*c.nodes, *c.inputs, *c.results))]
        return replace(
            p,
            calls=tuple(kept),
            inputs=(*p.inputs, *(Input(n.name, "constant", MADE_WHILE_TRACING) for n in self._made)),
            constants=(*p.constants, *self._made.values()),
            frozen=tuple(dict.fromkeys((*p.frozen, *sorted(self._used)))),
            notes=(*p.notes, "freeze: " + note.format(self._count, "s" * (self._count > 1))),
        )


def _operands(convolution: fx.Node, norm: fx.Node) -> tuple[Any, ...]:
    return (*convolution.args[1:3], *norm.args[1:5])


def _can_fold(convolution: Any, norm: fx.Node, parts: list[fx.Node]) -> bool:
    if convolution.target is not _CONVOLUTION or list(convolution.users) != [norm]:
        return False
    if norm.args[5] is not False or effects.argument(convolution, "transposed"):
        return False
    taken = [p.args[1] for p in parts]
    return taken == [0] and effects.same_layout(convolution, parts[0])


def _folded(convolution: fx.Node, norm: fx.Node, frozen: _Frozen) -> tuple[Tensor, Tensor]:
    """The weight and the bias of both, computed in float64."""
    with _torch.quiet_modes(), torch.no_grad():
        known: list[Any] = [n and frozen.values[n].detach().double() for n in _operands(convolution, norm)]
        weight, bias, gain, shift, mean, variance = known
        scale = (1 if gain is None else gain) / (variance + norm.args[7]).sqrt()
        moved = ((0 if bias is None else bias) - mean) * scale + (0 if shift is None else shift)
        return (weight * scale.reshape(-1, *[1] * (weight.dim() - 1))).float(), moved.float()


def _is_channels_last(node: Any) -> bool:
    t: Tensor = node.meta["val"]
    images: bool = t.dim() == 4 and t.dtype is torch.float32 and t.device.type == "cpu"
    return images and bool(t.is_contiguous(memory_format=torch.channels_last)) and not t.is_contiguous()
