"""primexec.compare on training programs: backward is compared too, and parameters reach the executors."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import primexec
from primexec.executors import Region
from tests.faulty import Honest, one_by_one
from tests.toy import install

aten = torch.ops.aten


class WrongTanhBackward(Honest):
    """1 - |y| · y for 1 - y²: right where y is not negative."""

    name = "tanh_backward"

    def call(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if op is not aten.tanh_backward.default:
            return op(*args, **kwargs)
        gradient, y = args
        return gradient * (1 - y.abs() * y)


class MeanForSum(Honest):
    """The gradient of what was broadcast is the mean, not the sum, of its parts; forward sums are right."""

    name = "mean_for_sum"

    def call(self, op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        out = op(*args, **kwargs)
        return out / args[0].shape[0] if op is aten.sum.dim_IntList and list(args[1]) == [0] else out


def network(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
    for _ in range(12):
        x = (x @ w + b).tanh()
    return x.square().mean(1)


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = [torch.randn(shape, generator=generator) for shape in ((5, 8), (8, 8), (8,))]
    made[1] = made[1] * 0.4
    return made[0], made[1].requires_grad_(), made[2].requires_grad_()


FAULTS: dict[str, tuple[type[Honest], str]] = {
    "tanh backward": (WrongTanhBackward, "aten.tanh_backward"),
    "sum of the broadcast": (MeanForSum, "aten.sum.dim_IntList"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_of_backward_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    kind, op = FAULTS[name]
    install(monkeypatch, alone=one_by_one(kind), fused=kind, honest=Honest)
    comparison = primexec.compare(network, *inputs(), executors=["aten", "alone", "fused", "honest"])
    assert comparison.first["aten"] is comparison.first["honest"] is None
    wrong = [row.node for row in comparison.rows if row.part == "backward" and row.op == op]
    for executor in ("alone", "fused"):
        found = comparison.first[executor]
        assert found is not None
        assert (found.part, found.op, found.node) == ("backward", op, wrong[0])


@pytest.mark.parametrize("executor", ["aten", "numpy"])
def test_training_programs_agree(executor: str) -> None:
    comparison = primexec.compare(network, *inputs(), executors=[executor])
    assert comparison.first == {executor: None}
    assert {row.part for row in comparison.rows} == {"forward", "backward"}


def test_gradients_are_measured_against_float64() -> None:
    """The errors of the last backward operators are those of eager's own gradients, for the same cotangents."""
    x = inputs()[0].requires_grad_()
    comparison = primexec.compare(lambda x: (x.sin() * 3).exp(), x, executors=["aten"])
    assert (comparison.rows[-1].part, comparison.rows[-1].op) == ("backward", "aten.mul.Tensor")
    drawn = torch.randn(x.shape, generator=torch.Generator().manual_seed(0))
    got = torch.autograd.grad((x.sin() * 3).exp(), x, drawn)[0]
    wide = x.detach().double().requires_grad_()
    exact = torch.autograd.grad((wide.sin() * 3).exp(), wide, drawn.double())[0]
    measured = comparison.rows[-1].errors["aten"].accumulated.absolute
    # What backward takes from the forward run is in float32 on both sides.
    assert 0 < measured <= 4 * (got.double() - exact).abs().max().item()


# Parameters ----------------------------------------------------------------------------------------------


class Tunable(Honest):
    """Wrong where a parameter says so."""

    name = "tunable"
    parameters = frozenset({"wrong"})

    def compile(self, region: Region, options: Mapping[str, Any]) -> Any:
        run = super().compile(region, options)
        return (lambda *args: [out + 1 for out in run(*args)]) if options.get("wrong") else run


@pytest.mark.parametrize("fuses", [True, False])
def test_parameters_reach_the_executor(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fuses: bool) -> None:
    install(monkeypatch, tunable=Tunable if fuses else one_by_one(Tunable))
    x = torch.ones(3)
    assert primexec.compare(lambda x: x.exp(), x, executors=["tunable"]).first == {"tunable": None}
    comparison = primexec.compare(lambda x: x.exp(), x, executors=["tunable"], executor_parameters={"wrong": True})
    assert comparison.first["tunable"] is not None
    script = comparison.repro(tmp_path / "fault.py").read_text()
    assert "executors=('tunable',), executor_parameters={'wrong': True})" in script


def test_unknown_parameters_are_refused() -> None:
    with pytest.raises(ValueError, match="unexpected executor parameters: speed"):
        primexec.compare(torch.exp, torch.ones(3), executor_parameters={"speed": 1})
    with pytest.raises(ValueError, match="takes no 'strict'"):
        primexec.compare(torch.exp, torch.ones(3), executor_parameters={"strict": True})
