"""The executor `llvm`: values against float64 and eager, which loops are made, and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import primexec
from primexec.executors.llvm import executor as llvm
from primexec.executors.llvm.executor import Compiled, LlvmExecutor
from primexec.executors.llvm.target import NAMED
from tests.observe import same_bits

BOTH = ("llvm", "aten")
SEED = 5


def data(*shape: int, dtype: torch.dtype = torch.float32, seed: int = SEED) -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return (made * 20).to(dtype) if not dtype.is_floating_point else made.to(dtype)


@pytest.fixture
def compiled(monkeypatch: pytest.MonkeyPatch) -> list[Compiled]:
    """What the executor compiles during the test."""
    made: list[Compiled] = []
    lower = llvm.lower

    def spy(*args: Any) -> Compiled:
        made.append(lower(*args))
        return made[-1]

    monkeypatch.setattr(llvm, "lower", spy)
    return made


def run(fn: Callable[..., Any], *args: Any, **parameters: Any) -> Any:
    """Traced, on `llvm` alone: what falls back raises."""
    parameters = {"strict": True, **parameters}
    return primexec.make_traced(fn)(*args, executor="llvm", executor_parameters=parameters)


def kernels(compiled: Iterable[Compiled]) -> list[int]:
    return [len(c.schedule.kernels) for c in compiled]


W, B = data(53, seed=1), data(53, seed=2)
FUNCTIONS: dict[str, Callable[..., Any]] = {
    "chain": lambda a, b: (a * 2 + b).relu() - 1,
    "gelu": lambda a, b: F.gelu(a * 2 + 1) * torch.sigmoid(b),
    "four transcendentals": lambda a, b: torch.tanh(a).exp().log1p().sin(),
    "row vector": lambda a, b: a * W + W,
    "column vector": lambda a, b: a[:, :1] * b,
    "sum of rows": lambda a, b: a.sum(-1),
    "sum of columns": lambda a, b: a.sum(0),
    "sum of all": lambda a, b: a.sum() * 2 + 1,
    "mean, kept": lambda a, b: a.mean(0, keepdim=True) + b,
    "softmax": lambda a, b: torch.softmax(a, -1),
    "softmax of columns": lambda a, b: torch.softmax(a, 0),
    "log_softmax": lambda a, b: torch.log_softmax(a, -1),
    "layer_norm": lambda a, b: F.layer_norm(a + b, (53,), W.to(a.dtype), B.to(a.dtype)),
    "variance": lambda a, b: (a.var(-1), b.std((0, 1))),
    "transpose": lambda a, b: a.t().contiguous() + b.t(),
    "flip": lambda a, b: a.flip(0, 1) * b,
    "slice": lambda a, b: a[3:30:2, 5:] * 2 + b[:14, :48],
    "other shape": lambda a, b: (a + b).reshape(53, 37).sum(0),
    "extremes": lambda a, b: (a.amax((0, 1)), b.amin(1)),
    "comparisons": lambda a, b: (a > b) | (a < 0),
    "where": lambda a, b: torch.where(a > b, a, b),
    "loss": lambda a, b: F.mse_loss(a, b),
    "repeated": lambda a, b: (a.unsqueeze(-1).expand(37, 53, 4) * 2).sum((0, 2)),
    "positions": lambda a, b: a + torch.arange(53),
    "several results": lambda a, b: (a + b, (a * b).sum(1), a.exp()),
    "group norm": lambda a, b: F.group_norm(a.reshape(1, 37, 53), 37),
    "nothing": lambda a, b: (a[:0] + 1, a[:0].sum(0)),
    "one element": lambda a, b: (torch.softmax(a[:, :1].clone(), -1), a[:1, :1].sum(0) + 1),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_values(name: str, dtype: torch.dtype) -> None:
    fn, a, b = FUNCTIONS[name], data(37, 53, dtype=dtype), data(37, 53, dtype=dtype, seed=6)
    got, eager = run(fn, a, b), fn(a, b)
    exact = eager if dtype is torch.float64 else fn(a.double(), b.double())
    for g, e, x in zip(*(v if isinstance(v, tuple) else (v,) for v in (got, eager, exact)), strict=True):
        assert (g.dtype, g.shape, g.stride()) == (e.dtype, e.shape, e.stride())
        if not g.is_floating_point():
            assert torch.equal(g, e)
            continue
        scale = x.abs().max() if x.numel() else x.sum()
        eps = torch.finfo(g.dtype).eps
        allowed = 2 * (e.double() - x).abs() + 2 * eps * x.abs() + 8 * eps * scale * (dtype is torch.float64) + 1e-7
        assert ((g.double() - x).abs() <= allowed).all()


SPECIAL = torch.tensor([0.0, -0.0, 1.0, -1.0, math.inf, -math.inf, math.nan, 1e-40, 3e38] * 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_special_values(dtype: torch.dtype) -> None:
    a, b = (t.to(dtype) for t in torch.cartesian_prod(SPECIAL[:9], SPECIAL[:9]).unbind(1))
    fns = (torch.add, torch.mul, torch.maximum, torch.minimum, torch.eq, torch.ne, torch.lt, torch.ge)
    for fn in fns:
        assert torch.equal(run(fn, a, b).nan_to_num(7.5), fn(a, b).nan_to_num(7.5)), fn
    m = a.reshape(9, 9)
    for one in (
        lambda t: t.amax(1),
        lambda t: t.amin(0),
        lambda t: t.sum(0),
        torch.sign,
        torch.isfinite,
        torch.signbit,
    ):
        assert torch.equal(run(one, m).nan_to_num(7.5), one(m).nan_to_num(7.5))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_integers(dtype: torch.dtype) -> None:
    a, b = data(41, 19, dtype=dtype), data(41, 19, dtype=dtype, seed=6)
    fns: list[Callable[..., Tensor]] = [
        lambda a, b: (a * b + 3) & (a ^ b),
        lambda a, b: torch.bitwise_left_shift(a, 2) + torch.bitwise_right_shift(b, 1),
        lambda a, b: torch.maximum(a, -b) - torch.sign(a).to(a.dtype),
        lambda a, b: a.sum(0) + b.amax(0),
        lambda a, b: torch.where(a < b, a, 5).to(torch.float32) * 0.5,
        lambda a, b: (a != b).sum(),
        lambda a, b: a.abs().prod(1),
    ]
    for fn in fns:
        assert torch.equal(run(fn, a, b), fn(a, b))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int16, torch.uint8], ids=str)
def test_shifts_by_operators(dtype: torch.dtype, compiled: list[Compiled]) -> None:
    def hashed(a: Tensor, by: Tensor) -> Tensor:
        a = a ^ (a << 3)
        a >>= by
        return a ^ (a << 70)

    a, by = (torch.randint(low, high, (300,)).to(dtype) for low, high in ((-128, 128), (-2, 70)))
    assert torch.equal(run(hashed, a, by), hashed(a, by))
    assert kernels(compiled) == [1]


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
@pytest.mark.parametrize("antialias", [False, True])
def test_resized_bytes_are_eagers(mode: str, antialias: bool) -> None:
    """Its weights are in fixed point, those of PyTorch's decompositions are not."""
    image = torch.randint(0, 256, (1, 3, 37, 41), dtype=torch.uint8)

    def resized(a: Tensor) -> Tensor:
        return F.interpolate(a, (23, 50), mode=mode, antialias=antialias) ^ 3

    assert torch.equal(primexec.make_traced(resized, executor=("llvm", "aten"))(image), resized(image))


