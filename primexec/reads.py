"""Which Python state a function reads while it is traced, so that the guards can check it again.

While a capture runs, `Reads` is the thread's trace function. When a Python function is entered for the
first time, its bytecode tells which globals and attribute names it may read. Every object that can be
reached from the traced function (its closure, its globals, `self`, the module tree) is a namespace; the
values under those names are recorded before the code runs. That over-approximates what is read, so the
guards are sound for what is reached this way; an unneeded one costs a retrace at worst.

After the trace the recorded values are compared once more: a difference is a side effect on Python state.
"""

from __future__ import annotations

import collections.abc
import functools
import os
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from primexec import _torch, statics
from primexec.bytecode import CodeNames, is_installed, is_library, names_of, state_setters
from primexec.errors import CaptureError, SourceLine

_ABSENT = "absent"
_DATA_HOLDERS = frozenset(
    {"types.SimpleNamespace", "argparse.Namespace", "collections.UserDict", "collections.UserList"}
)
_RANDOM_MODULES = frozenset({"random", "numpy.random._generator", "numpy.random.mtrand"})
_INPUTS = (torch.Tensor, torch.Generator)
MAX_OBJECTS = 50_000


@dataclass(slots=True)
class Namespace:
    """A dict that belongs to an object the function can reach, and the values recorded in it."""

    held: dict[Any, Any]
    label: str
    values: dict[Any, Any] = field(default_factory=dict)  # name → frozen value
    originals: dict[Any, Any] = field(default_factory=dict)  # name → what it held, to restore it
    keys: tuple[Any, ...] | frozenset[Any] | None = None  # the names it held, ordered where order matters
    flags: bool = False  # torch's own code sets plain values in it

    def get(self, name: Any) -> Any:
        return dict.__getitem__(self.held, name)  # a subclass may run code of its own

    def keys_now(self) -> Any:
        """Tensors as keys are told apart by their identity, for == compares their values."""
        return (tuple if self.keys is None else type(self.keys))(map(_key, self.held))

    def label_of(self, name: Any) -> str:
        return f"{self.label}{name if isinstance(name, str) else _show_key(name)}"

    def changed(self) -> Iterator[tuple[Any, Any, Any]]:
        """(name, frozen then, frozen now) of what is no longer as recorded."""
        if self.keys is not None and (keys := self.keys_now()) != self.keys:
            yield next(iter({*keys} ^ {*self.keys}), ""), self.keys, keys
        for name, then in self.values.items():
            now = statics.freeze(self.get(name)) if name in self.held else _ABSENT
            if now != then:
                yield name, then, now


@dataclass(slots=True)
class Cell:
    """A closure cell, a slot or a class attribute: one value behind a getter."""

    get: Callable[[], Any]
    set: Callable[[Any], None]
    label: str
    value: Any
    original: Any


