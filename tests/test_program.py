"""The program: its text, its graph that runs, and sizes that depend on data."""

import operator
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from primexec import CaptureError, make_traced

X = torch.arange(-3.0, 3.0).reshape(2, 3)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)
        self.register_buffer("steps", torch.zeros(()))

    def forward(self, x: Tensor) -> Any:
        self.steps = self.steps + 1  # counted
        hidden = self.linear(x)  # projected
        values, indices = hidden.max(dim=1)
        return {"top": values.relu(), "at": indices, "name": "net"}, None


def test_text_of_a_program() -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        program = make_traced(Net()).trace(X)
    start = Net.forward.__code__.co_firstlineno
    assert re.sub(" +#", "  #", str(program)).splitlines() == [
        "def Net(",
        "    x: f32[2, 3],  # argument x",
        "    self_steps: f32[],  # state self.steps",
        "    self_linear_weight: f32[2, 3],  # state self.linear.weight",
        "    self_linear_bias: f32[2],  # state self.linear.bias",
        "):",
        f"  # test_program.py:{start + 1} in Net.forward: self.steps = self.steps + 1  # counted",
        "    add: f32[] = aten.add.Tensor(self_steps, 1)",
        f"  # test_program.py:{start + 2} in Net.forward: hidden = self.linear(x)  # projected",
        "    t: f32[3, 2] = aten.t(self_linear_weight)",
        "    addmm: f32[2, 2] = aten.addmm(self_linear_bias, x, t)",
        f"  # test_program.py:{start + 3} in Net.forward: values, indices = hidden.max(dim=1)",
        "    max_1_0: f32[2], max_1_1: i64[2] = aten.max.dim(addmm, 1)",
        f"  # test_program.py:{start + 4} in Net.forward: "
        'return {"top": values.relu(), "at": indices, "name": "net"}, None',
        "    relu: f32[2] = aten.relu(max_1_0)",
        "    return relu, max_1_1, 'net', None",
        "  # then Net.steps = add",
    ]
    assert program._repr_html_() == f"<pre>{str(program).replace(chr(39), '&#x27;').replace(chr(34), '&quot;')}</pre>"


def test_inputs_are_named_after_what_a_user_writes() -> None:
    weight = torch.ones(3)

    def function(batch: dict[str, Any], *rest: Tensor, scale: Tensor, **more: Tensor) -> Tensor:
        out = batch["x"] * weight + rest[0] + rest[1] * scale + more["other"]
        return out + torch.tensor([1.0, 2.0, 3.0])

    a, b, c, d, e = (torch.ones(2, 3) for _ in range(5))
    program = make_traced(function).trace({"x": a, "n": 1}, b, c, scale=d, other=e)
    labels = [i.label for i in program.inputs if i.kind == "argument"]
    assert labels == ["batch['x']", "rest[0]", "rest[1]", "scale", "other"]
    assert {i.kind for i in program.inputs} == {"argument", "state", "constant"}
    assert any(i.label.startswith("weight") for i in program.inputs if i.kind == "state")


