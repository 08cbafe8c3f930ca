"""What torch ships as samples, traced and compared with eager: a few samples an entry, or all of them."""

from __future__ import annotations

import pytest
import torch

from tests.observe import Kind
from tests.sweep import (
    EXHAUSTIVE,
    MODULES,
    OPS,
    QUICK,
    QUICK_MODULE_INPUTS,
    Result,
    primexec_subject,
    sweep_module,
    sweep_op,
)

# Entries that may raise CaptureError, each with its reason. Any other entry that does so fails its test.
NOT_CAPTURED: dict[str, str] = {}


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def judge(name: str, results: list[Result]) -> None:
    wrong = [result for result in results if result.kind is Kind.WRONG]
    assert not wrong
    if name not in NOT_CAPTURED:
        assert not [result for result in results if result.kind is Kind.CAPTURE]


@pytest.mark.parametrize("name", OPS)
def test_operation(name: str, request: pytest.FixtureRequest) -> None:
    limits = EXHAUSTIVE if request.config.getoption("--exhaustive") else QUICK
    judge(name, list(sweep_op(name, limits, primexec_subject())))


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_module(name: str, training: bool, request: pytest.FixtureRequest) -> None:
    limit = None if request.config.getoption("--exhaustive") else QUICK_MODULE_INPUTS
    judge(name, list(sweep_module(name, training, primexec_subject(), limit)))
