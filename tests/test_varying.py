"""Numbers that keep changing from call to call become inputs of a program, wherever that needs no value."""

import gc
import json
import logging
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from primexec import make_traced

X = torch.tensor([0.5, 1.5, -0.25, 3.0])
VALUES = [0.3, 1.5, -0.7, 2.25, 1e-3, 0.0, 40.0, -3.0]
FIRST = 4  # three programs with constants, and the one that takes the number


def scaled(x: Tensor, a: float) -> Tensor:
    return torch.tanh(x * a + 1) / (a * a + 1)


def chosen(x: Tensor, a: float) -> list[Tensor]:
    return [
        x.clamp(max=a), torch.where(x > a, x, a), x.masked_fill(x < a, a), torch.lerp(x, x * 2, a), x.add(x, alpha=a),
        a - x, x - a, x == a, x.double() * a, x.bfloat16() * a, (x > 0).float() * a, x.long() + a,
        x.half().clamp(min=a), torch.where(x > 0, a, x), x.add(x, alpha=1 - a), torch.full((2,), a),
        x**2 * a, x.clamp(min=-a, max=a + 1),
        x[0] * a, x[0].bfloat16() * a, x.relu().add_(x, alpha=-a), x.relu().sub_(x, alpha=a),
        torch.tensor([a, 1.0]), x.sum() / (a * 2 - 1e-4),
    ]  # fmt: skip


