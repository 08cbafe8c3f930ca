"""Which objects a result is made of.

Objects that a function makes and returns, such as a model's cache, are made anew at each call, with its own tensors.
Lists and dicts that it was given, or found, are returned themselves; one that stands in a result twice is one object.
"""

from __future__ import annotations

import gc
import types
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from primexec import _torch, statics
from primexec._torch import pytree


@dataclass(frozen=True, slots=True)
class Instance:
    """A node of a pytree: an object that is nothing but its attributes."""

    kind: type
    attributes: dict[str, Any]


def _rebuild(children: Any, kind: type) -> Any:
    made: Any = object.__new__(kind)
    made.__dict__.update(*children)
    return made


pytree.register_pytree_node(Instance, lambda i: ([i.attributes], i.kind), _rebuild)


def taken_apart(result: Any) -> Any:
    """What a function returned, with an `Instance` in place of each object that it made and nobody else holds."""
    found: dict[int, Any] = {}
    inside: set[int] = {id(found)}
    if not _collect(result, found, inside) or not found or _is_held(list(found.values()), inside):
        return result

    def replaced(leaf: Any) -> Any:
        if id(leaf) not in found:
            return leaf
        return Instance(type(leaf), pytree.tree_map(replaced, vars(leaf), is_leaf=_torch.is_leaf))

    return pytree.tree_map(replaced, result, is_leaf=_torch.is_leaf)


def _collect(value: Any, found: dict[int, Any], inside: set[int]) -> bool:
    """Whether each object in a value stands there once; it and the containers around it are noted."""
    inside |= {id(value), id(getattr(value, "__dict__", None))}
    if _is_plain(value):
        if id(value) in found:
            return False
        found[id(value)] = value
        return all(_collect(v, found, inside) for v in vars(value).values())
    if type(value) not in pytree.SUPPORTED_NODES or _torch.is_leaf(value):
        return True
    children, _ = pytree.SUPPORTED_NODES[type(value)].flatten_fn(value)
    return all(_collect(v, found, inside) for v in children)


def _is_plain(value: Any) -> bool:
    """Whether an object is its attributes and nothing more, by its class."""
    kind = type(value)
    inherited = ("__new__", "__reduce__", "__reduce_ex__", "__getstate__", "__setattr__")
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, type)
        and statics.freeze_argument(value) is None
        and all(getattr(kind, name, None) is getattr(object, name, None) for name in inherited)
        and not any(hasattr(kind, name) for name in ("__setstate__", "__del__"))
        and not any(vars(base).get("__slots__") for base in kind.__mro__)
        and bool(kind.__flags__ & _HEAP)
    )


_HEAP = 1 << 9  # a class made by a `class` statement


def _is_held(objects: list[Any], inside: set[int]) -> bool:
    """Whether anything but these containers and running functions refers to one of the objects."""
    inside.add(id(objects))
    return any(id(r) not in inside and not isinstance(r, types.FrameType) for r in gc.get_referrers(*objects))


@dataclass(frozen=True, slots=True)
class Given:
    """A leaf of a result: a container among the arguments, by its number among them."""

    number: int


@dataclass(frozen=True, slots=True)
class Found:
    """A leaf of a result: a container that the function found."""

    value: Any


@dataclass(frozen=True, slots=True)
class Shared:
    """A node of a result: a container that stands there several times; at first, with what it is made of."""

    number: int
    made: tuple[Any, ...]


pytree.register_pytree_node(Shared, lambda s: (s.made, s.number), lambda made, number: Shared(number, tuple(made)))


def containers_of(tree: Any) -> list[Any]:
    """The containers in a pytree, in the order in which they are taken apart."""
    children = _children(tree)
    return [] if children is None else [tree, *(c for child in children[0] for c in containers_of(child))]


def _children(value: Any) -> tuple[list[Any], Any] | None:
    """What a container holds and how to make another one; None for a leaf."""
    children, spec = pytree.tree_flatten(value, is_leaf=lambda v: v is not value or _torch.is_leaf(v))
    return None if spec.is_leaf() else (children, spec)


def with_identities(result: Any, given: list[Any], found: Callable[[Any], bool]) -> Any:
    """A result with leaves and nodes of this file in place of the containers whose identity matters.

    Args:
        given: the containers among the arguments.
        found: whether a container is one that the function found, and will find again.
    """
    by_identity = {id(container): Given(i) for i, container in enumerate(given)}
    met: Counter[int] = Counter()
    numbers: dict[int, int] = {}

    def stands_for(value: Any) -> Any:
        return by_identity.get(id(value)) or (
            Found(value) if isinstance(value, (list, dict)) and found(value) else None
        )

    def count(value: Any) -> bool:
        """Whether there is such a container in a value."""
        if stands_for(value) is not None:
            return True
        parts = _children(value)
        if parts is None:
            return False
        met[id(value)] += 1
        inside = [count(part) for part in parts[0]]
        return any(inside) or (met[id(value)] > 1 and not isinstance(value, tuple))

    def replaced(value: Any) -> Any:
        if (leaf := stands_for(value)) is not None:
            return leaf
        parts = _children(value)
        if parts is None or id(value) in numbers:
            return value if parts is None else Shared(numbers[id(value)], ())
        if met[id(value)] > 1 and not isinstance(value, tuple):
            numbers[id(value)] = len(numbers)
            return Shared(numbers[id(value)], (pytree.tree_unflatten(map(replaced, parts[0]), parts[1]),))
        return pytree.tree_unflatten(map(replaced, parts[0]), parts[1])

    return replaced(result) if count(result) else result
