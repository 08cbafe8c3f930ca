"""Gradients in batches: `is_grads_batched=True` and `vectorize=True` through traced functions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.functional import hessian, jacobian

from primexec import PrimexecError, make_traced

EXECUTORS = pytest.mark.parametrize("executor", ["aten", ("llvm", "aten")], ids=["aten", "llvm"])


def product(x: Tensor, w: Tensor) -> Tensor:
    return torch.tanh(torch.relu(x + 1).exp().mul(0.3) @ w).sin().sum(1)


def several(x: Tensor, w: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    y = torch.softmax(x @ w, 1)
    return y, (x * 2).sigmoid().sum(), torch.zeros(3)


def data(*sizes: int, requires_grad: bool = True) -> Tensor:
    return torch.randn(sizes, dtype=torch.float64, requires_grad=requires_grad)


@EXECUTORS
def test_a_batch_of_gradients(executor: Any) -> None:
    traced, (x, w) = make_traced(product, executor=executor), (data(3, 4), data(4, 5))
    for batch in (torch.eye(3).double(), data(2, 3, requires_grad=False)):
        for inputs in ((x,), (w, x)):
            want = torch.autograd.grad(product(x, w), inputs, batch, is_grads_batched=True)
            got = torch.autograd.grad(traced(x, w), inputs, batch, is_grads_batched=True)
            torch.testing.assert_close(got, want)
    assert traced.cache_info().traces == 1


@EXECUTORS
def test_the_graph_is_kept_and_freed_as_asked(executor: Any) -> None:
    x, w = data(3, 4), data(4, 5)
    result = make_traced(product, executor=executor)(x, w)
    ask: Callable[..., Any] = lambda **more: torch.autograd.grad(  # noqa: E731
        result, x, torch.eye(3).double(), is_grads_batched=True, **more
    )
    torch.testing.assert_close(ask(retain_graph=True), ask())
    with pytest.raises(RuntimeError, match="second time"):
        ask()


@EXECUTORS
def test_several_results_of_which_some_get_a_batch(executor: Any) -> None:
    traced, (x, w) = make_traced(several, executor=executor), (data(3, 4), data(4, 5))
    given = data(6, 3, 5, requires_grad=False), data(6, requires_grad=False)

    def gradients(function: Callable[..., Any], count: int) -> Any:
        results = function(x, w)
        return torch.autograd.grad(results[:count], (x, w), given[:count], is_grads_batched=True)

    for count in (1, 2):
        torch.testing.assert_close(gradients(traced, count), gradients(several, count))


@EXECUTORS
def test_between_operators_of_pytorch(executor: Any) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.GELU(), nn.Linear(8, 3)).double()
    traced = make_traced(model, executor=executor)
    x = data(2, 4, requires_grad=False)
    for vectorize in (False, True):
        want = jacobian(lambda x: model(x * 2).exp(), x, vectorize=vectorize)
        torch.testing.assert_close(jacobian(lambda x: traced(x * 2).exp(), x, vectorize=vectorize), want)


@EXECUTORS
def test_batches_of_second_derivatives_are_refused(executor: Any) -> None:
    traced, x = make_traced(lambda x: (x.exp() * x.sin()).sum(), executor=executor), data(4)
    torch.testing.assert_close(hessian(traced, x), hessian(lambda x: (x.exp() * x.sin()).sum(), x))
    with pytest.raises(PrimexecError, match=r"second derivatives.*in batches"):
        hessian(traced, x, vectorize=True)
