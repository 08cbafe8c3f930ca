"""Parts of tensors at places that are read off tensors or passed as numbers, others at every call."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from primexec import make_traced
from tests.test_varying import FIRST, same

X = torch.linspace(-2, 2, 2 * 3 * 12 * 12, dtype=torch.float64).sin().view(2, 3, 12, 12)
PLACES = [(0, 3), (1, 2), (4, 4), (2, 0), (3, 1), (0, 0), (4, 3), (2, 2)]
LENGTHS = [(3, 5), (2, 4), (7, 9), (4, 6), (5, 7), (8, 10), (3, 4)]

Program = Callable[[Tensor, Tensor], Any]


def crop(x: Tensor, n: Tensor) -> Tensor:
    i, j = n.tolist()
    return F.conv2d(x[:, :, i : i + 8, j : j + 8], x[:, :, :3, :3]).relu()


def crop_of_a_crop(x: Tensor, n: Tensor) -> Tensor:
    i, j = n.tolist()
    return x[..., i : i + 8][:, 1, ..., j : 4 + j] * 2


def around(x: Tensor, n: Tensor) -> Tensor:
    i, j = n.tolist()
    return x[x.new_tensor([1, 0]).long(), ..., None, i + 2 - 1 : i + 4, j * 2 : (j + 1) * 2].exp()


def rows(x: Tensor, n: Tensor) -> Tensor:
    i, j = n.tolist()
    return x[:, None, :, i, ..., j].exp()


def narrowed(x: Tensor, n: Tensor) -> Tensor:
    i, j = n.tolist()
    return x.narrow(2, i, 6) * torch.narrow(x, -1, j, 6).sum()


def erased(x: Tensor, n: Tensor) -> Tensor:
    i, j = n.tolist()
    x = x.clone()
    x[:, :, i : i + 4, j : j + 4] = 0
    x[0, :, i] += x[1, :, j]
    return x * 2


def mixed(x: Tensor, n: Tensor) -> Tensor:
    i, j = n.tolist()
    y = x.clone()
    y[:, :, i : i + 4, j : j + 4] = x.flip(0)[:, :, i : i + 4, j : j + 4]
    return y


def prefix(x: Tensor, n: Tensor) -> list[Tensor]:
    i, j = n.tolist()
    y = x[..., :i]
    return [
        y.reshape(6, -1),
        y @ x[0, 0, :i],
        x[..., j:] * 2,
        F.scaled_dot_product_attention(x, x[:, :, :j], x[:, :, :j]),
    ]


def between(x: Tensor, n: Tensor) -> Tensor:
    i, j = n.tolist()
    return torch.softmax(x[..., i:j], 2).sum(-1)


@pytest.mark.parametrize("executor", ["aten", "auto"])
@pytest.mark.parametrize(
    ("fn", "places"),
    [*((f, PLACES) for f in (crop, crop_of_a_crop, around, rows, narrowed, erased, mixed)), (prefix, LENGTHS)],
    ids=lambda f: getattr(f, "__name__", ""),
)
def test_parts(fn: Program, places: list[tuple[int, int]], executor: str) -> None:
    traced, training = make_traced(fn, executor=executor), make_traced(fn, executor=executor)
    for place in places:
        n = torch.tensor(place)
        same(traced(X, n), fn(X, n), executor == "aten")
        found = []
        for run in (training, fn):
            x = X.clone().requires_grad_()
            out = run(x, n)
            loss: Any = sum(t.square().sum() for t in (out if isinstance(out, list) else [out]))
            found.append((out, torch.autograd.grad(loss, x)))
        same(found[0], found[1], executor == "aten")
    assert traced.cache_info().traces == training.cache_info().traces == FIRST


@pytest.mark.parametrize("executor", ["aten", "auto"])
def test_results_are_views(executor: str) -> None:
    def fn(x: Tensor, n: Tensor) -> Tensor:
        i, _ = n.tolist()
        return x[..., i : i + 8]

    traced = make_traced(fn, executor=executor)
    for place in PLACES:
        x = X.clone()
        got, expected = traced(x, torch.tensor(place)), fn(x, torch.tensor(place))
        assert got.data_ptr() == expected.data_ptr()
        assert (got.shape, got.stride()) == (expected.shape, expected.stride())
    assert traced.cache_info().traces == FIRST


@pytest.mark.parametrize("executor", ["aten", "auto"])
def test_inputs_are_written(executor: str) -> None:
    def fn(x: Tensor, n: Tensor) -> Tensor:
        i, j = n.tolist()
        x[:, :, i : i + 4].add_(1)
        return x[..., j].sum(-1)

    traced = make_traced(fn, executor=executor)
    for place in PLACES:
        mine, own = X.clone(), X.clone()
        same(traced(mine, torch.tensor(place)), fn(own, torch.tensor(place)), False)
        assert torch.equal(mine, own)
    assert traced.cache_info().traces == FIRST


@pytest.mark.filterwarnings("ignore::primexec.RetraceWarning")
@pytest.mark.parametrize("executor", ["aten", "auto"])
@pytest.mark.parametrize("fn", [lambda x, i: x[:, :, i : i + 4] * 2, lambda x, i: x[:, :, :i].sum(2)])
def test_numbers_among_the_arguments(fn: Callable[[Tensor, int], Tensor], executor: str) -> None:
    traced = make_traced(fn, executor=executor)
    for i in range(2, 9):
        same(traced(X, i), fn(X, i), executor == "aten")
    assert traced.cache_info().traces == FIRST
    for i in (9, 10, 12, 13, -1, -3, -4, -9, 0, 1, 3):  # at the border and beyond
        got, expected = traced(X, i), fn(X, i)
        same(got, expected, executor == "aten")
        assert got.stride() == expected.stride()


@pytest.mark.filterwarnings("ignore::primexec.RetraceWarning")
def test_sizes_at_the_border_are_those_of_eager() -> None:
    traced = make_traced(between)
    for place in [*LENGTHS, (0, 12), (3, 3), (5, 2), (4, 5), (12, 12), (3, 14), (-4, -1), (0, 11), (11, 12)]:
        n = torch.tensor(place)
        if place[0] >= place[1] or place[0] == 12:
            same(traced(X, n), torch.zeros(2, 3, 12, dtype=torch.float64), True)
        same(traced(X, n), between(X, n), False)


def test_what_lies_outside_raises_as_in_eager() -> None:
    traced = make_traced(narrowed)
    for place in PLACES:
        traced(X, torch.tensor(place))
    for run in (traced, narrowed):
        with pytest.raises(RuntimeError, match=r"start \(7\) \+ length \(6\) exceeds dimension size \(12\)"):
            run(X, torch.tensor((7, 0)))
    same(traced(X, torch.tensor((-6, 0))), narrowed(X, torch.tensor((-6, 0))), False)
    traced = make_traced(rows)
    for place in PLACES:
        traced(X, torch.tensor(place))
    for run in (traced, rows):
        with pytest.raises(IndexError, match="index 12 is out of bounds for dimension"):
            run(X, torch.tensor((12, 0)))
    same(traced(X, torch.tensor((-1, -2))), rows(X, torch.tensor((-1, -2))), False)


def test_random_crops() -> None:
    def fn(x: Tensor) -> Tensor:
        i, j = torch.randint(0, 5, (2,)).tolist()
        return x[:, :, i : i + 8, j : j + 8] * torch.rand(8)

    traced = make_traced(fn)
    for seed in range(20):
        found = []
        for run in (traced, fn):
            torch.manual_seed(seed)
            found.append((run(X), torch.get_rng_state()))
        same(found[0], found[1], False)
    assert traced.cache_info().traces == FIRST


def test_padding_in_training() -> None:
    def fn(x: Tensor, n: Tensor) -> Tensor:
        return F.pad(x[..., : n.item()], (0, 12 - n.item())) * 2

    traced = make_traced(fn)
    for n in (3, 5, 12, 3):
        grads = []
        for run in (traced, fn):
            x = X.clone().requires_grad_()
            grads.append(torch.autograd.grad(run(x, torch.tensor(n)).square().sum(), x))
        same(grads[0], grads[1], False)
    assert traced.cache_info().traces == 3


def test_attention_of_unknown_many() -> None:
    def fn(x: Tensor, mask: Tensor) -> Tensor:
        q = x[mask][None]
        return F.scaled_dot_product_attention(q, q, q)

    traced = make_traced(fn)
    x = torch.linspace(-1, 1, 200 * 8, dtype=torch.float64).sin().view(200, 1, 8).expand(-1, 2, -1)
    for count in (150, 199, 3):
        mask = torch.arange(200) < count
        same(traced(x, mask), fn(x, mask), False)
    assert traced.cache_info().traces == 1
