"""Chains of convolutions in channels-last memory: what shows is eager's, and the choice is explained."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves

from primexec import make_traced

ON_LLVM: dict[str, Any] = {"executor": ("llvm", "aten")}


def depthwise(channels: int, out: int | None = None, kernel: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(channels, out or channels, kernel, padding=kernel // 2, groups=channels, **options)


class Block(nn.Module):
    """Two pairs of depthwise convolutions of 6 channels, and what a test puts between them and behind."""

    def __init__(self, between: Callable[[Tensor], Tensor], end: Callable[[Tensor], Any], middle: nn.Module) -> None:
        super().__init__()
        self.first, self.last = (nn.Sequential(depthwise(6), nn.ReLU(), depthwise(6)) for _ in range(2))
        self.norm, self.middle = nn.BatchNorm2d(6), middle
        self.between, self.end = between, end
        with torch.no_grad():
            self.norm.running_mean.copy_(torch.randn(6))
            self.norm.running_var.copy_(torch.rand(6) + 0.5)

    def forward(self, x: Tensor) -> Any:
        return self.end(self.last(self.middle(self.between(self.norm(self.first(x))))))


def same(x: Tensor) -> Tensor:
    return x


def with_views(x: Tensor) -> Any:
    return x, x[:, 1:], x.permute(0, 2, 3, 1), x.permute(0, 2, 3, 1).flatten(1, 2), x.transpose(1, 2)[0]


def added_in_place(x: Tensor) -> Tensor:
    x.add_(1)
    return x.relu_()


BETWEEN: dict[str, Callable[[Tensor], Tensor]] = {
    "relu6": F.relu6,
    "in place": added_in_place,
    "hardswish": F.hardswish,
    "max_pool": lambda x: F.max_pool2d(x, 3, 2, 1),
    "places": lambda x: x + F.max_pool2d(x, 3, 1, 1, return_indices=True)[1],
    "avg_pool": lambda x: F.avg_pool2d(x, 2),
    "adaptive": lambda x: F.adaptive_avg_pool2d(x, (3, 5)),
    "squeeze": lambda x: x * x.mean((2, 3), keepdim=True).sigmoid(),
    "mean": lambda x: x * x.mean((2, 3))[:, :, None, None],
    "pad": lambda x: F.pad(x, (1, 2, 0, 1)),
    "crop": lambda x: F.pad(x, (-1, 1, 0, -1)),
    "cat": lambda x: torch.cat([x[:, :2], x[:, 2:] * 2], 1),
    "whole cat": lambda x: torch.cat([x, x * 2], 1)[:, 3:9],
    "nearest": lambda x: F.interpolate(x, scale_factor=2.0),
    "bilinear": lambda x: F.interpolate(x, size=(9, 4), mode="bilinear", align_corners=False),
    "layer_norm": lambda x: F.layer_norm(x.permute(0, 2, 3, 1), (6,)).permute(0, 3, 1, 2),
    "linear": lambda x: F.linear(x.permute(0, 2, 3, 1), torch.eye(6)).permute(0, 3, 1, 2),
    "shuffle": lambda x: x.view(len(x), 2, 3, *x.shape[2:]).transpose(1, 2).flatten(1, 2),
    "softmax": lambda x: x.softmax(1),
    "cumsum": lambda x: x.cumsum(2),
    "group_norm": lambda x: F.group_norm(x, 2),
    "kept": lambda x: x.where(x > 0, x.flip(3)),
    "norm": lambda x: x / x.norm(dim=1, keepdim=True),
    "pointwise of places": lambda x: x + torch.arange(x.shape[3]),
    "batch": lambda x: x - x.mean(0, keepdim=True),
}
MIDDLE: dict[str, Callable[[], nn.Module]] = {
    "one point": lambda: nn.Conv2d(6, 6, 1),
    "grouped": lambda: nn.Conv2d(6, 6, 3, padding=1, groups=2),
    "dilated": lambda: nn.Conv2d(6, 6, 3, padding=2, dilation=2),
    "strided": lambda: depthwise(6, stride=2, bias=False),
    "transposed": lambda: nn.ConvTranspose2d(6, 6, 3, stride=2),
    "wide": lambda: nn.Sequential(depthwise(6, 12), nn.Conv2d(12, 6, 1)),
    "one channel": lambda: nn.Sequential(nn.Conv2d(6, 1, 1), nn.Conv2d(1, 6, 1)),
}
END: dict[str, Callable[[Tensor], Any]] = {
    "views": with_views,
    "pooled": lambda x: F.adaptive_avg_pool2d(x, 1),
    "flat": lambda x: torch.flatten(F.adaptive_avg_pool2d(x, 1), 1),
    "max": lambda x: F.adaptive_max_pool2d(x, 1),
    "list": lambda x: list(x.unbind(1)),
    "split": lambda x: x.split(2, 1),
    "dropout": lambda x: F.dropout(x, 0.5, False),
}
NETS = {
    **{f"between: {k}": (f, same, nn.Identity) for k, f in BETWEEN.items()},
    **{f"middle: {k}": (F.relu, same, m) for k, m in MIDDLE.items()},
    **{f"end: {k}": (F.relu, e, nn.Identity) for k, e in END.items()},
}


def tensors(tree: Any) -> list[Tensor]:
    return [t for t in tree_leaves(tree) if isinstance(t, Tensor)]


def layouts(results: list[Tensor]) -> list[Any]:
    """What can be seen of tensors beside their values: aliases by their first occurrence."""
    storages = [t.untyped_storage().data_ptr() for t in results]
    return [
        (t.dtype, t.shape, t.stride(), t.storage_offset(), storages.index(s), t._is_view())
        for t, s in zip(results, storages, strict=True)
    ]


def check(model: nn.Module, x: Tensor, **options: Any) -> Any:
    """Eager's layouts, and values as near to float64 as eager's; the notes of `explain`."""
    with torch.no_grad():
        traced = make_traced(model, **(options or ON_LLVM))
        before, version = x.clone(), x._version
        exact = tensors(copy.deepcopy(model).double()(x.double()))
        for _ in range(2):
            got, expected = tensors(traced(x)), tensors(model(x))
            assert layouts(got) == layouts(expected)
            for a, b, c in zip(got, expected, exact, strict=True):
                allowed = 2 * float((b.double() - c).abs().max()) + 8 * 2**-24 * max(1.0, float(c.abs().max()))
                assert float((a.double() - c).abs().max()) <= allowed
        assert (x.equal(before), x._version) == (True, version)
        assert traced.cache_info()[:3] == (1, 1, 1)
        return traced.explain(x).plan.program.notes


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("between", "end", "middle"), NETS.values(), ids=NETS)
def test_values_and_layouts(between: Any, end: Any, middle: Any, batch: int) -> None:
    torch.manual_seed(0)
    if between is BETWEEN["linear"]:
        eye = torch.randn(6, 6)

        def between(x: Tensor) -> Tensor:  # float32 and float64
            return F.linear(x.permute(0, 2, 3, 1), eye.to(x.dtype)).permute(0, 3, 1, 2)

    notes = check(Block(between, end, middle()).eval(), torch.randn(batch, 6, 11, 13))
    assert notes[0].startswith("channels-last: ")


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("batch", [1, 2])
def test_convolutions_of_one_point_are_products(batch: int, bias: bool) -> None:
    torch.manual_seed(0)
    ones = nn.Sequential(nn.Conv2d(6, 9, 1, bias=bias), nn.ReLU(), nn.Conv2d(9, 6, 1, bias=bias))
    notes = check(Block(same, with_views, ones).eval(), torch.randn(batch, 6, 11, 13))
    assert notes[-1] == "channels-last: matrix products in place of 2 convolutions"
    for other in (nn.Conv2d(6, 6, 1, stride=2), nn.Conv2d(6, 6, 1, padding=1), nn.Conv2d(6, 6, 1, groups=2)):
        notes = check(Block(same, with_views, other).eval(), torch.randn(batch, 6, 11, 13))
        assert not any("products" in n for n in notes)


def test_products_of_weights_that_are_no_numbers() -> None:
    torch.manual_seed(0)
    model = Block(same, same, nn.Conv2d(6, 6, 1)).eval()
    weight: Any = model.middle.weight
    with torch.no_grad():
        weight[1, 2], weight[3, 4] = torch.inf, torch.nan
        x = torch.randn(1, 6, 11, 13)
        torch.testing.assert_close(make_traced(model, **ON_LLVM)(x), model(x), equal_nan=True)


@pytest.mark.parametrize("shape", [(1, 6, 1, 1), (2, 6, 1, 7), (1, 6, 5, 1), (3, 6, 2, 2), (0, 6, 4, 4)])
def test_small_images(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    model = Block(F.relu, lambda x: (x, x + 1), nn.Conv2d(6, 6, 1)).eval()
    if shape[0]:
        check(model, torch.randn(shape))
    else:
        with torch.no_grad():
            got, expected = make_traced(model, **ON_LLVM)(torch.randn(shape)), model(torch.randn(shape))
        assert layouts(list(got)) == layouts(list(expected))


@pytest.mark.parametrize("change", ["input", "model", "slice", "expanded"])
def test_inputs_in_other_layouts(change: str) -> None:
    torch.manual_seed(0)
    model = Block(F.relu6, with_views, nn.Conv2d(6, 6, 1)).eval()
    x = torch.randn(2, 6, 9, 10)
    if change == "input":
        x = x.to(memory_format=torch.channels_last)
    elif change == "model":
        model = model.to(memory_format=torch.channels_last)
    elif change == "slice":
        x = torch.randn(2, 6, 9, 20)[..., ::2]
    else:
        x = x[:1].expand(2, 6, 9, 10)
    check(model, x)


def test_what_is_explained() -> None:
    model = nn.Sequential(depthwise(8), nn.BatchNorm2d(8), nn.ReLU6(), nn.Conv2d(8, 16, 1), depthwise(16)).eval()
    x = torch.randn(1, 8, 20, 20)
    # The first and the last reorder 12,800 and 25,600 bytes twice; these are what is copied at the borders, too.
    saved, copied = 2 * 12800 + 2 * 25600, 12800 + 25600
    assert check(model, x) == (
        f"channels-last: 3 convolutions, {saved:,} bytes of reorders saved, "
        f"{copied:,} bytes copied at borders and of weights",
        "channels-last: matrix products in place of 1 convolution",
    )
    with torch.no_grad():
        shown = str(make_traced(model, **ON_LLVM).explain(x))
    assert "  channels-last: 3 convolutions, 76,800 bytes of reorders saved" in shown


DENSE = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
PARTED = nn.Sequential(depthwise(8), nn.Softmax(1), depthwise(8))
LEFT: list[tuple[nn.Module, str]] = [
    (depthwise(8), "1 convolution, 25,600 bytes of reorders saved, 25,600"),
    (DENSE, "2 convolutions, 0 bytes of reorders saved, 25,600"),  # 12,800 + 8,192 + 2 * 2,304
    (PARTED, "2 convolutions, 51,200 bytes of reorders saved, 51,200"),
]


@pytest.mark.parametrize(("model", "said"), LEFT)
def test_what_is_left_as_it_is(model: nn.Module, said: str) -> None:
    (note,) = check(model.eval(), torch.randn(1, 8, 20, 20))
    assert note == f"channels-last would not gain: {said} bytes copied at borders and of weights"


def test_a_weight_larger_than_its_images_stays() -> None:
    model = nn.Sequential(depthwise(64), depthwise(64), nn.Conv2d(64, 64, 3), depthwise(64), depthwise(64)).eval()
    notes = check(model, torch.randn(1, 64, 6, 6))
    assert [note.partition(" bytes")[0] for note in notes] == [
        "channels-last: 2 convolutions, 36,864",
        "channels-last: 2 convolutions, 16,384",
    ]


def test_other_executors_and_training_are_as_they_were() -> None:
    model = Block(F.relu6, same, nn.Conv2d(6, 6, 1)).eval()
    x = torch.randn(1, 6, 9, 9)
    assert make_traced(model, **ON_LLVM).explain(x).plan.program.notes == ()
    with torch.no_grad():
        assert make_traced(model, executor="aten").explain(x).plan.program.notes == ()
        assert torch.equal(make_traced(model, executor="aten")(x), model(x))
        assert make_traced(model.double(), **ON_LLVM).explain(x.double()).plan.program.notes == ()


def test_memory_that_is_written_to_stays() -> None:
    model = Block(F.relu6, same, nn.Conv2d(6, 6, 1)).eval()

    def changed(x: Tensor) -> tuple[Tensor, Tensor]:
        first = model(x)
        x.mul_(2)
        return first, model(x)

    with torch.no_grad():
        x = torch.randn(1, 6, 9, 9)
        mine, others = x.clone(), x.clone()
        got, expected = make_traced(changed, **ON_LLVM)(mine), changed(others)
        assert mine.equal(others)
        assert layouts(list(got)) == layouts(list(expected))
        for a, b in zip(got, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
