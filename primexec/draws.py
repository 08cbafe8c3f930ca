"""Numbers that are drawn from the generators which Python and NumPy share: a program draws them anew at every call."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("primexec", "FRAGMENT")
_LIBRARY.define("outside_draw(str generator) -> Tensor", tags=(torch.Tag.nondeterministic_seeded,))
# The functions that give one float between 0 and 1, or between bounds, by module. Other ones are refused.
_DRAWING = {"random": ("random", "uniform"), "numpy.random": ("rand", "random", "random_sample", "uniform")}


def _draw(generator: str) -> Tensor:
    return torch.scalar_tensor(_shared(generator).uniform(0.0, 1.0), dtype=torch.float64)


_LIBRARY.impl("outside_draw", _draw, "CompositeExplicitAutograd")
DRAW = torch.ops.primexec.outside_draw.default


def _shared(module: str) -> Any:
    """The generator whose methods are the functions of a module."""
    return sys.modules[module].uniform.__self__


@dataclass(frozen=True, slots=True)
class Outside:
    """One of these generators, with the methods of torch's."""

    module: str

    def get_state(self) -> Any:
        return _shared(self.module).getstate() if self.module == "random" else _shared(self.module).get_state()

    def set_state(self, state: Any) -> None:
        if self.module == "random":
            _shared(self.module).setstate(state)
        else:
            _shared(self.module).set_state(state)


def generators() -> list[Outside]:
    """Those whose modules are imported."""
    return [Outside(module) for module in _DRAWING if module in sys.modules]


@contextmanager
def recorded(give: Callable[[str], Any]) -> Iterator[None]:
    """In this thread, numbers come from elsewhere.

    Args:
        give: gives a number between 0 and 1 in place of a module's; None where the module is to draw itself.
    """
    thread = threading.get_ident()
    places = [(sys.modules[m], name) for m, names in _DRAWING.items() if m in sys.modules for name in names]
    originals = [(module, name, getattr(module, name)) for module, name in places]

    def standing_in(module: str, name: str, original: Any) -> Any:
        def draw(*args: Any, **kwargs: Any) -> Any:
            bounds = _bounds(name, *args, **kwargs) if threading.get_ident() == thread else None
            number = None if bounds is None else give(module)
            if bounds is None or number is None:
                return original(*args, **kwargs)
            return bounds[0] + (bounds[1] - bounds[0]) * number if name == "uniform" else number

        draw.__self__ = original.__self__  # type: ignore[attr-defined]  # by which the generator is known
        return draw

    try:
        for module, name, original in originals:
            setattr(module, name, standing_in(module.__name__, name, original))
        yield
    finally:
        for module, name, original in originals:
            setattr(module, name, original)


def _bounds(name: str, *args: Any, **kwargs: Any) -> tuple[Any, Any] | None:
    """Between which numbers a function draws; None where it is asked for more than one."""
    if name != "uniform":
        return None if args or kwargs else (0.0, 1.0)
    given = {**dict(zip(("low", "high", "size"), args, strict=False)), **kwargs}
    low, high = given.pop("low", given.pop("a", 0.0)), given.pop("high", given.pop("b", 1.0))
    plain = isinstance(low, (int, float)) and isinstance(high, (int, float)) and given.pop("size", None) is None
    return (low, high) if plain and not given else None
