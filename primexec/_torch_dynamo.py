"""Dynamo, of which no more is imported than fake tensors ask for: a part of `_torch.py`.

For two settings and two names PyTorch's fake tensors import all of Dynamo: 0.8 of the 1.4 seconds of a first call. Here
the package is there with these alone, and becomes the whole when somebody asks for more, as by importlib's LazyLoader.

What a capture puts in the place of Python's and PyTorch's own functions must not be met by Dynamo, which knows them by
their identity: it neither begins nor compiles in another thread meanwhile.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import os
import sys
import threading
import types
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

from primexec._torch import modes_off, private

_PACKAGE, _SOURCES = "torch._dynamo", "torch._dynamo.source"
_not_disabled: list[Any] = []
_early: list[tuple[types.ModuleType, str]] = []  # what stands in deferred modules in the place of what they will hold
replaced: list[tuple[Any, str, Any]] = []  # (owner, name, original) of what captures have put a stand-in for
_lock = threading.RLock()
PATIENCE = 10  # seconds that an import waits for a capture, which itself may wait for what is imported


def _reset_lock_after_fork() -> None:
    global _lock
    _lock = threading.RLock()


os.register_at_fork(after_in_child=_reset_lock_after_fork)


@contextmanager
def capture_lock() -> Iterator[None]:
    """Held while anything is captured: part of PyTorch's tracing state belongs to the process."""
    with _lock:
        compiler = sys.modules.get(f"{_PACKAGE}.convert_frame")
        with getattr(compiler, "compile_lock", nullcontext()):
            yield


def defer_dynamo() -> None:
    """Have Dynamo imported when somebody asks for more of it than fake tensors do, unless it is there already."""
    if _PACKAGE not in sys.modules:
        sys.meta_path.insert(0, _Deferring)
    importlib.import_module(_PACKAGE)  # another thread may be about to


class _Deferring:
    """Finds the package and its module of sources, and loads little of them; later, parts that came with the whole."""

    @staticmethod
    def find_spec(name: str, path: Sequence[str] | None, target: object = None) -> Any:
        if target is not None or not name.startswith(_PACKAGE):
            return None
        if name in sys.modules:  # Python asked for the package's path, which made it whole, and would load a part again
            sys.modules[name].__spec__ = again = importlib.machinery.ModuleSpec(name, _Again(sys.modules[name]))  # type: ignore[arg-type]
            return again
        spec: Any = importlib.machinery.PathFinder.find_spec(name, path) if name in (_PACKAGE, _SOURCES) else None
        if spec is not None:
            spec.loader = _Deferring
        return spec

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return types.ModuleType(spec.name)

    @staticmethod
    def exec_module(module: types.ModuleType) -> None:
        if module.__name__ == _PACKAGE:
            importlib.import_module(f"{_PACKAGE}.config")
            importlib.import_module(_SOURCES)
            del module.__path__  # what an import of any other part asks for
            names: dict[str, Any] = {"disable": _disable}
        else:
            source = _source_class()
            names = {"ConstantSource": source, "AttrSource": source, "RandomValueSource": ()}  # which nothing is yet
        vars(module).update(names)
        _early.extend((module, name) for name in names)
        module.__class__ = _Deferred


class _Again:
    """Gives a part that is there, with the specification that it had."""

    def __init__(self, module: types.ModuleType) -> None:
        self.module, self.spec = module, module.__spec__

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return self.module

    def exec_module(self, module: types.ModuleType) -> None:
        module.__spec__ = self.spec


class _Deferred(types.ModuleType):
    """A module of which little is there."""

    def __getattr__(self, name: str) -> Any:
        # Who looks through all modules asks for `__warningregistry__` and its like.
        if name.startswith("__") and (name, self.__name__) not in (("__path__", _PACKAGE), ("__all__", _PACKAGE)):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        self._load()
        return types.ModuleType.__getattribute__(self, name)

    def _load(self) -> None:
        """Import the whole package, and then this part, which the package itself may ask for meanwhile."""
        held = _lock.acquire(timeout=PATIENCE)
        try:
            while _early:
                delattr(*_early.pop())
            for module in (sys.modules[_PACKAGE], self):
                if vars(module)["__spec__"].loader is _Deferring:
                    with _as_outside():
                        importlib.reload(module)
                    module.__class__ = types.ModuleType
        finally:
            if held:
                _lock.release()


@contextmanager
def _as_outside() -> Iterator[None]:
    """As if nothing were captured in this thread."""
    trace, stand_ins = sys.gettrace(), [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    sys.settrace(None)
    for owner, name, original in reversed(replaced):
        setattr(owner, name, original)
    try:
        with modes_off():
            yield
    finally:
        for owner, name, stand_in in stand_ins:
            setattr(owner, name, stand_in)
        sys.settrace(trace)
        while _not_disabled:
            del vars(_not_disabled.pop())["__dynamo_disable"]


def _disable(fn: Any = None, *args: Any, **kwargs: Any) -> Any:
    """`torch._dynamo.disable`; for what `torch._disable_dynamo` keeps there is nothing to disable without Dynamo."""
    if sys._getframe(1).f_code.co_filename != importlib.import_module("torch._compile").__file__:
        return importlib.import_module(f"{_PACKAGE}.decorators").disable(fn, *args, **kwargs)
    _not_disabled.append(fn)
    return fn


def _source_class() -> type:
    """Where a fake tensor comes from that is not told: that of a tensor, or of its attribute such as `grad`."""

    class Source(private("torch._guards.Source")):  # type: ignore[misc]
        def __init__(self, base: Any, member: str = "") -> None:
            self.name = f"{getattr(base, 'name', base)}.{member}"

    return Source


def never_compiled(fn: types.FunctionType) -> None:
    """Have Dynamo run a function as it is, in whichever thread."""
    frames = private("torch._C._dynamo.eval_frame")
    skip = frames._FrameExecStrategy(frames._FrameAction.SKIP, frames._FrameAction.DEFAULT)
    frames.set_code_exec_strategy(fn.__code__, skip)
