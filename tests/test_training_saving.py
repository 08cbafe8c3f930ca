"""What backward computes again where less is saved: values, and memory that the caller can see and change."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from primexec import make_traced
from primexec.autograd import Training

EXECUTORS: list[Any] = ["aten", ("llvm", "aten")]
X = torch.linspace(-2, 2, 48).reshape(8, 6)
W = torch.linspace(-1, 1, 48).reshape(6, 8).roll(5)


def pieces_and_their_views(x: Tensor, w: Tensor) -> Any:
    first, second = (x @ w).split(4, 1)
    return (first.view(4, 2, 4).sin() * second.view(4, 2, 4).exp()).square().sum()


def drawn(x: Tensor, w: Tensor) -> Any:
    return torch.nn.functional.dropout((x @ w).view(4, 16), 0.5).view(8, 8).tanh().square().sum()


def changed_in_the_end(x: Tensor, w: Tensor) -> Any:
    small = x.detach()[:, :1] * 3
    out = (small + w.t().exp()).sin().sum()
    small.zero_()
    return out


def result_changed_later(x: Tensor, w: Tensor) -> Any:
    made = x @ w
    return (made * 2).exp().sum(), made


def argument_changed_later(x: Tensor, w: Tensor) -> Any:
    return ((w * 2).t() + x.detach()[:, :1]).exp().sum()


def parameter_changed_later(x: Tensor, w: Tensor) -> Any:
    return (x + w.t()[:, :6]).exp().sum()


def long_chain(x: Tensor, w: Tensor) -> Any:
    out = x @ w
    for i in range(400):
        out = out.sigmoid() * 1.5 if i % 2 else out.square() - 0.3
    return out.sum()


def normalised(x: Tensor, w: Tensor) -> Any:
    rows = x @ w
    return (torch.nn.functional.layer_norm(rows, (8,), eps=1e-3) @ w.t() + rows[:, :6]).square().sum()


def masked_in_place(x: Tensor, w: Tensor) -> Any:
    rows = torch.softmax(x @ w, -1)
    mask = torch.empty_like(rows).copy_(rows.detach() > 0.1).div_(0.9)
    return ((rows * mask) @ w.t()).square().sum()


def special(x: Tensor, w: Tensor) -> Any:
    return (x @ w).i0().square().sum()


def turned(x: Tensor, w: Tensor) -> Any:
    return ((1j * (x @ w)).exp() * w[0]).abs().square().sum()


# Each with what changes before the backward pass: x, w, and results behind the loss.
FUNCTIONS: dict[Callable[..., Any], slice] = {
    pieces_and_their_views: slice(0),
    drawn: slice(0),
    changed_in_the_end: slice(0),
    result_changed_later: slice(2, None),
    argument_changed_later: slice(1),
    parameter_changed_later: slice(2),
    long_chain: slice(0),
    normalised: slice(0),
    masked_in_place: slice(0),
}


def trained(run: Callable[..., Any], changed: slice) -> list[Tensor]:
    """The loss and the gradients."""
    torch.manual_seed(0)
    x, w = X.clone().requires_grad_(), W.clone().requires_grad_()
    loss, *others = out if isinstance(out := run(x, w), tuple) else (out,)
    with torch.no_grad():
        for t in (x, w, *others)[changed]:
            t.zero_()
    loss.backward()
    return [loss.detach(), *(t.grad if t.grad is not None else torch.zeros(0) for t in (x, w))]


def saved_bytes(traced: Any) -> tuple[int, int]:
    training = traced._cache.entries[0].executable.training
    assert isinstance(training, Training)
    return training.saved_bytes()


@pytest.mark.parametrize("executor", EXECUTORS, ids=str)
@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda fn: fn.__name__)
def test_gradients_are_eagers(fn: Callable[..., Any], executor: Any) -> None:
    traced = make_traced(fn, executor=executor, executor_parameters={"save": "less"})
    expected = trained(fn, FUNCTIONS[fn])
    for _ in range(2):
        torch.testing.assert_close(trained(traced, FUNCTIONS[fn]), expected, rtol=1e-5, atol=1e-5)
    assert traced.cache_info().traces == 1
    ours, theirs = saved_bytes(traced)
    assert ours <= theirs


@pytest.mark.parametrize(
    ("executor", "save", "less"),
    [
        ("aten", "less", True),
        ("aten", None, False),
        (("llvm", "aten"), None, True),
        (("llvm", "aten"), "default", False),
    ],
    ids=str,
)
def test_less_is_saved(executor: Any, save: str | None, less: bool) -> None:
    traced = make_traced(pieces_and_their_views, executor=executor, executor_parameters={"save": save} if save else {})
    trained(traced, slice(0))
    ours, theirs = saved_bytes(traced)
    assert ours < theirs if less else ours == theirs


@pytest.mark.parametrize("fn", [normalised, masked_in_place], ids=lambda fn: fn.__name__)
def test_results_of_norms_and_of_what_was_written_before_are_not_saved(fn: Callable[..., Any]) -> None:
    traced = make_traced(fn, executor=("llvm", "aten"))
    trained(traced, slice(0))
    ours, theirs = saved_bytes(traced)
    assert ours <= theirs - X.nbytes


def test_series_are_not_computed_again() -> None:
    traced = make_traced(special, executor_parameters={"save": "less"})
    trained(traced, slice(0))
    ours, theirs = saved_bytes(traced)
    assert ours == theirs


def test_complex_numbers_are_not_computed_again() -> None:
    traced = make_traced(turned, executor=("llvm", "aten"))
    torch.testing.assert_close(trained(traced, slice(0)), trained(turned, slice(0)))
    report = str(traced.explain(X.clone().requires_grad_(), W.clone().requires_grad_()))
    forward, _, backward = report.partition("backward:")
    assert all(f"1 aten.{name}" in forward and f"aten.{name}" not in backward for name in ("exp", "abs"))
