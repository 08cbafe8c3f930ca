"""Functions that a fusing compiler is for: the table KERNELS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Maker = Callable[[], tuple[Any, ...]]


@dataclass(frozen=True)
class KernelCase:
    """A function, and how to make arguments; `limited` for those held to the time of copying their bytes."""

    title: str
    function: Callable[..., Any]
    inputs: Maker
    limited: bool = False


def normal(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> Maker:
    return lambda: tuple(torch.randn(shape).to(dtype) for shape in shapes)


def tiny(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    return torch.tanh(a * b + c)


def gelu(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.gelu(x * w + b) * torch.sigmoid(x) + 1


def transcendental(x: Tensor) -> Tensor:
    return torch.sin(torch.exp(torch.log1p(torch.tanh(x).abs())) * 0.5)


def softmax(x: Tensor) -> Tensor:
    return torch.softmax(x, -1)


def masked_softmax(x: Tensor, mask: Tensor) -> Tensor:
    return torch.softmax((x * 0.125).masked_fill(mask, -torch.inf), -1)


def layer_norm(x: Tensor, residual: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.layer_norm(x + residual, w.shape, w, b)


def rms_swiglu(x: Tensor, gate: Tensor, w: Tensor) -> Tensor:
    scale = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)
    return x * scale * w * F.silu(gate)


def cross_entropy(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x, target)


def column_sums(x: Tensor) -> Tensor:
    return x.sum(0)


def transpose(x: Tensor) -> Tensor:
    return (x.t() * 2).contiguous()


def transpose_add(x: Tensor, y: Tensor) -> Tensor:
    return y + x.t()


def stencil(x: Tensor) -> Tensor:
    return x[1:-1, 1:-1] * 0.5 + (x[:-2, 1:-1] + x[2:, 1:-1] + x[1:-1, :-2] + x[1:-1, 2:]) * 0.125


def every_other(x: Tensor) -> Tensor:
    return (x[:, ::2] + x[:, 1::2]) * 0.5


def rotary(q: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    low, high = q.chunk(2, -1)
    return q * cos + torch.cat((-high, low), -1) * sin


def half_chain(x: Tensor, y: Tensor) -> Tensor:
    return F.silu(x * y) * 2 + torch.tanh(y)


def batch_statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    var, mean = torch.var_mean(x, (0, 2, 3), correction=0)
    return mean, var


def batch_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.relu(F.batch_norm(x, None, None, w, b, training=True))


def group_norm(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.silu(F.group_norm(x, 8, w, b))


def mse(x: Tensor, y: Tensor) -> Tensor:
    return F.mse_loss(x, y)


def smooth_l1(x: Tensor, y: Tensor) -> Tensor:
    return F.smooth_l1_loss(x, y)


def kl_div(x: Tensor, y: Tensor) -> Tensor:
    return F.kl_div(torch.log_softmax(x, -1), torch.log_softmax(y, -1), reduction="batchmean", log_target=True)


def geglu(x: Tensor) -> Tensor:
    value, gate = x.chunk(2, -1)
    return value * F.gelu(gate)


def middle(x: Tensor) -> Tensor:
    return x.mean(1)


def whole(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.sum(), x.abs().amax()


def mask_of(rows: int) -> Tensor:
    return torch.ones(rows, rows, dtype=torch.bool).triu(1)


KERNELS = {
    "tiny": KernelCase("`tanh(a * b + c)`, 16 elements", tiny, normal((16,), (16,), (16,))),
    "gelu": KernelCase("gelu chain, 4096x4096", gelu, normal((4096, 4096), (4096,), (4096,)), limited=True),
    "transcendental": KernelCase(
        "tanh, log1p, exp and sin, 2048x2048", transcendental, normal((2048, 2048))
    ),
    "softmax": KernelCase("softmax, 4096x1024", softmax, normal((4096, 1024)), limited=True),
    "layer_norm": KernelCase(
        "layer_norm of x + residual, 4096x1024", layer_norm, normal((4096, 1024), (4096, 1024), (1024,), (1024,)), True
    ),
    "rms_swiglu": KernelCase(
        "rms_norm and swiglu, 4096x1024", rms_swiglu, normal((4096, 1024), (4096, 1024), (1024,)), True
    ),
    "cross_entropy": KernelCase(
        "cross-entropy, 1024x32000", cross_entropy, lambda: (torch.randn(1024, 32000), torch.randint(32000, (1024,))),
        True,
    ),
    "column_sums": KernelCase("column sums, 8192x1024", column_sums, normal((8192, 1024)), limited=True),
    "transpose": KernelCase("transpose, 4096x4096", transpose, normal((4096, 4096))),
    "transpose_add": KernelCase("`y + x.t()`, 2048x2048", transpose_add, normal((2048, 2048), (2048, 2048))),
    "stencil": KernelCase("five-point stencil, 2048x2048", stencil, normal((2048, 2048)), limited=True),
    "every_other": KernelCase("neighbours averaged, 4096x2048", every_other, normal((4096, 2048))),
    "rotary": KernelCase(
        "rotary embedding, 1x32x1024x128", rotary, normal((1, 32, 1024, 128), (1024, 128), (1024, 128)), True
    ),
    "bfloat16": KernelCase(
        "bfloat16 chain, 4096x2048", half_chain, normal((4096, 2048), (4096, 2048), dtype=torch.bfloat16), True
    ),
    "masked_softmax": KernelCase(
        "softmax under a causal mask, 16x512x512", masked_softmax, lambda: (torch.randn(16, 512, 512), mask_of(512)),
        True,
    ),
    "small_rows": KernelCase("softmax, 32768x64", softmax, normal((32768, 64)), limited=True),
    "odd_rows": KernelCase(
        "layer_norm of x + residual, 3x1111x769", layer_norm, normal((3, 1111, 769), (3, 1111, 769), (769,), (769,)),
        True,
    ),
    "batch_statistics": KernelCase("mean and variance of channels, 32x64x56x56", batch_statistics,
                                   normal((32, 64, 56, 56)), True),
    "batch_norm": KernelCase("batch_norm in training and relu, 32x64x56x56", batch_norm,
                             normal((32, 64, 56, 56), (64,), (64,))),
    "group_norm": KernelCase("group_norm and silu, 16x64x56x56", group_norm, normal((16, 64, 56, 56), (64,), (64,))),
    "mse": KernelCase("mse_loss, 4096x1024", mse, normal((4096, 1024), (4096, 1024)), limited=True),
    "smooth_l1": KernelCase("smooth_l1_loss, 4096x1024", smooth_l1, normal((4096, 1024), (4096, 1024)), True),
    "kl_div": KernelCase("kl_div of two log_softmax, 1024x4096", kl_div, normal((1024, 4096), (1024, 4096))),
    "geglu": KernelCase("geglu, 4096x2048", geglu, normal((4096, 2048)), limited=True),
    "middle": KernelCase("mean over the middle of 64x512x128", middle, normal((64, 512, 128)), limited=True),
    "whole": KernelCase("sum and largest magnitude of 4096x4096", whole, normal((4096, 4096)), limited=True),
}  # fmt: skip
