"""The executor `llvm`: writes at places that data tells. Values against eager, kernels, errors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import primexec
from primexec.executors.llvm.executor import Compiled
from tests.test_llvm import compiled, data, kernels, run  # noqa: F401
from tests.test_llvm_indexing import DTYPES, TARGET, places

ONE, THREE = places(37, 1, high=53), places(37, 3, high=53, seed=5)

# Few places in each row or column: every element asks whether it is one of them.
FEW: dict[str, Callable[[Tensor], Any]] = {
    "a value": lambda a: a.scatter(1, ONE, 1),
    "of a tensor": lambda a: a.scatter(1, ONE, a),
    "added": lambda a: a.scatter_add(1, THREE, a),
    "in columns": lambda a: a.t().scatter_add(0, THREE.t(), a.t()),
    "into zeros": lambda a: torch.zeros_like(a).scatter(1, ONE, 1) * 3,
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_places(dtype: torch.dtype, compiled: list[Compiled]) -> None:  # noqa: F811
    a = data(37, 53, dtype=dtype)
    for name, fn in FEW.items():
        if dtype is torch.float32 or name in ("a value", "added"):
            got, expected = run(fn, a), fn(a)
            assert torch.equal(got, expected), name
            assert got.stride() == expected.stride(), name


WRONG: dict[str, Callable[[Tensor], Any]] = {
    "beyond": lambda a: a.scatter(1, ONE + 40, 1),
    "negative": lambda a: a.scatter_add(1, ONE - 20, a),
}


@pytest.mark.parametrize("name", WRONG)
def test_places_that_are_not_there(name: str) -> None:
    fn, a = WRONG[name], data(37, 53)
    with pytest.raises((IndexError, RuntimeError)) as eager:
        fn(a)
    with pytest.raises(eager.type, match="out of bounds"):
        run(fn, a)


def test_gradient_of_cross_entropy(compiled: list[Compiled]) -> None:  # noqa: F811
    def loss(a: Tensor) -> Tensor:
        return F.cross_entropy(a, TARGET)

    a = data(37, 53).requires_grad_()
    primexec.make_traced(loss)(a, executor=("llvm", "aten")).backward()
    got, a.grad = a.grad, None
    loss(a).backward()
    torch.testing.assert_close(got, a.grad)
    assert kernels(compiled)[1] == 1
