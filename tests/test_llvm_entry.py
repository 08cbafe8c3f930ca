"""The native way into compiled programs: what it checks, what it leaves behind, and its twin in Python."""

import gc
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

import primexec
from primexec.errors import ExecutorError
from primexec.executors.llvm import engine, entry, pool
from primexec.executors.llvm.launch import Operand, bind

Launch = Callable[..., list[torch.Tensor]]

# out[i] = a[i] - b[i] for four numbers, through a slot of the arena.
SUBTRACT = """define void @program(ptr %args) {
  %b.p = getelementptr ptr, ptr %args, i64 1
  %out.p = getelementptr ptr, ptr %args, i64 2
  %slot.p = getelementptr ptr, ptr %args, i64 $slot
  %a = load ptr, ptr %args
  %b = load ptr, ptr %b.p
  %out = load ptr, ptr %out.p
  %slot = load ptr, ptr %slot.p
  %x = load <4 x float>, ptr %a, align 4
  %y = load <4 x float>, ptr %b, align 4
  %z = fsub <4 x float> %x, %y
  store <4 x float> %z, ptr %slot, align 4
  %w = load <4 x float>, ptr %slot, align 4
  store <4 x float> %w, ptr %out, align 4
  ret void
}"""
FOUR = Operand((4,), (1,), torch.float32)


def program(*, arena: bool = False, work_bytes: int = 0) -> Launch:
    module = engine.compile_module(SUBTRACT.replace("$slot", "3" if arena else "2"))
    extra: dict[str, Any] = {"slots": (64,), "arena_bytes": 128} if arena else {}
    return bind(module.address("program"), [FOUR, FOUR], [FOUR], work_bytes=work_bytes, keep=module, **extra)


@pytest.fixture(params=["native", "python"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "python":
        monkeypatch.setattr(entry, "_function_maker", lambda: None)
    return str(request.param)


A, B = torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.5, 0.25, 8.0, -1.0])


def test_the_native_way_is_there() -> None:
    """On the machines that these tests run on; elsewhere a call costs more, and nothing else changes."""
    assert type(program()).__name__ == "builtin_function_or_method"


@pytest.mark.parametrize("arena", [False, True])
@pytest.mark.parametrize("work_bytes", [0, 1 << 20])
def test_results(way: str, arena: bool, work_bytes: int) -> None:
    run = program(arena=arena, work_bytes=work_bytes)
    for _ in range(3):
        (out,) = run(A, B)
        assert torch.equal(out, A - B)
        assert out.is_contiguous()
        assert not out.requires_grad


def test_tensors_are_read_where_they_lie(way: str) -> None:
    run, whole = program(), torch.arange(12.0)
    assert torch.equal(run(whole[3:7], torch.nn.Parameter(whole[8:]))[0], whole[3:7] - whole[8:])


class Marked(torch.Tensor):
    pass


def test_a_subclass_is_a_tensor(way: str) -> None:
    (out,) = program()(A.as_subclass(Marked), B)
    assert torch.equal(out, A - B)


def test_other_strides_are_copied(way: str) -> None:
    run, sparse = program(), torch.arange(8.0)[::2]
    assert torch.equal(run(sparse, B)[0], sparse - B)
    assert torch.equal(run(B, torch.ones(1).expand(4))[0], B - 1)


@pytest.mark.parametrize(
    "args",
    [(A,), (A, B, A), (A, B.double()), (A, torch.ones(5)), (A, B.view(2, 2)), (A, B.to("meta"))],
    ids=["too few", "too many", "dtype", "size", "rank", "device"],
)
def test_what_does_not_fit_is_refused(way: str, args: tuple[torch.Tensor, ...]) -> None:
    with pytest.raises(ExecutorError):
        program()(*args)


def test_something_else_than_a_tensor_is_no_crash(way: str) -> None:
    with pytest.raises((ExecutorError, AttributeError)):
        program()(A, "tensor")  # type: ignore[arg-type]


@pytest.mark.parametrize("arena", [False, True])
def test_an_error_while_memory_is_made(way: str, arena: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> Any:
        raise MemoryError("no room")

    if arena:
        monkeypatch.setattr(pool.arenas, "take", fail)
        run = program(arena=True)
    else:
        monkeypatch.setattr(pool.outputs, "empty", fail)
        large = Operand((1 << 20,), (1,), torch.float32)
        module = engine.compile_module(SUBTRACT.replace("$slot", "2"))
        run = bind(module.address("program"), [FOUR, FOUR], [large], keep=module)
    before = sys.getrefcount(A)
    for _ in range(3):
        with pytest.raises(MemoryError, match="no room"):
            run(A, B)
    assert sys.getrefcount(A) == before


@pytest.mark.parametrize("arena", [False, True])
def test_calls_leave_no_references_behind(way: str, arena: bool) -> None:
    run = program(arena=arena)
    run(A, B)
    counted = (A, B, torch.float32, FOUR, run, True)
    before = [sys.getrefcount(x) for x in counted]
    for _ in range(100):
        run(A, B)
    after = [sys.getrefcount(x) for x in counted]
    assert all(abs(x - y) < 50 for x, y in zip(after, before, strict=True))
    out = weakref.ref(run(A, B)[0])
    assert out() is None


def test_the_code_lives_as_long_as_the_function(way: str) -> None:
    class Held:
        pass

    held = Held()
    alive = weakref.ref(held)
    module = engine.compile_module(SUBTRACT.replace("$slot", "2"))
    run = bind(module.address("program"), [FOUR, FOUR], [FOUR], keep=(module, held))
    del held, module
    gc.collect()
    assert alive() is not None
    assert torch.equal(run(A, B)[0], A - B)
    del run
    gc.collect()
    assert alive() is None


def test_many_threads(way: str) -> None:
    run = program(arena=True, work_bytes=1 << 20)
    wrong: list[object] = []

    def work(seed: int) -> None:
        a = torch.full((4,), float(seed))
        for i in range(500):
            b = torch.full((4,), float(i))
            if not torch.equal(run(a, b)[0], a - b):
                wrong.append((seed, i))

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_call_inside_a_call(way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory is made by Python code, and a finalizer that runs then may call the program again."""
    inner: list[torch.Tensor] = []
    take = pool.arenas.take

    def reenter(nbytes: int) -> torch.Tensor:
        if not inner:
            inner.append(A)  # once
            inner.extend(run(B, A))
        return take(nbytes)

    monkeypatch.setattr(pool.arenas, "take", reenter)
    run = program(arena=True)
    (out,) = run(A, B)
    assert torch.equal(out, A - B)
    assert torch.equal(inner[1], B - A)


def test_a_traced_call_is_served_natively() -> None:
    traced = primexec.make_traced(lambda a, b, c: a * b + c, executor=("llvm", "aten"))
    traced(A, B, A)
    assert torch.equal(traced(A, B, A), A * B + A)
    assert traced.cache_info()[:3] == (1, 1, 1)
    run = traced._cache.entries[0].executable.run
    assert type(run).__name__ == "builtin_function_or_method"


def test_tensors_of_zeros_without_memory(way: str) -> None:
    zeros = torch._efficientzerotensor((4,))
    assert torch.equal(program()(A, zeros)[0], A)
    assert torch.equal(program()(zeros, B)[0], -B)


def test_gradients_of_zeros_without_memory(way: str) -> None:
    x = A.clone().requires_grad_()
    traced = primexec.make_traced(lambda x: torch.tanh(x * 2).exp() @ x, executor=("llvm", "aten"))
    (grad,) = torch.autograd.grad(traced(x), x, torch._efficientzerotensor(()))
    assert torch.equal(grad, torch.zeros(4))
