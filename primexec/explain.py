"""What `traced.explain()` shows: the plan of a call, and why it would or would not be served from the cache."""

from __future__ import annotations

import html
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from primexec._torch_dynamo import capture_lock
from primexec.cache import Cache, compile_captured, runs_inline
from primexec.capture import capture
from primexec.decisions import Decision, Decisions
from primexec.descriptions import describe_call
from primexec.executors import registry
from primexec.guards import MISS
from primexec.inspection import described
from primexec.instances import tensors_of
from primexec.partition import Plan

_MAX_SHOWN = 12
_MAX_KERNEL_LINES = 60


@dataclass(frozen=True)
class Explanation:
    """The plan of one call and its relation to the cache.

    Attributes:
        name: the function's name.
        plan: regions, their executors, operator counts, and why operators were declined.
        cached: whether a cached program serves this call.
        differences: (label, in the nearest cached program, in this call); empty without cached programs.
        backward: the plan of the backward program, where results require grad.
        saved: how many bytes are saved for backward, and how many eager saves.
        kernels: what the executors tell about their regions: the kernels of `llvm`, and why they are what they are.
        decisions: values that the function decides by, and the lines that do.
        guarded: how many Python values, dicts and tensors a call is checked against.
    """

    name: str
    plan: Plan | None
    cached: bool
    differences: tuple[tuple[str, str, str], ...]
    guarded: str
    backward: Plan | None = None
    saved: tuple[int, int] = (0, 0)
    kernels: tuple[str, ...] = ()
    decisions: Decisions = ()

    def __str__(self) -> str:
        if self.plan is None:
            return f"{self.name}: runs inline, inside another trace or transform"
        lines = [f"{self.name}: {'served from the cache' if self.cached else 'not in the cache'}"]
        lines += [f"  {line}" for line in str(self.plan).splitlines()]
        lines += [f"  {line}" for line in self.plan.program.notes]
        lines += [f"  {line}" for line in self.kernels[:_MAX_KERNEL_LINES]]
        if len(self.kernels) > _MAX_KERNEL_LINES:
            lines.append(f"  and {len(self.kernels) - _MAX_KERNEL_LINES} lines more, in `kernels`")
        if self.backward is not None:
            lines += [f"  backward: {line}" for line in str(self.backward).splitlines()]
            ours, eager = (f"{count:,} bytes" for count in self.saved)
            lines.append(f"  saved for backward: {ours} (eager: {eager})")
        lines.append(f"  checked at every call: {self.guarded}")
        lines += [f"  decided at every call: {d.outcome} in {d.source and d.source.short}" for d in self.decisions]
        if self.differences:
            lines.append("  differs from the nearest cached program in")
            shown = self.differences[:_MAX_SHOWN]
            lines += [f"    {label}: was {then}, is {now}" for label, then, now in shown]
            if len(self.differences) > _MAX_SHOWN:
                lines.append(f"    and {len(self.differences) - _MAX_SHOWN} more")
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return f"<pre>{html.escape(str(self))}</pre>"


def explain(fn: Callable[..., Any], cache: Cache, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Explanation:
    """Trace and plan the call without running it."""
    name = cache.name
    if runs_inline(args, kwargs):
        return Explanation(name, None, False, (), "")
    description = describe_call(cache.signature, args, kwargs)
    nearest = min((e.key.differences(description) for e in cache.entries), key=len, default=[])
    fitting = [e for e in cache.entries if e.call(args, kwargs, True) is not MISS]
    varying = fitting[0].captured.labels() if fitting else frozenset[str]()
    tensors = tensors_of((args, kwargs))
    executors = registry.resolve(cache.options, tensors[0].device if tensors else torch.get_default_device())
    with capture_lock():
        captured = capture(fn, args, kwargs, cache.signature, registry.saving(cache.options, executors), varying)
        captured, executable = compile_captured(captured, cache.options, executors)
    reads = captured.reads
    counts = {
        "tensors": len(captured.arguments) + len(captured.states),
        "Python namespaces": len(reads.namespaces),
        "closure cells and class attributes": len(reads.cells),
        "containers": len(reads.containers),
    }
    guarded = ", ".join(f"{count} {what}" for what, count in counts.items() if count)
    training = executable.training
    return Explanation(
        name,
        executable.plan,
        any(e.captured.decisions == captured.decisions for e in fitting),
        tuple(nearest),
        f"{guarded or 'nothing'}, global state",
        training and training.plan(),
        training.saved_bytes() if training is not None else (0, 0),
        described(executable.plan, executors, cache.options),
        (*captured.decisions, *(Decision(c.question, c.outcome, c.source) for c in captured.conditions)),
    )
