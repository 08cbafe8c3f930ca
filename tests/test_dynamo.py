"""torch.compile(backend="primexec"): forward, training, sizes, options. The oracle is eager PyTorch."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Callable, Iterator
from importlib.metadata import entry_points
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import primexec
from primexec import dynamo
from primexec.graphs import source_of
from tests.isolated import python
from tests.toy import Toy, install

# Dynamo itself looks at the gradients of the tensors that it meets, and makes an object of autograd.Function.
pytestmark = [
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*autograd.function.Function.* should not be instantiated:DeprecationWarning"),
]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def compiled(fn: Any, **options: Any) -> Any:
    return torch.compile(fn, backend="primexec", options=options or None)


class Small(nn.Module):
    """Batch norm, dropout and a number of Python's; a list to append to breaks the graph."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2)
        self.seen: list[str] = []

    def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
        y = F.dropout(F.gelu(self.norm(self.first(x))), 0.3, self.training)
        if y.sum() > 1e9:  # a branch on a value: a graph break
            y = y - 1
        self.seen.append(f"{tuple(y.shape)}")
        return self.last(y) * scale


def steps(model: Any, inputs: list[Tensor], parameters: list[Tensor]) -> list[Tensor]:
    """Losses and parameters of a few optimizer steps."""
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    losses = []
    for x in inputs:
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())
    return [*losses, *(p.detach() for p in parameters)]


def test_entry_point_names_the_backend() -> None:
    (point,) = entry_points(group="torch_dynamo_backends", name="primexec")
    assert point.load() is dynamo.primexec
    assert "primexec" in torch.compiler.list_backends()


def test_entry_point_imports_no_dynamo() -> None:
    done = python("""
import sys, torch
before = set(sys.modules)
import primexec.dynamo
print([n for n in ("torch._dynamo", "torch._functorch", "torch._inductor") if n in set(sys.modules) - before])
""")
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_training_equals_eager() -> None:
    eager = Small()
    model = copy.deepcopy(eager)
    inputs = [torch.randn(6, 4) for _ in range(3)]
    torch.manual_seed(1)
    expected = steps(eager, inputs, list(eager.parameters()))
    torch.manual_seed(1)
    actual = steps(compiled(model), inputs, list(model.parameters()))
    torch.testing.assert_close(actual, expected)
    torch.testing.assert_close(list(model.buffers()), list(eager.buffers()), rtol=0, atol=0)
    assert torch.equal(torch.rand(2), _after(eager, inputs))
    assert model.seen == ["(6, 8)"] * 3


def _after(eager: nn.Module, inputs: list[Tensor]) -> Tensor:
    """What the generator gives after eager's steps."""
    torch.manual_seed(1)
    for x in inputs:
        eager(x)
    return torch.rand(2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("executor", ["aten", ("llvm", "aten")])
@pytest.mark.parametrize("dynamic", [None, True, False])
def test_sizes_and_numbers_vary(dynamic: bool | None, executor: Any) -> None:
    def fn(x: Tensor, k: float) -> tuple[Tensor, int]:
        rows = x.shape[0]
        return (x.reshape(-1).repeat(2) * rows + torch.arange(rows * 6).float()) * k, rows // 2

    traced = torch.compile(fn, backend="primexec", dynamic=dynamic, options={"executor": executor})
    for rows in (2, 3, 5, 8):
        for k in (1.5, 2.5):
            x, y = torch.randn(rows, 3, requires_grad=True), None
            y = x.detach().requires_grad_()
            (actual, n), (expected, m) = traced(x, k), fn(y, k)
            actual.sum().backward()
            expected.sum().backward()
            assert n == m
            torch.testing.assert_close((actual, x.grad), (expected, y.grad))


def test_other_executors_get_concrete_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Recorder] = []

    class Recorder(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.shapes: list[tuple[int, ...]] = []
            made.append(self)

        def compile(self, region: Any, options: Any) -> Any:
            for node in region.graph_module.graph.nodes:
                if node.op == "call_function":
                    assert all(type(n) is int for n in node.meta["val"].shape)
                    self.shapes.append(tuple(node.meta["val"].shape))
            return super().compile(region, options)

    install(monkeypatch, toy=Recorder)
    traced = torch.compile(
        lambda x: (x + x) * x.shape[0], backend="primexec", options={"executor": "toy"}, dynamic=True
    )
    for rows in (3, 4, 3, 5):
        x = torch.randn(rows, 2)
        assert torch.equal(traced(x), (x + x) * rows)
    assert sorted(set(made[0].shapes)) == [(3, 2), (4, 2), (5, 2)]
    assert len(made[0].regions) == 3


def test_both_sides_run_on_the_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Recorder] = []

    class Recorder(Toy):
        def __init__(self) -> None:
            super().__init__()
            made.append(self)

    install(monkeypatch, toy=Recorder)
    traced = compiled(lambda x: (x * x).sum(), executor="toy")
    x = torch.randn(5, requires_grad=True)
    traced(x).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, 2 * x.detach())
    assert len(made[0].regions) == 2


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"options": {"executer": "aten"}}, "executer. Allowed options .* executor, executor_parameters"),
        ({"options": {"executor": "nobody"}}, "'executor': nobody. Allowed values are: aten"),
        ({"options": {"executor_parameters": {"fast": 1}}}, "unexpected executor parameters: fast"),
        ({"mode": "max-autotune"}, "has no mode 'max-autotune'"),
    ],
)
def test_what_is_unknown_is_an_error(keywords: dict[str, Any], message: str) -> None:
    traced = torch.compile(lambda x: x + 1, backend="primexec", **keywords)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=message):
        traced(torch.ones(2))


