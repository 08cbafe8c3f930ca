"""Fake tensors: metadata for which operators run without data. A part of `_torch.py`."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from primexec._torch import private, pytree, storage_key
from primexec._torch_dynamo import defer_dynamo


def fake_mode(*, cached: bool = True) -> Any:
    """A mode of fake tensors; its cache costs as much as it saves where operators hardly ever come again."""
    defer_dynamo()
    mode = private("torch._subclasses.fake_tensor.FakeTensorMode")()
    mode.cache_enabled &= cached
    return mode


def run(op: Any, args: Any, kwargs: Any) -> Any:
    """What an operator gives for fake tensors, in their mode.

    Kernels for metadata are run here as the mode runs them in the end. On the way there it asks decompositions and
    rules in Python, which ask it again for each view and each empty tensor: 5 to 20 times as long. What has memory of
    its own is made without the kernel where it comes again, as in equal layers.
    """
    if op is torch.ops.aten.native_batch_norm.default and args[0].is_cpu:
        op = kernel = _batch_norm
    elif (kernel := _kernel(op)) is None:
        return op(*args, **kwargs)
    tensors: list[Any] = []
    try:
        key = op, torch.get_default_dtype(), _described((args, kwargs), tensors)
    except _NotPlainError:
        return op(*args, **kwargs)
    if len({t.device for t in tensors}) != 1 or (kernel is not op and any(t.dim() == 0 for t in tensors)):
        return op(*args, **kwargs)  # rules of prims ask where a scalar lies
    mode, device = tensors[0].fake_mode, tensors[0].device
    try:
        with _in_kernel(mode):
            if key in _results:
                out = pytree.tree_map_only(_Made, _Made.again, _results[key])
            else:
                out = kernel(*args, **kwargs)
                if _has_own_memory(tensors, out) and len(_results) < MOST_RESULTS:
                    _results[key] = pytree.tree_map_only(Tensor, _Made.of, out)
    except Exception:
        return op(*args, **kwargs)  # the mode knows another way, or says what is wrong
    fake = _fake()
    return pytree.tree_map_only(Tensor, lambda t: t if isinstance(t, fake) else fake(mode, t, device), out)


def empty_like(t: Tensor, mode: Any) -> Tensor:
    """A fake tensor of a mode with the sizes and strides of another one, in memory of its own."""
    with _in_kernel(mode):
        meta = _Made.of(t).again()
    made: Tensor = _fake()(mode, meta, t.device)
    return made


def _fake() -> Any:
    return private("torch._subclasses.fake_tensor.FakeTensor")


def _in_kernel(mode: Any) -> Any:
    """As inside of a kernel: no mode sees what is called, and fake tensors are those without memory that they hold."""
    return private("torch._subclasses.fake_tensor.in_kernel_invocation_manager")(mode)


class _NotPlainError(Exception):
    pass


_PLAIN = (bool, int, float, complex, str, torch.dtype, torch.layout, torch.memory_format)


def _described(value: Any, tensors: list[Any]) -> Any:
    """Arguments as a key, and the tensors among them, which are fake ones of known sizes and unknown values."""
    if isinstance(value, Tensor):
        if type(value) is not _fake() or value._has_symbolic_sizes_strides or value.constant is not None:  # type: ignore[attr-defined]
            raise _NotPlainError
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.is_conj(), value.is_neg()
    if isinstance(value, (tuple, list)):
        return type(value), *[_described(v, tensors) for v in value]
    if isinstance(value, dict):
        return dict, *[(k, _described(v, tensors)) for k, v in value.items()]
    if value is None or isinstance(value, _PLAIN):
        return type(value), value
    raise _NotPlainError


@dataclass(frozen=True, slots=True)
class _Made:
    """A result in memory of its own."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    @classmethod
    def of(cls, t: Tensor) -> _Made:
        return cls(t.shape, t.stride(), t.dtype)

    def again(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


_results: dict[Any, Any] = {}
MOST_RESULTS = 1 << 16


def _has_own_memory(tensors: list[Tensor], out: Any) -> bool:
    """Whether what a kernel gives shares no memory, and sizes and strides are all that there is to it."""
    made = [t for t in pytree.tree_leaves(out) if isinstance(t, Tensor)]
    taken = {storage_key(t) for t in tensors}
    if len(taken.union(map(storage_key, made))) != len(taken) + len(made):
        return False
    is_plain = all(t.layout is torch.strided and not (t.is_conj() or t.is_neg() or t.storage_offset()) for t in made)
    sizes = ([t.untyped_storage().nbytes() for t in ts] for ts in (made, [_Made.of(t).again() for t in made]))
    return is_plain and operator.eq(*sizes)


@cache
def _kernel(op: Any) -> Any:
    """What gives an operator's metadata: a prim's rule, or the kernel; None where the mode has a rule of its own."""
    if op._schema.is_mutable:
        return None
    if (rule := getattr(op, "prim_meta_impl", None)) is not None:
        return rule
    if op in (torch.ops.aten.view.default, torch.ops.aten._unsafe_view.default):  # their rule is for unknown sizes
        return op
    rules = private("torch._subclasses.fake_impls.op_implementations_checks")
    return op if op.namespace == "aten" and not any(applies(op) for applies, _ in rules) else None


def _batch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, *others: Any) -> Any:
    """PyTorch computes the norm with fake tensors, 30 operators of them."""
    kept = x.new_empty(x.shape[1] if training else 0)
    return torch.empty_like(x), kept, torch.empty_like(kept)
