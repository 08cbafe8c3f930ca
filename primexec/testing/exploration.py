"""Plans drawn at random, and the smallest one that fails."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis.strategies import SearchStrategy

from primexec.testing.checks import BrokenRuleError
from primexec.testing.report import Finding


def explore(
    plans: SearchStrategy[Any], attempt: Callable[[Any], bool], name: str, count: int, start: int
) -> tuple[int, list[Finding]]:
    """Try `count` plans, drawn from a seed: how many ran, and what is wrong with the smallest one found that fails."""
    ran = 0

    @seed(start)
    @settings(
        max_examples=max(count, 1), deadline=None, database=None, phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck), report_multiple_bugs=False,
    )  # fmt: skip
    @given(plans)
    def each(plan: Any) -> None:
        nonlocal ran
        ran += attempt(plan)

    try:
        each()
    except BrokenRuleError as error:
        return ran, [Finding(name, "", error.rule, str(error))]
    return ran, []
