"""Which rows `llvm` kernels ask memory for before they need them."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from primexec.executors.llvm.executor import Compiled
from tests.test_llvm import compiled  # noqa: F401
from tests.test_llvm_layouts import check, data


def test_later_passes_fetch_the_next_row(compiled: list[Compiled]) -> None:  # noqa: F811
    x, w = data(70, 300), data(300)
    check(lambda x, w: F.layer_norm(x, (300,), w, w), x, w)
    assert "i32 0, i32 3, i32 1)" in compiled[-1].llvm
    check(lambda x: torch.softmax(x, -1), data(3, 8000))
    assert "i32 0, i32 2, i32 1)" in compiled[-1].llvm  # rows that fill the first cache
    check(lambda x, w: x * w, x, w)
    assert "llvm.prefetch" not in compiled[-1].llvm


@pytest.mark.parametrize(
    ("fn", "shape", "apart"),
    [
        (lambda x: x.chunk(2, -1)[0] * x.chunk(2, -1)[1], (512, 1024), 1),
        (lambda x: x[1:, :-1] + x[1:, 1:] + x[:-1, 1:], (512, 1024), 1 / 3),  # two are read in the row before, too
        (lambda x: x[:, :512].sum(1), (512, 1024), 1),
        (lambda x: x.view(8, 64, 1024).sum((0, 2)), (512, 1024), 1),
        (lambda x: x.sum(1), (512, 1024), 0),  # rows that follow one another
        (lambda x: x * 2, (512, 1024), 0),
        (lambda x: x[:, :512] * 2, (8, 1024), 0),  # few
        (lambda x: x[:, :32] * 2, (8192, 64), 0),  # short
    ],
)
def test_rows_that_lie_apart_are_fetched(
    fn: Callable[[Tensor], Tensor],
    shape: tuple[int, int],
    apart: float,
    compiled: list[Compiled],  # noqa: F811
) -> None:
    """Of what is read, this part is asked for a row before."""
    check(fn, data(*shape))
    loaded = sum(4 * int(lanes) for lanes in re.findall(r"load <(\d+) x float>", compiled[-1].llvm))
    assert compiled[-1].llvm.count("call void @llvm.prefetch") * 64 == round(apart * loaded)


def test_rows_of_columns_are_fetched(compiled: list[Compiled]) -> None:  # noqa: F811
    """Where a row has several vectors."""
    for shape, wide in (((70, 300), True), ((70, 40), False), ((3, 9, 200), True)):
        check(lambda x: (x.mean(-2), x.flip(-2).var(-2)), data(*shape))
        assert ("llvm.prefetch" in compiled[-1].llvm) == wide
