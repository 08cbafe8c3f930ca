"""The gradients of what torch ships as samples, traced and eager: one sample an entry, or all of them."""

from __future__ import annotations

import pytest

from tests.observe import Kind
from tests.sweep import MODULES, NOT_CAPTURED, UNSTEADY, Result, Swept, unexpected
from tests.training_sweep import (
    DIFFERENTIABLE,
    INEXACT_GRADIENTS,
    NOT_TRAINED,
    OTHER_SECOND,
    SECOND,
)

pytestmark = pytest.mark.usefixtures("one_thread")
LISTED = {Kind.CAPTURE: {*NOT_CAPTURED, *NOT_TRAINED}, Kind.CLOSE: {*INEXACT_GRADIENTS, *UNSTEADY}}


def judge(name: str, results: list[Result], exhaustive: bool) -> None:
    second = [result for result in results if result.variant == SECOND]
    first = [result for result in results if result.variant != SECOND]
    assert unexpected(first, LISTED) == []
    assert unexpected(second, {Kind.WRONG: OTHER_SECOND}) == []  # they work or raise
    if name in OTHER_SECOND:
        assert [(r.kind, OTHER_SECOND[name][0] in r.detail) for r in second] == [(Kind.WRONG, True)]
    if exhaustive:
        needed = {
            kind for kind, names in ((Kind.CAPTURE, NOT_TRAINED), (Kind.CLOSE, INEXACT_GRADIENTS)) if name in names
        }
        assert needed <= {result.kind for result in first}


@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gradients(name: str, exhaustive: bool, swept: Swept) -> None:
    judge(name, swept("gradients", name), exhaustive)


@pytest.mark.parametrize("name", MODULES)
def test_training(name: str, exhaustive: bool, swept: Swept) -> None:
    judge(name, swept("training", name), exhaustive)


def test_names_that_are_listed_exist() -> None:
    assert {*NOT_TRAINED, *INEXACT_GRADIENTS, *OTHER_SECOND} <= {*DIFFERENTIABLE, *MODULES}
