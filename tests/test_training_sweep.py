"""The gradients of what torch ships as samples, traced and eager: one sample an entry, or all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch

from tests.observe import Kind
from tests.sweep import MODULES, NOT_CAPTURED, Result, primexec_subject
from tests.training_sweep import (
    DIFFERENTIABLE,
    INEXACT_GRADIENTS,
    NOT_TRAINED,
    sweep_gradients,
    sweep_training,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def judge(results: Iterable[Result]) -> None:
    refused = {*NOT_CAPTURED, *NOT_TRAINED}
    unexpected = {Kind.WRONG: set(), Kind.CAPTURE: refused, Kind.CLOSE: INEXACT_GRADIENTS}
    found = [r for r in results if r.kind in unexpected and r.entry not in unexpected[r.kind]]
    # Second derivatives work or raise; wrong they never are.
    assert not [r for r in found if r.variant != "second derivatives" or r.kind is Kind.WRONG]


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients(name: str, request: pytest.FixtureRequest) -> None:
    judge(sweep_gradients(name, None if request.config.getoption("--exhaustive") else 1, primexec_subject()))


@pytest.mark.parametrize("name", MODULES)
def test_training(name: str, request: pytest.FixtureRequest) -> None:
    judge(sweep_training(name, None if request.config.getoption("--exhaustive") else 1, primexec_subject()))
