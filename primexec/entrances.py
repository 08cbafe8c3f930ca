"""The ways by which real tensors reach autograd before an operator shows them to the tracer."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from primexec import _torch, _torch_autograd

if TYPE_CHECKING:
    from primexec.tracer import Tracer


class Entrances:
    """What a capture asks of its tracer at these ways.

    Had autograd met a parameter itself, and not its stand-in, the gradient of the parameter would be lost.
    """

    def __init__(self, tracer: Tracer) -> None:
        self._tracer = tracer

    def stand_in(self, value: Any) -> Any:
        """The fake tensor for a real one; any other value as it is."""
        known = not isinstance(value, Tensor) or _torch.is_fake(value) or _torch.is_functorch_wrapped(value)
        return value if known else self._tracer.lift(value)

    def before_backward(self, roots: Sequence[Tensor], accumulates: bool = False) -> None:
        """Raise where a backward pass would come to a real tensor, or leave a gradient that a program cannot."""
        inner = accumulates and self._tracer.scope.parent is not None
        for leaf in _torch_autograd.leaves_behind(roots):
            if inner and self._is_input(leaf):
                raise self._tracer.fail(
                    "backward() is called in a backward pass or a branch, and accumulates into the .grad of an input",
                    "use torch.autograd.grad there",
                )
            if self.stand_in(leaf) is not leaf:
                raise self._tracer.fail(
                    "autograd met a tensor that the function reached by itself before any recorded operator did",
                    "pass a clone of the tensor to the function, written in C++ or TorchScript, that uses it",
                )

    def before_control_flow(self, tensors: Iterable[Any]) -> None:
        """Raise where autograd would have to go through torch.cond or its like."""
        if torch.is_grad_enabled() and any(isinstance(t, Tensor) and t.requires_grad for t in tensors):
            raise self._tracer.fail(
                "torch.cond and other control flow of tensors that require grad cannot be captured",
                "call it under torch.no_grad(), use torch.where, or keep it outside the traced function",
            )

    def before_hooks(self) -> None:
        """Note that backward passes do something that no operator of the function tells."""
        self._tracer.unpacks = True

    def _is_input(self, leaf: Tensor) -> bool:
        node = self._tracer.outermost().nodes.get(_torch.identity(leaf))
        return node is not None and node.op == "placeholder" and node.meta.get("val") is leaf
