"""How traced programs and their backward programs fit together; what models and operators do is tested elsewhere."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from primexec import make_traced
from primexec.autograd import Training

X = torch.linspace(-2, 2, 24).reshape(4, 6)


def leaf(value: Tensor = X) -> Tensor:
    return value.clone().requires_grad_()


def results_of(out: Any) -> list[Tensor]:
    return list(out) if isinstance(out, tuple) else [out]


def nothing_but_a_view(x: Tensor) -> Any:
    return x.t(), x.view(-1)


def base_and_views(x: Tensor) -> Any:
    made = x.exp()
    return made, made.t(), made.detach(), made[:, 1:3]


def split(x: Tensor) -> Any:
    return (x * 2).chunk(2, 1)


def input_as_result(x: Tensor) -> Any:
    return x, x * 3


def integers_too(x: Tensor) -> Any:
    return x.sin(), x.argmax(1)


def without_grad_inside(x: Tensor) -> Any:
    with torch.no_grad():
        largest = x.abs().max()
    return x / largest


def changed_inside(x: Tensor) -> Any:
    made = x * 2
    made.add_(1)
    made[:, 0] = 5
    return made.relu_()


ALIASES = [
    nothing_but_a_view, base_and_views, split, input_as_result, integers_too, without_grad_inside, changed_inside,
]  # fmt: skip


@pytest.mark.parametrize("fn", ALIASES, ids=lambda f: f.__name__)
def test_results_as_eager_makes_them(fn: Callable[[Tensor], Any]) -> None:
    traced = make_traced(fn)
    for _ in range(2):
        inputs = leaf(), leaf()
        eager, ours = (results_of(f(x)) for f, x in zip((fn, traced), inputs, strict=True))
        for a, b in zip(eager, ours, strict=True):
            assert torch.equal(a, b)
            assert (a.requires_grad, a._is_view(), a.is_leaf) == (b.requires_grad, b._is_view(), b.is_leaf)
            assert a.data_ptr() - eager[0].data_ptr() == b.data_ptr() - ours[0].data_ptr() or not a._is_view()
        for out in (eager, ours):
            sum(r.sin().sum() for r in out if r.requires_grad).backward()  # type: ignore[union-attr]
        assert torch.equal(inputs[0].grad, inputs[1].grad)  # type: ignore[arg-type]
    assert traced.cache_info()[:3] == (1, 1, 1)


def test_a_gradient_that_is_absent_is_not_zero() -> None:
    traced = make_traced(lambda x: (x.log(), x * 2))
    x = leaf(torch.zeros(3))
    traced(x)[1].sum().backward()  # 0 * (1 / 0) would be NaN
    assert torch.equal(x.grad, torch.full((3,), 2.0))  # type: ignore[arg-type]


def test_only_the_gradients_that_are_asked_for() -> None:
    traced = make_traced(torch.mul)
    a, b = leaf(), leaf()
    (gradient,) = torch.autograd.grad(traced(a, b), a, torch.ones_like(X))
    assert torch.equal(gradient, X)
    assert b.grad is None


def test_a_backward_pass_computes_only_what_is_asked_for() -> None:
    linear = nn.Linear(6, 3)
    traced = make_traced(linear)
    x = leaf()
    for inputs in ([x], [linear.weight], [x, linear.bias]):
        traced(x).sum().backward(inputs=inputs)  # eager's kernels depend on which gradients are wanted
    asked = {needed for ((_, needed, _),) in training_of(traced, x)._backward}
    assert asked == {(True, False, False), (False, True, False), (True, False, True)}


def test_gradients_of_a_result_whose_size_depends_on_data() -> None:
    traced = make_traced(lambda x, repeats: x.repeat_interleave(repeats, dim=1) * 2)
    for repeats in ([0, 1, 2, 0, 1, 1], [3, 0, 0, 0, 2, 2]):
        for reduce in (torch.sum, lambda y: (y * y).sum()):
            x, mine, counts = leaf(), leaf(), torch.tensor(repeats)
            reduce(x.repeat_interleave(counts, dim=1) * 2).backward()
            reduce(traced(mine, counts)).backward()
            assert torch.equal(mine.grad, x.grad)  # type: ignore[arg-type]
    assert traced.cache_info()[:3] == (3, 1, 1)


def test_loss_of_one_row_is_a_number() -> None:
    """PyTorch's rule for fake tensors makes a vector of it."""
    loss = nn.MultiLabelMarginLoss(reduction="none")
    traced = make_traced(lambda x, y: loss(x, y).unsqueeze(0))
    target = torch.tensor([3, 0, -1, 1, 2, 4])
    x, mine = leaf(X[0]), leaf(X[0])
    expected, actual = loss(x, target).unsqueeze(0), traced(mine, target)
    for y in (expected, actual):
        y.sum().backward()
    assert torch.equal(actual, expected)
    assert torch.equal(mine.grad, x.grad)  # type: ignore[arg-type]


