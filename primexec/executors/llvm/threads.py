"""Work split over torch's own OpenMP threads.

A kernel is `void @name(ptr %args, i64 %begin, i64 %end)`: `args` points to the data pointers of its region, and it does
the part of its outermost parallel domain from begin up to end. `@primexec_parallel` runs one over its whole domain.
Torch's threads are used, so that `torch.set_num_threads` holds and no second team competes with ATen's.
"""

from __future__ import annotations

import ctypes
from functools import cache

from primexec._torch import load_libtorch
from primexec.executors.llvm import engine
from primexec.executors.llvm.emit import ModuleText
from primexec.executors.llvm.target import host

PARALLEL = "primexec_parallel"
_OPENMP = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads", "omp_get_max_threads", "omp_in_parallel")

_TEAM = """
define internal void @primexec_team(ptr %task) #0 {
  %args.p = getelementptr { ptr, ptr, i64 }, ptr %task, i32 0, i32 1
  %n.p = getelementptr { ptr, ptr, i64 }, ptr %task, i32 0, i32 2
  %kernel = load ptr, ptr %task
  %args = load ptr, ptr %args.p
  %n = load i64, ptr %n.p
  %me = call i32 @omp_get_thread_num()
  %team = call i32 @omp_get_num_threads()
  %t = sext i32 %me to i64
  %ts = sext i32 %team to i64
  %share = sdiv i64 %n, %ts
  %over = srem i64 %n, %ts
  %start = mul i64 %share, %t
  %extra = call i64 @llvm.smin.i64(i64 %t, i64 %over)
  %begin = add i64 %start, %extra
  %one.more = icmp slt i64 %t, %over
  %more = zext i1 %one.more to i64
  %mine = add i64 %share, %more
  %end = add i64 %begin, %mine
  %any = icmp slt i64 %begin, %end
  br i1 %any, label %work, label %done
work:
  call void %kernel(ptr %args, i64 %begin, i64 %end)
  br label %done
done:
  ret void
}
define void @primexec_parallel(ptr %kernel, ptr %args, i64 %n, i64 %grain) #0 {
entry:
  %small = icmp sle i64 %n, %grain
  br i1 %small, label %alone, label %large
large:
  %nested = call i32 @omp_in_parallel()
  %max = call i32 @omp_get_max_threads()
  %maximum = sext i32 %max to i64
  %rounded = add i64 %n, %grain
  %less = sub i64 %rounded, 1
  %pieces = sdiv i64 %less, %grain
  %threads = call i64 @llvm.smin.i64(i64 %pieces, i64 %maximum)
  %several = icmp sgt i64 %threads, 1
  %free = icmp eq i32 %nested, 0
  %go = and i1 %several, %free
  br i1 %go, label %fork, label %alone
fork:
  %task = alloca { ptr, ptr, i64 }
  %args.p = getelementptr { ptr, ptr, i64 }, ptr %task, i32 0, i32 1
  %n.p = getelementptr { ptr, ptr, i64 }, ptr %task, i32 0, i32 2
  store ptr %kernel, ptr %task
  store ptr %args, ptr %args.p
  store i64 %n, ptr %n.p
  %count = trunc i64 %threads to i32
  call void @GOMP_parallel(ptr @primexec_team, ptr %task, i32 %count, i32 0)
  ret void
alone:
  call void %kernel(ptr %args, i64 0, i64 %n)
  ret void
}"""

_ALONE = """
define void @primexec_parallel(ptr %kernel, ptr %args, i64 %n, i64 %grain) #0 {
  call void %kernel(ptr %args, i64 0, i64 %n)
  ret void
}"""


def declare(module: ModuleText) -> None:
    """Let a module call `void @primexec_parallel(ptr %kernel, ptr %args, i64 %n, i64 %grain)`, one of `symbols`.

    Work of `grain` units or less stays on the calling thread, as does all work inside a parallel section of someone
    else's; more is split evenly, at least `grain` units to a thread. Where torch's runtime was not found, everything
    runs on the calling thread.
    """
    module.declare(PARALLEL, "void (ptr, ptr, i64, i64)")


def symbols() -> dict[str, int]:
    """Addresses of what `declare` declares, for `engine.compile_module`."""
    return {PARALLEL: _loaded().address(PARALLEL)}


@cache
def _loaded() -> engine.Module:
    """The runtime, compiled once a process."""
    return engine.compile_module(runtime(bool(openmp())), symbols=openmp(), level=0)


@cache
def openmp() -> dict[str, int]:
    """Addresses of torch's OpenMP runtime; empty where it cannot be found."""
    library = load_libtorch()
    try:
        found = {name: ctypes.cast(getattr(library, name), ctypes.c_void_p).value for name in _OPENMP}
    except AttributeError:
        return {}
    return {name: address for name, address in found.items() if address}


def runtime(team: bool) -> str:
    """The module that defines `@primexec_parallel`, with a team of threads or alone."""
    module = ModuleText(host())
    if not team:
        module.define(_ALONE)
        return module.text()
    module.declare("GOMP_parallel", "void (ptr, ptr, i32, i32)")
    for name in _OPENMP[1:]:
        module.declare(name, "i32 ()")
    module.declare("llvm.smin.i64", "i64 (i64, i64)")
    module.define(_TEAM)
    return module.text()
