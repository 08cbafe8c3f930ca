"""The vector math: errors against float64 and mpmath, special values, every target."""

from functools import cache
from typing import Any

import mpmath
import numpy as np
import pytest
import torch
from mpmath import mp

from primexec import make_traced
from primexec.executors.llvm import engine
from primexec.executors.llvm.target import NAMED, X86_64, X86_64_AVX2, Target, host
from primexec.executors.llvm.vmath import FUNCTIONS
from tests.vector_kernels import BINARY, DTYPES, Kernels, module_text, ulps

LIMITS = {"f32": 2.0, "f64": 4.0}
NAMES = sorted({name for name, _ in FUNCTIONS})
UNARY = [name for name in NAMES if name not in BINARY]
# What torch calls otherwise, or computes less well.
TORCH = {"erf_inv": torch.erfinv, "cbrt": lambda x: torch.from_numpy(np.cbrt(x.numpy()))}
SPECIAL = [
    0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, -1e-45, 2.0**-126, -(2.0**-126), 3.4028234663852886e38,
    -3.4028234663852886e38, 1.0, -1.0, 0.5, -0.5, 1.5, -1.5, 2.0, -2.0, 2.5, -2.5, 3.0, -3.0, 88.0, -88.0, 104.0,
    -104.0, 1e-30, -1e-30, 65536.0, -65536.0,
]  # fmt: skip
SPECIAL64 = [*SPECIAL, 5e-324, -5e-324, 2.0**-1022, 1.7976931348623157e308, -1.7976931348623157e308, 709.5, -745.0]
# Where eager cannot be the judge: its fmod and remainder are NaN where the quotient overflows (the C library's are
# exact), and digamma cancels near its roots at -0.504 and 1.462, here as there.
NO_JUDGE = {
    "digamma": lambda x: (x == -0.5) | (x == 1.5),
    "fmod": lambda x, y: (x / y).isinf(),
    "remainder": lambda x, y: (x / y).isinf(),
}


def torch_function(name: str) -> Any:
    return TORCH.get(name) or getattr(torch, name, None) or getattr(torch.special, name)


@cache
def kernels() -> Kernels:
    return Kernels()


@cache
def baseline() -> Kernels:
    return Kernels(target=X86_64)


@cache
def scalar() -> Kernels:
    return Kernels(lanes=1)


def float32_sample(stride: int, offset: int = 3) -> torch.Tensor:
    """Every stride-th bit pattern, and the neighbourhood of one."""
    bits = np.arange(offset, 2**32, stride, dtype=np.uint64).astype(np.uint32)
    return torch.cat([torch.from_numpy(bits.view(np.float32).copy()), torch.linspace(-12, 12, 200_001)])


def worst(got: torch.Tensor, expected: torch.Tensor, x: torch.Tensor) -> tuple[float, float]:
    error = ulps(got.numpy(), expected.numpy())
    place = int(error.argmax())
    return float(error[place]), float(x[place])


def check_float32(name: str, x: torch.Tensor, run: Kernels) -> None:
    if name == "digamma":
        x = x[x.abs() < 1e4]  # beyond, and negative, the reflection of eager's float64 is not exact either
    got, expected = run(name, x), torch_function(name)(x.double())
    off = ~((got == expected.float()) | (got.isnan() & expected.isnan()))  # few: measuring takes longer than computing
    if off.any():
        error, place = worst(got[off], expected[off], x[off])
        assert error <= LIMITS["f32"], f"{name}({place!r}): {error} ulp"


@pytest.mark.parametrize("name", UNARY)
def test_float32(name: str) -> None:
    slow = name in ("lgamma", "digamma", "erf_inv", "cbrt")
    check_float32(name, float32_sample(40_009 if slow else 4_001), kernels())


def test_float32_below_a_power_of_two() -> None:
    x = torch.tensor(0.22531205).view(torch.int32) + torch.arange(-5000, 5000, dtype=torch.int32)
    for run in (kernels(), baseline(), scalar()):
        check_float32("erf", x.view(torch.float32), run)


@pytest.mark.exhaustive
@pytest.mark.parametrize("name", UNARY)
def test_every_float32(name: str) -> None:
    chunk = 1 << 18  # stays in the second cache
    for start in range(-(1 << 31), 1 << 31, chunk):
        check_float32(name, torch.arange(start, start + chunk, dtype=torch.int32).view(torch.float32), kernels())


