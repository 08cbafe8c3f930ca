"""Functions in place of Python's own, in the thread that captures and for as long as it does."""

from __future__ import annotations

import builtins
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

from primexec._torch_dynamo import never_compiled, replaced


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
            originals = [(name, getattr(builtins, name)) for name in self._make]
            self._places = [(name, original, self._make[name](original)) for name, original in originals]
            for _, _, stand_in in self._places:
                never_compiled(stand_in)  # in other threads
            replaced.extend((builtins, name, original) for name, original in originals)
        self.resume()

    def stop(self) -> None:
        self._runs -= 1
        self.pause()
        if self._runs == 0:
            del replaced[len(replaced) - len(self._places) :]
            self._places.clear()

    def pause(self) -> None:
        """Let Python's own stand there while PyTorch's code runs, which asks 300 times an operator."""
        for name, original, stand_in in self._places:
            if _BUILTINS[name] is stand_in:  # else somebody else stands before it
                _BUILTINS[name] = original

    def resume(self) -> None:
        """End a pause."""
        for name, original, stand_in in self._places:
            if _BUILTINS[name] is original:
                _BUILTINS[name] = stand_in


_BUILTINS: dict[str, Any] = builtins.__dict__


def loading(name: str, stand_in: Any, places: frozenset[int], inner: Any) -> Any:
    """Watches a frame, in which these instructions load a builtin that is called: they get its stand-in.

    Nobody else meets it, for classes are asked for by identity, too.
    """
    original = _BUILTINS[name]

    def watch(frame: types.FrameType, event: str, arg: Any) -> Any:
        nonlocal inner
        if _BUILTINS[name] is stand_in:
            _BUILTINS[name] = original
        if event != "opcode":
            inner = inner(frame, event, arg) if inner is not None else None
        elif frame.f_lasti in places:
            _BUILTINS[name] = stand_in
        return watch

    return watch
