"""The loops of some kernels as text, under tests/golden: what fusion makes of them is seen in a diff.

`python -m tests.llvm_golden` writes the files anew: look at the diff before you commit it.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

import primexec

FOLDER = Path(__file__).parent / "golden"


def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def layer_norm_residual(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x + y, (40,), weight, bias)


def gelu_chain(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.gelu(x * weight + bias) * torch.sigmoid(x) + 1


def transpose_add(x: Tensor, y: Tensor) -> Tensor:
    return x.t() + y


def column_sum(x: Tensor) -> Tensor:
    return x.sum(0)


def two_results(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.exp(), x[:, 1:].flip(1) - x[:, :-1]


def half_precision(x: Tensor, y: Tensor) -> Tensor:
    return (x * y + 1) * y


def depthwise(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.relu(F.conv2d(x, weight, bias, padding=1, groups=3))


def matrix(rows: int = 6, columns: int = 40, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(rows, columns, dtype=dtype)


CASES: dict[Callable[..., Any], tuple[Tensor, ...]] = {
    softmax: (matrix(),),
    layer_norm_residual: (matrix(), matrix(), torch.ones(40), torch.ones(40)),
    gelu_chain: (matrix(), torch.ones(40), torch.ones(40)),
    transpose_add: (matrix(), matrix(40, 6)),
    column_sum: (matrix(),),
    two_results: (matrix(),),
    depthwise: (torch.ones(2, 3, 10, 9), torch.ones(3, 1, 3, 3), torch.ones(3)),
    half_precision: (matrix(dtype=torch.bfloat16), matrix(dtype=torch.bfloat16)),
}


def loops(fn: Callable[..., Any]) -> str:
    """The text; lines of this file without their numbers."""
    text = primexec.make_traced(fn).trace(*CASES[fn]).inspect_loops()
    return re.sub(r"(llvm_golden\.py):\d+", r"\1", text) + "\n"


def path_of(fn: Callable[..., Any]) -> Path:
    return FOLDER / f"{fn.__name__}.txt"


if __name__ == "__main__":
    FOLDER.mkdir(exist_ok=True)
    for case in CASES:
        path_of(case).write_text(loops(case))
