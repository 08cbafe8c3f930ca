"""Exceptions of the user's code: they, and what the function did before them, are eager's."""

import collections
import random
import sys
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from primexec import CaptureError, make_traced
from tests.harness import close

EXECUTORS = ["aten", ("llvm", "aten")]


class Stop(Exception):
    """Carries what was computed so far."""


class Holder:
    def __init__(self) -> None:
        self.last: Any = None
        self.count = 0


def calls(prepare: Callable[[Any], Any]) -> list[Any]:
    """What a few calls of each kind give, leave behind and raise."""
    torch.manual_seed(0)
    norm, holder, weight = nn.BatchNorm1d(2, affine=False), Holder(), nn.Parameter(torch.ones(2))
    log, ages, queue = [1, 2], {"b": 1, "a": 2}, collections.OrderedDict(b=1, a=2)

    def run(x: Tensor, kind: str) -> Any:
        y = norm(x) + torch.rand(2)
        x.add_(1)
        if kind == "python":
            log.append(3)
            log.remove(1)
            ages["c"] = ages.pop("b")
            queue.popitem(last=False)
            holder.count += 1
            raise KeyError(kind)
        if kind == "cleared":
            log.clear()
            del ages["a"]
            raise ValueError(kind, x.shape)
        if kind == "tensors":
            holder.last = y * 2
            norm.last = y
            (weight * 3).sum().backward()
            raise ValueError(kind)
        if kind == "random":
            holder.last = random.random() + np.random.rand()
            raise ValueError(kind)
        if kind == "stop":
            stop = Stop(kind)
            stop.found = y.detach()  # type: ignore[attr-defined]
            raise stop
        if kind == "shape":
            return x @ torch.ones(3, 4)
        if kind == "grad mode":
            torch.set_grad_enabled(False)
            raise ValueError(kind)
        return y.sum()

    traced, facts = prepare(run), []
    for kind in (*KINDS, "none", *KINDS):
        x = torch.ones(3, 2)
        try:
            result = traced(x, kind)
        except Exception as error:
            found = getattr(error, "found", None)
            result = type(error), str(error), getattr(error, "__notes__", None), type(found), found
        assert torch.is_grad_enabled() != (kind == "grad mode")
        torch.set_grad_enabled(True)
        buffers = {name: t.clone() for name, t in norm.named_buffers()}
        held = None if weight.grad is None else weight.grad.clone(), vars(norm).get("last"), holder.last, holder.count
        state = list(log), list(ages.items()), list(queue.items())
        facts.append((kind, result, x, buffers, held, state, torch.get_rng_state(), hash(random.getstate())))
    return facts


KINDS = ("python", "cleared", "tensors", "random", "stop", "shape", "grad mode")


@pytest.mark.parametrize("executor", EXECUTORS, ids=str)
def test_effects_before_an_exception_are_eagers(executor: Any) -> None:
    outcomes = []
    for prepare in (lambda fn: fn, lambda fn: make_traced(fn, executor=executor)):
        random.seed(0)
        np.random.seed(0)
        outcomes.append(calls(prepare))
    for eager, traced in zip(*outcomes, strict=True):
        got, want = tree_leaves(traced), tree_leaves(eager)
        assert len(got) == len(want), f"{traced}, not {eager}"
        for a, b in zip(got, want, strict=True):
            assert close(a, b) if isinstance(b, Tensor) else a == b, f"{traced}, not {eager}"


def test_what_raises_only_while_it_is_traced_is_refused() -> None:
    @make_traced
    def function(x: Tensor) -> Tensor:
        x.add_(1)
        if x.__class__.__name__ != "Tensor":
            raise ValueError("not under compilers")
        return x

    x = torch.zeros(1)
    with pytest.raises(CaptureError, match="raises ValueError while it is traced") as refused:
        function(x)
    assert refused.value.source is not None
    assert refused.value.source.text == 'raise ValueError("not under compilers")'
    assert isinstance(refused.value.__cause__, ValueError)
    assert torch.equal(x, torch.ones(1))  # the function ran


