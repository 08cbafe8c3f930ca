"""Objects that are nothing but their attributes, as nodes of pytrees: among arguments, and made and returned.

A function runs on stand-ins of the objects, lists and dicts among its arguments. What it does to
these *parts*, a program does to the real ones at every call: attributes are assigned, contents replaced. Objects that
the function makes, such as a model's cache, are made anew at each call with tensors of their own.
"""

from __future__ import annotations

import collections
import gc
import types
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch

from primexec import _torch, statics
from primexec._torch import pytree
from primexec.errors import CaptureError


@dataclass(frozen=True, slots=True)
class Instance:
    """A node of a pytree that stands for an object."""

    kind: type
    attributes: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Part:
    """An object, list or dict among the arguments: its number in the order of `parts`."""

    number: int


def _flatten(instance: Instance) -> tuple[list[Any], Any]:
    return list(instance.attributes.values()), (instance.kind, tuple(instance.attributes))


def _flatten_with_keys(instance: Instance) -> tuple[list[Any], Any]:
    children, context = _flatten(instance)
    return list(zip(map(pytree.GetAttrKey, context[1]), children, strict=True)), context


def _rebuild(children: Any, context: Any) -> Any:
    kind, names = context
    made: Any = kind.__new__(kind)
    made.__dict__.update(zip(names, children, strict=True))
    return made


pytree.register_pytree_node(Instance, _flatten, _rebuild, flatten_with_keys_fn=_flatten_with_keys)


def is_object(value: Any) -> bool:
    """Whether an object is its attributes and nothing more, by its class."""
    kind = type(value)
    if kind is types.SimpleNamespace:
        return True
    inherited = ["__getattribute__", "__new__", "__reduce__", "__reduce_ex__", "__getstate__"]
    inherited += [] if _is_frozen(kind) else ["__setattr__"]
    return (
        hasattr(value, "__dict__")
        and not isinstance(value, type)
        and kind not in pytree.SUPPORTED_NODES
        and statics.freeze_argument(value) is None
        and all(getattr(kind, name, None) is getattr(object, name, None) for name in inherited)
        and not any(hasattr(kind, name) for name in ("__setstate__", "__del__"))
        and not any(vars(base).get("__slots__") for base in kind.__mro__)
        and bool(kind.__flags__ & _HEAP)
    )


def _is_frozen(kind: type) -> bool:
    """Whether what assigns attributes is only what the decorator of frozen dataclasses has put there."""
    owner = next(base for base in kind.__mro__ if "__setattr__" in vars(base))
    parameters = vars(owner).get("__dataclass_params__")
    return parameters is not None and parameters.frozen


_HEAP = 1 << 9  # a class made by a `class` statement


def opened(value: Any, around: tuple[int, ...] = ()) -> Any:
    """Arguments with an `Instance` in place of each object; one that contains itself stays as it is."""

    def replaced(leaf: Any) -> Any:
        if id(leaf) in around or not is_object(leaf):
            return leaf
        return Instance(type(leaf), opened(dict(vars(leaf)), (*around, id(leaf))))

    return pytree.tree_map(replaced, value, is_leaf=_torch.is_leaf)


def tensors_of(arguments: Any) -> list[torch.Tensor]:
    """The tensors among arguments, those in objects too."""
    return [t for t in _torch.flatten(opened(arguments))[0] if isinstance(t, torch.Tensor)]


def node_of(value: Any) -> Any:
    """How pytrees take a container apart and put it together; None of anything else."""
    kind: Any = type(value)
    if kind not in pytree.SUPPORTED_NODES and pytree.is_namedtuple_instance(value):
        kind = collections.namedtuple
    return None if _torch.is_leaf(value) else pytree.SUPPORTED_NODES.get(kind)


def children_of(value: Any) -> list[Any] | None:
    """What a container or an object holds; None of a leaf."""
    if is_object(value):
        return list(vars(value).values())
    node = node_of(value)
    return None if node is None else list(node.flatten_fn(value)[0])


def parts(arguments: tuple[Any, Any]) -> list[tuple[Any, bool]]:
    """The objects, lists and dicts among `args, kwargs`, from the outside in; whether it is or is in an object."""
    return [(node, inside) for node, _, part, inside in _nodes(arguments) if part]


def _nodes(value: Any, depth: int = 0, inside: bool = False) -> Iterator[tuple[Any, list[Any], bool, bool]]:
    """(node, its children, whether it is a part, whether it is or is in an object) of each node of `args, kwargs`."""
    children = children_of(value)
    if children is None:
        return
    inside = inside or is_object(value)
    yield value, children, is_object(value) or (depth > 1 and type(value) in (list, dict)), inside
    for child in children:
        yield from _nodes(child, depth + 1, inside)


