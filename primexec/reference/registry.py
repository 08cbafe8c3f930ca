"""The references by the names of their operators."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import wraps
from typing import Any, TypeVar

import numpy as np

Function = Callable[..., Any]
F = TypeVar("F", bound=Function)

FUNCTIONS: dict[str, Function] = {}
DECLINED: dict[str, str] = {}


def reference(*names: str) -> Callable[[F], F]:
    """Register a function as the meaning of operators, such as `prims.exp.default`.

    The registered function returns arrays also where NumPy returns scalars, and raises no floating-point warnings.
    """

    def register(function: F) -> F:
        for name in names:
            if name in FUNCTIONS or name in DECLINED:
                raise ValueError(f"{name} has a reference already")
            FUNCTIONS[name] = _arrays(function)
        return function

    return register


def decline(names: Iterable[str], reason: str) -> None:
    """Record why operators have no reference."""
    DECLINED.update(dict.fromkeys(names, reason))


def _arrays(function: Function) -> Function:
    @wraps(function)
    def quiet(*args: Any, **kwargs: Any) -> Any:
        with np.errstate(all="ignore"):
            result = function(*args, **kwargs)
        if isinstance(result, tuple):
            return tuple(r if r is None else np.asarray(r) for r in result)
        return np.asarray(result) if isinstance(result, np.generic) else result

    return quiet
