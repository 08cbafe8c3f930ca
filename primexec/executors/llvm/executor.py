"""The executor `llvm`: which nodes it takes, and how a region becomes machine code."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from primexec._torch import laid_out
from primexec.config import logger
from primexec.effects import storage_bytes
from primexec.errors import ExecutorError
from primexec.executors.base import PROTOCOL_VERSION, YES, Region, RegionFunction, Support
from primexec.executors.llvm import (
    addresses,
    arena,
    codes,
    engine,
    in_place,
    judge,
    launch,
    left,
    library,
    matmul,
    ordered,
    own,
    profiling,
    repeats,
    short_rows,
    threads,
    twister,
    verify_memory,
)
from primexec.executors.llvm.codegen import KernelWriter
from primexec.executors.llvm.codes import Binding, Code, Loaded, Part
from primexec.executors.llvm.columns import ColumnWriter
from primexec.executors.llvm.contraction import contraction
from primexec.executors.llvm.emit import Emitter, ModuleText
from primexec.executors.llvm.fuse import Scheduler
from primexec.executors.llvm.ir import Kernel
from primexec.executors.llvm.layout import GRAIN, Layout, plan
from primexec.executors.llvm.ordered import OrderedWriter
from primexec.executors.llvm.schedule import Buffer, Schedule
from primexec.executors.llvm.stencils import StencilWriter
from primexec.executors.llvm.target import Target, host
from primexec.executors.llvm.tiles import TileWriter
from primexec.passes.instead import Call

_log = logger("kernels")

STREAM_BYTES = 1 << 22  # of each output that may be written around the caches


@dataclass(frozen=True)
class Compiled:
    """A region as loops and as text of LLVM IR.

    Attributes:
        schedule: the loops; prints.
        llvm: the module.
        target: what it is for.
        codes: what the module holds of kernels, by what they depend on.
        borrowed: codes of other modules that it calls, by the names under which it does.
    """

    schedule: Schedule
    llvm: str
    target: Target
    codes: dict[Any, Code] = field(default_factory=dict)
    borrowed: dict[str, Loaded] = field(default_factory=dict)

    def symbols(self) -> dict[str, int]:
        """The addresses of the functions that the module borrows."""
        return {
            name + part.suffix: loaded.module.address(loaded.code.name + part.suffix)
            for name, loaded in self.borrowed.items()
            for part in loaded.code.parts
        }

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
    asks_grad_mode = False
    parameters = frozenset({"fuel", "precise_casts", "freeze"})
    expected_failures = Path(__file__).parent.with_suffix(".toml")

    def supports(self, node: fx.Node) -> Support:
        return YES if library.takes(node) else judge.support(node)

    def leaves(self, node: fx.Node) -> str | None:
        return left.why(node)

    def instead(self, node: fx.Node) -> Call | None:
        return twister.instead(node)

    def empties(self, region: Region) -> bool:
        return library.empties(region)

    def fingerprint(self) -> str:
        target = host()
        return f"llvmlite {version('llvmlite')} {target.triple} {target.cpu} {target.feature_string}"

    def describe(self, region: Region, options: Mapping[str, Any]) -> list[str]:
        """Kernels, what they run over, and how they came to be."""
        lines = []
        graph = region.graph_module.graph
        lines += [f"{region.name}: {n.name} is a product through oneDNN" for n in graph.nodes if library.takes(n)]
        schedules = [_scheduled(*part, options) for part in library.kernel_graphs(graph, region.donated)]
        for kernel in (k for s in schedules for k in s.kernels):
            over = [f"{n} (reduced)" if r else str(n) for n, r in zip(kernel.axes, kernel.reduced, strict=True)]
            lines.append(f"{region.name}: kernel {kernel.name} over {' x '.join(over) or 'one element'}")
            lines += [f"  {line}" for line in (*kernel.sources, *kernel.why)]
        return lines

    def compile(self, region: Region, options: Mapping[str, Any]) -> RegionFunction:
        graph = region.graph_module.graph
        # What is saved dies in the middle of the backward pass: kept for later calls, it would add to its peak.
        chosen = {**options, "pooled": not region.training}

        def compiled(part: fx.Graph, donated: frozenset[int], kept: frozenset[int] | None) -> RegionFunction:
            return _compiled(part, donated, kept, region.name, chosen)

        if region.boxed or library.has_products(graph):
            return library.joined(region, compiled)
        return compiled(graph, region.donated, region.kept)


def _compiled(
    graph: fx.Graph, donated: frozenset[int], kept: frozenset[int] | None, name: str, options: Mapping[str, Any]
) -> RegionFunction:
    def make() -> RegionFunction:
        compiled = lower(graph, options, donated)
        _log.debug("%s\n%s", name, compiled.schedule)
        products = matmul.symbols(compiled.schedule.kernels)
        symbols = {**threads.symbols(), **profiling.symbols(), **compiled.symbols(), **products}
        module = engine.compile_module(compiled.llvm, compiled.target, symbols)
        _check_results(graph, name, compiled.schedule)
        used = [*codes.remember(compiled.codes, module), *compiled.borrowed.values()]
        return _bound(compiled.schedule, module, used, pooled=options["pooled"], kept=kept)

    return repeats.once(graph, {**options, "donated": donated, "kept": kept}, make)


def _scheduled(graph: fx.Graph, donated: Set[int], options: Mapping[str, Any]) -> Schedule:
    apart = Scheduler(own.rewritten(graph), options.get("fuel")).schedule()
    shared = arena.in_results(in_place.in_place(in_place.without_copies(apart), donated))
    return verify_memory.verify(apart, shared)


def lower(
    graph: fx.Graph, options: Mapping[str, Any], donated: Set[int] = frozenset(), target: Target | None = None
) -> Compiled:
    """Loops and LLVM IR of a graph of prims; equal kernels share their code.

    Args:
        donated: positions of inputs over which results may be written.
        target: what the module is for, which then holds all kernels; None for the host, where what other modules in
            memory hold is borrowed.
    """
    lends, target = target is None, target or host()
    schedule = _scheduled(graph, donated, options)
    module = ModuleText(target)
    threads.declare(module)
    precise = bool(options.get("precise_casts", True))
    whole = _streams(schedule, target)
    runs: list[_Run] = []
    called: dict[Any, tuple[str, Code]] = {}  # what the functions of a kernel's code are called, and the code
    written: dict[Any, Code] = {}
    borrowed: dict[str, Loaded] = {}
    for kernel in schedule.kernels:
        binding = Binding.of(kernel, whole)
        key = codes.key_of(kernel, binding, whole), precise
        if key not in called and lends and (loaded := codes.known(key)):
            name = f"borrowed{len(borrowed)}"
            borrowed[name], called[key] = loaded, (name, loaded.code)
            for part in loaded.code.parts:
                module.declare(name + part.suffix, "void (ptr, i64, i64)")
        elif key not in called:
            written[key] = code = _write_kernel(module, kernel, binding, precise, whole)
            called[key] = code.name, code
        name, code = called[key]
        runs += [_Run(kernel, binding, part, name + part.suffix, code.grain) for part in code.parts]
    _write_program(module, schedule, runs, max((code.room for _, code in called.values()), default=0))
    return Compiled(schedule, module.text(), target, written, borrowed)


def _streams(schedule: Schedule, target: Target) -> frozenset[int]:
    """The outputs that are written around the caches: large ones that whoever reads them next would not find there.

    With a last cache of 32 MiB, 8 MiB were written and read again in 770 µs through it and 1040 around it, 16 MiB
    written in 1750 and 1220.
    """
    outputs = {i: _nbytes(b) for i, b in enumerate(schedule.buffers) if b.kind == "output"}
    large = frozenset(i for i, nbytes in outputs.items() if nbytes >= STREAM_BYTES)
    return large if 2 * sum(outputs.values()) >= target.last_cache_bytes else frozenset()


def _write_kernel(module: ModuleText, kernel: Kernel, binding: Binding, precise: bool, streams: Set[int]) -> Code:
    if kernel.ordered:
        layout = ordered.plan(kernel, module.target)
    else:
        layout = short_rows.with_rows(kernel, plan(kernel, module.target))
    writer = _writer(kernel, layout)(module, kernel, layout, precise, binding)
    writer.streams = frozenset() if kernel.ordered or writer.busy else streams
    parts = tuple(writer.write())
    room = writer.workspace.nbytes if layout.pieces > 1 else 0
    return Code(kernel.name, parts, max(1, GRAIN // max(1, layout.unit_size)), room)


_FIELDS = ("ptr", "ptr", *["i64"] * 4)  # of a run: function, event, end of its places, units, grain, first check
_ROW = f"{{ {', '.join(_FIELDS)} }}"
_PLACE = "{ i64, i64 }"  # the number of a buffer, and the byte at which a kernel's places begin


@dataclass(frozen=True)
class _Run:
    """A part of a kernel, and the function that runs it: its own, or that of an equal one."""

    kernel: Kernel
    binding: Binding
    part: Part
    function: str
    grain: int

    @property
    def shown(self) -> str:
        return f"primexec::{self.kernel.name}{self.part.suffix} {'; '.join(self.kernel.sources)}"


def _write_program(module: ModuleText, schedule: Schedule, runs: list[_Run], room: int) -> None:
    """`@program`, a loop over a table of the functions: LLVM takes quadratic time for thousands of calls in a row.

    Each function gets pointers to its buffers, before them one to the workspace, behind them one to what it reports,
    and the number of its first check.
    """
    e, order = Emitter(module), _order(schedule)
    ends = list(itertools.accumulate(len(run.binding.starts) for run in runs))
    rows = [
        f"{_ROW} {{ ptr @{run.function}, ptr {profiling.event(module, run.shown)}, "
        f"i64 {end}, i64 {run.part.units}, i64 {run.grain}, i64 {run.binding.check} }}"
        for run, end in zip(runs, ends, strict=True)
    ]
    table = module.constant("runs", f"[{len(rows)} x {_ROW}] [{', '.join(rows)}]")
    begins = [
        (order[b], schedule.starts.get(b, 0) + start * schedule.buffers[b].dtype.itemsize)
        for run in runs
        for b, start in run.binding.starts.items()
    ]
    pairs = ", ".join(f"{_PLACE} {{ i64 {number}, i64 {nbytes} }}" for number, nbytes in begins)
    places = module.constant("places", f"[{len(begins)} x {_PLACE}] [{pairs}]")
    pointers = e.emit(f"alloca [{max((len(run.binding.starts) for run in runs), default=0) + 3} x ptr], align 8")
    first = e.emit(f"getelementptr ptr, ptr {pointers}, i64 1")
    if room:
        e.do(f"store ptr {e.emit(f'alloca [{room} x i8], align 64')}, ptr {pointers}")
    if schedule.checks:
        e.do("%flags = alloca i64, align 8")
        e.do("store i64 0, ptr %flags")
    listening = profiling.listening(e, module)

    def run(number: str, begin: list[str]) -> list[str]:
        fields = [e.emit(f"getelementptr {_ROW}, ptr {table}, i64 {number}, i32 {k}") for k in range(len(_FIELDS))]
        loaded = (e.emit(f"load {t}, ptr {f}") for t, f in zip(_FIELDS, fields, strict=True))
        part, event, end, units, grain, check = loaded

        def place(i: str, _: list[str]) -> list[str]:
            halves = [e.emit(f"getelementptr {_PLACE}, ptr {places}, i64 {i}, i32 {k}") for k in range(2)]
            number, nbytes = (e.emit(f"load i64, ptr {half}") for half in halves)
            buffer = e.emit(f"load ptr, ptr {e.emit(f'getelementptr ptr, ptr %args, i64 {number}')}")
            start = e.emit(f"getelementptr i8, ptr {buffer}, i64 {nbytes}")
            slot = e.emit(f"sub i64 {i}, {begin[0]}")
            e.do(f"store ptr {start}, ptr {e.emit(f'getelementptr ptr, ptr {first}, i64 {slot}')}")
            return []

        e.loop(begin[0], end, 1, place)
        if schedule.checks:
            count = e.emit(f"sub i64 {end}, {begin[0]}")
            e.do(f"store ptr %flags, ptr {e.emit(f'getelementptr ptr, ptr {first}, i64 {count}')}")
            behind = e.emit(f"add i64 {count}, 1")
            e.do(f"store i64 {check}, ptr {e.emit(f'getelementptr i64, ptr {first}, i64 {behind}')}")
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
    if contraction(kernel):
        return matmul.ProductWriter
    if layout.terms:
        return StencilWriter
    return ColumnWriter if layout.columns else TileWriter if layout.across else KernelWriter


def _nbytes(b: Buffer) -> int:
    return storage_bytes(b.shape, b.strides, b.dtype)


def _order(schedule: Schedule) -> dict[int, int]:
    """The number of each buffer's memory among the arguments: inputs, outputs, arena; what has none comes last."""
    kinds = ("input", "output", "arena", "none")
    numbers = sorted(range(len(schedule.buffers)), key=lambda b: kinds.index(schedule.buffers[b].kind))
    order = {b: i for i, b in enumerate(numbers)}
    return {b: order[schedule.places.get(b, b)] for b in numbers}


