"""Numbers that are drawn from the generators which Python and NumPy share: a program draws them anew at every call."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

_LIBRARY = torch.library.Library("primexec", "FRAGMENT")
_LIBRARY.define(
    "outside_draw(str generator, str function, Scalar[] arguments) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)
# The functions that give one number, by module, and what their arguments are called. Other ones are refused.
_DRAWING: dict[str, dict[str, tuple[str, ...]]] = {
    "random": {
        "random": (), "uniform": ("a", "b"), "randint": ("a", "b"), "randrange": ("start", "stop", "step"),
        "choice": ("seq",), "betavariate": ("alpha", "beta"), "expovariate": ("lambd",), "gauss": ("mu", "sigma"),
        "normalvariate": ("mu", "sigma"), "triangular": ("low", "high", "mode"),
    },
    "numpy.random": {
        "rand": (), "randn": (), "random": (), "random_sample": (), "standard_normal": (), "uniform": ("low", "high"),
        "randint": ("low", "high"), "beta": ("a", "b"), "exponential": ("scale",), "gamma": ("shape", "scale"),
        "normal": ("loc", "scale"),
    },
}  # fmt: skip
_INTS = frozenset({"randint", "randrange"})
_LARGEST = 2**62


def _draw(generator: str, function: str, arguments: list[int | float]) -> Tensor:
    dtype = torch.int64 if function in _INTS else torch.float64
    return torch.scalar_tensor(getattr(_shared(generator), function)(*arguments), dtype=dtype)


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
def recorded(give: Callable[[str, str, list[int | float], type], Any]) -> Iterator[None]:
    """In this thread, numbers come from elsewhere.

    Args:
        give: gives a number of a class in place of a function of a module; None where that is to draw itself.
    """
    thread = threading.get_ident()
    places = [(sys.modules[m], name) for m, names in _DRAWING.items() if m in sys.modules for name in names]
    originals = [(module, name, getattr(module, name)) for module, name in places]

    def standing_in(module: str, name: str, original: Any) -> Any:
        def draw(*args: Any, **kwargs: Any) -> Any:
            given = _bound(_DRAWING[module][name], args, kwargs) if threading.get_ident() == thread else None
            number = None if given is None else _number(partial(give, module), name, given)
            return original(*args, **kwargs) if number is None else number

        draw.__self__ = original.__self__  # type: ignore[attr-defined]  # by which the generator is known
        return draw

    try:
        for module, name, original in originals:
            setattr(module, name, standing_in(module.__name__, name, original))
        yield
    finally:
        thread = 0  # whoever has kept one draws as ever
        for module, name, original in originals:
            setattr(module, name, original)


def _bound(names: tuple[str, ...], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any] | None:
    """The arguments in their order; None where it is asked for more than one number, or in another way."""
    rest = names[len(args) : len(args) + len(kwargs)]
    return [*args, *(kwargs[n] for n in rest)] if len(args) <= len(names) and {*rest} == kwargs.keys() else None


def _number(give: Callable[[str, list[int | float], type], Any], name: str, given: list[Any]) -> Any:
    """What a function gives; None where it is to draw itself."""
    if name == "choice":  # one of these is drawn as `randrange` draws
        place = give("randrange", [len(given[0])], int) if given and len(given[0]) else None
        return None if place is None else given[0][place]
    if name == "uniform" and all(isinstance(v, (int, float)) for v in given):  # they may be part of the program
        bounds = [*given, *[0.0, 1.0][len(given) :]]
        number = give("random", [], float)
        return None if number is None else bounds[0] + (bounds[1] - bounds[0]) * number
    plain = all(type(v) in (int, float) and -_LARGEST < v < _LARGEST for v in given)
    return give(name, given, int if name in _INTS else float) if plain else None
