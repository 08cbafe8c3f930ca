"""Inside somebody else's trace or transform a traced function runs inline, and afterwards as ever."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from primexec import make_traced

# torch's own: forward mode scripts decompositions when it is used for the first time.
pytestmark = pytest.mark.filterwarnings("ignore:.*torch.jit.*deprecated:DeprecationWarning")
X = torch.arange(1.0, 7.0).reshape(2, 3)


def function(x: Tensor) -> Tensor:
    return (x.sin() * x).sum(-1)


class Recorder(TorchDispatchMode):
    """Notes every operator that runs."""

    def __init__(self) -> None:
        super().__init__()
        self.ops: list[str] = []

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.ops.append(str(op))
        return op(*args, **(kwargs or {}))


class Calls(TorchFunctionMode):
    """Notes every call of torch's API."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_function__(self, fn: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(getattr(fn, "__name__", str(fn)))
        return fn(*args, **(kwargs or {}))


def under_dispatch_mode(fn: Callable[[Tensor], Tensor]) -> Any:
    with Recorder() as seen:
        return fn(X), seen.ops


def under_function_mode(fn: Callable[[Tensor], Tensor]) -> Any:
    with Calls() as seen:
        out = fn(X)
    return out, seen.names


def under_fake_mode(fn: Callable[[Tensor], Tensor]) -> Any:
    with torch._subclasses.FakeTensorMode() as mode:
        out = fn(mode.from_tensor(X))
    return type(out).__name__, out.shape


def with_fake_tensor(fn: Callable[[Tensor], Tensor]) -> Any:
    mode = torch._subclasses.FakeTensorMode()
    return type(fn(mode.from_tensor(X))).__name__


def forward_mode(fn: Callable[[Tensor], Tensor]) -> Any:
    forward_ad = torch.autograd.forward_ad
    with forward_ad.dual_level():
        return tuple(forward_ad.unpack_dual(fn(forward_ad.make_dual(X, torch.ones_like(X)))))


INLINE: dict[str, Callable[[Callable[[Tensor], Tensor]], Any]] = {
    "vmap": lambda fn: torch.vmap(fn)(X),
    "grad": lambda fn: torch.func.grad(lambda x: fn(x).sum())(X),
    "jacrev": lambda fn: torch.func.jacrev(fn)(X),
    "jvp": lambda fn: torch.func.jvp(fn, (X,), (torch.ones_like(X),)),
    "hessian": lambda fn: torch.func.hessian(lambda x: fn(x).sum())(X),
    "grad of vmap": lambda fn: torch.func.grad(lambda x: torch.vmap(fn)(x).sum())(X),
    "functionalize": lambda fn: torch.func.functionalize(fn)(X),
    "forward mode": forward_mode,
    "make_fx": lambda fn: make_fx(fn)(X).code,
    "make_fx symbolic": lambda fn: make_fx(fn, tracing_mode="symbolic")(X).code,
    "export": lambda fn: str(torch.export.export(Wrapper(fn), (X,)).graph_module.code).replace("self", ""),
    "fake mode": under_fake_mode,
    "fake tensor": with_fake_tensor,
    "dispatch mode": under_dispatch_mode,
    "function mode": under_function_mode,
}