def test_default_mode_is_accepted() -> None:
    assert torch.equal(
        torch.compile(lambda x: x + 1, backend="primexec", mode="default")(torch.ones(2)), 2 * torch.ones(2)
    )


def test_strict_is_passed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, toy=Toy)
    traced = compiled(lambda x: torch.exp(x + x), executor="toy", executor_parameters={"strict": True})
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match=r"strict: aten\.exp would fall back to aten"):
        traced(torch.ones(2))


@pytest.mark.parametrize(
    "draw",
    [
        lambda x: F.dropout(x, 0.4),
        lambda x: F.dropout1d(x, 0.4),
        lambda x: F.feature_alpha_dropout(x, 0.4, True),
        lambda x: F.rrelu(x, training=True),
        lambda x: x + torch.rand_like(x) * torch.randn(64),
        lambda x: x * torch.bernoulli(torch.full_like(x, 0.3)),
        lambda x: x + torch.empty_like(x).normal_().exponential_(),
        lambda x: x + torch.empty_like(x).uniform_(-1, 1) + torch.normal(0.0, 1.0, x.shape),
        lambda x: x[:, torch.randperm(64)] + torch.randint(0, 9, (64,)),
        lambda x: x[:, torch.multinomial(torch.ones(64), 64)],
        lambda x: F.gumbel_softmax(x, hard=True),
        lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.2),
        lambda x: x + torch.empty_like(x).geometric_(0.3) + torch.empty_like(x).cauchy_() * 1e-3,
        lambda x: x + torch.empty_like(x).log_normal_() + torch.poisson(x.abs()),
    ],
)
def test_random_numbers_are_eagers(draw: Callable[[Tensor], Tensor]) -> None:
    x, y = (torch.linspace(-2, 2, 8 * 64).view(8, 64).requires_grad_() for _ in range(2))
    torch.manual_seed(3)
    expected = draw(y)
    expected.sum().backward()
    state = torch.get_rng_state()
    torch.manual_seed(3)
    actual = compiled(draw)(x)
    actual.sum().backward()
    torch.testing.assert_close((actual, x.grad), (expected, y.grad))
    assert torch.equal(torch.get_rng_state(), state)


