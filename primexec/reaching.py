"""What hangs on a traced function: every object is made known, and what stands under the names asked for is recorded.

That over-approximates what is read, so the guards are sound for what is reached this way; an unneeded one costs a
retrace at worst.
"""

from __future__ import annotations

import collections.abc
import copy
import enum
import functools
import operator
import types
import weakref
from collections.abc import Callable
from typing import Any

import torch

from primexec import _torch, _torch_capture, origins, statics
from primexec.appended import GROWS
from primexec.bytecode import ALL
from primexec.cached_calls import CACHED, CachedCalls
from primexec.contents import Container
from primexec.errors import CaptureError
from primexec.lookups import REAL, Disguised, names_in
from primexec.namespaces import ABSENT, MODULE_TABLES, Cell, Namespace, cells_of, ignore, itself, read_cell, show_key
from primexec.record import Record

MAX_OBJECTS = 200_000


class Reaching(Record):
    """Records the state of what can be reached, as far as its names are asked for.

    Args:
        varying: labels of numbers that are not recorded but collected, for they are inputs of the program.
    """

    def __init__(self, varying: frozenset[str]) -> None:
        super().__init__()
        self.varying = varying
        self.numbers: list[tuple[dict[Any, Any] | Cell, Any, str]] = []  # (dict or cell, key, label)
        self.draws = False  # functions of the random generators of Python or NumPy are within reach
        self.cached_calls = CachedCalls(self._record_call)
        self._names: set[str] = {"training", "forward", "__getattr__"}  # asked for by torch's code, and by Python
        self._asked: set[str] = set()  # given to `getattr` and its like, which may be there or not
        self._everything = 0  # PLAIN or ALL where names are computed in a way that cannot be watched
        self._objects: list[tuple[Namespace, Any]] = []
        self._classes: dict[type, Namespace] = {}
        self._functions: list[types.FunctionType] = []
        self._optimizers: list[Namespace] = []
        self._states_asked = False  # by code of PyTorch's
        self._weakly: set[int] = set()  # objects that were found through weak references
        self._looked_at: set[type] = set()
        self._closed_over: dict[int, types.CellType] = {}

    def refuse(self, reason: str, hint: str) -> Exception:
        """The error for what cannot be traced; the tracer's own one also knows the line."""
        return CaptureError(reason, hint=hint)

    def number_found(self) -> None:
        """One more number is known; the capture puts a stand-in in its place."""

    def _know(self, new: set[str] | frozenset[str]) -> None:
        """Record these attributes of all objects that are known."""
        self._names |= new
        for namespace, owner in list(self._objects):
            self._record_names(namespace, new)
            self._record_class(type(owner), new)
            self._record_slots(owner, new, namespace.label)
        for cls in list(self._classes):
            self._record_class(cls, new)

    def _raise_to(self, everything: int) -> None:
        """Names are computed from here on."""
        self._everything = everything
        for namespace in [*(n for n, _ in self._objects), *self._classes.values()]:
            self._record_everything(namespace)

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
            if self.varying and type(value) in (tuple, list) and any(issubclass(type(v), Disguised) for v in value):
                return  # stands in for a tuple of numbers while the function runs
            self._seen[id(value)] = value
            if hasattr(value, "__dict__"):
                self._reach_object(value, value.__dict__, label)
            parts = dict.items(value) if isinstance(value, dict) else enumerate(statics.contents(value))
            held = self.namespaces.get(id(value))
            for key, part in [p for p in parts if held is None or p[0] not in held.inputs]:
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
            self._raise_to(ALL)

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
        self.fixed.append(held)
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
        """The code that reads such an object is not watched, so all of its attributes count as read.

        But the state of optimizers, once code is run that names it: `zero_grad` does not.
        """
        namespace = self._namespace(value.__dict__, f"{label}.")
        namespace.flags = type(value).__module__.partition(".")[0] == "torch"
        groups = value.__dict__.get("param_groups", ()) if isinstance(value, torch.optim.Optimizer) else ()
        if groups:  # compared group by group, below
            namespace.values["param_groups"], namespace.originals["param_groups"] = statics.Identity(groups), groups
        self._reach_object(value, value.__dict__, label)
        later = {"param_groups"} if groups else set()
        if isinstance(value, torch.optim.Optimizer):
            self._optimizers.append(namespace)
            later |= set() if self._states_asked else {"state"}
        for name in value.__dict__.keys() - later:
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
            if id(cell) in self._closed_over:
                continue
            self._closed_over[id(cell)] = cell
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
        self._record_everything(namespace)
        self._record_class(type(owner), self._names)
        self._record_slots(owner, self._names, f"{label}.")

    # Recording values ----------------------------------------------------------------------------------

    def _namespace(self, held: dict[Any, Any], label: str) -> Namespace:
        return self.namespaces.setdefault(id(held), Namespace(held, label))

    def _record_names(self, namespace: Namespace, names: set[str] | frozenset[str]) -> None:
        there = namespace.held.keys() if namespace.keys is not None else namespace.held.keys() | self._asked
        for name in there & names:
            self._record(namespace, name)

    def _record_everything(self, namespace: Namespace) -> None:
        """Record what may be asked for by a name that nobody sees."""
        if self._everything:
            most = self._everything == ALL and (namespace.of is not None or namespace.owner is not None)
            for name, value in list(namespace.held.items()):
                plain = statics.is_container(value) or statics.freeze_static(value) is not None
                if plain or (most and not isinstance(value, collections.abc.Iterator)):
                    self._record(namespace, name)

    def _record(self, namespace: Namespace, name: Any) -> None:
        # A tensor that is a key must not be compared: that is an operator.
        internal = isinstance(name, str) and (
            name == "__builtins__" or (name in origins.MODULE_INTERNALS and "_modules" in namespace.held)
        )
        if name in namespace.values or name in namespace.inputs or internal:
            return
        if name not in namespace.held or not namespace.had(name):
            namespace.values[name] = ABSENT
            return
        value = namespace.get(name)
        label = namespace.label_of(name)
        grows = type(value) is list and f"{label}{GROWS}" in self.varying
        if namespace.owner is None and (grows or (label in self.varying and statics.may_vary(value))):
            namespace.inputs.add(name)
            if grows:
                namespace.values[name] = statics.A_LIST
                self.appended.append(value)
            elif type(value) in (tuple, list):
                namespace.values[name] = statics.AnyNumbers(value)
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
        grows = type(value) is list and f"{label}{GROWS}" in self.varying
        number = label in self.varying and type(value) in statics.LARGEST and statics.may_vary(value)
        if (grows or number) and set_ is not ignore:
            if grows:
                self.cells.append(Cell(get, set_, label, statics.A_LIST, []))
                self.appended.append(value)
            self.numbers.append((Cell(get, set_, label, None, None), None, label))
            self.number_found()
            return
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
                self._record_everything(namespace)
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


_NAMED_BY_AUTOGRAD = frozenset({"forward", "setup_context", "backward", "jvp", "vjp", "vmap"})
