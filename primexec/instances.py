"""Objects that a function makes and returns, such as a model's cache: each call gets new ones with its own tensors."""

from __future__ import annotations

import gc
import types
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
    if not _collect(result, found, inside) or _is_held(list(found.values()), inside):
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
