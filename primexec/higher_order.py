"""Control flow as opaque nodes: torch.cond, while_loop, scan, associative_scan and map."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from primexec.program import TensorSpec

if TYPE_CHECKING:
    from primexec.tracer import Tracer


@dataclass(frozen=True, slots=True)
class Form:
    """Where a higher-order operator keeps its parts among its positional arguments.

    Attributes:
        bodies: positions of the functions.
        operands: what a body is called with, from the operator's arguments.
        extra: position of the tuple to which the tensors that a body closes over are appended.
        result: the operator on fake tensors.
    """

    bodies: tuple[int, ...]
    operands: Callable[[Sequence[Any]], list[Any]]
    extra: int
    result: Callable[[Any, list[Any]], Any] = lambda op, args: op(*args)


def _slices(xs: Sequence[Tensor]) -> list[Tensor]:
    return [x.select(0, 0) for x in xs]


FORMS: dict[str, Form] = {
    "cond": Form((1, 2), lambda a: [*a[3]], 3),
    # What the loop carries keeps its shape; torch's own rule for fake tensors needs symbolic shapes.
    "while_loop": Form((0, 1), lambda a: [*a[2], *a[3]], 3, lambda op, a: tuple(a[1](*a[2], *a[3]))),
    "scan": Form((0,), lambda a: [*a[1], *_slices(a[2]), *a[3]], 3),
    "associative_scan": Form((0,), lambda a: [*_slices(a[1]), *_slices(a[1]), *a[2]], 2),
    "map_impl": Form((0,), lambda a: [*_slices(a[1]), *a[2]], 2),
}


def record(tracer: Tracer, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Trace the bodies into graphs of their own, and add one node for the operator."""
    form = FORMS.get(op.name())
    if form is None:
        raise tracer.fail(
            f"the higher-order operator {op.name()} cannot be captured", "keep it outside the traced function"
        )
    new = [tuple(tracer._stand_ins(tuple(a))) if isinstance(a, (list, tuple)) else a for a in args]
    new = [tracer._stand_ins(a) if isinstance(a, Tensor) else a for a in new]
    bodies = [_Body(tracer, args[i], form.operands(new)) for i in form.bodies]
    outside = list({id(t): t for body in bodies for t in body.scope.lifted}.values())
    tracer.entrances.before_control_flow(outside)
    new[form.extra] = (*new[form.extra], *outside)
    node_args = [tracer._nodes(a) if isinstance(a, (tuple, Tensor)) else a for a in new]
    for i, body in zip(form.bodies, bodies, strict=True):
        new[i] = module = body.finish(outside)
        name = f"{op.name()}_{i}_{len(tracer.submodules._modules)}"
        tracer.submodules.add_module(name, module)
        node_args[i] = tracer.graph.get_attr(name)
    out = form.result(op, new)
    return tracer.add_node(op, tuple(node_args), kwargs, out)


def lift_from_outside(tracer: Tracer, t: Any) -> fx.Node:
    """A placeholder of the current body for a tensor that belongs to the graph around it."""
    inner, tracer.scope = tracer.scope, tracer.scope.parent  # type: ignore[assignment]
    try:
        tracer.node_of(t)
    finally:
        tracer.scope = inner
    node = add_placeholder(inner.graph, f"outside_{len(inner.lifted)}")
    inner.nodes[id(t)] = node
    inner.lifted.append(t)
    inner.alive.append(t)
    node.meta["spec"] = TensorSpec.of(t)
    return node


def add_placeholder(graph: fx.Graph, name: str) -> fx.Node:
    """A placeholder behind the last one of the graph."""
    last = graph._root
    for node in graph.nodes:
        if node.op != "placeholder":
            break
        last = node
    with graph.inserting_after(last):
        node = graph.placeholder(name)
    node.target = node.name  # names are made unique, targets are not
    return node


class _Body:
    """A branch or loop body, traced on stand-ins for its operands."""

    def __init__(self, tracer: Tracer, fn: Callable[..., Any], operands: list[Any]) -> None:
        self.scope = tracer.inner_scope()
        operands = [_stand_in(t) for t in operands]
        for i, t in enumerate(operands):
            if isinstance(t, Tensor):
                self.scope.bind(t, add_placeholder(self.scope.graph, f"operand_{i}"))
        outer, tracer.scope = tracer.scope, self.scope
        try:
            with tracer.recording():
                tracer.reads.start()
                try:
                    out = fn(*operands)
                finally:
                    sys.settrace(None)  # as in `Tracer.run`
                    tracer.reads.stop()
            outputs = out if isinstance(out, (tuple, list)) else (out,)
            results = [tracer._nodes(tracer._stand_ins(t)) for t in outputs]
        finally:
            tracer.scope = outer
        self.results = results if isinstance(out, (tuple, list)) else results[0]

    def finish(self, outside: list[Tensor]) -> fx.GraphModule:
        """The body as a module that takes its operands and then every tensor from outside."""
        graph = self.scope.graph
        placeholders = {id(t): self.scope.nodes[id(t)] for t in self.scope.lifted}
        body_order = [n for n in graph.nodes if n.op == "placeholder" and n.name.startswith("operand_")]
        for t in outside:
            body_order.append(placeholders.get(id(t)) or add_placeholder(graph, "unused"))
        anchor = graph._root
        for node in body_order:
            anchor.append(node)
            anchor = node
        graph.output(tuple(self.results) if isinstance(self.results, list) else self.results)
        return fx.GraphModule(torch.nn.Module(), graph)


def _stand_in(t: Any) -> Any:
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) if isinstance(t, Tensor) else t
