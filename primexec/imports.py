"""Imports that a traced function makes while it runs.

Modules are Python state like any other, and what a function finds in them has to be found again. What it imports for
the first time is imported as in eager, outside of the trace: tensors that a module makes are real ones.
"""

from __future__ import annotations

import builtins
import importlib
import sys
import threading
import types
import weakref
from collections.abc import Callable
from typing import Any

from primexec import _torch
from primexec.origins import file_of, is_library

IMPORT_MODULE = importlib.import_module.__code__


class Imports:
    """A stand-in for `__import__` in the thread that captures.

    Args:
        imported: is told of each module that code of others than a library imports.
    """

    def __init__(self, imported: Callable[[types.ModuleType], None]) -> None:
        self._imported: Any = weakref.WeakMethod(imported)
        self._import: Any = builtins.__import__
        self._runs = 0  # bodies of control flow start once more
        self._thread = threading.get_ident()
        self._outside = False  # the body of a module that is imported runs, and is none of the traced function's

    def start(self) -> None:
        self._runs += 1
        if self._runs == 1:
            self._import, builtins.__import__ = builtins.__import__, self._stand_in

    def stop(self) -> None:
        self._runs -= 1
        if self._runs == 0 and builtins.__import__ == self._stand_in:  # else somebody else stands before it
            builtins.__import__ = self._import

    def _stand_in(self, name: str, globals: Any = None, *rest: Any, **named: Any) -> Any:
        importer = (globals or {}).get("__name__", "")
        if not self._runs or self._outside or threading.get_ident() != self._thread or is_library(file_of(importer)):
            return self._import(name, globals, *rest, **named)
        return self._run(lambda: self._import(name, globals, *rest, **named))

    def by_name(self, name: str, package: str | None) -> None:
        """`importlib.import_module` is about to run; what it raises, it will raise by itself."""
        try:
            self._run(lambda: importlib.import_module(name, package))
        except Exception:
            return

    def _run(self, make: Callable[[], types.ModuleType]) -> types.ModuleType:
        trace = sys.gettrace()
        sys.settrace(None)
        self._outside = True
        try:
            with _torch.modes_off():
                module = make()
        finally:
            self._outside = False
            sys.settrace(trace)
        self._imported()(module)
        return module
