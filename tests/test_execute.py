"""execute: any FX graph, prepared once for each kind of inputs."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from primexec import execute, make_traced, pipeline
from tests.copies import COPIES

X = torch.arange(6.0).reshape(2, 3)


def counts(traced: Any) -> tuple[int, int, int]:
    """Hits, misses, traces."""
    return tuple(traced.cache_info())[:3]


def aten_graph() -> fx.GraphModule:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    product = graph.call_function(torch.ops.aten.mm.default, (x, y))
    graph.call_function(torch.ops.aten.mul_.Tensor, (x, 2.0))
    split = graph.call_function(torch.ops.aten.split.Tensor, (product, 1), {"dim": 1})
    graph.output((graph.call_function(torch.ops.aten.relu.default, (product,)), split))
    return fx.GraphModule(nn.Module(), graph)


def test_graph_of_a_program() -> None:
    def fn(x: Tensor) -> Tensor:
        return x / (2 * x.max().item()) + 1

    x = torch.rand(3)
    assert torch.equal(execute(make_traced(fn).trace(x).graph_module, x)[0], fn(x))


def prims_graph() -> fx.GraphModule:
    graph = fx.Graph()
    x, y = graph.placeholder("x"), graph.placeholder("y")
    wide = graph.call_function(torch.ops.prims.broadcast_in_dim.default, (y, [2, 3, 2], [1, 2]))
    tall = graph.call_function(torch.ops.prims.broadcast_in_dim.default, (x, [2, 3, 2], [0, 1]))
    added = graph.call_function(torch.ops.prims.add.default, (wide, tall))
    graph.output({"sum": graph.call_function(torch.ops.prims.sum.default, (added, [1]))})
    return fx.GraphModule(nn.Module(), graph)


class Parts(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2).requires_grad_(False)
        self.register_buffer("shift", torch.ones(2))

    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        out = self.linear(x) + self.shift
        return out.relu().t().contiguous(), torch.nn.functional.softmax(x.matmul(y), dim=-1)


GRAPHS: dict[str, Callable[[], fx.GraphModule]] = {
    "aten": aten_graph,
    "prims": prims_graph,
    "plain_torch_modules_methods_attributes": lambda: fx.symbolic_trace(Parts()),
}


def graph_inputs() -> tuple[Tensor, Tensor]:
    return torch.arange(6.0).reshape(2, 3) - 2, torch.arange(6.0).reshape(3, 2) - 2


def prepared(gm: fx.GraphModule) -> list[Any]:
    return list(gm.__dict__["_primexec_prepared"].values())


@pytest.mark.parametrize("make", GRAPHS.values(), ids=GRAPHS)
def test_execute_is_the_graph(make: Callable[[], fx.GraphModule]) -> None:
    gm = make()
    ops = {node.op for node in gm.graph.nodes}
    assert ops >= {"placeholder", "call_function", "output"}
    expected_inputs, inputs = graph_inputs(), graph_inputs()
    for _ in range(3):
        expected, out = gm(*expected_inputs), execute(gm, *inputs)
        flat = [torch.utils._pytree.tree_leaves(o) for o in (expected, out)]
        assert all(torch.equal(a, b) for a, b in zip(*flat, strict=True))
        assert torch.utils._pytree.tree_structure(expected) == torch.utils._pytree.tree_structure(out)
        assert all(torch.equal(a, b) for a, b in zip(expected_inputs, inputs, strict=True))
    assert [t.cache_info() for t in prepared(gm)] == [(2, 1, 1, 1, 0, 1)]


def test_graph_covers_every_kind_of_node() -> None:
    ops = {node.op for node in fx.symbolic_trace(Parts()).graph.nodes}
    assert ops == {"placeholder", "call_function", "call_method", "call_module", "get_attr", "output"}


def test_execute_is_prepared_once_for_each_kind_of_inputs() -> None:
    gm = fx.symbolic_trace(lambda x: torch.relu(x) + 1)
    for size in (2, 3, 2, 3):
        execute(gm, torch.ones(size))
        execute(gm, torch.ones(size), executor="aten")
    assert [t.cache_info() for t in prepared(gm)] == [(6, 2, 2, 2, 0, 2)]
    execute(gm, torch.ones(2), executor=["auto"])
    execute(gm, torch.ones(2), executor_parameters={"strict": True})
    assert len(prepared(gm)) == 3


def test_edited_graph_is_prepared_anew_after_recompile() -> None:
    gm = fx.symbolic_trace(lambda x: torch.relu(x) + 1)
    x = torch.tensor([-1.0, 1.0])
    assert torch.equal(execute(gm, x), torch.tensor([1.0, 2.0]))
    next(n for n in gm.graph.nodes if n.target is torch.relu).target = torch.abs
    assert torch.equal(execute(gm, x), gm(x))
    gm.recompile()
    for _ in range(2):
        assert torch.equal(execute(gm, x), torch.tensor([2.0, 2.0]))
    assert [counts(t) for t in prepared(gm)] == [(1, 1, 1)]


def test_parameters_of_a_graph_are_read_at_every_call() -> None:
    gm = fx.symbolic_trace(Parts())
    x, y = graph_inputs()
    execute(gm, x, y)
    gm.shift = torch.full((2,), 7.0)
    with torch.no_grad():
        gm.linear.weight.mul_(3)
    assert all(torch.equal(a, b) for a, b in zip(execute(gm, x, y), gm(x, y), strict=True))
    assert [counts(t) for t in prepared(gm)] == [(1, 1, 1)]
    assert gm.state_dict().keys() == fx.symbolic_trace(Parts()).state_dict().keys()


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
def test_copied_graph_is_prepared_on_its_own(copied: Callable[[Any], Any]) -> None:
    gm = aten_graph()
    execute(gm, *graph_inputs())
    other = copied(gm)
    expected = gm(*graph_inputs())
    assert torch.equal(execute(other, *graph_inputs())[0], expected[0])
    assert [counts(t) for t in prepared(gm)] == [(0, 1, 1)]
    assert [counts(t) for t in prepared(other)] == [(0, 1, 1)]


def test_prepared_programs_go_with_the_graph() -> None:
    gm = aten_graph()
    execute(gm, *graph_inputs())
    dead = weakref.ref(gm)
    del gm
    gc.collect()
    assert dead() is None


@pytest.mark.parametrize("odd", [torch.relu, nn.ReLU(), fx.Graph()], ids=lambda o: type(o).__name__)
def test_execute_takes_graph_modules_only(odd: Any) -> None:
    with pytest.raises(TypeError, match=r"execute takes a torch\.fx\.GraphModule"):
        execute(odd, X)


@pytest.mark.parametrize("collecting", [True, False])
def test_the_collector_waits_while_programs_are_made(collecting: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[bool] = []
    original = pipeline.compile_plan

    def spy(*args: Any, **kwargs: Any) -> Any:
        seen.append(gc.isenabled())
        if len(seen) == 3:
            raise ValueError("no")
        return original(*args, **kwargs)

    monkeypatch.setattr(pipeline, "compile_plan", spy)
    was = gc.isenabled()
    (gc.enable if collecting else gc.disable)()
    try:
        graph = fx.symbolic_trace(lambda a: a.relu() + 1)
        assert torch.equal(execute(graph, torch.ones(3), executor="aten"), torch.full((3,), 2.0))
        assert torch.equal(make_traced(lambda a: a * 2)(torch.ones(3)), torch.full((3,), 2.0))
        with pytest.raises(ValueError, match="no"):
            make_traced(lambda a: a * 3)(torch.ones(3))
        assert (seen, gc.isenabled()) == ([False] * 3, collecting)
    finally:
        (gc.enable if was else gc.disable)()