class FlatGradient(torch.autograd.Function):
    """A view, of which a gradient with other strides than eager's raises."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return gradient.view(-1).view(gradient.shape)


LAYERS: dict[str, Callable[[Tensor], Tensor]] = {
    "batch_norm": lambda x: functional.batch_norm(x, None, None, training=True),
    "batch_norm_in_inference": lambda x: functional.batch_norm(x, torch.zeros(4), torch.ones(4)),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": lambda x: x.log_softmax(2),
    "mse_loss": lambda x: functional.mse_loss(x, x.detach() + 1, reduction="none"),
    "smooth_l1_loss": lambda x: functional.smooth_l1_loss(x, x.detach() + 1, reduction="none"),
    "huber_loss": lambda x: functional.huber_loss(x, x.detach() + 1, reduction="none"),
}


@pytest.mark.parametrize("layer", LAYERS)
def test_gradients_have_the_strides_of_their_kernels(layer: str) -> None:
    """PyTorch's rules for fake tensors keep the order of the operand's dimensions."""

    def function(x: Tensor) -> Tensor:
        return LAYERS[layer](FlatGradient.apply(x.transpose(1, 2)))

    results = []
    for fn in (function, make_traced(function)):
        x = leaf(torch.arange(60.0).view(5, 3, 4).sin())
        y = fn(x)
        (y.contiguous().view(-1) * torch.arange(60.0)).sum().backward()
        results.append((y, x.grad))
    torch.testing.assert_close(*results, check_stride=True)


def from_heads(kernel: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Heads in front of positions on the way to a kernel, and a gradient whose dimensions lie in their order."""
    return lambda x: kernel(x.view(2, 3, 2, 2).transpose(1, 2)).contiguous()


