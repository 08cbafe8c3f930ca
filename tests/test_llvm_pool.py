"""Launching, threads and reused memory: nothing that anybody still refers to may change."""

import ctypes
import gc
import multiprocessing
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from primexec._torch import empty_strided_cpu
from primexec.executors.llvm import engine, pool, threads
from primexec.executors.llvm.emit import Emitter, ModuleText
from primexec.executors.llvm.launch import Operand, bind
from primexec.executors.llvm.target import host

N = 1 << 19  # 2 MiB of float32


def program(n: int, grain: int, *, arena: bool = False) -> engine.Module:
    """out[i] = x[0] + i over n float32; by way of a slot of the arena where asked."""
    module = ModuleText(host())
    threads.declare(module)
    e = Emitter(module)
    slot = "2" if arena else "1"
    x = e.emit("load ptr, ptr %args")
    value = e.emit(f"load float, ptr {x}")
    out = e.emit(f"load ptr, ptr {e.emit(f'getelementptr ptr, ptr %args, i64 {slot}')}")

    def body(i: str, _: list[str]) -> list[str]:
        result = e.emit(f"fadd float {value}, {e.emit(f'sitofp i64 {i} to float')}")
        e.do(f"store float {result}, ptr {e.emit(f'getelementptr float, ptr {out}, i64 {i}')}")
        return []

    e.loop("%begin", "%end", 1, body)
    e.do("ret void")
    e.function("internal void @fill(ptr %args, i64 %begin, i64 %end)")
    e = Emitter(module)
    e.do(f"call void @{threads.PARALLEL}(ptr @fill, ptr %args, i64 {n}, i64 {grain})")
    if arena:
        module.declare("llvm.memcpy.p0.p0.i64", "void (ptr, ptr, i64, i1)")
        source = e.emit(f"load ptr, ptr {e.emit('getelementptr ptr, ptr %args, i64 2')}")
        target = e.emit(f"load ptr, ptr {e.emit('getelementptr ptr, ptr %args, i64 1')}")
        e.do(f"call void @llvm.memcpy.p0.p0.i64(ptr {target}, ptr {source}, i64 {4 * n}, i1 false)")
    e.do("ret void")
    e.function("void @program(ptr %args)")
    return engine.compile_module(module.text(), symbols=threads.symbols())


def launcher(n: int = N, grain: int = 1 << 14, *, arena: bool = False) -> Callable[..., list[torch.Tensor]]:
    module = program(n, grain, arena=arena)
    extra: dict[str, Any] = {"slots": (64,), "arena_bytes": 64 + 4 * n} if arena else {}
    return bind(
        module.address("program"), [Operand((1,), (1,), torch.float32)], [Operand((n,), (1,), torch.float32)],
        keep=module, **extra,
    )  # fmt: skip


def expected(start: float, n: int = N) -> torch.Tensor:
    return torch.arange(n, dtype=torch.float32) + start


@pytest.fixture(autouse=True)
def fresh_pool() -> None:
    pool.empty_cache()


@pytest.mark.parametrize("n", [1, 7, 1000, N])
@pytest.mark.parametrize("arena", [False, True])
def test_results(n: int, arena: bool) -> None:
    run = launcher(n, grain=100, arena=arena)
    for start in (0.0, 5.0):
        (out,) = run(torch.tensor([start]))
        assert torch.equal(out, expected(start, n))


def test_a_dropped_output_is_reused() -> None:
    run = launcher()
    (first,) = run(torch.tensor([1.0]))
    address = first.data_ptr()
    del first
    (second,) = run(torch.tensor([2.0]))
    assert second.data_ptr() == address
    assert torch.equal(second, expected(2.0))
    assert not second._is_view()
    assert second._version == 0
    assert second.untyped_storage().nbytes() == 4 * N


def storage_view(t: torch.Tensor) -> Any:
    storage = t.untyped_storage()
    return lambda: torch.empty(0).set_(storage, 0, (N,), (1,))


def dlpack(t: torch.Tensor) -> Any:
    capsule = torch.utils.dlpack.to_dlpack(t)
    return lambda: torch.utils.dlpack.from_dlpack(capsule)


