"""Functions that need ints in Python that are read off tensors, or sizes that depend on values."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.test_decisions import EXECUTORS, check, filled


def mask_of_lengths(x: Tensor) -> Tensor:
    lengths = (x > 0).sum(1)
    return torch.arange(int(lengths.max()))[None] < lengths[:, None]


def rows_up_to(x: Tensor) -> Tensor:
    return x[: (x[:, 0] > 0).sum().item()] * 2


def rounds(x: Tensor) -> Tensor:
    for i in range((x > 1).sum()):
        x = x + i
    return x


def columns_up_to(x: Tensor) -> Tensor:
    y, n = x.clone(), (x[:, 0] > 0).sum().item()
    y[:, :n] = n
    return torch.cat([y[:, n:], x.narrow(1, 0, n)], 1)


def said(x: Tensor) -> Tensor:
    count = (x[:, 0] > 0).sum()
    n = count.item()
    table = {"0": 1.0, "1": 2.0, "2": 3.0}
    names = {f"rows {i}": i for i in range(3)}
    return x * table[str(n)] * names[f"rows {count}"] * len(f"{count > 1} {n:03d}") + {n: round(n), 5: 7}[n]


def reckoned(x: Tensor) -> Tensor:
    n = (x[:, 0] > 0).sum().item()
    return x * (2**n + (n & 1) + (1 << n) + divmod(n, 2)[1] + float(n)) + n.bit_length() * math.sqrt(n)


def rows_one_by_one(x: Tensor) -> Any:
    total = torch.zeros(())
    for row in (x[:, 0] > 0).nonzero():
        total = total + x[row].sum() * (row[0] + 1)
    return torch.stack([total, *(row.max() for row in x[x[:, 0] > 0])])


def halves(x: Tensor) -> Tensor:
    rows = x[x[:, 0] > 0]
    return rows[: rows.size(0) // 2 + 1].sum(0) + rows[len(rows) % 2 :].sum()


def found_or_not(x: Tensor) -> Tensor:
    rows = x[x[:, 0] > 0]
    if rows.numel() == 0:
        return x
    return rows.sum(0) / len(rows)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("fn", "traces_at"),
    [
        (mask_of_lengths, {0, 1}),
        (rows_up_to, {0, 1, 3}),
        (rounds, {0, 1, 3}),
        (found_or_not, {0, 1, 3}),
        (columns_up_to, {0, 1, 3}),
        (said, {0, 1, 3}),
        (reckoned, {0, 1, 3}),
        (rows_one_by_one, {0, 1, 3}),
        (halves, {0, 1, 3}),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_an_int_has_a_program_for_each_value(fn: Any, traces_at: set[int], executor: Any) -> None:
    inputs = [torch.where(torch.arange(2)[:, None] < positive, 2.0, -1.0).repeat(1, 3) for positive in (1, 0, 1, 2, 0)]
    check(fn, inputs, traces_at, executor)


def test_an_int_that_stays_a_number_decides_nothing() -> None:
    check(lambda x: x * (x > 0).sum().item() + torch.full((3,), (x > 1).sum().item()), filled(1, 2, -1), {0})
