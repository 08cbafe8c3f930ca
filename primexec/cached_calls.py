"""Functions under `functools.lru_cache`, as a traced function calls them.

What such a function returns hangs on no name, and a trace must not leave its tensors in the cache. So while a capture
runs, a stand-in calls the function outside of the trace, as eager would; tensors that it returns are inputs of the
program. Whoever checks the program makes the same call again, and finds the same, for as long as the cache does.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections.abc import Callable
from typing import Any

import torch

from primexec import _torch, statics
from primexec.origins import is_plain_object

CACHED = type(functools.cache(len))


class CachedCalls:
    """The stand-ins of one capture.

    Args:
        record: takes a getter and a label of what has to be found again.
    """

    def __init__(self, record: Callable[[Callable[[], Any], str], None]) -> None:
        self._record: Any = weakref.WeakMethod(record)
        self._running, self._thread = True, threading.get_ident()
        self._recorded: set[Any] = set()
        self._misses: dict[int, tuple[Any, int]] = {}
        self._places: list[tuple[Callable[[], Any], Callable[[Any], None], Any, Any]] = []

    def watch(self, cached: Any) -> None:
        """Remember how often a function had to compute."""
        self._misses.setdefault(id(cached), (cached, cached.cache_info().misses))

    def replace(self, cached: Any, get: Callable[[], Any], set_: Callable[[Any], None], label: str) -> None:
        """Put a stand-in in the place of a function."""
        if not self._running:
            return

        @functools.wraps(cached)
        def stand_in(*args: Any, **kwargs: Any) -> Any:
            return self._call(cached, label, args, kwargs)

        stand_in.__dict__.update({name: getattr(cached, name) for name in ("cache_info", "cache_clear")})
        set_(stand_in)
        self._places.append((get, set_, stand_in, cached))

    def _call(self, cached: Any, label: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        key = tuple(map(_key, (*args, *kwargs, *kwargs.values())))
        if None in key or threading.get_ident() != self._thread or torch.get_default_device().type != "cpu":
            return cached(*args, **kwargs)
        with _torch.modes_off():
            value = cached(*args, **kwargs)
        again = id(cached), key
        if again not in self._recorded:
            self._recorded.add(again)
            self._record()(functools.partial(cached, *args, **kwargs), f"{label}({', '.join(map(repr, args))})")
        return value

    def put_back(self) -> None:
        """Take the stand-ins away again; no others are put in their places."""
        self._running = False
        for get, set_, stand_in, cached in reversed(self._places):
            if get() is stand_in:
                set_(cached)
        self._places.clear()

    def forget(self) -> None:
        """Empty the caches of functions that computed in a trace that failed: they may hold tensors of it."""
        for cached, misses in self._misses.values():
            if cached.cache_info().misses != misses:
                cached.cache_clear()


def _key(value: Any) -> Any:
    """What tells a call from others; None where it cannot be made again outside of the trace."""
    held = is_plain_object(value) and not isinstance(value, (torch.Tensor, torch.nn.Module))
    return statics.Identity(value) if held else statics.freeze_static(value)
