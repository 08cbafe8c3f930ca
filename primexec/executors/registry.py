"""Which executors there are. Names are known at once; code is loaded when an executor is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib.metadata import EntryPoint, entry_points

import torch

from primexec.config import COMMON_PARAMETERS, Options, preferred
from primexec.errors import ExecutorError
from primexec.executors.base import PROTOCOL_VERSION, Executor

GROUP = "primexec.executors"
_BUILTIN: dict[str, str] = {
    "aten": "primexec.executors.aten:AtenExecutor",
    "numpy": "primexec.executors.numpy_ref:NumpyExecutor",
    "llvm": "primexec.executors.llvm.executor:LlvmExecutor",
}


@dataclass(frozen=True)
class Executors(Mapping[str, str]):
    """Executors by name, each with the reason why it is not available; an empty reason means that it is."""

    reasons: dict[str, str]

    def __getitem__(self, name: str) -> str:
        return self.reasons[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.reasons)

    def __len__(self) -> int:
        return len(self.reasons)

    def __str__(self) -> str:
        width = max(map(len, self.reasons))
        return "\n".join(f"{name:<{width}}  {why or 'available'}" for name, why in self.reasons.items())

    __repr__ = __str__


@cache
def _entry_points() -> dict[str, EntryPoint]:
    found = {name: EntryPoint(name, path, GROUP) for name, path in _BUILTIN.items()}
    for point in entry_points(group=GROUP):
        if point.name in found and point.value != found[point.name].value:
            raise ExecutorError(
                f"two executors are named {point.name!r}: {found[point.name].value} and {point.value}; uninstall one"
            )
        found[point.name] = point
    return found


@cache
def load(name: str) -> Executor:
    """The executor of this name.

    Raises:
        ValueError: where no executor has this name.
        ExecutorError: where its code cannot be loaded or does not follow the protocol.
    """
    points = _entry_points()
    if name not in points:
        raise ValueError(f"Received unexpected value for 'executor': {name}. Allowed values are: {', '.join(points)}.")
    point = points[name]
    try:
        module, _, attribute = point.value.partition(":")
        executor = getattr(importlib.import_module(module), attribute)()
    except Exception as error:
        raise ExecutorError(f"the executor {name!r} ({point.value}) cannot be loaded: {error}") from error
    if not isinstance(executor, Executor):
        missing = [a for a in _PROTOCOL_MEMBERS if not hasattr(executor, a)]
        raise ExecutorError(f"the executor {name!r} ({point.value}) lacks {', '.join(missing)}")
    if executor.protocol_version != PROTOCOL_VERSION:
        raise ExecutorError(
            f"the executor {name!r} speaks version {executor.protocol_version} of the protocol, "
            f"this primexec version {PROTOCOL_VERSION}; install versions that match"
        )
    return executor


_PROTOCOL_MEMBERS = ("name", "protocol_version", "parameters", "supports", "compile", "fingerprint")


def executors() -> Executors:
    """What executors there are, and why one is not available.

    >>> import primexec
    >>> print(primexec.executors())
    aten   available
    numpy  available
    llvm   available
    """
    reasons = {}
    for name in _entry_points():
        try:
            load(name)
            reasons[name] = ""
        except ExecutorError as error:
            reasons[name] = str(error)
    return Executors(reasons)


def resolve(options: Options, device: torch.device) -> tuple[Executor, ...]:
    """The executors that the options ask for, `aten` last.

    Raises:
        ValueError: for an unknown executor, or a parameter that none of them knows.
    """
    names = asked_for(options, device)
    chosen = [load(name) for name in dict.fromkeys((*names, "aten"))]
    known = COMMON_PARAMETERS.union(*(e.parameters for e in chosen))
    unknown = [name for name, _ in options.parameters if name not in known]
    if unknown:
        raise ValueError(
            f"Received unexpected executor parameters: {', '.join(unknown)}. "
            f"Allowed parameters of {', '.join(names)} are: {', '.join(sorted(known))}."
        )
    return tuple(chosen)


def saving(options: Options, executors: tuple[Executor, ...]) -> str:
    """How much a forward program saves for backward: where an executor fuses, cheap values are made again unasked."""
    fusing = "save" not in dict(options.parameters) and any(getattr(e, "fuses", True) for e in executors)
    return "less" if fusing else options.save


def asked_for(options: Options, device: torch.device) -> list[str]:
    """The names that the options hold, "auto" replaced by what is best for this device."""
    return [n for name in options.executors for n in (_best(device) if name == "auto" else (name,))]


def allowed(options: Options, executors: tuple[Executor, ...], device: torch.device) -> frozenset[str] | None:
    """The executors that a program may run on, where it is strict; None where it may fall back to `aten`."""
    strict = dict(options.parameters).get("strict") or any(getattr(e, "strict", False) for e in executors)
    return frozenset(asked_for(options, device)) if strict else None


def _best(device: torch.device) -> tuple[str, ...]:
    """What "auto" stands for, in order: what the environment says, or the best for this device."""
    return preferred() or (("llvm", "aten") if device.type == "cpu" else ("aten",))
