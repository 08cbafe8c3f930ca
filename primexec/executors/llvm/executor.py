"""The executor `llvm`: which nodes it takes, and how a region becomes machine code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, fx

from primexec.errors import ExecutorError
from primexec.executors.base import PROTOCOL_VERSION, YES, Region, RegionFunction, Support, no
from primexec.executors.llvm import addresses, engine, indirect, launch, piecewise, repeats, threads
from primexec.executors.llvm.codegen import KernelWriter, Part
from primexec.executors.llvm.columns import ColumnWriter
from primexec.executors.llvm.emit import Emitter, ModuleText
from primexec.executors.llvm.fuse import Scheduler
from primexec.executors.llvm.indirect import INDIRECT
from primexec.executors.llvm.instructions import (
    COPIES,
    DTYPES,
    F16,
    FLOATS,
    INTEGER_DIVISIONS,
    INTEGERS,
    REDUCTIONS,
    pointwise,
)
from primexec.executors.llvm.layout import GRAIN, plan
from primexec.executors.llvm.maps import VIEWS
from primexec.executors.llvm.piecewise import PIECEWISE
from primexec.executors.llvm.schedule import Schedule, prim, reduced_axes
from primexec.executors.llvm.target import Target, host
from primexec.executors.llvm.tiles import TileWriter
from primexec.prims import lookup

CREATION = frozenset({"full", "iota"})
_NUMBERS = (bool, int, float)


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
    parameters = frozenset({"fuel", "precise_casts"})

    def supports(self, node: fx.Node) -> Support:
        if lookup(node.target) is None:
            return no("it is no prim")
        t = node.meta.get("val")
        if not isinstance(t, Tensor):
            return no("it has several results")
        for operand in (t, *(n.meta.get("val") for n in node.all_input_nodes)):
            reason = _unfit(operand)
            if reason:
                return no(reason)
        return _judge(node)

    def fingerprint(self) -> str:
        target = host()
        return f"llvmlite {version('llvmlite')} {target.triple} {target.cpu} {target.feature_string}"

    def compile(self, region: Region, options: Mapping[str, Any]) -> RegionFunction:
        def make() -> RegionFunction:
            compiled = lower(region.graph_module.graph, options)
            module = engine.compile_module(compiled.llvm, compiled.target, threads.symbols())
            _check_results(region, compiled.schedule)
            return _bound(compiled.schedule, module)

        return repeats.once(region.graph_module.graph, options, make)


def _unfit(t: Any) -> str:
    """Why a tensor cannot be read or written; empty where it can."""
    if not isinstance(t, Tensor):
        return "an operand is no tensor"
    if t.dtype not in DTYPES:
        return f"the dtype {t.dtype} has no instructions here"
    if t.device.type != "cpu" or t.layout is not torch.strided:
        return f"a tensor is {t.layout} on {t.device}, not strided on the CPU"
    if t.is_neg() or t.is_conj():
        return "a tensor carries a lazy negation or conjugation"
    if any(type(n) is not int for n in (*t.shape, *t.stride())):
        return "a size is not known"
    target = host()
    if t.dtype is F16 and not ("+f16c" in target.features or target.triple.startswith("aarch64")):
        return "this CPU has no conversions of float16"
    return ""


def _judge(node: fx.Node) -> Support:
    """Whether there is code for a prim of fit operands."""
    name, t = prim(node), node.meta["val"]
    if name in VIEWS or name in COPIES or name == "full":
        return YES
    reason = ""
    if name in INDIRECT:
        reason = indirect.why_not(node, name)
    elif name in PIECEWISE:
        reason = piecewise.why_not(node, name, [n.meta["val"].shape for n in node.all_input_nodes])
    if name in INDIRECT or name in PIECEWISE:
        return no(reason) if reason else YES
    if name == "iota":
        whole = all(isinstance(node.kwargs[k], int) for k in ("start", "step"))
        return YES if whole else no("iota of fractions")
    operands = [n.meta["val"] for n in node.all_input_nodes]
    if name == "convert_element_type":
        return YES
    if name in REDUCTIONS:
        return _judge_reduction(node, operands[0], t)
    if name == "where":
        return YES if node.args[0].meta["val"].dtype is torch.bool else no("the predicate is not bool")  # type: ignore[union-attr]
    if any(v.dtype != operands[0].dtype for v in operands) or not operands:
        return no("operands of different dtypes")
    if any(not isinstance(a, (fx.Node, *_NUMBERS)) for a in node.args) or node.kwargs:
        return no("an argument is neither tensor nor number")
    if operands[0].dtype not in FLOATS and any(isinstance(a, float) for a in node.args):
        return no("a float beside integers")
    if name in INTEGER_DIVISIONS and operands[0].dtype in INTEGERS and not _divides(node.args[1]):
        return no("a division of integers by what may be 0")
    if pointwise(name, operands[0].dtype) is None:
        return no(f"there is no code for {name} of {operands[0].dtype}")
    return YES


def _divides(divisor: Any) -> bool:
    return isinstance(divisor, int) and divisor != 0


def _judge_reduction(node: fx.Node, source: Tensor, result: Tensor) -> Support:
    name = prim(node)
    if source.dim() and not reduced_axes(node):
        return no("a reduction over no dimension")
    if name in ("amax", "amin") and not source.numel():
        return no("the extreme of nothing")
    if name in ("sum", "prod") and (source.dtype in FLOATS) != (result.dtype in FLOATS):
        return no("a sum of one kind of numbers in another")
    return YES


def lower(graph: fx.Graph, options: Mapping[str, Any], target: Target | None = None) -> Compiled:
    """Loops and LLVM IR of a graph of prims, for the host or another target."""
    target = target or host()
    schedule = Scheduler(graph, options.get("fuel")).schedule()
    module = ModuleText(target)
    threads.define(module)
    order, precise = _order(schedule), bool(options.get("precise_casts", True))
    e = Emitter(module)
    run: list[tuple[Part, int]] = []
    room = 0
    for kernel in schedule.kernels:
        layout = plan(kernel, target)
        kind = ColumnWriter if layout.columns else TileWriter if layout.across else KernelWriter
        writer = kind(module, kernel, layout, order, precise)
        parts = writer.write()
        if layout.pieces > 1:
            room = max(room, writer.workspace.nbytes)
        grain = max(1, GRAIN // max(1, layout.unit_size))
        run += [(part, grain) for part in parts]
    args = "%args"
    if schedule.checks or room:
        args = _extended(e, len(order), room)
    for part, grain in run:
        e.do(f"call void @{threads.PARALLEL}(ptr @{part.name}, ptr {args}, i64 {part.units}, i64 {grain})")
    if schedule.checks:
        e.do(f"ret i64 {e.emit('load i64, ptr %flags')}")
    else:
        e.do("ret void")
    e.function(f"{'i64' if schedule.checks else 'void'} @program(ptr %args)")
    return Compiled(schedule, module.text(), target)


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


def _check_results(region: Region, schedule: Schedule) -> None:
    """What the program returns is what the region says, in number, shape, strides and dtype."""
    results: Any = region.graph_module.graph.output_node().args[0]
    wanted = [(tuple(v.shape), v.stride(), v.dtype) for v in (n.meta["val"] for n in results)]
    made = [(b.shape, b.strides, b.dtype) for b in (schedule.buffers[i] for i in schedule.outputs)]
    if made != wanted:
        raise ExecutorError(f"the loops of {region.name} return {made}, and the region {wanted}")


def _bound(schedule: Schedule, module: engine.Module) -> RegionFunction:
    buffers = schedule.buffers
    operands = [launch.Operand(b.shape, b.strides, b.dtype) for b in buffers]
    inputs = [o for o, b in zip(operands, buffers, strict=True) if b.kind == "input"]
    made = [i for i, b in enumerate(buffers) if b.kind == "output"]
    slots, size = [], 0
    for b in buffers:
        if b.kind == "arena":
            slots.append(size)
            count = 1
            for n in b.shape:
                count *= n
            size += -(-max(count, 1) * b.dtype.itemsize // 64) * 64
    work = sum(i.dtype.itemsize * _numel(i.shape) for i in inputs)
    call = launch.bind(module.address("program"), inputs, [operands[i] for i in made], slots=slots, arena_bytes=size,
                       work_bytes=work, keep=module, failed=_failure(schedule))  # fmt: skip
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
