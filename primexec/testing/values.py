"""Tensors to test with: values by dtype, the special values of each dtype, and the layouts of a tensor in memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

HALVES = (torch.float16, torch.bfloat16)
FLOATS = (*HALVES, torch.float32, torch.float64)
COMPLEX = (torch.complex64, torch.complex128)
INTS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
NUMBERS = (*FLOATS, *COMPLEX, *INTS)
ALL = (torch.bool, *NUMBERS)
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in ALL}

LARGE = (127, 513)  # more than one thread's share
SHAPES: tuple[tuple[int, ...], ...] = ((), (0,), (1,), (7,), (3, 5), (2, 0, 3), (2, 3, 4), (4099,), LARGE)


@dataclass
class Draw:
    """Draws tensors of one dtype; the seed determines every value."""

    dtype: torch.dtype
    seed: int
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = torch.Generator().manual_seed(self.seed)

    def tensor(
        self, *shape: int, low: float = -4, high: float = 4, nonzero: bool = False, dtype: torch.dtype | None = None
    ) -> Tensor:
        """A dense tensor with values in [low, high], as far as its dtype has them."""
        dtype = dtype or self.dtype
        if dtype == torch.bool:
            return torch.randint(0, 2, shape, generator=self.generator).bool()
        if not dtype.is_floating_point and not dtype.is_complex:
            info = torch.iinfo(dtype)
            span = max(int(low), info.min), min(int(high), info.max) + 1
            made = torch.randint(*span, shape, generator=self.generator, dtype=torch.int64).to(dtype)
        elif dtype.is_complex:
            parts = torch.rand(*shape, 2, generator=self.generator, dtype=torch.float64) * (high - low) + low
            made = torch.view_as_complex(parts).to(dtype)
        else:
            made = (torch.rand(shape, generator=self.generator, dtype=torch.float64) * (high - low) + low).to(dtype)
        return torch.where(made == 0, torch.ones_like(made), made) if nonzero else made

    def permutation(self, *shape: int) -> Tensor:
        """Distinct values in a random order, as far as the dtype has so many."""
        count = Tensor.numel(torch.empty(shape))
        return torch.randperm(count, generator=self.generator).to(self.dtype).reshape(shape)


def special_values(dtype: torch.dtype) -> Tensor:
    """NaN, infinities, signed zeros, denormals and extremes of a floating dtype; extremes of an integer one."""
    if dtype == torch.bool:
        return torch.tensor([False, True])
    if not dtype.is_floating_point:
        info = torch.iinfo(dtype)
        return torch.tensor(sorted({info.min, info.min + 1, max(info.min, -1), 0, 1, 2, info.max - 1, info.max})).to(
            dtype
        )
    info_f = torch.finfo(dtype)
    least = info_f.smallest_normal * info_f.eps
    positive = [0.0, least, 3 * least, info_f.smallest_normal - least, info_f.smallest_normal, 0.5, 1 - info_f.eps / 2]
    positive += [1.0, 1 + info_f.eps, 1.5, 2.0, 2.5, 3.0, 10.0, info_f.max, float("inf")]
    return torch.tensor([float("nan"), *positive, *(-v for v in positive)], dtype=torch.float64).to(dtype)


# Layouts: a tensor of the same shape and, for the last two, of fewer distinct values --------------------


def _strided(t: Tensor) -> Tensor:
    base = _garbage([2 * n for n in t.shape], t.dtype)
    view = base[tuple(slice(1, None, 2) for _ in t.shape)]
    return view.copy_(t)


def _permuted(t: Tensor) -> Tensor:
    order = list(range(t.dim()))[::-1]
    return _garbage([t.shape[i] for i in order], t.dtype).permute(order).copy_(t)


def _offset(t: Tensor) -> Tensor:
    return _garbage([t.numel() + 3], t.dtype)[3:].view(t.shape).copy_(t)


def _expanded(t: Tensor) -> Tensor:
    return t[:1].clone().expand(t.shape)


def _overlapping(t: Tensor) -> Tensor:
    base = t.reshape(-1)[: sum(n - 1 for n in t.shape) + 1].clone()
    return base.as_strided(t.shape, [1] * t.dim())


def _garbage(shape: list[int], dtype: torch.dtype) -> Tensor:
    """What surrounds a view: values that show where they are read."""
    return torch.full(shape, float("nan") if dtype.is_floating_point or dtype.is_complex else 1).to(dtype)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "strided": _strided,
    "permuted": _permuted,
    "offset": _offset,
    "expanded": _expanded,
    "overlapping": _overlapping,
}


def can_be_laid_out(t: Tensor) -> bool:
    """Whether the layouts of this tensor differ from the dense one, and are small."""
    return t.dim() >= 1 and 2 <= t.numel() <= 512
