"""Attributes that are asked for by names that stand nowhere in the code that asks.

Python's `getattr` and its like may be given any name: stand-ins for them tell which. Getters that were made before know
their names, and whoever keeps the real functions may ask for any.
"""

from __future__ import annotations

import functools
import operator
import re
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from primexec.origins import is_run_by_torch
from primexec.stand_ins import StandIns

# Whether a function asks for the attribute, or only sets it.
ASKING = {"getattr": True, "hasattr": True, "setattr": False, "delattr": False}
REAL = (getattr, hasattr, object.__getattribute__, type.__getattribute__, vars)
FORMATTERS = frozenset({"format", "format_map"})


class Disguised:
    """What says that it is of another class, and has attributes which objects of that class do not have."""


def stand_ins(ask: Callable[[str, bool], None]) -> StandIns:
    """Stand-ins for the functions that are given the names of attributes.

    Args:
        ask: is told each name, and whether its value is asked for.
    """
    told: Any = weakref.WeakMethod(ask)

    def make(original: Any, asks: bool) -> Any:
        def stand_in(*args: Any) -> Any:
            # Most ask from torch's own code, and each call of a Python function from here is watched.
            if len(args) > 1 and isinstance(args[1], str):
                by_torch = is_run_by_torch(sys._getframe(1).f_code.co_filename)
                sets = not asks and issubclass(type(args[0]), torch.nn.Module)  # as hooks of torch.nn.utils do
                if (sets or not by_torch) and made.here():
                    by_torch = made.outside(lambda: told()(args[1], asks))
                    if not by_torch and issubclass(type(args[0]), Disguised) and isinstance(args[0], (int, float)):
                        args = (_as_it_says(args[0], args[1], asks), *args[1:])
            return original(*args)

        return stand_in

    made = StandIns({name: functools.partial(make, asks=asks) for name, asks in ASKING.items()})
    return made


def _as_it_says(disguised: Any, name: str, asks: bool) -> Any:
    """Another object of the class that it says it is of, where those answer in another way."""
    kind = disguised.__class__
    return disguised if asks and name in dir(kind) else kind()


def names_in(value: Any) -> set[str]:
    """The names of attributes that an object made before will ask for when it is called."""
    if isinstance(value, (operator.attrgetter, operator.methodcaller)):
        names = value.__reduce__()[1] if isinstance(value, operator.attrgetter) else _name_of(value)
        return {part for name in names for part in name.split(".")}
    if isinstance(value, types.BuiltinMethodType) and value.__name__ in FORMATTERS and isinstance(value.__self__, str):
        return fields_of(value.__self__)
    return set()


def _name_of(call: Any) -> tuple[str]:
    """A method's name; where there are keywords, `__reduce__` makes a partial of methodcaller and it."""
    made, args, *_ = call.__reduce__()
    return (made.args[0] if hasattr(made, "args") else args[0],)


def fields_of(text: str) -> set[str]:
    """The attributes that `text.format(...)` asks for."""
    return set(re.findall(r"\.(\w+)", text))