def to_heads(kernel: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """The other way round."""
    return lambda x: kernel(x.view(2, 3, 2, 2).transpose(1, 2).contiguous()).transpose(1, 2).contiguous()


POINTWISE: dict[str, Callable[[Tensor], Tensor]] = {
    "softplus": from_heads(functional.softplus),
    "hardsigmoid": from_heads(functional.hardsigmoid),
    "hardswish": from_heads(functional.hardswish),
    "hardtanh": from_heads(functional.hardtanh),
    "logit": from_heads(lambda t: torch.logit(t, eps=0.1)),
    "rrelu": to_heads(lambda t: functional.rrelu(t, training=True)),
    "binary_cross_entropy": to_heads(
        lambda t: functional.binary_cross_entropy(t.sigmoid(), t.detach().abs(), reduction="none")
    ),
}


@pytest.mark.parametrize("layer", POINTWISE)
def test_gradients_of_other_strides_than_their_operand(layer: str) -> None:
    """PyTorch's rules for fake tensors take the strides of the wrong one, and a view of the gradient fails then."""
    results = []
    for fn in (POINTWISE[layer], make_traced(POINTWISE[layer], executor="aten")):
        x = leaf(torch.arange(24.0).view(2, 3, 4).sin())
        torch.manual_seed(0)
        y = fn(x)
        (y * torch.arange(24.0).view(y.shape)).sum().backward()
        results.append((y, x.grad))
    assert all(map(torch.equal, *results))


ZEROS = {"none": [], "one": [(0, 1)], "two": [(0, 1), (2, 3)]}


@pytest.mark.parametrize("zeros", ZEROS)
@pytest.mark.parametrize("dim", [None, 1, -2])
def test_product_chooses_its_formula_by_values(zeros: str, dim: int | None) -> None:
    def product(x: Tensor) -> Tensor:
        return x.prod() if dim is None else x.prod(dim)

    value = X * 2 + 5
    for position in ZEROS[zeros]:
        value[position] = 0
    inputs = leaf(value), leaf(value)
    expected, actual = (fn(x) for fn, x in zip((product, make_traced(product)), inputs, strict=True))
    tangent = torch.tensor(0.1).expand(expected.shape)
    gradients = [torch.autograd.grad(y, x, tangent)[0] for y, x in zip((expected, actual), inputs, strict=True)]
    assert torch.equal(*gradients)
    assert gradients[0].stride() == gradients[1].stride()


class ZeroedGradient(torch.autograd.Function):
    """Its backward makes a tensor of a number."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        gradient = gradient.clone()
        gradient[x < 0] = 7
        return gradient


def test_constants_made_in_backward() -> None:
    """One backward program is recorded with the forward one, the other when its gradients arrive."""
    traced = make_traced(lambda x, y: (ZeroedGradient.apply(x), ZeroedGradient.apply(y) * x))
    for wanted in ((True, True), (False, True), (True, False)):
        found = []
        for fn in (traced, traced.__wrapped__):
            x, y = leaf(X.sin()), leaf(X.cos())
            first, second = fn(x, y)
            taken = [t for t, w in zip((first, second), wanted, strict=True) if w]
            found.append(torch.autograd.grad(taken, (x, y), [t.detach() for t in taken], allow_unused=True))
        torch.testing.assert_close(*found)


class ScaledGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.exp()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradient * scale, None


def test_a_constant_that_is_returned_and_used_in_backward() -> None:
    def function(x: Tensor) -> tuple[Tensor, Tensor]:
        scale = torch.tensor(3.0)
        return ScaledGradient.apply(x, scale), scale

    found = []
    for fn in (make_traced(function), function):
        x = leaf()
        result, scale = fn(x)
        result.sum().backward()
        found.append((result, scale, x.grad))
    torch.testing.assert_close(*found)


def test_gradient_of_a_value_that_is_filled_in() -> None:
    mask = X.sin() > 0
    inputs = [(leaf(), leaf(torch.tensor(2.0))) for _ in range(2)]
    gradients = [
        torch.autograd.grad(fn(x, mask, value), (x, value), X.exp())
        for fn, (x, value) in zip((torch.masked_fill, make_traced(torch.masked_fill)), inputs, strict=True)
    ]
    assert all(torch.equal(*pair) for pair in zip(*gradients, strict=True))


def test_product_inside_a_checkpoint() -> None:
    def function(x: Tensor) -> Any:
        return torch.utils.checkpoint.checkpoint(lambda x: x.sin().prod(1), x, use_reentrant=False)

    inputs = leaf(X + 3), leaf(X + 3)
    for fn, x in zip((function, make_traced(function)), inputs, strict=True):
        fn(x).sum().backward()
    torch.testing.assert_close(inputs[1].grad, inputs[0].grad)


def model() -> nn.Module:
    layers = nn.Linear(6, 6), nn.GELU(), nn.LayerNorm(6), nn.Sigmoid(), nn.Linear(6, 6), nn.Tanh(), nn.Dropout(0.2)
    return nn.Sequential(*layers)


def training_of(traced: Any, *args: Any) -> Training:
    traced(*args)
    found = traced._primexec_traced._cache.entries[0].executable.training
    assert isinstance(found, Training)
    return found


@pytest.mark.parametrize("save", ["less", "default", "more"])
def test_what_is_saved_and_what_is_computed_again(save: str) -> None:
    torch.manual_seed(1)
    eager = model()
    module = copy.deepcopy(eager)
    traced = make_traced(module, executor_parameters={"save": save})
    for seed in range(2):
        for m in (eager, traced):
            torch.manual_seed(seed)
            m(X).square().mean().backward()
    for a, b in zip(eager.parameters(), module.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)  # type: ignore[arg-type]
    ours, theirs = training_of(traced, X).saved_bytes()
    assert ours < theirs if save == "less" else ours == theirs
    assert traced.cache_info() == (2, 1, 1, 2, 0, 1)  # type: ignore[attr-defined]


def test_save_is_checked() -> None:
    with pytest.raises(ValueError, match="'save' must be one of less, default, more, got 'least'"):
        make_traced(model(), executor_parameters={"save": "least"})


def test_explain_shows_both_sides(capsys: pytest.CaptureFixture[str]) -> None:
    traced: Any = make_traced(model())
    shown = str(traced.explain(X))
    assert "region0 on aten: 12 operators" in shown
    assert "backward: region0 on aten" in shown
    assert "saved for backward: " in shown
    assert "gradient_0: f32[4, 6]" in str(traced.trace(X))
    capsys.readouterr()


def test_anomaly_mode_and_inputs_that_are_no_leaves() -> None:
    with torch.autograd.set_detect_anomaly(True):
        x = leaf()
        make_traced(torch.exp)(x * 2).sum().backward()
    assert torch.equal(x.grad, 2 * (X * 2).exp())  # type: ignore[arg-type]


def accumulator(x: Tensor) -> Tensor:
    state = torch.zeros(4)
    outputs = []
    for row in x:
        state = state * 0.5
        state += row
        outputs.append(state.clone())
    return torch.stack(outputs)


def filled(x: Tensor) -> Tensor:
    made = torch.empty(3, 4)
    for i in range(3):
        made[i] = x[i] * i
    return made


MADE_INSIDE: dict[str, Callable[[Tensor], Tensor]] = {
    "accumulator": accumulator,
    "filled": filled,
    "scatter": lambda x: torch.zeros(2, 4).scatter_add_(0, torch.tensor([[0] * 4, [1] * 4, [0] * 4]), x),
    "product": lambda x: torch.full((3, 4), 2.0).mul_(x),
    "detached": lambda x: (x * 2).detach().add_(x),
}


@pytest.mark.parametrize("executor", ["aten", ("llvm", "aten")], ids=str)
@pytest.mark.parametrize("name", MADE_INSIDE)
def test_tensor_made_inside_takes_part_once_it_is_written_to(name: str, executor: Any) -> None:
    fn = MADE_INSIDE[name]
    traced = make_traced(fn, executor=executor)
    results = []
    for run in (fn, traced, traced):
        x = torch.arange(12.0).reshape(3, 4).requires_grad_()
        out = run(x)
        assert not out._is_view()
        out.mul_(3)  # results may be changed in place, as eager's
        out.square().sum().backward()
        results.append((out.detach(), x.grad))
    for found in results[1:]:
        torch.testing.assert_close(found, results[0])
