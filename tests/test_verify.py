"""The laws of a captured program: each, broken on purpose, is found and shown with its surroundings."""

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from primexec import Program, VerificationError, make_traced
from primexec.program import Input
from primexec.verify import verify_captured

X = torch.ones(2, 3)


def function(x: Tensor, y: Tensor) -> Tensor:
    a = x + y
    b = a.exp()  # the middle
    c = b * y
    return c.sum()


def program() -> Program:
    return make_traced(function).trace(X, X.clone())


def node(of: Program, name: str) -> fx.Node:
    return next(n for n in of.graph_module.graph.nodes if n.name == name)


def used_too_early(p: Program) -> None:
    node(p, "add").append(node(p, "mul"))


def python_function(p: Program) -> None:
    node(p, "exp").target = torch.exp


def overload_packet(p: Program) -> None:
    node(p, "exp").target = torch.ops.aten.exp


def method(p: Program) -> None:
    node(p, "exp").op = "call_method"


def real_tensor(p: Program) -> None:
    node(p, "mul").args = (node(p, "exp"), torch.ones(3))


def real_tensor_inside(p: Program) -> None:
    node(p, "mul").args = (node(p, "exp"), [None, (torch.ones(3),)])


def real_tensor_by_keyword(p: Program) -> None:
    node(p, "mul").kwargs = {"other": torch.ones(3)}


def no_metadata(p: Program) -> None:
    node(p, "y").meta.clear()


BROKEN: dict[Callable[[Program], None], str] = {
    used_too_early: "mul uses exp before it is made",
    python_function: "exp is not an operator of PyTorch",
    overload_packet: "exp is not an operator of PyTorch",
    method: "exp is a call_method",
    real_tensor: "mul holds a real tensor",
    real_tensor_inside: "mul holds a real tensor",
    real_tensor_by_keyword: "mul holds a real tensor",
    no_metadata: "y carries no metadata",
}


def test_what_a_capture_makes_is_legal() -> None:
    verify_captured(program())


@pytest.mark.parametrize("break_", BROKEN, ids=lambda f: f.__name__)
def test_broken_law_is_found(break_: Callable[[Program], None]) -> None:
    p = program()
    break_(p)
    with pytest.raises(VerificationError) as found:
        verify_captured(p)
    first, *lines = str(found.value).splitlines()
    law = BROKEN[break_]
    assert first == law
    marked = [line for line in lines if line.startswith("→ ")]
    assert len(marked) == 1
    assert marked[0].startswith(f"→ {law.split()[0]} = ")
    names = [line[2:].split(" = ")[0] for line in lines if not line.startswith("    ") and " = " in line]
    assert names == [n.name for n in p.graph_module.graph.nodes]  # few enough to be all neighbours
    if law.startswith(("exp", "mul")):
        text = "b = a.exp()  # the middle" if law.startswith("exp") else "c = b * y"
        assert f'File "{__file__}"' in str(found.value)
        assert lines[-1].strip() == text


def test_neighbours_are_five_on_each_side() -> None:
    p = make_traced(lambda x: [x := x + i for i in range(20)][-1]).trace(X)
    node(p, "add_10").target = torch.add
    with pytest.raises(VerificationError) as found:
        verify_captured(p)
    shown = [
        line[2:].split(" = ")[0]
        for line in str(found.value).splitlines()
        if " = torch" in line or " = aten" in line or "→" in line
    ]
    assert shown == [f"add_{i}" for i in range(5, 16)]


def test_inputs_are_the_placeholders() -> None:
    p = program()
    for inputs in (p.inputs[:1], p.inputs[::-1], (*p.inputs, Input("z", "constant", "z"))):
        with pytest.raises(VerificationError, match="are not the placeholders"):
            verify_captured(dataclasses.replace(p, inputs=inputs))
