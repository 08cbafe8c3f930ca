"""torch.export.ExportedProgram in execute and make_traced. The oracle is the exported program's own module."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram, export

import primexec
from tests.toy import Toy, install

# torch.export trips over a deprecation of its own.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec, LeafSpec.. is deprecated:FutureWarning")


class Counting(nn.Module):
    """Batch norm in training mode, a buffer changed in place and one assigned, a keyword argument."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear, self.norm = nn.Linear(4, 3), nn.BatchNorm1d(3)
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(3))

    def forward(self, x: Tensor, *, scale: float = 1.0) -> dict[str, Tensor]:
        self.calls.add_(1)
        y = self.norm(self.linear(x)) * scale
        self.mean = self.mean * 0.5 + y.detach().mean(0) * 0.5
        return {"y": y, "calls": self.calls.clone()}


def exported(dynamic: bool = False, decompose: bool = False) -> ExportedProgram:
    shapes = {"x": {0: Dim("rows", min=2)}} if dynamic else None
    program = export(Counting(), (torch.randn(5, 4),), dynamic_shapes=shapes)
    return program.run_decompositions() if decompose else program


def state(program: ExportedProgram) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in program.state_dict.items()}


@pytest.mark.parametrize("decompose", [False, True], ids=["as exported", "decomposed"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_execute_equals_the_module(dynamic: bool, decompose: bool) -> None:
    program = exported(dynamic, decompose)
    original = copy.deepcopy(program)
    module = original.module()
    with torch.no_grad():
        for rows in (5, 7, 5) if dynamic else (5, 5, 5):
            x = torch.randn(rows, 4)
            torch.testing.assert_close(primexec.execute(program, x), module(x), rtol=0, atol=0)
            torch.testing.assert_close(state(program), state(original), rtol=0, atol=0)
    assert program.state_dict["calls"] == 3


def test_make_traced_equals_the_module() -> None:
    program = exported(dynamic=True)
    module = copy.deepcopy(program).module()
    traced: Any = primexec.make_traced(program)
    assert isinstance(traced, nn.Module)
    assert traced.state_dict().keys() == program.state_dict.keys()
    with torch.no_grad():
        for rows in (5, 7, 5, 7):
            x = torch.randn(rows, 4)
            torch.testing.assert_close(traced(x), module(x), rtol=0, atol=0)
    info = traced.cache_info()
    assert (info.traces, info.hits) == (2, 2)
    assert program.state_dict["calls"] == 4


def test_program_is_prepared_once() -> None:
    program = exported()
    x = torch.randn(5, 4)
    with torch.no_grad():
        for _ in range(3):
            primexec.execute(program, x)
    (traced,) = program.__dict__["_primexec_prepared"].values()
    assert traced.cache_info()[:3] == (2, 1, 1)
    assert not copy.deepcopy(program).__dict__.get("_primexec_prepared")


def test_weights_are_read_at_every_call() -> None:
    program = exported()
    x = torch.randn(5, 4)
    with torch.no_grad():
        primexec.execute(program, x)
        program.state_dict["linear.weight"].zero_()
        program.state_dict["linear.bias"].fill_(2)
        out = primexec.execute(program, x)["y"]
    torch.testing.assert_close(out, torch.zeros(5, 3))  # batch norm of equal rows


def test_shapes_the_program_is_not_for_raise_its_own_error() -> None:
    program = exported()
    with torch.no_grad():
        with pytest.raises(AssertionError, match="Guard failed"):
            program.module()(torch.randn(6, 4))
        with pytest.raises(AssertionError, match="Guard failed"):
            primexec.execute(program, torch.randn(6, 4))
    assert program.state_dict["calls"] == 0


def test_executors_take_part(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Toy] = []

    class Recorder(Toy):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    class Twice(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x + x

    install(monkeypatch, toy=Recorder)
    program = export(Twice(), (torch.ones(3),))
    assert torch.equal(primexec.execute(program, torch.ones(3), executor="toy"), 2 * torch.ones(3))
    assert [ops for _, ops, _ in made[0].regions] == [["aten.add.Tensor"]]


def test_constants_and_nested_inputs() -> None:
    class Nested(nn.Module):
        def forward(self, pair: tuple[Tensor, dict[str, Tensor]]) -> list[Tensor]:
            return [pair[0] * torch.tensor([1.0, 2.0]), pair[1]["b"].t()]

    pair = (torch.randn(3, 2), {"b": torch.randn(4, 5)})
    program = export(Nested(), (pair,))
    out = primexec.execute(program, pair)
    assert type(out) is list
    torch.testing.assert_close(out, program.module()(pair), rtol=0, atol=0)
    assert out[1].stride() == (1, 5)


@dataclass
class NotAGraph:
    value: int = 0


def test_other_things_are_refused() -> None:
    with pytest.raises(TypeError, match=r"torch.fx.GraphModule or a torch\.export\.ExportedProgram, got NotAGraph"):
        primexec.execute(NotAGraph())  # type: ignore[arg-type]
