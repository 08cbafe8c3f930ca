"""Which Python state a function reads while it is traced, so that the guards can check it again.

While a capture runs, `Reads` is the thread's trace function. When a Python function is entered for the
first time, its bytecode tells which globals and attribute names it may read. Every object that can be
reached from the traced function (its closure, its globals, `self`, the module tree) is a namespace; the
values under those names are recorded before the code runs.

After the trace the recorded values are compared once more: a difference is a side effect on Python state.
"""

from __future__ import annotations

import os
import sys
import types
from typing import Any

import torch

from primexec import _torch, _torch_capture, origins
from primexec.bytecode import (
    COMPILED,
    IDENTITY,
    TYPES,
    CodeNames,
    is_refused,
    loaded_by,
    names_of,
    refused,
    running_in,
)
from primexec.config import READ_ENVIRONMENT, environment
from primexec.contents import contents_of
from primexec.errors import SourceLine
from primexec.imports import IMPORT_MODULE, Imports
from primexec.lookups import ASKING, Disguised, stand_ins
from primexec.namespaces import Cell, Namespace
from primexec.reaching import Reaching
from primexec.record import ORDERED
from primexec.stand_ins import loading


class Reads(Reaching):
    """Records what is read; installed with `sys.settrace` while the function runs.

    Args:
        varying: labels of numbers that are not recorded but collected, for they are inputs of the program.
    """

    def __init__(self, fn: object, varying: frozenset[str] = frozenset()) -> None:
        super().__init__(varying)
        self.codes: dict[tuple[int, int], types.CodeType] = {}  # by their identity and that of their globals
        self.reflective = False  # user code asked for attributes by computed or optional names
        self._imports = Imports(self._reach_import)
        self._lookups = stand_ins(self._ask)
        self._floats: dict[tuple[int, int], frozenset[int]] = {}  # by the same, where in code `float` is called
        self._unseen: dict[tuple[int, int], set[str]] = {}  # the same of methods of optimizers and their like: names
        self.float: Any = float  # what stands in for it there
        self.disguised = False  # arguments are there that say they are of another class
        self._previous: Any = None
        self.suspects: dict[str, SourceLine] = {}
        self.fn = fn
        self.reach(fn, "self" if isinstance(fn, torch.nn.Module) else getattr(fn, "__name__", "fn"))

    # Watching ------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._previous = sys.gettrace()
        sys.settrace(self.enter)
        self._imports.start()
        self._lookups.start()

    def stop(self) -> None:
        self._lookups.stop()
        self._imports.stop()
        sys.settrace(self._previous)

    def pause(self) -> Any:
        """Stop watching until `resume` gets what this returns."""
        watching = sys.gettrace()
        sys.settrace(None)
        if watching is not None:
            self._lookups.pause()
            self._imports.pause()
        return watching

    def resume(self, watching: Any) -> None:
        if watching is not None:
            self._lookups.resume()
            self._imports.resume()
        sys.settrace(watching)

    def enter(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if is_refused(frame):
            raise self.refuse(*(COMPILED if running_in(frame, "_dynamo") else refused()[code]))
        if code is IMPORT_MODULE:
            self._imports.by_name(frame.f_locals["name"], frame.f_locals["package"])
        key = id(code), id(frame.f_globals)
        if key not in self.codes:
            names = names_of(code)
            self.codes[key] = code
            if names is not None:
                self._read(names, frame)
                self._floats |= {key: names.floats} if names.floats else {}
            elif code is _CALL_OF_MODULES:
                self._reach_tables(_torch.global_hooks(), "hooks of all modules")
            elif issubclass(type(frame.f_locals.get("self")), origins.STATEFUL):
                self._unseen[key] = loaded_by(code)
            if "state" in code.co_names and names is None and code.co_filename.startswith(_TORCH):
                self._record_states()
        if key in self._unseen:
            self._note_found(frame, self._unseen[key])
        local = self._previous(frame, event, arg) if self._previous is not None else None
        names = names_of(code) if self.varying or self.disguised else None
        if names is not None and names.typed | names.typed_at:
            local = self._watching_types(names, local)
        if key in self._floats:
            frame.f_trace_opcodes = True
            return loading("float", self.float, self._floats[key], local)
        return local

    @_torch_capture.modules_themselves()
    def _record_states(self) -> None:
        """Code that is not watched is about to ask for the state of optimizers."""
        self._states_asked = True
        for namespace in self._optimizers:
            self._record(namespace, "state")

    def _note_found(self, frame: types.FrameType, names: set[str]) -> None:
        """Note which attributes that a method asks for hold what they did before the function ran."""
        held = getattr(frame.f_locals.get("self"), "__dict__", None)
        if (namespace := self.namespaces.get(id(held))) is not None:
            originals = namespace.originals
            namespace.found |= {n for n in names & originals.keys() if namespace.held.get(n) is originals[n]}

    def _watching_types(self, names: CodeNames, inner: Any) -> Any:
        """Watches a frame that asks for exact types: whether it may ask for that of a number that varies."""

        def watch(frame: types.FrameType, event: str, arg: Any) -> Any:
            nonlocal inner
            inner = inner(frame, event, arg) if inner is not None else None
            of_number = any(issubclass(type(frame.f_locals.get(name)), Disguised) for name in names.typed)
            if of_number or (event == "line" and frame.f_lineno in names.typed_at):
                source = SourceLine(frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_qualname)
                self.suspects.setdefault(TYPES, source)
            return watch

        return watch

    @_torch_capture.modules_themselves()
    def _read(self, names: CodeNames, frame: types.FrameType) -> None:
        for topic, line in names.suspects.items():
            self.suspects.setdefault(topic, SourceLine(frame.f_code.co_filename, line, frame.f_code.co_qualname))
        if frame.f_code.co_freevars:
            self._reach_method(frame)
        if names.globals:
            file = os.path.basename(frame.f_code.co_filename)
            namespace = self._namespace(frame.f_globals, f"global of {file}: ")
            builtin = self._namespace(frame.f_builtins, "builtins.")
            for name in names.globals:
                # A name that is not there is a builtin, unless the code itself is about to set it.
                self._record(namespace, name)
                if name not in frame.f_globals and name in frame.f_builtins and name not in _STOOD_IN_FOR:
                    self._record(builtin, name)
        if not READ_ENVIRONMENT.isdisjoint(names.attributes) or not READ_ENVIRONMENT.isdisjoint(names.globals):
            self._watch_container(environment(), "environment variables")
        if "globals" in names.globals:
            self._watch_container(frame.f_globals, "globals()")
        if names.modules:
            for module in origins.user_modules():
                self._reach_import(module)
        self.reflective |= names.reflective
        self.loaded |= names.loaded
        if new := names.attributes - self._names:
            self._know(new)
        if names.everything > self._everything:
            self._raise_to(names.everything)

    @_torch_capture.modules_themselves()
    def _ask(self, name: str, asks: bool) -> None:
        """Code is about to ask for an attribute, or to set it, by a name that it computed."""
        if asks:
            self.loaded.add(name)
        if name not in self._asked:
            self._asked.add(name)
            self._know({name})

    def _reach_method(self, frame: types.FrameType) -> None:
        """Find the function a method frame runs through its class, for the cells of its decorators."""
        code = frame.f_code
        if code.co_argcount and (owner := frame.f_locals.get(code.co_varnames[0])) is not None:
            for cls in type(owner).__mro__:
                if code.co_name in cls.__dict__:
                    self.reach(cls.__dict__[code.co_name], f"{cls.__name__}.{code.co_name}")

    @_torch_capture.modules_themselves()
    def _reach_import(self, module: types.ModuleType) -> None:
        self.draws |= origins.is_random(module)
        if not origins.is_trusted_module(module):
            name = module.__name__
            self.reach(module, name)
            if sys.modules.get(name) is module:  # another may take its place
                self._record(self._namespace(sys.modules, "sys.modules: "), name)

    # Afterwards ----------------------------------------------------------------------------------------

    def made_inside(self, value: object) -> bool:
        """Whether a function or module hangs on nothing outside: eager makes a new one at every call."""
        return isinstance(value, (torch.nn.Module, types.FunctionType)) and id(value) not in self._seen

    def reached(self) -> dict[int, Any]:
        """What the recorded places hold now, what stands in it, and what else was reached, by its identity."""
        held = [n.get(name) for n in self.namespaces.values() for name in n.values if name in n.held]
        return self._seen | contents_of([*held, *(c.get() for c in self.cells), *(c.value for c in self.containers)])

    def asks_for(self, name: str) -> bool:
        """Whether code that ran names this attribute."""
        return name in self._names

    def restore(self) -> None:
        """Put back what the traced code changed."""
        self.cached_calls.forget()
        super().restore()

    def settle(self) -> None:
        """Let go of what only the capture needed: replaced weights must not live on in a record of them."""
        compared = self._seen.values() if IDENTITY in self.suspects else ()
        containers = [v for v in compared if isinstance(v, ORDERED)]
        self._seen = {id(v): v for v in (*self.modules(), *containers)}
        self._objects.clear()
        codes = {code for code, _ in self.codes}
        self.keep("__code__", [fn for fn in self._functions if id(fn.__code__) in codes])
        self.keep("__mro__", list(self._classes.keys() & self._looked_at))
        self._functions.clear()
        self._closed_over.clear()
        self._pinned.clear()
        self.fixed.clear()
        self.codes.clear()
        self.generators.clear()
        for namespace in self.namespaces.values():
            for name in [n for n in namespace.made if namespace.is_unasked(n, self.loaded)]:
                namespace.forget(name)
        self.namespaces = {k: n for k, n in self.namespaces.items() if n.values or n.keys is not None}
        places: list[Namespace | Cell] = [*self.namespaces.values(), *self.cells]
        for place in places:
            place.settle()
        self.__dict__.pop("refuse", None)
        self.__dict__.pop("number_found", None)


_TORCH = _torch.torch_directory()
_STOOD_IN_FOR = frozenset({*ASKING, "__import__"})
_CALL_OF_MODULES = torch.nn.Module._call_impl.__code__
