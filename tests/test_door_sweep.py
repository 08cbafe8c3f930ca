"""The door under PyTorch's own AOTAutograd test: a few operations, or all of them with --exhaustive."""

from __future__ import annotations

import pytest

from tests.door_sweep import QUICK_STEP, sweep_door
from tests.observe import Kind
from tests.sweep import OPS


def judge(name: str, limit: int | None) -> None:
    assert [r for r in sweep_door(name, limit) if r.kind is Kind.WRONG] == []


@pytest.mark.parametrize("name", sorted(OPS)[::QUICK_STEP])
def test_first_sample(name: str) -> None:
    judge(name, 1)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", sorted(OPS))
def test_every_sample(name: str) -> None:
    judge(name, None)
