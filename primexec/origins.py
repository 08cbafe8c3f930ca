"""Whose code, class or module something is: the user's, an installed package's, or a library's that is trusted."""

from __future__ import annotations

import argparse
import collections
import configparser
import functools
import importlib.util
import os
import queue
import random
import sys
import sysconfig
import threading
import types
import weakref
from typing import Any

import torch

from primexec import _torch, statics

_HERE = os.path.dirname(__file__) + os.sep
_STDLIB = sysconfig.get_paths()["stdlib"] + os.sep
_RUN_BY_TORCH = ("numpy", "sympy", "mpmath")
_TRUSTED_PACKAGES = frozenset({"torch", "numpy", "builtins", "primexec"}) | sys.stdlib_module_names - {"__main__"}

# Of modules: handled apart (children, parameters, buffers, hooks), or of no effect on a forward call.
MODULE_INTERNALS = frozenset(torch.nn.Module().__dict__) - {"training"}

# Classes of torch and the standard library whose objects hold state of the user's.
STATEFUL = (
    torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler, torch.distributions.Distribution,
    argparse.Namespace, types.SimpleNamespace, collections.UserDict, collections.UserList, collections.UserString,
    collections.ChainMap, threading.Event, queue.Queue, weakref.WeakKeyDictionary, weakref.WeakValueDictionary,
    weakref.WeakSet, configparser.RawConfigParser, configparser.SectionProxy,
)  # fmt: skip

# What hangs on objects that only lead to others.
LEADS_TO: tuple[tuple[Any, tuple[str, ...]], ...] = (
    ((functools.partial, functools.partialmethod), ("func", "args", "keywords")),
    ((staticmethod, classmethod), ("__func__",)),
    (property, ("fget",)),
    (functools.singledispatchmethod, ("dispatcher",)),
    ((types.BuiltinMethodType, types.MethodWrapperType), ("__self__",)),
    ((type({}.keys()), type({}.values()), type({}.items())), ("mapping",)),
)


@functools.cache
def _trusted_folders() -> tuple[str, ...]:
    specs = [spec for name in _RUN_BY_TORCH if (spec := importlib.util.find_spec(name)) is not None]
    folders = [os.path.join(f, "") for spec in specs for f in spec.submodule_search_locations or ()]
    return _torch.torch_directory(), _HERE, *folders


@functools.lru_cache(maxsize=4096)
def is_library(file: str) -> bool:
    """Code trusted not to read state of its own that changes: torch and what it runs, the standard library, ours."""
    return (
        file.startswith("<frozen")
        or (file.startswith(_STDLIB) and "site-packages" not in file)
        or is_run_by_torch(file)
    )


@functools.lru_cache(maxsize=4096)
def is_run_by_torch(file: str) -> bool:
    """Code of torch, of what it runs, and ours."""
    return file.startswith(_trusted_folders())


def is_installed(file: str) -> bool:
    """Code of an installed package: its classes and decorators are taken not to change, its objects may."""
    return "site-packages" in file or "dist-packages" in file or is_library(file)


@functools.lru_cache(maxsize=4096)
def is_layer(file: str) -> bool:
    """The layers of torch.nn: their lines say something where the user has none."""
    modules = os.path.join(_torch.torch_directory(), "nn", "modules") + os.sep
    return file.startswith(modules) and not file.endswith(f"{os.sep}module.py")


def path_of(module: types.ModuleType) -> str:
    """The file of a module; empty where it has none. A lazy module is not woken."""
    return module.__dict__.get("__file__") or ""


def is_trusted_module(module: types.ModuleType) -> bool:
    """Modules of torch, NumPy, the standard library and ours; what no file tells, the name does."""
    file = path_of(module)
    return is_library(file) if file else module.__name__.partition(".")[0] in _TRUSTED_PACKAGES


def file_of(name: str) -> str:
    """The file of the module that is imported under a name; empty where there is none."""
    module = sys.modules.get(name)
    return path_of(module) if isinstance(module, types.ModuleType) else ""


def is_trusted_class(cls: type) -> bool:
    """As is_trusted_module. A file of the user's may be named like one of theirs."""
    name = str(cls.__module__)  # a descriptor, in classes of Cython
    file = file_of(name)
    return name.partition(".")[0] in _TRUSTED_PACKAGES and (not file or is_library(file))


def is_plain_object(value: Any) -> bool:
    """Whether a value is an object with attributes of a class of the user's, or of an installed package."""
    kind = type(value)
    return (
        not is_trusted_class(kind)
        and statics.freeze_static(value) is None
        and (hasattr(value, "__dict__") or hasattr(kind, "__slots__"))
    )


def is_generator(value: object) -> bool:
    """Whether a value is a random generator of Python's or NumPy's."""
    return isinstance(value, random.Random) or str(type(value).__module__).startswith("numpy.random.")


def is_random(value: object) -> bool:
    """Whether a value is the generator that all modules share, or the module of its functions."""
    if isinstance(value, types.ModuleType):
        return value.__name__ in ("random", "numpy.random")
    shared = (random.random, getattr(sys.modules.get("numpy.random"), "rand", None))  # methods of theirs
    return is_generator(value) and any(value is getattr(method, "__self__", None) for method in shared)


def user_modules() -> list[types.ModuleType]:
    """The modules of the user's that are imported."""
    modules = [m for m in list(sys.modules.values()) if isinstance(m, types.ModuleType)]
    return [m for m in modules if not is_installed(path_of(m))]


def slots_of(cls: type) -> set[str]:
    """The attributes of objects of a class of the user's that stand in slots."""
    slotted = [base.__dict__ for base in cls.__mro__ if "__slots__" in base.__dict__ and not is_trusted_class(base)]
    return {n for held in slotted for n, slot in held.items() if isinstance(slot, types.MemberDescriptorType)}
