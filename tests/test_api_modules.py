"""What make_traced returns for a module: a module that shares everything with the original."""

import abc
import copy
import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from primexec import make_traced
from tests.copies import COPIES

X = torch.arange(6.0).reshape(2, 3)


def counts(traced: Any) -> tuple[int, int, int]:
    """Hits, misses, traces."""
    return tuple(traced.cache_info())[:3]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 3)
        self.norm = nn.BatchNorm1d(3)
        self.gain = 1.0

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.linear(x)) * self.gain

    def describe(self) -> str:
        return f"gain {self.gain}"


def pair() -> tuple[Net, Any]:
    torch.manual_seed(0)
    original = Net()
    return original, make_traced(original)


def same(original: nn.Module, traced: Any, traces: int) -> None:
    """Assert that both give the same, and how often was traced by now; batch statistics are put back between."""
    held = {name: buffer.clone() for name, buffer in original.named_buffers()}
    with torch.no_grad():
        expected = original(X)
        for name, buffer in original.named_buffers():
            buffer.copy_(held[name])
        assert torch.equal(traced(X), expected)
    assert traced.cache_info().traces == traces


def test_module_is_the_original_in_all_but_the_call() -> None:
    original, traced = pair()
    assert isinstance(traced, Net)
    assert isinstance(traced, nn.Module)
    assert type(traced).__name__ == "TracedNet"
    assert traced.describe() == "gain 1.0"
    assert traced.linear is original.linear
    assert list(traced.parameters()) == list(original.parameters())
    assert all(a is b for a, b in zip(traced.buffers(), original.buffers(), strict=True))
    assert [name for name, _ in traced.named_modules()] == [name for name, _ in original.named_modules()]
    assert traced.state_dict().keys() == original.state_dict().keys()
    assert repr(traced).replace("TracedNet", "Net") == repr(original)
    assert inspect.signature(traced.forward) == inspect.signature(original.forward)


def test_module_attributes_are_shared_both_ways() -> None:
    original, traced = pair()
    same(original, traced, 1)
    traced.gain = 2.0
    assert original.gain == 2.0
    same(original, traced, 2)
    original.gain = 1.0
    assert traced.gain == 1.0
    same(original, traced, 2)
    traced.note = "new"
    assert original.note == "new"
    del original.note
    assert not hasattr(traced, "note")


def test_module_train_and_eval_are_shared() -> None:
    original, traced = pair()
    same(original, traced, 1)
    assert traced.eval() is traced
    assert not original.training
    assert not original.norm.training
    same(original, traced, 2)
    original.train()
    assert traced.training
    same(original, traced, 2)
    assert original.norm.num_batches_tracked == 2


def test_module_hooks_fire_on_both() -> None:
    original, traced = pair()
    traced.eval()
    same(original, traced, 1)
    handle = traced.register_forward_hook(lambda module, args, out: out * 3)
    inner = original.linear.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    same(original, traced, 2)
    handle.remove()
    inner.remove()
    same(original, traced, 2)


def test_hooks_of_a_module_see_the_original_class() -> None:
    original, traced = pair()
    original.register_forward_hook(lambda module, args, out: type(module).__name__)
    with torch.no_grad():
        assert original(X) == traced(X) == "Net"


def change_in_place(net: Any) -> None:
    with torch.no_grad():
        net.linear.weight.mul_(2)


def replace_parameter(net: Any) -> None:
    net.linear.weight = nn.Parameter(torch.randn(3, 3))


def replace_data(net: Any) -> None:
    net.linear.weight.data = torch.randn(3, 3)


def load(net: Any) -> None:
    net.load_state_dict({name: t * 2 for name, t in net.state_dict().items()})


def load_assigned(net: Any) -> None:
    net.load_state_dict({name: t * 2 for name, t in net.state_dict().items()}, assign=True)


def step(net: Any) -> None:
    for parameter in net.parameters():
        parameter.grad = torch.ones_like(parameter)
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    net.zero_grad()


CHANGES = {c.__name__: c for c in (change_in_place, replace_parameter, replace_data, load, load_assigned, step)}


@pytest.mark.parametrize("through", ["original", "traced"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_parameters_change_without_a_retrace(change: Callable[[Any], None], through: str) -> None:
    original, traced = pair()
    traced.eval()
    same(original, traced, 1)
    before = original(X)
    change(original if through == "original" else traced)
    assert not torch.equal(original(X), before)
    same(original, traced, 1)


def test_module_to_another_dtype_retraces_once() -> None:
    original, traced = pair()
    same(original.eval(), traced, 1)
    assert traced.to(torch.float64) is traced
    assert original.linear.weight.dtype is torch.float64
    with torch.no_grad():
        assert torch.equal(traced(X.double()), original(X.double()))
        assert counts(traced) == (0, 2, 2)
        traced.float()
        same(original, traced, 2)


def test_module_inside_others() -> None:
    original, traced = pair()
    traced.eval()
    around = nn.Sequential(traced, nn.ReLU())
    with torch.no_grad():
        expected = original(X).relu()
        assert torch.equal(around(X), expected)
        assert counts(traced) == (0, 1, 1)
        outer = make_traced(around)
        for _ in range(2):
            assert torch.equal(outer(X), expected)
    assert (counts(outer), counts(traced)) == ((1, 1, 1), (0, 1, 1))


def test_forward_itself_is_the_original_forward() -> None:
    original, traced = pair()
    traced.eval()
    with torch.no_grad():
        assert torch.equal(traced.forward(X), original(X))
    assert counts(traced) == (0, 0, 0)


def test_class_that_registers_its_subclasses() -> None:
    known: list[str] = []

    class Registered(nn.Module):
        def __init_subclass__(cls, *, name: str) -> None:
            known.append(name)

        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    class Leaf(Registered, name="leaf"):
        pass

    assert torch.equal(make_traced(Leaf())(X), X + 1)
    assert known == ["leaf"]


def test_class_with_a_metaclass() -> None:
    class Abstract(nn.Module, abc.ABC):
        @abc.abstractmethod
        def forward(self, x: Tensor) -> Tensor: ...

    class Concrete(Abstract):
        def forward(self, x: Tensor) -> Tensor:
            return x + 1

    traced = make_traced(Concrete())
    assert torch.equal(traced(X), X + 1)
    assert isinstance(traced, Abstract)


def test_traced_module_is_not_made_by_its_class() -> None:
    with pytest.raises(TypeError, match=r"primexec\.make_traced"):
        type(make_traced(nn.ReLU()))()


@pytest.mark.parametrize("copied", COPIES.values(), ids=COPIES)
@torch.no_grad()
def test_copied_module(copied: Callable[[Any], Any]) -> None:
    original = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).eval()
    traced = make_traced(original, cache_size=7)
    expected = traced(X)
    other = copied(traced)
    assert isinstance(other, nn.Sequential)
    assert torch.equal(other(X), expected)
    other[0].weight.zero_()
    other.train()
    assert torch.equal(traced(X), expected)
    assert not original.training
    assert not torch.equal(other(X), expected)
    assert (counts(traced), counts(other)) == ((1, 1, 1), (0, 2, 2))


def test_shallow_copy_of_a_module_has_attributes_of_its_own() -> None:
    original = nn.ReLU()
    other = copy.copy(make_traced(original))
    other.note = 1
    assert not hasattr(original, "note")
    assert torch.equal(other(X), X)
