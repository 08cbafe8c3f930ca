"""What operators on elements, shapes and reductions are tried on: generators of arguments."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from primexec.testing.values import ALL, LARGE, SHAPES, Draw, special_values

CPU = torch.device("cpu")


@dataclass(frozen=True)
class Sample:
    """Arguments of one call.

    Attributes:
        terms: how many terms make one element of the result.
        layouts: whether the tensors are to be tried in other layouts too.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    terms: int = 1
    layouts: bool = True


Samples = Callable[[Draw], Iterator[Sample]]


def pointwise(
    arity: int,
    *,
    low: float = -4,
    high: float = 4,
    nonzero: bool = False,
    special: bool = True,
    number: float | None = None,
    divides: bool = False,
    large: bool = True,
) -> Samples:
    """Tensors of equal shapes with values in [low, high], and every combination of special values.

    `number` stands as the last argument of one more sample, as Python numbers do in lowered programs. With `divides`
    the last of integers is neither zero nor -1: quotients by these trap, or have no value.
    """

    def samples(draw: Draw) -> Iterator[Sample]:
        def operand(i: int, *shape: int) -> Tensor:
            last = i == arity - 1
            x = draw.tensor(*shape, low=low, high=high, nonzero=(nonzero or divides) and last)
            return x.abs() if divides and last and not _is_inexact(draw.dtype) else x

        for shape in SHAPES:
            if large or shape != LARGE:
                yield Sample(tuple(operand(i, *shape) for i in range(arity)))
        if number is not None and draw.dtype != torch.bool:
            yield Sample(
                (*(operand(i, 3, 5) for i in range(arity - 1)), number_of(draw.dtype, number)), note="a number"
            )
        if special and not draw.dtype.is_complex:
            one = special_values(draw.dtype)
            grid = torch.cartesian_prod(*[one] * arity).unbind(-1) if arity > 1 else (one,)
            if divides and not _is_inexact(draw.dtype):
                grid = tuple(g[(grid[-1] != 0) & (grid[-1] != -1)] for g in grid)
            for values in (grid, tuple(g[:11] for g in grid)):
                yield Sample(tuple(v.clone() for v in values), note="special values", layouts=False)

    return samples


def _is_inexact(dtype: torch.dtype) -> bool:
    return dtype.is_floating_point or dtype.is_complex


def number_of(dtype: torch.dtype, number: float) -> float | int | bool:
    """The number as a Python number that a tensor of this dtype may stand beside."""
    return bool(number) if dtype == torch.bool else number if _is_inexact(dtype) else int(number)


def selection(draw: Draw) -> Iterator[Sample]:
    """A mask and two tensors."""
    for shape in SHAPES:
        yield Sample((draw.tensor(*shape, dtype=torch.bool), draw.tensor(*shape), draw.tensor(*shape)))
    if not draw.dtype.is_complex:
        values = special_values(draw.dtype)
        yield Sample((values == values, values, values.flip(0)), note="special values")


def conversion(targets: tuple[torch.dtype, ...]) -> Samples:
    """A tensor and a dtype; values that the target cannot hold are left out where C leaves the result open."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for target in targets:
            low = 0 if target == torch.uint8 and _is_inexact(draw.dtype) else -100
            for shape in ((), (0,), (7,), (3, 5), (4099,)):
                yield Sample((draw.tensor(*shape, low=low, high=100), target), note=f"to {target}")
            if not draw.dtype.is_complex and (
                _is_inexact(target) or target == torch.bool or not _is_inexact(draw.dtype)
            ):
                yield Sample((special_values(draw.dtype), target), note=f"special values to {target}", layouts=False)

    return samples


def reinterpretation(draw: Draw) -> Iterator[Sample]:
    """A tensor and a dtype of the same size."""
    for target in ALL:
        if target.itemsize == draw.dtype.itemsize and (target == torch.bool) == (draw.dtype == torch.bool):
            for shape in ((), (0,), (3, 5)):
                yield Sample((draw.tensor(*shape), target), note=f"as {target}")


# Shapes --------------------------------------------------------------------------------------------------


def static(*choices: tuple[tuple[int, ...], tuple[Any, ...]], layouts: bool = True) -> Samples:
    """A tensor of each shape, followed by the static arguments beside it."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for shape, arguments in choices:
            yield Sample((draw.tensor(*shape), *arguments), note=str(arguments), layouts=layouts)

    return samples


def concatenation(draw: Draw) -> Iterator[Sample]:
    """Lists of one to three tensors, empty ones among them."""
    for shapes, dim in (
        (((3,),), 0), (((3,), (5,)), 0), (((2, 3), (2, 1), (2, 4)), 1), (((2, 3), (0, 3), (1, 3)), 0),
        (((0,), (0,)), 0), (((127, 513), (3, 513)), 0),
    ):  # fmt: skip
        yield Sample(([draw.tensor(*shape) for shape in shapes], dim))


