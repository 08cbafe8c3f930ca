"""What Python's `float` and the functions of its `math` make of numbers that are part of the program.

They are written in C, and want values. In the thread that captures, stand-ins take their place: those of `math` while
the function runs, that of `float` for the one instruction that loads it to be called, or in a module of torch.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from primexec.numbers import Number, reckon

_FUNCTIONS = (
    "acos", "acosh", "asin", "asinh", "atan", "atan2", "atanh", "copysign", "cos", "cosh", "degrees", "erf", "erfc",
    "exp", "expm1", "fabs", "fmod", "hypot", "log", "log10", "log1p", "log2", "pow", "radians", "sin", "sinh", "sqrt",
    "tan", "tanh",
)  # fmt: skip


# What the names stand in of functions of torch that make a float of a loss.
_READERS = [vars(torch.optim.lr_scheduler)]


@contextmanager
def recorded() -> Iterator[None]:
    """In this thread, functions of `math` of such numbers are part of the program."""
    thread = threading.get_ident()
    originals = {name: getattr(math, name) for name in _FUNCTIONS}

    def standing_in(original: Any) -> Any:
        def call(*args: Any) -> Any:
            ours = threading.get_ident() == thread and any(issubclass(type(a), Number) for a in args)
            return reckon(original, args, float) if ours else original(*args)

        return call

    names = [held for held in _READERS if "float" not in held]
    try:
        for name, original in originals.items():
            setattr(math, name, standing_in(original))
        for held in names:
            held["float"] = float_stand_in()
        yield
    finally:
        for name, original in originals.items():
            setattr(math, name, original)
        for held in names:
            del held["float"]


class _Stand(type):
    """Others may meet what stands in for `float` as well, and ask what is one."""

    thread = 0

    def __instancecheck__(cls, value: Any) -> bool:
        return isinstance(value, _FLOAT)

    def __subclasscheck__(cls, kind: type) -> bool:
        return issubclass(kind, _FLOAT)

    def __call__(cls, *args: Any) -> Any:
        value: Any = args[0] if args else 0.0
        if threading.get_ident() != cls.thread or not issubclass(type(value), (Tensor, Number)):
            return _FLOAT(*args)
        if issubclass(type(value), Tensor) and value.is_floating_point() and type(n := value.numel()) is int and n == 1:
            value = value.item()
        if issubclass(type(value), Number) and (value.node.kind is _FLOAT or value.varies()):
            return value if value.node.kind is _FLOAT else reckon(_FLOAT, (value,), _FLOAT)
        return _FLOAT(value)


_FLOAT: Any = float  # itself, whatever stands in its place


def float_stand_in() -> Any:
    """What stands in for `float` in this thread."""
    _Stand.thread = threading.get_ident()
    return _STAND_IN


_STAND_IN = _Stand("float", (), {})
