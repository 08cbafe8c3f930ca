"""Ints that are read off tensors, given for sizes, and others at every call; ints that C++ needs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from primexec import make_traced
from tests.test_varying import FIRST, same

Y = torch.arange(48.0).view(12, 4)
COUNTS = [(3, 4, 5), (2, 2, 8), (12, 0, 0), (6, 6, 0), (1, 1, 10), (4, 4, 4), (3, 4, 5)]
WEIGHTS = torch.linspace(-1, 1, 60).view(3, 4, 5).requires_grad_()


def experts(x: Tensor, n: Tensor) -> Tensor:
    parts = x.split(n.tolist())
    return torch.cat([torch.tanh(part @ weight) for part, weight in zip(parts, WEIGHTS, strict=True)])


def joined_with_known(x: Tensor, n: Tensor) -> Tensor:
    return torch.cat([part * i for i, part in enumerate(x.split(n.tolist()))]) + x


def sums(x: Tensor, n: Tensor) -> Tensor:
    return torch.stack([part.sum(0) for part in x.split(n.tolist())])


def made(x: Tensor, n: Tensor) -> list[Tensor]:
    first, *others = n.tolist()
    return [
        x.new_zeros(others),
        torch.full((first, 2), 0.5),
        x[0].expand(first, 4),
        x.sum() + torch.ones(*others).sum(),
    ]


@pytest.mark.parametrize("executor", ["aten", "auto"])
@pytest.mark.parametrize("fn", [experts, joined_with_known, sums, made], ids=lambda f: f.__name__)
def test_sizes(fn: Callable[..., Any], executor: str) -> None:
    traced = make_traced(fn, executor=executor)
    for counts in COUNTS:
        n = torch.tensor(counts)
        same(traced(Y / 48, n), fn(Y / 48, n), executor == "aten")
    assert traced.cache_info().traces == FIRST


@pytest.mark.parametrize("executor", ["aten", "auto"])
def test_gradients(executor: str) -> None:
    traced = make_traced(experts, executor=executor)
    for counts in COUNTS:
        found = []
        for run in (traced, experts):
            x = (Y / 48).requires_grad_()
            found.append(torch.autograd.grad(run(x, torch.tensor(counts)).square().sum(), [x, WEIGHTS]))
        same(found[0], found[1], executor == "aten")
    assert traced.cache_info().traces == FIRST


@pytest.mark.parametrize("executor", ["aten", "auto"])
def test_gradients_of_some_parts(executor: str) -> None:
    """Backward makes zeros in the sizes of those that are not used."""

    def fn(x: Tensor, n: Tensor) -> Tensor:
        first, second, _ = x.split(n.tolist())
        return first[:, None] * second[None]

    traced = make_traced(fn, executor=executor)
    for counts in COUNTS:
        found = []
        for run in (traced, fn):
            x = (Y / 48).requires_grad_()
            found.append(torch.autograd.grad(run(x, torch.tensor(counts)).square().sum(), x))
        same(found[0], found[1], executor == "aten")
    assert traced.cache_info().traces == FIRST


def test_errors_are_those_of_eager() -> None:
    traced = make_traced(sums)
    for counts in COUNTS:
        traced(Y, torch.tensor(counts))
    for wrong in [(3, 4, 6), (-1, 7, 6), (13, -1, 0)]:
        with pytest.raises(RuntimeError, match="split_with_sizes"):
            sums(Y, torch.tensor(wrong))
        with pytest.raises(RuntimeError, match="split_with_sizes"):
            traced(Y, torch.tensor(wrong))
    same(traced(Y, torch.tensor([5, 5, 2])), sums(Y, torch.tensor([5, 5, 2])), False)
    assert traced.cache_info().traces == FIRST


def test_negative_sizes_have_programs_of_their_own() -> None:
    def fn(x: Tensor, n: Tensor) -> Tensor:
        return x.roll(n.item() - 3, 0)

    traced = make_traced(fn)
    for i in [7, 8, 9, 3, 4, 5, 2, 1, 2, 12]:
        same(traced(Y, torch.tensor(i)), fn(Y, torch.tensor(i)), True)
    assert traced.cache_info().traces == FIRST + 2


def test_other_shapes_do_not_count() -> None:
    def fn(x: Tensor, n: Tensor) -> Tensor:
        return x.new_zeros(n.item())

    traced = make_traced(fn)
    for rows in range(2, 8):
        for _ in range(2):
            same(traced(Y[:rows], torch.tensor(rows)), fn(Y[:rows], torch.tensor(rows)), True)
    assert all("what" not in label for label in traced.explain(Y, torch.tensor(3)).differences[0])
    assert traced.cache_info().traces == 6


NEEDED: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "unflatten": lambda x, n: x.unflatten(0, (n[0].item(), -1)),
    "interpolate": lambda x, n: F.interpolate(x[None, None], size=n.tolist(), mode="bilinear"),
    "one size": lambda x, n: F.interpolate(x[None], size=n[0].item(), mode="nearest"),
    "adaptive": lambda x, n: F.adaptive_avg_pool2d(x[None], (n[0].item(), 2)),
    "unfold": lambda x, n: x.unfold(0, n[0].item(), 1),
    "pad": lambda x, n: F.pad(x, (n[0].item(), 0)),
    "chunk": lambda x, n: x.chunk(n[0].item()),
}


@pytest.mark.parametrize("executor", ["aten", "auto"])
@pytest.mark.parametrize("name", NEEDED)
def test_ints_that_are_needed(name: str, executor: str) -> None:
    fn = NEEDED[name]
    traced = make_traced(fn, executor=executor)
    for counts in [(3, 4), (2, 5), (3, 4), (2, 5)]:
        n = torch.tensor(counts)
        same(traced(Y, n), fn(Y, n), executor == "aten")
    assert traced.cache_info().traces == 2


def test_a_mixture_of_experts_in_training() -> None:
    torch.manual_seed(0)
    gate, layers = nn.Linear(4, 3), nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])

    def fn(x: Tensor) -> Tensor:
        chosen = gate(x).argmax(-1)
        order = chosen.argsort(stable=True)
        parts = x[order].split(torch.bincount(chosen, minlength=3).tolist())
        done = torch.cat([layer(part) for layer, part in zip(layers, parts, strict=True)])
        return torch.zeros_like(x).index_add(0, order, done).square().mean()

    traced = make_traced(fn)
    for _ in range(8):
        x = torch.randn(16, 4)
        losses = [run(x) for run in (traced, fn)]
        same(losses[0], losses[1], False)
        same(*(torch.autograd.grad(loss, list(layers.parameters())) for loss in losses), exact=False)
    assert traced.cache_info().traces == FIRST
