"""Imports that a traced function makes while it runs.

Modules are Python state like any other, and what a function finds in them has to be found again. What it imports for
the first time is imported as in eager, outside of the trace: tensors that a module makes are real ones.
"""

from __future__ import annotations

import functools
import importlib
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

from primexec import _torch
from primexec.origins import file_of, is_library
from primexec.stand_ins import StandIns

IMPORT_MODULE = importlib.import_module.__code__


class Imports(StandIns):
    """A stand-in for `__import__`.

    Args:
        imported: is told of each module that code of others than a library imports.
    """

    def __init__(self, imported: Callable[[types.ModuleType], None]) -> None:
        super().__init__({"__import__": self._stand_in_for})
        self._imported: Any = weakref.WeakMethod(imported)

    def _stand_in_for(self, original: Callable[..., Any]) -> Callable[..., Any]:
        def stand_in(name: str, globals: Any = None, *rest: Any, **named: Any) -> Any:
            importer = (globals or {}).get("__name__", "")
            if (importer.startswith("torch.") and name in sys.modules) or not self.here():
                return original(name, globals, *rest, **named)
            make = functools.partial(original, name, globals, *rest, **named)
            # What modules of libraries import in their turn is not the function's, either.
            by_library = importer.startswith("torch.") or is_library(file_of(importer))
            return self.outside(make) if by_library else self._run(make)

        return stand_in

    def by_name(self, name: str, package: str | None) -> None:
        """`importlib.import_module` is about to run; what it raises, it will raise by itself."""
        try:
            self._run(lambda: importlib.import_module(name, package))
        except Exception:
            return

    def _run(self, make: Callable[[], types.ModuleType]) -> types.ModuleType:
        def imported() -> types.ModuleType:
            with _torch.modes_off():
                return make()

        module: types.ModuleType = self.outside(imported)
        self._imported()(module)
        return module
