"""Frozen weights: values near eager's, strides eager's, and a changed weight is noticed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from primexec import ExecutorError, make_traced
from tests.test_channels_last import check, depthwise

FROZEN: dict[str, Any] = {"executor": ("llvm", "aten"), "executor_parameters": {"freeze": True}}


def randomised(model: nn.Module) -> nn.Module:
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean = torch.randn(m.num_features)
            m.running_var = torch.rand(m.num_features) + 0.5
            if m.affine:
                nn.init.normal_(m.weight)
                nn.init.normal_(m.bias)
    return model.eval()


def net() -> nn.Module:
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU6(), depthwise(8), nn.BatchNorm2d(8)]
    return randomised(nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(8, 6, 1), nn.BatchNorm2d(6)))


NETS: dict[str, Callable[[], nn.Module]] = {
    "chain": net,
    "no affine": lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Conv2d(4, 4, 3)),
    "grouped": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3, groups=2, dilation=2), nn.BatchNorm2d(6)),
    "transposed": lambda: nn.Sequential(nn.Conv2d(3, 6, 3), nn.ConvTranspose2d(6, 6, 3), nn.BatchNorm2d(6)),
    "one channel": lambda: nn.Sequential(nn.Conv2d(3, 1, 3), nn.BatchNorm2d(1), nn.Conv2d(1, 4, 3), nn.ReLU()),
    "one dimension": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 4, 3), nn.BatchNorm1d(4)),
    "norm alone": lambda: nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4)),
    "pooled": lambda: nn.Sequential(net(), nn.MaxPool2d(3, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("make", NETS.values(), ids=NETS)
def test_values_and_layouts(make: Callable[[], nn.Module], batch: int) -> None:
    torch.manual_seed(0)
    check(randomised(make()), torch.randn(batch, 3, 13, 17), **FROZEN)


def test_what_is_explained() -> None:
    notes = check(net(), torch.randn(1, 3, 32, 32), **FROZEN)
    folded, laid, products, packed = notes
    assert folded == "freeze: 3 batch norms folded into convolutions"
    assert laid.startswith("channels-last: 3 convolutions")
    assert products == "channels-last: matrix products in place of 1 convolution"
    assert packed == "freeze: 1 weight packed for oneDNN"


class Twice(nn.Module):
    """The convolution's result is needed beside its norm."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x: Tensor) -> Tensor:
        y = self.convolution(x)
        return self.norm(y) + y


def test_a_result_that_is_needed_is_not_folded() -> None:
    notes = check(randomised(Twice()), torch.randn(1, 3, 9, 9), **FROZEN)
    assert not any("folded" in note for note in notes)


def scale_in_place(model: Any) -> None:
    model[0].weight.mul_(2)


def other_weight(model: Any) -> None:
    model[0].weight = nn.Parameter(torch.randn(8, 3, 3, 3))


def other_statistics(model: Any) -> None:
    model[1].running_mean.add_(1)


def other_buffer(model: Any) -> None:
    model[4].running_var = torch.ones(8)


def loaded(model: Any) -> None:
    model.load_state_dict({k: v * 1.5 if v.is_floating_point() else v for k, v in model.state_dict().items()})


@pytest.mark.parametrize("change", [scale_in_place, other_weight, other_statistics, other_buffer, loaded])
@torch.no_grad()
def test_changed_weights_are_noticed(change: Callable[[Any], None]) -> None:
    model, x = net(), torch.randn(1, 3, 16, 16)
    traced = make_traced(model, **FROZEN)
    before = traced(x)
    torch.testing.assert_close(before, model(x), rtol=1e-4, atol=1e-4)
    change(model)
    after = traced(x)
    assert traced.cache_info().traces == 2
    torch.testing.assert_close(after, model(x), rtol=1e-4, atol=1e-4)
    assert not torch.equal(before, after)
    traced(x)
    assert traced.cache_info().traces == 2


@torch.no_grad()
def test_weights_that_are_not_frozen_may_change() -> None:
    model, x = net(), torch.randn(1, 3, 16, 16)
    traced = make_traced(model, executor=("llvm", "aten"))
    traced(x)
    scale_in_place(model)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-4)
    assert traced.cache_info().traces == 1


@torch.no_grad()
def test_nan_and_infinity_pass_through() -> None:
    model, x = net(), torch.randn(2, 3, 16, 16)
    x[0, 0, 3, 3], x[1, 1, 5, 5] = float("nan"), float("inf")
    got, expected = make_traced(model, **FROZEN)(x), model(x)
    assert torch.equal(got.isnan(), expected.isnan())


@torch.no_grad()
def test_a_norm_that_is_not_finite_stays() -> None:
    model, x = net(), torch.randn(1, 3, 16, 16)
    model[1].running_mean.fill_(float("inf"))  # type: ignore[index,operator,union-attr]
    traced = make_traced(model, **FROZEN)
    torch.testing.assert_close(traced(x), model(x), rtol=1e-4, atol=1e-4)
    assert traced.explain(x).plan.program.notes[0] == "freeze: 2 batch norms folded into convolutions"


def test_training_is_refused() -> None:
    with pytest.raises(ExecutorError, match=r"freeze: results of Sequential require grad; call it under torch.no_grad"):
        make_traced(net(), **FROZEN)(torch.randn(1, 3, 16, 16))


def test_executors_that_know_no_freezing() -> None:
    with pytest.raises(ValueError, match="unexpected executor parameters: freeze"):
        make_traced(F.relu, executor="aten", executor_parameters={"freeze": True})
    with pytest.raises(Exception, match="freeze is a parameter of make_traced"):
        torch.compile(net(), backend="primexec", options=FROZEN)(torch.randn(1, 3, 16, 16))
