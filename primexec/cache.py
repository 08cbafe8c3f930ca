"""The programs of one traced function under one set of options: a bounded LRU, its counts, its warning."""

from __future__ import annotations

import functools
import logging
import threading
import warnings
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple, NoReturn

import torch

from primexec import _torch, _torch_capture, _torch_flag
from primexec._torch_dynamo import capture_lock
from primexec.autograd import bind
from primexec.bytecode import user_source_of
from primexec.capture import capture, left_the_function, raise_located
from primexec.captured import Captured, FirstUse, Signature
from primexec.config import RETRACES_BEFORE_WARNING, Options, logger
from primexec.decisions import DecidedOtherwiseError, Decisions, agree, decided_in
from primexec.descriptions import VALUES_BEFORE_INPUT, changing_numbers, describe_call
from primexec.errors import CaptureError, ExecutorError, PrimexecError, RehearsalError, RetraceWarning
from primexec.executors import registry
from primexec.executors.base import Executor
from primexec.guards import MISS, Entry, make_entry
from primexec.instances import tensors_of
from primexec.pipeline import compile_program, device_of
from primexec.runtime import Executable

_ATTEMPTS = 8  # to find the program whose decisions are those of a call

_guards_log, _trace_log = logger("guards"), logger("trace")


class CacheInfo(NamedTuple):
    """Counts since the function was traced first or `cache_clear()` was called."""

    hits: int
    misses: int
    traces: int
    compiles: int
    evictions: int
    entries: int


