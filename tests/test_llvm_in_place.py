"""Results that are written over the results of products and convolutions which nobody needs any more."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import primexec
from benchmarks.memory import peak
from primexec import make_traced
from primexec.executors.llvm import in_place, launch
from primexec.executors.llvm.schedule import Schedule
from tests.ways import WAYS, compute_products_by

BOTH = ("llvm", "aten")
ROWS, WIDTH = 128, 256
NBYTES = ROWS * WIDTH * 4
W, V = torch.randn(WIDTH, WIDTH) / 16, torch.randn(WIDTH, WIDTH) / 16
BIAS = torch.randn(WIDTH)
KERNELS = torch.randn(16, 8, 3, 3) / 8, torch.randn(8, 16, 3, 3) / 8


@pytest.fixture(params=WAYS[:2], ids=["aten's products", "oneDNN's products"])
def products(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_products_by(request.param, monkeypatch)


@pytest.fixture
def places(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many results take the place of an operand, schedule by schedule."""
    found: list[int] = []
    real = in_place.in_place

    def counted(*args: Any) -> Schedule:
        schedule = real(*args)
        found.append(len(schedule.places))
        return schedule

    monkeypatch.setattr(in_place, "in_place", counted)
    return found


def perceptron(x: Tensor) -> Tensor:
    return F.gelu(F.linear(x, W, BIAS)) @ V


def batched(x: Tensor) -> Tensor:
    return (torch.tanh(F.linear(x.view(2, -1, WIDTH), W, BIAS)) * 2) @ V


def normalised(x: Tensor) -> Tensor:
    return torch.softmax(x @ W, -1) @ V


def convolutions(x: Tensor) -> Tensor:
    images = x.view(1, 8, 64, 64)
    return F.conv2d(torch.relu(F.conv2d(images, KERNELS[0], padding=1) * 2), KERNELS[1], padding=1)


def read_in_another_shape(x: Tensor) -> Tensor:
    """What is made in the shape of groups lies in the result, which lies in the operand."""
    images = F.conv2d(x.view(1, 8, 64, 64), KERNELS[0], padding=1)
    return F.conv2d(torch.relu(F.group_norm(images + 1, 4)), KERNELS[1], padding=1)


def last(x: Tensor) -> Tensor:
    return torch.tanh(x @ W) * 2


def last_reshaped(x: Tensor) -> Tensor:
    return torch.tanh(F.linear(x.view(2, -1, WIDTH), W)) * 2


def used_later(x: Tensor) -> Tensor:
    y = x @ W
    return ((torch.tanh(y) * 2) @ V + y) * 2


def one_after_another(x: Tensor) -> Tensor:
    y = torch.log_softmax(x @ W, -1)
    return (y.exp() - y.sin().sum(0)) @ V


TAKEN: list[Callable[[Tensor], Any]] = [
    perceptron, batched, normalised, convolutions, read_in_another_shape, last, last_reshaped, used_later,
    one_after_another]  # fmt: skip