def in_place(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    row = x[0]
    row.mul_(y.sum())
    x += 1
    return x, row


def loops(x: Tensor, y: Tensor) -> Tensor:
    for i in range(3):
        x = x @ y.t() @ y + i
    return torch.cat([x, y.exp()], dim=-1).softmax(0)


def control_flow(x: Tensor, y: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda a, b: a + b, lambda a, b: a - b, (x, y))


def odd_targets(x: Tensor, y: Tensor) -> Any:
    z = torch.empty(4)
    z.random_(0, 5)
    return torch.stack([x, y]).split([1, 1]), z.shape, x.to(torch.float64), x.sort(), x.new_zeros(2)


def attention(x: Tensor, y: Tensor) -> Tensor:
    q = x.reshape(1, 1, 2, 3)
    return nn.functional.scaled_dot_product_attention(q, q, y.reshape(1, 1, 2, 3), is_causal=True)


GRAPHS = [in_place, loops, control_flow, odd_targets, attention]


@pytest.mark.parametrize("fn", GRAPHS, ids=lambda f: f.__name__)
def test_graph_module_is_plain_fx_that_runs(fn: Callable[..., Any]) -> None:
    program = make_traced(fn).trace(X.clone(), X + 1)
    gm = program.graph_module
    assert isinstance(gm, torch.fx.GraphModule)
    gm.graph.lint()
    assert all(n.op in ("placeholder", "call_function", "get_attr", "output") for n in gm.graph.nodes)
    assert [i.kind for i in program.inputs] == ["argument"] * 2
    mine, eagers = (X.clone(), X + 1), (X.clone(), X + 1)
    torch.manual_seed(0)
    expected = [t for t in torch.utils._pytree.tree_leaves(fn(*eagers)) if isinstance(t, Tensor)]
    torch.manual_seed(0)
    out = gm(*mine)
    assert isinstance(out, tuple)
    assert len(out) == len(expected)
    for ours, theirs in [*zip(out, expected, strict=True), *zip(mine, eagers, strict=True)]:
        assert torch.equal(ours, theirs)
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
    again = torch.fx.GraphModule(gm, gm.graph)
    again.recompile()
    assert len(again(X.clone(), X + 1)) == len(expected)


def test_nodes_carry_metadata_and_source() -> None:
    program = make_traced(loops).trace(X, X)
    for node in program.nodes:
        assert isinstance(node.meta["val"], Tensor)
        assert node.meta["source"].file == __file__
        assert node.meta["source"].function == "loops"
        assert f'File "{__file__}"' in node.meta["stack_trace"]
    lines = [n.meta["source"].line - loops.__code__.co_firstlineno for n in program.nodes]
    assert lines == [2] * (len(lines) - 3) + [3] * 3


def test_empty_programs() -> None:
    assert make_traced(lambda: None).trace().nodes == []
    program = make_traced(lambda x, k: (k, x)).trace(X, 3)
    assert (program.nodes, program.graph_module(X)) == ([], (X,))
    assert str(program).endswith("return 3, x")


UNKNOWN_SIZES: dict[str, Callable[[Tensor], Any]] = {
    "boolean index": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "nonzero tuple": lambda x: x.nonzero(as_tuple=True),
    "where": lambda x: torch.where(x > 0),
    "unique": lambda x: torch.unique(x.round(), return_counts=True),
    "unique consecutive": lambda x: torch.unique_consecutive(x),
    "masked_select": lambda x: torch.masked_select(x, x > 0) * 2 + 1,
    "arithmetic afterwards": lambda x: x[x > 0].exp().sum(),
    "index written": lambda x: (x.masked_fill_(x > 0, 1.0), x.index_put_((x < 0,), torch.tensor(5.0)))[1],
    "repeat_interleave": lambda x: x.repeat_interleave(torch.tensor([1, 2]), dim=0),
}


@pytest.mark.parametrize("fn", UNKNOWN_SIZES.values(), ids=UNKNOWN_SIZES)
def test_sizes_that_depend_on_data(fn: Callable[[Tensor], Any]) -> None:
    traced = make_traced(fn)
    for x in (X, -X, X + 10, X - 10, torch.zeros(2, 3)):
        out, expected = (torch.utils._pytree.tree_leaves(f(x.clone())) for f in (traced, fn))
        assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(out, expected, strict=True))
    assert traced.cache_info()[:3] == (4, 1, 1)


def test_unknown_sizes_have_names_in_the_text() -> None:
    program = make_traced(lambda x: x[x > 0] * 2).trace(X)
    assert [n.target for n in program.nodes].count(torch.ops.aten.mul.Tensor) == 1
    assert "f32[u0]" in str(program)


NEEDED_IN_PYTHON: dict[str, Callable[[Tensor], Any]] = {
    "shape": lambda x: x[x > 0].shape[0] * 2.0,
    "returned shape": lambda x: x[x > 0].shape,
}


@pytest.mark.parametrize("fn", NEEDED_IN_PYTHON.values(), ids=NEEDED_IN_PYTHON)
def test_unknown_size_that_python_needs_is_refused(fn: Callable[[Tensor], Any]) -> None:
    with pytest.raises(CaptureError) as refused:
        make_traced(fn)(X)
    assert refused.value.source is not None
    assert refused.value.source.file == __file__


def test_unknown_size_that_operators_need() -> None:
    def fn(x: Tensor) -> Tensor:
        positive = x[x > 0]
        return positive.view(-1, 1).expand(positive.size(0), 2)

    traced = make_traced(fn)
    for x in (X, -X, X.abs()):
        assert torch.equal(traced(x), fn(x))
    assert traced.cache_info().traces == 1


def test_results_of_one_operator_stand_on_one_line() -> None:
    program = make_traced(torch.max).trace(X, 0)
    assert [n.target is operator.getitem for n in program.nodes] == [False, True, True]
    assert "max_1_0: f32[3], max_1_1: i64[3] = aten.max.dim(" in str(program)
