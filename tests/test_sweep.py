"""What torch ships as samples, traced and compared with eager: a few samples an entry, or all of them."""

from __future__ import annotations

import pytest

from tests.observe import Kind
from tests.sweep import (
    EXHAUSTIVE,
    INEXACT,
    MODULES,
    NOT_CAPTURED,
    OPS,
    QUICK,
    QUICK_MODULE_INPUTS,
    primexec_subject,
    sweep_module,
    sweep_op,
    unexpected,
)

pytestmark = pytest.mark.usefixtures("one_thread")
LISTED = {Kind.CAPTURE: NOT_CAPTURED, Kind.CLOSE: INEXACT}


@pytest.mark.parametrize("name", OPS)
def test_operation(name: str, exhaustive: bool) -> None:
    results = list(sweep_op(name, EXHAUSTIVE if exhaustive else QUICK, primexec_subject()))
    assert unexpected(results, LISTED) == []
    if exhaustive:
        assert {kind for kind, names in LISTED.items() if name in names} <= {result.kind for result in results}


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name", MODULES)
def test_module(name: str, training: bool, exhaustive: bool) -> None:
    limit = None if exhaustive else QUICK_MODULE_INPUTS
    assert unexpected(sweep_module(name, training, primexec_subject(), limit), LISTED) == []


def test_names_that_are_listed_exist() -> None:
    assert {*NOT_CAPTURED, *INEXACT} <= {*OPS, *MODULES}
