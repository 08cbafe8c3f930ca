"""Branches on values of which one side raises: part of the program, with eager's exceptions."""

import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from primexec import make_traced
from tests import checked

X = torch.arange(6.0).reshape(2, 3)
CHECKED = [
    checked.assert_without_text,
    checked.assert_with_text,
    checked.negated,
    checked.second_of_two,
    checked.after_a_write,
    checked.inside_of_torch,
    checked.text_of_a_value,
]
BRANCHES = [
    checked.caught_by_the_function,
    checked.both_sides_raise,
    checked.local_class,
    checked.more_than_a_raise,
]


def outcome(fn: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Any, Tensor]:
    """The result, or the exception and its text; and the argument afterwards."""
    try:
        return fn(x), x
    except Exception as error:
        return (type(error), str(error)), x


@pytest.mark.parametrize("executor", ["aten", ("numpy", "aten"), ("llvm", "aten")])
@pytest.mark.parametrize("fn", CHECKED)
def test_failure_is_eagers(fn: Callable[[Tensor], Tensor], executor: Any) -> None:
    traced = make_traced(fn, executor=executor)
    for scale in (1, 200, 1, 300):
        (got, changed), (expected, kept) = outcome(traced, X * scale), outcome(fn, X * scale)
        assert type(got) is type(expected)
        assert torch.allclose(got, expected) if isinstance(expected, Tensor) else got == expected
        assert torch.equal(changed, kept)
    assert traced.cache_info().traces == 1


def test_what_is_not_known_of_a_text_is_left_out_after_a_write() -> None:
    fn = checked.text_after_a_write
    traced = make_traced(fn)
    assert torch.equal(traced(X.clone()), fn(X.clone()))
    with pytest.raises(ValueError, match="in torch") as caught:
        traced(X * 200)
    assert caught.value.args == ("...: ... of ... in torch.Size([2, 3])",)


@pytest.mark.parametrize("executor", ["aten", ("llvm", "aten")])
def test_checks_of_distributions(executor: Any) -> None:
    def likelihood(x: Tensor, scale: Tensor) -> Tensor:
        normal = torch.distributions.Normal(x.mean(0), scale, validate_args=True)
        return normal.log_prob(x) + torch.distributions.kl_divergence(normal, torch.distributions.Normal(0.0, 1.0))

    traced = make_traced(likelihood, executor=executor)
    scale = torch.tensor([0.5, 1.0, 2.0])
    torch.testing.assert_close(traced(X, scale), likelihood(X, scale))
    for wrong in ((X, -scale), (X * float("nan"), scale)):
        for fn in (traced, likelihood):
            with pytest.raises(ValueError, match="to satisfy the constraint"):
                fn(*wrong)
    assert traced.cache_info().traces == 1


def test_failure_names_the_line() -> None:
    with pytest.raises(ValueError, match="too large") as caught:
        make_traced(checked.negated)(X * 200)
    assert 'raise ValueError("too large")' in "".join(traceback.format_exception(caught.value))
    with pytest.raises(checked.TooLargeError, match="doubled") as caught_later:
        make_traced(checked.after_a_write)(X * 200)
    assert "if torch.any(x > 100):" in caught_later.value.__notes__[0]


def test_gradients_pass_a_check() -> None:
    traced = make_traced(checked.negated)
    x = X.clone().requires_grad_()
    traced(x).sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


class Counting(nn.Module):
    """Leaves something in attributes, a buffer and the generator before a check, and writes once more behind it."""

    def __init__(self, writes: bool) -> None:
        super().__init__()
        self.writes = writes
        self.register_buffer("count", torch.zeros(()))
        self.last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        if self.writes:
            self.count.add_(1)
            x.mul_(torch.rand(3))
        self.last, self.seen = x * 2, x.shape
        if (x > 100).any():
            raise ValueError(f"{x.sum()} with {self.count}")
        self.count.mul_(2)
        return x + self.count


@pytest.mark.parametrize("executor", ["aten", ("llvm", "aten")])
@pytest.mark.parametrize("writes", [True, False])
def test_what_was_assigned_before_a_check_fails(writes: bool, executor: Any) -> None:
    eager, module = Counting(writes), Counting(writes)
    traced = make_traced(module, executor=executor)
    for rows, scale in ((2, 1), (2, 1), (2, 1000), (1, 1), (2, 1), (1, 1000), (2, 2000)):
        found = []
        for fn, of in ((eager, eager), (traced, module)):
            torch.manual_seed(rows)
            facts = outcome(fn, X[:rows] * scale), of.last, of.count.clone(), of.seen, torch.get_rng_state()
            found.append(pytree.tree_leaves(facts))
        for expected, got in zip(*found, strict=True):
            assert torch.equal(got, expected) if isinstance(expected, Tensor) else got == expected


@pytest.mark.parametrize("fn", BRANCHES)
def test_other_branches_have_a_program_a_way(fn: Callable[[Tensor], Tensor]) -> None:
    traced = make_traced(fn)
    for x in (X, X * 200, X + 1, X * 300):
        (got, _), (expected, _) = outcome(traced, x), outcome(fn, x)
        assert torch.equal(got, expected) if isinstance(expected, Tensor) else str(got) == str(expected)