class Cache:
    """The entries of one traced function, the most recently used first."""

    def __init__(self, signature: Signature, options: Options, size: int) -> None:
        if not isinstance(size, int):
            raise TypeError(f"cache_size must be an int, got {size!r}")
        if size < 1:
            raise ValueError(f"cache_size must be at least 1, got {size}")
        self.signature, self.options, self.size = signature, options, size
        self.name = signature.name
        self.entries: tuple[Entry, ...] = ()
        self._lock = threading.Lock()
        self._culprits: Counter[str] = Counter()
        self._first_uses: set[int] = set()
        self._varying = self._fixed = frozenset[str]()  # numbers that are inputs, and those whose values are needed
        self._warned = False
        self.hits = self.misses = self.traces = self.compiles = self.evictions = 0

    def info(self) -> CacheInfo:
        return CacheInfo(self.hits, self.misses, self.traces, self.compiles, self.evictions, len(self.entries))

    def clear(self) -> None:
        with self._lock:
            self.entries = ()
            self._culprits.clear()
            self._first_uses.clear()
            self._varying = self._fixed = frozenset()
            self._warned = False
            self.hits = self.misses = self.traces = self.compiles = self.evictions = 0

    def lookup(self, args: tuple[Any, ...], kwargs: dict[str, Any], known: Decisions = ()) -> tuple[Any, Decisions]:
        """What the first entry that fits returns, or MISS; and what is known of what the call decides."""
        for entry in self.entries:
            if not agree(entry.captured.decisions, known):
                continue
            try:
                out = entry.call(args, kwargs)
            except DecidedOtherwiseError as error:
                known = error.known
                continue
            if out is not MISS:
                self.hits += 1
                if entry is not self.entries[0]:
                    self._promote(entry)
                return out, known
        return MISS, known

    def _promote(self, entry: Entry) -> None:
        with self._lock:
            if entry in self.entries:
                self.entries = (entry, *(e for e in self.entries if e is not entry))

    def call(self, fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], known: Decisions = ()) -> Any:
        """Serve the call from an entry, or trace it; inline where somebody else is tracing.

        Args:
            known: what is known of what the call decides.
        """
        for _ in range(_ATTEMPTS):
            out, known = self.lookup(args, kwargs, known)
            if out is not MISS:
                return out
            if runs_inline(args, kwargs):
                return fn(*args, **kwargs)
            with capture_lock():
                out, known = self.lookup(args, kwargs, known)  # another thread may have traced it meanwhile
                if out is not MISS:
                    return out
                self.misses += 1
                description = describe_call(self.signature, args, kwargs)
                self._note_miss(description, known)
                try:
                    entry, raised = self._trace(fn, args, kwargs, description, known), None
                except Exception as error:
                    own = isinstance(error, PrimexecError) and not isinstance(error, RehearsalError)
                    if own or not left_the_function(error):
                        raise
                    entry, raised = None, error
            if raised is not None:
                _raise_as_eager(fn, args, kwargs, raised)
            if entry is None:
                return fn(*args, **kwargs)
            try:
                out = entry.call(args, kwargs)
            except DecidedOtherwiseError as error:  # by a rounding, or by what another thread wrote meanwhile
                known = error.known
                continue
            if out is MISS:
                raise AssertionError(f"{self.name}: a new program does not fit the call it was made for")
            return out
        raise CaptureError(
            f"{_ATTEMPTS} programs were traced for one call, and each came to another value than it was traced for",
            hint="decide by values that do not depend on rounding, or use the executor 'aten'",
            source=known[-1].source,
        )

    @_torch_capture.collector_paused()
    def _trace(
        self,
        fn: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        description: dict[str, str],
        known: Decisions,
    ) -> Entry | None:
        """The new entry; None where the function is to run as it is, for it sets something up at its first use."""
        devices = [t.device for t in tensors_of((args, kwargs))]
        executors = registry.resolve(self.options, devices[0] if devices else torch.get_default_device())
        save = registry.saving(self.options, executors)
        attempt = functools.partial(capture, fn, args, kwargs, self.signature, save, known=known)
        try:
            captured = self._capture(attempt, description)
        except Exception as error:
            if isinstance(error, PrimexecError) or not left_the_function(error) or not _torch_flag.was_told():
                raise
            captured = self._capture_in_secret(attempt, description, error)
        if (first_use := captured.first_use) is not None:
            if self._is_first(first_use, description):
                return None
            counters = first_use.numbers  # such as those that only every other call changes
            counted = self._try(attempt, self._varying | counters) if counters else None
            if counted is None or counted.first_use is not None:
                raise_located(first_use.error, fn)
            captured = counted
        self._varying |= captured.reads.varying
        self.traces += 1
        try:
            captured, executable = compile_captured(captured, self.options, executors)
        except PrimexecError:  # such as one of an executor that takes tensors only
            if not self._varying:
                raise
            self._varying, self._fixed = frozenset(), self._fixed | self._varying
            captured, executable = compile_captured(attempt(), self.options, executors)
        self._count(executable.compiles)
        if executable.training is not None:
            executable.training.compiled = weakref.WeakMethod(self._count)
        entry = make_entry(captured, executable, args, kwargs, description)
        with self._lock:
            self.evictions += max(0, len(self.entries) + 1 - self.size)
            self.entries = (entry, *self.entries)[: self.size]
        return entry

    def _count(self, compiles: int) -> None:
        self.compiles += compiles

    def _capture_in_secret(
        self, attempt: Callable[..., Captured], description: dict[str, str], raised: Exception
    ) -> Captured:
        """The program of a call that raises where it is told that it is compiled; what it raised, if none helps."""
        try:
            with _torch_flag.in_secret():
                return self._capture(attempt, description)
        except Exception:
            raise raised from None

    def _capture(self, attempt: Callable[..., Captured], description: dict[str, str]) -> Captured:
        """The program of a call; one that takes the numbers that keep changing as inputs, where it needs no values."""
        captured, refused = None, set()
        for label in changing_numbers([e.key for e in self.entries], description, min(VALUES_BEFORE_INPUT, self.size)):
            if label not in self._varying | self._fixed:
                captured = self._try(attempt, self._varying | {label})
                if captured is None:
                    refused.add(label)
                else:
                    self._varying |= {label}
        captured = captured or (self._varying and self._try(attempt, self._varying)) or attempt()
        self._fixed |= refused  # the call itself was no error
        return captured

    def _try(self, attempt: Callable[[frozenset[str]], Captured], varying: frozenset[str]) -> Captured | None:
        try:
            return attempt(varying)
        except Exception as error:  # of the user's code, too, which may raise none with plain numbers
            _trace_log.debug("%s: %s stay constants: %s", self.name, ", ".join(sorted(varying)), error)
            return None

    def _is_first(self, first_use: FirstUse, description: dict[str, str]) -> bool:
        """Whether the same call has not set up the same thing before: else it would never be served from the cache."""
        key = hash((first_use.error.reason, *description.items()))
        is_first = key not in self._first_uses
        self._first_uses.add(key)
        if is_first:
            _trace_log.debug("%s: run as it is, for at this call %s", self.name, first_use.error.reason)
        return is_first

    def _note_miss(self, description: dict[str, str], known: Decisions) -> None:
        # Comparing with every entry at every miss would cost n² for n programs.
        entries = self.entries[:RETRACES_BEFORE_WARNING]
        if not entries or (self._warned and not _guards_log.isEnabledFor(logging.DEBUG)):
            return
        nearest, entry = min(((e.key.differences(description), e) for e in entries), key=lambda found: len(found[0]))
        deciding = known or entry.captured.conditions
        if deciding and not nearest:
            at = deciding[-1]
            nearest = [(decided_in(at.source), str(not at.outcome), str(at.outcome))]
        for label, then, now in nearest:
            _guards_log.debug("%s: retracing because %s is %s, was %s", self.name, label, now, then)
            self._culprits[label] += 1
        if self.traces > RETRACES_BEFORE_WARNING - 1 and not self._warned and self._culprits:
            self._warned = True
            label, count = self._culprits.most_common(1)[0]
            warnings.warn(
                f"{self.name} has been traced {self.traces} times; what kept changing is {label} ({count} times). "
                "Pass it as a tensor if it is a number, keep shapes to a few sizes (pad or bucket them), "
                "use torch.where if it is a branch, or keep it out of the traced function.",
                RetraceWarning,
                stacklevel=5,
            )


