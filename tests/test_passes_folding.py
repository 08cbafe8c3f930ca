"""Constant folding: what is computed once, and above all what is not."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from primexec import make_traced
from primexec.passes.constants import FoldConstants

X = torch.linspace(-1, 1, 16).reshape(4, 4)


def mask(x: Tensor) -> Tensor:
    return x.masked_fill(torch.arange(4)[:, None] < torch.arange(4), -1)


def table(x: Tensor) -> Tensor:
    return x * (torch.tensor([1.0, 2.0, 3.0, 4.0]).sqrt() + 1)


def several_results(x: Tensor) -> Tensor:
    values, places = torch.tensor([3.0, 1.0, 4.0, 2.0]).sort()
    return x[places] + values


def in_a_call(x: Tensor) -> Tensor:
    return F.linear(x, torch.arange(16.0).reshape(4, 4).t() / 7)


def of_one_number(x: Tensor) -> Tensor:
    return x + torch.zeros(4).expand(4, 4)


def random(x: Tensor) -> Tensor:
    return x + torch.rand(4) * torch.arange(4)


def random_from_constants(x: Tensor) -> Tensor:
    return x + torch.bernoulli(torch.tensor([0.2, 0.5, 0.5, 0.8]))


def returned(x: Tensor) -> Any:
    places = torch.arange(4) * 2
    return x + places, places


def returned_view(x: Tensor) -> Any:
    places = torch.arange(4) * 2
    return x + places, places[1:]


def written(x: Tensor) -> Tensor:
    places = torch.arange(4.0)
    places.add_(x[0])
    return x + places


def large(x: Tensor) -> Tensor:
    return x + (torch.arange(1 << 20, dtype=torch.float64) * 2)[:4]


def failing(x: Tensor) -> Tensor:
    return x + torch.arange(4.0)[torch.tensor([0, 1, 2, 7])]


# Operators that are left besides fills, names, and those that take x.
FOLDED: dict[Callable[[Tensor], Any], list[str]] = {
    mask: ["masked_fill"],
    table: ["mul"],
    several_results: ["index", "add"],
    in_a_call: ["mm"],
    of_one_number: ["zeros", "expand", "add"],
    random: ["rand", "mul", "add"],
    random_from_constants: ["bernoulli", "add"],
    returned: ["mul", "add"],
    returned_view: ["mul", "slice", "add"],
    written: ["arange", "select", "add_", "add"],
    large: ["arange", "mul", "slice", "add"],
    failing: ["index", "add"],
}


def names(program: Any) -> list[str]:
    found = [str(n.target).split(".")[1] for n in program.nodes if "aten" in str(n.target)]
    return [name for name in found if name not in ("detach", "t", "lift_fresh_copy")]


@pytest.mark.parametrize("fn", FOLDED, ids=lambda f: f.__name__)
def test_what_is_folded(fn: Callable[[Tensor], Any]) -> None:
    assert sorted(names(make_traced(fn).trace(X))) == sorted(FOLDED[fn])


@pytest.mark.parametrize("executor", ["aten", "llvm"])
@pytest.mark.parametrize("fn", [f for f in FOLDED if f is not failing], ids=lambda f: f.__name__)
def test_values(fn: Callable[[Tensor], Any], executor: str) -> None:
    traced = make_traced(fn, executor=executor)
    for x in (X, X + 1, X * 2):
        results = []
        for f in (traced, fn):
            torch.manual_seed(0)
            results.append(torch.utils._pytree.tree_leaves(f(x.clone())))
        for mine, eager in zip(*results, strict=True):
            torch.testing.assert_close(mine, eager)
            mine.zero_()  # the caller may do what it likes with what it got
    assert traced.cache_info()[:3] == (2, 1, 1)


def test_failure_is_raised_by_the_call() -> None:
    with pytest.raises(IndexError):
        make_traced(failing)(X)


def test_gradients() -> None:
    mine, eagers = X.clone().requires_grad_(), X.clone().requires_grad_()
    traced = make_traced(mask)
    for _ in range(2):
        traced(mine).square().sum().backward()
        mask(eagers).square().sum().backward()
    assert torch.equal(mine.grad, eagers.grad)  # type: ignore[arg-type]


def test_bounds() -> None:
    traced = make_traced(lambda x: x + torch.arange(4) * 2).trace(X)
    again = FoldConstants(largest=0)(traced)
    assert again is traced
    program = make_traced(large).trace(X)
    assert "arange" not in names(FoldConstants(largest=1 << 24, most=1 << 25)(program))
    program = make_traced(large).trace(X)
    assert "arange" in names(FoldConstants(largest=1 << 24, most=1 << 20)(program))
    (scale,) = make_traced(table).trace(X).constants[1:]
    torch.testing.assert_close(scale, torch.tensor([1.0, 2.0, 3.0, 4.0]).sqrt() + 1)


def test_through_torch_compile() -> None:
    torch._dynamo.reset()
    compiled = torch.compile(mask, backend="primexec", options={"executor": "llvm"})
    for x in (X, X + 1):
        torch.testing.assert_close(compiled(x), mask(x))
    torch._dynamo.reset()


@pytest.mark.parametrize("fn", [table, in_a_call, lambda x: torch.tensor(4) / 3 + x])
def test_programs_that_are_planned_twice(fn: Callable[[Tensor], Tensor]) -> None:
    """Left to PyTorch's autograd where a backward program gains nothing, which takes a second plan."""
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    made, expected = make_traced(fn)(x), fn(y)
    torch.testing.assert_close(made, expected)
    torch.testing.assert_close(torch.autograd.grad(made.sum(), x), torch.autograd.grad(expected.sum(), y))
