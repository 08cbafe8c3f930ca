"""Nodes of a program evaluated in float64: what they compute where nothing is rounded to the program's dtypes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch, effects
from primexec.ulp import is_floating

_REINTERPRETS = frozenset({torch.ops.aten.view.dtype, torch.ops.aten.view_as_real.default})


def wide(dtype: torch.dtype) -> torch.dtype:
    """float64 for floating-point dtypes, complex128 for complex ones, others as they are."""
    if dtype.is_complex:
        return torch.complex128
    return torch.float64 if dtype.is_floating_point else dtype


def widen(value: Any) -> Any:
    """A tensor in its wide dtype; anything else as it is."""
    return value.to(wide(value.dtype)) if isinstance(value, Tensor) else value


def copies(values: Iterable[Any], widened: bool = False) -> list[Any]:
    """Copies of tensors and generators, to be changed freely; tensors that share memory have copies that do."""
    storages: dict[tuple[int, torch.dtype], Tensor] = {}

    def copy(value: Any) -> Any:
        if isinstance(value, torch.Generator):
            return value.clone_state()
        if not isinstance(value, Tensor):
            return value
        value = value.detach().resolve_conj().resolve_neg()
        key = _torch.storage_key(value), value.dtype
        if key not in storages:
            whole = torch.empty(0, dtype=value.dtype, device=value.device).set_(value.untyped_storage())
            storages[key] = widen(whole) if widened and is_floating(value.dtype) else whole.clone()
        return storages[key].as_strided(value.shape, value.stride(), value.storage_offset())

    return [copy(value) for value in values]


def arguments(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """A node's arguments with the nodes among them replaced by values."""
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), value_of)
    return tuple(args), dict(kwargs)


def dtypes_of(node: fx.Node) -> list[torch.dtype | None]:
    """The dtype of each of a node's results in the program; None for what is no tensor."""
    value = node.meta.get("val")
    values = value if isinstance(value, (tuple, list)) else [value]
    return [v.dtype if isinstance(v, Tensor) else None for v in values]


def evaluate(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    """The node's result from wide arguments, without rounding.

    What has no float64 form (bits reinterpreted, kernels of one dtype) is computed in the program's dtypes.
    """
    op: Any = node.target
    if not isinstance(op, _torch.OpOverload):
        return op(*(arguments(node, value_of)[0]), **arguments(node, value_of)[1])
    if op in _REINTERPRETS:
        return _narrow(node, value_of)
    args, kwargs = _widen_dtypes(node, *arguments(node, value_of))
    try:
        return widen_all(op(*args, **kwargs))
    except (RuntimeError, NotImplementedError):
        return _narrow(node, value_of)


def widen_all(result: Any) -> Any:
    """`widen` for one result or a sequence of them."""
    return type(result)(map(widen, result)) if isinstance(result, (tuple, list)) else widen(result)


def _widen_dtypes(node: fx.Node, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    """Arguments that name a dtype name the wide one; integers enter operators with floating results as float64."""
    op: Any = node.target
    args, kwargs = fx.node.map_aggregate((args, kwargs), lambda a: wide(a) if isinstance(a, torch.dtype) else a)
    formals = {a.name: i for i, a in enumerate(op._schema.arguments)}
    if (at := formals.get("half_to_float")) is not None:
        args = tuple(False if i == at else a for i, a in enumerate(args))
        kwargs = kwargs | {"half_to_float": False} if "half_to_float" in kwargs else kwargs
    tensors = [t for t in _tensors((args, kwargs))]
    results = [d for d in dtypes_of(node) if d is not None]
    if any(is_floating(t.dtype) for t in tensors) or not any(map(is_floating, results)):
        return args, kwargs
    if "dtype" in formals:
        given = kwargs.get("dtype", args[formals["dtype"]] if formals["dtype"] < len(args) else None)
        return args, kwargs if given is not None else kwargs | {"dtype": wide(results[0])}
    return fx.node.map_aggregate((args, kwargs), lambda a: a.double() if isinstance(a, Tensor) else a)


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    fx.node.map_aggregate(values, lambda a: found.append(a) if isinstance(a, Tensor) else None)
    return found


def _narrow(node: fx.Node, value_of: Callable[[fx.Node], Any]) -> Any:
    """The node's result in the program's dtypes, from wide arguments; what it writes to is written."""
    op: Any = node.target
    narrowed: dict[fx.Node, Any] = {}

    def narrow(n: fx.Node) -> Any:
        value, like = value_of(n), n.meta.get("val")
        narrowed[n] = value.to(like.dtype) if isinstance(value, Tensor) and isinstance(like, Tensor) else value
        return narrowed[n]

    args, kwargs = arguments(node, narrow)
    result = op(*args, **kwargs)
    for n in effects.writes(node):
        if narrowed[n] is not value_of(n):
            value_of(n).copy_(narrowed[n])
        if result is narrowed[n]:
            return value_of(n)
    return widen_all(result)
