"""Programs that decide by the values of tensors: their calls take two ways by turns."""

from typing import Any

import torch
from torch import Tensor, nn

from tests.programs.table import Family, Inputs, draw

FAMILY = Family("decisions")
TWICE: dict[str, Any] = {"calls": 4, "traces_at": (0, 1)}


def signs(*shapes: tuple[int, ...]) -> Inputs:
    """Whole numbers from 1 on, and negative ones in every other call."""
    return lambda i: tuple(
        (draw(10 * i + k, *s).abs() * 4).round().add(1) * (1 - 2 * (i % 2)) for k, s in enumerate(shapes)
    )


X = signs((3, 4))
VALUES: dict[str, Any] = {
    "if": lambda x: x if x.sum() > 0 else -x,
    "and": lambda x: (x > 0).any() and x + 1,
    "not": lambda x: not (x > 0).any(),
    "bool": lambda x: bool(x[0, 0] > 0),
    "item_compared": lambda x: x * (x[0, 0].item() > 0),
    "item_of_a_bool": lambda x: (x > 0).any().item(),
    "equal": lambda x: x if torch.equal(x, x.abs()) else x * 2,
    "allclose": lambda x: torch.allclose(x, x.abs()),
    "contains": lambda x: x.abs().max() in x,
    "in_list": lambda x: x.sum() in [x.abs().sum()],
    "max": lambda x: max(x.sum(), -x.sum()),
    "max_of_numbers": lambda x: max(x.sum().item(), 0.5),
    "sorted": lambda x: sorted([x.sum(), -x.sum()]),
    "tolist": lambda x: sorted([*x[0, :1].tolist(), 0.5]),
    "is_nonzero": lambda x: x.clamp(min=0).sum().is_nonzero(),
    "int": lambda x: x * int((x > 0).sum()),
    "index": lambda x: [1, 2, 3][(x > 0).any().long()],
    "index_of_a_tensor": lambda x: x[(x[:, 0] > 0).sum() - 1],
    "index_item": lambda x: [x, x + 1][x.sum().sign().long().clamp(min=0).item()],
    "range": lambda x: [x + i for i in range((x[0] > 0).sum())],
    "slice": lambda x: x[: (x[:, 0] > 0).sum()],
    "slice_item": lambda x: x[: (x[:, 0] > 0).sum().item()],
    "size": lambda x: torch.zeros((x > 0).sum().item(), 2),
    "repeat": lambda x: x.repeat((x[:, 0] > 0).sum().item(), 1),
    "arange": lambda x: torch.arange((x > 0).sum().item()),
    "dimension": lambda x: x.sum((x[0, 0] > 0).long().item()),
    "one_hot": lambda x: nn.functional.one_hot((x > 0).long()),
    "size_of_nonzero": lambda x: len((x > 0).nonzero()),
    "size_compared": lambda x: x if x[x > 0].numel() > 3 else -x,
    "size_in_range": lambda x: sum(range((x > 0).unique().shape[0] * (x > 0).nonzero().shape[0]), x),
    "returned_as_it_is": lambda x: x if x.sum() > 0 else (x, x.t()),
}
for name, function in VALUES.items():
    FAMILY.add(f"value_{name}", function, X, **TWICE)


@FAMILY.program(X, **TWICE)
def while_loop(x: Tensor) -> Tensor:
    while x.sum() < 10:
        x = x + 50
    return x


@FAMILY.program(X, **TWICE)
def in_helper_of_library(x: Tensor) -> Tensor:
    y = x.clamp(min=0)
    if checked(y.sum()):
        return y
    return x


checked = torch.is_nonzero


@FAMILY.program(X, **TWICE)
def after_write(x: Tensor) -> Tensor:
    x.add_(1)
    y = x[1:].mul_(2)
    if x.sum() > 0:
        return y
    x.zero_()
    return -x


@FAMILY.program(X, **TWICE)
def after_draws(x: Tensor) -> Tensor:
    y = nn.functional.dropout(x, 0.3) + torch.rand(4)
    if y.sum() > 0:
        return y
    return y * torch.randn(3, 4)


@FAMILY.program(X, **TWICE)
def views_and_writes_behind(x: Tensor) -> Any:
    if (x > 0).all():
        x[x > 2] = 0
        return x[0], x.view(12)
    return x.t(), x.neg_()


class Counting(nn.Module):
    """Buffers before and behind the branch, a parameter in it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 2).requires_grad_(False)
        self.norm = nn.BatchNorm1d(2).requires_grad_(False)
        self.register_buffer("seen", torch.zeros(()))
        self.register_buffer("negative", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen += 1
        y = self.norm(self.linear(x))
        if x.sum() < 0:
            self.negative += 1
            return y * 2
        return y / self.seen


FAMILY.add_factory("module", Counting, X, **TWICE)
