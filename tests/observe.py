"""Calls a function on copies of its arguments, notes all that the call does, and compares two such notes."""

from __future__ import annotations

import enum
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.utils import _pytree as pytree


class Kind(enum.StrEnum):
    SAME = "same"  # equal bit for bit
    CLOSE = "close"  # equal within the default tolerance of torch.testing.assert_close
    METADATA = "metadata"  # the values are undefined, all else is equal
    RAISED = "raised"  # eager raised, and the traced function the same type
    CAPTURE = "CaptureError"
    WRONG = "wrong"


RIGHT = (Kind.SAME, Kind.CLOSE, Kind.METADATA, Kind.RAISED)


@dataclass(frozen=True)
class Call:
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class Copier:
    """Copies tensors with strides and offset; tensors that were one, or shared memory, do so afterwards."""

    def __init__(self) -> None:
        self._storages: dict[int, torch.UntypedStorage] = {}
        self._leaves: dict[int, Any] = {}

    def __call__(self, leaf: Any) -> Any:
        if id(leaf) not in self._leaves:
            self._leaves[id(leaf)] = self._copy(leaf)
        return self._leaves[id(leaf)]

    def _copy(self, leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return self._tensor(leaf).requires_grad_(leaf.requires_grad)
        if isinstance(leaf, torch.Generator):
            return torch.Generator(leaf.device).set_state(leaf.get_state())
        return leaf.copy() if isinstance(leaf, np.ndarray) else leaf

    def _tensor(self, leaf: torch.Tensor) -> torch.Tensor:
        if leaf.layout is not torch.strided or type(leaf) is not torch.Tensor or leaf.is_nested:
            return leaf.detach().clone()
        if leaf.is_conj():
            return self._tensor(leaf.conj()).conj()
        if leaf.is_neg():
            return torch._neg_view(self._tensor(torch._neg_view(leaf)))
        storage = leaf.untyped_storage()
        mine = self._storages.setdefault(storage._cdata, storage.clone())
        empty = torch.empty(0, dtype=leaf.dtype, device=leaf.device)
        return empty.set_(mine, leaf.storage_offset(), leaf.shape, leaf.stride())


def copied(call: Call) -> Call:
    copier = Copier()
    return Call(pytree.tree_map(copier, call.args), pytree.tree_map(copier, call.kwargs))


def leaves_of(call: Call) -> list[Any]:
    return pytree.tree_leaves((call.args, call.kwargs))


def metadata(tensor: torch.Tensor) -> dict[str, Any]:
    """Everything but the values. Only strided tensors have strides."""
    found = {
        "type": type(tensor),
        "dtype": tensor.dtype,
        "device": tensor.device,
        "layout": tensor.layout,
        "shape": tuple(tensor.shape) if not tensor.is_nested else "nested",
        "requires_grad": tensor.requires_grad,
        "is_conj": tensor.is_conj(),
        "is_neg": tensor.is_neg(),
    }
    if tensor.layout is torch.strided and not tensor.is_nested:
        found |= {"stride": tensor.stride(), "storage_offset": tensor.storage_offset()}
    return found


def sharing(leaves: Sequence[Any]) -> list[tuple[int, int]]:
    """For each leaf the first one that is the same tensor, and the first one in the same memory."""
    tensors: dict[int, int] = {}
    storages: dict[int, int] = {}
    found = []
    for position, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor) and leaf.layout is torch.strided:
            storage = leaf.untyped_storage()._cdata
            found.append((tensors.setdefault(id(leaf), position), storages.setdefault(storage, position)))
        else:
            found.append((position, position))
    return found


def alike(first: Call, second: Call) -> bool:
    """Whether two calls differ in nothing but the values of tensors, so that one program must serve both."""
    leaves = leaves_of(first), leaves_of(second)
    structures = [pytree.tree_structure((call.args, call.kwargs)) for call in (first, second)]
    if structures[0] != structures[1] or sharing(leaves[0]) != sharing(leaves[1]):
        return False
    return all(_alike(*pair) for pair in zip(*leaves, strict=True))


def _alike(one: Any, other: Any) -> bool:
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return metadata(one) == metadata(other)
    # repr tells 0.0 from -0.0 and takes NaN for itself. Functions and modules are the same only as objects.
    return one is other or (type(one) is type(other) and repr(one) == repr(other) and not callable(one))


@dataclass
class Observed:
    """All that a call does: its result or error, and what it left behind."""

    output: list[Any]
    structure: Any
    inputs: list[Any]
    state: dict[str, torch.Tensor]
    sharing: list[tuple[int, int]]
    rng: torch.Tensor
    error: Exception | None


def state_of(fn: Callable[..., Any]) -> dict[str, torch.Tensor]:
    if not isinstance(fn, torch.nn.Module):
        return {}
    return {**dict(fn.named_parameters()), **dict(fn.named_buffers())}


