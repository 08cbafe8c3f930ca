"""Operators that are left to PyTorch's kernels, which were measured to be faster than kernels made of their prims.

Factors are those of one thread: the time of prims over that of PyTorch's kernel, for images of 16 to 224 pixels and
reductions and scans of up to a million elements.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, fx

from primexec.executors.llvm.measured import widened
from primexec.executors.llvm.target import host

FEW_CHANNELS = 4
CHANNELS = 8  # in a block of PyTorch's
FEW_PAIRS = 16  # of channels, of which one makes the other
FEW_TERMS = 9
WIDE_BYTES = 64  # of vectors with which its kernels for depthwise channels-last images are faster
SMALL = 16  # images of fewer rows and columns
LARGE = 1 << 14
MANY_SCORES = 1 << 16  # of a head; PyTorch's kernel never has all of them in memory
MANY_WIDENED = 1 << 21  # in 16 bits without instructions for them, where its backward pass takes 3 to 5 times as long


def _always(node: fx.Node) -> bool:
    return True


def _of_few_channels(node: fx.Node) -> bool:
    """With more of them, places and weights that all channels share are computed once."""
    return bool(_first(node).shape[1] <= FEW_CHANNELS)


def _of_smaller_image(node: fx.Node) -> bool:
    """Whether the gradient of a result arrives that is smaller than what it was made of."""
    return bool(_first(node).numel() < node.meta["val"].numel())


def _of_more_than_means(node: fx.Node) -> bool:
    rank = 3 if "3d" in str(node.target) else 2
    return any(n != 1 for n in _first(node).shape[-rank:])


def _of_another_layout(node: fx.Node) -> bool:
    return not _first(node).is_contiguous()


def _of_few_rows(node: fx.Node) -> bool:
    """Too few to fill vectors, along which values and places are kept."""
    source = _first(node)
    length = source.shape[node.args[1]] if source.dim() else 1  # type: ignore[index]
    return bool(source.numel() < 4 * length)


def _of_an_input(node: fx.Node) -> bool:
    """Nothing is fused into it, and it is large enough for the kernel's time to count."""
    return node.args[0].op == "placeholder" and _first(node).numel() >= LARGE  # type: ignore[union-attr]


def _of_many_scores(node: fx.Node) -> bool:
    """Of attention, whose backward pass takes the gradient first."""
    backward = "backward" in str(node.target)
    operands: Any = node.args[1:3] if backward else node.args[:2]
    query, key = (n.meta["val"] for n in operands)
    most = MANY_WIDENED if backward and query.dtype in widened() else MANY_SCORES
    return bool(query.shape[-2] * key.shape[-2] >= most)


def _of_filled_blocks(node: fx.Node) -> bool:
    """Whether PyTorch computes full blocks of channels side by side. In a backward pass a gradient comes first."""
    backward = "backward" in str(node.target)
    operands: Any = node.args[backward:]
    image, weight, groups = operands[0].meta["val"], operands[1].meta["val"], operands[8]
    given, made, terms = weight.shape[1], weight.shape[0] // groups, weight[0].numel()
    if given * made > 1 or groups % CHANNELS or image.dim() != 4:
        return bool(given > 1 and given * made > FEW_PAIRS)
    is_small, many_terms, last = max(image.shape[2:]) <= SMALL, terms > FEW_TERMS, image.stride(1) == 1
    if backward:
        return last or not (is_small or many_terms)
    has_steps = max(operands[3]) > 1
    return (has_steps and not last) or (many_terms and (is_small or (last and host().vector_bytes >= WIDE_BYTES)))


def _is_known(node: fx.Node) -> bool:
    """Whether no size of an operand depends on values."""
    given = [n.meta.get("val") for n in node.all_input_nodes]
    return all(type(size) is int for t in given if isinstance(t, Tensor) for size in t.shape)


def _first(node: fx.Node) -> Tensor:
    argument: Any = node.args[0]
    value: Tensor = argument.meta["val"]
    return value


_WHOLE: dict[str, tuple[Callable[[fx.Node], bool], str]] = {
    "aten._adaptive_avg_pool2d_backward.default": (_of_more_than_means, "1.1 to 3.9"),
    "aten._adaptive_avg_pool3d_backward.default": (_of_more_than_means, "1.0 to 1.7"),
    "aten._scaled_dot_product_flash_attention_for_cpu.default": (_of_many_scores, "1.0 to 1.5"),
    "aten._scaled_dot_product_flash_attention_for_cpu_backward.default": (_of_many_scores, "1.2 to 3"),
    "aten._upsample_bicubic2d_aa.default": (_always, "1.1 to 2.5"),
    "aten._upsample_bicubic2d_aa_backward.default": (_of_smaller_image, "1.1 to 1.4"),
    "aten._upsample_bilinear2d_aa.default": (_always, "1.0 to 2.3"),
    "aten._upsample_bilinear2d_aa_backward.default": (_of_smaller_image, "1.5 to 1.7"),
    "aten.avg_pool2d_backward.default": (_of_another_layout, "1.1 to 4.7"),
    "aten.avg_pool3d_backward.default": (_of_another_layout, "1.1 to 4.7"),
    "aten.convolution.default": (_of_filled_blocks, "1.0 to 2.7"),
    "aten.convolution_backward.default": (_of_filled_blocks, "1.1 to 2.2"),
    "aten.cummax.default": (_of_few_rows, "2.0 to 5.1"),
    "aten.cummin.default": (_of_few_rows, "2.0 to 5.1"),
    "aten.prod.default": (_of_an_input, "1.2 to 1.5"),
    "aten.prod.dim_int": (_of_an_input, "1.1 to 1.5"),
    "aten.col2im.default": (_always, "0.9 to 1.7"),
    "aten.grid_sampler_2d.default": (_of_few_channels, "1.0 to 1.5"),
    "aten.grid_sampler_2d_backward.default": (_always, "3 to 14"),
    "aten.grid_sampler_3d_backward.default": (_always, "1.8 to 4.3"),
    "aten.reflection_pad2d_backward.default": (_always, "1.3 to 2.1"),
    "aten.reflection_pad3d_backward.default": (_always, "6 to 20"),
    "aten.upsample_linear1d_backward.default": (_always, "1.9 to 2.5"),
}


def why(node: fx.Node) -> str | None:
    """Why a node is left to them; None where it is not."""
    is_slower, factor = _WHOLE.get(str(node.target), (None, ""))
    if is_slower is None or not _is_known(node) or not is_slower(node):
        return None
    return f"its prims were measured to take {factor} times as long as PyTorch's kernel"