def array(t: torch.Tensor) -> Any:
    view = t.numpy()
    return lambda: torch.from_numpy(np.array(view))


def keep(value: torch.Tensor) -> Any:
    return lambda: value


def saved_for_backward(t: torch.Tensor) -> Any:
    weight = torch.ones(N, requires_grad=True)
    product = weight * t

    def gradient() -> torch.Tensor:
        (result,) = torch.autograd.grad(product.sum(), weight)
        return result

    return gradient


HOLDERS: dict[str, Callable[[torch.Tensor], Callable[[], torch.Tensor]]] = {
    "tensor": keep,
    "view": lambda t: keep(t.view(2, -1)[1:]),
    "detached": lambda t: keep(t.detach()),
    "NumPy array": array,
    "memoryview": lambda t: (lambda m: lambda: torch.frombuffer(m, dtype=torch.float32))(memoryview(t.numpy())),
    "DLPack capsule": dlpack,
    "storage": storage_view,
    "bytes of the storage": lambda t: (lambda s: lambda: torch.tensor([s[i] for i in range(999)]))(t.untyped_storage()),
    "lazy clone": lambda t: keep(torch._lazy_clone(t)),
    "saved for backward": saved_for_backward,
    "shared memory": lambda t: keep(t.share_memory_()),
    "parameter": lambda t: keep(torch.nn.Parameter(t)),
}


@pytest.mark.parametrize("name", HOLDERS)
def test_what_is_held_does_not_change(name: str) -> None:
    run = launcher()
    (out,) = run(torch.tensor([3.0]))
    held = HOLDERS[name](out)
    before = None if name in ("DLPack capsule", "saved for backward") else held().detach().clone()
    del out
    gc.collect()
    later = [run(torch.tensor([100.0 + i]))[0] for i in range(3)]
    assert torch.equal(held().detach(), expected(3.0) if before is None else before)
    for i, t in enumerate(later):
        assert torch.equal(t, expected(100.0 + i))


def test_resized_and_replaced_storages_are_not_reused() -> None:
    run = launcher()
    (out,) = run(torch.tensor([1.0]))
    out.untyped_storage().resize_(16)
    del out
    (again,) = run(torch.tensor([2.0]))
    assert torch.equal(again, expected(2.0))
    again.set_(torch.zeros(3).untyped_storage())
    assert torch.equal(run(torch.tensor([4.0]))[0], expected(4.0))
    assert torch.equal(again, torch.zeros(3))


def test_memory_shared_with_a_process_is_not_reused() -> None:
    run = launcher()
    (out,) = run(torch.tensor([1.0]))
    out.share_memory_()
    address = out.data_ptr()
    view = np.ctypeslib.as_array((ctypes.c_float * N).from_address(address))
    keeps_the_mapping = out.untyped_storage()._share_filename_cpu_()
    del out
    (later,) = run(torch.tensor([2.0]))
    assert later.data_ptr() != address
    del view, keeps_the_mapping


def test_the_pool_is_bounded_and_can_be_emptied() -> None:
    small = pool.OutputPool(limit=5 << 20)
    kept = [small.empty((1 << 18,), (1,), torch.float32, 1 << 20) for _ in range(9)]
    assert small.nbytes <= 5 << 20
    assert len({t.data_ptr() for t in kept}) == 9
    small.empty((1 << 22,), (1,), torch.float32, 1 << 24)
    assert small.nbytes <= 5 << 20
    small.clear()
    assert small.nbytes == 0
    kept[0].fill_(1.0)
    run = launcher()
    run(torch.tensor([0.0]))
    assert pool.outputs.nbytes == 4 * N
    pool.empty_cache()
    assert pool.outputs.nbytes == 0


def test_a_finalizer_inside_the_pool_does_not_wait_on_itself() -> None:
    small = pool.OutputPool(limit=5 << 20)
    with small._lock:
        assert small.empty((1 << 18,), (1,), torch.float32, 1 << 20).shape == (1 << 18,)


