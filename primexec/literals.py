"""Tensors that a function makes of Python values, such as `torch.tensor([1, 2])`: constants of its program."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from primexec import _torch, arrays, effects, numbers
from primexec._torch import pytree
from primexec.errors import CaptureError, SourceLine

if TYPE_CHECKING:
    from primexec.tracer import Tracer


@cache
def makers() -> frozenset[Any]:
    """The operators that hand a new tensor of Python values to whoever watches."""
    return frozenset({torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default})


def assembled(fn: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """What `torch.tensor([1, x.sum()])` is, a list in which tensors stand for numbers; None for any other call."""
    place = _assemblers().get(fn)
    data = None if place is None or len(args) <= place else args[place]
    if type(data) is arrays.Array:
        like = {"dtype": args[0].dtype, "device": args[0].device} if place else {}
        grad = kwargs.pop("requires_grad", False)
        return data.tensor.to(copy=True, **{**like, **kwargs}).requires_grad_(grad)
    leaves, tree = pytree.tree_flatten(data) if type(data) in (list, tuple) or numbers.symbol_of(data) else ([], None)
    leaves = [v.as_tensor() if type(v) is arrays.Array else v for v in leaves]
    unknown = [v for v in leaves if isinstance(v, Tensor) or numbers.symbol_of(v)]
    if not unknown or kwargs.get("requires_grad") or any(isinstance(v, Tensor) and v.dim() for v in unknown):
        return None
    with _torch.modes_off():
        like = {"dtype": args[0].dtype, "device": args[0].device} if place else {}
        model = torch.tensor(pytree.tree_unflatten([_zero(v) for v in leaves], tree), **{**like, **kwargs})
    parts = [_as_stored(v, model) for v in leaves]
    return torch.stack(parts).reshape(model.shape)


@cache
def _assemblers() -> dict[Any, int]:
    """The functions that make tensors of lists, and where the list is among their arguments."""
    return {torch.tensor: 0, torch.as_tensor: 0, Tensor.new_tensor: 1}


def spelled_out(fn: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """Arguments with tensors in place of lists of which C++ would make tensors, unseen."""
    if fn is not torch.ctc_loss:
        return args
    return tuple(torch.tensor(a) if type(a) in (list, tuple) else a for a in args)


def _zero(value: Any) -> Any:
    if isinstance(value, Tensor):
        return torch.zeros((), dtype=value.dtype)
    symbol = numbers.symbol_of(value)
    return value if symbol is None else symbol.kind()


def _as_stored(value: Any, model: Tensor) -> Tensor:
    """A number as eager stores it, by way of Python's."""
    if not isinstance(value, Tensor):
        return torch.scalar_tensor(value, dtype=model.dtype, device=model.device)
    stored = value.detach()
    if model.is_floating_point() and value.dtype != model.dtype:
        stored = stored.double()
    return stored.to(device=model.device, dtype=model.dtype)


class Literals:
    """The constants of a tracer.

    One that lies in the memory of somebody else, as of `torch.from_numpy(array)`, has the values of the moment; nobody
    may write to that memory while the function runs, nor get hold of it through a result.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer
        self._borrowed: list[tuple[Tensor, Tensor, fx.Node]] = []  # (tensor, its values when it was made, node)

    def record(self, op: Any, real: Tensor) -> Any:
        """Add a constant, and a node that copies it at every call."""
        with _torch.modes_off():
            owns = real.untyped_storage().resizable()
            value = real.detach() if owns else real.detach().clone()
            placeholder = self._tracer.constant(value)
        if self._tracer.scope.parent is not None:
            placeholder = self._tracer.node_of(placeholder.meta["val"])
        out = op(real)  # a fake tensor that remembers its value
        out = self._tracer.add_node(torch.ops.aten.lift_fresh_copy.default, (placeholder,), {}, out)
        if not owns:
            self._borrowed.append((real, value, self._tracer.node_of(out)))
        return out

    def check(self, results: Iterable[fx.Node]) -> None:
        """Raise where borrowed memory was written to, or is part of a result."""
        shared = {effects.storage_of(node): node for *_, node in self._borrowed}
        written = [w for n in self._tracer.graph.nodes if n.op == "call_function" for w in effects.writes(n)]
        for what, nodes in (("writes to", written), ("returns", results)):
            for node in nodes:
                if (made := shared.get(effects.storage_of(node))) is not None:
                    raise _refusal(f"the function {what} a tensor in the memory of a NumPy array", made.meta["source"])
        lent = {effects.storage_of(n) for n in self._tracer.graph.find_nodes(op="placeholder") if "array" in n.meta}
        if self._borrowed and not lent.isdisjoint(map(effects.storage_of, written)):
            source = self._borrowed[0][2].meta["source"]
            raise _refusal(
                "the function writes to a NumPy array, and makes a tensor of one that is no argument", source
            )
        for real, value, node in self._borrowed:
            if not torch.equal(_bits(real), _bits(value)):
                raise _refusal("a NumPy array is changed after a tensor was made of it", node.meta["source"])


def _bits(t: Tensor) -> Tensor:
    return t.reshape(-1).contiguous().view(torch.uint8)


def _refusal(reason: str, source: SourceLine | None) -> CaptureError:
    return CaptureError(reason, hint="make the tensor with torch.tensor(array), which copies", source=source)
