"""explain(): what differs from the nearest cached program."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from primexec import make_traced

X = torch.arange(6.0).reshape(2, 3)


class Scale(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.gain = 2.0

    def forward(self, batch: dict[str, Tensor], factor: float = 1.0) -> Tensor:
        return self.linear(batch["x"]) * factor * self.gain


def explained(change: Callable[[Any], Any]) -> list[tuple[str, str, str]]:
    """What explain() says after a change, of a module that was called with X before."""
    torch.manual_seed(0)
    traced = make_traced(Scale().eval().requires_grad_(False))
    traced({"x": X})
    assert traced.explain({"x": X}).cached
    args = change(traced) or ({"x": X},)
    explanation = traced.explain(*args)
    assert not explanation.cached
    assert traced.cache_info()[:3] == (0, 1, 1)
    return list(explanation.differences)


DIFFERENCES: dict[str, tuple[Callable[[Any], Any], list[tuple[str, str, str]]]] = {
    "shape": (
        lambda t: ({"x": X[:1]},),
        [("batch['x'] (shape)", "(2, 3)", "(1, 3)")],
    ),
    "dtype": (
        lambda t: ({"x": X.bfloat16()},),
        [("batch['x'] (dtype and device)", "torch.float32 cpu", "torch.bfloat16 cpu")],
    ),
    "strides": (
        lambda t: ({"x": X.t().contiguous().t()},),
        [("batch['x'] (strides)", "(3, 1)", "(1, 2)")],
    ),
    "attribute": (lambda t: setattr(t, "gain", 3.0), [("self.gain", "2.0", "3.0")]),
    "training": (lambda t: t.linear.train() and None, [("self.linear.training", "False", "True")]),
}


@pytest.mark.parametrize(("change", "expected"), DIFFERENCES.values(), ids=DIFFERENCES)
def test_explain_names_what_differs(change: Callable[[Any], Any], expected: list[tuple[str, str, str]]) -> None:
    assert explained(change) == expected


def test_explain_names_static_arguments() -> None:
    traced = make_traced(lambda x, factor=1.0: x * factor)
    traced(X, 2.0)
    assert traced.explain(X, 3).differences == (("factor (value)", "2.0", "3"),)


def test_explain_names_global_state() -> None:
    traced = make_traced(lambda x: x * 2)
    traced(X)
    with torch.no_grad():
        assert traced.explain(X).differences == (("grad mode", "True", "False"),)
    with torch.inference_mode():
        assert ("inference mode", "False", "True") in traced.explain(X).differences


def test_explain_names_identity() -> None:
    traced = make_traced(lambda x, y: x + y)
    traced(X, X.clone())
    explanation = traced.explain(X, X)
    assert not explanation.cached
    assert explanation.differences


def test_explain_compares_with_the_nearest_program() -> None:
    traced = make_traced(lambda x, a, b, c: x * a + b * c)
    traced(X, 1, 1, 1)
    traced(X, 2, 2, 2)
    assert traced.explain(X, 2, 2, 3).differences == (("c (value)", "2", "3"),)