def test_inference_mode_gives_inference_tensors() -> None:
    run = launcher()
    run(torch.tensor([1.0]))
    with torch.inference_mode():
        assert run(torch.tensor([2.0]))[0].is_inference()
    assert not run(torch.tensor([3.0]))[0].is_inference()


@pytest.mark.parametrize("arena", [False, True])
def test_many_threads_at_once(arena: bool) -> None:
    run = launcher(arena=arena)
    wrong: list[float] = []

    def work(start: float) -> None:
        for i in range(20):
            value = start + 100 * i
            (out,) = run(torch.tensor([value]))
            if not torch.equal(out, expected(value)):
                wrong.append(value)

    workers = [threading.Thread(target=work, args=(float(k),)) for k in range(4)]
    for w in workers:
        w.start()
    for w in workers:
        w.join()
    assert wrong == []


SEEN = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)


def pieces(n: int, grain: int) -> list[tuple[int, int]]:
    """The parts that a kernel in Python is called for."""
    seen: list[tuple[int, int]] = []
    kernel = SEEN(lambda args, begin, end: seen.append((begin, end)))
    module = ModuleText(host())
    threads.declare(module)
    module.define(
        "define void @go(ptr %kernel, i64 %n, i64 %grain) {\n"
        "  call void @primexec_parallel(ptr %kernel, ptr null, i64 %n, i64 %grain)\n  ret void\n}"
    )
    loaded = engine.compile_module(module.text(), symbols=threads.symbols())
    go = ctypes.CFUNCTYPE(None, SEEN, ctypes.c_int64, ctypes.c_int64)(loaded.address("go"))
    go(kernel, n, grain)
    return sorted(seen)


@pytest.mark.skipif(not threads.openmp(), reason="torch's OpenMP runtime is not found on this machine")
def test_the_number_of_threads_is_torchs() -> None:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        assert pieces(10, 1) == [(0, 4), (4, 7), (7, 10)]
        assert pieces(10, 5) == [(0, 5), (5, 10)]
        assert pieces(10, 10) == [(0, 10)]
        assert pieces(0, 1) == [(0, 0)]
        torch.set_num_threads(1)
        assert pieces(10, 1) == [(0, 10)]
    finally:
        torch.set_num_threads(before)


def test_without_openmp_the_calling_thread_does_it_all() -> None:
    text = threads.runtime(team=False)
    assert "GOMP" not in text
    module = engine.compile_module(text)
    seen: list[tuple[int, int]] = []
    run = ctypes.CFUNCTYPE(None, SEEN, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64)(
        module.address(threads.PARALLEL)
    )
    run(SEEN(lambda args, begin, end: seen.append((begin, end))), None, 100, 1)
    assert seen == [(0, 100)]


def in_child(connection: Any) -> None:
    torch.set_num_threads(1)
    run = launcher()
    connection.send([torch.equal(run(torch.tensor([float(i)]))[0], expected(float(i))) for i in range(3)])


def test_a_forked_process_has_a_pool_of_its_own() -> None:
    run = launcher(grain=N)
    run(torch.tensor([1.0]))
    here, there = multiprocessing.Pipe()
    context = multiprocessing.get_context("fork")
    with pool.outputs._lock:  # as if another thread were inside the pool
        child = context.Process(target=in_child, args=(there,))
        child.start()
    assert here.poll(60)
    assert here.recv() == [True, True, True]
    child.join()


def test_small_outputs_come_from_the_allocator() -> None:
    run = launcher(8)
    run(torch.tensor([1.0]))
    assert pool.outputs.nbytes == 0
    assert empty_strided_cpu((8,), (1,), torch.float32).shape == (8,)


def test_inside_of_a_program_a_larger_storage_will_do() -> None:
    def made(n: int, roomy: bool) -> torch.Tensor:
        return pool.outputs.empty((n,), (1,), torch.float32, 4 * n, roomy)

    first = made(N, False).data_ptr()
    assert made(N // 2, True).data_ptr() == first
    assert made(N // 2, False).data_ptr() != first  # the storage of a result is no larger than the result
    assert made(N // (2 * pool.ROOM), True).data_ptr() != first
    held = made(N, True)
    assert held.data_ptr() == first != made(N - 1, True).data_ptr()
