"""State that hangs on tensors themselves, and on custom autograd functions."""

import collections
import functools
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import primexec

X = torch.ones(1)


def gradient(fn: Callable[[Tensor], Tensor]) -> float:
    x = torch.ones(1, requires_grad=True)
    fn(x).backward()
    assert x.grad is not None
    return x.grad.item()


def test_attribute_of_a_parameter() -> None:
    module: Any = nn.Linear(1, 1, bias=False)
    module.weight.scale, module.weight.unread = 2.0, 0
    traced = primexec.make_traced(lambda x: x * module.weight.scale)
    for scale in (2.0, 3.0, 3.0):
        module.weight.scale, module.weight.unread = scale, object()
        assert traced(X).item() == scale
    assert traced.cache_info().traces == 2  # type: ignore[attr-defined]


def test_data_that_is_set_to_itself() -> None:
    """As by code that moves its parameters to where its input is."""

    class Moving(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.full((2, 2), 3.0))

        def forward(self, x: Tensor) -> Tensor:
            self.weight.data = self.weight.data.to(x.device, x.dtype)
            return x @ self.weight

    module, eager = Moving(), Moving()
    traced = primexec.make_traced(module, executor="aten")
    for x in (torch.ones(3, 2), torch.rand(3, 2)):
        found, expected = traced(x), eager(x)
        found.sum().backward()
        expected.sum().backward()
        assert torch.equal(found, expected)
    assert torch.equal(module.weight.grad, eager.weight.grad)  # type: ignore[arg-type]
    assert traced.cache_info().traces == 1  # type: ignore[attr-defined]


@pytest.mark.parametrize("executor", ["aten", ("llvm", "aten")])
@pytest.mark.parametrize("autocast", [True, False])
def test_versions_after_writes_to_data(executor: Any, autocast: bool) -> None:
    def run(x: Tensor) -> Tensor:
        x.data.add_(1)
        x.detach().mul_(2)
        return x @ x

    traced, x, y = primexec.make_traced(run, executor=executor), torch.ones(2, 2), torch.ones(2, 2)
    with torch.autocast("cpu", enabled=autocast):
        for count in (1, 2):
            torch.testing.assert_close(traced(x), run(y))
            assert torch.equal(x, y)
            assert x._version == y._version == count


CHANGES: list[Callable[[Tensor], Tensor]] = [lambda w: w.data * 2, lambda w: w.data.t(), lambda w: w.data.double()]


@pytest.mark.parametrize("change", CHANGES)
def test_data_that_is_replaced(change: Callable[[Tensor], Tensor]) -> None:
    def run(w: Tensor) -> Tensor:
        w.data = change(w)
        return w + 1

    traced = primexec.make_traced(run)
    for i in range(2):
        ours, theirs = (torch.rand(3, 3, generator=torch.Generator().manual_seed(i)) for _ in range(2))
        assert torch.equal(traced(ours), run(theirs))
        assert torch.equal(ours, theirs)
        assert (ours.dtype, ours.stride()) == (theirs.dtype, theirs.stride())
    assert traced.cache_info().traces == 1


@pytest.mark.parametrize("change", CHANGES)
def test_data_that_is_replaced_beside_gradients(change: Callable[[Tensor], Tensor]) -> None:
    weight = nn.Parameter(torch.rand(3, 3))

    def run(w: Tensor) -> Tensor:
        w.data = change(w)
        return w + weight

    traced = primexec.make_traced(run)
    for i in range(2):
        ours, theirs = (torch.rand(3, 3, generator=torch.Generator().manual_seed(i)) for _ in range(2))
        out, expected = traced(ours), run(theirs)
        assert torch.equal(out, expected)
        assert torch.equal(ours, theirs)
        assert torch.equal(*(torch.autograd.grad(y.square().sum(), weight)[0] for y in (out, expected)))
    assert traced.cache_info().traces == 1


def test_an_object_filed_under_a_parameter_is_refused() -> None:
    weight, table = nn.Parameter(torch.ones(2)), {}  # type: ignore[var-annotated]
    table[weight] = None

    def run(x: Tensor) -> Tensor:
        table[weight] = {"mean": x * 2, "made by": SimpleNamespace()}
        return x + 1

    with pytest.raises(primexec.CaptureError, match=r"the function changes .*table.*: a Parameter"):
        primexec.make_traced(run)(torch.ones(2))


def test_flag_of_a_parameter_decides_over_gradients() -> None:
    weight: Any = nn.Parameter(torch.ones(1))
    weight.frozen = True

    def run(x: Tensor) -> Tensor:
        return x * (weight.detach() if weight.frozen else weight)

    traced = primexec.make_traced(run)
    for frozen in (True, False, True):
        weight.frozen = frozen
        assert traced(X).requires_grad is not frozen


