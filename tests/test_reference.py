"""The references as a whole: one for each prim, dtypes, and the elementwise ones against PyTorch."""

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from primexec import reference
from primexec.prims import TABLE
from tests.reference_checks import NARROW, check, declared

INF, NAN = math.inf, math.nan
POINTWISE = [row for row in TABLE.values() if row.family == "pointwise"]
UNARY = [r.op for r in POINTWISE if r.shapes == "any → the same" and r.name != "convert_element_type"]
BINARY = [r.op for r in POINTWISE if r.shapes.startswith("two")]


def test_every_prim_has_a_reference_or_a_reason() -> None:
    assert {*reference.references(), *reference.declined()} == set(TABLE)
    assert not {*reference.references()} & {*reference.declined()}
    random = {name for name, row in TABLE.items() if row.effects in ("random", "collective")}
    assert set(reference.declined()) - random == {
        "aten.linalg_ldl_factor_ex.default",
        "aten.linalg_ldl_solve.default",
    }


def test_lookup_of_a_declined_prim_tells_why() -> None:
    with pytest.raises(KeyError, match="it draws from PyTorch's generator"):
        reference.lookup("aten.rand.default")
    with pytest.raises(KeyError, match="it is no prim"):
        reference.lookup("aten.add.Tensor")


# Values -------------------------------------------------------------------------------------------------

SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 2.0, -2.0, 3.0, -3.0, 10.0, -7.25, 88.0, 1e-8, -1e-8,
           1e-30, 1e4, INF, -INF, NAN, 0.999, -0.999, 4.0, 27.3]  # fmt: skip
WHOLE = [0, 1, -1, 2, -2, 3, 5, -7, 8, 31, 63, 64, 100, 127, -128]


def values(dtype: torch.dtype, count: int = 40) -> Tensor:
    """Special values, then random ones of several magnitudes; integers with their extremes."""
    generator = torch.Generator().manual_seed(3)
    if dtype == torch.bool:
        return torch.tensor([True, False, False, True])
    if dtype.is_complex:
        real, imag = torch.randn(2, count, generator=generator, dtype=torch.float64) * 2
        return torch.complex(real, imag).to(dtype)
    if not dtype.is_floating_point:
        limits = torch.iinfo(dtype)
        return torch.tensor([v for v in WHOLE if limits.min <= v <= limits.max] + [limits.min, limits.max], dtype=dtype)
    spread = torch.randn(count, generator=generator, dtype=torch.float64) * torch.logspace(-3, 1.3, count).double()
    return torch.cat([torch.tensor(SPECIAL, dtype=torch.float64), spread]).to(dtype)