@pytest.mark.parametrize("run", [kernels, baseline, scalar], ids=["host", "baseline", "scalar"])
@pytest.mark.parametrize(("name", "start"), [("tanh", 0.965), ("erf", 0.6)])
def test_saturated(name: str, start: float, run: Any) -> None:
    x = torch.cat([torch.logspace(start, 38, 1000), torch.tensor([torch.inf])])
    assert torch.equal(torch_function(name)(x), torch.ones_like(x))
    for sign in (1, -1):
        assert torch.equal(run()(name, sign * x), torch.full_like(x, sign))


MPMATH: dict[str, Any] = {
    "cbrt": lambda x: mp.sign(x) * mp.cbrt(abs(x)),
    "erf_inv": mp.erfinv,
    "exp2": lambda x: mp.power(2, x),
    "lgamma": mp.loggamma,
    "log2": lambda x: mp.log(x, 2),
    "reciprocal": lambda x: 1 / x,
    "rsqrt": lambda x: 1 / mp.sqrt(x),
    "sigmoid": lambda x: 1 / (1 + mp.exp(-x)),
}  # fmt: skip
RANGES = {
    "acos": (-1, 1), "acosh": (1, 30), "asin": (-1, 1), "atanh": (-1, 1), "cosh": (-700, 700), "erf_inv": (-1, 1),
    "digamma": (2, 20), "erfc": (-5, 26.5), "exp": (-700, 709), "exp2": (-1000, 1000), "expm1": (-40, 700),
    "lgamma": (0, 30), "log": (0, 4), "log10": (0, 4), "log1p": (-1, 4), "log2": (0, 4), "rsqrt": (0, 9),
    "sigmoid": (-700, 40), "sinh": (-700, 700), "sqrt": (0, 9), "cos": (-5000, 5000),
    "sin": (-5000, 5000), "tan": (-5000, 5000),
}  # fmt: skip
EXACT = {"abs", "ceil", "floor", "neg", "round", "sign", "trunc"}


@pytest.mark.parametrize("name", [n for n in UNARY if n not in EXACT])
def test_float64(name: str) -> None:
    low, high = RANGES.get(name, (-8, 8))
    generator = torch.Generator().manual_seed(7)
    count = 60 if name in ("erf_inv", "digamma", "lgamma") else 400
    unit = torch.rand(count, dtype=torch.float64, generator=generator)
    near_low, near_high = max(low, -1.0), min(high, max(1.0, low + 1.0))
    x = torch.cat([unit * (high - low) + low, unit * (near_high - near_low) + near_low])
    if low < 1e-3:
        x = torch.cat([x, torch.logspace(-18, -1, 50, dtype=torch.float64)])
    if name == "erf_inv":
        x = torch.cat([x, 1 - torch.logspace(-15.9, -1, 50, dtype=torch.float64)])
    function = MPMATH.get(name) or getattr(mpmath, name)
    with mp.workdps(40):
        expected = [np.longdouble(mp.nstr(mp.re(function(mp.mpf(v))), 25)) for v in x.tolist()]
    error = ulps(kernels()(name, x).numpy(), np.array(expected))
    if name == "digamma":  # a difference of numbers around 2, here as in eager: relative to these
        error *= np.minimum(np.abs(np.array(expected)), 2.0) / 2.0
    place = int(error.argmax())
    assert error[place] <= LIMITS["f64"], f"{name}({x[place].item()!r}): {error[place]} ulp"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", UNARY)
def test_special_values(name: str, dtype: str) -> None:
    x = torch.tensor(SPECIAL if dtype == "f32" else SPECIAL64, dtype=DTYPES[dtype])
    check_like_eager(name, dtype, (x,))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(BINARY))
def test_special_values_of_two(name: str, dtype: str) -> None:
    values = torch.tensor(SPECIAL if dtype == "f32" else SPECIAL64, dtype=DTYPES[dtype])
    check_like_eager(name, dtype, tuple(v.flatten() for v in torch.meshgrid(values, values, indexing="ij")))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", sorted(BINARY))
def test_two_arguments(name: str, dtype: str) -> None:
    generator = torch.Generator().manual_seed(3)
    x, y = (torch.randn(20_000, generator=generator, dtype=torch.float64) * 10 for _ in range(2))
    check_like_eager(name, dtype, (x.to(DTYPES[dtype]), y.to(DTYPES[dtype])))