def observe(fn: Callable[..., Any], call: Call, seed: int) -> Observed:
    output, error = None, None
    inputs = leaves_of(call)
    torch.default_generator.manual_seed(seed)  # torch.manual_seed also queues the seed for every accelerator: slow
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            output = fn(*call.args, **call.kwargs)
        except Exception as raised:
            error = raised.with_traceback(None)
    rng = torch.get_rng_state()
    leaves, structure = pytree.tree_flatten(output)
    state = {name: tensor.detach().clone() for name, tensor in state_of(fn).items()}
    return Observed(leaves, structure, inputs, state, sharing([*inputs, *leaves]), rng, error)


def same_bits(expected: torch.Tensor, actual: torch.Tensor) -> bool:
    """Equal to the last bit, except that one NaN is as good as another."""
    if expected.layout is not torch.strided or expected.is_nested:
        expected, actual = expected.to_dense(), actual.to_dense()
    expected, actual = (
        expected.detach().resolve_conj().resolve_neg(),
        actual.detach().resolve_conj().resolve_neg(),
    )
    if expected.is_complex():
        expected, actual = torch.view_as_real(expected), torch.view_as_real(actual)
    if expected.is_floating_point():
        nan = expected.isnan()
        if not torch.equal(nan, actual.isnan()):
            return False
        expected, actual = expected.masked_fill(nan, 0), actual.masked_fill(nan, 0)
    flat = [t.clone(memory_format=torch.contiguous_format).reshape(-1) for t in (expected, actual)]
    as_bytes = [t.view(torch.uint8) for t in flat]
    return torch.equal(*as_bytes)


def compare_leaf(expected: Any, actual: Any, values: bool) -> tuple[Kind, str]:
    if not isinstance(expected, torch.Tensor):
        if isinstance(expected, torch.Generator) and isinstance(actual, torch.Generator):
            expected, actual = expected.get_state().tolist(), actual.get_state().tolist()
        equal = type(expected) is type(actual) and repr(expected) == repr(actual)
        return (Kind.SAME, "") if equal else (Kind.WRONG, f"{actual!r} for {expected!r}"[:300])
    if not isinstance(actual, torch.Tensor):
        return Kind.WRONG, f"{type(actual).__name__} for a tensor"
    facts = metadata(expected), metadata(actual)
    different = [
        f"{name} {facts[1].get(name)} for {fact}" for name, fact in facts[0].items() if facts[1].get(name) != fact
    ]
    if different:
        return Kind.WRONG, ", ".join(different)
    if not values or expected.is_meta:
        return Kind.METADATA, ""
    if same_bits(expected, actual):
        return Kind.SAME, ""
    try:
        torch.testing.assert_close(actual, expected, equal_nan=True)
    except AssertionError as error:
        return Kind.WRONG, "values: " + " ".join(str(error).split())[:300]
    return Kind.CLOSE, ""


def compare(expected: Observed, actual: Observed, values: bool) -> tuple[Kind, str]:
    """The worst difference between what eager did and what the traced function did."""
    if expected.error is not None:
        if type(actual.error) is type(expected.error):
            return Kind.RAISED, ""
        return Kind.WRONG, f"eager raises {expected.error!r}, traced {actual.error!r}"[:600]
    if actual.error is not None:
        return Kind.WRONG, f"raises {type(actual.error).__name__}: {actual.error}"[:600]
    if expected.structure != actual.structure:
        return Kind.WRONG, f"structure {actual.structure} for {expected.structure}"
    kinds = []
    pairs = [
        *((f"output {i}", e, a) for i, (e, a) in enumerate(zip(expected.output, actual.output, strict=True))),
        *((f"input {i} afterwards", e, a) for i, (e, a) in enumerate(zip(expected.inputs, actual.inputs, strict=True))),
        *((f"state {name} afterwards", e, actual.state.get(name)) for name, e in expected.state.items()),
    ]
    for where, one, other in pairs:
        kind, detail = compare_leaf(one, other, values)
        if kind is Kind.WRONG:
            return kind, f"{where}: {detail}"
        kinds.append(kind)
    if expected.sharing != actual.sharing:
        return Kind.WRONG, f"sharing of memory {actual.sharing} for {expected.sharing}"
    if not torch.equal(expected.rng, actual.rng):
        return Kind.WRONG, "the state of the generator"
    return next((kind for kind in (Kind.METADATA, Kind.CLOSE) if kind in kinds), Kind.SAME), ""


def untouched(call: Call, fn: Callable[..., Any], before: dict[str, torch.Tensor], actual: Observed, seed: int) -> str:
    """What a call that raised CaptureError has changed nevertheless; it must not change anything."""
    for position, (one, other) in enumerate(zip(leaves_of(call), actual.inputs, strict=True)):
        kind, detail = compare_leaf(one, other, True)
        if kind is Kind.WRONG:
            return f"CaptureError, but input {position} changed: {detail}"
    if any(not same_bits(before[name], tensor) for name, tensor in actual.state.items()):
        return "CaptureError, but the module's state changed"
    if not torch.equal(torch.Generator().manual_seed(seed).get_state(), actual.rng):
        return "CaptureError, but the generator moved"
    return ""
