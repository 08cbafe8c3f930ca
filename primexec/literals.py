"""Tensors that a function makes of Python values, such as `torch.tensor([1, 2])`: constants of its program."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from primexec import _torch, effects
from primexec.errors import CaptureError, SourceLine

if TYPE_CHECKING:
    from primexec.tracer import Tracer


@cache
def makers() -> frozenset[Any]:
    """The operators that hand a new tensor of Python values to whoever watches."""
    return frozenset({torch.ops.aten.lift_fresh.default, torch.ops.aten.lift_fresh_copy.default})


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
        out = op(real)  # a fake tensor that remembers its value
        out = self._tracer.add_node(
            torch.ops.aten.lift_fresh_copy.default, (self._tracer._in_scope(placeholder),), {}, out
        )
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
        for real, value, node in self._borrowed:
            if not torch.equal(_bits(real), _bits(value)):
                raise _refusal("a NumPy array is changed after a tensor was made of it", node.meta["source"])


def _bits(t: Tensor) -> Tensor:
    return t.reshape(-1).contiguous().view(torch.uint8)


def _refusal(reason: str, source: SourceLine | None) -> CaptureError:
    return CaptureError(reason, hint="make the tensor with torch.tensor(array), which copies", source=source)
