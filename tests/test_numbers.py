"""Numbers that a function reads off tensors, and what it reckons with them."""

import builtins
import copy
import gc
import math
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from primexec import CaptureError, make_traced


def reckoned(x: Tensor) -> list[Any]:
    a, n = x.sum().item(), (x > 0).sum().item()
    return [
        a + n, 1 - a, n - 1, 2 * a, n * n, a / n, n / 4, 7 // a, n % 2, -a, +n, abs(a), abs(a) ** 0.5, 2.0**n, True + n,
        isinstance(a, float), isinstance(n, int), isinstance(n, float),
    ]  # fmt: skip


def in_operators(x: Tensor) -> list[Tensor]:
    a, n = x.abs().mean().item(), (x > 0).sum().item()
    i = torch.arange(4)
    return [
        x / a, a / x, a - x, x**a, a * i, n * i, i / n, n - i, x + n, x.clamp(-a, a), torch.where(x > 0, n, x), x > a,
        torch.full((2,), a), torch.full_like(i, n), torch.full((2,), n), x.masked_fill(x > 0, a), x.add(x, alpha=a),
        torch.addcmul(x, x, x, value=n), x.half() * a, i.to(torch.int8) + n,
    ]  # fmt: skip


def around_writes(x: Tensor) -> tuple[Any, ...]:
    before = x[0].item()
    x.add_(1)
    after = x[0].item()
    x[1] = before
    x[2:] *= after
    return before, after, x


def of_constants(x: Tensor) -> list[Any]:
    return [x * rate.item() for rate in torch.linspace(0, 1, 3)] + [torch.tensor(3).item()]


def listed(x: Tensor) -> list[Any]:
    return [x.tolist(), sum((x * 2).tolist()), x.view(2, 2).tolist(), {"half": x.half().max().item()}]


FUNCTIONS: list[Callable[[Tensor], Any]] = [reckoned, in_operators, around_writes, of_constants, listed]
INPUTS = [torch.tensor([0.5, 1.5, -0.25, 3.0]), torch.tensor([-0.5, 0.1, 2.0, 0.7])]


@pytest.mark.parametrize("executor", ["aten", "auto"])
@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda f: f.__name__)
def test_as_eager(fn: Callable[[Tensor], Any], executor: str) -> None:
    traced = make_traced(fn, executor=executor)
    tolerance = {"rtol": 0, "atol": 0} if executor == "aten" else {}
    for x in INPUTS:
        found, expected = traced(x.clone()), fn(x.clone())
        torch.testing.assert_close(found, expected, equal_nan=True, **tolerance)  # type: ignore[arg-type]
        kinds = [[type(v) for v in torch.utils._pytree.tree_leaves(of)] for of in (found, expected)]
        assert kinds[0] == kinds[1]
    assert traced.cache_info().traces == 1


@pytest.mark.parametrize("executor", ["aten", "auto"])
def test_gradients(executor: str) -> None:
    torch.manual_seed(0)
    model = nn.Linear(3, 2)

    def loss(x: Tensor) -> tuple[Tensor, float]:
        y = model(x)
        value = (y / y.norm().item()).tanh().sum() * y.mean().item() / (y > 0).sum().item()
        return value, value.item()

    traced = make_traced(loss, executor=executor)
    for _ in range(2):
        x, runs = torch.randn(4, 3), []
        for fn in (loss, traced):
            value, number = fn(x)
            value.backward()
            runs.append([value.detach(), number, [p.grad for p in model.parameters()]])
            model.zero_grad()
        torch.testing.assert_close(runs[1], runs[0])
    assert traced.cache_info().traces == 1


