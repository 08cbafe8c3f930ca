"""What is left out of a cached call is left out soundly: counts, threads, re-entrancy, checks of foreign results."""

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import primexec
from primexec.errors import ExecutorError
from primexec.executors.base import Region
from tests.toy import Toy, install

EXECUTORS: list[Any] = ["aten", ("llvm", "aten")]


class Fickle(Toy):
    """Right at the first call, of another shape from then on."""

    name = "fickle"

    def compile(self, region: Region, options: Mapping[str, Any]) -> Callable[..., Sequence[Tensor]]:
        run, calls = super().compile(region, options), []

        def fickle(*inputs: Tensor) -> Sequence[Tensor]:
            calls.append(inputs)
            return run(*inputs) if len(calls) == 1 else [t[:1] for t in run(*inputs)]

        return fickle


def test_foreign_results_are_checked_at_every_call(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, fickle=Fickle)
    traced = primexec.make_traced(lambda a, b: a + b, executor=("fickle", "aten"))
    a, b = torch.randn(5), torch.randn(5)
    assert torch.equal(traced(a, b), a + b)
    for _ in range(2):
        with pytest.raises(ExecutorError, match=r"fickle returned torch.float32 \(1,\) .* not torch.float32 \(5,\)"):
            traced(a, b)


class Many(nn.Module):
    """150 parameters in pointwise operators."""

    def __init__(self) -> None:
        super().__init__()
        self.weights = nn.ParameterList([nn.Parameter(torch.randn(6)) for _ in range(150)])

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        for weight in self.weights:
            x = x * 0.5 + weight
        return {"x": x, "last": x * 2}


@pytest.mark.parametrize("executor", EXECUTORS)
def test_many_parameters(executor: Any) -> None:
    torch.manual_seed(0)
    model, x = Many(), torch.randn(6)
    traced = primexec.make_traced(model, executor=executor)
    with torch.no_grad():
        traced(x)
        model.weights[149] = nn.Parameter(torch.randn(6))  # read again by its path
        got, expected = traced(x), model(x)
    assert traced.cache_info()[:3] == (1, 1, 1)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-6, atol=1e-6)
    traced(x)["x"].sum().backward()
    grads = [w.grad for w in model.weights]
    wanted = torch.autograd.grad(model(x)["x"].sum(), list(model.weights))
    torch.testing.assert_close(grads, list(wanted), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_threads_train_at_once(executor: Any) -> None:
    """Each thread has its own weight; calls and backward passes of one traced function overlap."""
    traced = primexec.make_traced(lambda w, x: torch.tanh(w * x).sum() + (w * w).sum(), executor=executor)
    torch.manual_seed(0)
    weights = [torch.randn(9, requires_grad=True) for _ in range(4)]
    x = torch.randn(9)
    traced(weights[0], x).backward()
    weights[0].grad = None
    wrong: list[object] = []

    def work(w: Tensor) -> None:
        (wanted,) = torch.autograd.grad(torch.tanh(w * x).sum() + (w * w).sum(), w)
        for _ in range(25):
            first, second = traced(w, x), traced(w, x)  # two forwards before a backward
            for loss in (first, second):
                (got,) = torch.autograd.grad(loss, w)
                if not torch.allclose(got, wanted, rtol=1e-5, atol=1e-6):
                    wrong.append((got, wanted))

    threads = [threading.Thread(target=work, args=(w,)) for w in weights]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert traced.cache_info()[:3] == (4 * 2 * 25, 1, 1)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_a_call_inside_a_backward_pass(executor: Any) -> None:
    traced = primexec.make_traced(lambda x: (x * x + 1).sum(), executor=executor)
    x, inner = torch.randn(7, requires_grad=True), torch.randn(7, requires_grad=True)

    def hook(gradient: Tensor) -> None:
        with torch.enable_grad():
            traced(inner).backward()

    traced(x).backward()
    x.grad = None
    x.register_hook(hook)
    traced(x).backward()
    torch.testing.assert_close(x.grad, 2 * x.detach())
    torch.testing.assert_close(inner.grad, 2 * inner.detach())
    assert traced.cache_info()[:3] == (2, 1, 1)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_grad_mode_comes_out_as_it_went_in(executor: Any) -> None:
    traced = primexec.make_traced(lambda w, x: torch.exp(w + x), executor=executor)
    w, x = torch.randn(3, requires_grad=True), torch.randn(3)
    for _ in range(2):
        assert traced(w, x).requires_grad
        assert torch.is_grad_enabled()
    with pytest.raises(RuntimeError), torch.no_grad():
        traced(w, torch.randn(4))
    assert torch.is_grad_enabled()


def test_an_error_in_a_forward_leaves_grad_mode_alone() -> None:
    """Kernels run under grad mode inside of `Function.forward`; an index out of range raises from there."""
    traced = primexec.make_traced(lambda table, rows: table[rows] * 2, executor="aten")
    table = torch.randn(4, 2, requires_grad=True)
    traced(table, torch.tensor([1, 2]))
    with pytest.raises(IndexError):
        traced(table, torch.tensor([1, 9]))
    assert torch.is_grad_enabled()
    (gradient,) = torch.autograd.grad(traced(table, torch.tensor([0, 0])).sum(), table)
    assert torch.equal(gradient, torch.tensor([[4.0, 4.0], [0, 0], [0, 0], [0, 0]]))
