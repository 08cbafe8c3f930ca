"""Loops of vectors that together cover a range, wherever it begins and ends."""

from __future__ import annotations

from dataclasses import dataclass

from primexec.executors.llvm.emit import Emitter


@dataclass(frozen=True, slots=True)
class Span:
    """A loop.

    Attributes:
        start: of its index.
        stop: end of its index.
        step: from one index to the next.
        lanes: elements of a vector.
        place: where the only vector lies; None for the index itself.
        main: whether it covers all but the edges.
        masked: whether only lanes before `stop` count.
    """

    start: str
    stop: str
    step: int | str
    lanes: int
    place: str | None = None
    main: bool = False
    masked: bool = False


def once(e: Emitter, begin: str, end: str, lanes: int, masked: bool) -> list[Span]:
    """Every point is visited once: whole vectors, then some lanes of another, or single elements."""
    middle = whole(e, begin, end, lanes)
    rest = Span(middle, end, lanes, lanes, masked=True) if masked and lanes > 1 else Span(middle, end, 1, 1)
    found = [Span(begin, middle, lanes, lanes, main=True), rest]
    return [s for s in found if s.start != s.stop]


def back(e: Emitter, begin: str, end: str, lanes: int, rest: int) -> list[Span]:
    """What remains behind the whole vectors is a vector that reaches back into them: it repeats what they did."""
    if not rest:
        return [Span(begin, end, lanes, lanes, main=True)]
    middle, width = whole(e, begin, end, lanes), 1 << (rest - 1).bit_length()
    main = Span(begin, middle, lanes, lanes, main=True)
    return [main, Span(middle, end, lanes, width, before(e, end, width))]


def edged(e: Emitter, begin: str, first: str, end: str, lanes: int) -> list[Span]:
    """Vectors from `first`, less than one behind the beginning, on; before them the two at the edges."""
    last, stop = before(e, end, lanes), before(e, end, lanes - 1)
    edges = Span(begin, stop, str(int(last) - int(begin)), lanes)
    return [edges, Span(first, stop, lanes, lanes, main=True)]


def whole(e: Emitter, begin: str, end: str, lanes: int) -> str:
    """Where the last whole vector from `begin` to `end` ends."""
    if begin.isdigit() and end.isdigit():
        return str(int(end) - (int(end) - int(begin)) % lanes)
    count = e.emit(f"sub i64 {end}, {begin}")
    return e.emit(f"add i64 {begin}, {e.emit(f'and i64 {count}, {-lanes}')}")


def before(e: Emitter, index: str, by: int) -> str:
    """An index that lies so many elements before another."""
    return str(int(index) - by) if index.isdigit() else e.emit(f"sub i64 {index}, {by}")
