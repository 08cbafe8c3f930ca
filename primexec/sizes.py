"""Sizes that depend on the values of tensors, as nodes: read off a tensor that has them, or reckoned from such."""

from __future__ import annotations

import operator
from functools import partial, reduce
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from primexec import _torch, numbers
from primexec._torch import pytree
from primexec.decisions import decided_in

if TYPE_CHECKING:
    from primexec.tracer import Scope, Tracer

_OPERATIONS = {
    "Add": operator.add, "Mul": operator.mul, "FloorDiv": operator.floordiv, "CleanDiv": operator.floordiv,
    "Mod": operator.mod, "PythonMod": operator.mod, "Pow": operator.pow, "IntTrueDiv": operator.truediv,
}  # fmt: skip
_PLAIN = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
_QUESTIONS = {
    "Equality": "eq", "Unequality": "ne", "LessThan": "le", "StrictLessThan": "lt", "GreaterThan": "ge",
    "StrictGreaterThan": "gt",
}  # fmt: skip


_LIBRARY = torch.library.Library("primexec", "FRAGMENT")
_LIBRARY.define("rows(Tensor count) -> Tensor")
_LIBRARY.impl("rows", lambda count: torch.empty(int(count), 0), "CompositeExplicitAutograd")
torch.library.register_fake(
    "primexec::rows", lambda count: torch.empty(torch.library.get_ctx().new_dynamic_size(), 0), lib=_LIBRARY
)
_SIZED = (torch.empty, torch.ones, torch.rand, torch.randn, torch.zeros)
_FORMULAS = frozenset(  # calls whose formulas compare ints in C++
    {torch.pow, Tensor.pow, Tensor.pow_, Tensor.__pow__, Tensor.__ipow__, Tensor.__rpow__, Tensor.repeat}
)


def read(tracer: Tracer, t: Tensor) -> Any:
    """The size that a tensor of one integer is to a function that makes tensors; None where it is none."""
    if tracer.calling not in _SIZED or t.is_floating_point() or t.is_complex():
        return None
    with tracer.recording():
        return torch.ops.primexec.rows(t).shape[0]


