"""Many threads, and processes: each program is traced once, and nobody else notices."""

import os
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from primexec import make_traced
from tests.isolated import python

THREADS = 8


def together(work: Callable[[int], Any], number: int = THREADS) -> list[Any]:
    """Run work(i) in that many threads that start at once; give the results, or raise the first exception."""
    barrier = threading.Barrier(number)
    results: list[Any] = [None] * number
    errors: list[BaseException] = []

    def run(i: int) -> None:
        barrier.wait()
        try:
            results[i] = work(i)
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(number)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.LayerNorm(8), nn.Linear(8, 2)).eval()


@pytest.mark.parametrize("warm", [False, True], ids=["cold", "warm"])
def test_traced_module_and_its_original_at_once(warm: bool) -> None:
    module = net()
    traced = make_traced(module)
    inputs = [torch.randn(3, 4) for _ in range(THREADS)]
    with torch.no_grad():
        expected = [module(x) for x in inputs]
        if warm:
            traced(inputs[0])

    def work(i: int) -> None:
        with torch.no_grad():
            for _ in range(10):
                for callee in (traced, module):
                    assert torch.equal(callee(inputs[i]), expected[i])
                assert not torch.compiler.is_compiling()

    together(work)
    assert traced.cache_info() == (THREADS * 10 - 1 + warm, 1, 1, 1, 0, 1)
    assert all(type(p) is nn.Parameter for p in module.parameters())


def test_batch_statistics_count_every_call() -> None:
    norm = nn.BatchNorm1d(4, momentum=1.0)
    traced = make_traced(norm)
    x = torch.randn(5, 4)
    lock = threading.Lock()

    def work(i: int) -> None:
        for _ in range(5):
            with torch.no_grad(), lock:  # eager's own update of the statistics is no atom either
                traced(x)

    together(work)
    assert norm.num_batches_tracked == THREADS * 5
    torch.testing.assert_close(norm.running_mean, x.mean(0))
    assert traced.cache_info().traces == 1


def test_each_kind_of_call_is_traced_once() -> None:
    traced = make_traced(lambda x, k: x * k + k)

    def work(i: int) -> None:
        for k in (1, 2, 3):
            for size in (1, 2):
                x = torch.full((size,), float(i))
                assert torch.equal(traced(x, k), x * k + k)

    together(work)
    assert traced.cache_info() == (THREADS * 6 - 6, 6, 6, 6, 0, 6)


def test_different_functions_at_once() -> None:
    modules = [net() for _ in range(4)]
    traced = [make_traced(m) for m in modules]

    def work(i: int) -> None:
        with torch.no_grad():
            x = torch.full((3, 4), float(i))
            assert torch.equal(traced[i % 4](x), modules[i % 4](x))

    together(work)
    assert [t.cache_info().traces for t in traced] == [1] * 4


@pytest.mark.filterwarnings("ignore::primexec.RetraceWarning")
def test_small_cache_under_eviction() -> None:
    traced = make_traced(lambda x, k: x + k, cache_size=1)

    def work(i: int) -> None:
        for k in (1, 2) * 3:
            assert torch.equal(traced(torch.zeros(2), k), torch.full((2,), float(k)))

    together(work)
    info = traced.cache_info()
    assert info.hits + info.misses == THREADS * 6
    assert (info.traces, info.evictions, info.entries) == (info.misses, info.misses - 1, 1)


def test_modes_of_a_thread_are_its_own() -> None:
    traced = make_traced(lambda x: (x @ x, torch.is_grad_enabled()))
    x = torch.randn(3, 3)

    def work(i: int) -> None:
        for _ in range(5):
            with torch.set_grad_enabled(i % 2 == 0), torch.autocast("cpu", enabled=i % 4 >= 2):
                out, grad = traced(x)
            assert grad == (i % 2 == 0)
            assert out.dtype == (torch.bfloat16 if i % 4 >= 2 else torch.float32)

    together(work)
    assert traced.cache_info().traces == 4


