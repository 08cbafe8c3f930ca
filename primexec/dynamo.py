"""torch.compile(model, backend="primexec"): Dynamo guards and captures, AOTAutograd differentiates, we compile."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from primexec import _torch, config
from primexec.config import Options, logger
from primexec.errors import PrimexecError
from primexec.executors import registry
from primexec.executors.base import Executor
from primexec.graphs import Imported, boxed, import_graph, specialise
from primexec.pipeline import compile_program, device_of
from primexec.program import Program

_OPTIONS = ("executor", "executor_parameters")
_trace_log = logger("trace")


def primexec(
    gm: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """Compile one of Dynamo's graphs; named in the entry-point group `torch_dynamo_backends`.

    Args:
        gm: Dynamo's graph of torch calls.
        example_inputs: fake tensors and symbolic sizes, one a placeholder.
        mode: of torch.compile; there is none but the default.
        options: `executor` and `executor_parameters`, as `make_traced` takes them.

    Returns:
        A function from the graph's inputs to its outputs, differentiable.

    Raises:
        ValueError: for a mode, an unknown option, an unknown executor or an unknown executor parameter.

    >>> import torch
    >>> from primexec.dynamo import primexec
    >>> compiled = torch.compile(lambda x: x * 2, backend=primexec, options={"executor": "aten"})
    >>> compiled(torch.ones(2))
    tensor([2., 2.])
    """
    if mode not in (None, "default"):
        raise ValueError(f"the backend 'primexec' has no mode {mode!r}; choose with options={{'executor': ...}}")
    given = dict(options or {})
    unknown = [name for name in given if name not in _OPTIONS]
    if unknown:
        raise ValueError(
            f"Received unexpected options: {', '.join(map(str, unknown))}. "
            f"Allowed options of the backend 'primexec' are: {', '.join(_OPTIONS)}."
        )
    chosen = Options.of(given.get("executor", "auto"), given.get("executor_parameters"))
    registry.resolve(chosen, torch.device("cpu"))
    if chosen.freeze:
        raise ValueError("freeze is a parameter of make_traced; torch.compile hands weights over as inputs")
    compiled = _torch.aot_autograd(functools.partial(compile_graph, options=chosen), chosen.save)(gm, example_inputs)
    changed: list[int] | None = None  # positions of the inputs that the graph changes in place; None: not yet run

    def run(*args: Any) -> Any:
        nonlocal changed
        if config.disabled():
            return gm(*args)
        if changed is None:
            versions = _versions(args)
            out = compiled(*args)
            changed = [] if _overlapping(args, versions) else [i for i, v in versions.items() if args[i]._version != v]
            return out
        if changed and _overlapping(args, changed):
            raise PrimexecError(
                "inputs of a compiled function overlap in memory, it changes one of them in place, and it was compiled "
                "for inputs that do not overlap: Dynamo does not tell these calls apart.\n"
                "What to do: pass a clone, or call torch.compiler.reset() and make the overlapping call first"
            )
        return compiled(*args)

    return run


def _versions(args: Sequence[Any]) -> dict[int, int]:
    """How often each tensor was changed in place; inference tensors do not count."""
    plain = ((i, t) for i, t in enumerate(args) if type(t) in (Tensor, torch.nn.Parameter))
    return {i: t._version for i, t in plain if not t.is_inference()}


def _overlapping(args: Sequence[Any], among: Iterable[int]) -> bool:
    """Whether one of these inputs overlaps in memory with any other input."""
    by_storage: dict[int, list[Tensor]] = {}
    for t in args:
        if type(t) in (Tensor, torch.nn.Parameter):
            by_storage.setdefault(_torch.storage_key(t), []).append(t)
    sharing = (by_storage[_torch.storage_key(args[i])] for i in among)
    return any(len(tensors) > 1 and _torch.overlap(tensors) for tensors in sharing)


def compile_graph(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, options: Options
) -> Callable[[list[Any]], Sequence[Any]]:
    """Compile one side that AOTAutograd made, forward or backward."""
    with _torch.modes_off():
        imported = import_graph(gm, "graph")
        executors = registry.resolve(options, device_of(imported.program))
        if imported.sizes and any(e.name != "aten" for e in executors):
            return _BySizes(imported, options, executors)
        return _compile(imported, imported.program, options, executors)


class _BySizes:
    """Compiles a graph with symbolic sizes anew for each tuple of sizes it is called with."""

    def __init__(self, imported: Imported, options: Options, executors: tuple[Executor, ...]) -> None:
        self._boxed_call = True  # of the object: what Dynamo wraps around it has its attributes, not its class's
        self._imported, self._options, self._executors = imported, options, executors
        self._compiled: dict[tuple[Any, ...], Callable[[list[Any]], Sequence[Any]]] = {}
        self._lock = threading.Lock()

    def __call__(self, args: list[Any]) -> Sequence[Any]:
        sizes = tuple((type(args[i]), args[i]) for i in self._imported.sizes)
        run = self._compiled.get(sizes)
        if run is None:
            with self._lock:
                run = self._compiled.get(sizes) or self._specialise(args)
                self._compiled[sizes] = run
        return run(args)

    def _specialise(self, args: list[Any]) -> Callable[[list[Any]], Sequence[Any]]:
        program = specialise(self._imported.program, [*args, *self._imported.program.constants])
        return _compile(self._imported, program, self._options, self._executors)


def _compile(
    imported: Imported, program: Program, options: Options, executors: tuple[Executor, ...]
) -> Callable[[list[Any]], Sequence[Any]]:
    _trace_log.debug("%s", program)
    executable = compile_program(program, options, executors, boxed=True)
    dropped = () if program is imported.program else imported.sizes
    return boxed(executable.run, program, executable.plan.program.constants, dropped)
