"""Tensors made by the function: of every kind, dtype and default."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.programs.table import Family, draw, tensors

FAMILY = Family("factories")
X = tensors((3, 4))

MAKES: dict[str, Callable[[Tensor], Any]] = {
    "zeros": lambda x: torch.zeros(2, 3),
    "ones": lambda x: torch.ones((2, 3), dtype=torch.int32),
    "full": lambda x: torch.full((2,), 3),
    "full_float": lambda x: torch.full((2,), 3.5) + x[0, :2],
    "arange": lambda x: torch.arange(4) * x,
    "arange_float": lambda x: torch.arange(0, 1, 0.25),
    "linspace": lambda x: torch.linspace(-1, 1, 5),
    "logspace": lambda x: torch.logspace(0, 2, 3),
    "eye": lambda x: torch.eye(3) @ x,
    "tensor_scalar": lambda x: torch.tensor(2.5) * x,
    "tensor_list": lambda x: torch.tensor([[1, 2], [3, 4]]),
    "tensor_nested_floats": lambda x: torch.tensor([[1.0, float("nan")], [float("inf"), -0.0]]),
    "tensor_bool": lambda x: torch.tensor([True, False]),
    "tensor_complex": lambda x: torch.tensor([1 + 2j]),
    "tensor_empty": lambda x: torch.tensor([]),
    "tensor_dtype": lambda x: torch.tensor([1, 2], dtype=torch.float16),
    "as_tensor": lambda x: torch.as_tensor([1.0, 2.0]),
    "as_tensor_same": lambda x: torch.as_tensor(x),
    "asarray": lambda x: torch.asarray(x),
    "scalar_tensor": lambda x: torch.scalar_tensor(3.0),
    "zeros_like": lambda x: torch.zeros_like(x),
    "ones_like_transposed": lambda x: torch.ones_like(x.t()),
    "full_like": lambda x: torch.full_like(x, 2, dtype=torch.int64),
    "empty_filled": lambda x: torch.empty(3, 4).copy_(x),
    "empty_like_filled": lambda x: torch.empty_like(x).fill_(1),
    "empty_strided": lambda x: torch.empty_strided((2, 3), (1, 2)).zero_(),
    "empty_permuted": lambda x: torch.empty_permuted((2, 3, 4), (2, 0, 1)).zero_(),
    "empty_none": lambda x: torch.empty(0),
    "new_zeros": lambda x: x.new_zeros(2, 2),
    "new_ones": lambda x: x.new_ones((3,), dtype=torch.int8),
    "new_full": lambda x: x.new_full((2,), 7),
    "new_tensor": lambda x: x.new_tensor([1, 2, 3]),
    "new_empty": lambda x: x.new_empty(3, 4).copy_(x),
    "tril_indices": lambda x: torch.tril_indices(3, 3),
    "hann_window": lambda x: torch.hann_window(5),
    "one_hot": lambda x: torch.nn.functional.one_hot(torch.arange(3), 4),
    "cartesian": lambda x: torch.cartesian_prod(torch.arange(2), torch.arange(3)),
    "complex": lambda x: torch.complex(x, x),
    "polar": lambda x: torch.polar(x, x),
    "vander": lambda x: torch.vander(x[0], 3),
    "of_shape": lambda x: torch.zeros(x.shape) + torch.ones(x.size(0), 1),
    "of_numpy_constant": lambda x: x * np.float64(2.0) + np.pi,
    "device_argument": lambda x: torch.zeros(2, device=x.device),
    "device_string": lambda x: torch.zeros(2, device="cpu", dtype=x.dtype),
    "memory_format": lambda x: torch.empty(1, 2, 3, 4, memory_format=torch.channels_last).zero_(),
    "pinned_nothing": lambda x: torch.zeros(2, pin_memory=False),
    "concatenated": lambda x: torch.cat([x, torch.zeros(1, 4)]),
    "stacked": lambda x: torch.stack([x[0], torch.arange(4.0)]),
    "block_diag": lambda x: torch.block_diag(x, torch.tensor([[1]])),
}
for name, make in MAKES.items():
    FAMILY.add(name, make, X)
for dtype in (
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.complex64,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.float8_e4m3fn,
):
    FAMILY.add(f"zeros_{dtype}".replace("torch.", ""), lambda dtype=dtype: torch.zeros(3, dtype=dtype), lambda i: ())
FAMILY.add("no_input", lambda: torch.arange(5), lambda i: ())
FAMILY.add("no_tensor", lambda n: torch.arange(n), lambda i: (4,))
FAMILY.add("write_to_fresh", lambda: torch.zeros(3).add_(1), lambda i: ())
FAMILY.add("write_to_literal", lambda: torch.tensor([1, 2, 3]).add_(1), lambda i: ())
FAMILY.add("empty_shape_only", lambda x: torch.empty(3, 4).shape == x.shape, X)


def promotion(x: Tensor) -> Any:
    """Everything whose dtype the default decides."""
    return (
        torch.zeros(2),
        torch.tensor(1.5),
        torch.arange(3) / 2,
        torch.full((2,), 0.5),
        torch.rand(2),
        x * 1.5,
    )


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


INTEGERS = tensors((3,), dtype=torch.int64)
FAMILY.add("default_dtype_double", promotion, INTEGERS, contexts=(lambda: default_dtype(torch.float64),))
FAMILY.add("default_dtype_half", promotion, INTEGERS, contexts=(lambda: default_dtype(torch.bfloat16),))


FAMILY.add(
    "default_dtype_changes",
    promotion,
    INTEGERS,
    calls=4,
    traces_at=(0, 1),
    contexts=(lambda: default_dtype(torch.float64), lambda: default_dtype(torch.float32)),
)
FAMILY.add("default_device_cpu", promotion, INTEGERS, contexts=(lambda: default_device("cpu"),))
FAMILY.add("default_device_meta", lambda: torch.zeros(2, 3), lambda i: (), contexts=(lambda: default_device("meta"),))
FAMILY.add(
    "default_device_changes",
    lambda: (torch.zeros(2, 3), torch.ones(3).t()),
    lambda i: (),
    calls=4,
    traces_at=(0, 1),
    contexts=(lambda: default_device("cpu"), lambda: default_device("meta")),
)
FAMILY.add("device_context_inside", lambda x: in_device_context(x), X)
FAMILY.add("meta_inside", lambda x: torch.zeros(2, device="meta").add_(1).shape[0] + x, X)
FAMILY.add("meta_input", lambda x: (x + 1, x.t()), lambda i: (draw(i, 3, 4).to("meta"),))


def in_device_context(x: Tensor) -> Tensor:
    with torch.device("cpu"):
        return torch.ones(4) + x