def pairs(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    a = values(dtype, 12)
    grid = torch.tensor(list(itertools.product(range(len(a)), repeat=2)))
    return a[grid[:, 0]], a[grid[:, 1]]


def ulps(dtype: torch.dtype, count: float) -> float:
    return count * torch.finfo(dtype).eps


# Where PyTorch's own result is further from the truth than rounding, in units of the dtype's eps.
LOOSE: dict[str, float] = {
    "erf": 8,  # its vectorised float32 and bfloat16 kernels give 0 for tiny arguments
    "digamma": 2000, "lgamma": 50, "erfcx": 400, "ndtri": 50, "erf_inv": 50, "igamma": 1e7, "igammac": 1e7,
    "zeta": 1e3, "bessel_j0": 1e10, "bessel_j1": 1e10, "pow": 100, "bessel_i0": 100, "bessel_i1": 100,
    "bessel_i0e": 100, "bessel_i1e": 100, "cosh": 100, "sinh": 100,
}  # fmt: skip


def tolerance(name: str, dtype: torch.dtype) -> dict[str, float]:
    if not (dtype.is_floating_point or dtype.is_complex):
        return {}
    allowed = 8 if dtype in NARROW else LOOSE.get(name.split(".")[1], 8)
    return {
        "rtol": ulps(dtype, allowed),
        "atol": ulps(dtype, allowed) if name.split(".")[1] in LOOSE or dtype.is_complex else 0,
    }


@pytest.mark.parametrize("name", UNARY)
def test_unary(name: str) -> None:
    for dtype in declared(name):
        check(name, values(dtype), **tolerance(name, dtype))
        check(name, values(dtype)[1], **tolerance(name, dtype))
        check(name, values(dtype)[:0], **tolerance(name, dtype))


ZERO_DIVIDES = {"div", "fmod", "remainder"}


@pytest.mark.parametrize("name", BINARY)
def test_binary(name: str) -> None:
    base = name.split(".")[1]
    for dtype in declared(name):
        a, b = pairs(dtype)
        if base in ZERO_DIVIDES and not (dtype.is_floating_point or dtype.is_complex):
            keep = (b != 0) & ~((b == -1) & (a == torch.iinfo(dtype).min))  # the latter traps in C
            a, b = a[keep], b[keep]
        if base == "gcd" and dtype != torch.uint8:  # of the smallest integer PyTorch's is negative
            keep = torch.minimum(a, b) != torch.iinfo(dtype).min
            a, b = a[keep], b[keep]
        if base in ("igamma", "igammac", "zeta"):  # at NaN and infinity PyTorch's are not the functions' limits
            keep = torch.isfinite(a) & torch.isfinite(b)
            a, b = a[keep], b[keep]
        if base == "nextafter" and dtype in NARROW:  # the array does not tell the dtype
            continue
        check(name, a, b, **tolerance(name, dtype))
        check(name, a.reshape(-1)[:1].reshape(()), b.reshape(-1)[:1].reshape(()), **tolerance(name, dtype))


@pytest.mark.parametrize("name", sorted(ZERO_DIVIDES))
def test_integer_division_by_zero_raises(name: str) -> None:
    with pytest.raises(ZeroDivisionError):
        reference.lookup(f"prims.{name}.default")(np.array([1, 2]), np.array([1, 0]))


def test_smallest_integer_over_minus_one_wraps() -> None:
    least = np.array([-(2**31)], np.int32)
    assert reference.lookup("prims.div.default")(least, np.array([-1], np.int32)).tolist() == [-(2**31)]


@pytest.mark.parametrize("name", ["add", "mul", "eq", "pow", "maximum", "where"])
def test_numbers_take_the_dtype_of_the_array(name: str) -> None:
    function = reference.lookup(f"prims.{name}.default")
    x = np.array([1, 2, 3], np.float32)
    args: Any = (np.array([True, False, True]), x, 2.0) if name == "where" else (x, 2.0)
    assert function(*args).dtype == (bool if name == "eq" else np.float32)


def test_frexp_and_where() -> None:
    for dtype in declared("prims.frexp.default"):
        check("prims.frexp.default", values(dtype)[torch.isfinite(values(dtype))])
    for dtype in declared("prims.where.default"):
        a, b = pairs(dtype)
        check("prims.where.default", torch.arange(len(a)) % 3 == 0, a, b)


# Dtypes -------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Casting complex values to real")
def test_conversions() -> None:
    name = "prims.convert_element_type.default"
    for source, target in itertools.product(declared(name), repeat=2):
        a = values(source)
        if not target.is_floating_point and not target.is_complex and target != torch.bool:
            whole = a.real if a.is_complex() else a
            a = a[torch.isfinite(whole) & (whole.abs() < 2**31)] if source.is_floating_point else a
        check(name, a, target)


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_rounding_to_narrow_floats(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=generator).to(torch.int32)
    x = bits.view(torch.float32)
    rounded = reference.cast(x.numpy(), str(dtype))
    np.testing.assert_array_equal(rounded, x.to(dtype).float().numpy())
    halves = torch.arange(2**16).to(torch.int16).view(dtype).float()
    np.testing.assert_array_equal(reference.cast(halves.numpy(), str(dtype)), halves.numpy())


def test_dtypes_without_arrays_are_refused() -> None:
    for dtype in ("complex32", "float8_e5m2", torch.complex32):
        with pytest.raises(TypeError, match="the reference has no arrays of"):
            reference.name_of(dtype)
