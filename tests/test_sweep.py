"""What torch ships as samples, traced and compared with eager: a few samples an entry, or all of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import pytest
import torch

from tests.observe import Kind
from tests.sweep import (
    EXHAUSTIVE,
    INEXACT,
    MODULES,
    NOT_CAPTURED,
    OPS,
    QUICK,
    QUICK_MODULE_INPUTS,
    Result,
    primexec_subject,
    sweep_module,
    sweep_op,
)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def judge(results: Iterable[Result]) -> None:
    unexpected = {Kind.WRONG: set(), Kind.CAPTURE: NOT_CAPTURED, Kind.CLOSE: INEXACT}
    assert not [r for r in results if r.kind in unexpected and r.entry not in unexpected[r.kind]]


@pytest.mark.parametrize("name", OPS)
def test_operation(name: str, request: pytest.FixtureRequest) -> None:
    limits = EXHAUSTIVE if request.config.getoption("--exhaustive") else QUICK
    judge(sweep_op(name, limits, primexec_subject()))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_module(name: str, training: bool, request: pytest.FixtureRequest) -> None:
    limit = None if request.config.getoption("--exhaustive") else QUICK_MODULE_INPUTS
    judge(sweep_module(name, training, primexec_subject(), limit))