def divided(x: Tensor, a: float) -> list[Tensor]:
    return [torch.where(x > a, x, a) * (1 / (a + 3.5)), x + a // 7 * 2, x * (a % 0.3), (x - 2.0**a) * abs(a)]


def returned(x: Tensor, a: float) -> dict[str, Any]:
    return {"a": a, "twice": a * 2, "is float": isinstance(a, float), "x": x + a}


def in_containers(x: Tensor, options: dict[str, Any]) -> Tensor:
    return x * options["scale"] + options["more"][0]


def same(traced: Any, eager: Any, exact: bool) -> None:
    tolerance = {"rtol": 0, "atol": 0} if exact else {}
    torch.testing.assert_close(traced, eager, equal_nan=True, **tolerance)  # type: ignore[arg-type]
    kinds = [[type(v) for v in torch.utils._pytree.tree_leaves(of)] for of in (traced, eager)]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("executor", ["aten", "auto"])
@pytest.mark.parametrize("fn", [scaled, chosen, divided, returned], ids=lambda f: f.__name__)
def test_arguments(fn: Callable[..., Any], executor: str) -> None:
    traced = make_traced(fn, executor=executor)
    for a in VALUES:
        same(traced(X, a), fn(X, a), executor == "aten")
    assert traced.cache_info().traces == FIRST


@pytest.mark.parametrize("executor", ["aten", "auto"])
def test_integers(executor: str) -> None:
    def fn(x: Tensor, n: int) -> list[Any]:
        i = x.long()
        return [
            x * n,
            n - i,
            i * n,
            i // 2 + n,
            i / 3 * n,
            i.to(torch.int8) + n,
            i > n,
            i.clamp(max=n),
            n + 1,
            x / (n * 2 + 1),
        ]

    traced = make_traced(fn, executor=executor)
    for n in [3, -2, 7, 100, 1, 0, -9, 300]:
        same(traced(X, n), fn(X, n), executor == "aten")
    assert traced.cache_info().traces == FIRST
    same(traced(X, 1 << 40), fn(X, 1 << 40), executor == "aten")


def test_what_is_beside_them_counts_as_before() -> None:
    traced = make_traced(in_containers)
    for i, scale in enumerate(VALUES):
        options = {"scale": scale, "more": [2, "name"]}
        same(traced(X, options), in_containers(X, options), False)
        assert traced.cache_info().traces == min(i + 1, FIRST)
    for more in (3, 4):
        options = {"scale": 0.1, "more": [more, "name"]}
        same(traced(X, options), in_containers(X, options), False)
    assert traced.cache_info().traces == FIRST + 2
    for scale in (0.2, 0.4):  # it is an input in programs that differ otherwise, too
        same(traced(X, options | {"scale": scale}), in_containers(X, options | {"scale": scale}), False)
    assert traced.cache_info().traces == FIRST + 2
    for more in (5, 6, 7, 8):
        options = {"scale": more / 3, "more": [more, "name"]}
        same(traced(X, options), in_containers(X, options), False)
    assert traced.cache_info().traces == FIRST + 3


@pytest.mark.filterwarnings("ignore::primexec.RetraceWarning")
@pytest.mark.parametrize("executor", ["aten", "auto"])
def test_other_kinds_are_programs_of_their_own(executor: str) -> None:
    traced = make_traced(scaled, executor=executor)
    for a in VALUES:
        traced(X, a)
    others: list[Any] = [2, True, math.nan, math.inf, 1e300, -1e39]
    for i, a in enumerate(others):
        same(traced(X, a), scaled(X, a), executor == "aten")
        assert traced.cache_info().traces == FIRST + i + 1
        same(traced(X, i / 7), scaled(X, i / 7), executor == "aten")
    same(traced(X, 0.123), scaled(X, 0.123), executor == "aten")
    assert traced.cache_info().traces == FIRST + len(others)


def loops(x: Tensor, a: float) -> Tensor:
    return sum((x * i for i in range(round(abs(a)))), x)


def cuts(x: Tensor, a: float) -> Tensor:
    return x[: int(a)] * a


def prints(x: Tensor, a: float) -> Any:
    return {f"scale {a}": x * a}


def asks_for_the_type(x: Tensor, a: float) -> Tensor:
    return x * a if type(a) == float else x  # noqa: E721


def makes_another_of_its_type(x: Tensor, a: float) -> Tensor:
    return x * type(a)("0.5") + a


def asks_for_types_in_a_list(x: Tensor, a: float) -> Tensor:
    return x * a if {type(v).__name__ for v in (1, a)} == {"int", "float"} else x


def asks_for_the_type_of_a_part(x: Tensor, a: float) -> Tensor:
    return x * a if type((a,)[0]).__name__ == "float" else x


def asks_for_attributes(x: Tensor, a: float) -> Tensor:
    return x * getattr(a, "real", 2.0) if hasattr(a, "is_integer") else x


def asks_for_symbols(x: Tensor, a: float) -> Tensor:
    return x if isinstance(a, torch.SymFloat) else x * a


def reckons_with_numpy(x: Tensor, a: float) -> Tensor:
    try:
        return x * float(np.float64(2) * a)
    except TypeError:
        return x


def logs(x: Tensor, a: float) -> Tensor:
    logging.getLogger("primexec.tests").error("scale %f", a)
    return x * a


def asks_torch(x: Tensor, a: float) -> Tensor:
    return nn.functional.dropout(x, abs(a) / 100, training=False) * math.exp(a)


NEEDED = [
    loops, cuts, prints, asks_for_the_type, makes_another_of_its_type, asks_for_types_in_a_list,
    asks_for_the_type_of_a_part, asks_for_attributes, asks_for_symbols, reckons_with_numpy, logs,
    asks_torch,
]  # fmt: skip


@pytest.mark.parametrize("fn", NEEDED, ids=lambda f: f.__name__)
def test_values_that_are_needed_stay_constants(
    fn: Callable[..., Any], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    traced = make_traced(fn)
    for a in VALUES[:6]:
        same(traced(X, a), fn(X, a), False)
    assert traced.cache_info().traces == 6
    assert "Logging error" not in capsys.readouterr().err


def test_types_of_others_are_no_concern() -> None:
    def fn(x: Tensor, a: float, others: list[Any]) -> Tensor:
        if len(others) != 2:
            raise ValueError(f"two others, not {type(others[0]).__name__}")
        return x * a if type(others).__name__ == "list" else x

    traced = make_traced(fn)
    for a in VALUES:
        same(traced(X, a, [1, "b"]), fn(X, a, [1, "b"]), False)
    assert traced.cache_info().traces == FIRST


def test_symbols_that_are_asked_for_beside_pythons_numbers() -> None:
    def fn(x: Tensor, a: float) -> Tensor:
        pooled = nn.functional.adaptive_avg_pool2d(x.view(1, 2, 2), 1)  # asks that of the size
        return pooled * a if isinstance(a, (int, torch.SymInt, torch.SymFloat, float)) else pooled

    traced = make_traced(fn)
    for a in VALUES:
        same(traced(X, a), fn(X, a), False)
    assert traced.cache_info().traces == FIRST


@pytest.mark.parametrize("executor", ["aten", "auto"])
def test_errors_are_those_of_eager(executor: str) -> None:
    def fn(x: Tensor, a: float) -> Tensor:
        return x.clamp(max=a * 1e30) + 1 / a

    traced = make_traced(fn, executor=executor)
    for a in (1.0, 2.0, 3.0, 4.0, 5.0):
        same(traced(X, a), fn(X, a), executor == "aten")
    assert traced.cache_info().traces == FIRST
    with pytest.raises(ZeroDivisionError):
        traced(X, 0.0)
    with pytest.raises(RuntimeError, match="without overflow"):
        traced(X, 1e20)


def test_small_caches() -> None:
    traced = make_traced(scaled, cache_size=1)
    for a in VALUES:
        same(traced(X, a), scaled(X, a), False)
    assert traced.cache_info().traces == 2


@pytest.mark.filterwarnings("ignore::primexec.RetraceWarning")
def test_shapes_by_turns() -> None:
    traced = make_traced(scaled)
    for a in VALUES:
        for size in range(1, 12):
            same(traced(X.repeat(size), a), scaled(X.repeat(size), a), False)
    assert traced.cache_info().traces == FIRST * 11


@pytest.mark.parametrize(
    "parameters", [{"executor": "numpy"}, {"executor": "llvm", "executor_parameters": {"strict": True}}], ids=str
)
def test_executors_that_take_tensors_only(parameters: dict[str, Any]) -> None:
    def divided(x: Tensor, a: float) -> Tensor:
        return x / (1 / a)

    for fn, traces in ((scaled, FIRST), (divided, 5)):
        traced = make_traced(fn, **parameters)
        for a in VALUES[:5]:
            same(traced(X, a), fn(X, a), False)
        assert traced.cache_info().traces == traces


@pytest.mark.parametrize("executor", ["aten", "auto"])
def test_errors_that_the_function_handles(executor: str) -> None:
    def fn(x: Tensor, a: float) -> Tensor:
        try:
            return x * (1 / a)
        except ZeroDivisionError:
            return x

    traced = make_traced(fn, executor=executor)
    for a in VALUES:
        same(traced(X, a), fn(X, a), executor == "aten")
    assert traced.cache_info().traces == FIRST


def test_nothing_keeps_programs() -> None:
    model = nn.Linear(4, 2)

    def graphs() -> int:
        gc.collect()
        return sum(type(o) is fx.Graph for o in gc.get_objects())

    def run() -> None:
        traced = make_traced(lambda x, a: torch.tanh(model(x) * a) * a)
        for a in VALUES[:5]:
            traced(X, a).sum().backward()

    before = graphs()
    run()
    assert graphs() == before


@pytest.mark.parametrize("executor", ["aten", "auto"])
def test_gradients(executor: str) -> None:
    model = nn.Linear(4, 2)

    def fn(x: Tensor, a: float) -> Tensor:
        return (torch.tanh(model(x) * a) * (1 - a)).square().sum()

    traced = make_traced(fn, executor=executor)
    for a in VALUES:
        found = []
        for run in (traced, fn):
            x = X.clone().requires_grad_()
            found.append(torch.autograd.grad(run(x, a), [x, *model.parameters()]))
        same(found[0], found[1], executor == "aten")
    assert traced.cache_info().traces == FIRST


NUMBERS = st.recursive(
    st.sampled_from(["a", "b", "2", "0.5", "3.0"]),
    lambda e: (
        st.tuples(st.sampled_from(["+", "-", "*"]), e, e).map(lambda t: f"({t[1]} {t[0]} {t[2]})") | e.map("-{}".format)
    ),
    max_leaves=5,
)
OPERATORS = [
    "({} * {})", "({} + {})", "({} - {})", "({} > {})", "torch.add({0}, {0}, alpha={1})", "torch.where(x > 0, {}, {})",
    "{}.masked_fill(x > 1, {})", "{}.clamp(min={})",
]  # fmt: skip
TENSORS = st.recursive(
    st.sampled_from(["x", "x.double()", "x.long()", "x[0]", "x.bfloat16()"]),
    lambda e: (
        st.tuples(st.sampled_from(OPERATORS), e, NUMBERS).map(lambda t: t[0].format(t[1], t[2]))
        | e.map("torch.sin({})".format)
    ),
    max_leaves=4,
)  # fmt: skip


@settings(max_examples=40, deadline=None)
@given(expression=TENSORS)
def test_as_eager(expression: str) -> None:
    fn = eval(f"lambda x, a, b: {expression}", {"torch": torch})
    for executor in ("aten", "auto"):
        traced = make_traced(fn, executor=executor)
        for a, b in [(0.3, 2), (1.5, 3), (-0.7, -1), (2.25, 7), (0.0, 0), (0.1, 1)]:
            try:
                expected = fn(X, a, b)
            except (RuntimeError, TypeError) as error:
                with pytest.raises(type(error)):
                    traced(X, a, b)
            else:
                same(traced(X, a, b), expected, executor == "aten")


def test_errors_that_stand_ins_cause_are_not_handled() -> None:
    def fn(x: Tensor, a: float) -> Tensor:
        try:
            json.dumps({"a": a})
        except TypeError:
            return x
        return x * a

    traced = make_traced(fn)
    for i in range(6):
        assert torch.equal(traced(X, i / 2), X * (i / 2))


@pytest.mark.parametrize("name", ["node", "symbol", "as_pytorch_has_it", "__dict__", "is_integer", "real", "shape"])
def test_stand_ins_have_the_attributes_of_numbers(name: str) -> None:
    def fn(x: Tensor, a: float) -> Any:
        return x * a, hasattr(a, name), getattr(a, name, None) is None, name in dir(a)

    traced = make_traced(fn)
    for value in VALUES[:6]:
        same(traced(X, value), fn(X, value), exact=False)
