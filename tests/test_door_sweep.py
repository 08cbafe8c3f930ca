"""The door under PyTorch's own AOTAutograd test: a few operations, or all of them with --exhaustive."""

from __future__ import annotations

import pytest

from tests.door_sweep import QUICK_STEP
from tests.observe import Kind
from tests.sweep import OPS, Swept

NAMES = [pytest.param(n, marks=[pytest.mark.exhaustive] if i % QUICK_STEP else []) for i, n in enumerate(sorted(OPS))]


@pytest.mark.parametrize("name", NAMES)
def test_entry(name: str, swept: Swept) -> None:
    assert [r for r in swept("door", name) if r.kind is Kind.WRONG] == []