class InTheMiddle:
    """Lets another thread look around while the traced function runs for the first time."""

    def __init__(self, look: Callable[[], None]) -> None:
        self.look = look

    def __call__(self, x: Tensor) -> Tensor:
        assert torch.compiler.is_compiling()
        x = x + torch.rand(3)
        failed: list[BaseException] = []

        def run() -> None:
            try:
                self.look()
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run)
        thread.start()
        thread.join()
        assert not failed, failed[0]
        return x


def not_compiling() -> None:
    assert not torch.compiler.is_compiling()
    assert not torch.compiler.is_dynamo_compiling()


def plain_tensors() -> None:
    x = torch.ones(3)
    assert type(x + 1) is Tensor
    assert (x + 1).sum().item() == 6
    assert x.numpy().sum() == 3


def gradients() -> None:
    x = torch.ones(3, requires_grad=True)
    (x * 2).sum().backward()
    assert torch.equal(x.grad, torch.full((3,), 2.0))


def autocast() -> None:
    linear = nn.Linear(3, 3)
    for _ in range(2):
        with torch.autocast("cpu"):
            assert type(linear(torch.ones(3))) is Tensor


def fast_path() -> None:
    layer = nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval()
    with torch.inference_mode():
        assert layer(torch.ones(1, 2, 4)).shape == (1, 2, 4)


def warm_traced_function() -> None:
    assert torch.equal(WARM(torch.ones(2)), torch.full((2,), 2.0))


WARM = make_traced(lambda x: x * 2)
LOOKS = [not_compiling, plain_tensors, gradients, autocast, fast_path, warm_traced_function]


@pytest.mark.parametrize("look", LOOKS, ids=lambda f: f.__name__)
def test_capture_is_unseen_in_other_threads(look: Callable[[], None]) -> None:
    WARM(torch.ones(2))
    traced = make_traced(InTheMiddle(look))
    assert traced(torch.ones(3)).shape == (3,)
    assert traced.cache_info()[:3] == (0, 1, 1)


class Remembering(nn.Module):
    """Assigns to itself, and then lets another thread look at it."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("memory", torch.zeros(3))
        object.__setattr__(self, "middle", InTheMiddle(self.look))

    def look(self) -> None:
        assert type(self.memory) is Tensor
        self.count = 1
        del self.count

    def forward(self, x: Tensor) -> Tensor:
        self.memory = x * 2
        return self.middle(x) + self.memory


def test_modules_are_themselves_in_other_threads() -> None:
    module = Remembering()
    traced = make_traced(module)
    assert traced(torch.ones(3)).shape == (3,)
    assert traced.cache_info()[:3] == (0, 1, 1)
    assert torch.equal(module.memory, torch.full((3,), 2.0))
    assert "__getattribute__" not in nn.Module.__dict__


FORK = """
import os, threading, warnings, torch, primexec
torch.set_num_threads(1)
warnings.simplefilter("ignore", DeprecationWarning)  # of fork in a process with threads, Python 3.12
traced = primexec.make_traced(lambda x, k: x * k)
traced(torch.ones(2), 1)
inside, leave = threading.Event(), threading.Event()

def slow(x):
    inside.set()
    leave.wait()
    return x + 1

held = threading.Thread(target=primexec.make_traced(slow), args=(torch.ones(2),))
held.start()
inside.wait()  # another thread holds the lock of all captures
child = os.fork()
if child == 0:
    ok = torch.equal(traced(torch.ones(2), 1), torch.ones(2))
    ok = ok and torch.equal(traced(torch.ones(2), 3), torch.full((2,), 3.0))
    ok = ok and traced.cache_info() == (1, 2, 2, 2, 0, 2)
    os._exit(0 if ok else 1)
_, status = os.waitpid(child, 0)
leave.set()
held.join()
print(os.waitstatus_to_exitcode(status), traced(torch.ones(2), 2).tolist())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
def test_forked_child_traces() -> None:
    done = python(FORK)
    assert (done.stdout, done.stderr) == ("0 [2.0, 2.0]\n", "")