def slices_written(draw: Draw) -> Iterator[Sample]:
    """slice_scatter: a tensor, what is written into it, and where (dim, start, end, step)."""
    for shape, dim, start, end, step in (
        ((7,), 0, 1, 6, 1), ((7,), 0, 0, 7, 3), ((3, 5), 1, -3, -1, 1), ((3, 5), 0, 2, 2, 1),
        ((127, 513), 1, 5, 500, 7),
    ):  # fmt: skip
        x = draw.tensor(*shape)
        part = x[(slice(None),) * dim + (slice(start, end, step),)]
        yield Sample((x, draw.tensor(*part.shape), dim, start, end, step), layouts=False)


def rewriting(draw: Draw) -> Iterator[Sample]:
    """as_strided_scatter: a tensor, what is written into it, and where (size, stride, offset)."""
    for shape, size, stride, offset in (((12,), (2, 3), (6, 2), 0), ((3, 5), (3, 2), (5, 1), 1), ((7,), (), (), 3)):
        yield Sample((draw.tensor(*shape), draw.tensor(*size), size, stride, offset), layouts=False)


def factory(*choices: tuple[Any, ...]) -> Samples:
    """No tensor: static arguments, and the dtype and device as keywords."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for arguments in choices:
            keywords = {"dtype": draw.dtype, "device": CPU, "requires_grad": False}
            yield Sample(arguments, keywords, note=str(arguments))

    return samples


def iota(draw: Draw) -> Iterator[Sample]:
    """A length, and start, step, dtype and device."""
    for length, start, step in ((0, 0, 1), (1, 5, 1), (7, 3, 2), (100, 0, 1), (5, 9, -2)):
        options = {"start": start, "step": step, "dtype": draw.dtype, "device": CPU, "requires_grad": False}
        yield Sample((length,), options)


# Reductions ----------------------------------------------------------------------------------------------

_DIMS: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...] = (
    ((), ()), ((1,), (0,)), ((7,), (0,)), ((4099,), (0,)), ((3, 5), (0,)), ((3, 5), (1,)), ((3, 5), (0, 1)),
    ((2, 3, 4), (1,)), ((2, 3, 4), (0, 2)), ((2, 3, 4), (2,)), (LARGE, (0,)), (LARGE, (1,)), (LARGE, (0, 1)),
)  # fmt: skip


def reduction(
    *,
    low: float = -4,
    high: float = 4,
    empty: bool = True,
    nothing: bool = True,
    special: bool = True,
    large: bool = True,
    more: Any = (),
) -> Samples:
    """A tensor and the dimensions to reduce; `empty` adds reductions of nothing, `nothing` those without results."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for shape, dims in _DIMS:
            if not large and shape in (LARGE, (4099,)):
                continue
            x = draw.tensor(*shape, low=low, high=high)
            yield Sample((x, list(dims), *more), note=f"{dims}", terms=_terms(shape, dims))
        if empty:
            yield Sample((draw.tensor(0, low=low), [0], *more), note="of nothing")
            yield Sample((draw.tensor(2, 0, 3, low=low), [1], *more), note="of nothing")
        if nothing:
            yield Sample((draw.tensor(2, 0, 3, low=low), [2], *more), note="no result")
        if special and draw.dtype.is_floating_point:
            nan, inf = float("nan"), float("inf")
            for row in ((nan, 1, 2), (1, nan, 2), (1, 2, nan), (inf, 1, 2), (-inf, 1, 2), (inf, -inf, 1)):
                x = torch.tensor([row, (1, 2, 3)]).to(draw.dtype)
                yield Sample((x, [1], *more), note=f"{row}", terms=3)
                yield Sample((x.t().contiguous(), [0], *more), note=f"{row}", terms=3)
        elif special and not draw.dtype.is_complex:
            values = special_values(draw.dtype)
            yield Sample((values, [0], *more), note="special values", terms=len(values))

    return samples


def _terms(shape: tuple[int, ...], dims: tuple[int, ...]) -> int:
    count = 1
    for d in dims:
        count *= shape[d]
    return count


def along(*more: Any, low: float = -4, high: float = 4, special: bool = True, shapes: Any = None) -> Samples:
    """A tensor and one dimension, then further static arguments."""

    def samples(draw: Draw) -> Iterator[Sample]:
        for shape, dim in shapes or (((1,), 0), ((7,), 0), ((3, 5), 0), ((3, 5), 1), ((2, 3, 4), 1), ((127, 53), 1)):
            yield Sample((draw.tensor(*shape, low=low, high=high), dim, *more), note=f"dim {dim}", terms=shape[dim])
        if special and draw.dtype.is_floating_point:
            x = torch.tensor([[1, float("nan"), 2], [3, 1, float("inf")], [-float("inf"), 0, 1]]).to(draw.dtype)
            yield Sample((x, 1, *more), note="special values", terms=3)

    return samples
