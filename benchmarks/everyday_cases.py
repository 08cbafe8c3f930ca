"""Functions as people write them: the table EVERYDAY."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Everyday:
    """A function, what makes its arguments, and whether it is differentiated, too."""

    function: Callable[..., Any]
    makers: tuple[Callable[[], Tensor], ...]
    trains: bool

    def inputs(self) -> tuple[Tensor, ...]:
        return tuple(make() for make in self.makers)


EVERYDAY: dict[str, Everyday] = {}


def everyday(*makers: Callable[[], Tensor], trains: bool = True) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def add(function: Callable[..., Any]) -> Callable[..., Any]:
        EVERYDAY[function.__name__] = Everyday(function, makers, trains)
        return function

    return add


def normal(*shape: int, dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape).to(dtype)


def uniform(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.rand(shape)


def whole(low: int, high: int, *shape: int, dtype: torch.dtype = torch.int64) -> Callable[[], Tensor]:
    return lambda: torch.randint(low, high, shape).to(dtype)


# Normalisation, losses, activations ------------------------------------------------------------------------


@everyday(normal(4096, 512))
def standardised_columns(x: Tensor) -> Tensor:
    x = x - x.mean(0)
    return x / (x.std(0) + 1e-5)


@everyday(normal(8192, 384), normal(8192, 384))
def cosine_similarity(a: Tensor, b: Tensor) -> Tensor:
    return F.cosine_similarity(a, b, dim=-1)


@everyday(normal(16, 64, 56, 56))
def instance_norm(x: Tensor) -> Tensor:
    return F.instance_norm(x)


@everyday(normal(2048, 1024, dtype=torch.bfloat16), normal(2048, 1024, dtype=torch.bfloat16))
def residual_rms_norm_bfloat16(x: Tensor, residual: Tensor) -> Tensor:
    x = x + residual
    return (x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


@everyday(normal(2048, 1000), whole(0, 1000, 2048))
def smoothed_cross_entropy(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x, target, label_smoothing=0.1)


@everyday(normal(16384, 256), uniform(16384, 256))
def focal_loss(x: Tensor, target: Tensor) -> Tensor:
    p, loss = torch.sigmoid(x), F.binary_cross_entropy_with_logits(x, target, reduction="none")
    return ((1 - (p * target + (1 - p) * (1 - target))) ** 2 * loss).mean()


@everyday(normal(512, 128), normal(512, 128))
def contrastive_loss(a: Tensor, b: Tensor) -> Tensor:
    logits = F.normalize(a, dim=-1) @ F.normalize(b, dim=-1).T / 0.07
    target = torch.arange(512)
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@everyday(normal(1024, 512), normal(1024, 512), normal(1024, 512))
def triplet_loss(a: Tensor, p: Tensor, n: Tensor) -> Tensor:
    return F.triplet_margin_loss(a, p, n)


@everyday(normal(2048, 1024))
def activations(x: Tensor) -> Tensor:
    return F.mish(x) + F.selu(x) * F.hardswish(x) - F.softsign(x) + F.logsigmoid(x)


@everyday(normal(2048, 2048, dtype=torch.bfloat16), normal(2048, 2048, dtype=torch.bfloat16))
def swiglu_bfloat16(a: Tensor, b: Tensor) -> Tensor:
    return F.silu(a) * b


@everyday(normal(4096, 256), uniform(4096, 256))
def gumbel_softmax(x: Tensor, noise: Tensor) -> Tensor:
    return torch.softmax((x - torch.log(-torch.log(noise + 1e-9) + 1e-9)) / 0.5, -1)


@everyday(normal(8, 21, 128, 128), whole(0, 21, 8, 128, 128))
def segmentation_loss(x: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(x, target)


# Attention and sequences -----------------------------------------------------------------------------------


@everyday(normal(8, 8, 256, 256), normal(8, 256, 256))
def biased_causal_scores(scores: Tensor, bias: Tensor) -> Tensor:
    mask = torch.ones(256, 256, dtype=torch.bool).triu(1)
    return torch.softmax(scores * 0.125 + bias.masked_fill(mask, -1e9), -1)


@everyday(normal(4, 16, 512, 64), normal(512, 32), normal(512, 32))
def interleaved_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2)


@everyday(whole(0, 30000, 16, 512), normal(30000, 256), normal(512, 256))
def embeddings(tokens: Tensor, weight: Tensor, positions: Tensor) -> Tensor:
    return F.layer_norm(F.embedding(tokens, weight) + positions, (256,))


@everyday(normal(256, 1536), normal(256, 1536), normal(256, 512))
def gates(given: Tensor, hidden: Tensor, h: Tensor) -> Tensor:
    (ir, iz, i), (hr, hz, hn) = given.chunk(3, 1), hidden.chunk(3, 1)
    z, n = torch.sigmoid(iz + hz), torch.tanh(i + torch.sigmoid(ir + hr) * hn)
    return n + z * (h - n)


@everyday(normal(2048, 1024))
def running_sum_of_powers(x: Tensor) -> Tensor:
    return torch.cumsum(torch.exp(x - x.amax(-1, keepdim=True)), -1)


@everyday(normal(16, 1024, 128), normal(4, 128))
def causal_taps(x: Tensor, w: Tensor) -> Tensor:
    padded = F.pad(x, (0, 0, 3, 0))
    return sum((padded[:, i : i + 1024] * w[i] for i in range(4)), torch.zeros(()))


@everyday(normal(64, 32000), trains=False)
def best_of_top_k(x: Tensor) -> Tensor:
    return torch.softmax(x.masked_fill(x < x.topk(50).values[:, -1:], -1e9) / 0.8, -1)


@everyday(normal(64, 8192))
def moving_average(x: Tensor) -> Tensor:
    return x.unfold(-1, 16, 1).mean(-1)


# Images ----------------------------------------------------------------------------------------------------


@everyday(whole(0, 256, 8, 512, 512, 3, dtype=torch.uint8), trains=False)
def image_to_floats(x: Tensor) -> Tensor:
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return ((x.float() / 255 - mean) / std).permute(0, 3, 1, 2).contiguous()


@everyday(normal(4, 32, 64, 64))
def bilinear_twice(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="bilinear") + 1


@everyday(normal(8, 64, 112, 112))
def mean_pool(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2) * 2


@everyday(normal(8, 64, 112, 112))
def maximum_pool(x: Tensor) -> Tensor:
    return F.max_pool2d(x.relu(), 2)


@everyday(normal(8, 64, 64, 64))
def pixel_shuffle(x: Tensor) -> Tensor:
    return F.pixel_shuffle(x, 2) * 0.5


@everyday(normal(8, 56, 56, 96))
def shifted_windows(x: Tensor) -> Tensor:
    x = torch.roll(x, (-3, -3), (1, 2))
    return x.view(8, 8, 7, 8, 7, 96).permute(0, 1, 3, 2, 4, 5).reshape(-1, 49, 96)


@everyday(normal(16, 8, 64, 64), lambda: torch.rand(16, 64, 64, 2) * 2 - 1)
def sampled_grid(x: Tensor, grid: Tensor) -> Tensor:
    return F.grid_sample(x, grid, align_corners=False)


@everyday(uniform(4, 3, 128, 128), uniform(4, 3, 128, 128))
def structural_similarity(a: Tensor, b: Tensor) -> Tensor:
    def mean(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, 1)

    ma, mb = mean(a), mean(b)
    va, vb, both = mean(a * a) - ma * ma, mean(b * b) - mb * mb, mean(a * b) - ma * mb
    return (((2 * ma * mb + 1e-4) * (2 * both + 9e-4)) / ((ma * ma + mb * mb + 1e-4) * (va + vb + 9e-4))).mean()


@everyday(uniform(8, 3, 128, 128))
def hue_saturation_value(x: Tensor) -> Tensor:
    r, g, b = x.unbind(1)
    high, low = x.amax(1), x.amin(1)
    d = high - low + 1e-8
    hue = torch.where(high == r, (g - b) / d, torch.where(high == g, 2 + (b - r) / d, 4 + (r - g) / d)) / 6
    return torch.stack((hue % 1, d / (high + 1e-8), high), 1)


@everyday(normal(64, 3, 96, 96))
def reflected_borders(x: Tensor) -> Tensor:
    return F.pad(x, (4, 4, 4, 4), mode="reflect") * 2 - 1


@everyday(uniform(4096, 4), uniform(128, 4))
def box_overlaps(a: Tensor, b: Tensor) -> Tensor:
    low, high = torch.max(a[:, None, :2], b[None, :, :2]), torch.min(a[:, None, 2:], b[None, :, 2:])
    shared = (high - low).clamp(min=0).prod(-1)
    areas = ((t[:, 2] - t[:, 0]) * (t[:, 3] - t[:, 1]) for t in (a, b))
    return shared / (next(areas)[:, None] + next(areas)[None] - shared + 1e-6)


# Points, graphs, physics -----------------------------------------------------------------------------------


@everyday(normal(512, 64), normal(512, 64))
def squared_distances(a: Tensor, b: Tensor) -> Tensor:
    return ((a[:, None, :] - b[None, :, :]) ** 2).sum(-1)


@everyday(normal(1000, 3), normal(800, 3))
def nearest_distance(a: Tensor, b: Tensor) -> Tensor:
    return torch.cdist(a, b).min(1).values


@everyday(normal(2048), normal(2048))
def gaussian_kernel(a: Tensor, b: Tensor) -> Tensor:
    return torch.exp(-((a[:, None] - b[None, :]) ** 2) / 2)


@everyday(normal(8192, 64), whole(0, 2000, 30000), whole(0, 8192, 30000))
def messages(x: Tensor, to: Tensor, source: Tensor) -> Tensor:
    return x.new_zeros(2000, 64).index_add(0, to, x[source]) / 64


@everyday(normal(512, 3), uniform(512))
def gravity(positions: Tensor, mass: Tensor) -> Tensor:
    d = positions[None] - positions[:, None]
    r = (d * d).sum(-1) + 0.01
    return (d * (mass[None, :] / (r * r.sqrt()))[..., None]).sum(1)


@everyday(normal(300000))
def runge_kutta(x: Tensor) -> Tensor:
    def slope(v: Tensor) -> Tensor:
        return torch.sin(v) - 0.1 * v

    a = slope(x)
    b = slope(x + 0.005 * a)
    c = slope(x + 0.005 * b)
    return x + 0.01 / 6 * (a + 2 * b + 2 * c + slope(x + 0.01 * c))


@everyday(normal(512, 512))
def diffusion(x: Tensor) -> Tensor:
    for _ in range(4):
        p = F.pad(x[None, None], (1, 1, 1, 1), mode="replicate")[0, 0]
        x = (p[:-2, 1:-1] + p[2:, 1:-1] + p[1:-1, :-2] + p[1:-1, 2:]) / 4
    return x


# Integers and quantisation ---------------------------------------------------------------------------------


@everyday(whole(0, 2**31, 1 << 21), trains=False)
def shifted_bits(x: Tensor) -> Tensor:
    x = x ^ (x << 13)
    x = x ^ (x >> 7)
    return x ^ (x << 17)


@everyday(normal(4096, 1024), trains=False)
def quantised_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.abs().amax(-1, keepdim=True) / 127
    return (x / scale).round().clamp(-128, 127).to(torch.int8), scale


@everyday(normal(8192, 100), whole(0, 100, 8192), trains=False)
def accuracy(x: Tensor, target: Tensor) -> Tensor:
    return (x.argmax(-1) == target).float().mean()


# Layers ----------------------------------------------------------------------------------------------------


@everyday(normal(32, 256), normal(1024, 256), normal(1024), normal(256, 1024), normal(256))
def feed_forward(x: Tensor, w: Tensor, b: Tensor, v: Tensor, c: Tensor) -> Tensor:
    return F.linear(F.gelu(F.linear(x, w, b)), v, c) + x


@everyday(normal(32, 196, 192), normal(576, 192), normal(576), normal(192, 192))
def self_attention(x: Tensor, w: Tensor, b: Tensor, v: Tensor) -> Tensor:
    q, k, values = F.linear(x, w, b).view(32, 196, 3, 3, 64).permute(2, 0, 3, 1, 4)
    return F.linear(F.scaled_dot_product_attention(q, k, values).transpose(1, 2).reshape(x.shape), v)


@everyday(normal(8, 64, 56, 56), normal(64, 1, 3, 3))
def depthwise_convolution(x: Tensor, w: Tensor) -> Tensor:
    return F.conv2d(x, w, padding=1, groups=64).relu()


@everyday(normal(64, 64, 64), normal(64, 64, 64))
def batched_product(a: Tensor, b: Tensor) -> Tensor:
    return torch.bmm(a, b).relu() + a


@everyday(uniform(8, 3, 256, 256))
def edges(x: Tensor) -> Tensor:
    across = x.new_tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])
    gray = x.mean(1, keepdim=True)
    x, y = (F.conv2d(gray, w[None, None], padding=1) for w in (across, across.t()))
    return (x * x + y * y + 1e-6).sqrt()


@everyday(normal(32, 1, 16000), normal(1, 1, 31))
def filtered_signal(x: Tensor, taps: Tensor) -> Tensor:
    return F.conv1d(x, taps, padding=15)


@everyday(normal(4, 768, 512), normal(768, 1, 4), normal(768))
def causal_convolution(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    return F.silu(F.conv1d(x, w, b, padding=3, groups=768)[..., :512])