def test_attribute_that_a_parameter_may_have() -> None:
    weight: Any = nn.Parameter(torch.ones(1))
    weight.other = 1
    traced = primexec.make_traced(lambda x: x * weight.detach() * getattr(weight, "scale", 1.0))
    assert traced(X).item() == 1
    weight.scale = 3.0
    assert traced(X).item() == 3
    del weight.scale
    assert traced(X).item() == 1


def set_new(weight: Any) -> None:
    weight.scale = 2.0


def set_again(weight: Any) -> None:
    weight.known = weight.known + 1


@pytest.mark.parametrize(("change", "known"), [(set_new, {}), (set_new, {"known": 1}), (set_again, {"known": 1})])
def test_attribute_that_the_function_sets_on_a_parameter(change: Callable[[Any], None], known: dict[str, int]) -> None:
    weight = nn.Parameter(torch.ones(1))
    weight.__dict__.update(known)
    with pytest.raises(primexec.CaptureError, match=r"scale|known"):
        primexec.make_traced(lambda x: (change(weight), x * weight)[1])(X)


def test_attribute_of_a_result() -> None:
    def tagged(x: Tensor) -> Any:
        y: Any = x * 2
        y.tag = 3.0
        return y

    with pytest.raises(primexec.CaptureError, match="returns a tensor with the Python attributes tag"):
        primexec.make_traced(tagged)(X)
    assert primexec.make_traced(lambda x: x * tagged(x).tag)(X).item() == 3


@pytest.mark.parametrize("ask", [lambda x: x.is_leaf, lambda x: x.grad_fn is None], ids=["is_leaf", "grad_fn"])
def test_whether_a_tensor_has_a_history(ask: Callable[[Tensor], bool]) -> None:
    leaf = torch.ones(1, requires_grad=True)
    traced = primexec.make_traced(lambda x: x * (2 if ask(x) else 3))
    assert [traced(x).item() for x in (leaf, leaf * 1, leaf, leaf * 1)] == [2, 3, 2, 3]
    assert traced.cache_info().traces == 2  # type: ignore[attr-defined]


def test_history_that_nobody_asks_for_does_not_retrace() -> None:
    leaf = torch.ones(1, requires_grad=True)
    traced = primexec.make_traced(lambda x: x * 2)
    assert [traced(x).item() for x in (leaf, leaf * 1)] == [2, 2]
    assert traced.cache_info().traces == 1  # type: ignore[attr-defined]


def test_whether_two_tensors_are_one_memory() -> None:
    with pytest.raises(primexec.CaptureError, match="one piece of memory"):
        primexec.make_traced(lambda x, y: x * 2 if x.is_set_to(y) else x)(X, X.view(1))