def given(
    tracer: Tracer, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments of an operator in which the numbers that it takes for sizes are known, or left unknown if they vary."""
    if tracer.scope.parent is None and decided_in(tracer.source()) in tracer.reads.varying:
        formals = {f.name: f.real_type.str() for f in op._schema.arguments}
        leave = partial(_left_unknown, tracer)
        args = (*map(leave, formals.values(), args), *args[len(formals) :])
        kwargs = {k: leave(formals.get(k, ""), v) for k, v in kwargs.items()}
    return numbers.sizes_decided(op, args, kwargs)


def _left_unknown(tracer: Tracer, formal: str, value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_left_unknown(tracer, formal, v) for v in value)
    symbol = numbers.symbol_of(value)
    if symbol is None or "SymInt" not in formal:
        return value
    if symbol.made.size is None:
        if not symbol.decide("ge", symbol, 0):
            return value
        with tracer.recording():
            symbol.made.size = torch.ops.primexec.rows(numbers.as_tensor(tracer, symbol)).shape[0]
    return symbol.made.size


def decide_ones(op: Any, args: tuple[Any, ...]) -> None:
    """Let it be known which unknown sizes are 1, where dimensions vanish or are repeated that are."""
    name = op._schema.name.partition("::")[2].rstrip("_")
    tensors = [a for a in args if isinstance(a, Tensor)]
    if name == "squeeze":
        dims = [args[1]] if len(args) > 1 and isinstance(args[1], int) else list(*args[1:]) or range(args[0].dim())
        for size in [args[0].shape[d] for d in dims]:
            bool(size == 1)
    elif torch.Tag.pointwise in op.tags or name == "expand":
        shapes = [t.shape for t in tensors] + ([args[1]] if name == "expand" else [])
        for sizes in zip_longest(*map(reversed, shapes), fillvalue=1):
            met = [size for size in sizes if type(size) is torch.SymInt or size not in (1, -1)]
            if (
                any(type(size) is torch.SymInt for size in met)
                and len({_torch.expression(s) if isinstance(s, torch.SymInt) else s for s in met}) > 1
            ):
                _ask_whether_ones(met)


def _ask_whether_ones(sizes: list[Any]) -> None:
    try:
        for size in () if all(bool(size == sizes[0]) for size in sizes[1:]) else sizes:
            bool(size == 1)
    except Exception as error:  # then they are taken for equal ones
        if not _torch.asks_unknown_size(error):
            raise


def decided_for_formulas(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Arguments of a call in which ints are known that the formula of its gradient compares."""
    if (
        fn not in _FORMULAS
        or not torch.is_grad_enabled()
        or not any(isinstance(a, Tensor) and a.requires_grad for a in args)
    ):
        return args, kwargs
    known: tuple[Any, Any] = pytree.tree_map_only(torch.SymInt, int, (args, kwargs))
    return known


def answer(tracer: Tracer, expression: Any) -> Any:
    """The value or truth of an expression of sizes, with which the function goes on; None where that is refused."""
    question = _QUESTIONS.get(type(expression).__name__, "index" if expression.is_integer else None)
    if question is None or tracer.running is not None or tracer.scope.parent is not None:
        return None
    parts = [_node(tracer, part) for part in ((expression,) if question == "index" else expression.args)]
    return None if None in parts else tracer.deciding.ask(question, *parts)


def decided(tracer: Tracer, op: Any, arguments: Any) -> Any:
    """The arguments of an operator with the sizes they have now; None where these are known, or that is refused."""
    leaves, tree = pytree.tree_flatten(arguments)
    if tracer.running is not None or op._schema.is_mutable or not any(map(_is_unknown, leaves)):
        return None
    try:
        return pytree.tree_unflatten([_decided(tracer, v) for v in leaves], tree)
    except Exception as error:
        if _torch.asks_unknown_size(error):
            return None
        raise


def _is_unknown(value: Any) -> bool:
    unknown = value.shape if isinstance(value, Tensor) else [value]
    return any(isinstance(v, torch.SymInt) and numbers.symbol_of(v) is None for v in unknown)


def _decided(tracer: Tracer, value: Any) -> Any:
    if not _is_unknown(value):
        return value
    if not isinstance(value, Tensor):
        return int(value)
    layout = [[int(v) for v in part] for part in (value.shape, value.stride(), [value.storage_offset()])]
    with _torch.modes_off(), tracer.fake_mode:
        return value.as_strided(layout[0], layout[1], *layout[2])


def node_of(tracer: Tracer, size: Any) -> Any:
    """The node of a size in the current graph, or the number that it is, or goes on as; None where that is refused."""
    node = _node(tracer, _torch.expression(size))
    if node is not None or tracer.source() is None:
        return node
    try:
        return _PLAIN[type(size)](size)
    except Exception as error:
        if _torch.asks_unknown_size(error):
            return None
        raise


def _node(tracer: Tracer, expression: Any) -> Any:
    if expression.is_Integer:
        return int(expression)
    place = _place(tracer, expression)
    if place is not None:
        tensor, dim = place
        return _emit(tracer, torch.ops.aten.sym_size.int, (tracer.node_of(tensor), dim), tensor.shape[dim])
    kind = type(expression).__name__
    operation = getattr(operator, _QUESTIONS[kind]) if kind in _QUESTIONS else _OPERATIONS.get(kind)
    if operation is None:
        return None
    parts = [_node(tracer, part) for part in expression.args]
    if None in parts:
        return None
    return reduce(lambda a, b: _emit(tracer, operation, (a, b), operation(_value(a), _value(b))), parts)


def _value(part: Any) -> Any:
    return part.meta["val"] if isinstance(part, fx.Node) else part


def _place(tracer: Tracer, expression: Any) -> tuple[Tensor, int] | None:
    """A tensor, of the current graph if possible, and the dimension of it that has this size."""
    scope: Scope | None = tracer.scope
    while scope is not None:
        for t in scope.alive or [n.meta.get("val") for n in scope.graph.nodes]:  # where backward is recorded later
            if isinstance(t, Tensor):
                for dim, size in enumerate(t.shape):
                    if type(size) is not int and _torch.expression(size) == expression:
                        return t, dim
        scope = scope.parent
    return None


def _emit(tracer: Tracer, op: Any, args: tuple[Any, ...], size: Any) -> Any:
    node = tracer.graph.call_function(op, args)
    node.meta["val"] = size
    tracer.describe(node)
    return node
