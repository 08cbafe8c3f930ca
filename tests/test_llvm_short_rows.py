"""The executor `llvm`: rows of few elements, of which a unit walks several. Values against eager."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from primexec.executors.llvm import executor as llvm
from primexec.executors.llvm.layout import BLOCK, Layout
from tests.test_llvm import data, run


@pytest.fixture
def layouts(monkeypatch: pytest.MonkeyPatch) -> list[Layout]:
    made: list[Layout] = []
    with_rows = llvm.short_rows.with_rows
    monkeypatch.setattr(
        llvm.short_rows, "with_rows", lambda kernel, layout: made.append(with_rows(kernel, layout)) or made[-1]
    )
    return made


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "repeated": lambda a: a.repeat(1, 1, 2) * 2,
    "padded": lambda a: F.pad(a, (1, 2, 2, 1)) + 1,
    "around": lambda a: torch.cat([a[:, -1:], a, a[:, :1]], 1),
    "transposed": lambda a: a.transpose(0, 1) * 2 - 1,
    "with a value a row": lambda a: a * a[:, :, :1] + a[:1],
    "with a dear value a row": lambda a: a * a[:, :, :1].exp(),
    "windows": lambda a: a.unfold(2, 2, 1) * 2,
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int8], ids=str)
def test_values(name: str, dtype: torch.dtype) -> None:
    for shape in ((300, 5, 7), (3, 700, 9), (2, 3, 33), (5, 1, 6), (4, 0, 8), (40, 30, 70), (20000, 2, 4)):
        if dtype is torch.float32 or shape[0] < 10:
            a = data(*shape, dtype=torch.float32).mul(4).to(dtype)
            torch.testing.assert_close(run(FUNCTIONS[name], a), FUNCTIONS[name](a))


def test_units_hold_about_a_block(layouts: list[Layout]) -> None:
    run(lambda a: F.pad(a, (1, 2)) * 2, data(40000, 9))
    rows = layouts[-1]
    assert [a.size for a in rows.inner] == [40000, 12]
    run(lambda a: F.pad(a, (1, 2, 1, 0)) * 2, data(100, 80, 3, 9))
    planes = layouts[-1]
    assert [a.size for a in planes.inner] == [8000, 4, 12]
    assert all(BLOCK // 2 <= layout.unit_size <= 2 * BLOCK and layout.units >= 100 for layout in (rows, planes))


def test_what_is_dear_is_computed_once_a_row(layouts: list[Layout]) -> None:
    run(FUNCTIONS["with a dear value a row"], data(300, 50, 9))
    assert all(len(layout.inner) == 1 for layout in layouts)
