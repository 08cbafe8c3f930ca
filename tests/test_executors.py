"""Executors of third parties: how programs are cut for them, what they are held to, how they are found."""

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from primexec import ExecutorError, execute, make_traced
from primexec.executors import registry
from primexec.executors.base import YES, Region, no
from tests.toy import Other, Toy, broken, install

X = torch.arange(6.0).reshape(2, 3)
Y = X + 1


def loaded(name: str) -> Any:
    return registry.load(name)


def regions(explained: Any) -> list[tuple[str, list[str]]]:
    """(executor, operators) of each region."""
    return [
        (r.executor, [str(n.target) for n in r.graph_module.graph.nodes if n.op == "call_function"])
        for r in explained.plan.regions
    ]


# Partition ----------------------------------------------------------------------------------------------


def mixed(x: Tensor, y: Tensor) -> Tensor:
    z = (x + y) * x
    return (z.exp() + y).mul(2.0).sin()


def test_program_is_cut_into_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, toy=Toy)
    traced = make_traced(mixed, executor="toy")
    for x in (X, X + 0.5):
        torch.testing.assert_close(traced(x, Y), mixed(x, Y), rtol=0, atol=0)
    assert traced.cache_info() == (1, 1, 1, 4, 0, 1)
    assert loaded("toy").regions == [
        ("region0", ["aten.add.Tensor", "aten.mul.Tensor"], {}),
        ("region2", ["aten.add.Tensor", "aten.mul.Tensor"], {}),
    ]
    assert regions(traced.explain(X, Y)) == [
        ("toy", ["aten.add.Tensor", "aten.mul.Tensor"]),
        ("aten", ["aten.exp.default"]),
        ("toy", ["aten.add.Tensor", "aten.mul.Tensor"]),
        ("aten", ["aten.sin.default"]),
    ]


def test_results_run_where_what_they_are_made_of_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def fn(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        early = (x + y) * y
        return early * 2.0 + y, early * x.sin()

    install(monkeypatch, toy=Toy)
    traced = make_traced(fn, executor="toy")
    torch.testing.assert_close(traced(X, Y), fn(X, Y), rtol=0, atol=0)
    add, mul = "aten.add.Tensor", "aten.mul.Tensor"
    assert regions(traced.explain(X, Y)) == [("aten", ["aten.sin.default"]), ("toy", [add, mul, mul, add, mul])]


def test_whole_program_on_one_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, toy=Toy)
    traced = make_traced(lambda x, y: x * y + x, executor="toy")
    assert torch.equal(traced(X, Y), X * Y + X)
    assert traced.cache_info().compiles == 1
    assert regions(traced.explain(X, Y)) == [("toy", ["aten.mul.Tensor", "aten.add.Tensor"])]


class Modest(Toy):
    """Multiplies, and says that others do it faster."""

    def leaves(self, node: fx.Node) -> str | None:
        return "others are faster" if "mul" in str(node.target) else None


def test_executor_leaves_what_others_run_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, toy=Modest)
    traced = make_traced(lambda x, y: (x + y + x) * y, executor="toy")
    assert torch.equal(traced(X, Y), (X + Y + X) * Y)
    explained = traced.explain(X, Y)
    add, mul = "aten.add.Tensor", "aten.mul.Tensor"
    assert regions(explained) == [("toy", [add, add]), ("aten", [mul])]
    assert "toy declined 1 x aten.mul.Tensor: others are faster" in str(explained)
    strict = make_traced(lambda x, y: (x + y + x) * y, executor="toy", executor_parameters={"strict": True})
    assert torch.equal(strict(X, Y), (X + Y + X) * Y)
    assert regions(strict.explain(X, Y)) == [("toy", [add, add, mul])]


ORDERS: dict[tuple[str, ...], list[str]] = {
    ("toy", "other"): ["toy"],
    ("other", "toy"): ["toy", "other", "toy"],
    ("other",): ["aten", "other", "aten"],
    ("aten", "toy"): ["aten"],
    ("toy", "aten", "other"): ["toy"],
    ("auto",): ["aten"],
    ("other", "auto", "toy"): ["aten", "other", "aten"],
}


@pytest.mark.parametrize("order", ORDERS, ids=",".join)
def test_executors_are_asked_in_the_users_order(monkeypatch: pytest.MonkeyPatch, order: tuple[str, ...]) -> None:
    install(monkeypatch, toy=Toy, other=Other)

    def function(x: Tensor, y: Tensor) -> Tensor:
        return (x * y + x) * y

    traced = make_traced(function, executor=order)
    assert torch.equal(traced(X, Y), function(X, Y))
    assert [executor for executor, _ in regions(traced.explain(X, Y))] == ORDERS[order]
    assert traced.cache_info().compiles == len(ORDERS[order])