def _check_results(graph: fx.Graph, name: str, schedule: Schedule) -> None:
    """What the program returns is what the region says, in number, shape, strides and dtype."""
    results: Any = graph.output_node().args[0]
    wanted = [(tuple(v.shape), v.stride(), v.dtype) for v in (n.meta["val"] for n in results)]
    made = [(b.shape, b.strides, b.dtype) for b in (schedule.buffers[i] for i in schedule.outputs)]
    if made != wanted:
        raise ExecutorError(f"the loops of {name} return {made}, and the region {wanted}")


def _bound(
    schedule: Schedule, module: engine.Module, used: list[Loaded], *, pooled: bool, kept: frozenset[int] | None
) -> RegionFunction:
    buffers = schedule.buffers
    operands = [launch.Operand(b.shape, b.strides, b.dtype) for b in buffers]
    inputs = [o for o, b in zip(operands, buffers, strict=True) if b.kind == "input"]
    made = [i for i, b in enumerate(buffers) if b.kind == "output"]
    slots, size = arena.slots(schedule)
    held = {b for i, b in enumerate(schedule.outputs) if kept is None or i in kept}
    seen = {i for i, b in enumerate(made) if b in held}
    work = sum(i.dtype.itemsize * _numel(i.shape) for i in inputs)
    call = launch.bind(module.address("program"), inputs, [operands[i] for i in made], slots=slots, arena_bytes=size,
                       work_bytes=work, keep=(module, used), failed=_failure(schedule), pooled=pooled,
                       kept=seen)  # fmt: skip
    picked = [made.index(b) if b in made else ~schedule.places.get(b, b) for b in schedule.outputs]
    if picked == list(range(len(made))):
        return call
    over = [(i, inputs[i], operands[b]) for b, i in schedule.places.items() if b in schedule.outputs]

    def run(*tensors: Tensor) -> list[Tensor]:
        given = list(tensors)
        for i, operand, _ in over:
            given[i] = operand.fitted(given[i], i)
        results = call(*given)
        for i, operand, result in over:
            if result != operand:
                given[i] = laid_out(given[i], result.shape, result.strides)
        return [results[i] if i >= 0 else given[~i] for i in picked]

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
