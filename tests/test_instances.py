"""Objects that a function makes and returns."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from primexec import CaptureError, make_traced


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
