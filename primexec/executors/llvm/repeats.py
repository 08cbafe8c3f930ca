"""Equal regions are compiled once: the layers of a model have the same operators on tensors of the same layout."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from typing import Any
from weakref import WeakValueDictionary

from torch import Tensor, fx

from primexec.executors.base import RegionFunction

_known: WeakValueDictionary[Any, RegionFunction] = WeakValueDictionary()
_lock = threading.Lock()


def once(graph: fx.Graph, options: Mapping[str, Any], make: Callable[[], RegionFunction]) -> RegionFunction:
    """What `make` returned for an equal graph, if that is still in use; else what it returns now."""
    key = structure(graph), tuple(sorted((k, _frozen(v, {})) for k, v in options.items()))
    with _lock:
        found = _known.get(key)
    if found is None:
        found = make()
        with _lock:
            _known[key] = found
    return found


def structure(graph: fx.Graph) -> tuple[Any, ...]:
    """What compiled code depends on: operators, static arguments, who uses what, layouts; and the lines named in it."""
    numbers: dict[fx.Node, int] = {}
    rows: list[Any] = []
    for node in graph.nodes:
        arguments = () if node.op == "placeholder" else (_frozen(node.args, numbers), _frozen(node.kwargs, numbers))
        target = "" if node.op == "placeholder" else node.target
        rows.append((node.op, target, arguments, _layout(node.meta.get("val")), node.meta.get("source")))
        numbers[node] = len(numbers)
    return tuple(rows)


def _layout(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.stride(), value.device
    return tuple(map(_layout, value)) if isinstance(value, (tuple, list)) else None


def _frozen(value: Any, numbers: Mapping[fx.Node, int]) -> Any:
    if isinstance(value, fx.Node):
        return fx.Node, numbers[value]
    if isinstance(value, (list, tuple)):
        return tuple(_frozen(v, numbers) for v in value)
    if isinstance(value, Mapping):
        return tuple((k, _frozen(v, numbers)) for k, v in value.items())
    return type(value), repr(value) if isinstance(value, (float, complex)) else value
