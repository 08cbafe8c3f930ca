"""Objects that a function makes and returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from primexec import CaptureError, make_traced

X = torch.arange(3.0)


class Pair:
    def __init__(self, first: Any, second: Any = None) -> None:
        self.first, self.second = first, second


class Slotted:
    __slots__ = ("first",)

    def __init__(self, first: Any) -> None:
        self.first = first


def test_objects_that_the_function_makes_are_made_anew() -> None:
    def function(x: Tensor) -> dict[str, Any]:
        return {"made": Pair(x + 1, [Pair(x, 3), torch.float32])}

    traced, kept = make_traced(function), []
    for x in (torch.ones(3), torch.zeros(3)):
        made, expected = traced(x)["made"], function(x)["made"]
        assert type(made) is type(made.second[0]) is Pair
        assert torch.equal(made.first, expected.first)
        assert made.second[0].first is x
        assert (made.second[0].second, made.second[1]) == (3, torch.float32)
        kept.append(made)
    assert kept[0] is not kept[1]
    assert torch.equal(kept[0].first, torch.full((3,), 2.0))
    assert traced.cache_info().traces == 1


def test_objects_that_the_function_makes_may_hold_gradients() -> None:
    x = torch.ones(3, requires_grad=True)
    make_traced(lambda x: Pair(x * x))(x).first.sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))


HELD: list[Any] = []
OUTSIDE = Pair(torch.ones(2))


def cycle(x: Tensor) -> Pair:
    made = Pair(x)
    made.second = made
    return made


@pytest.mark.parametrize(
    "function",
    [
        lambda x: HELD.append(Pair(x)) or HELD[-1],
        lambda x: (Pair(x),) * 2,
        lambda x: OUTSIDE,
        lambda x: Pair(x, OUTSIDE),
        lambda x: Slotted(x),
        cycle,
    ],
    ids=["held", "twice", "outside", "holds one outside", "slots", "cycle"],
)
def test_other_objects_are_refused(function: Any) -> None:
    with pytest.raises(CaptureError, match="cannot be rebuilt"):
        make_traced(function)(torch.ones(2))


class Sized(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.sizes = [1, 2]

    def forward(self, x: Tensor) -> Any:
        return self.sizes, x * 2


def of_closure(held: Any) -> Any:
    return lambda x: {"found": (held, x * 2)}


SAME: dict[str, Any] = {
    "argument": (lambda xs: xs, lambda f: (xs := [X], f(xs) is xs)[1]),
    "part_of_an_argument": (lambda d: (d["a"], d["a"][0] * 2), lambda f: (d := {"a": [X]}, f(d)[0] is d["a"])[1]),
    "keyword": (lambda x, **options: (x, options["a"]), lambda f: (a := [1], f(X, a=a)[1] is a)[1]),
    "twice": (lambda x: (lambda inner: (inner, [inner]))([x * 2]), lambda f: (out := f(X), out[0] is out[1][0])[1]),
    "not_twice": (lambda x: ([x * 2], [x * 2]), lambda f: (out := f(X), out[0] is not out[1])[1]),
    "attribute": (module := Sized(), lambda f: f(X)[0] is module.sizes),
    "closure": (of_closure(held := {"a": 1}), lambda f: f(X)["found"][0] is held),
}


@pytest.mark.parametrize("name", SAME)
def test_containers_that_are_the_same_object(name: str) -> None:
    function, holds = SAME[name]
    traced = make_traced(function)
    for _ in range(2):
        assert holds(function)
        assert holds(traced)
    assert traced.cache_info().traces == 1


def test_a_container_that_is_replaced_by_an_equal_one_is_the_one_returned() -> None:
    model = Sized()
    traced = make_traced(model)
    for _ in range(2):
        model.sizes = [1, 2]
        out = traced(X)[0]
        assert out is model.sizes
        out.append(3)
        assert traced(X)[0] is model.sizes


def test_a_container_inside_of_another_one_is_refused() -> None:
    held = [[1], [2]]
    with pytest.raises(CaptureError, match="found inside of another one"):
        make_traced(lambda x: (held[0], x))(X)