class StandIns:
    """The arguments that a function runs on while it is traced, and what they held before.

    Args:
        real: the arguments that they stand for.
    """

    def __init__(self, arguments: Any, real: Any) -> None:
        self._before = [(n, c, p, _names(n)) for n, c, p, _ in _nodes(arguments)]
        self._parts = [node for node, _, part, _ in self._before if part]
        self._numbers = {id(node): i for i, node in enumerate(self._parts)}
        found = parts(real)
        self._real = [part for part, _ in found]
        self.objects = [part for part, inside in found if inside]
        self._stand_alone(self.objects)

    def _stand_alone(self, real: list[Any]) -> None:
        if len(set(map(id, real))) < len(real):
            raise CaptureError(
                "an object, or a list or dict that is changed, stands in two places among the arguments",
                hint="pass it once, or tensors and plain values",
            )

    def nodes(self) -> list[Any]:
        """The containers and objects, in the order in which they are taken apart."""
        return [node for node, *_ in self._before]

    def __contains__(self, value: object) -> bool:
        return id(value) in self._numbers

    def identities(self) -> frozenset[int]:
        return frozenset(self._numbers)

    def part(self, value: object) -> Part:
        """What a stand-in stands for."""
        return Part(self._numbers[id(value)])

    def changes(self) -> list[tuple[Part, Any, Any, str]]:
        """(part, key, new value, label) of what the function did to its arguments.

        All elements of a list stand under one key, and those of a dict that lost some.

        Raises:
            CaptureError: where it changed something else among them.
        """
        found: list[tuple[Part, Any, Any, str]] = []
        for node, children, part, names in self._before:
            now, names_now, label = children_of(node) or [], _names(node), type(node).__name__
            same = len(now) == len(children) and all(a is b for a, b in zip(now, children, strict=True))
            if same and names == names_now:
                continue
            if part and type(node) is list:
                found.append((self.part(node), slice(None), tuple(node), label))
            elif part and names == names_now[: len(names)]:
                before = dict(zip(names[1:], children, strict=True))
                changed = [(k, v) for k, v in zip(names_now[1:], now, strict=True) if before.get(k, found) is not v]
                found += [(self.part(node), k, v, f"{label}.{k}") for k, v in changed]
            elif part and type(node) is dict:
                found.append((self.part(node), slice(None), dict(node), label))
            else:
                raise CaptureError(
                    f"the function changed a {label} among its arguments",
                    hint="return the new values instead",
                )
        if found:
            self._stand_alone(self._real)
        return found

    def check_apart(self, reached: dict[int, Any], changes: list[tuple[Part, Any, str]]) -> None:
        """Raise where the function reaches an object by itself as well, or a list or dict that it changes."""
        changed = {part.number for part, *_ in changes}
        for number, part in enumerate(self._real):
            if id(part) in reached and (number in changed or is_object(part)):
                raise CaptureError(
                    f"an argument is, or holds, a {type(part).__name__} that the function also reaches by itself",
                    hint="use one of the two",
                )

    def inside(self) -> set[int]:
        """The identities of what the stand-ins consist of."""
        return {id(held) for part in self._parts for held in (part, getattr(part, "__dict__", None))}


def _names(node: Any) -> tuple[Any, ...]:
    """The class of a node, and the names in it, in their order."""
    held = node if isinstance(node, dict) else getattr(node, "__dict__", {})
    return type(node), *held


def taken_apart(results: tuple[Any, ...], stand_ins: StandIns) -> tuple[Any, ...]:
    """What a function returns, and what it stored in its arguments, with a `Part` for what is one of these.

    An `Instance` stands for each object that it made, unless one stands in two places or something else holds it.

    Raises:
        CaptureError: where that is so of an object or container that is stored.
    """
    found: dict[int, Any] = {}
    inside = {id(found), id(results), *stand_ins.inside()}
    whole = [_collect(result, found, inside, stand_ins, stored=i > 0) for i, result in enumerate(results)]
    if not all(whole) or (found and _is_held(list(found.values()), inside)):
        if len(results) > 1:
            raise CaptureError(
                "the function stores an object or container in its arguments that something else holds as well",
                hint="store one that nobody else holds",
            )
        found.clear()

    return tuple(_replaced(result, found, stand_ins) for result in results)


def _replaced(value: Any, found: dict[int, Any], stand_ins: StandIns) -> Any:
    def leaf_of(leaf: Any) -> Any:
        if leaf in stand_ins:
            return stand_ins.part(leaf)
        if id(leaf) not in found:
            return leaf
        return Instance(type(leaf), _replaced(dict(vars(leaf)), found, stand_ins))

    own = stand_ins.identities()  # pytree leaves cycles behind that hold `is_leaf`: no tensor may hang on it
    return pytree.tree_map(leaf_of, value, is_leaf=lambda v: _torch.is_leaf(v) or id(v) in own)


def _collect(value: Any, found: dict[int, Any], inside: set[int], stand_ins: StandIns, stored: bool) -> bool:
    """Whether each object in a value, and each container that is stored, stands there once; all are noted."""
    children = children_of(value)
    if value in stand_ins or children is None:
        return True
    new = id(value) not in (inside if stored else found)
    inside |= {id(value), id(getattr(value, "__dict__", None))}
    if is_object(value) or (stored and not isinstance(value, tuple)):
        if not new:
            return False
        found[id(value)] = value
    return all([_collect(child, found, inside, stand_ins, stored) for child in children])


def _is_held(objects: list[Any], inside: set[int]) -> bool:
    """Whether anything but these containers and running functions refers to one of the objects."""
    inside.add(id(objects))
    return any(id(r) not in inside and not isinstance(r, types.FrameType) for r in gc.get_referrers(*objects))
