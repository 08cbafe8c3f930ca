"""The executor `llvm` checks every value that eager checks, also where its own kernels have no use for it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import primexec
from tests.test_llvm import compiled, kernels  # noqa: F401

L = torch.tensor
X, ROW, ALL = torch.arange(12.0).reshape(4, 3), torch.arange(4.0), torch.ones(3, dtype=torch.bool)
BEYOND, BELOW, GOOD = L([0, 9]), L([-1, 0]), L([3, 1])
P, HALF = L([0.25, 0.75]), L([0.5, 0.5])

# What is called, arguments that eager raises for, and those that it takes.
CHECKED: dict[str, tuple[Callable[..., Any], tuple[Tensor, ...], tuple[Tensor, ...]]] = {
    "cross entropy of a probability": (F.binary_cross_entropy, (L([-1.0, 0.5]), HALF), (P, HALF)),
    "cross entropy of NaN": (F.binary_cross_entropy, (L([math.nan, 0.5]), HALF), (P, HALF)),
    "cross entropy with a probability": (F.binary_cross_entropy, (HALF, L([3.0, 1.0])), (HALF, P)),
    "cross entropy of each": (
        lambda a, b: F.binary_cross_entropy(a, b, reduction="none"), (L([-1.0, 0.5]), HALF), (P, HALF)
    ),
    "cross entropy of nothing": (F.binary_cross_entropy, (L([2.0]), L([0.5])), (P[:0], P[:0])),
    "one_hot, beyond": (lambda i: F.one_hot(i, 4), (BEYOND,), (GOOD,)),
    "one_hot, below": (lambda i: F.one_hot(i, num_classes=4).float().sum(0), (BELOW,), (GOOD,)),
    "quantile": (lambda a, q: a.quantile(q), (ROW, L([-0.1, 0.2])), (ROW, P)),
    "nanquantile": (lambda a, q: torch.nanquantile(a, q=q), (ROW, L([0.1, math.nan])), (ROW, P)),
    "assertion": (lambda a: (torch._assert_async((a > 1).all()), a + 1)[1], (P,), (P + 1,)),
    "assertion of a number": (lambda a: (torch._assert_async(a[0], "zero"), a + 1)[1], (ROW,), (P,)),
    "assertion alone": (lambda a: (torch._assert_async((a > 1).all(), "small"), a)[1], (P,), (P + 1,)),
    "masked_scatter": (torch.masked_scatter, (ROW[:3], ALL, P), (ROW[:3], L([True, False, True]), P)),
    "masked_scatter of nothing": (torch.masked_scatter, (ROW[:3], ALL, P[:0]), (ROW[:3], ~ALL, P[:0])),
    "unpool": (lambda a, i: F.max_unpool1d(a, i, 2), (P[None], BELOW[None]), (P[None], GOOD[None])),
    "unpool two planes": (
        lambda a, i: F.max_unpool2d(a, i, 2), (P.view(1, 2, 1, 1), L([5, 0]).view(1, 2, 1, 1)),
        (P.view(1, 2, 1, 1), GOOD.view(1, 2, 1, 1)),
    ),
    "of numbers that are equal": (lambda i: torch.zeros(4)[i], (BEYOND,), (GOOD,)),
    "of one repeated": (lambda a, i: a[:1].expand(4)[i] * 2, (ROW, BEYOND), (ROW, GOOD)),
    "rows that are equal": (lambda i: F.embedding(i, torch.zeros(4, 2)), (BEYOND,), (GOOD,)),
    "gather from equals": (lambda i: torch.zeros(4).gather(0, i), (BELOW,), (GOOD,)),
    "select from equals": (lambda i: torch.zeros(4).index_select(0, i), (BELOW,), (GOOD,)),
    "take from equals": (lambda i: torch.zeros(4).take(i), (BEYOND,), (GOOD,)),
    "cross_entropy of equals": (lambda t: F.cross_entropy(torch.zeros(2, 4), t), (BEYOND,), (GOOD,)),
    "unused": (lambda a, i: a.sum() + a[i].shape[0], (ROW, BEYOND), (ROW, GOOD)),
    "unused rows": (lambda a, i: a.sum() + F.embedding(i, a).shape[0], (X, BEYOND), (X, GOOD)),
    "unused loss": (lambda a, i: a.sum() + F.cross_entropy(a[:2], i).dim(), (X, BEYOND), (X, GOOD - 1)),
    "unused write": (lambda a, i: a.sum() + a.index_add(0, i, a[:2]).dim(), (X, BEYOND), (X, GOOD)),
    "unused scatter": (lambda a, i: a.sum() + a.scatter(0, i, 1.0).dim(), (ROW, BEYOND), (ROW, GOOD)),
    "first": (lambda a, i: a[i][0] + 1, (ROW, BEYOND), (ROW, GOOD)),
    "none": (lambda a, i: a[i][:0] + 1, (ROW, BEYOND), (ROW, GOOD)),
    "some": (lambda a, i: a[i][::2] * 2, (X, BEYOND), (X, GOOD)),
    "some of several": (lambda a, i, j: a[i, j][1:] * 2, (X, L([3, 0]), L([-4, 2])), (X, GOOD, L([0, 2]))),
    "joined": (lambda a, i: torch.cat([a[i][:1], a]) * 2, (X, BEYOND), (X, GOOD)),
    "of an index": (lambda a, i: a[i[i - 4][:1]], (ROW, L([3, 9])), (ROW, L([3, 2, 1]))),
    "index_add, below": (lambda a, i: a.index_add(0, i, a[:2]), (ROW, BELOW), (ROW, GOOD)),
    "index_add, beyond": (lambda a, i: a.index_add(0, i, a[:2], alpha=2), (ROW, BEYOND), (ROW, GOOD)),
    "index_copy, below": (lambda a, i: a.index_copy(0, i, a[:2]) + 1, (X, BELOW), (X, GOOD)),
    "index_copy of columns": (lambda a, i: a.index_copy(1, i, a[:, :2]) + 1, (X, BEYOND), (X, GOOD - 1)),
    "index_fill": (lambda a, i: a.index_fill(0, i, 2.0) + 1, (X, BEYOND), (X, BELOW)),
    "index_fill by a tensor": (lambda a, i: a.index_fill(1, i, L(2.0)) + 1, (X, L([-4, 0])), (X, L(-3))),
}  # fmt: skip


@pytest.mark.parametrize("executor", [("llvm", "aten"), ("numpy", "aten")], ids=lambda e: e[0])
@pytest.mark.parametrize("name", CHECKED)
def test_what_eager_checks(name: str, executor: tuple[str, ...]) -> None:
    fn, bad, good = CHECKED[name]
    with pytest.raises((IndexError, RuntimeError)) as eager:
        fn(*bad)
    traced = primexec.make_traced(fn, executor=executor)
    for arguments in (good, bad, good):
        if arguments is good:
            torch.testing.assert_close(traced(*good), fn(*good), equal_nan=True)
        else:
            with pytest.raises(eager.type):
                traced(*bad)


def test_an_assertion_says_what_eager_says_and_where() -> None:
    traced = primexec.make_traced(F.binary_cross_entropy, executor=("llvm", "aten"))
    loss: Callable[..., Tensor] = lambda a, b: traced(a, b)  # noqa: E731
    with pytest.raises(primexec.errors.ValueCheckError, match="all elements of input should be between 0 and 1"):
        loss(P + 1, HALF)
    with pytest.raises(RuntimeError, match="all elements of target should be between 0 and 1"):
        loss(P, HALF + 1)


def test_a_loss_is_checked_by_the_kernel_that_computes_it(compiled: list[Any]) -> None:  # noqa: F811
    a, b = torch.rand(64, 50), torch.rand(64, 50)
    traced = primexec.make_traced(F.binary_cross_entropy, executor=("llvm", "aten"))
    torch.testing.assert_close(traced(a, b), F.binary_cross_entropy(a, b))
    assert kernels(compiled) == [1]


def test_nothing_is_checked_twice(compiled: list[Any]) -> None:  # noqa: F811
    """A kernel that reads by all indices checks all of them, however it walks them."""
    i = torch.randint(0, 4, (6, 5))
    fns: list[Callable[[Tensor], Tensor]] = [
        lambda a: a[i] + 1,
        lambda a: a[i].transpose(0, 1).flip(0) + 1,
        lambda a: a[i].reshape(30, 3) * 2,
        lambda a: F.embedding(i, a).sum(2),
        lambda a: F.embedding(i, a)[..., :2] + 1,
        lambda a: a.index_put((i,), L(1.0)),
    ]
    for fn in fns:
        traced = primexec.make_traced(fn, executor=("llvm", "aten"))
        torch.testing.assert_close(traced(X), fn(X))
        assert "_assert_async" not in str(traced.explain(X))


INTEGERS: dict[str, Callable[[Tensor], Tensor]] = {
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
    "unfold": lambda x: F.unfold(x, 3, padding=1),
    "average": lambda x: F.adaptive_avg_pool2d(x, (2, 2)),
    "softmax": lambda x: x.softmax(1),
    "max_pool1d": lambda x: torch.max_pool1d(input=x[0, 0], kernel_size=2) + 1,
}


@pytest.mark.parametrize("name", INTEGERS)
@pytest.mark.parametrize("images", [1, 9])
def test_kernels_that_take_no_integers(name: str, images: int) -> None:
    """Whether PyTorch has a kernel is asked of one image, where all are large."""
    x = torch.zeros(images, 8, 256, 256, dtype=torch.int64)
    with pytest.raises(NotImplementedError, match="not implemented for 'Long'"):
        INTEGERS[name](x)
    with pytest.raises(NotImplementedError, match="not implemented for 'Long'"):
        primexec.make_traced(INTEGERS[name], executor="llvm")(x)
    large = primexec.make_traced(lambda x: F.max_pool2d(x, 2), executor="llvm")
    assert torch.equal(large(x), F.max_pool2d(x, 2))
