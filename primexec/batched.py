"""Gradients in batches: `torch.autograd.grad(..., is_grads_batched=True)`, `jacobian(..., vectorize=True)`.

Such a gradient is a tensor without memory that stands for many, which kernels cannot read: a backward program runs once
for each.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from primexec import _torch_autograd


class _Kept:
    """A node of autograd whose saved tensors are not freed yet."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __getattr__(self, name: str) -> Any:
        return getattr(self._context, name)

    def maybe_clear_saved_tensors(self) -> None:
        pass


def one_by_one(context: Any, gradients: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
    """What a program's node gives for gradients of which some stand for many."""
    level, batch = _torch_autograd.taken_apart(gradients)
    found = [context.training.leave(_Kept(context), *of_one) for of_one in batch]
    context.maybe_clear_saved_tensors()
    columns = zip(*found, strict=True)
    return tuple(None if of[0] is None else _torch_autograd.batched(torch.stack(of), level) for of in columns)