def test_plan_tells_who_declined_and_why(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, toy=Toy, other=Other)
    traced = make_traced(lambda x, y: ((x + y) * x).exp().exp(), executor=["other", "toy"])
    text = str(traced.explain(X, Y))
    for line in (
        "region0 on other: 1 operators (1 aten.add.Tensor)",
        "region1 on toy: 1 operators (1 aten.mul.Tensor)",
        "region2 on aten: 2 operators (2 aten.exp)",
        "  other declined 2 x aten.exp: only adds and multiplies; in its expansion, prims.exp: "
        "only adds and multiplies",
        "  toy declined 2 x aten.exp: only adds and multiplies; in its expansion, prims.exp: only adds and multiplies",
        "  other declined 1 x aten.mul.Tensor: only adds and multiplies; in its expansion, prims.mul: "
        "only adds and multiplies",
    ):
        assert f"  {line}\n" in text
    assert "toy declined 1" not in text


def test_results_of_several_outputs_stay_with_their_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, toy=Toy)
    traced = make_traced(lambda x, y: [t + 1 for t in (x + y).max(1, keepdim=True)[:1]], executor="toy")
    assert torch.equal(traced(X, Y)[0], (X + Y).max(1, keepdim=True)[0] + 1)
    assert [executor for executor, _ in regions(traced.explain(X, Y))] == ["toy", "aten", "toy"]


def test_state_and_constants_reach_the_regions(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, toy=Toy)
    linear = nn.Linear(3, 3).requires_grad_(False)
    shift = torch.ones(3)
    traced = make_traced(lambda x: linear(x * shift) + torch.tensor([1.0, 2.0, 3.0]) + linear.bias, executor="toy")
    for _ in range(2):
        expected = linear(X * shift) + torch.tensor([1.0, 2.0, 3.0]) + linear.bias
        assert torch.equal(traced(X), expected)
        linear.bias.add_(1)
        shift.mul_(2)
    assert traced.cache_info()[:3] == (1, 1, 1)


def test_execute_on_another_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, toy=Toy)
    gm = fx.symbolic_trace(lambda x, y: torch.sin(x + y) * y)
    assert torch.equal(execute(gm, X, Y, executor="toy"), gm(X, Y))
    assert [r for r, *_ in loaded("toy").regions] == ["region0", "region2"]


def test_choice_at_the_call(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, toy=Toy)
    traced = make_traced(mixed)
    traced(X, Y)
    assert loaded("toy").regions == []
    assert torch.equal(traced(X, Y, executor="toy"), mixed(X, Y))
    assert len(loaded("toy").regions) == 2


# Strict, and parameters ---------------------------------------------------------------------------------


def test_strict_forbids_falling_back(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, toy=Toy)
    traced = make_traced(lambda x, y: (x + y).exp(), executor="toy", executor_parameters={"strict": True})
    with pytest.raises(ExecutorError, match=r"strict: aten\.exp would fall back to aten") as refused:
        traced(X, Y)
    assert "toy: only adds and multiplies" in str(refused.value)
    assert f'File "{__file__}"' in str(refused.value)
    assert traced.cache_info().entries == 0
    assert torch.equal(traced(X, Y, executor=["toy", "aten"]), (X + Y).exp())
    assert torch.equal(traced(X, Y, executor="aten"), (X + Y).exp())
    whole = make_traced(lambda x, y: x + y, executor="toy", executor_parameters={"strict": True})
    assert torch.equal(whole(X, Y), X + Y)


def test_parameters_are_those_of_the_chosen_executors(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, toy=Toy, other=Other)
    traced = make_traced(lambda x, y: x + y, executor="toy", executor_parameters={"fast": 3, "strict": False})
    assert torch.equal(traced(X, Y), X + Y)
    assert loaded("toy").regions == [("region0", ["aten.add.Tensor"], {"fast": 3})]
    with pytest.raises(ValueError, match=r"parameters: slow\. Allowed parameters of toy are: fast, save, strict"):
        traced(X, Y, executor_parameters={"slow": 1})
    with pytest.raises(ValueError, match="Allowed parameters of toy, other are: fast, save, slow, strict"):
        make_traced(mixed, executor=["toy", "other"], executor_parameters={"nonsense": 1})


def test_parameters_that_cannot_be_hashed(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, toy=Toy)
    options: dict[str, Any] = {"executor": "toy", "executor_parameters": {"fast": [1, 2]}}
    uses: tuple[Callable[[], Any], ...] = (
        lambda: make_traced(mixed, **options),
        lambda: make_traced(mixed)(X, Y, **options),
        lambda: execute(fx.symbolic_trace(mixed), X, Y, **options),
    )
    for use in uses:
        with pytest.raises(TypeError, match="executor parameter 'fast'"):
            use()


# Mutation and aliasing ----------------------------------------------------------------------------------


