"""Places in Python that hold values: dicts, and what stands behind a getter."""

from __future__ import annotations

import contextvars
import functools
import gc
import threading
import types
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from primexec import _torch, statics

ABSENT = "absent"


@dataclass(slots=True)
class Namespace:
    """A dict that belongs to an object the function can reach, and the values recorded in it."""

    held: dict[Any, Any]
    label: str
    values: dict[Any, Any] = field(default_factory=dict)  # name → frozen value
    originals: dict[Any, Any] = field(default_factory=dict)  # name → what it held, to restore it
    inputs: set[Any] = field(default_factory=set)  # names of numbers that are inputs of the program
    keys: dict[Any, int] | frozenset[Any] | None = None  # the names it held, with their positions where order matters
    flags: bool = False  # torch's own code sets plain values in it
    found: set[Any] = field(default_factory=set)  # names whose old values code has asked for that is not watched
    owner: type | None = None  # the class, whose dict must not be written to behind its back
    of: Any = None  # the object whose `__dict__` this is
    made: set[Any] = field(default_factory=set)  # names of what the program makes anew at every call

    @classmethod
    def of_class(cls, owner: type) -> Namespace:
        """The attributes of a class. Its `__dict__` is a proxy, and only a dict has a version that can be compared."""
        held = next(d for d in gc.get_referents(owner.__dict__) if isinstance(d, dict))
        namespace = cls(held, f"{owner.__name__}.", keys=frozenset(held), owner=owner)
        if (constructor := held.get("__init__")) is not None:  # it runs on what the function makes
            namespace.values["__init__"], namespace.originals["__init__"] = statics.Identity(constructor), constructor
        return namespace

    def special(self) -> set[str]:
        """The methods that run without being named."""
        return {n for n, value in self.held.items() if n.startswith("__") and n.endswith("__") and callable(value)}

    def get(self, name: Any) -> Any:
        return dict.__getitem__(self.held, name)  # a subclass may run code of its own

    def setter(self, name: Any) -> Callable[[Any], None]:
        return functools.partial(setattr, self.owner, name) if self.owner else functools.partial(self._set, name)

    def _set(self, name: Any, value: Any) -> None:
        statics.set_item(self.held, name, value)

    def put_back(self, name: Any) -> None:
        """Let a name be what it was when it was recorded."""
        if name in self.originals:
            self.setter(name)(self.originals[name])
        elif self.owner is not None:
            delattr(self.owner, name)
        else:
            del self.held[name]

    def restore(self) -> None:
        """Let all names be what they were, those that are gone be there again, and where it matters, in their order."""
        for name in [n for n in self.held if n in self.values or not self.had(n)]:
            known = name in self.originals or self.values.get(name, ABSENT) is ABSENT
            if known and self.get(name) is not self.originals.get(name, ABSENT):
                self.put_back(name)
        for name in self.originals.keys() - self.held.keys():
            self.put_back(name)
        if isinstance(self.keys, dict) and self.keys_now() != self.keys:
            base: Any = OrderedDict if isinstance(self.held, OrderedDict) else dict
            base.clear(self.held)
            base.update(self.held, self.originals)

    def keep_keys(self) -> None:
        """Record the names as well."""
        self.keys = self.keys_now()

    def may_set(self, name: Any, value: Any, loaded: set[str]) -> bool:
        """Whether a program may set a new plain value at every call.

        What it asks for as well is refused, unless it is a new attribute: a counter would trace at every call.
        """
        frozen, then = statics.freeze_static(value), self.values.get(name, ABSENT)
        is_attribute = isinstance(self.keys, frozenset) and frozen != then
        return frozen is not None and (self.flags or (is_attribute and (then is ABSENT or name not in loaded)))

    def is_made_anew(self, name: Any, value: Any, loaded: set[str]) -> bool:
        """Whether a container of plain values is a new one, and can be made again.

        What it takes the place of holds the same, or is an attribute that nothing asks for.
        """
        original = self.originals.get(name)
        return (
            statics.is_container(value)
            and statics.freeze_static(value) is None
            and value is not original
            and (statics.freeze(value) == self.values.get(name) or self.is_only_set(name, loaded))
            and all(isinstance(v, _torch.SYMBOLS) or statics.freeze_static(v) for v in _torch.flatten(value)[0])
        )

    def is_only_set(self, name: Any, loaded: set[str]) -> bool:
        """Whether it is an attribute that was there, and that nothing asks for."""
        return isinstance(self.keys, frozenset) and name in self.values and name not in loaded

    def is_unasked(self, name: Any, loaded: set[str]) -> bool:
        """Whether it is only set, and code that is not watched has not asked for what it held either."""
        return self.is_only_set(name, loaded) and name not in self.found

    def forget(self, name: Any) -> None:
        """From now on a name may hold anything."""
        del self.values[name]
        self.originals.pop(name, None)

    def had(self, name: Any) -> bool:
        """Whether there was such a name when the names were recorded, if they were."""
        return self.keys is None or key_of(name) in self.keys

    def keys_now(self) -> Any:
        """Tensors as keys are told apart by their identity, for == compares their values."""
        names = map(key_of, list(self.held))
        return frozenset(names) if isinstance(self.keys, frozenset) else {name: i for i, name in enumerate(names)}

    def is_empty(self) -> bool:
        """Whether it is a dict that was empty, and would have to be."""
        return self.of is None and self.keys is not None and not self.keys and not self.held

    def label_of(self, name: Any) -> str:
        return f"{self.label}{name if isinstance(name, str) else show_key(name)}"

    def changed(self) -> Iterator[tuple[Any, Any, Any]]:
        """(name, frozen then, frozen now) of what is no longer as recorded."""
        if self.of is not None and self.of.__dict__ is not self.held:
            yield "__dict__", statics.Identity(self.held), statics.Identity(self.of.__dict__)
        if self.keys is not None and (keys := self.keys_now()) != self.keys:
            yield next(iter({*keys} ^ {*self.keys}), ""), self.keys, keys
        for name, then in self.values.items():
            value = self.get(name) if name in self.held else ABSENT
            if then is statics.A_LIST and type(value) is list:
                continue
            same = then.value if isinstance(then, statics.Identity) else self.originals.get(name)
            if value is same and (isinstance(then, statics.Identity) or statics.has_contents(value)):
                continue
            now = ABSENT if value is ABSENT else statics.freeze(value)
            if now != then:
                yield name, then, now

    def replaced(self) -> list[tuple[Any, Any]]:
        """The lists, dicts and arrays that are no longer those recorded, and what they are to be equal to."""
        values = [(self.get(name), name, then) for name, then in self.originals.items() if name in self.held]
        return [(v, self.values[name]) for v, name, then in values if v is not then and statics.has_contents(v)]

    def settle(self) -> None:
        """Let go of the originals but those whose contents are kept and compared by themselves."""
        self.originals = {
            name: v
            for name, v in self.originals.items()
            if statics.has_contents(v) and statics.freeze_static(v) is None
        }


