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
import copy
import enum
import functools
import operator
import os
import sys
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from primexec import _torch, _torch_capture, origins, statics
from primexec.bytecode import ALL, CodeNames, is_refused, names_of, refused
from primexec.cached_calls import CACHED, CachedCalls
from primexec.config import READ_ENVIRONMENT, environment
from primexec.contents import Container, contents_of
from primexec.errors import CaptureError, SourceLine
from primexec.imports import IMPORT_MODULE, Imports
from primexec.lookups import ASKING, REAL, names_in, stand_ins
from primexec.namespaces import ABSENT, MODULE_TABLES, Cell, Namespace, cells_of, ignore, itself, read_cell, show_key
from primexec.record import Record

MAX_OBJECTS = 200_000


class Reads(Record):
    """Records what is read; installed with `sys.settrace` while the function runs.

    Args:
        varying: labels of numbers that are not recorded but collected, for they are inputs of the program.
    """

    def __init__(self, fn: object, varying: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.varying = varying
        self.numbers: list[tuple[dict[Any, Any], Any, str]] = []  # (dict, key, label)
        self.codes: dict[tuple[int, int], types.CodeType] = {}  # by their identity and that of their globals
        self._names: set[str] = {"training", "forward", "__getattr__"}  # asked for by torch's code, and by Python
        self._everything = 0  # PLAIN or ALL where names are computed in a way that cannot be watched
        self.reflective = False  # user code asked for attributes by computed or optional names
        self._objects: list[tuple[Namespace, Any]] = []
        self.cached_calls = CachedCalls(self._record_call)
        self._imports = Imports(self._reach_import)
        self._lookups = stand_ins(self._ask)
        self._classes: dict[type, Namespace] = {}
        self._asked: set[str] = set()  # given to `getattr` and its like, which may be there or not
        self._weakly: set[int] = set()  # objects that were found through weak references
        self._looked_at: set[type] = set()
        self._functions: list[types.FunctionType] = []
        self._previous: Any = None
        self.suspects: dict[str, SourceLine] = {}
        self.draws = False  # functions of the random generators of Python or NumPy are within reach
        self.fn = fn
        self.reach(fn, "self" if isinstance(fn, torch.nn.Module) else getattr(fn, "__name__", "fn"))

    def refuse(self, reason: str, hint: str) -> Exception:
        """The error for what cannot be traced; the tracer's own one also knows the line."""
        return CaptureError(reason, hint=hint)

    def number_found(self) -> None:
        """One more number is known; the capture puts a stand-in in its place."""

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
            elif code is _CALL_OF_MODULES:
                self._reach_tables(_torch.global_hooks(), "hooks of all modules")
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
        new = names.attributes - self._names
        if new or names.everything > self._everything:
            self._everything = max(self._everything, names.everything)
            self._know(new)

    @_torch_capture.modules_themselves()
    def _ask(self, name: str, asks: bool) -> None:
        """Code is about to ask for an attribute, or to set it, by a name that it computed."""
        if asks:
            self.loaded.add(name)
        if name not in self._asked:
            self._asked.add(name)
            self._know({name})

    def _know(self, new: set[str] | frozenset[str]) -> None:
        """Record these attributes of all objects that are known."""
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
        elif asked := names_in(value):
            self._know(asked)
        elif names := next((names for kind, names in origins.LEADS_TO if isinstance(value, kind)), ()):
            self._reach_lookup(value)
            for name in names:
                self._reach_held(getattr(value, name), label)
        elif cells := cells_of(value, label):
            self._seen[id(value)] = value
            for cell in cells:
                self._record_cell(*cell)
        elif isinstance(value, weakref.ref):
            self._weakly.add(id(value()))
            self._record_cell(lambda: value() is None, ignore, f"whether {label} is dead")
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
            self._reach_lookup(value)
            wrapped = getattr(value, "__dict__", {}).get("__wrapped__")  # a traced function, functools.lru_cache
            if isinstance(value, CACHED):
                self.cached_calls.watch(value)
            if wrapped is not None:
                self.reach(wrapped, label)

    def _reach_lookup(self, value: Any) -> None:
        """Whoever keeps the real `getattr` may ask for any name."""
        if self._everything < ALL and any(value is real for real in REAL):
            self._everything = ALL
            self._know(set())

    def _reach_static(self, value: Any, label: str) -> None:
        """Compared by value; but its class may hold attributes, and a member of an enumeration some of its own."""
        if isinstance(value, enum.Enum) and not origins.is_trusted_class(type(value)):
            self._seen[id(value)] = value
            self._reach_object(value, value.__dict__, label)
            self._record(self._namespace(value.__dict__, f"{label}."), "_value_")
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
        self._reach_tables(tables, label)
        namespace = self._namespace(module.__dict__, f"{label}.")
        namespace.values |= {name: statics.Identity(held) for name, held in tables.items()}
        namespace.originals |= tables
        self._reach_object(module, module.__dict__, label)
        if isinstance(module, (torch.nn.ParameterList, torch.nn.ParameterDict)):  # they make up names of attributes
            self._record_names(namespace, module.__dict__.keys() - origins.MODULE_INTERNALS)

    def _reach_tables(self, tables: dict[str, dict[Any, Any]], label: str) -> None:
        for name, held in tables.items():
            namespace = self._namespace(held, f"{label}.{name}: " if "hooks" in name else f"{label}.")
            namespace.keep_keys()
            for key in held:
                self._record(namespace, key)

    def _reach_stateful(self, value: Any, label: str) -> None:
        """The code that reads such an object is not watched, so all of its attributes count as read."""
        namespace = self._namespace(value.__dict__, f"{label}.")
        namespace.flags = type(value).__module__.partition(".")[0] == "torch"
        groups = value.__dict__.get("param_groups", ()) if isinstance(value, torch.optim.Optimizer) else ()
        if groups:  # compared group by group, below
            namespace.values["param_groups"], namespace.originals["param_groups"] = statics.Identity(groups), groups
        self._reach_object(value, value.__dict__, label)
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
        self._functions.append(fn)
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
            if id(owner) not in self._weakly:  # nor may this record keep it alive
                namespace.of = owner if held is getattr(owner, "__dict__", None) else None
            if not isinstance(owner, types.FunctionType) and id(owner) not in self._weakly:
                self.keep("__class__", [owner])
        self._objects.append((namespace, owner))
        self._record_names(namespace, self._names)
        self._record_class(type(owner), self._names)
        self._record_slots(owner, self._names, f"{label}.")

    # Recording values ----------------------------------------------------------------------------------

    def _namespace(self, held: dict[Any, Any], label: str) -> Namespace:
        return self.namespaces.setdefault(id(held), Namespace(held, label))

    def _record_names(self, namespace: Namespace, names: set[str] | frozenset[str]) -> None:
        there = namespace.held.keys() if namespace.keys is not None else namespace.held.keys() | self._asked
        for name in there & names:
            self._record(namespace, name)
        if self._everything:
            most = self._everything == ALL and (namespace.of is not None or namespace.owner is not None)
            for name, value in list(namespace.held.items()):
                plain = statics.is_container(value) or statics.freeze_static(value) is not None
                if plain or (most and not isinstance(value, collections.abc.Iterator)):
                    self._record(namespace, name)

    def _record(self, namespace: Namespace, name: Any) -> None:
        internal = name == "__builtins__" or (name in origins.MODULE_INTERNALS and "_modules" in namespace.held)
        if name in namespace.values or name in namespace.inputs or internal:
            return
        if name not in namespace.held or not namespace.had(name):
            namespace.values[name] = ABSENT
            return
        value = namespace.get(name)
        label = namespace.label_of(name)
        if label in self.varying and statics.may_vary(value) and namespace.is_instance():
            namespace.inputs.add(name)
            self.numbers.append((namespace.held, name, label))
            self.number_found()
            return
        self._watch_state(value, label)
        namespace.values[name] = statics.freeze(value)
        namespace.originals[name] = value
        self._watch_container(value, label)
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
        self._looked_at.add(cls)
        for base in (*cls.__mro__, *type.mro(type(cls))):
            if origins.is_trusted_class(base) or origins.is_installed(origins.file_of(base.__module__)):
                continue
            namespace = self._classes.get(base)
            if namespace is None:
                namespace = self._classes[base] = Namespace.of_class(base)
                self.namespaces[id(namespace.held)] = namespace
                self._record_names(namespace, {*namespace.special(), "_member_map_"})  # of an enumeration
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

    def _watch_container(self, value: Any, label: str) -> None:
        if statics.is_array(value) and id(value) not in self._seen:
            self._seen[id(value)] = value
            self.containers.append(Container(value, statics.freeze(value), copy.copy(value), label))
        if not statics.is_container(value) or statics.freeze_static(value) is not None:
            return
        if isinstance(value, dict):  # its version tells when it changed
            namespace = self._namespace(value, f"{label}: ")
            namespace.keep_keys()
            for name in value:
                self._record(namespace, name)
        elif isinstance(value, (tuple, frozenset)):  # itself it cannot change
            for i, part in enumerate(statics.contents(value)):
                self._watch_container(part, f"{label}[{i}]")
        else:
            base = statics.builtin_base(value)
            copied = base(statics.contents(value))
            self.containers.append(Container(value, statics.freeze(value), copied, label))

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
        self._seen = {id(m): m for m in self.modules()}
        self._objects.clear()
        codes = {code for code, _ in self.codes}
        self.keep("__code__", [fn for fn in self._functions if id(fn.__code__) in codes])
        self.keep("__mro__", list(self._classes.keys() & self._looked_at))
        self._functions.clear()
        self._pinned.clear()
        self.codes.clear()
        self.generators.clear()
        self.namespaces = {k: n for k, n in self.namespaces.items() if n.values or n.keys is not None}
        places: list[Namespace | Cell] = [*self.namespaces.values(), *self.cells]
        for place in places:
            place.settle()
        self.__dict__.pop("refuse", None)
        self.__dict__.pop("number_found", None)


_STOOD_IN_FOR = frozenset({*ASKING, "__import__"})
_CALL_OF_MODULES = torch.nn.Module._call_impl.__code__
_NAMED_BY_AUTOGRAD = frozenset({"forward", "setup_context", "backward", "jvp", "vjp", "vmap"})