def test_mutation_and_aliases() -> None:
    def fn(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        a.mul_(2)
        view = b.t()
        view[0] = 7
        return view, a + b

    a, b = torch.randn(3, 3), torch.randn(3, 3)
    a2, b2 = a.clone(), b.clone()
    view, total = compiled(fn)(a, b)
    expected = fn(a2, b2)
    assert torch.equal(total, expected[1])
    assert torch.equal(a, a2)
    assert torch.equal(b, b2)
    assert view.stride() == expected[0].stride()
    view.zero_()
    assert not b.any()


@pytest.mark.parametrize("fn", [torch.fft.ihfft, lambda x: torch.fft.ihfft(x).imag])
@pytest.mark.parametrize("grad", [False, True])
def test_conjugates_are_not_lost(fn: Callable[[Tensor], Tensor], grad: bool) -> None:
    """A result may be the conjugate of what its memory holds, or the negative."""
    x = torch.randn(3, 6, requires_grad=grad)
    torch.testing.assert_close(compiled(fn, executor="aten")(x), fn(x), rtol=0, atol=0)


def test_inputs_that_come_to_overlap_are_refused() -> None:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        a.add_(1)
        return a + b

    traced = compiled(fn)
    assert torch.equal(traced(torch.ones(4), torch.ones(4)), torch.full((4,), 3.0))
    memory = torch.ones(8)
    assert torch.equal(traced(memory[:4], memory[4:]), torch.full((4,), 3.0))  # they share it, and do not overlap
    with pytest.raises(primexec.PrimexecError, match="overlap in memory"):
        traced(memory[:4], memory[1:5])
    torch._dynamo.reset()
    traced = compiled(fn)
    for _ in range(2):
        mine, theirs = torch.ones(5), torch.ones(5)
        assert torch.equal(traced(mine[:4], mine[1:]), fn(theirs[:4], theirs[1:]))
    x = torch.ones(5)
    only_read = compiled(lambda a, b: a + b)
    for a, b in ((x[:2], x[3:]), (x[:4], x[1:])):
        assert torch.equal(only_read(a, b), a + b)


def test_modes_around_the_call() -> None:
    layer = nn.Linear(4, 4)
    x = torch.randn(2, 4)
    traced = compiled(layer)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(traced(x), layer(x))
        assert traced(x).dtype is torch.bfloat16
    with torch.no_grad():
        assert not traced(x).requires_grad
    with torch.inference_mode():
        assert traced(x).is_inference()
    assert traced(x).requires_grad


def test_graph_retained_and_backward_twice() -> None:
    x = torch.randn(4, requires_grad=True)
    y = compiled(lambda x: (x.sin() * x).sum())(x)
    y.backward(retain_graph=True)
    assert x.grad is not None
    first = x.grad.clone()
    y.backward()
    torch.testing.assert_close(x.grad, 2 * first)
    with pytest.raises(RuntimeError, match="second time"):
        y.backward()


def test_double_backward_is_refused() -> None:
    x = torch.randn(4, requires_grad=True)
    (grad,) = torch.autograd.grad(compiled(lambda x: (x**3).sum())(x), x, create_graph=True)
    with pytest.raises(RuntimeError, match="double backward"):
        grad.sum().backward()


def test_checkpoint_recomputes_the_same_dropout() -> None:
    layer = nn.Linear(4, 4)

    def block(x: Tensor) -> Tensor:
        return F.dropout(layer(x).relu(), 0.5)

    def fn(x: Tensor) -> Tensor:
        return torch.utils.checkpoint.checkpoint(block, x, use_reentrant=False).sum()

    x, y = torch.ones(3, 4, requires_grad=True), torch.ones(3, 4, requires_grad=True)
    torch.manual_seed(5)
    fn(y).backward()
    torch.manual_seed(5)
    compiled(fn)(x).backward()
    torch.testing.assert_close(x.grad, y.grad)


def test_custom_function_and_custom_operator() -> None:
    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            ctx.save_for_backward(x)
            return x.exp()

        @staticmethod
        def backward(ctx: Any, grad: Tensor) -> Tensor:
            (x,) = ctx.saved_tensors
            return grad * x * 10

    x = torch.randn(3, requires_grad=True)
    compiled(lambda x: Scale.apply(x).sum())(x).backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, x.detach() * 10)

    @torch.library.custom_op("primexec_tests::count_up", mutates_args=("counter",))
    def count_up(counter: Tensor, y: Tensor) -> Tensor:
        counter.add_(1)
        return counter * y

    count_up.register_fake(lambda counter, y: torch.empty_like(counter))
    mine, theirs = torch.zeros(2), torch.zeros(2)
    assert torch.equal(
        compiled(lambda c, y: count_up(c, y) + c)(mine, torch.ones(2)), count_up(theirs, torch.ones(2)) + theirs
    )
    assert torch.equal(mine, theirs)


