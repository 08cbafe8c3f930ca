"""The laws of a plan: each, broken on purpose, is found and shown with its surroundings."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from primexec import VerificationError, make_traced
from primexec.executors import registry
from primexec.executors.base import Executor, no
from primexec.partition import Plan, partition
from primexec.passes.functionalize import Functionalize
from primexec.verify_plan import verify_planned

X = torch.linspace(-1, 1, 16).reshape(4, 4)
EXECUTORS = (registry.load("numpy"), registry.load("aten"))


def function(x: Tensor) -> Any:
    a = (x * 2).exp()
    b = torch.rand_like(a)  # effects stay on aten
    c = (a + b).sin() * b
    x.add_(1)
    d = torch.rand_like(c)
    return (c * d).cos() + x, c.t()


def plan() -> Plan:
    program = Functionalize()(make_traced(function).trace(X.clone()))
    made = partition(program, EXECUTORS, allowed=None, inference=False)
    assert len(made.regions) >= 4
    return made


def node(p: Plan, name: str) -> fx.Node:
    return next(n for n in p.program.graph_module.graph.nodes if n.name == name)


def home(p: Plan, name: str) -> int:
    return next(i for i, nodes in enumerate(p.nodes) if name in {n.name for n in nodes})


def put(values: tuple[Any, ...], i: int, value: Any) -> tuple[Any, ...]:
    return (*values[:i], value, *values[i + 1 :])


def without(values: tuple[fx.Node, ...], name: str) -> tuple[fx.Node, ...]:
    assert name in {n.name for n in values}
    return tuple(n for n in values if n.name != name)


def swapped(values: tuple[Any, ...], i: int, j: int) -> tuple[Any, ...]:
    return put(put(values, i, values[j]), j, values[i])


def regions_in_another_order(p: Plan) -> Plan:
    i = home(p, "rand_like")
    return replace(
        p, **{f: swapped(getattr(p, f), i, home(p, "sin")) for f in ("regions", "nodes", "inputs", "outputs")}
    )


def node_in_two_regions(p: Plan) -> Plan:
    return replace(p, nodes=put(p.nodes, home(p, "sin"), (*p.nodes[home(p, "sin")], node(p, "exp"))))


def node_in_no_region(p: Plan) -> Plan:
    i = home(p, "sin")
    return replace(p, nodes=put(p.nodes, i, without(p.nodes[i], "sin")))


def result_of_another_region(p: Plan) -> Plan:
    i = home(p, "rand_like")
    return replace(p, outputs=put(p.outputs, i, (node(p, "exp"),)))


def result_missing(p: Plan) -> Plan:
    p.regions[-1].graph_module.graph.output_node().args = ((),)
    return replace(p, outputs=put(p.outputs, len(p.outputs) - 1, ()))


def result_not_returned(p: Plan) -> Plan:
    graph = p.regions[0].graph_module.graph
    graph.output_node().args = ((),)
    return p


def input_not_taken(p: Plan) -> Plan:
    i = home(p, "sin")
    return replace(p, inputs=put(p.inputs, i, p.inputs[i][1:]))


def broken_region(p: Plan) -> Plan:
    graph = p.regions[home(p, "sin")].graph_module.graph
    first, second = (next(n for n in graph.nodes if n.name == name) for name in ("sin", "add"))
    first.append(second)
    return p


def effects_in_another_order(p: Plan) -> Plan:
    i = home(p, "add_")
    return replace(p, nodes=put(p.nodes, i, p.nodes[i][::-1]))


def read_after_the_write(p: Plan) -> Plan:
    i, j = home(p, "mul"), home(p, "add_")
    moved = node(p, "mul")
    nodes = put(put(p.nodes, i, without(p.nodes[i], "mul")), j, (*p.nodes[j], moved))
    return replace(p, nodes=nodes)


BROKEN: dict[Callable[[Plan], Plan], str] = {
    regions_in_another_order: r"is taken by region\d before it is made",
    node_in_two_regions: r"^exp runs in region\d and in region\d",
    node_in_no_region: r"^sin runs in no region",
    result_of_another_region: r"^exp is returned by region\d, which does not run it",
    result_missing: r"^add_1 is returned by the program, and by no region",
    result_not_returned: r"^region0 takes 1 values and returns 0; it is given 1, and 1 are asked for",
    input_not_taken: r"^region\d takes 2 values and returns \d; it is given 1, and \d are asked for",
    broken_region: r"^sin uses add before it is made",
    effects_in_another_order: r"^rand_like has an effect and runs after add_, before which it stands",
    read_after_the_write: r"^mul runs after an operator before which it stands, and one of them writes to its memory",
}


def test_a_plan_is_legal() -> None:
    verify_planned(plan(), EXECUTORS)


@pytest.mark.parametrize("break_", BROKEN, ids=lambda f: f.__name__)
def test_broken_law_is_found(break_: Callable[[Plan], Plan]) -> None:
    broken = break_(plan())
    with pytest.raises(VerificationError, match=BROKEN[break_]) as found:
        verify_planned(broken, EXECUTORS)
    if not str(found.value).startswith("region"):
        assert "\n→ " in str(found.value)
        assert f'File "{__file__}"' in str(found.value)


class Forgetful:
    """An executor that declines what it claimed before."""

    def __init__(self, executor: Executor) -> None:
        self.executor, self.name = executor, executor.name

    def supports(self, node: fx.Node) -> Any:
        return no("never heard of it") if "sin" in node.name else self.executor.supports(node)


def test_executors_claim_what_they_run() -> None:
    executors: Any = (Forgetful(EXECUTORS[0]), EXECUTORS[1])
    with pytest.raises(VerificationError, match=r"^sin stands in region\d, but numpy declines it: never heard of it"):
        verify_planned(plan(), executors)
