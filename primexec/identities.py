"""Which containers a result is made of: lists and dicts that a function was given, or found, are returned themselves.

One that stands in a result twice is one object.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from primexec._torch import pytree
from primexec.instances import node_of


@dataclass(frozen=True, slots=True)
class Given:
    """A leaf of a result: a container or object among the arguments, by its number in the order of `StandIns.nodes`."""

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


def with_identities(result: Any, given: list[Any], found: Callable[[Any], bool]) -> Any:
    """A result with leaves and nodes of this file in place of the containers whose identity matters.

    Args:
        given: the containers and objects among the arguments.
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
        node = node_of(value)
        if node is None:
            return False
        met[id(value)] += 1
        inside = [count(child) for child in node.flatten_fn(value)[0]]
        return any(inside) or (met[id(value)] > 1 and not isinstance(value, tuple))

    def replaced(value: Any) -> Any:
        if (leaf := stands_for(value)) is not None:
            return leaf
        node = node_of(value)
        if node is None or id(value) in numbers:
            return value if node is None else Shared(numbers[id(value)], ())
        shared = met[id(value)] > 1 and not isinstance(value, tuple)
        if shared:
            numbers[id(value)] = len(numbers)
        children, context = node.flatten_fn(value)
        made = node.unflatten_fn([replaced(child) for child in children], context)
        return Shared(numbers[id(value)], (made,)) if shared else made

    return replaced(result) if count(result) else result