def test_sizes_that_depend_on_data() -> None:
    def fn(x: Tensor) -> Tensor:
        return (x[x > 0] * 2).sum() + x.nonzero().shape[0]

    x = torch.randn(10)
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        assert torch.equal(torch.compile(fn, backend="primexec", fullgraph=True)(x), fn(x))


def test_constants_and_control_flow() -> None:
    def fn(x: Tensor) -> Tensor:
        y = torch.cond(x.sum() > 0, lambda x: x.sin(), lambda x: x.cos(), (x,))
        return y + torch.tensor([1.0, float("inf"), -0.0])

    traced = compiled(fn)
    for x in (torch.ones(3), -torch.ones(3)):
        assert torch.equal(traced(x), fn(x))


def test_activations_are_freed_during_backward() -> None:
    alive: list[int] = []
    saved: list[weakref.ref[Tensor]] = []

    @torch.library.custom_op("primexec_tests::watch", mutates_args=())
    def watch(x: Tensor) -> Tensor:
        if not saved:
            return x.clone()
        gc.collect()
        alive.append(sum(ref() is not None for ref in saved))
        return x.clone()

    watch.register_fake(torch.empty_like)
    watch.register_autograd(lambda ctx, grad: watch(grad))

    def fn(x: Tensor) -> Tensor:
        for _ in range(4):
            x = watch(x.exp())
        return x.sum()

    result = compiled(fn)(torch.ones(4, requires_grad=True))
    saved += [weakref.ref(t) for t in result.grad_fn.saved_tensors]
    result.backward()
    assert len(saved) == 4
    assert alive == [4, 3, 2, 1]


def test_disabled_runs_eagerly() -> None:
    ran: list[str] = []

    class Loud(Toy):
        def compile(self, region: Any, options: Any) -> Any:
            inner = super().compile(region, options)
            return lambda *inputs: ran.append(region.name) or inner(*inputs)

    with pytest.MonkeyPatch.context() as patch:
        install(patch, toy=Loud)
        traced = compiled(lambda x: x + x, executor="toy")
        traced(torch.ones(2))
        with primexec.disable():
            assert torch.equal(traced(torch.ones(2)), 2 * torch.ones(2))
        assert len(ran) == 1


def test_source_lines_reach_errors() -> None:
    def fn(table: Tensor, index: Tensor) -> Tensor:
        return F.embedding(index, table)

    with pytest.raises(IndexError) as caught:
        compiled(fn)(torch.ones(3, 2), torch.tensor([5]))
    assert any("return F.embedding(index, table)" in note for note in caught.value.__notes__)


def test_source_of_skips_torch() -> None:
    layer = f'  File "{nn.modules.linear.__file__}", line 5, in forward\n    x\n'
    mine = '  File "/home/me/model.py", line 3, in forward\n    y = layer(x)\n'
    assert source_of(None) is None
    assert str(source_of(mine + layer)).startswith('File "/home/me/model.py", line 3, in forward')
    found = source_of(layer)
    assert found is not None
    assert found.line == 5


def test_compiled_training_step() -> None:
    """As Lightning does: the module is compiled, and training_step runs through its forward hook."""

    class Task(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = Small()

        def training_step(self, batch: tuple[Tensor, Tensor], index: int) -> dict[str, Tensor]:
            x, target = batch
            return {"loss": F.mse_loss(self.net(x), target), "index": torch.tensor(index)}

        def forward(self, *args: Any) -> dict[str, Tensor]:
            return self.training_step(*args)

    eager = Task()
    model = copy.deepcopy(eager)
    batches = [(torch.randn(6, 4), torch.randn(6, 2)) for _ in range(3)]
    for module, call in ((eager, eager), (model, compiled(model))):
        torch.manual_seed(2)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        for i, batch in enumerate(batches):
            out = call(batch, i)
            assert int(out["index"]) == i
            optimizer.zero_grad()
            out["loss"].backward()
            optimizer.step()
    torch.testing.assert_close(list(model.parameters()), list(eager.parameters()))