def returned_too(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x @ W
    return y, torch.tanh(y) @ V


def view_returned_too(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x @ W
    return torch.tanh(y) @ V, y.view(2, -1)[1]


def used_later_through_a_view(x: Tensor) -> Tensor:
    y = x @ W
    z = torch.tanh(y) @ V
    return z @ y.t()


def turned(x: Tensor) -> Tensor:
    y = x[:, :ROWS] @ W[:ROWS, :ROWS]
    return torch.tanh(y + y.t()) @ V[:ROWS]


def shifted(x: Tensor) -> Tensor:
    y = x @ W
    return (y + y.roll(1, 0)).sin() @ V


def spread(x: Tensor) -> Tensor:
    return ((x @ W)[:1] * x) @ V


def several(x: Tensor) -> tuple[Tensor, Tensor]:
    y = x @ W
    return y.sin() @ V, y.cos() @ V


KEPT: list[Callable[[Tensor], Any]] = [
    returned_too, view_returned_too, used_later_through_a_view, turned, shifted, spread, several,
]  # fmt: skip


@pytest.mark.usefixtures("products")
@pytest.mark.parametrize("fn", TAKEN + KEPT, ids=lambda f: f.__name__)
def test_values(fn: Callable[[Tensor], Any], places: list[int]) -> None:
    traced = make_traced(fn, executor=BOTH)
    held = []
    for i in range(3):
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(i))
        held.append((traced(x), fn(x)))
    torch.testing.assert_close([a for a, _ in held], [b for _, b in held], rtol=1e-4, atol=1e-4)
    for ours, eagers in held:
        for a, b in zip(*map(torch.utils._pytree.tree_leaves, (ours, eagers)), strict=True):
            assert (a._is_view(), a.stride()) == (b._is_view(), b.stride())
    assert bool(sum(places)) == (fn in TAKEN)


@pytest.mark.parametrize("way", ["ATen", "kernel"])  # oneDNN asks for memory of its own
def test_memory(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compute_products_by(way, monkeypatch)
    traced, x = make_traced(perceptron, executor=BOTH), torch.randn(ROWS, WIDTH)
    traced(x)
    primexec.empty_cache()
    assert peak(lambda: traced(x)) < 2.5 * NBYTES <= peak(lambda: perceptron(x)) + NBYTES


@pytest.mark.usefixtures("products")
def test_what_backward_needs_is_not_written_over() -> None:
    layers = nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU(), nn.Linear(WIDTH, WIDTH), nn.Tanh())
    traced = make_traced(layers, executor=BOTH)
    for i in range(3):
        x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(i))
        found = []
        for run in (traced, layers):
            y = run(x)
            found.append((y, torch.autograd.grad(y.square().sum(), list(layers.parameters()))))
        torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=1e-3)


def test_an_operand_that_is_laid_out_otherwise_than_foreseen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the convolution gives other strides, a copy is written over."""
    fitted = []
    real = launch.Operand.fitted

    def turned_first(self: launch.Operand, t: Tensor, place: int) -> Tensor:
        fitted.append(place)
        other = t.to(memory_format=torch.channels_last) if t.dim() == 4 and len(fitted) == 1 else t
        return real(self, other, place)

    traced, x = make_traced(lambda x: torch.relu(F.conv2d(x, KERNELS[0]) * 2), executor=BOTH), torch.randn(1, 8, 66, 66)
    monkeypatch.setattr(launch.Operand, "fitted", turned_first)
    torch.testing.assert_close(traced(x), torch.relu(F.conv2d(x, KERNELS[0]) * 2), rtol=1e-4, atol=1e-4)
    assert fitted


def turned(x: Tensor) -> Tensor:
    return x.permute(0, 2, 1, 3).reshape(x.shape[0], -1, x.shape[3])


SHAPED: dict[str, tuple[Callable[[Tensor], Any], int]] = {
    "alone": (lambda x: F.channel_shuffle(x, 2), 1),
    "of a sum": (lambda x: turned(x + 1), 1),
    "read again": (lambda x: ((y := turned(x + 1)), y.exp().sum(-1)), 2),
    "and a view of it": (lambda x: ((y := turned(x * 2)), y.view(-1)), 1),
    "and a copy of it": (lambda x: ((y := turned(x * 2)), y.clone()), 1),
    "of both": (lambda x: (turned(x * 2), turned(x + 1)), 1),
    "written to": (lambda x: (turned(x * 2), turned(x * 2).index_fill(1, torch.tensor([2]), 3.0)), 3),
}


@pytest.mark.parametrize(("fn", "kernels"), SHAPED.values(), ids=SHAPED)
def test_a_result_that_is_memory_in_another_shape_is_made_there(fn: Callable[[Tensor], Any], kernels: int) -> None:
    x = torch.randn(2, 4, 6, 5)
    traced = make_traced(fn, executor=BOTH)
    for _ in range(2):
        torch.testing.assert_close(traced(x), fn(x))
    for a, b in zip(*(torch.utils._pytree.tree_leaves(f(x)) for f in (traced, fn)), strict=True):
        assert (a.stride(), a.untyped_storage().nbytes()) == (b.stride(), b.untyped_storage().nbytes())
    assert traced.trace(x).inspect_loops().count("\nkernel ") == kernels
