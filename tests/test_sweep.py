"""What torch ships as samples, traced and compared with eager: a few samples an entry, or all of them."""

from __future__ import annotations

import pytest

from tests.observe import Kind
from tests.sweep import INEXACT, MODULES, NOT_CAPTURED, OPS, UNSTEADY, Swept, unexpected

pytestmark = pytest.mark.usefixtures("one_thread")
LISTED = {Kind.CAPTURE: NOT_CAPTURED, Kind.CLOSE: INEXACT | UNSTEADY}


@pytest.mark.parametrize("name", OPS)
def test_operation(name: str, exhaustive: bool, swept: Swept) -> None:
    results = swept("operations", name)
    assert unexpected(results, LISTED) == []
    if exhaustive:
        needed = {
            kind for kind, names in LISTED.items() if name in names and not (kind is Kind.CLOSE and name in UNSTEADY)
        }
        assert needed <= {result.kind for result in results}


@pytest.mark.parametrize("name", MODULES)
def test_module(name: str, swept: Swept) -> None:
    assert unexpected(swept("modules", name), LISTED) == []


def test_names_that_are_listed_exist() -> None:
    assert {*NOT_CAPTURED, *INEXACT} <= {*OPS, *MODULES}
