"""primexec.compare: faults planted in programs of more than a thousand operators are found, and honest ones are not."""

import inspect
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import primexec
from primexec.executors import registry
from tests.faulty import Honest, MissingMask, UninitialisedRead, WrongOrder, WrongPolynomial, one_by_one
from tests.toy import install

LAYERS = 350


def seeded(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


def chain(x: Tensor, layers: int) -> Tensor:
    """Three operators a layer; errors neither grow nor fade."""
    for _ in range(layers):
        x = (x * 0.75).add(x * 0.25)
    return x


def polynomial(x: Tensor) -> Tensor:
    y = chain(x.clamp(-1, 0.5), LAYERS // 2)
    y = y.exp().log()  # right, for its argument is small
    y = y + 1.25
    y = y.exp()  # the fault
    return chain(y, LAYERS // 2)


def order(x: Tensor) -> Tensor:
    y = chain(x, LAYERS // 2)
    z = y.abs() + 0.5
    y = y / z.sum(1, keepdim=True)  # the fault
    return chain(y, LAYERS // 2)


def mask(x: Tensor) -> Tensor:
    y = chain(x, LAYERS // 2).tanh()
    y = y[:, :13] * 1.5
    y = y.tanh()  # the fault
    return chain(y, LAYERS // 2)


def uninitialised(x: Tensor) -> Tensor:
    y = chain(x, LAYERS // 2)
    y = torch.cat([y, x + 1])  # the fault
    return chain(y, LAYERS // 2)


FAULTS: dict[str, tuple[type, Callable[[Tensor], Tensor], Tensor, str]] = {
    "polynomial": (WrongPolynomial, polynomial, seeded(4, 16), "exp_1"),
    "order": (WrongOrder, order, seeded(4, 512, dtype=torch.bfloat16), "sum_1"),
    "mask": (MissingMask, mask, seeded(4, 16), "tanh_1"),
    "uninitialised": (UninitialisedRead, uninitialised, seeded(4, 16), "cat"),
}


def line_of_fault(fn: Callable[..., Any]) -> tuple[str, int]:
    lines, start = inspect.getsourcelines(fn)
    return __file__, start + next(i for i, text in enumerate(lines) if text.rstrip().endswith("# the fault"))


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named_alone(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind, fn, x, node = FAULTS[name]
    install(monkeypatch, faulty=one_by_one(kind))
    comparison = primexec.compare(fn, x, executors=["aten", "faulty"])
    assert len(comparison.rows) > 1000
    found = comparison.first["faulty"]
    assert comparison.first["aten"] is None
    assert found is not None
    assert (found.node, (found.source.file, found.source.line)) == (node, line_of_fault(fn))
    assert found.excess > 1
    assert comparison.compiles == {}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_named_by_bisection(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind, fn, x, node = FAULTS[name]
    install(monkeypatch, faulty=kind, honest=Honest)
    comparison = primexec.compare(fn, x, executors=["faulty", "honest"])
    found = comparison.first["faulty"]
    assert comparison.first["honest"] is None
    assert found is not None
    assert (found.node, (found.source.file, found.source.line)) == (node, line_of_fault(fn))
    # One that returns everything, one for the whole, the bisection, one that returns the inputs of the operator.
    assert comparison.compiles["faulty"] <= 1 + 1 + math.ceil(math.log2(len(comparison.rows))) + 1
    assert comparison.compiles["honest"] == 2
    for name in ("faulty", "honest"):
        assert registry.load(name).compiles == comparison.compiles[name]
