"""Lists outside of a traced function to which it only appends, and variables that it counts in."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from primexec import CaptureError, make_traced

Run = Callable[[Tensor], Any]


def inputs(count: int = 5) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(3, 4, generator=generator) for _ in range(count)]


class Recording(nn.Module):
    """Keeps what it has seen, in its own list and in one of a dict."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(4, 4)
        self.history: list[Any] = []
        self.log: dict[str, list[Any]] = {"losses": [0.5], "shapes": []}

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        self.history.append(y.mean())
        self.log["losses"].append(y.sum().item())
        self.log["shapes"] += [x.shape, "twice"]
        self.history.extend([y.detach(), {"loss": y.sum()}])
        return y


def test_lists_of_a_module() -> None:
    eager, model = Recording(), Recording()
    traced = make_traced(model)
    for i, x in enumerate(inputs()):
        if i == 3:  # as between epochs
            eager.history, model.history = [], []
            del model.log["losses"][:], eager.log["losses"][:]
        torch.testing.assert_close(traced(x), eager(x))
        torch.testing.assert_close(model.history, eager.history)
        assert [type(v) for v in model.log["losses"]] == [float] * len(eager.log["losses"])
        torch.testing.assert_close(model.log["losses"], eager.log["losses"])
        assert model.log["shapes"] == eager.log["shapes"]
    assert traced.cache_info().traces == 1
    model.history[0].backward()
    eager.history[0].backward()
    torch.testing.assert_close(model.inner.weight.grad, eager.inner.weight.grad)


def losses_kept(trace: Callable[[Run], Run]) -> tuple[list[Any], Any]:
    losses: list[Any] = []
    total, count = 0.0, 0

    def step(x: Tensor) -> Tensor:
        nonlocal total, count
        loss = x.square().mean()
        losses.append(loss.item())
        total += loss.item()
        count += 1
        return loss * count

    run = trace(step)
    found = [run(x) for x in inputs()]
    return [found, losses, total, count], run


def test_closed_over() -> None:
    expected, _ = losses_kept(lambda fn: fn)
    found, run = losses_kept(make_traced)
    torch.testing.assert_close(found, expected)
    assert type(found[2]) is float
    assert type(found[3]) is int
    assert run.cache_info().traces == 1


def test_two_functions_that_share_a_variable() -> None:
    n, kept = 0, []

    def count() -> int:
        nonlocal n
        n += 1
        kept.append(n)
        return n

    def twice(x: Tensor) -> Tensor:
        nonlocal n
        n += 1
        kept.append("twice")
        return x * count() * count()

    traced = make_traced(twice)
    x = torch.ones(2)
    for i in range(5):
        assert torch.equal(traced(x), x * (3 * i + 2) * (3 * i + 3))
    assert n == 15
    assert kept == [v for i in range(5) for v in ("twice", 3 * i + 2, 3 * i + 3)]
    assert traced.cache_info().traces == 1


def reads_length(kept: list[Any], x: Tensor) -> Tensor:
    kept.append(x.shape)
    return x * len(kept)


def iterates(kept: list[Any], x: Tensor) -> Tensor:
    kept.append(x)
    return sum(kept)  # type: ignore[return-value]


def stacks(kept: list[Any], x: Tensor) -> Tensor:
    kept.append(x * 2)
    return torch.stack(kept)


def asks_whether_empty(kept: list[Any], x: Tensor) -> Tensor:
    if not kept:
        x = x + 1
    kept.append(1)
    return x


def returns(kept: list[Any], x: Tensor) -> list[Any]:
    kept.append(1)
    return kept


def compares(kept: list[Any], x: Tensor) -> Tensor:
    kept.append(1)
    return x if kept == [1] else x + 1


@pytest.mark.parametrize("fn", [reads_length, iterates, stacks, asks_whether_empty, returns, compares])
def test_a_list_that_is_read_is_refused(fn: Callable[[list[Any], Tensor], Any]) -> None:
    kept: list[Any] = []
    with pytest.raises(CaptureError, match="changes kept"):
        make_traced(lambda x: fn(kept, x))(torch.ones(2))
    assert kept == []


def test_a_list_that_is_read_elsewhere_is_refused() -> None:
    kept: list[Any] = []
    both = (kept, 1)

    def fn(x: Tensor) -> Tensor:
        kept.append(x.shape)
        return x * len(both[0])

    with pytest.raises(CaptureError, match="changes both"):
        make_traced(fn)(torch.ones(2))
    assert kept == []


def test_an_object_that_cannot_be_made_again_is_refused() -> None:
    kept: list[Any] = []

    def fn(x: Tensor) -> Tensor:
        kept.append(object())
        return x + 1

    with pytest.raises(CaptureError, match="changes kept"):
        make_traced(fn)(torch.ones(2))
    assert kept == []


def test_other_threads_meet_the_list_itself() -> None:
    kept: list[Any] = ["before"]

    def other() -> None:
        kept.append("other")
        seen.append((len(kept), kept[0], isinstance(kept, list)))

    seen: list[Any] = []

    class Meeting(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kept.append("own")
            if not seen:
                thread = threading.Thread(target=other)
                thread.start()
                thread.join()
            return x + 1

    eager = Meeting()
    eager(torch.ones(2))
    seen.clear()
    kept[:] = ["before"]
    with pytest.raises(CaptureError):
        make_traced(Meeting())(torch.ones(2))  # it reads `seen`
    assert all(first == "before" and is_list for _, first, is_list in seen)


def test_a_list_found_of_numbers_is_not_returned_as_another() -> None:
    class Rates(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rates = [0.0, 1.0]

        def forward(self, x: Tensor) -> tuple[Tensor, list[float]]:
            found = self.rates
            self.rates = [self.rates[0] + 1, 2.0]
            return x + 1, found

    model = Rates()
    with pytest.raises(CaptureError, match=r"changes Rates\.rates"):
        make_traced(model)(torch.ones(2))
    assert model.rates == [0.0, 1.0]


class Meter:
    def __init__(self) -> None:
        self.sum, self.count, self.best = 0.0, 0, float("inf")

    def update(self, value: float, count: int) -> None:
        self.sum += value * count
        self.count += count
        self.average = self.sum / self.count
        if value < self.best:
            self.best = value


def test_meters() -> None:
    eager, meter = Meter(), Meter()

    def fn(x: Tensor, meter: Meter) -> Tensor:
        loss = x.square().mean()
        meter.update(loss.item(), len(x))
        return loss

    traced = make_traced(lambda x: fn(x, meter))
    for x in inputs(8):
        torch.testing.assert_close(traced(x), fn(x, eager))
        torch.testing.assert_close(vars(meter), vars(eager))
    info = traced.cache_info()
    assert (info.traces, info.hits) == (3, 5)
