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
import contextvars
import copy
import enum
import functools
import operator
import os
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch

from primexec import _torch, _torch_capture, origins, statics
from primexec.bytecode import CodeNames, is_refused, names_of, refused
from primexec.cached_calls import CACHED, CachedCalls
from primexec.config import READ_ENVIRONMENT, environment
from primexec.contents import Container
from primexec.errors import CaptureError, SourceLine
from primexec.imports import IMPORT_MODULE, Imports
from primexec.namespaces import ABSENT, MODULE_TABLES, Cell, Namespace, ignore, itself, read_cell, show_key

_INPUTS = (torch.Tensor, torch.Generator)
MAX_OBJECTS = 200_000


class Reads:
    """Records what is read; installed with `sys.settrace` while the function runs."""

    def __init__(self, fn: object) -> None:
        self.namespaces: dict[int, Namespace] = {}
        self.cells: list[Cell] = []
        self.containers: list[Container] = []
        self.codes: dict[tuple[int, int], types.CodeType] = {}  # by their identity and that of their globals
        self._names: set[str] = {"training", "forward"}  # torch's code asks modules for these
        self.loaded: set[str] = set()  # names of attributes that are asked for, and not set only
        self._everything = False
        self.reflective = False  # user code asked for attributes by computed or optional names
        self._seen: dict[int, object] = {}
        self._objects: list[tuple[Namespace, Any]] = []
        self.cached_calls = CachedCalls(self._record_call)
        self._imports = Imports(self._reach_import)
        self._classes: dict[type, Namespace] = {}
        self._pinned: list[tuple[Any, Any, str, torch.Tensor]] = []  # places of tensors that must not be replaced
        self._previous: Any = None
        self.generators: list[tuple[torch.Generator, torch.Tensor]] = []
        self.suspects: dict[str, SourceLine] = {}
        self.draws = False  # functions of the random generators of Python or NumPy are within reach
        self.fn = fn
        self.reach(fn, "self" if isinstance(fn, torch.nn.Module) else getattr(fn, "__name__", "fn"))

    def refuse(self, reason: str, hint: str) -> Exception:
        """The error for what cannot be traced; the tracer's own one also knows the line."""
        return CaptureError(reason, hint=hint)

    # Watching ------------------------------------------------------------------------------------------

    def start(self) -> None:
        self._previous = sys.gettrace()
        sys.settrace(self.enter)
        self._imports.start()

    def stop(self) -> None:
        self._imports.stop()
        sys.settrace(self._previous)

    def enter(self, frame: types.FrameType, event: str, arg: Any) -> Any:
        code = frame.f_code
        if is_refused(frame):
            raise self.refuse(*refused()[code])
        if code is IMPORT_MODULE:
            self._imports.by_name(frame.f_locals["name"], frame.f_locals["package"])
        key = id(code), id(frame.f_globals)
        if key not in self.codes:
            names = names_of(code)
            self.codes[key] = code
            if names is not None:
                self._read(names, frame)
        return self._previous(frame, event, arg) if self._previous is not None else None

    @_torch_capture.modules_themselves()
    def _read(self, names: CodeNames, frame: types.FrameType) -> None:
        for topic, line in names.suspects.items():
            self.suspects.setdefault(topic, SourceLine(frame.f_code.co_filename, line, frame.f_code.co_qualname))
        if frame.f_code.co_freevars:
            self._reach_method(frame)
        if names.globals:
            file = os.path.basename(frame.f_code.co_filename)
            namespace = self._namespace(frame.f_globals, f"global of {file}: ")
            namespace.installed = origins.is_installed(frame.f_code.co_filename)
            for name in names.globals:
                # A name that is not there is a builtin, unless the code itself is about to set it.
                self._record(namespace, name)
        if not READ_ENVIRONMENT.isdisjoint(names.attributes) or not READ_ENVIRONMENT.isdisjoint(names.globals):
            self._watch_container(environment(), "environment variables")
        if "globals" in names.globals:
            self._watch_container(frame.f_globals, "globals()")
        if names.modules:
            for module in origins.user_modules():
                self._reach_import(module)
        self.reflective |= names.reflective
        self.loaded |= names.loaded
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

    @_torch_capture.modules_themselves()
    def _reach_import(self, module: types.ModuleType) -> None:
        self.draws |= origins.is_random(module)
        if not origins.is_trusted_module(module):
            name = module.__name__
            self.reach(module, name)
            if sys.modules.get(name) is module:  # another may take its place
                self._record(self._namespace(sys.modules, "sys.modules: "), name)

    # Reaching objects ----------------------------------------------------------------------------------

    def reach(self, value: Any, label: str) -> None:
        """Make whatever hangs on value known: its attributes are recorded once code names them."""
        if id(value) in self._seen:
            return
        if statics.freeze_static(value) is not None:
            self._reach_static(value, label)
            return
        if len(self._seen) > MAX_OBJECTS:
            reason = f"more than {MAX_OBJECTS} Python objects hang on what the function names, the last one {label}"
            raise self.refuse(reason, "keep them outside of the traced function, or in tensors")
        if isinstance(value, torch.jit.ScriptModule):
            return  # keeps nothing in Python
        if isinstance(value, torch.nn.Module):
            self._seen[id(value)] = value
            self._reach_module(value, label)
        elif isinstance(value, types.FunctionType):
            self._seen[id(value)] = value
            self._reach_function(value, label)
        elif isinstance(value, types.MethodType):
            self._reach_held(value.__self__, "self")
            self.reach(value.__func__, label)
        elif names := next((names for kind, names in origins.LEADS_TO if isinstance(value, kind)), ()):
            for name in names:
                self._reach_held(getattr(value, name), label)
        elif isinstance(value, contextvars.ContextVar):
            self._seen[id(value)] = value
            set_: Any = value.set  # returns a token
            self._record_cell(lambda: value.get(ABSENT), set_, label)
        elif isinstance(value, types.MappingProxyType):
            self._seen[id(value)] = value
            self._record_cell(lambda: dict(value), ignore, label)
        elif isinstance(value, threading.local):
            self._seen[id(value)] = value
            self._record_cell(lambda: tuple(value.__dict__), ignore, label)
            for name in list(value.__dict__):
                get = functools.partial(getattr, value, name, ABSENT)
                self._record_cell(get, functools.partial(setattr, value, name), f"{label}.{name}")
        elif isinstance(value, weakref.ref):
            self.reach(value(), label)
        elif statics.is_container(value):
            self._seen[id(value)] = value
            if hasattr(value, "__dict__"):
                self._reach_object(value, value.__dict__, label)
            parts = dict.items(value) if isinstance(value, dict) else enumerate(statics.contents(value))
            for key, part in list(parts):
                self._reach_part(part, f"{label}[{show_key(key)}]")
        elif isinstance(value, types.ModuleType):
            self.draws |= origins.is_random(value)
            if not origins.is_trusted_module(value):
                self._seen[id(value)] = value
                self._namespace(value.__dict__, f"{label}.").installed = origins.is_installed(origins.path_of(value))
                self._reach_object(value, value.__dict__, label)
        elif isinstance(value, type):
            self._record_class(value, self._names)
        elif isinstance(value, torch.Tensor) and value.__dict__:  # such as a flag on a parameter
            self._seen[id(value)] = value
            self._objects.append((self._namespace(value.__dict__, f"{label}."), value))
            self._record_names(self._objects[-1][0], self._names)
        elif isinstance(value, origins.STATEFUL):
            self._seen[id(value)] = value
            self._reach_stateful(value, label)
        elif origins.is_plain_object(value):
            self._seen[id(value)] = value
            self._reach_object(value, getattr(value, "__dict__", {}), label)
            if callable(value):
                self.reach(type(value).__call__, label)
        else:
            wrapped = getattr(value, "__dict__", {}).get("__wrapped__")  # a traced function, functools.lru_cache
            if isinstance(value, CACHED):
                self.cached_calls.watch(value)
            if wrapped is not None:
                self.reach(wrapped, label)

    def _reach_static(self, value: Any, label: str) -> None:
        """Compared by value; but its class may hold attributes, and a member of an enumeration some of its own."""
        if isinstance(value, enum.Enum) and not origins.is_trusted_class(type(value)):
            self._seen[id(value)] = value
            self._reach_object(value, value.__dict__, label)
        elif hasattr(type(value), "__dataclass_fields__"):
            self._record_class(type(value), self._names)

    def _reach_part(self, part: Any, label: str) -> None:
        """What stands in a container, whose own contents are compared."""
        if id(part) not in self._seen:
            self._watch_state(part, label)
            if statics.is_array(part):
                self._watch_container(part, label)
            self.reach(part, label)

    def _reach_held(self, held: Any, label: str) -> None:
        """What a function in C works on: the list of `append`, the keywords of a partial."""
        if id(held) not in self._seen:
            self._watch_container(held, label)
            self._reach_part(held, label)

    def _reach_module(self, module: torch.nn.Module, label: str) -> None:
        tables = {name: module.__dict__[name] for name in MODULE_TABLES if name in module.__dict__}
        for name, held in (*tables.items(), *_torch.global_hooks().items()):
            hooks = "hooks" in name
            namespace = self._namespace(held, f"{label}.{name}: " if hooks else f"{label}.")
            if namespace.keys is None:
                namespace.keep_keys()
                namespace.hooks = hooks
            for key in held:
                self._record(namespace, key)
        namespace = self._namespace(module.__dict__, f"{label}.")
        namespace.values |= {name: statics.Identity(held) for name, held in tables.items()}
        namespace.originals |= tables
        self._reach_object(module, module.__dict__, label)
        if isinstance(module, (torch.nn.ParameterList, torch.nn.ParameterDict)):  # they make up names of attributes
            self._record_names(namespace, module.__dict__.keys() - origins.MODULE_INTERNALS)

    def _reach_stateful(self, value: Any, label: str) -> None:
        """The code that reads such an object is not watched, so all of its attributes count as read."""
        self._reach_object(value, value.__dict__, label)
        namespace = self._namespace(value.__dict__, f"{label}.")
        namespace.flags = type(value).__module__.partition(".")[0] == "torch"
        groups = value.__dict__.get("param_groups", ()) if isinstance(value, torch.optim.Optimizer) else ()
        for name in value.__dict__.keys() - ({"param_groups"} if groups else set()):
            self._record(namespace, name)
        if groups:
            self._record_cell(lambda: tuple(map(id, value.param_groups)), ignore, f"{label}.param_groups")
        for i, group in enumerate(groups):
            self._watch_container(group, f"{label}.param_groups[{i}]")
            # Its state is kept by parameter: others in their place are another program.
            self._pinned += [(functools.partial(itself, p), None, f"{label}: {i}", p) for p in group["params"]]

    def _reach_function(self, fn: types.FunctionType, label: str) -> None:
        if origins.is_installed(fn.__code__.co_filename):
            for name in ("__wrapped__", "registry"):  # of decorators, and of functools.singledispatch
                self._reach_held(getattr(fn, name, None), label)
            return
        for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True):
            if name == "__class__":  # made for super(), and never set again
                self.reach(read_cell(cell), label)
                continue
            self._record_cell(
                lambda cell=cell: read_cell(cell),  # type: ignore[misc]
                lambda value, cell=cell: setattr(cell, "cell_contents", value),  # type: ignore[misc]
                f"{name} (closed over by {label})",
            )
        for name in ("__defaults__", "__kwdefaults__"):
            if getattr(fn, name):
                get: Any = functools.partial(operator.attrgetter(name), fn)
                self._record_cell(get, functools.partial(setattr, fn, name), f"{name} of {label}")
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
                if statics.is_container(value) or statics.freeze_static(value) is not None:
                    self._record(namespace, name)

    def _record(self, namespace: Namespace, name: Any) -> None:
        internal = name == "__builtins__" or (name in origins.MODULE_INTERNALS and "_modules" in namespace.held)
        if name in namespace.values or internal:
            return
        if name not in namespace.held or not namespace.had(name):
            namespace.values[name] = ABSENT
            return
        value = namespace.get(name)
        label = namespace.label_of(name)
        self._watch_state(value, label)
        namespace.values[name] = statics.freeze(value)
        namespace.originals[name] = value
        self._watch_container(value, label, namespace.installed)
        self.reach(value, label)
        if isinstance(value, CACHED) and namespace.owner is None:
            self.cached_calls.replace(value, functools.partial(namespace.get, name), namespace.setter(name), label)

    def _record_cell(self, get: Callable[[], Any], set_: Callable[[Any], None], label: str) -> None:
        value = get()
        self._watch_state(value, label)
        self.cells.append(Cell(get, set_, label, statics.freeze(value), value))
        self._watch_container(value, label)
        self.reach(value, label)
        if isinstance(value, CACHED):
            self.cached_calls.replace(value, get, set_, label)

    @_torch_capture.modules_themselves()
    def _record_call(self, call: Callable[[], Any], label: str) -> None:
        self._record_cell(call, ignore, label)

    def _record_class(self, cls: type, names: set[str] | frozenset[str]) -> None:
        """Attributes of the classes in user code, methods included."""
        if issubclass(cls, torch.autograd.Function):
            names = names | _NAMED_BY_AUTOGRAD
        for base in (*cls.__mro__, *type.mro(type(cls))):
            if origins.is_trusted_class(base) or origins.is_installed(origins.file_of(base.__module__)):
                continue
            namespace = self._classes.get(base)
            if namespace is None:
                namespace = self._classes[base] = Namespace.of_class(base)
                self.namespaces[id(namespace.held)] = namespace
                self._record_names(namespace, namespace.special())
            self._record_names(namespace, names)

    def _watch_state(self, value: Any, label: str) -> None:
        """Generators are put back if the function moves them; what moves and cannot be put back is refused."""
        if origins.is_random(value):
            self.draws = True
        elif isinstance(value, collections.abc.Iterator) or origins.is_generator(value):
            raise self.refuse(
                f"{label} is a {type(value).__name__}, whose state cannot be compared from call to call",
                "pass the values as arguments",
            )
        if isinstance(value, torch.Generator):
            with _torch.modes_off():
                self.generators.append((value, value.get_state()))

    def _record_slots(self, owner: Any, names: set[str] | frozenset[str], label: str) -> None:
        for name in names & origins.slots_of(type(owner)):
            get = functools.partial(getattr, owner, name, ABSENT)
            self._record_cell(get, functools.partial(setattr, owner, name), f"{label}{name}")

    def _watch_container(self, value: Any, label: str, installed: bool = False) -> None:
        if statics.is_array(value) and id(value) not in self._seen:
            self._seen[id(value)] = value
            self.containers.append(Container(value, statics.freeze(value), copy.copy(value), label, installed))
        if not statics.is_container(value) or statics.freeze_static(value) is not None:
            return
        if isinstance(value, dict):  # its version tells when it changed
            namespace = self._namespace(value, f"{label}: ")
            namespace.installed = installed
            namespace.keep_keys()
            for name in value:
                self._record(namespace, name)
        elif isinstance(value, (tuple, frozenset)):  # itself it cannot change
            for i, part in enumerate(statics.contents(value)):
                self._watch_container(part, f"{label}[{i}]", installed)
        else:
            base = statics.builtin_base(value)
            copied = base(statics.contents(value))
            self.containers.append(Container(value, statics.freeze(value), copied, label, installed))

    # Afterwards ----------------------------------------------------------------------------------------

    def changed(self) -> Iterator[tuple[str, Any, Any, bool]]:
        """(label, frozen then, frozen now, whether it hangs on an installed package) of what changed since recorded."""
        for namespace in self.namespaces.values():
            for name, then, now in namespace.changed():
                yield namespace.label_of(name), then, now, namespace.installed
        for cell in self.cells:
            if cell.changed():
                yield cell.label, cell.value, statics.freeze(cell.get()), False
        for container in self.containers:
            if container.changed():
                yield container.label, container.frozen, statics.freeze(container.value), container.installed

    def assigned(self, fake: Callable[[Any], bool]) -> Iterator[tuple[Any, Any, Any, str]]:
        """(dict or setter, name, value, label) of new values that satisfy `fake`, and of plain ones that may be set.

        What was there before is put back.
        """
        for namespace in self.namespaces.values():
            for name, value in list(dict.items(namespace.held)):
                new = name not in namespace.values and not namespace.had(name)
                if not new and (name not in namespace.values or value is namespace.originals.get(name, ABSENT)):
                    continue
                if fake(value) or namespace.may_set(name, value, self.loaded):
                    held = namespace.setter(name) if namespace.owner else namespace.held
                    yield held, name, value, namespace.label_of(name)
                    namespace.put_back(name)
        for cell in self.cells:
            if (value := cell.get()) is not cell.original and fake(value):
                yield cell.set, None, value, cell.label
                cell.set(cell.original)

    def drop_keys(self, only: Callable[[Any], bool]) -> None:
        """Take out of dicts what the function filed under new keys that satisfy `only`."""
        for namespace in self.namespaces.values():
            for name in [n for n in namespace.held if not namespace.had(n) and only(n)]:
                namespace.put_back(name)

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
        self._pinned.clear()
        self.codes.clear()
        self.generators.clear()
        self.namespaces = {k: n for k, n in self.namespaces.items() if n.values or n.keys is not None}
        places: list[Namespace | Cell] = [*self.namespaces.values(), *self.cells]
        for place in places:
            place.settle()
        self.__dict__.pop("refuse", None)

    def restore(self) -> None:
        """Put back what the traced code changed."""
        for generator, state in self.generators:
            generator.set_state(state)
        self.cached_calls.forget()
        for namespace in self.namespaces.values():
            namespace.restore()
        for cell in self.cells:
            if cell.changed():
                cell.set(cell.original)
        for container in self.containers:
            if container.changed():
                container.put_back()

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


_NAMED_BY_AUTOGRAD = frozenset({"forward", "setup_context", "backward", "jvp", "vjp", "vmap"})