def _raise_as_eager(
    fn: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], raised: Exception
) -> NoReturn:
    """Run a function that raised while it was traced: its exception, and what it does before, are eager's."""
    source = user_source_of(raised)
    raised.__traceback__ = None  # the same object may be raised again
    fn(*args, **kwargs)
    raise CaptureError(
        f"the function raises {type(raised).__name__} while it is traced ({raised}), and none when it runs by itself, "
        "as it has done now",
        hint="keep what depends on tracing outside of the traced function",
        source=source,
    ) from raised


def runs_inline(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the call belongs to somebody else's trace or transform, or to a capture of ours."""
    return (
        _torch_capture.capturing()
        or _torch.foreign_mode_active()
        or any(map(_torch.is_foreign_tensor, tensors_of((args, kwargs))))
    )


def compile_captured(
    captured: Captured, options: Options, executors: tuple[Executor, ...]
) -> tuple[Captured, Executable]:
    """Passes, plan, executable."""
    compile_ = functools.partial(
        compile_program, options=options, executors=executors, inference=torch.is_inference_mode_enabled()
    )
    if options.freeze and captured.joint is not None:
        raise ExecutorError(f"freeze: results of {captured.program.name} require grad; call it under torch.no_grad()")
    forward = compile_(captured.program, frozen=captured.state_values() if options.freeze else None)
    program = forward.plan.program
    if captured.joint is not None:
        by_cost = len(executors) > 1 and registry.allowed(options, executors, device_of(program)) is None
        on_aten = functools.partial(compile_, captured.program, executors=executors[-1:])
        chooses = by_cost and not captured.runs_backward
        forward = bind(captured.joint, forward, compile_, on_aten if chooses else None)
    return replace(captured, program=program), forward