def test_reductions_of_one_number() -> None:
    a = torch.tensor(3.0)
    for fn in (lambda t: t.sum() + 1, lambda t: t.amax() + 1, lambda t: torch.logsumexp(t, 0)):
        assert torch.equal(run(fn, a), fn(a))


def test_conversions() -> None:
    a = torch.tensor([0.0, -0.5, 2.7, -2.7, 100.9, math.nan, math.inf])
    for dtype in (torch.int8, torch.int32, torch.int64, torch.bool, torch.float64, torch.bfloat16, torch.float16):
        finite = a if dtype.is_floating_point or dtype is torch.bool else a[:5]
        got, expected = run(lambda t, d=dtype: (t + 0).to(d), finite), finite.to(dtype)
        assert torch.equal(got.double().nan_to_num(7.5), expected.double().nan_to_num(7.5)), dtype


def test_halves_to_nearest_even() -> None:
    bits = torch.arange(0, 2**32, 65521, dtype=torch.int64).to(torch.int32)
    a = bits.view(torch.float32)
    for dtype in (torch.bfloat16, torch.float16):
        got, expected = run(lambda t, d=dtype: (t * 1.0).to(d), a), a.to(dtype)
        assert torch.equal(got.double().nan_to_num(7.5), expected.double().nan_to_num(7.5))


