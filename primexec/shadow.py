"""Structural shadows of modules: what a capture runs in place of the live module.

A shadow has the class and the attributes of its module, dictionaries of its own, and the same parameters
and buffers, which the tracer replaces by fake tensors as they are used. Other threads can go on calling
the module, and what the traced code assigns to `self` shows as a difference.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Iterator
from typing import Any

import torch

from primexec import _torch
from primexec.errors import CaptureError


class Shadows:
    """The shadows that stand in for `fn` and the modules it is bound to.

    Args:
        left: attributes that an earlier trace left behind, which the modules shall have, as `left()` gives them.
    """

    def __init__(self, left: dict[int, dict[str, Any]]) -> None:
        self._left = left
        self._of: dict[int, tuple[torch.nn.Module, torch.nn.Module]] = {}  # id → (module, shadow)
        self.by_dict: dict[int, torch.nn.Module] = {}  # id of a module's `__dict__` → its shadow

    def function(self, fn: Any) -> Any:
        """fn with the modules that it is, or is bound to, replaced by their shadows."""
        if isinstance(fn, torch.nn.Module):
            return self.module(fn)
        if isinstance(fn, types.MethodType) and isinstance(fn.__self__, torch.nn.Module):
            return types.MethodType(fn.__func__, self.module(fn.__self__))
        if isinstance(fn, functools.partial):
            args = [self.function(a) if isinstance(a, torch.nn.Module) else a for a in fn.args]
            return functools.partial(self.function(fn.func), *args, **fn.keywords)
        return fn

    def module(self, module: torch.nn.Module) -> torch.nn.Module:
        if id(module) in self._of:
            return self._of[id(module)][1]
        if isinstance(module, torch.jit.ScriptModule):
            raise CaptureError("a TorchScript module cannot be traced", hint="trace the module it was made from")
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None and torch.nn.parameter.is_lazy(tensor):
                raise CaptureError(
                    f"{type(module).__name__}.{name} is not initialised yet",
                    hint="run the lazy module once before tracing it",
                )
        shadow: torch.nn.Module = object.__new__(getattr(type(module), "primexec_class", type(module)))
        self._of[id(module)] = module, shadow
        self.by_dict[id(module.__dict__)] = shadow
        held = shadow.__dict__
        for name, value in self._attributes(module).items():
            held[name] = value.copy() if name in _DICTS else value
        for name, child in module._modules.items():
            held["_modules"][name] = None if child is None else self.module(child)
        return shadow

    def _attributes(self, module: torch.nn.Module) -> dict[str, Any]:
        return module.__dict__ | self._left.get(id(module.__dict__), {})

    def differences(self) -> Iterator[tuple[dict[str, Any], str, Any, Any, str]]:
        """(the module's dict, name, old value, new value, label) of what the traced code assigned or removed."""
        for module, shadow in self._of.values():
            label = type(module).__name__
            for kind in (None, "_parameters", "_buffers", "_non_persistent_buffers_set"):
                real = module.__dict__ if kind is None else module.__dict__.get(kind, {})
                before = self._attributes(module) if kind is None else real
                ours = shadow.__dict__ if kind is None else shadow.__dict__.get(kind, {})
                if isinstance(real, dict):
                    for name in {**ours, **before}:
                        if kind is None and name in _DICTS:
                            if "hooks" in name and ours[name].keys() != before[name].keys():
                                yield real, name, before[name], ours[name], f"{label}.{name}"
                            continue
                        old, new = before.get(name, _REMOVED), ours.get(name, _REMOVED)
                        if new is not old:
                            yield real, name, old, new, f"{label}.{name}"
            for name in shadow._modules.keys() ^ module._modules.keys():
                yield module.__dict__["_modules"], name, _REMOVED, shadow._modules.get(name), f"{label}.{name}"

    def left(self) -> dict[int, dict[str, Any]]:
        """What the traced code assigned, tensors apart, by the `id` of the dict that would hold it: name → value."""
        left: dict[int, dict[str, Any]] = {}
        for held, name, _, value, _ in self.differences():
            if not isinstance(value, torch.Tensor) and not _torch.holds_fake(value):
                left.setdefault(id(held), {})[name] = value
        return {held: names | self._left.get(held, {}) for held, names in left.items()}

    def clear(self) -> None:
        """Let go of the shadows, and so of the tensors that hang on them."""
        self._of.clear()
        self.by_dict.clear()

    def adopt(self, real: Any) -> Any:
        """The module a shadow stands for, where `real` is a shadow; used for what the function returns."""
        for module, shadow in self._of.values():
            if shadow is real:
                return module
        return real


def may_stand(value: Any) -> bool:
    """Whether a second trace may find what was assigned: neither a tensor nor a module, nor something removed."""
    left_behind = isinstance(value, (torch.Tensor, torch.nn.Module)) or _torch.holds_fake(value)
    return value is not _REMOVED and not left_behind


_REMOVED = object()
_DICTS = frozenset(name for name, value in torch.nn.Module().__dict__.items() if isinstance(value, dict))
