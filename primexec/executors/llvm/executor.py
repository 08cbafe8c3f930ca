"""The executor `llvm`: which nodes it takes, and how a region becomes machine code."""

from __future__ import annotations

import itertools
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
    """Loops and LLVM IR of a graph of prims, for the host or another target. Equal kernels share their code."""
    target = target or host()
    schedule = Scheduler(own.rewritten(graph), options.get("fuel")).schedule()
    module = ModuleText(target)
    threads.declare(module)
    precise = bool(options.get("precise_casts", True))
    large = (i for i, b in enumerate(schedule.buffers) if b.kind == "output" and _nbytes(b) >= STREAM_BYTES)
    streams = frozenset(large)
    runs: list[_Run] = []
    known: dict[tuple[str, ...], list[str]] = {}
    room = 0
    for kernel in schedule.kernels:
        layout = (ordered.plan if kernel.ordered else plan)(kernel, target)
        writer = _writer(kernel, layout)(module, kernel, layout, precise)
        writer.streams = frozenset() if kernel.ordered or writer.busy else streams
        before = len(module.functions)
        parts = writer.write()
        code = tuple(text.replace(f"@{kernel.name}", "@") for text in module.functions[before:])
        if code in known:  # how many units there are is no part of it
            del module.functions[before:]
        functions = known.setdefault(code, [part.name for part in parts])
        if layout.pieces > 1:
            room = max(room, writer.workspace.nbytes)
        grain = max(1, GRAIN // max(1, layout.unit_size))
        runs += [_Run(kernel, p, f, writer.buffers, grain) for p, f in zip(parts, functions, strict=True)]
    _write_program(module, schedule, runs, room)
    return Compiled(schedule, module.text(), target)


_FIELDS = ("ptr", "ptr", "i64", "i64", "i64")  # of a run: function, event, end of its places, units, grain
_ROW = f"{{ {', '.join(_FIELDS)} }}"


@dataclass(frozen=True)
class _Run:
    """A part of a kernel, and the function that runs it: its own, or that of an equal one."""

    kernel: Kernel
    part: Part
    function: str
    buffers: list[int]
    grain: int

    @property
    def shown(self) -> str:
        return f"primexec::{self.part.name} {'; '.join(self.kernel.sources)}"


def _write_program(module: ModuleText, schedule: Schedule, runs: list[_Run], room: int) -> None:
    """`@program`, a loop over a table of the functions: LLVM takes quadratic time for thousands of calls in a row.

    Each function gets pointers to its buffers, before them one to the workspace, behind them one to what it reports.
    """
    e, order = Emitter(module), _order(schedule)
    numbers = [order[b] for run in runs for b in run.buffers]
    ends = list(itertools.accumulate(len(run.buffers) for run in runs))
    rows = [
        f"{_ROW} {{ ptr @{run.function}, ptr {profiling.event(module, run.shown)}, "
        f"i64 {end}, i64 {run.part.units}, i64 {run.grain} }}"
        for run, end in zip(runs, ends, strict=True)
    ]
    table = module.constant("runs", f"[{len(rows)} x {_ROW}] [{', '.join(rows)}]")
    places = module.constant("places", f"[{len(numbers)} x i64] [{', '.join(f'i64 {n}' for n in numbers)}]")
    pointers = e.emit(f"alloca [{max((len(run.buffers) for run in runs), default=0) + 2} x ptr], align 8")
    first = e.emit(f"getelementptr ptr, ptr {pointers}, i64 1")
    if room:
        e.do(f"store ptr {e.emit(f'alloca [{room} x i8], align 64')}, ptr {pointers}")
    if schedule.checks:
        e.do("%flags = alloca i64, align 8")
        e.do("store i64 0, ptr %flags")
    listening = profiling.listening(e, module)

    def run(number: str, begin: list[str]) -> list[str]:
        fields = [e.emit(f"getelementptr {_ROW}, ptr {table}, i64 {number}, i32 {k}") for k in range(len(_FIELDS))]
        part, event, end, units, grain = (e.emit(f"load {t}, ptr {f}") for t, f in zip(_FIELDS, fields, strict=True))

        def place(i: str, _: list[str]) -> list[str]:
            number = e.emit(f"load i64, ptr {e.emit(f'getelementptr i64, ptr {places}, i64 {i}')}")
            buffer = e.emit(f"load ptr, ptr {e.emit(f'getelementptr ptr, ptr %args, i64 {number}')}")
            slot = e.emit(f"sub i64 {i}, {begin[0]}")
            e.do(f"store ptr {buffer}, ptr {e.emit(f'getelementptr ptr, ptr {first}, i64 {slot}')}")
            return []

        e.loop(begin[0], end, 1, place)
        if schedule.checks:
            count = e.emit(f"sub i64 {end}, {begin[0]}")
            e.do(f"store ptr %flags, ptr {e.emit(f'getelementptr ptr, ptr {first}, i64 {count}')}")
        profiling.mark(e, listening, event)
        e.do(f"call void @{threads.PARALLEL}(ptr {part}, ptr {first}, i64 {units}, i64 {grain})")
        profiling.mark(e, listening, "null")
        return [end]

    e.loop("0", str(len(rows)), 1, run, [("i64", "0")])
    if schedule.checks:
        e.do(f"ret i64 {e.emit('load i64, ptr %flags')}")
    else:
        e.do("ret void")
    e.function(f"{'i64' if schedule.checks else 'void'} @program(ptr %args)")


def _writer(kernel: Kernel, layout: Layout) -> type[KernelWriter]:
    if kernel.ordered:
        return OrderedWriter
    return ColumnWriter if layout.columns else TileWriter if layout.across else KernelWriter


def _nbytes(b: Buffer) -> int:
    return storage_bytes(b.shape, b.strides, b.dtype)


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