def test_sums_do_not_lose_digits_as_they_grow() -> None:
    a = data(1 << 20) + 1
    for t in (a, a.double()):
        got, eager = run(lambda t: t.sum(), t).double(), t.sum().double()
        exact = math.fsum(t.tolist())
        assert abs(float(got) - exact) <= 2 * abs(float(eager) - exact) + abs(exact) * torch.finfo(t.dtype).eps


@pytest.mark.parametrize("shape", [(100,), (16, 100), (33, 7, 9), (2, 30, 5), (64, 5), (7, 9, 300)], ids=str)
def test_sums_in_float32_lose_no_more_than_eager(shape: tuple[int, ...]) -> None:
    """Of what a lane adds up before it is widened, along one dimension or over all of them."""
    for seed, dims in enumerate((-1, tuple(range(len(shape))))):
        for a in (data(*shape, seed=seed), data(*shape, seed=seed).abs(), data(*shape)[:1].expand(shape)):
            got, usual, exact = run(lambda a, d=dims: a.sum(d), a), a.sum(dims), a.double().sum(dims)
            allowed = 2 * (usual - exact).abs().max() + 2 * torch.finfo(torch.float32).eps * exact.abs().max()
            assert (got - exact).abs().max() <= allowed


@pytest.mark.parametrize("seen", [True, False])
def test_sums_in_float64_of_float32(seen: bool) -> None:
    """To the last digit where it shows, not only in what is rounded to float32."""
    a = data(1 << 20) + 1

    def total(t: Tensor) -> tuple[Tensor, Tensor]:
        made = t.double().sum()
        return made if seen else made.float(), (made * 2).float()

    got, exact = run(total, a), math.fsum(a.tolist())
    assert abs(float(got[0]) - exact) <= exact * (2**-52 if seen else 2**-24)
    assert abs(float(got[1]) - 2 * exact) <= exact * 2**-23


