"""Measuring by turns: on a machine whose speed drifts, only what ran side by side can be compared."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import repeat
from typing import Any

Call = tuple[tuple[Any, ...], dict[str, Any]]
Timed = Callable[[int, int], float]

# Long enough for the clock, and short enough that a slow spell of the machine meets every contender.
TURN_SECONDS = 0.004
ROUNDS = range(15, 1001)


@dataclass(frozen=True)
class Turns:
    """Seconds a call, a list per contender: the same position is the same round, with the same inputs."""

    seconds: Mapping[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratio(self, name: str, base: str) -> float:
        """The ratio of the medians."""
        return self.median(name) / self.median(base)

    def quartiles(self, name: str, base: str) -> tuple[float, float]:
        """How far the ratio within one round wanders."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        lower, _, upper = statistics.quantiles((mine / other for mine, other in pairs), n=4)
        return lower, upper


def turn(function: Callable[..., Any], call: Call, count: int) -> float:
    """Seconds a call, over `count` calls."""
    args, kwargs = call
    started = time.perf_counter()
    for _ in repeat(None, count):
        function(*args, **kwargs)
    return (time.perf_counter() - started) / count


def by_turns(contenders: Mapping[str, Callable[..., Any]], inputs: Callable[[], Call], seconds: float) -> Turns:
    """Let warm contenders take turns for about so many seconds, each round on fresh inputs."""
    call, drawn = inputs(), 0

    def timed(function: Callable[..., Any]) -> Timed:
        def one(number: int, count: int) -> float:
            nonlocal call, drawn
            if number != drawn:
                call, drawn = inputs(), number
            return turn(function, call, count)

        return one

    return take_turns({name: timed(function) for name, function in contenders.items()}, seconds)


def take_turns(contenders: Mapping[str, Timed], seconds: float) -> Turns:
    """As `by_turns`, of contenders that time themselves: from a round's number and a count to seconds a call."""
    names = list(contenders)
    warm = {name: min(contenders[name](0, 1) for _ in range(3)) for name in names}
    counts = {name: max(1, math.ceil(TURN_SECONDS / warm[name])) for name in names}
    one_round = sum(counts[name] * warm[name] for name in names)
    rounds = min(max(round(seconds / one_round), ROUNDS.start), ROUNDS.stop - 1)
    results: dict[str, list[float]] = {name: [] for name in names}
    for number in range(1, rounds + 1):
        first = number % len(names)
        gc.collect(0)
        gc.disable()
        for name in names[first:] + names[:first]:
            results[name].append(contenders[name](number, counts[name]))
        gc.enable()
    return Turns(results)
