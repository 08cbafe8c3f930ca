"""What a traced function does to the lists and dicts among its arguments, to `requires_grad` and to `.data`."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from primexec import CaptureError, make_traced


def tensor(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def adds(batch: dict[str, Any]) -> dict[str, Any]:
    batch["y"] = batch["x"] * 2
    batch["x"] = batch["x"] + batch["y"]
    batch["all"] = [batch["y"], 2, 1.5]
    return batch


def removes(batch: dict[str, Any]) -> Any:
    scale = batch.pop("scale", 1.0)
    x = batch.pop("x")
    batch["x"] = x * scale
    return batch["x"], batch["extra"]["deep"]


def changes_inside(batch: dict[str, Any]) -> Any:
    batch["extra"]["deep"].append(batch["x"].sum().item())
    batch["extra"]["deep"][0] = batch["x"] + 1
    return len(batch["extra"]["deep"]), batch["extra"]


def clears(batch: dict[str, Any]) -> Any:
    x = batch["x"]
    batch["extra"]["deep"].clear()
    batch.clear()
    return x + 1


def writes(batch: dict[str, Any]) -> Any:
    batch["x"].add_(1)
    batch["again"] = batch["x"]
    return batch["again"]


def made(seed: int) -> dict[str, Any]:
    return {"x": tensor(seed, 3), "scale": 2.0, "extra": {"deep": [tensor(seed + 9, 3)]}}


@pytest.mark.parametrize("fn", [adds, removes, changes_inside, clears, writes])
def test_containers(fn: Callable[[dict[str, Any]], Any]) -> None:
    traced = make_traced(fn)
    for seed in range(4):
        given, expected = made(seed), made(seed)
        x, deep, extra = given["x"], given["extra"]["deep"], given["extra"]
        result, right = traced(given), fn(expected)
        torch.testing.assert_close(result, right)
        torch.testing.assert_close(given, expected)
        assert list(given) == list(expected)
        assert (result is given) == (right is expected)
        if given:
            assert given["extra"] is extra
            assert extra["deep"] is deep
        assert (given.get("again") is x) == (fn is writes)
    assert traced.cache_info().traces == 1


def test_a_list_is_filled() -> None:
    def fn(x: Tensor, kept: list[Tensor]) -> Tensor:
        kept.extend([x * 2, x * 3])
        return kept[0] + x

    traced = make_traced(fn)
    for seed in range(3):
        kept: list[Tensor] = []
        x = tensor(seed, 3)
        torch.testing.assert_close(traced(x, kept), x * 3)
        torch.testing.assert_close(kept, [x * 2, x * 3])
    traced(x, kept)
    assert len(kept) == 4
    assert traced.cache_info().traces == 2


def test_a_count_in_an_argument() -> None:
    def fn(x: Tensor, state: dict[str, int]) -> Tensor:
        state["count"] += 1
        return x * state["count"]

    traced, state, x = make_traced(fn), {"count": 0}, torch.ones(2)
    for i in range(1, 8):
        assert torch.equal(traced(x, state), x * i)
        assert state == {"count": i}
        assert type(state["count"]) is int
    assert traced.cache_info().traces == 4


def test_one_list_twice() -> None:
    def fn(x: Tensor, a: list[Tensor], b: list[Tensor]) -> int:
        a.append(x)
        return len(b)

    x, shared = torch.ones(2), [torch.ones(2)]
    with pytest.raises(CaptureError, match="stands in two places"):
        make_traced(fn)(x, shared, shared)
    traced = make_traced(fn)
    assert traced(x, [x], [x]) == 1
    with pytest.raises(CaptureError, match="stands in two places"):
        traced(x, shared, shared)
    assert len(shared) == 1


def test_a_list_that_is_reached_as_well() -> None:
    table = [1.0]

    def fn(x: Tensor, given: list[float]) -> Tensor:
        given.append(2.0)
        return x * len(table)

    x, traced = torch.ones(2), make_traced(fn)
    with pytest.raises(CaptureError, match="also reaches by itself"):
        traced(x, table)
    assert torch.equal(traced(x, [1.0]), x)
    with pytest.raises(CaptureError, match="also reaches by itself"):
        traced(x, table)
    assert table == [1.0]


def test_lists_that_are_only_read_may_be_one() -> None:
    traced = make_traced(lambda a, b: a[0] + b[0])
    x = torch.ones(2)
    both = [x]
    assert torch.equal(traced(both, both), x * 2)
    assert torch.equal(traced([x], [x]), x * 2)
    assert traced.cache_info().traces == 1


def test_requires_grad_of_an_argument() -> None:
    def saliency(x: Tensor) -> Any:
        x.requires_grad_()
        x.pow(3).sum().backward()
        return x.grad

    traced = make_traced(saliency)
    for seed in range(3):
        given, expected = tensor(seed, 3), tensor(seed, 3)
        torch.testing.assert_close(traced(given), saliency(expected))
        assert given.requires_grad
        torch.testing.assert_close(given.grad, expected.grad)
    assert traced.cache_info().traces == 1


def test_requires_grad_of_parameters() -> None:
    """As in a step of a GAN, which freezes the discriminator while the generator learns."""

    def made() -> tuple[nn.Module, nn.Module, Callable[[Tensor, Tensor], Any]]:
        torch.manual_seed(0)
        generator, discriminator = nn.Linear(2, 4), nn.Linear(4, 1)
        both = [torch.optim.SGD(m.parameters(), 0.1) for m in (generator, discriminator)]

        def step(x: Tensor, z: Tensor) -> Any:
            discriminator.requires_grad_(True)
            fake = generator(z)
            real_loss = F.softplus(-discriminator(x)).mean() + F.softplus(discriminator(fake.detach())).mean()
            both[1].zero_grad()
            real_loss.backward()
            both[1].step()
            discriminator.requires_grad_(False)
            loss = F.softplus(-discriminator(fake)).mean()
            both[0].zero_grad()
            loss.backward()
            both[0].step()
            return loss.item()

        return generator, discriminator, step

    eager, found = made(), made()
    traced = make_traced(found[2])
    for seed in range(5):
        x, z = tensor(seed, 3, 4), tensor(seed + 9, 3, 2)
        assert traced(x, z) == pytest.approx(eager[2](x, z))
        assert [p.requires_grad for p in found[1].parameters()] == [False, False]
    for a, b in zip(found[:2], eager[:2], strict=True):
        torch.testing.assert_close(list(a.parameters()), list(b.parameters()))  # type: ignore[arg-type]
    assert traced.cache_info().traces == 2


def test_requires_grad_is_refused_where_results_require_it() -> None:
    x = tensor(0, 3)
    with pytest.raises(CaptureError, match=r"sets x\.requires_grad, of an input"):
        make_traced(lambda x: x.requires_grad_() * 2)(x)
    assert not x.requires_grad


@pytest.mark.parametrize("executor", ["aten", "auto"])
def test_data_is_replaced(executor: str) -> None:
    """Whoever has a view of the old memory keeps the old values."""

    def made() -> tuple[nn.Module, nn.Module, Callable[[Tensor, Tensor], Any]]:
        torch.manual_seed(0)
        model, average = nn.Linear(4, 2), nn.Linear(4, 2)

        def step(x: Tensor, y: Tensor) -> Any:
            loss = F.mse_loss(model(x), y)
            loss.backward()
            for p, q in zip(model.parameters(), average.parameters(), strict=True):
                p.data = p.data - 0.1 * p.grad  # type: ignore[operator]
                p.grad = None
                q.data = 0.9 * q.data + 0.1 * p.data
                q.data.mul_(2)
            return loss.detach(), average(x).detach()

        return model, average, step

    eager, found = made(), made()
    traced = make_traced(found[2], executor=executor)
    parameter = next(found[0].parameters())
    before, old = [parameter.detach(), parameter.detach().clone()], parameter
    for seed in range(4):
        x, y = tensor(seed, 3, 4), tensor(seed + 9, 3, 2)
        torch.testing.assert_close(traced(x, y), eager[2](x, y))
        for a, b in zip(found[:2], eager[:2], strict=True):
            torch.testing.assert_close(list(a.parameters()), list(b.parameters()))  # type: ignore[arg-type]
    assert torch.equal(*before)
    assert next(found[0].parameters()) is old
    assert traced.cache_info().traces == 1


def test_data_shares_memory() -> None:
    def swap(a: Tensor, b: Tensor) -> None:
        a.data, b.data = b.data, a.data
        a.data.add_(1)

    traced = make_traced(swap)
    for _ in range(2):
        a, b = tensor(0, 3), tensor(1, 3)
        places = a.data_ptr(), b.data_ptr()
        traced(a, b)
        torch.testing.assert_close([a, b], [tensor(1, 3) + 1, tensor(0, 3)])
        assert (b.data_ptr(), a.data_ptr()) == places
    assert traced.cache_info().traces == 1


def test_data_is_refused_where_results_require_grad() -> None:
    layer = nn.Linear(2, 2)
    before = copy.deepcopy(layer)

    def fn(x: Tensor) -> Any:
        layer.weight.data = layer.weight.data * 2
        return layer(x)

    with pytest.raises(CaptureError, match=r"the \.data of a tensor is replaced"):
        make_traced(fn)(torch.ones(2))
    assert torch.equal(layer.weight, before.weight)


WEIGHT = nn.Parameter(torch.rand(3, 3))


def before(w: Tensor) -> Tensor:
    y = w * WEIGHT
    w.data = w.data * 2
    return y


def after(w: Tensor) -> Tensor:
    w.data = w.data * 2
    return w * WEIGHT


@pytest.mark.parametrize("run", [before, after])
def test_data_that_is_replaced_is_refused_where_a_backward_pass_needs_it(run: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(CaptureError, match=r"the \.data of a tensor is replaced"):
        make_traced(run)(torch.rand(3, 3))


def test_weights_that_follow_others() -> None:
    """As in MoCo: the averages are replaced in every step, and used where nothing is recorded."""

    def made() -> tuple[nn.Module, nn.Module]:
        torch.manual_seed(0)
        return nn.Linear(4, 3), nn.Linear(4, 3).requires_grad_(False)

    def run(model: nn.Module, follower: nn.Module, x: Tensor) -> Tensor:
        with torch.no_grad():
            for q, k in zip(model.parameters(), follower.parameters(), strict=True):
                k.data = k.data * 0.9 + q.data * 0.1
            keys = follower(x)
        return (model(x) * keys).sum()

    mine, expected, traced = made(), made(), make_traced(run)
    for i in range(3):
        x = torch.full((2, 4), i + 1.0)
        for models, function in ((mine, traced), (expected, run)):
            models[0].zero_grad()
            function(*models, x).backward()
        for ours, theirs in zip(mine, expected, strict=True):
            for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
                torch.testing.assert_close(p, q)
                torch.testing.assert_close(p.grad, q.grad)
    assert traced.cache_info().traces == 1