@dataclass(slots=True)
class Cell:
    """A closure cell, a slot, a context variable: one value behind a getter."""

    get: Callable[[], Any]
    set: Callable[[Any], None]
    label: str
    value: Any
    original: Any

    def changed(self) -> bool:
        """Whether it holds another value; contents are compared by themselves."""
        now = self.get()
        if self.value is statics.A_LIST:
            return type(now) is not list
        return not (now is self.original and statics.has_contents(now)) and statics.freeze(now) != self.value

    def settle(self) -> None:
        if isinstance(self.original, torch.Tensor):
            self.original = None


def cells_of(value: Any, label: str) -> list[tuple[Callable[[], Any], Callable[[Any], Any], str]]:
    """(getter, setter, label) of what an object written in C holds; `set` of a context variable returns a token."""
    if isinstance(value, contextvars.ContextVar):
        return [(lambda: value.get(ABSENT), value.set, label)]
    if isinstance(value, types.MappingProxyType):
        return [(lambda: dict(value), ignore, label)]
    if not isinstance(value, threading.local):
        return []
    names = list(value.__dict__)
    one = [(functools.partial(getattr, value, n, ABSENT), functools.partial(setattr, value, n)) for n in names]
    held = [(get, set_, f"{label}.{name}") for name, (get, set_) in zip(names, one, strict=True)]
    return [(lambda: tuple(value.__dict__), ignore, label), *held]


# The dicts of a module that its calls read: children, parameters, buffers, hooks.
MODULE_TABLES = tuple(
    name for name, held in torch.nn.Module().__dict__.items() if isinstance(held, dict) and "state_dict" not in name
)


def key_of(key: Any) -> Any:
    """A key of a dict, to be compared."""
    return statics.Identity(key) if isinstance(key, torch.Tensor) else key


def show_key(key: object) -> str:
    """A key of a dict in a label."""
    return f"a {type(key).__name__}" if isinstance(key, torch.Tensor) else repr(key)


def read_cell(cell: Any) -> Any:
    """What a closure cell holds."""
    try:
        return cell.cell_contents
    except ValueError:  # not filled yet
        return ABSENT


def ignore(value: Any) -> None:
    """Sets what code cannot change."""


def itself(value: Any) -> Any:
    """Get what never changes place."""
    return value
