"""Fake tensors: metadata for which operators run without data. A part of `_torch.py`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from primexec._torch import private, pytree
from primexec._torch_dynamo import defer_dynamo


def fake_mode(*, cached: bool = True) -> Any:
    """A mode of fake tensors; its cache costs as much as it saves where operators hardly ever come again."""
    defer_dynamo()
    mode = private("torch._subclasses.fake_tensor.FakeTensorMode")()
    mode.cache_enabled &= cached
    return mode


def run(op: Any, args: Any, kwargs: Any) -> Any:
    """What an operator gives for fake tensors, in their mode.

    The rule of a prim is run here as the mode runs kernels. The mode itself runs it on fake tensors, which ask the mode
    for each view and each empty tensor: 5 to 9 times as long.
    """
    if op is torch.ops.aten.native_batch_norm.default and args[0].is_cpu:
        return _batch_norm(*args)
    rule = getattr(op, "prim_meta_impl", None)
    if rule is None or op._schema.is_mutable:
        return op(*args, **kwargs)
    leaves = pytree.tree_leaves((args, kwargs))
    fakes: list[Any] = [t for t in leaves if isinstance(t, Tensor)]
    devices = {t.device for t in fakes}
    told = any(isinstance(leaf, torch.device) for leaf in leaves)
    is_special = any(t._has_symbolic_sizes_strides or t.dim() == 0 for t in fakes)  # rules ask where a scalar lies
    if len(devices) != 1 or told or is_special:
        return op(*args, **kwargs)
    mode, (device,) = fakes[0].fake_mode, devices
    with private("torch._subclasses.fake_tensor.in_kernel_invocation_manager")(mode):
        out = rule(*args, **kwargs)
    wrap = private("torch._subclasses.fake_tensor.FakeTensor")
    return pytree.tree_map_only(Tensor, lambda t: t if isinstance(t, wrap) else wrap(mode, t, device), out)


def _batch_norm(x: Tensor, weight: Any, bias: Any, mean: Any, variance: Any, training: bool, *others: Any) -> Any:
    """PyTorch computes the norm with fake tensors, 30 operators of them."""
    kept = x.new_empty(x.shape[1] if training else 0)
    return torch.empty_like(x), kept, torch.empty_like(kept)
