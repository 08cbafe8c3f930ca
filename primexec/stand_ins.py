"""Functions in place of Python's own, in the thread that captures and for as long as it does."""

from __future__ import annotations

import builtins
import sys
import threading
from collections.abc import Callable
from typing import Any


class StandIns:
    """What stands in for some of `builtins`.

    Args:
        make: by the name of a function, what makes of the original its stand-in. Where `here()` is false, a stand-in
            must do what the original does: others may call it, and keep it.
    """

    def __init__(self, make: dict[str, Callable[[Any], Any]]) -> None:
        self._make = make
        self._places: list[tuple[str, Any, Any]] = []
        self._runs = 0  # bodies of control flow start once more
        self._thread = threading.get_ident()
        self._outside = False

    def here(self) -> bool:
        """Whether the traced function runs, in this thread."""
        return self._runs > 0 and not self._outside and threading.get_ident() == self._thread

    def outside(self, run: Callable[[], Any]) -> Any:
        """Run what is none of the traced function's; no context manager, for these call stand-ins themselves."""
        trace = sys.gettrace()
        self._outside = True
        sys.settrace(None)
        try:
            return run()
        finally:
            self._outside = False
            sys.settrace(trace)

    def start(self) -> None:
        self._runs += 1
        if self._runs == 1:
            for name, make in self._make.items():
                original = getattr(builtins, name)
                self._places.append((name, original, make(original)))
                setattr(builtins, name, self._places[-1][2])

    def stop(self) -> None:
        self._runs -= 1
        if self._runs == 0:
            while self._places:
                name, original, stand_in = self._places.pop()
                if getattr(builtins, name) is stand_in:  # else somebody else stands before it
                    setattr(builtins, name, original)