class Wrapper(nn.Module):
    def __init__(self, fn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fn = fn

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(x)


def same(a: Any, b: Any) -> bool:
    leaves = torch.utils._pytree.tree_leaves
    pairs = list(zip(leaves(a), leaves(b), strict=True))
    return all(torch.equal(p, q) if isinstance(p, Tensor) else p == q for p, q in pairs)


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
@pytest.mark.parametrize("run", INLINE.values(), ids=INLINE)
def test_inline(run: Callable[[Callable[[Tensor], Tensor]], Any], warm: bool) -> None:
    traced = make_traced(function)
    if warm:
        for x in (X, X[0]):
            traced(x)
    before = traced.cache_info()
    assert same(run(traced), run(function))
    assert traced.cache_info() == before
    for x in (X, X[0]):
        assert torch.equal(traced(x), function(x))
    assert traced.cache_info().traces == 2


@pytest.mark.parametrize("run", ["vmap", "grad", "jvp", "make_fx", "dispatch mode", "fake mode"])
def test_traced_module_inline(run: str) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(3, 3), nn.Tanh()).requires_grad_(False)
    traced = make_traced(module)
    if "fake" in run:
        with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True):
            assert type(traced(X)).__name__ == "FakeTensor"
    else:
        assert same(INLINE[run](lambda x: traced(x)), INLINE[run](lambda x: module(x)))
    assert traced.cache_info()[:3] == (0, 0, 0)
    assert torch.equal(traced(X), module(X))


def test_torchscript_trace() -> None:
    traced = make_traced(function)
    script = torch.jit.trace(lambda x: traced(x) + 1, (X,), check_trace=False)
    assert traced.cache_info()[:3] == (0, 0, 0)
    assert torch.equal(script(X + 1), function(X + 1) + 1)
    assert "sin" in str(script.graph)


@pytest.mark.parametrize("options", [{}, {"executor": "aten"}], ids=["plain", "executor"])
def test_dynamo(options: dict[str, Any]) -> None:
    traced = make_traced(function)
    graphs: list[list[str]] = []

    def backend(gm: torch.fx.GraphModule, inputs: Any) -> Any:
        graphs.append([n.name for n in gm.graph.nodes if n.op in ("call_function", "call_method")])
        return gm.forward

    torch.compiler.reset()
    compiled = torch.compile(lambda x: traced(x, **options) + 1, backend=backend, fullgraph=True)
    assert torch.equal(compiled(X), function(X) + 1)
    assert graphs == [["sin", "mul", "sum_1", "add"]]
    assert traced.cache_info()[:3] == (0, 0, 0)


def test_dynamo_of_a_traced_module() -> None:
    module = nn.Linear(3, 3).requires_grad_(False)
    traced = make_traced(module)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: traced(x) + 1, backend="eager", fullgraph=True)
    assert torch.equal(compiled(X), module(X) + 1)
    assert traced.cache_info()[:3] == (0, 0, 0)


def test_traced_function_inside_a_traced_function() -> None:
    inner = make_traced(function)
    module = make_traced(nn.BatchNorm1d(3))
    outer = make_traced(lambda x: module(inner(x.unsqueeze(-1)) + 1))
    eager = nn.BatchNorm1d(3)
    with torch.no_grad():
        for _ in range(3):
            assert torch.equal(outer(X), eager(function(X.unsqueeze(-1)) + 1))
    assert torch.equal(module.running_mean, eager.running_mean)
    assert outer.cache_info()[:3] == (2, 1, 1)
    assert inner.cache_info()[:3] == module.cache_info()[:3] == (0, 0, 0)


def test_state_of_an_inner_traced_function_is_guarded() -> None:
    factor = 2.0
    inner = make_traced(lambda x: x * factor)
    outer = make_traced(lambda x: inner(x) + 1)
    assert torch.equal(outer(X), X * 2 + 1)
    factor = 3.0
    assert torch.equal(outer(X), X * 3 + 1)
    assert outer.cache_info()[:3] == (0, 2, 2)


def test_transform_inside_a_traced_function() -> None:
    traced = make_traced(lambda x: torch.vmap(function)(x.unsqueeze(1)))
    for x in (X, X + 1):
        assert torch.equal(traced(x), torch.vmap(function)(x.unsqueeze(1)))
    assert traced.cache_info()[:3] == (1, 1, 1)


def test_trace_inside_a_transform_says_so() -> None:
    traced = make_traced(function)
    with pytest.raises(RuntimeError, match="inside another trace or transform"):
        torch.vmap(lambda x: traced.trace(x))(X)
    with Recorder():
        assert "runs inline" in str(traced.explain(X))