def closed_over() -> tuple[Any, Callable[[float], None]]:
    k = 2.0

    class Scale(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * k

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return g * k

    def put(value: float) -> None:
        nonlocal k
        k = value

    return Scale, put


def closed_over_list() -> tuple[Any, Callable[[float], None]]:
    state = [2.0]

    class Base(torch.autograd.Function):
        @staticmethod
        def forward(x: Tensor) -> Tensor:  # type: ignore[override]
            return x * state[0]

        @staticmethod
        def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
            ctx.k = state[0]

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return g * ctx.k

    class Derived(Base):
        """Inherits all that runs."""

    return Derived, lambda value: state.__setitem__(0, value)


def read_in_backward() -> tuple[Any, Callable[[float], None]]:
    state = SimpleNamespace(k=2.0)

    class Read(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * state.k

        @staticmethod
        def backward(ctx: Any, g: Tensor) -> Tensor:  # type: ignore[override]
            return g * state.k

    return Read, lambda value: setattr(state, "k", value)


@pytest.mark.parametrize("make", [closed_over, closed_over_list, read_in_backward])
@pytest.mark.parametrize("bound", [False, True], ids=["class", "apply"])
def test_state_of_a_custom_function(make: Callable[[], tuple[Any, Callable[[float], None]]], bound: bool) -> None:
    function, put = make()
    apply = function.apply
    traced = primexec.make_traced((lambda x: apply(x)) if bound else lambda x: function.apply(x))
    for k in (2.0, 3.0, 3.0, 2.0):
        put(k)
        assert traced(X).item() == k
        assert gradient(traced) == k
    assert traced.cache_info().traces == 4  # type: ignore[attr-defined]  # two with gradients


HELD = torch.ones(1)
LISTED, NUMBERED = [HELD, X], {id(HELD): 1}
COMPARISONS: dict[str, Callable[[Tensor], Tensor]] = {
    "is": lambda x: x * 2 if x is HELD else x * 3,
    "is not": lambda x: x * 3 if x is not HELD else x * 2,
    "any": lambda x: x * 2 if any(x is t for t in LISTED) else x * 3,
    "id": lambda x: x * 2 if id(x) in NUMBERED else x * 3,
}


@pytest.mark.parametrize("name", COMPARISONS)
def test_identity_of_an_argument(name: str) -> None:
    traced = primexec.make_traced(COMPARISONS[name])
    for _ in range(2):
        assert traced(torch.ones(1)).item() == 3
    with pytest.raises(primexec.CaptureError, match="compared by identity"):
        traced(HELD)
    assert traced(torch.ones(1)).item() == 3
    assert traced.cache_info().traces == 1  # type: ignore[attr-defined]


def test_identity_of_state() -> None:
    state = SimpleNamespace(a=HELD, b=HELD)
    traced = primexec.make_traced(lambda x: x * 2 if state.a is state.b else x * 3)
    for b, factor in ((HELD, 2), (X, 3), (HELD.clone(), 3), (HELD, 2)):
        state.b = b
        assert traced(torch.ones(1)).item() == factor
    assert traced.cache_info().traces == 2  # type: ignore[attr-defined]


def test_identity_of_what_stands_in_a_list() -> None:
    state = SimpleNamespace(kept=[torch.zeros(3), torch.ones(3)], last=None)
    state.last = state.kept[0]

    def fn(x: Tensor) -> Tensor:
        return x + 1 if state.kept[0] is state.last else x - 1

    traced = primexec.make_traced(fn)
    for last in (state.kept[0], state.kept[1], torch.zeros(3), state.kept[0]):
        state.last = last
        for _ in range(2):
            assert torch.equal(traced(X), fn(X))
    assert traced.cache_info().traces == 3  # type: ignore[attr-defined]


def test_containers_that_are_assigned_are_those_returned() -> None:
    """What eager leaves in two places is one object."""

    def fn(state: Any, x: Tensor, given: list[Tensor]) -> Any:
        made = [x * 2]
        state.made, state.named = made, {"made": made}
        state.given = given
        return made, (made, given)

    eager, ours = SimpleNamespace(), SimpleNamespace()
    traced = primexec.make_traced(lambda x, given: fn(ours, x, given))
    for i in range(3):
        given = [X + i]
        expected = fn(eager, X * i, given)
        made, (again, same) = traced(X * i, given)
        assert made is again is ours.made is ours.named["made"]
        assert same is given is ours.given
        assert torch.equal(made[0], expected[0][0])


class Features(nn.Module):
    """Leaves what its layers give in a list, as models do whose features are looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(3, 3) for _ in range(2)])
        self.features: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        features = []
        for layer in self.layers:
            x = layer(x)
            features.append(x.detach())
        self.features = features
        return x


def test_a_list_of_tensors_that_a_module_keeps() -> None:
    module = Features()
    traced = primexec.make_traced(module)
    for i in range(3):
        x = torch.full((2, 3), float(i))
        torch.testing.assert_close(traced(x), module(x))
        kept = module.features
        module(x)
        traced(x)
        torch.testing.assert_close(module.features, kept)
        assert not any(isinstance(t, torch._subclasses.FakeTensor) for t in module.features)


class Recurrent(nn.Module):
    """Keeps its state in a tuple that each call replaces."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.LSTM(3, 4)
        self.hidden = torch.zeros(1, 2, 4), torch.zeros(1, 2, 4)

    def forward(self, x: Tensor) -> Tensor:
        out, self.hidden = self.layer(x, self.hidden)
        return out


@torch.no_grad()
def test_containers_that_are_replaced() -> None:
    """The tensors in what stands there now are read, and it costs no retrace."""
    eager, module = Recurrent(), Recurrent()
    module.load_state_dict(eager.state_dict())
    traced = primexec.make_traced(module)
    for _ in range(4):
        x = torch.randn(5, 2, 3)
        torch.testing.assert_close(traced(x), eager(x))
        torch.testing.assert_close(module.hidden, eager.hidden)
    assert traced.cache_info().traces == 1

    weights: dict[str, Any] = {"layers": [{"w": torch.ones(3), "b": (torch.zeros(3), 1.0)}]}
    state = SimpleNamespace(weights=weights)

    def fn(x: Tensor) -> Tensor:
        for layer in state.weights["layers"]:
            x = x * layer["w"] + layer["b"][0] * layer["b"][1]
        return x

    traced = primexec.make_traced(fn)
    for i in range(4):
        state.weights = {"layers": [{"w": torch.full((3,), float(i)), "b": (torch.ones(3), 1.0)}]}
        assert torch.equal(traced(X), fn(X))
    assert traced.cache_info().traces == 1
    for b, traces in (((torch.ones(3), 2.0), 2), ((torch.ones(1), 2.0), 3), ((torch.ones(1), 2.0), 3)):
        state.weights["layers"] = [{"w": torch.ones(3), "b": b}]
        assert torch.equal(traced(X), fn(X))
        assert traced.cache_info().traces == traces


def replace_other(state: Any) -> None:
    state.b = {0: torch.full((1,), 7.0)}


def make_them_one(state: Any) -> None:
    state.b = state.a


def let_them_differ(state: Any) -> None:
    state.a = {0: torch.full((1,), 3.0)}


def put_a_parameter(state: Any) -> None:
    state.b = {0: nn.Parameter(torch.full((1,), 2.0), requires_grad=False)}


def written(state: Any, x: Tensor) -> Tensor:
    state.a[0] = x * 3
    other: Tensor = state.b[0]
    return other * 2


SHARING: dict[str, Callable[[Any], Callable[[Tensor], Any]]] = {
    "reads": lambda s: lambda x: s.a[0] * x + s.b[0],
    "writes to a tensor": lambda s: lambda x: (s.a[0].add_(x), s.b[0] * 2)[1],
    "writes to a dict": lambda s: functools.partial(written, s),
    "returns one": lambda s: lambda x: (s.b, s.b[0] * x),
    "asks for a class": lambda s: lambda x: x * 2 if isinstance(s.b[0], nn.Parameter) else x,
    "works on one in C": lambda s: functools.partial(lambda held, x: held[0] * x + s.b[0], s.b),
}


@pytest.mark.parametrize("make", SHARING.values(), ids=SHARING)
def test_containers_that_are_replaced_and_shared(make: Callable[[Any], Callable[[Tensor], Any]]) -> None:
    states = [SimpleNamespace(a={0: torch.ones(1)}, b={0: torch.ones(1)}) for _ in range(2)]
    eager, ours = (make(state) for state in states)
    traced = primexec.make_traced(ours)
    for change in (replace_other, make_them_one, let_them_differ, put_a_parameter, make_them_one, replace_other):
        for _ in range(2):
            torch.testing.assert_close(traced(X), eager(X))
            torch.testing.assert_close(held_by(states[1]), held_by(states[0]))
        for state in states:
            change(state)


def held_by(state: Any) -> list[Tensor]:
    return [*state.a.values(), *state.b.values()]


def test_tensors_in_a_deque() -> None:
    memory = collections.deque([torch.ones(1), torch.zeros(1)], maxlen=2)
    traced = primexec.make_traced(lambda x: x + sum(memory))
    for i in range(4):
        assert torch.equal(traced(X), X + sum(memory))
        memory.append(torch.full((1,), float(i)))
    assert traced.cache_info().traces == 1  # type: ignore[attr-defined]


def scratch(state: Any, x: Tensor) -> Tensor:
    """As GradScaler keeps what it finds out between `unscale_` and `update`."""
    state.found["x"]["twice"] = x * 2
    total: Tensor = sum(found["twice"] for found in state.found.values())  # type: ignore[assignment]
    state.found = collections.defaultdict(dict)
    return total


def emptied(state: Any, x: Tensor) -> Tensor:
    state.found = collections.defaultdict(dict)
    return x + 1


def of_parts(state: Any, x: Tensor) -> Tensor:
    y = x + state.found.setdefault("a", X)
    state.found["b"] = y
    state.found = {"a": state.found["b"] * 2}
    return y


@pytest.mark.parametrize("fn", [scratch, emptied, of_parts], ids=lambda f: f.__name__)
@pytest.mark.parametrize("comes_back", [False, True])
def test_containers_that_every_call_replaces(fn: Callable[[Any, Tensor], Tensor], comes_back: bool) -> None:
    states = [SimpleNamespace(found=collections.defaultdict(dict, {"a": X} if fn is of_parts else {})) for _ in "ab"]
    traced = primexec.make_traced(functools.partial(fn, states[1]))
    for i in range(5):
        before = [state.found for state in states]
        assert torch.equal(traced(X + i), fn(states[0], X + i))
        assert str(states[1].found) == str(states[0].found)
        assert str(before[1]) == str(before[0])
        assert states[1].found is not before[1]
        for state, found in zip(states, before, strict=True):
            if comes_back:
                found.pop("x", None)
                found.pop("b", None)
                state.found = found
    assert traced.cache_info().traces <= 2  # type: ignore[attr-defined]