def write_argument(x: Tensor, y: Tensor) -> Any:
    z = x + y
    x.mul_(2)
    return z * x


def write_view(x: Tensor, y: Tensor) -> Any:
    z = x + y
    z[0].add_(1)
    return z * y, z


def return_views(x: Tensor, y: Tensor) -> Any:
    z = x * y
    return z[0], z, x[1:], y


def return_argument(x: Tensor, y: Tensor) -> Any:
    return x, x + y, x.view(-1)


def write_result_of_region(x: Tensor, y: Tensor) -> Any:
    z = x + y
    z += x
    return z, z.t()


def write_argument_between(x: Tensor, y: Tensor) -> Any:
    a = x * y
    x.zero_()
    return a, x + y


def random_between(x: Tensor, y: Tensor) -> Any:
    return (x + torch.rand(3)) * y + torch.randn(3)


def view_of_argument_then_write(x: Tensor, y: Tensor) -> Any:
    row = x[0]
    z = row + 1
    x.add_(1)
    return z * row, row


def out_argument(x: Tensor, y: Tensor) -> Any:
    out = torch.empty(2, 3)
    torch.add(x, y, out=out)
    return out * 2, out


PINNED = [
    write_argument, write_view, return_views, return_argument, write_result_of_region, write_argument_between,
    random_between, view_of_argument_then_write, out_argument,
]  # fmt: skip


def observed(fn: Callable[..., Any]) -> Any:
    """Results, changed inputs, who shares memory with whom and who is whom."""
    torch.manual_seed(0)
    base = torch.arange(12.0)
    x, y = base[:6].view(2, 3), base[6:].view(2, 3)
    outs = fn(x, y)
    tensors = [x, y, *(outs if isinstance(outs, tuple) else (outs,))]
    storages = [t.untyped_storage().data_ptr() for t in tensors]
    return (
        [t.tolist() for t in tensors], base.tolist(), [t.stride() for t in tensors],
        [[a == b for a in storages] for b in storages], [[a is b for a in tensors] for b in tensors],
        torch.get_rng_state().tolist(),
    )  # fmt: skip


@pytest.mark.parametrize("fn", PINNED, ids=lambda f: f.__name__)
def test_mutation_and_aliasing_stay_on_aten(monkeypatch: pytest.MonkeyPatch, fn: Callable[..., Any]) -> None:
    install(monkeypatch, toy=Toy)
    traced = make_traced(fn, executor="toy")
    for _ in range(2):
        assert observed(traced) == observed(fn)
    assert traced.cache_info()[:3] == (1, 1, 1)
    claims = traced.explain(torch.ones(2, 3), torch.ones(2, 3)).plan.claims
    assert "toy" in {c.executor for c in claims.values()} or fn in (out_argument, return_argument, random_between)
    for node, claim in claims.items():
        if node.target not in Toy.claimed:
            assert claim.executor == "aten"


def test_memory_that_is_written_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, toy=Toy)
    graph, aten = fx.Graph(), torch.ops.aten
    x, y = graph.placeholder("x"), graph.placeholder("y")
    out = graph.call_function(aten.full.default, ([1, 2, 3], 7.0))
    part = graph.call_function(aten.select.int, (out, 0, 0))
    total = graph.call_function(aten.add.Tensor, (x, y))
    graph.call_function(aten.neg.out, (total,), {"out": part})
    graph.output((graph.call_function(aten.squeeze.dim, (out, 0)),))
    module = fx.GraphModule(nn.Module(), graph)
    assert torch.equal(execute(module, X, Y, executor="toy")[0], -(X + Y))


def test_pinned_nodes_say_why(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, toy=Toy)
    traced = make_traced(lambda x, y: ((x + y).add_(1), x.view(-1), x[0].mul_(2)), executor="toy")
    text = str(traced.explain(X.clone(), Y))
    assert "toy declined 1 x aten.mul_.Tensor: it has effects" in text
    assert "region0 on toy: 2 operators (2 aten.add.Tensor)" in text  # what the program made itself is functional now
    assert "toy declined 1 x aten.view: it aliases memory that is changed in place" in text
    assert "toy declined 1 x aten.select.int: it aliases memory that is changed in place" in text
    plain = make_traced(lambda x, y: (x + y).view(-1), executor="toy")
    assert "toy declined 1 x aten.view: it returns an alias" in str(plain.explain(X, Y))


# What executors are held to -----------------------------------------------------------------------------


def compiles_to(change: Callable[[list[Any]], Any]) -> type:
    def compile(self: Toy, region: Region, options: Mapping[str, Any]) -> Any:
        run = Toy.compile(self, region, options)
        return lambda *inputs: change(run(*inputs))

    return broken(compile=compile)