def test_an_exit_is_not_run_again() -> None:
    ran = []

    @make_traced
    def function(x: Tensor) -> None:
        ran.append(x.shape)
        print("ran")
        sys.exit(3)

    with pytest.raises(SystemExit):
        function(torch.ones(1))
    assert not ran


def test_traced_functions_that_raise_inside_others_and_themselves() -> None:
    def outer(wrap: Callable[[Any], Any]) -> tuple[Tensor, Tensor]:
        @wrap
        def count_down(x: Tensor, n: int) -> Tensor:
            x.add_(1)
            if n == 0:
                raise Stop
            return count_down(x, n - 1)

        @wrap
        def catches(x: Tensor) -> Tensor:
            try:
                return count_down(x, 2)
            except Stop:
                return x * 10

        x = torch.zeros(1)
        with pytest.raises(Stop):
            count_down(x, 3)
        return x, catches(x)

    assert outer(make_traced) == outer(lambda fn: fn)


def test_exception_of_a_traced_function_in_a_backward_pass() -> None:
    def gradient(wrap: Callable[[Any], Any]) -> Tensor:
        total = torch.zeros(2)

        @wrap
        def hook(g: Tensor) -> None:
            total.add_(g)
            raise Stop

        x = torch.ones(2, requires_grad=True)
        y = x * 2
        y.register_hook(hook)
        with pytest.raises(Stop):
            y.sum().backward()
        return total

    assert torch.equal(gradient(make_traced), gradient(lambda fn: fn))


class Watched(nn.Module):
    """Keeps what it saw last, and raises on NaN."""

    last: Any = None

    def forward(self, x: Tensor) -> Tensor:
        self.last = x * 2
        if torch.isnan(x).any():
            raise ValueError(f"nan among {x.tolist()}")
        self.last = x * 3
        return x + 1


@pytest.mark.parametrize("executor", EXECUTORS, ids=str)
def test_attributes_assigned_before_a_cached_program_raises(executor: Any) -> None:
    module = Watched()
    module.last = None
    traced: Any = make_traced(module, executor=executor)
    for value in (1.0, 1.0, float("nan"), 2.0):
        x = torch.full((2,), value)
        if value != value:
            with pytest.raises(ValueError, match=r"nan among \[nan, nan\]") as caught:
                traced(x)
            assert caught.value.__context__ is None
            assert module.last.isnan().all()
        else:
            assert torch.equal(traced(x), x + 1)
            assert torch.equal(module.last, x * 3)
    assert traced.cache_info().traces == 2  # without a tensor there, and with one


@pytest.mark.parametrize("executor", EXECUTORS, ids=str)
def test_an_error_of_values_that_the_function_handles(executor: Any) -> None:
    def factor(x: Tensor) -> Tensor:
        y = torch.zeros_like(x).add_(x)
        try:
            return torch.linalg.cholesky(y) * 2
        except RuntimeError:
            return y.new_zeros(2, 2)

    traced = make_traced(factor, executor=executor)
    for x in (torch.eye(2), -torch.eye(2), torch.eye(2) * 4):
        torch.testing.assert_close(traced(x), factor(x))
    assert traced.cache_info()[:3] == (2, 1, 1)


def test_an_error_after_a_write_is_raised() -> None:
    @make_traced
    def factor(x: Tensor) -> Tensor:
        x.add_(1)
        try:
            return torch.linalg.cholesky(x)
        except RuntimeError:
            return x

    factor(torch.eye(2))
    with pytest.raises(RuntimeError, match="cholesky"):
        factor(-torch.eye(2))


def test_code_that_fails_where_it_is_told_that_it_is_compiled() -> None:
    def masked(x: Tensor, mask: Tensor | None, bad: bool) -> Tensor:
        if mask is None and not torch.compiler.is_compiling():
            mask = torch.ones_like(x)
        if bad:
            raise KeyError("bad")
        return x * mask[None]  # type: ignore[index]

    traced = make_traced(masked)
    for x in (torch.ones(2), torch.full((2,), 3.0)):
        assert torch.equal(traced(x, None, False), masked(x, None, False))
    assert traced.cache_info().traces == 1
    with pytest.raises(KeyError, match="bad"):
        traced(torch.ones(2), None, True)
    assert not torch.compiler.is_compiling()
