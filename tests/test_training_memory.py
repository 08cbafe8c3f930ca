"""Memory of a training step: what was saved goes as the backward pass uses it, as in eager."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import primexec
from benchmarks.memory import peak
from primexec import make_traced
from primexec.executors.llvm import pool
from tests.ways import WAYS, compute_products_by

EXECUTORS: list[Any] = ["aten", ("llvm", "aten")]
LAYERS = 8


def deep(x: Tensor, *weights: Tensor) -> Tensor:
    for w in weights:
        x = (x @ w).sin()
    return x.sum()


def activated(x: Tensor, *weights: Tensor) -> Tensor:
    for w in weights:
        h = x @ w
        x = 0.5 * h * (1.0 + torch.tanh(0.8 * (h + 0.04 * torch.pow(h, 3.0))))
    return x.sum()


def arguments(rows: int = 1024) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, 64, generator=generator)
    return x, *((torch.randn(64, 64, generator=generator) / 8).requires_grad_() for _ in range(LAYERS))


def step(function: Callable[..., Tensor], rows: int = 1024) -> Callable[[], None]:
    given = arguments(rows)

    def run() -> None:
        for w in given[1:]:
            w.grad = None
        function(*given).backward()

    run()
    return run


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("executor", EXECUTORS, ids=str)
def test_a_step_holds_no_more_than_eagers(executor: Any, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_products_by(way, monkeypatch)
    traced = make_traced(deep, executor=executor)
    ours, eagers = step(traced), step(deep)
    primexec.empty_cache()
    assert peak(ours) <= 1.02 * peak(eagers)
    assert traced.cache_info().traces == 1


@pytest.mark.parametrize("executor", EXECUTORS, ids=str)
def test_later_steps_keep_nothing_for_one_another(executor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_products_by("ATen", monkeypatch)
    rows = 8192  # tensors of 2 MiB
    ours, eagers = step(make_traced(deep, executor=executor), rows), step(deep, rows)
    primexec.empty_cache()
    ours()
    assert pool.outputs.nbytes == 0
    assert peak(ours) <= 1.02 * peak(eagers)


def test_activations_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_products_by("ATen", monkeypatch)
    rows = 8192
    ours, eagers = step(make_traced(activated, executor=("llvm", "aten")), rows), step(activated, rows)
    assert peak(ours) <= 0.5 * peak(eagers)


def descend(loss: Tensor, weights: tuple[Tensor, ...], rate: float) -> Tensor:
    loss.backward()
    with torch.no_grad():
        for w in weights:
            w -= rate * w.grad  # type: ignore[operator]
            w.grad = None
    return loss.detach()


def third_call(function: Callable[..., Tensor]) -> tuple[int, list[Tensor]]:
    """The peak of it, the results of three calls, and the weights that they leave."""
    torch.manual_seed(0)
    given = arguments(8192)
    losses = [function(*given) for _ in range(2)]
    primexec.empty_cache()
    return peak(lambda: losses.append(function(*given))), [*losses, *(w.detach() for w in given[1:])]


def third_calls_of(whole: Callable[..., Tensor]) -> float:
    """The peak of a traced step that leaves what eager leaves, and is traced once, over eager's."""
    traced = make_traced(whole, executor=("llvm", "aten"))
    (ours, found), (eagers, expected) = third_call(traced), third_call(whole)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert traced.cache_info().traces == 1
    return ours / eagers


def test_whole_steps_compute_again(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_products_by("ATen", monkeypatch)

    def whole(x: Tensor, *weights: Tensor) -> Tensor:
        for _ in range(2):
            loss = descend(activated(x, *weights), weights, 1e-3)
        return loss

    assert third_calls_of(whole) <= 0.5


def test_whole_steps_keep_what_dropout_drew_as_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    compute_products_by("ATen", monkeypatch)

    def whole(x: Tensor, *weights: Tensor) -> Tensor:
        for w in weights:
            x = F.dropout(x @ w, 0.4)
        return descend(x.square().mean(), weights, 0.1)

    assert third_calls_of(whole) <= 0.75


@pytest.mark.parametrize("way", WAYS)
def test_what_is_needed_late_is_made_late(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_products_by(way, monkeypatch)
    x, *weights = (w.detach() for w in arguments(8192))

    def attending(x: Tensor) -> Tensor:
        made, out = torch.softmax(x @ weights[0], -1), x
        for w in weights:
            out = torch.tanh(out @ w) * (made @ w)
        return out

    traced = make_traced(attending, executor=("llvm", "aten"))
    torch.testing.assert_close(traced(x), attending(x), rtol=1e-4, atol=1e-4)
    primexec.empty_cache()
    assert peak(lambda: traced(x)) <= peak(lambda: attending(x))


@pytest.mark.parametrize("executor", EXECUTORS, ids=str)
def test_a_graph_is_kept_as_long_as_it_is_asked_for(executor: Any) -> None:
    traced = make_traced(deep, executor=executor)
    given, expected = arguments(), arguments()
    loss, eagers = traced(*given), deep(*expected)
    for keep in (True, True, False):
        loss.backward(retain_graph=keep)
        eagers.backward(retain_graph=keep)
        for w, e in zip(given[1:], expected[1:], strict=True):
            torch.testing.assert_close(w.grad, e.grad, rtol=1e-5, atol=1e-4)
    with pytest.raises(RuntimeError, match="a second time"):
        loss.backward()


def test_saved_tensor_hooks_see_what_is_saved() -> None:
    given, packed, unpacked = arguments(), [], []

    def pack(t: Tensor) -> Tensor:
        packed.append(t.shape)
        return t

    def unpack(t: Tensor) -> Tensor:
        unpacked.append(t.shape)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
        loss = make_traced(deep)(*given)
    loss.backward()
    assert sorted(packed) == sorted(unpacked) != []