WRONG: dict[str, tuple[Callable[[list[Any]], Any], str]] = {
    "shape": (lambda outs: [outs[0].view(-1)], r"toy returned torch.float32 \(6,\) for add in region0, not .*\(2, 3\)"),
    "dtype": (lambda outs: [outs[0].double()], "toy returned torch.float64 .* not torch.float32"),
    "too few": (lambda outs: [], "toy returned 0 results for region0, not 1"),
    "too many": (lambda outs: outs * 2, "toy returned 2 results for region0, not 1"),
    "no tensor": (lambda outs: [outs[0].numpy()], "toy returned ndarray for add"),
}


@pytest.mark.parametrize(("change", "message"), WRONG.values(), ids=WRONG)
def test_wrong_results_are_found(
    monkeypatch: pytest.MonkeyPatch, change: Callable[[list[Any]], Any], message: str
) -> None:
    install(monkeypatch, toy=compiles_to(change))
    for fn in (lambda x, y: x + y, lambda x, y: (x + y).exp()):
        with pytest.raises(ExecutorError, match=message):
            make_traced(fn, executor="toy")(X, Y)


def failing(self: Any, region: Region, options: Mapping[str, Any]) -> Any:
    raise NotImplementedError("no adds today")


def test_failure_to_compile_names_executor_and_region(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, toy=broken(compile=failing))
    traced = make_traced(lambda x, y: x.exp() + y, executor="toy")
    with pytest.raises(ExecutorError, match="'toy' failed to compile region1: no adds today") as failed:
        traced(X, Y)
    assert isinstance(failed.value.__cause__, NotImplementedError)
    assert traced.cache_info().entries == 0


def test_refusal_needs_a_reason() -> None:
    assert not no("because")
    assert YES
    with pytest.raises(ValueError, match="needs a reason"):
        no("")


F64, BF16, I64 = torch.float64, torch.bfloat16, torch.int64
REFUSED_BY_EAGER: dict[str, Callable[[], Any]] = {
    "products": lambda: torch.ones(3, 4) @ torch.ones(4, 2, dtype=F64),
    "a product with a vector": lambda: torch.ones(3, 4) @ torch.ones(4, dtype=BF16),
    "a layer": lambda: nn.functional.linear(torch.ones(3, 4, dtype=F64), torch.ones(2, 4), torch.ones(2)),
    "a norm": lambda: nn.functional.layer_norm(torch.ones(3, 4), (4,), torch.ones(4, dtype=F64)),
    "classes": lambda: nn.functional.cross_entropy(torch.ones(3, 4), torch.ones(3, dtype=torch.int32)),
    "targets": lambda: nn.functional.binary_cross_entropy(torch.ones(3), torch.ones(3, dtype=F64)),
    "whole numbers": lambda: nn.functional.smooth_l1_loss(torch.ones(3, dtype=I64), torch.ones(3, dtype=I64)),
    "truth values": lambda: torch.ones(3, dtype=torch.bool) @ torch.ones(3, dtype=torch.bool),
    "in place": lambda: torch.ones(3, dtype=I64).mul_(torch.ones(3)),
}


@pytest.mark.parametrize("fn", REFUSED_BY_EAGER.values(), ids=REFUSED_BY_EAGER)
def test_dtypes_that_kernels_refuse_raise_as_in_eager(fn: Callable[[], Any]) -> None:
    with pytest.raises((RuntimeError, NotImplementedError)) as eager:
        fn()
    with pytest.raises(type(eager.value)) as traced:
        make_traced(fn, executor=("llvm", "aten"))()
    assert str(traced.value) == str(eager.value)


def test_dtypes_that_kernels_take_are_compiled() -> None:
    def fn(x: Tensor, weight: Tensor, index: Tensor) -> Tensor:
        return nn.functional.layer_norm(x, (4,), weight).relu() + nn.functional.embedding(index, weight.diag())

    traced = make_traced(fn, executor="llvm", executor_parameters={"strict": True})
    args = torch.randn(3, 4, dtype=BF16), torch.randn(4), torch.tensor([1, 0, 2])
    torch.testing.assert_close(traced(*args), fn(*args))


def test_views_in_several_results_are_made_where_they_are_read() -> None:
    """The parts of one projection, which a library call reads: no kernel copies them."""

    def fn(x: Tensor) -> Tensor:
        first, second = (x.exp() + x.sin()).unbind(0)
        return torch.linalg.qr(first)[1] + torch.linalg.qr(second)[1].sin()

    traced, x = make_traced(fn, executor=("llvm", "aten")), torch.randn(2, 6, 6)
    torch.testing.assert_close(traced(x), fn(x))
    qr, unbind = "aten.linalg_qr.default", "aten.unbind.int"
    (library,) = [names for _, names in regions(traced.explain(x)) if qr in names]
    assert unbind in library
