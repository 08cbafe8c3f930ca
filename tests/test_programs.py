"""Every program of tests/programs, traced, against eager; and traced functions that call one another."""

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import primexec
from tests import harness
from tests.programs import PROGRAMS, REFUSED
from tests.programs.raises import FILE
from tests.programs.table import Program, draw, tensors


def name_of(program: Program) -> str:
    return program.name


@pytest.mark.parametrize("program", PROGRAMS, ids=name_of)
def test_same_as_eager(program: Program) -> None:
    harness.compare(program)


@pytest.mark.parametrize("program", PROGRAMS, ids=name_of)
def test_llvm_is_close_to_eager(program: Program) -> None:
    with harness.rounding():
        harness.compare(program, ("llvm", "aten"))


@pytest.mark.parametrize("program", REFUSED, ids=name_of)
def test_refused(program: Program) -> None:
    harness.refuses(program, FILE)


def test_names_are_unique() -> None:
    names = [program.name for program in [*PROGRAMS, *REFUSED]]
    assert len(names) == len(set(names))


def compare(function: Any, **options: Any) -> None:
    inputs = options.pop("inputs", tensors((3, 4)))
    harness.compare(Program(name="here", make=lambda: function, inputs=inputs, **options))


def test_traced_calls_traced() -> None:
    inner = primexec.make_traced(lambda x: (x.add_(1), x.t()))

    def outer(x: Tensor) -> Any:
        written, view = inner(x)
        return written, view, inner(x * 2)

    compare(outer)


def test_inner_runs_inline() -> None:
    inner = primexec.make_traced(lambda x: x + 1)
    outer = primexec.make_traced(lambda x: inner(x) * inner(x))
    x = draw(0, 3)
    assert torch.equal(outer(x), (x + 1) * (x + 1))
    assert inner.cache_info().traces == 0
    assert outer.cache_info().traces == 1


def test_traced_calls_itself() -> None:
    @primexec.make_traced
    def power(x: Tensor, n: int) -> Tensor:
        return x if n == 0 else x * power(x, n - 1)

    x = draw(0, 3)
    assert torch.equal(power(x, 3), x * (x * (x * x)))
    assert power.cache_info().traces == 1


def test_traced_module_within_a_module() -> None:
    torch.manual_seed(0)
    layer = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    plain = nn.Sequential(layer, nn.ReLU())
    swapped = nn.Sequential(primexec.make_traced(layer), nn.ReLU())
    x = draw(0, 3, 4)
    with torch.no_grad():
        before = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        expected = plain(x)
        after = {name: buffer.clone() for name, buffer in layer.named_buffers()}
        for name, buffer in layer.named_buffers():
            buffer.copy_(before[name])
        assert torch.equal(swapped(x), expected)
    for name, buffer in layer.named_buffers():
        assert torch.equal(buffer, after[name])
    compare(primexec.make_traced(layer).eval(), contexts=(torch.no_grad,))


def test_traced_of_traced() -> None:
    compare(primexec.make_traced(lambda x: x * 2))


class Scaled:
    def __init__(self, scale: float) -> None:
        self.scale = scale

    @primexec.make_traced
    def times(self, x: Tensor) -> Tensor:
        return x * self.scale


def test_decorated_methods_do_not_mix() -> None:
    x = draw(0, 3)
    two, three = Scaled(2.0), Scaled(3.0)
    for _ in range(2):
        assert torch.equal(two.times(x), x * 2)
        assert torch.equal(three.times(x), x * 3)
    two.scale = 5.0
    assert torch.equal(two.times(x), x * 5)


def test_partial_of_traced() -> None:
    traced = primexec.make_traced(lambda x, y, *, k: (x - y) * k)
    x, y = draw(0, 3), draw(1, 3)
    assert torch.equal(functools.partial(traced, x, k=2)(y), (x - y) * 2)


@pytest.mark.parametrize(
    "transform",
    [
        lambda f, x: torch.vmap(f)(x),
        lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
        lambda f, x: torch.func.jvp(f, (x,), (x,)),
        lambda f, x: torch.func.jacrev(f)(x),
        lambda f, x: torch.func.functionalize(f)(x),
    ],
    ids=["vmap", "grad", "jvp", "jacrev", "functionalize"],
)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_transforms_run_inline(transform: Any, warm: bool) -> None:
    def function(x: Tensor) -> Tensor:
        return x.sin() * 2

    traced = primexec.make_traced(function)
    x = draw(0, 3)
    if warm:
        traced(x)
    for got, want in zip(transform(traced, x), transform(function, x), strict=True):
        assert torch.equal(got, want)
    assert traced.cache_info().traces == warm
    assert traced.cache_info().hits == 0


class Noting(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(func))
        return func(*args, **kwargs or {})


def test_a_dispatch_mode_of_the_users_sees_the_operators() -> None:
    traced = primexec.make_traced(lambda x: x.sin() + 1)
    x = draw(0, 3)
    with Noting() as mode:
        traced(x)
    assert mode.names == ["aten.sin.default", "aten.add.Tensor"]
    assert traced.cache_info().traces == 0


def test_hooks_of_all_modules() -> None:
    """A hook on every module there is, registered and removed between calls, is seen."""
    module = nn.Linear(4, 4).requires_grad_(False)
    traced = primexec.make_traced(module)
    x = draw(0, 3, 4)
    plain = module(x)
    assert torch.equal(traced(x), plain)
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, out: out + 100)
    try:
        assert torch.equal(traced(x), plain + 100)
    finally:
        handle.remove()
    assert torch.equal(traced(x), plain)


def test_what_came_back_is_the_callers() -> None:
    """Writing to an output, or to a container that came back, changes no later call."""

    def function(x: Tensor) -> Any:
        return {"y": x + 1, "constant": torch.tensor([1.0, 2.0]), "list": [x, []], "sizes": [x.shape[0]]}

    traced = primexec.make_traced(function)
    for i in range(3):
        x = draw(i, 3)
        out = traced(x)
        assert torch.equal(out["y"], x + 1)
        assert out["constant"].tolist() == [1.0, 2.0]
        assert out["list"][0] is x
        assert out["list"][1] == []
        assert out["sizes"] == [3]
        out["y"].zero_()
        out["constant"].zero_()
        out["list"][1].append(1)
        out["sizes"].append(2)
        out["z"] = 0
