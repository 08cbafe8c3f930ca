"""Modules that refer to themselves: what `forward` assigns to `self` is seen through every reference."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

import primexec
from tests.programs.table import Family, tensors

FAMILY = Family("selves")
X = tensors((3, 4))


class Memory(nn.Module):
    """Keeps what it was last given, as a buffer or as a plain tensor, and looks at it through `look`."""

    def __init__(self, keep: Any, buffer: bool) -> None:
        super().__init__()
        memory = torch.full((3, 4), 5.0)
        if buffer:
            self.register_buffer("memory", memory)
        else:
            self.memory = memory
        self.look = keep(self)

    def step(self, x: Tensor) -> Tensor:
        return self.memory + x

    def forward(self, x: Tensor) -> Tensor:
        before, self.memory = self.memory, x * 10
        return self.look(x) - before


class Child(nn.Module):
    def __init__(self, parent: Memory) -> None:
        super().__init__()
        object.__setattr__(self, "parent", parent)

    def forward(self, x: Tensor) -> Any:
        return self.parent.step(x)


def hooked(module: Memory) -> nn.Module:
    inner = nn.Identity()
    inner.register_forward_hook(lambda _, args, out: out + module.memory)
    return inner


def writing(module: Memory) -> Any:
    def look(x: Tensor) -> Tensor:
        module.memory = module.memory + x
        return module.memory * 2

    return look


def removing(module: Memory) -> Any:
    def look(x: Tensor) -> Tensor:
        memory = module.memory
        del module.memory
        assert not hasattr(module, "memory")
        module.register_buffer("memory", memory + x)
        return memory

    return look


for name, keep in {
    "bound_method": lambda module: module.step,
    "closure": lambda module: lambda x: module.memory + x,
    "partial": lambda module: functools.partial(Memory.step, module),
    "table": lambda module: lambda x, steps={"step": module.step}: steps["step"](x),
    "child": Child,
    "hook": hooked,
    "writing": writing,
}.items():
    for buffer in (True, False):
        make = functools.partial(Memory, keep, buffer)
        kind = "buffer" if buffer else "plain"
        FAMILY.add_factory(f"{name}_{kind}", make, X)
        FAMILY.add_factory(f"{name}_{kind}_of_method", lambda make=make: make().forward, X)
FAMILY.add_factory("removing", functools.partial(Memory, removing, True), X)


class Growing(Memory):
    """Its state is empty before the first call."""

    def __init__(self) -> None:
        super().__init__(lambda module: module.step, True)
        self.memory = torch.zeros(0)

    def forward(self, x: Tensor) -> Tensor:
        self.memory = self.memory if self.memory.numel() else torch.zeros_like(x)
        self.memory = self.memory * 0.5 + x
        return self.look(x)


class Both(nn.Module):
    """Runs a module and its traced form, which have one state."""

    def __init__(self) -> None:
        super().__init__()
        self.plain = Memory(lambda module: module.step, True)
        self.others = [self.plain, primexec.make_traced(self.plain)]

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(x) + self.others[0](x) + self.others[1](x)


FAMILY.add_factory("growing", Growing, X, traces_at=(0, 1))
FAMILY.add_factory("beside_its_traced_form", Both, X)