SHAPES = [(1,), (2, 3), (7, 1), (1, 31), (17, 64), (3, 5, 7), (2, 1, 129)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_layouts(shape: tuple[int, ...]) -> None:
    big = data(*(2 * n + 1 for n in shape))
    views = [big[tuple(slice(1, None, 2) for _ in shape)], data(*shape[::-1]).permute(*reversed(range(len(shape))))]
    for a in views:
        for fn in (lambda t: t * 2 + 1, lambda t: torch.softmax(t, 0), lambda t: t.sum(-1), lambda t: t.flip(0).exp()):
            got, expected = run(fn, a), fn(a)
            # The capture's fake tensors give dimensions of size 1 other strides than eager's kernels do.
            moving = [d for d in range(got.dim()) if got.shape[d] > 1]
            assert [got.stride(d) for d in moving] == [expected.stride(d) for d in moving]
            torch.testing.assert_close(got, expected)


COUNTS = {
    "chain": 1,
    "gelu": 1,
    "softmax": 1,
    "softmax of columns": 1,
    "log_softmax": 1,
    "layer_norm": 1,
    "loss": 1,
    "sum of all": 1,
    "transpose": 1,
    "flip": 1,
    "other shape": 2,
}


@pytest.mark.parametrize("name", COUNTS)
def test_how_many_kernels(name: str, compiled: list[Compiled]) -> None:
    run(FUNCTIONS[name], data(37, 53), data(37, 53, seed=6))
    assert kernels(compiled) == [COUNTS[name]]


def test_compiled_once(compiled: list[Compiled]) -> None:
    traced = primexec.make_traced(lambda a: torch.softmax(a * 2, -1))
    for seed in range(3):
        a = data(5, 9, seed=seed)
        torch.testing.assert_close(traced(a, executor=BOTH), torch.softmax(a * 2, -1))
    assert kernels(compiled) == [1]


def test_no_fuel_no_fusion(compiled: list[Compiled]) -> None:
    a = data(5, 9)
    got = run(lambda t: torch.softmax(t, -1), a, fuel=0)
    torch.testing.assert_close(got, torch.softmax(a, -1))
    assert kernels(compiled) == [4]  # maximum, exponentials, their sum, quotient


def test_float32_kept_inside_of_a_fusion() -> None:
    a, b = (data(997, dtype=torch.bfloat16, seed=s) for s in (1, 2))

    def chain(a: Tensor, b: Tensor) -> Tensor:
        return (a * b + 1.0) * b - a

    assert torch.equal(run(chain, a, b), chain(a, b))
    kept = run(chain, a, b, precise_casts=False)
    assert torch.equal(kept, chain(a.float(), b.float()).bfloat16())
    assert not torch.equal(kept, chain(a, b))


def test_loops_print(compiled: list[Compiled]) -> None:
    run(lambda t: torch.softmax(t, -1), data(5, 9))
    text = str(compiled[0].schedule)
    assert "for i0 in 5:" in text
    assert "amax(for i1 in 9:" in text
    assert "test_llvm.py" in text


@pytest.mark.parametrize("target", NAMED, ids=NAMED)
def test_every_target(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    lower = llvm.lower
    monkeypatch.setattr(llvm, "lower", lambda *args: asked.append(args) or lower(*args))
    run(FUNCTIONS["layer_norm"], data(37, 53), data(37, 53))
    run(FUNCTIONS["softmax of columns"], data(37, 53), data(37, 53))
    assert len(asked) == 2
    for args in asked:
        text = lower(*args, NAMED[target]).llvm
        assert llvm.engine.emit_object(text, NAMED[target])[:4] == b"\x7fELF"


def test_memory_of_nothing_is_not_read() -> None:
    """It has no address, and an element that every point would read is read before the loops."""
    nothing = torch.empty_strided((0,), (0,), dtype=torch.float64)
    assert run(torch.log1p, nothing).shape == (0,)
    rows = torch.empty_strided((3, 0), (1, 0))
    assert torch.equal(run(lambda t: t.exp().sum(1), rows), torch.zeros(3))
    assert torch.equal(run(lambda t, a: torch.cat([t[:, :0].exp(), a], 1), rows, data(3, 2)), data(3, 2))


def test_refusals_have_reasons() -> None:
    def mixed(a: Tensor) -> Tensor:
        return torch.sort(a.exp())[0] + 1

    traced, a = primexec.make_traced(mixed), data(9)
    torch.testing.assert_close(traced(a, executor=BOTH), mixed(a))
    assert "llvm declined 1 x aten.sort" in str(traced.explain(a, executor=BOTH))
    with pytest.raises(primexec.ExecutorError, match=r"strict: aten\.mul\.Tensor(.|\n)*complex64"):
        run(lambda t: t * 2, torch.ones(3, dtype=torch.complex64))


def test_strides_that_were_not_announced() -> None:
    """Results of other executors may be laid out otherwise than their fake tensors say."""
    module = torch.fx.symbolic_trace(lambda a: a)
    graph = torch.fx.Graph()
    x = graph.placeholder("x")
    y = graph.call_function(torch.ops.prims.neg.default, (x,))
    graph.output((y,))
    with torch._subclasses.FakeTensorMode():
        x.meta["val"] = y.meta["val"] = torch.empty(3, 4)
    run = LlvmExecutor().compile(llvm.Region("r", "llvm", torch.fx.GraphModule(module, graph)), {})
    a = data(4, 3).t()
    (got,) = run(a)
    assert torch.equal(got, -a)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_neighbours_are_those_of_the_dtype(dtype: torch.dtype) -> None:
    numbers = torch.tensor(
        [0.0, -0.0, 1.0, -3.0, torch.finfo(dtype).max, torch.inf, -torch.inf, torch.nan], dtype=dtype
    )
    a, b = torch.meshgrid(numbers, numbers, indexing="ij")
    traced = primexec.make_traced(torch.nextafter, executor=BOTH)
    assert same_bits(torch.nextafter(a, b), traced(a, b))


@pytest.mark.parametrize("n", [1, 3, 64])
def test_the_sign_of_a_power_of_half_precision(n: int) -> None:
    """A float64 rounded twice: the sign of what comes after must not be taken from it before it was rounded."""
    x = torch.rand(n, dtype=torch.float64, generator=torch.Generator().manual_seed(n)).half() + 0.5

    def chain(x: Tensor) -> tuple[Tensor, ...]:
        power = torch.pow(x, x)
        return torch.tanh(power), torch.copysign(x, -power)

    for got, expected in zip(run(chain, x), chain(x), strict=True):
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_every_number_of_half_precision(dtype: torch.dtype) -> None:
    """Results that fit as they are need no rounding; those around them do."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)

    def chains(x: Tensor) -> tuple[Tensor, ...]:
        most = torch.maximum(-x, x.flip(0))
        return (
            x * 2,
            x * 2 * 2,
            x * -4,
            x * 0.5,
            x * 3,
            -x,
            torch.relu(x) * 2,
            most,
            (most * 2).abs() * 0.75,
            -x * 2 + x,
        )

    for got, expected in zip(run(chains, x), chains(x), strict=True):
        assert same_bits(expected, got)