def check_like_eager(name: str, dtype: str, operands: tuple[torch.Tensor, ...]) -> None:
    """NaN, infinities and the signs of zeros as eager's; the rest within the limit of eager's float64."""
    got = kernels()(name, *operands)
    exact = name in BINARY - {"atan2", "hypot", "pow"}
    wide = operands if exact else tuple(v.double() for v in operands)
    expected = torch_function(name)(*wide)
    error = ulps(got.numpy(), expected.numpy())
    if dtype == "f64" or exact:
        error = np.maximum(error - (0.0 if exact else 1.0), 0.0)  # eager's float64 has an error of its own
    signs = (got == 0) & (torch.signbit(got) != torch.signbit(expected))
    if name in NO_JUDGE:
        error[NO_JUDGE[name](*operands).numpy()] = 0.0
        signs &= ~NO_JUDGE[name](*operands)
    wrong = (error > (0.0 if exact else LIMITS[dtype])) | signs.numpy()
    shown = [(tuple(v[i].item() for v in operands), got[i].item(), expected[i].item()) for i in wrong.nonzero()[0][:5]]
    assert shown == []


@pytest.mark.parametrize("target", NAMED.values(), ids=NAMED)
def test_every_function_compiles_for_every_target(target: Target) -> None:
    text = module_text(sorted(FUNCTIONS), target)
    engine.verify(text)
    assert len(engine.emit_object(text, target)) > 10_000


@pytest.mark.parametrize("name", UNARY)
@pytest.mark.skipif(not host().triple.startswith("x86_64"), reason="the baseline of x86-64 runs there only")
def test_without_fused_multiply_add(name: str) -> None:
    check_float32(name, float32_sample(400_009), baseline())


@pytest.mark.parametrize("name", ["erf", "exp", "sigmoid", "tanh"])
@pytest.mark.skipif("+avx512f" not in host().features, reason="other hosts run this algorithm in every test")
def test_without_avx512(name: str) -> None:
    check_float32(name, float32_sample(4_001), Kernels([(name, "f32")], target=X86_64_AVX2))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_one_lane_gives_the_same_bits(name: str, dtype: str) -> None:
    x = torch.linspace(-30, 30, 257, dtype=DTYPES[dtype])
    y = x.flip(0) * 0.3 if name in BINARY else None
    wide, narrow = kernels()(name, x, y), scalar()(name, x, y)
    assert torch.equal(wide.nan_to_num(7.0), narrow.nan_to_num(7.0))


def test_softmax() -> None:
    """Quotients by what a row shares are rounded as divisions are, also where they are denormal, 0 or none."""
    x = torch.randint(-180, 60, (64, 333), generator=torch.Generator().manual_seed(0)).float()  # exact differences
    x[0, 5], x[1], x[2, ::2], x[3, 7], x[4] = torch.inf, -torch.inf, -torch.inf, torch.nan, -3e38
    x[5:20] = x[5:20] / 64
    for rows in (x, x[:, :1], x[:, :19]):
        got, exact = (
            make_traced(lambda x: torch.softmax(x, -1))(rows, executor=("llvm", "aten")),
            rows.double().softmax(-1),
        )
        ulp = torch.ldexp(torch.ones_like(exact), torch.frexp(exact)[1].clamp(min=-125) - 24)
        assert torch.equal(got.isnan(), exact.isnan())
        assert (((got.double() - exact).abs() / ulp).nan_to_num(0) <= 2.6).all()


def test_exponentials_that_are_added() -> None:
    """Below the smallest normal number they may be any such number only where nothing shows it."""
    x = torch.cat([torch.linspace(-120, 120, 24_001), torch.tensor([torch.inf, -torch.inf, torch.nan, -0.0])])

    def fn(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        small, both = torch.exp(x * 0.99), torch.exp(x)
        return 1 / (1 + torch.exp(-x)), 2.0 + torch.exp(x), small + 1e-30, small + x.abs(), both + 1, both

    got = make_traced(fn)(x, executor=("llvm", "aten"))
    torch.testing.assert_close(got, fn(x), rtol=4e-7, atol=1.5e-45, equal_nan=True)


def test_sums_of_exponentials() -> None:
    x = torch.linspace(-200, 0, 1000).repeat(3, 1)
    x[1, 3], x[2] = -torch.inf, -torch.inf
    got = make_traced(lambda x: (torch.logsumexp(x, 1), torch.log_softmax(x, 1)))(x, executor=("llvm", "aten"))
    torch.testing.assert_close(got, (torch.logsumexp(x.double(), 1).float(), torch.log_softmax(x, 1)), equal_nan=True)
