"""What a function sets up in Python at its first use: the call runs as it is, and the next one is traced."""

from __future__ import annotations

import copy
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from primexec import CaptureError, make_traced

X = torch.arange(6.0).reshape(2, 3)


class Deciding(nn.Module):
    """Chooses its problem at the first call, installs a hook, and doubles its weight once."""

    def __init__(self) -> None:
        super().__init__()
        self.config = types.SimpleNamespace(problem=None)
        self.layer = nn.Linear(3, 3)
        self.shapes: list[torch.Size] = []
        self.ready = False

    def forward(self, x: Tensor) -> Tensor:
        if self.config.problem is None:
            self.config.problem = "regression" if x.dtype.is_floating_point else "classes"
        if not self.ready:
            self.layer.register_forward_hook(lambda module, args, out: out + 1)
            with torch.no_grad():
                self.layer.weight.mul_(2)
            self.ready = True
        if x.shape not in self.shapes:
            self.shapes.append(x.shape)
        out: Tensor = self.layer(x)
        return out * (2 if self.config.problem == "regression" else 3)


def test_hooks_attributes_tables_and_weights_are_set_up_as_in_eager() -> None:
    module, eager = Deciding(), Deciding()
    eager.load_state_dict(copy.deepcopy(module.state_dict()))
    traced = make_traced(module, executor="aten")
    for traces, x in ((0, X), (1, X), (1, X + 1), (1, X[:1]), (2, X[:1]), (3, X)):
        assert torch.equal(traced(x), eager(x))
        assert traced.cache_info().traces == traces
        assert torch.equal(module.layer.weight, eager.layer.weight)
        assert (module.config, module.ready, module.shapes) == (eager.config, True, eager.shapes)
        assert len(module.layer._forward_hooks) == 1


def test_a_program_of_later_calls_is_shown_and_nothing_is_set_up() -> None:
    module = Deciding()
    weight = module.layer.weight.clone()
    program = make_traced(module).trace(X)
    assert not [n for n in program.graph_module.graph.nodes if "mul_" in n.name]
    assert (module.config.problem, module.shapes, module.ready) == (None, [], False)
    assert not module.layer._forward_hooks
    assert torch.equal(module.layer.weight, weight)


def test_gradients_of_the_first_call_are_eagers() -> None:
    module, eager = Deciding(), Deciding()
    eager.load_state_dict(copy.deepcopy(module.state_dict()))
    traced = make_traced(module, executor="aten")
    for _ in range(2):
        for run in (traced, eager):
            run(X).square().sum().backward()
        assert torch.equal(module.layer.weight.grad, eager.layer.weight.grad)


def test_what_is_filed_under_the_same_key_again_is_set_up_once() -> None:
    table, seen = {"n": 1}, set()

    def function(x: Tensor) -> Tensor:
        table["n"] = 2
        seen.add(x.dtype)
        return x * table["n"]

    traced = make_traced(function)
    for traces in (0, 1, 1):
        assert torch.equal(traced(X), X * 2)
        assert (table, seen, traced.cache_info().traces) == ({"n": 2}, {X.dtype}, traces)


def test_what_is_set_back_and_forth_is_refused() -> None:
    class Toggled(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            self.train(not self.training)
            return x + 1

    module = Toggled()
    with pytest.raises(CaptureError, match="training"):
        make_traced(module)(X)
    assert module.training


COUNTS: dict[str, Any] = {}


def counted(x: Tensor) -> Tensor:
    COUNTS["n"] = COUNTS.get("n", 0) + 1
    return x * 2


def grown(x: Tensor) -> Tensor:
    COUNTS.setdefault("seen", []).append(x.shape)
    return x


@pytest.mark.parametrize("function", [counted, grown])
def test_what_every_call_changes_is_refused_at_once(function: Any) -> None:
    COUNTS.clear()
    for _ in range(2):
        with pytest.raises(CaptureError):
            make_traced(function)(X)
        assert COUNTS == {}


def test_what_the_same_call_sets_up_again_is_refused() -> None:
    """Else every call would be traced twice and run as it is."""
    state = types.SimpleNamespace(last=None)

    def alternating(x: Tensor) -> Tensor:
        if state.last != x.shape:
            state.last = x.shape
        return x + 1

    traced = make_traced(alternating)
    for x in (X, X[:1]):
        assert torch.equal(traced(x), x + 1)
        assert state.last == x.shape
    with pytest.raises(CaptureError, match=r"changes .*state.*last"):
        traced(X)
    assert state.last == X[:1].shape


class Rotary(nn.Module):
    """Keeps tables for the longest input so far, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.length, self.table = 0, None

    def forward(self, x: Tensor) -> Tensor:
        if self.length < len(x):
            self.length, self.table = len(x), torch.arange(float(len(x)))[:, None].cos()
        return x * self.table[: len(x)]


def test_tables_that_grow() -> None:
    eager, module = Rotary(), Rotary()
    traced = make_traced(module)
    for length in (2, 2, 4, 3, 4, 6, 4, 6):
        x = torch.randn(length, 3)
        torch.testing.assert_close(traced(x), eager(x))
        assert module.length == eager.length
        torch.testing.assert_close(module.table, eager.table)