class Watched(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        self.level = x.mean().item()
        return x


kept: list[Any] = []


root = math.sqrt


class Keeper:
    def __init__(self) -> None:
        kept.append(self)


def kept_by_an_object(x: Tensor) -> Tensor:
    Keeper().__dict__["value"] = x.sum().item()
    return x


def floats(x: Tensor, t: Tensor) -> Any:
    top, count = float(t.max(dim=0, keepdim=True).values), float(len(x))
    assert isinstance(top, float)
    ways = x * float(t.sum()) * float("1.5") if float(x.sum()) > 0 else x / float(t[0].double())
    return ways, top, count, float(top), float((t > 0).any()), float(t.int()[0]), [float(v) for v in t]


def functions(x: Tensor, t: Tensor) -> Any:
    a, b = float(t[0]), t[1].item()
    return x * math.sqrt(abs(a)) + math.atan2(a, b), math.cos(math.pi * b / 3), math.pow(abs(b), 0.5), math.log(8, 2)


def scaled(x: Tensor, step: int) -> Tensor:
    return x * float(step) * math.cos(math.pi * step / 10) * math.exp(-step)


@pytest.mark.parametrize("executor", ["aten", ("llvm", "aten")])
@pytest.mark.parametrize(("fn", "traces"), [(floats, 3), (functions, 2)])
def test_float_and_math(fn: Callable[..., Any], traces: int, executor: Any) -> None:
    traced = make_traced(fn, executor=executor)
    for x, t in (([1.0, 2.0], [3.5, -1.0]), ([1.0, 4.0], [3.25, 2.0]), ([-1.0, 0.0], [7.0, -3.0]), ([1.0], [0.5, 9.0])):
        given = torch.tensor(x), torch.tensor(t)
        torch.testing.assert_close(traced(*given), fn(*given))
    assert builtins.float is (1.0).__class__
    assert math.sqrt is root
    assert traced.cache_info().traces == traces
    with pytest.raises(ValueError, match="only one element"):
        make_traced(lambda x: x * float(x))(torch.ones(2))


def test_float_and_math_of_numbers_that_vary() -> None:
    traced = make_traced(scaled)
    for step in range(9):
        torch.testing.assert_close(traced(torch.ones(2), step), scaled(torch.ones(2), step))
    assert traced.cache_info().traces == 4


def test_shifted_truth_values() -> None:
    x = torch.tensor([[1.0, -1.0, 0.0], [0.0, 2.0, 1.0]])
    for executor in ("aten", ("llvm", "aten")):
        traced = make_traced(lambda x: ((x > 0) << 2, (x > 0).t() >> 1, (x < 1) << x.char()), executor=executor)
        found, expected = traced(x), ((x > 0) << 2, (x > 0).t() >> 1, (x < 1) << x.char())
        for a, b in zip(found, expected, strict=True):
            assert a.equal(b)
            assert (a.dtype, a.stride()) == (b.dtype, b.stride())


REFUSED: dict[str, Callable[[Tensor], Any]] = {
    "compared with NumPy's": lambda x: x if np.float64(0) < x.sum().item() else -x,
    "formatted": lambda x: f"{x.sum().item():.3f}",
    "shown": lambda x: str(x.sum().item()),
    "hashed": lambda x: {x.sum().item(): x},
    "math by name": lambda x: x * root(x.abs().sum().item()),
    "range": lambda x: torch.arange(0, x.abs().sum().item()),
    "probability": lambda x: nn.functional.dropout(x, x.sigmoid().mean().item()),
    "branch": lambda x: torch.cond(x.sum() > 0, lambda y: y * y.sum().item(), lambda y: -y, (x,)),
    "kept": kept_by_an_object,
    "many": lambda x: torch.cat([x] * 3000).tolist(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str) -> None:
    with pytest.raises(CaptureError):
        make_traced(REFUSED[name])(torch.tensor([0.5, 1.5, -0.25, 3.0]))
    kept.clear()
    gc.collect()


def test_assigned() -> None:
    watched = Watched()
    traced = make_traced(watched)
    for i in range(3):
        x = torch.full((4,), float(i))
        traced(x)
        assert watched.level == x.mean().item()
        assert type(watched.level) is float
    assert traced.cache_info().traces == 2  # with the attribute, and without


def test_a_power_that_is_no_float() -> None:
    traced = make_traced(lambda x: x.sum().item() ** 0.5)
    assert traced(torch.ones(4)) == 2.0
    with pytest.raises(Exception, match="is no float"):
        traced(-torch.ones(4))


def test_text_and_lifetime() -> None:
    x = torch.ones(3)
    traced = make_traced(lambda x: 2 * x.sum().item() + 1, executor="aten")
    text = str(traced.trace(x))
    assert "float = mul(2, " in text
    assert "float = add(mul, 1)" in text
    assert traced(x) == 7.0
    before = weakref.ref(traced)
    del traced
    gc.collect()
    assert before() is None


@pytest.mark.parametrize(
    "compared",
    [lambda a: type(a) is float, lambda a: type(a) in (int, float), lambda a: float == type(a)],  # noqa: E721
    ids=["is", "in", "reversed"],
)
def test_exact_types_of_numbers_are_refused(compared: Callable[[Any], bool]) -> None:
    def fn(x: Tensor) -> Tensor:
        a = x.max().item()
        return x / a if compared(a) else x

    with pytest.raises(CaptureError, match="exact type of a number"):
        make_traced(fn)(INPUTS[0])


def test_types_may_be_compared_where_no_number_is_read() -> None:
    traced = make_traced(lambda x, a: x * a if type(a) is float else x)
    torch.testing.assert_close(traced(INPUTS[0], 2.0), INPUTS[0] * 2)


@pytest.mark.parametrize("executor", ["aten", ("llvm", "aten")])
def test_cumulative_batch_norm(executor: Any) -> None:
    """Without a momentum it divides by how many batches it has seen."""
    eager = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4, momentum=None))
    model = copy.deepcopy(eager)
    traced = make_traced(model, executor=executor)
    for _ in range(4):
        x = torch.randn(5, 3)
        for run in (traced, eager):
            run(x).mul(x[:, :1]).sum().backward()
    for found, expected in zip(
        (*model.buffers(), *model.parameters()), (*eager.buffers(), *eager.parameters()), strict=True
    ):
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(found.grad, expected.grad, atol=1e-4, rtol=1e-4)
    assert traced.cache_info().traces == 1
    batches = [torch.randn(5, 3) for _ in range(3)]
    for run in (make_traced(model, executor=executor), eager):
        torch.optim.swa_utils.update_bn(batches, run)
    for found, expected in zip(model.buffers(), eager.buffers(), strict=True):
        torch.testing.assert_close(found, expected)
    assert not hasattr(torch.nn.modules.batchnorm, "float")  # what stands there meanwhile


