"""The executor `llvm`: which nodes it takes, and how a region becomes machine code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from primexec.config import logger
from primexec.errors import ExecutorError
from primexec.executors.base import PROTOCOL_VERSION, YES, Region, RegionFunction, Support
from primexec.executors.llvm import (
    addresses,
    arena,
    engine,
    judge,
    launch,
    library,
    ordered,
    own,
    profiling,
    repeats,
    threads,
)
from primexec.executors.llvm.codegen import KernelWriter, Part
from primexec.executors.llvm.columns import ColumnWriter
from primexec.executors.llvm.emit import Emitter, ModuleText
from primexec.executors.llvm.fuse import Scheduler
from primexec.executors.llvm.ir import Kernel
from primexec.executors.llvm.layout import GRAIN, Layout, plan
from primexec.executors.llvm.ordered import OrderedWriter
from primexec.executors.llvm.pool import storage_bytes
from primexec.executors.llvm.schedule import Buffer, Schedule
from primexec.executors.llvm.target import Target, host
from primexec.executors.llvm.tiles import TileWriter

_log = logger("kernels")

STREAM_BYTES = 1 << 22  # of outputs that are written around the caches


@dataclass(frozen=True)
class Compiled:
    """A region as loops and as text of LLVM IR.

    Attributes:
        schedule: the loops; prints.
        llvm: the module.
        target: what it is for.
    """

    schedule: Schedule
    llvm: str
    target: Target

    @property
    def asm(self) -> str:
        """The module as assembly."""
        return engine.assembly(self.llvm, self.target)


class LlvmExecutor:
    """Fuses prims into loops and compiles these with LLVM."""

    name = "llvm"
    protocol_version = PROTOCOL_VERSION
    exact = True
    any_layout = True
    parameters = frozenset({"fuel", "precise_casts", "freeze"})
    expected_failures = Path(__file__).parent.with_suffix(".toml")

    def supports(self, node: fx.Node) -> Support:
        return YES if library.takes(node) else judge.support(node)

    def fingerprint(self) -> str:
        target = host()
        return f"llvmlite {version('llvmlite')} {target.triple} {target.cpu} {target.feature_string}"

    def describe(self, region: Region, options: Mapping[str, Any]) -> list[str]:
        """Kernels, what they run over, and how they came to be."""
        lines = []
        graph = region.graph_module.graph
        lines += [f"{region.name}: {n.name} is a product through oneDNN" for n in graph.nodes if library.takes(n)]
        parts = map(own.rewritten, library.kernel_graphs(graph))
        schedules = [Scheduler(part, options.get("fuel")).schedule() for part in parts]
        for kernel in (k for s in schedules for k in s.kernels):
            over = [f"{n} (reduced)" if r else str(n) for n, r in zip(kernel.axes, kernel.reduced, strict=True)]
            lines.append(f"{region.name}: kernel {kernel.name} over {' x '.join(over) or 'one element'}")
            lines += [f"  {line}" for line in (*kernel.sources, *kernel.why)]
        return lines

    def compile(self, region: Region, options: Mapping[str, Any]) -> RegionFunction:
        graph = region.graph_module.graph
        # What is saved dies in the middle of the backward pass: kept for later calls, it would add to its peak.
        chosen = {**options, "pooled": not region.training}
        if any(map(library.takes, graph.nodes)):
            return library.joined(graph, lambda part: _compiled(part, region.name, chosen))
        return _compiled(graph, region.name, chosen)


def _compiled(graph: fx.Graph, name: str, options: Mapping[str, Any]) -> RegionFunction:
    def make() -> RegionFunction:
        compiled = lower(graph, options)
        _log.debug("%s\n%s", name, compiled.schedule)
        symbols = {**threads.symbols(), **profiling.symbols()}
        module = engine.compile_module(compiled.llvm, compiled.target, symbols)
        _check_results(graph, name, compiled.schedule)
        return _bound(compiled.schedule, module, pooled=options["pooled"])

    return repeats.once(graph, options, make)


def lower(graph: fx.Graph, options: Mapping[str, Any], target: Target | None = None) -> Compiled:
    """Loops and LLVM IR of a graph of prims, for the host or another target."""
    target = target or host()
    schedule = Scheduler(own.rewritten(graph), options.get("fuel")).schedule()
    module = ModuleText(target)
    threads.declare(module)
    order, precise = _order(schedule), bool(options.get("precise_casts", True))
    e = Emitter(module)
    large = (i for i, b in enumerate(schedule.buffers) if b.kind == "output" and _nbytes(b) >= STREAM_BYTES)
    streams = frozenset(large)
    run: list[tuple[Kernel, Part, int]] = []
    room = 0
    for kernel in schedule.kernels:
        layout = (ordered.plan if kernel.ordered else plan)(kernel, target)
        writer = _writer(kernel, layout)(module, kernel, layout, order, precise)
        writer.streams = frozenset() if kernel.ordered or writer.busy else streams
        parts = writer.write()
        if layout.pieces > 1:
            room = max(room, writer.workspace.nbytes)
        grain = max(1, GRAIN // max(1, layout.unit_size))
        run += [(kernel, part, grain) for part in parts]
    args = "%args"
    if schedule.checks or room:
        args = _extended(e, len(order), room)
    calls = []
    for kernel, part, grain in run:
        call = f"call void @{threads.PARALLEL}(ptr @{part.name}, ptr {args}, i64 {part.units}, i64 {grain})"
        calls.append((f"primexec::{part.name} {'; '.join(kernel.sources)}", call))
    profiling.announced(e, module, calls)
    if schedule.checks:
        e.do(f"ret i64 {e.emit('load i64, ptr %flags')}")
    else:
        e.do("ret void")
    e.function(f"{'i64' if schedule.checks else 'void'} @program(ptr %args)")
    return Compiled(schedule, module.text(), target)


def _writer(kernel: Kernel, layout: Layout) -> type[KernelWriter]:
    if kernel.ordered:
        return OrderedWriter
    return ColumnWriter if layout.columns else TileWriter if layout.across else KernelWriter


def _nbytes(b: Buffer) -> int:
    return storage_bytes(b.shape, b.strides, b.dtype)


def _extended(e: Emitter, count: int, room: int) -> str:
    """The arguments, before them a pointer to a workspace and behind them one to what kernels report."""
    e.do("%flags = alloca i64, align 8")
    e.do("store i64 0, ptr %flags")
    workspace = e.emit(f"alloca [{room} x i8], align 64")
    table = e.emit(f"alloca [{count + 2} x ptr], align 8")
    for number, name in enumerate([workspace, *(addresses.pointer(e, k) for k in range(count)), "%flags"]):
        place = e.emit(f"getelementptr ptr, ptr {table}, i64 {number}")
        e.do(f"store ptr {name}, ptr {place}")
    return e.emit(f"getelementptr ptr, ptr {table}, i64 1")


def _order(schedule: Schedule) -> dict[int, int]:
    """The place of each buffer among the arguments: inputs, outputs, arena."""
    kinds = ("input", "output", "arena")
    numbers = sorted(range(len(schedule.buffers)), key=lambda b: kinds.index(schedule.buffers[b].kind))
    return {b: i for i, b in enumerate(numbers)}


def _check_results(graph: fx.Graph, name: str, schedule: Schedule) -> None:
    """What the program returns is what the region says, in number, shape, strides and dtype."""
    results: Any = graph.output_node().args[0]
    wanted = [(tuple(v.shape), v.stride(), v.dtype) for v in (n.meta["val"] for n in results)]
    made = [(b.shape, b.strides, b.dtype) for b in (schedule.buffers[i] for i in schedule.outputs)]
    if made != wanted:
        raise ExecutorError(f"the loops of {name} return {made}, and the region {wanted}")


def _bound(schedule: Schedule, module: engine.Module, *, pooled: bool) -> RegionFunction:
    buffers = schedule.buffers
    operands = [launch.Operand(b.shape, b.strides, b.dtype) for b in buffers]
    inputs = [o for o, b in zip(operands, buffers, strict=True) if b.kind == "input"]
    made = [i for i, b in enumerate(buffers) if b.kind == "output"]
    slots, size = arena.slots(schedule)
    work = sum(i.dtype.itemsize * _numel(i.shape) for i in inputs)
    call = launch.bind(module.address("program"), inputs, [operands[i] for i in made], slots=slots, arena_bytes=size,
                       work_bytes=work, keep=module, failed=_failure(schedule), pooled=pooled)  # fmt: skip
    picked = [made.index(b) if b in made else ~b for b in schedule.outputs]
    if picked == list(range(len(made))):
        return call

    def run(*tensors: Tensor) -> list[Tensor]:
        results = call(*tensors)
        return [results[i] if i >= 0 else tensors[~i] for i in picked]

    return run


def _failure(schedule: Schedule) -> Callable[[int], None] | None:
    """What raises the error that kernels reported; None where nothing is checked."""
    if not schedule.checks:
        return None

    def failed(code: int) -> None:
        check, index = addresses.reported(code)
        raise schedule.checks[check].error(index)

    return failed


def _numel(shape: tuple[int, ...]) -> int:
    return int(torch.Size(shape).numel())
