"""Parameters that autograd, torch.func or control flow meets before any operator does: their gradients are eager's."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functionalize, grad, hessian, jacfwd, jacrev, jvp, vjp
from torch.utils import checkpoint

from primexec import CaptureError, make_traced
from tests.programs.table import draw


class Scale(torch.autograd.Function):
    """In the style of old: the context is an argument of forward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.name = "scale"  # a node of autograd has a method of this name
        return x * w

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, w = ctx.saved_tensors
        return gradient * w, gradient * x


scale = Scale.apply


class Product(Scale):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, w: Tensor) -> Tensor:
        return x * w

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Tensor) -> None:
        ctx.save_for_backward(*inputs)


class Detoured(Scale):
    """Its backward pass runs another one, for tensors of its own."""

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, w = (t.detach().requires_grad_() for t in ctx.saved_tensors)
        with torch.enable_grad():
            (x * w).backward(gradient)
        return x.grad, w.grad


class Hidden(torch.autograd.Function):
    """Its backward pass runs another one, which reaches the parameter itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor) -> Tensor:
        ctx.x, ctx.w = x.detach(), w
        return x * w.detach()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x = ctx.x.requires_grad_()
        with torch.enable_grad():
            (x * ctx.w).backward(gradient)
        return x.grad, None


def dual(x: Tensor, w: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual((forward_ad.make_dual(w, torch.ones(3)) * x).sin()).tangent


def adapted(x: Tensor, w: Tensor) -> Tensor:
    """One step of gradient descent, and what is computed with the weight after it."""
    return (x * (w - 0.1 * grad(lambda w: (w * x).sin().sum())(w))).sin()


def retained(x: Tensor, w: Tensor) -> Tensor:
    y = x * w
    y.retain_grad()
    return y.sin()


def activations(x: Tensor, w: Tensor) -> Any:
    y = x * w
    y.retain_grad()
    (loss := y.sin().sum()).backward(retain_graph=True)
    return y.grad, loss


ONES = torch.ones(2, 3)
FUNCTIONS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "function": lambda x, w: Scale.apply(x, w),
    "function under another name": lambda x, w: scale(x, w),
    "function by keyword": lambda x, w: Product.apply(x, w=w),
    "function and operator": lambda x, w: w * x + Scale.apply(x, w),
    "function with a backward pass inside": lambda x, w: Detoured.apply(x, w),
    "function in vmap": lambda x, w: torch.vmap(lambda x: Product.apply(x, w))(x),
    "vmap": lambda x, w: torch.vmap(lambda x: x * w)(x),
    "vmap and operator": lambda x, w: x * w + torch.vmap(lambda x: x * w)(x),
    "vmap over the parameter": lambda x, w: torch.vmap(lambda w: x * w)(w),
    "vmap, parameter shared": lambda x, w: torch.vmap(torch.mul, (0, None))(x, w),
    "vmap in chunks": lambda x, w: torch.vmap(lambda x: x * w, chunk_size=1)(x),
    "vmap, layer norm": lambda x, w: torch.vmap(lambda x: nn.functional.layer_norm(x, (3,), w))(x),
    "grad": lambda x, w: grad(lambda x: (x * w).sin().sum())(x),
    "grad by the parameter": lambda x, w: grad(lambda w: (x * w).sin().sum())(w),
    "grad of grad": lambda x, w: grad(lambda a: grad(lambda b: (a * b * w).sin().sum())(a).sum())(x),
    "vmap of grad": lambda x, w: torch.vmap(grad(lambda w, x: (x * w).sin().sum()), (None, 0))(w, x),
    "adapted": adapted,
    "jvp": lambda x, w: jvp(lambda x: (x * w).sin(), (x,), (ONES,)),
    "jvp along the parameter": lambda x, w: jvp(lambda w: (x * w).sin(), (w,), (w,)),
    "vjp": lambda x, w: vjp(lambda x: (x * w).sin(), x)[1](ONES.to(x)),
    "vjp by the parameter": lambda x, w: vjp(lambda w: (x * w).sin(), w)[1](ONES.to(x)),
    "jacrev": lambda x, w: jacrev(lambda w: (x * w).sin())(w),
    "jacfwd": lambda x, w: jacfwd(lambda w: (x * w).sin())(w),
    "hessian": lambda x, w: hessian(lambda x: (x * w).sin().sum())(x),
    "functionalize": lambda x, w: functionalize(lambda w: x * w)(w),
    "dual numbers": dual,
    "checkpoint": lambda x, w: checkpoint.checkpoint(lambda x: (x * w).sin(), x, use_reentrant=False),
    "operator by name": lambda x, w: torch.ops.aten.mul.Tensor(x, w),
    "autograd.grad": lambda x, w: torch.autograd.grad(
        torch.vmap(lambda x: x * w)(x).sin().sum(), [w], create_graph=True
    ),
    "backward of vmap": lambda x, w: torch.vmap(lambda x: x * w)(x).sum().backward(),
    "backward of a function": lambda x, w: Scale.apply(x, w).sum().backward(),
    "backward in backward": lambda x, w: Hidden.apply(x * 2, w).sum().backward(),
    "gradient retained": retained,
    "gradient retained and read": activations,
}


class Model(nn.Module):
    def __init__(self, function: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.function, self.w = function, nn.Parameter(draw(1, 3))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.w)


def of_closure(function: Callable[[Tensor, Tensor], Any]) -> tuple[Any, Tensor]:
    w = draw(1, 3).requires_grad_()
    return lambda x: function(x, w), w


def of_module(function: Callable[[Tensor, Tensor], Any]) -> tuple[Any, Tensor]:
    return (model := Model(function)), model.w


def train(run: Any, w: Tensor, x: Tensor) -> Any:
    found: list[Any] = []
    for reduce in (torch.sum, torch.Tensor.square):  # gradients with strides of zero, and dense ones
        out = run(x)
        roots = [t for t in torch.utils._pytree.tree_leaves(out) if isinstance(t, Tensor) and t.requires_grad]
        if roots:
            sum(reduce(t).sum() for t in roots).backward()  # type: ignore[union-attr]
        found.append((out, w.grad, x.grad))
        assert type(w.grad) in (Tensor, type(None))
    return found


@pytest.mark.parametrize(("make", "needs_grad"), [(of_closure, True), (of_module, False)])
@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated", "ignore:We currently have a fallback routine")
def test_gradients(name: str, make: Callable[..., tuple[Any, Tensor]], needs_grad: bool) -> None:
    fn, w = make(FUNCTIONS[name])
    expected = train(fn, w, draw(2, 2, 3).requires_grad_(needs_grad))
    fn, w = make(FUNCTIONS[name])
    traced = make_traced(fn)
    torch.testing.assert_close(train(traced, w, draw(2, 2, 3).requires_grad_(needs_grad)), expected)
    assert traced.cache_info().hits == 1 or "backward" in name or name == "gradient retained and read"


def branches(x: Tensor, w: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x: x * w, lambda x: x - w, (x,))


def operands(x: Tensor, w: Tensor) -> Tensor:
    return torch.cond(x.sum() > 0, lambda x, w: x * w, lambda x, w: x - w, (x, w))


def returned(x: Tensor, w: Tensor) -> Any:
    y = x * w
    y.retain_grad()
    return y, y.sin()


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (branches, "control flow of tensors that require grad"),
        (operands, "control flow of tensors that require grad"),
        (lambda x, w: torch.vmap(hessian(lambda x: (x * w).sin().sum()))(x), "zeros without memory"),
        (returned, r"retain_grad\(\)"),
        (lambda x, w: Hidden.apply(x * 2, w), r"backward\(\) is called in a backward pass"),
    ],
)
@pytest.mark.parametrize("make", [of_closure, of_module])
@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_refused(function: Any, message: str, make: Callable[..., tuple[Any, Tensor]]) -> None:
    fn, w = make(function)
    x = draw(2, 2, 3).requires_grad_()
    with pytest.raises(CaptureError, match=message) as error:
        make_traced(fn)(x)
    assert "test_entrances.py" in str(error.value)
    assert x.grad is None
    assert w.grad is None


@pytest.mark.parametrize("make", [of_closure, of_module])
def test_control_flow_without_grad(make: Callable[..., tuple[Any, Tensor]]) -> None:
    for function in (branches, operands):
        fn, _ = make(function)
        traced = make_traced(fn)
        with torch.no_grad():
            for x in (draw(2, 2, 3), -draw(2, 2, 3)):
                assert torch.equal(traced(x), fn(x))
        assert traced.cache_info().traces == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
def test_a_parameter_that_compiled_code_sees_first() -> None:
    compiled = torch.jit.script(product_of)
    fn, w = of_closure(compiled)
    with pytest.raises(CaptureError, match="before any recorded operator"):
        make_traced(fn)(draw(2, 3))
    fn, w = of_closure(lambda x, w: compiled(x, w.clone()))
    make_traced(fn)(x := draw(2, 3)).sum().backward()
    assert w.grad is not None
    assert torch.equal(w.grad, x)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script.* is deprecated")
@pytest.mark.parametrize("executor", ["aten", ("llvm", "aten")], ids=["aten", "llvm"])
def test_dimensions_of_size_one_in_compiled_code(executor: Any) -> None:
    compiled = torch.jit.script(softened)
    traced = make_traced(compiled, executor=executor)
    for rows in (1, 2, 1):
        x, w = torch.randn(rows, 3), torch.randn(1, 3)
        torch.testing.assert_close(traced(x, w), softened(x, w))
    assert traced.cache_info().traces == 2


def softened(x: Tensor, w: Tensor) -> Tensor:
    return torch.layer_norm(torch.softmax(x * w + x.sum(0, keepdim=True), 1), [3]).unsqueeze(0).clone()


def product_of(x: Tensor, w: Tensor) -> Tensor:
    return x * w
