"""Nodes that are not looked into: custom operators, control flow, autograd functions."""

from typing import Any

import torch
from torch import Tensor, nn
from torch._higher_order_ops.associative_scan import associative_scan
from torch._higher_order_ops.scan import scan

from tests.programs import library
from tests.programs.table import Family, draw, of, tensors

FAMILY = Family("opaque")
X = tensors((3, 4))
XY = tensors((3, 4), (3, 4))

FAMILY.add("custom_op", lambda x: library.scale(x, 2.5) + 1, X)
FAMILY.add("custom_op_by_name", lambda x: torch.ops.primexec_tests.scale(x + 1, 0.5), X)
FAMILY.add("custom_op_of_view", lambda x: library.scale(x.t(), 2.0), X)
FAMILY.add("custom_op_mutates_input", lambda total, x: (library.accumulate(total, x), total * 2), XY)
FAMILY.add("custom_op_mutates_view", lambda total, x: library.accumulate(total[0], x[1]), XY)
FAMILY.add("custom_op_mutates_intermediate", lambda x, y: (lambda z: (library.accumulate(z, y), z))(x + 1), XY)
FAMILY.add("custom_op_mutates_list", lambda x, y: (library.increment([x, y[0]]), x + y), XY)
FAMILY.add(
    "custom_op_mutates_and_overlaps",
    lambda a, b: (library.accumulate(a, b + 0), b * 2),
    of(lambda x: (x[:3], x[1:]), 4),
)
FAMILY.add("custom_op_list", lambda x: library.parts(x, [1, 2]), X)
FAMILY.add("custom_op_optional", lambda x: library.parts(x, [1, 2], x[0])[1], X)
FAMILY.add("library_op", lambda x: torch.ops.primexec_tests.minus_one(x) * 2, X)
FAMILY.add("library_composite", lambda x: torch.ops.primexec_tests.double(x) * 2, X)
FAMILY.add("library_view", lambda x: torch.ops.primexec_tests.tail(x).add_(1), X)


@FAMILY.factory(X)
def custom_op_mutates_buffer() -> Any:
    class Counter(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("total", torch.zeros(3, 4))

        def forward(self, x: Tensor) -> Tensor:
            return library.accumulate(self.total, x) + x

    return Counter()


# Control flow on values: both branches, and different numbers of turns, are met by the same trace.
FAMILY.add(
    "cond",
    lambda x: torch.cond(x.sum() > 0, lambda x: x.sin() + 1, lambda x: x.cos() * 2, (x,)),
    X,
    calls=4,
)
FAMILY.add(
    "cond_of_two",
    lambda x, y: torch.cond((x > y).all(), lambda x, y: (x + y, x * 2), lambda x, y: (x - y, y * 3), (x, y)),
    lambda i: (draw(i, 3), draw(i + 50, 3) - 4 * (i % 2)),
    calls=4,
)


@FAMILY.program(tensors((3, 4)), calls=4)
def cond_then_write(x: Tensor) -> Any:
    y = torch.cond(x.sum() > 0, lambda x: x + 1, lambda x: x - 1, (x,))
    y.add_(1)
    x.mul_(2)
    return y


@FAMILY.program(lambda i: (torch.tensor(i), draw(i, 3)), calls=4)
def while_loop(n: Tensor, x: Tensor) -> Any:
    return torch.while_loop(lambda n, x: n < 5, lambda n, x: (n + 1, x * 0.5 + 1), (n, x))


@FAMILY.program(lambda i: (draw(i, 4), draw(i + 9, 5, 4)))
def scanned(start: Tensor, xs: Tensor) -> Any:
    return scan(lambda carry, x: (carry + x, carry * x), start, xs)


@FAMILY.program(tensors((5, 4)))
def associative(xs: Tensor) -> Any:
    return associative_scan(torch.add, xs, dim=0, combine_mode="generic")


class Cube(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return 3 * x**2 * grad


class InPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        x.mul_(2)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * 2


FAMILY.add("autograd_function", lambda x: Cube.apply(x) + 1, X)
FAMILY.add("autograd_function_no_grad", lambda x: Cube.apply(x) + 1, X, contexts=(torch.no_grad,))
FAMILY.add("autograd_function_in_place", lambda x: InPlace.apply(x) + 1, X, contexts=(torch.no_grad,))
FAMILY.add(
    "autograd_function_weight",
    lambda x: Cube.apply(x.detach()),
    lambda i: (draw(i, 3).requires_grad_(),),
    contexts=(torch.no_grad,),
)