class Reads:
    """Records what is read; installed with `sys.settrace` while the function runs."""

    def __init__(self, fn: object) -> None:
        self.namespaces: dict[int, Namespace] = {}
        self.cells: list[Cell] = []
        self.containers: list[tuple[Any, Any, Any, str]] = []  # container, frozen, shallow copy, label
        self.codes: dict[tuple[int, int], types.CodeType] = {}  # by their identity and that of their globals
        self._names: set[str] = {"training"}
        self._everything = False
        self.reflective = False  # user code asked for attributes by computed or optional names
        self._seen: dict[int, object] = {}
        self._objects: list[tuple[Namespace, Any]] = []
        self._classes: dict[type, set[str]] = {}
        self._pinned: list[tuple[Any, Any, str, torch.Tensor]] = []  # places of tensors that must not be replaced
        self._previous: Any = None
        self.generators: list[tuple[torch.Generator, torch.Tensor]] = []
        self.suspects: dict[str, SourceLine] = {}
        self.fn = fn
        self.reach(fn, "self" if isinstance(fn, torch.nn.Module) else getattr(fn, "__name__", "fn"))

    def refuse(self, reason: str, hint: str) -> Exception:
        """The error for what cannot be traced; the tracer's own one also knows the line."""
        return CaptureError(reason, hint=hint)

    # Watching ------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._previous = sys.gettrace()
        sys.settrace(self.enter)

    def stop(self) -> None:
        sys.settrace(self._previous)

    def enter(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if code in state_setters():
            raise self.refuse(f"the function sets {state_setters()[code]}", "set it outside the traced function")
        key = id(code), id(frame.f_globals)
        if key not in self.codes:
            names = names_of(code)
            self.codes[key] = code
            if names is not None:
                self._read(names, frame)
        return self._previous(frame, event, arg) if self._previous is not None else None

    def _read(self, names: CodeNames, frame: types.FrameType) -> None:
        for topic, line in names.suspects.items():
            self.suspects.setdefault(topic, SourceLine(frame.f_code.co_filename, line, frame.f_code.co_qualname))
        if frame.f_code.co_freevars:
            self._reach_method(frame)
        if names.globals:
            file = os.path.basename(frame.f_code.co_filename)
            namespace = self._namespace(frame.f_globals, f"global of {file}: ")
            for name in names.globals:
                # A name that is not there is a builtin, unless the code itself is about to set it.
                self._record(namespace, name)
        self.reflective |= names.reflective
        new = names.attributes - self._names
        if names.everything:
            self._everything = True
        elif not new:
            return
        self._names |= new
        for namespace, owner in list(self._objects):
            self._record_names(namespace, new)
            self._record_class(type(owner), new)
            self._record_slots(owner, new, namespace.label)
        for cls in list(self._classes):
            self._record_class(cls, new)

    def _reach_method(self, frame: types.FrameType) -> None:
        """Find the function a method frame runs through its class, for the cells of its decorators."""
        code = frame.f_code
        if code.co_argcount and (owner := frame.f_locals.get(code.co_varnames[0])) is not None:
            for cls in type(owner).__mro__:
                if code.co_name in cls.__dict__:
                    self.reach(cls.__dict__[code.co_name], f"{cls.__name__}.{code.co_name}")

    # Reaching objects ----------------------------------------------------------------------------------

    def reach(self, value: Any, label: str) -> None:
        """Make whatever hangs on value known: its attributes are recorded once code names them."""
        if id(value) in self._seen or len(self._seen) > MAX_OBJECTS:
            return
        if isinstance(value, torch.jit.ScriptModule):
            return  # keeps nothing in Python
        if isinstance(value, torch.nn.Module):
            self._seen[id(value)] = value
            self._reach_module(value, label)
        elif isinstance(value, types.FunctionType):
            self._seen[id(value)] = value
            self._reach_function(value, label)
        elif isinstance(value, types.MethodType):
            self.reach(value.__self__, "self")
            self.reach(value.__func__, label)
        elif isinstance(value, functools.partial):
            self.reach(value.func, label)
            for held in (value.args, value.keywords):
                self._watch_container(held, label)
                self.reach(held, label)
        elif isinstance(value, (staticmethod, classmethod)):
            self.reach(value.__func__, label)
        elif isinstance(value, property):
            self.reach(value.fget, label)
        elif isinstance(value, dict):
            self._seen[id(value)] = value
            for key, part in list(dict.items(value)):
                self.reach(part, f"{label}[{_show_key(key)}]")
        elif isinstance(value, (list, tuple, set, frozenset)):
            self._seen[id(value)] = value
            for i, part in enumerate(statics.contents(value)):
                self.reach(part, f"{label}[{i}]")
        elif isinstance(value, types.ModuleType):
            if not is_library(getattr(value, "__file__", None) or "<frozen"):
                self._seen[id(value)] = value
                self._reach_object(value, value.__dict__, label)
        elif isinstance(value, type):
            self._record_class(value, self._names)
        elif isinstance(value, _STATEFUL):
            self._seen[id(value)] = value
            self._reach_stateful(value, label)
        elif _is_plain_object(value):
            self._seen[id(value)] = value
            self._reach_object(value, getattr(value, "__dict__", {}), label)
            if callable(value):
                self.reach(type(value).__call__, label)
        else:
            wrapped = getattr(value, "__dict__", {}).get("__wrapped__")  # a traced function, functools.lru_cache
            if wrapped is not None:
                self.reach(wrapped, label)

    def _reach_module(self, module: torch.nn.Module, label: str) -> None:
        for kind in ("_modules", "_parameters", "_buffers"):
            held = module.__dict__[kind]
            namespace = self._namespace(held, f"{label}.")
            namespace.keys = tuple(held)
            for name in held:
                self._record(namespace, name)
        self._reach_object(module, module.__dict__, label)

    def _reach_stateful(self, value: Any, label: str) -> None:
        """An object of torch's own: the code that reads it is not watched, so all of its attributes count as read."""
        self._reach_object(value, value.__dict__, label)
        namespace = self._namespace(value.__dict__, f"{label}.")
        namespace.flags = True
        groups = value.__dict__.get("param_groups", ()) if isinstance(value, torch.optim.Optimizer) else ()
        for name in value.__dict__.keys() - ({"param_groups"} if groups else set()):
            self._record(namespace, name)
        if groups:
            ids = lambda: tuple(map(id, value.param_groups))  # noqa: E731
            self._record_cell(ids, lambda value: None, f"{label}.param_groups")
        for i, group in enumerate(groups):
            self._watch_container(group, f"{label}.param_groups[{i}]")
            # Its state is kept by parameter: others in their place are another program.
            self._pinned += [(functools.partial(_itself, p), None, f"{label}: {i}", p) for p in group["params"]]

    def _reach_function(self, fn: types.FunctionType, label: str) -> None:
        if is_installed(fn.__code__.co_filename):
            self.reach(getattr(fn, "__wrapped__", None), label)
            return
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            self._record_cell(
                lambda cell=cell: _cell_value(cell),  # type: ignore[misc]
                lambda value, cell=cell: setattr(cell, "cell_contents", value),  # type: ignore[misc]
                f"{name} (closed over by {label})",
            )
        for i in range(len(fn.__defaults__ or ())):
            self._record_cell(
                lambda i=i: (fn.__defaults__ or {})[i],  # type: ignore[misc]
                lambda value: None,  # the tuple of defaults cannot be changed in place
                f"default {i} of {label}",
            )
        if fn.__kwdefaults__:
            namespace = self._namespace(fn.__kwdefaults__, f"default of {label}: ")
            for name in fn.__kwdefaults__:
                self._record(namespace, name)
        if fn.__dict__:
            self._reach_object(fn, fn.__dict__, label)
        self.reach(getattr(fn, "__wrapped__", None), label)

    def _reach_object(self, owner: Any, held: dict[str, Any], label: str) -> None:
        namespace = self._namespace(held, f"{label}.")
        if not isinstance(owner, types.ModuleType):
            namespace.keys = frozenset(held)  # a new attribute may hide one of the class, or answer hasattr
        self._objects.append((namespace, owner))
        self._record_names(namespace, self._names)
        self._record_class(type(owner), self._names)
        self._record_slots(owner, self._names, f"{label}.")

    # Recording values ----------------------------------------------------------------------------------

    def _namespace(self, held: dict[Any, Any], label: str) -> Namespace:
        return self.namespaces.setdefault(id(held), Namespace(held, label))

    def _record_names(self, namespace: Namespace, names: set[str] | frozenset[str]) -> None:
        for name in namespace.held.keys() & names:
            self._record(namespace, name)
        if self._everything:
            for name, value in namespace.held.items():
                if statics.freeze_static(value) is not None:
                    self._record(namespace, name)

    def _record(self, namespace: Namespace, name: Any) -> None:
        if name in namespace.values or (name in _MODULE_INTERNALS and "_modules" in namespace.held):
            return
        if name not in namespace.held or (namespace.keys is not None and _key(name) not in namespace.keys):
            namespace.values[name] = _ABSENT
            return
        value = namespace.get(name)
        label = namespace.label_of(name)
        self._watch_state(value, label)
        namespace.values[name] = statics.freeze(value)
        namespace.originals[name] = value
        self._watch_container(value, label)
        self.reach(value, label)

    def _record_cell(self, get: Callable[[], Any], set_: Callable[[Any], None], label: str) -> None:
        value = get()
        self._watch_state(value, label)
        self.cells.append(Cell(get, set_, label, statics.freeze(value), value))
        self._watch_container(value, label)
        self.reach(value, label)

    def _record_class(self, cls: type, names: set[str] | frozenset[str]) -> None:
        """Attributes of the classes in user code: plain values, and slots are read through their class."""
        for base in cls.__mro__:
            if base.__module__.partition(".")[0] in _TRUSTED_PACKAGES or is_installed(_file_of(base)):
                continue
            known = self._classes.setdefault(base, set())
            for name in (names & base.__dict__.keys()) - known:
                known.add(name)
                value = base.__dict__[name]
                if statics.freeze_static(value) is not None or statics.is_container(value):
                    self._record_cell(
                        lambda base=base, name=name: base.__dict__.get(name, _ABSENT),  # type: ignore[misc]
                        functools.partial(setattr, base, name),
                        f"{base.__name__}.{name}",
                    )

    def _watch_state(self, value: Any, label: str) -> None:
        """Generators are put back if the function moves them; what moves and cannot be put back is refused."""
        if isinstance(value, collections.abc.Iterator) or type(value).__module__ in _RANDOM_MODULES:
            raise self.refuse(
                f"{label} is a {type(value).__name__}, whose state cannot be compared from call to call",
                "pass the values as arguments",
            )
        if isinstance(value, torch.Generator):
            with _torch.modes_off():
                self.generators.append((value, value.get_state()))

    def _record_slots(self, owner: Any, names: set[str] | frozenset[str], label: str) -> None:
        for base in type(owner).__mro__:
            if "__slots__" in base.__dict__ and base.__module__.partition(".")[0] not in _TRUSTED_PACKAGES:
                for name in names & base.__dict__.keys():
                    if isinstance(base.__dict__[name], types.MemberDescriptorType):
                        get = functools.partial(getattr, owner, name, _ABSENT)
                        self._record_cell(get, functools.partial(setattr, owner, name), f"{label}{name}")

    def _watch_container(self, value: Any, label: str) -> None:
        if statics.is_array(value):
            self.containers.append((value, statics.freeze(value), value.copy(), label))
        if not statics.is_container(value) or statics.freeze_static(value) is not None:
            return
        if isinstance(value, dict):  # its version tells when it changed
            namespace = self._namespace(value, f"{label}: ")
            namespace.keys = namespace.keys_now()
            for name in value:
                self._record(namespace, name)
        else:
            base = statics.builtin_base(value)
            self.containers.append((value, statics.freeze(value), base(statics.contents(value)), label))

    # Afterwards ----------------------------------------------------------------------------------------

    def changed(self) -> Iterator[tuple[str, Any, Any]]:
        """(label, frozen then, frozen now) of everything that is no longer as it was recorded."""
        for namespace in self.namespaces.values():
            for name, then, now in namespace.changed():
                yield namespace.label_of(name), then, now
        for cell in self.cells:
            if (now := statics.freeze(cell.get())) != cell.value:
                yield cell.label, cell.value, now
        for container, then, _, label in self.containers:
            if (now := statics.freeze(container)) != then:
                yield label, then, now

    def assigned(self, fake: Callable[[Any], bool]) -> Iterator[tuple[Any, Any, Any, str]]:
        """(dict or setter, name, value, label) of new values that satisfy `fake`, and of flags that torch's code sets.

        What was there before is put back.
        """
        for namespace in self.namespaces.values():
            for name, value in list(dict.items(namespace.held)):
                new = namespace.keys is not None and name not in namespace.values and _key(name) not in namespace.keys
                if not new and (name not in namespace.values or value is namespace.originals.get(name, _ABSENT)):
                    continue
                if fake(value) or (namespace.flags and statics.freeze_static(value) is not None):
                    yield namespace.held, name, value, namespace.label_of(name)
                    if name in namespace.originals:
                        namespace.held[name] = namespace.originals[name]
                    else:
                        del namespace.held[name]

        for cell in self.cells:
            if (value := cell.get()) is not cell.original and fake(value):
                yield cell.set, None, value, cell.label
                cell.set(cell.original)

    def made_inside(self, value: object) -> bool:
        """Whether a function or module hangs on nothing outside: eager makes a new one at every call."""
        return isinstance(value, (torch.nn.Module, types.FunctionType)) and id(value) not in self._seen

    def asks_for(self, name: str) -> bool:
        """Whether code that ran names this attribute."""
        return name in self._names

    def modules(self) -> list[torch.nn.Module]:
        """The modules that the function can reach."""
        return [m for m in self._seen.values() if isinstance(m, torch.nn.Module)]

    def settle(self) -> None:
        """Let go of what only the capture needed: replaced weights must not live on in a record of them."""
        self._seen = {id(m): m for m in self.modules()}
        self._objects.clear()
        self.codes.clear()
        self.generators.clear()
        self.namespaces = {k: n for k, n in self.namespaces.items() if n.values or n.keys is not None}
        for namespace in self.namespaces.values():
            namespace.originals.clear()
        for cell in self.cells:
            if isinstance(cell.original, torch.Tensor):
                cell.original = None
        self.__dict__.pop("refuse", None)

    def restore(self, only: Callable[[Any], bool] = lambda value: True) -> None:
        """Put back what the traced code changed, where the new value satisfies `only`."""
        for generator, state in self.generators:
            generator.set_state(state)
        for namespace in self.namespaces.values():
            for name, _, _ in list(namespace.changed()):
                if name in namespace.held and only(namespace.get(name)):
                    if name in namespace.originals:
                        namespace.held[name] = namespace.originals[name]
                    elif namespace.values.get(name) is _ABSENT:
                        del namespace.held[name]
            if namespace.keys is not None:
                for name in [n for n in namespace.held if _key(n) not in namespace.keys]:
                    if only(namespace.get(name)):
                        del namespace.held[name]
        for cell in self.cells:
            if statics.freeze(cell.get()) != cell.value and only(cell.get()):
                cell.set(cell.original)
        for container, then, copied, _ in self.containers:
            if statics.freeze(container) == then:
                continue
            if statics.is_array(container):
                container[...] = copied
            elif any(map(only, statics.contents(container))):
                base = statics.builtin_base(container)
                base.clear(container)
                (base.update if hasattr(base, "update") else base.extend)(container, copied)

    def tensors(self) -> Iterator[tuple[Any, Any, str, Any]]:
        """(container or getter, key, label, value) of every place reached that holds a tensor or generator."""
        for namespace in self.namespaces.values():
            for name, value in dict.items(namespace.held):
                if isinstance(value, _INPUTS):
                    yield namespace.held, name, namespace.label_of(name), value
        for value in list(self._seen.values()):
            if isinstance(value, (dict, list, tuple)):
                for key, part in dict.items(value) if isinstance(value, dict) else enumerate(value):
                    if isinstance(part, _INPUTS):
                        yield value, key, f"[{key!r}]", part
        for cell in self.cells:
            if isinstance(cell.original, _INPUTS):
                yield cell.get, None, cell.label, cell.original
        yield from self._pinned


_TRUSTED_PACKAGES = frozenset({"torch", "numpy", "builtins", "primexec"}) | sys.stdlib_module_names - {"__main__"}

# Handled apart (children, parameters, buffers, hooks), or of no effect on a forward call.
_MODULE_INTERNALS = frozenset(torch.nn.Module().__dict__) - {"training"}


_STATEFUL = (
    torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler, torch.amp.GradScaler, torch.distributions.Distribution,
)  # fmt: skip


def _key(key: Any) -> Any:
    return statics.Identity(key) if isinstance(key, torch.Tensor) else key


def _itself(value: Any) -> Any:
    return value


def _show_key(key: object) -> str:
    return f"a {type(key).__name__}" if isinstance(key, torch.Tensor) else repr(key)


def _is_plain_object(value: Any) -> bool:
    kind = type(value)
    return f"{kind.__module__}.{kind.__name__}" in _DATA_HOLDERS or (
        kind.__module__.partition(".")[0] not in _TRUSTED_PACKAGES
        and statics.freeze_static(value) is None
        and (hasattr(value, "__dict__") or hasattr(kind, "__slots__"))
    )


def _file_of(cls: type) -> str:
    return getattr(sys.modules.get(cls.__module__), "__file__", None) or ""


def _cell_value(cell: Any) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return _ABSENT