def rounded(x: Tensor) -> list[Any]:
    total, whole = x.sum().item(), x.long().sum().item()
    up, down = math.ceil(total), math.floor(total)
    return [x * round(total), x + up * down, math.trunc(total), round(total, 1), round(whole), math.floor(whole), up]


def made_whole(x: Tensor) -> list[Tensor]:
    return [x * int(x.sum()), x[: int(x.abs().sum().item() / 4)], torch.arange(int((x[0] + 9).abs()))]


@pytest.mark.parametrize("executor", ["aten", "auto"])
@pytest.mark.parametrize(("fn", "traces"), [(rounded, 1), (made_whole, 4)])
def test_rounding_to_ints(fn: Any, traces: int, executor: str) -> None:
    traced = make_traced(fn, executor=executor)
    for scale in (0.5, 1.25, 2.5, 0.5, 4.0):
        x = torch.tensor([1.5, -0.25, 2.0]) * scale
        torch.testing.assert_close(traced(x), fn(x), rtol=0, atol=0)
        assert list(map(type, traced(x))) == list(map(type, fn(x)))
    assert traced.cache_info().traces == traces
    for bad, kind in ((math.inf, OverflowError), (math.nan, ValueError)):
        for run in (traced, fn):
            with pytest.raises(kind, match="cannot convert float"):
                run(torch.tensor([bad, 1.0, 1.0]))
