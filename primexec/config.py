"""Options: frozen, checked where they enter. The only reader of environment variables."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass

Executors = str | Sequence[str]

COMMON_PARAMETERS = frozenset({"strict", "save"})  # known whatever the executors are
SAVE = ("less", "default", "more")  # how much a forward program saves for backward
LOG_TOPICS = ("trace", "guards", "plan", "kernels")
RETRACES_BEFORE_WARNING = 8

_disabled: ContextVar[bool] = ContextVar("primexec_disabled", default=False)
_preferred: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Options:
    """What a program is compiled with: executors in order of priority, and their parameters.

    Attributes:
        executors: names in order of priority; `("auto",)` means those of PRIMEXEC_EXECUTOR, or the best for the
            inputs' device.
        parameters: `(name, value)` pairs in order of name.
    """

    executors: tuple[str, ...] = ("auto",)
    parameters: tuple[tuple[str, object], ...] = ()

    @classmethod
    def of(cls, executor: Executors, parameters: Mapping[str, object] | None) -> Options:
        """Options from what users write; raises ValueError or TypeError where that is malformed."""
        names = (executor,) if isinstance(executor, str) else tuple(executor) if isinstance(executor, Iterable) else ()
        if not names or not all(isinstance(name, str) for name in names):
            raise TypeError(f"executor must be a name or a non-empty sequence of names, got {executor!r}")
        if not isinstance(parameters or {}, Mapping):
            raise TypeError(f"executor_parameters must be a dict of names and values, got {parameters!r}")
        for name, value in (parameters or {}).items():
            try:
                hash(value)
            except TypeError:
                raise TypeError(f"executor parameter {name!r} cannot be hashed: {value!r}") from None
        save = (parameters or {}).get("save", "default")
        if save not in SAVE:
            raise ValueError(f"executor parameter 'save' must be one of {', '.join(SAVE)}, got {save!r}")
        return cls(names, tuple(sorted((parameters or {}).items(), key=lambda item: item[0])))

    @property
    def save(self) -> str:
        """How much a forward program saves for backward."""
        return str(dict(self.parameters).get("save", "default"))

    @property
    def freeze(self) -> bool:
        """Whether constants may be made of weights."""
        return bool(dict(self.parameters).get("freeze"))

    def for_executors(self) -> dict[str, object]:
        """The parameters that executors are given: those that are not ours."""
        return {k: v for k, v in self.parameters if k not in COMMON_PARAMETERS}


def disabled() -> bool:
    """Whether everything runs eagerly: inside `disable()`, or with PRIMEXEC_DISABLE=1."""
    return _disabled.get()


@contextmanager
def disable() -> Iterator[None]:
    """Run every traced function eagerly inside this context, in this thread or task.

    >>> import torch, primexec
    >>> traced = primexec.make_traced(lambda x: x + 1)
    >>> with primexec.disable():
    ...     _ = traced(torch.ones(2))
    >>> traced.cache_info().misses
    0
    """
    token = _disabled.set(True)
    try:
        yield
    finally:
        _disabled.reset(token)


_verify_passes = False


def verify_passes(on: bool) -> None:
    """Check the laws of programs after every single pass, not at the end only: for tests."""
    global _verify_passes
    _verify_passes = on


def verifies_passes() -> bool:
    """Whether the laws are checked after every pass."""
    return _verify_passes


def logger(topic: str) -> logging.Logger:
    """The logger of one topic; `PRIMEXEC_LOGS="trace,guards"` shows topics on stderr."""
    return logging.getLogger(f"primexec.{topic}")


def preferred() -> tuple[str, ...]:
    """The executors that "auto" stands for, by PRIMEXEC_EXECUTOR="llvm,aten"; none where it is not set."""
    return _preferred


def _read_environment() -> None:
    global _preferred
    _preferred = _names("PRIMEXEC_EXECUTOR")
    if os.environ.get("PRIMEXEC_DISABLE", "0") not in ("", "0"):
        global _disabled
        _disabled = ContextVar("primexec_disabled", default=True)
    topics = _names("PRIMEXEC_LOGS")
    unknown = [t for t in topics if t not in LOG_TOPICS]
    if unknown:
        raise ValueError(f"PRIMEXEC_LOGS names unknown topics {unknown}; known ones are {list(LOG_TOPICS)}")
    if topics:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("[%(name)s] %(message)s"))
        logging.getLogger("primexec").addHandler(handler)
    for topic in topics:
        logger(topic).setLevel(logging.DEBUG)


def _names(variable: str) -> tuple[str, ...]:
    return tuple(n.strip() for n in os.environ.get(variable, "").split(",") if n.strip())


_read_environment()


READ_ENVIRONMENT = frozenset({"environ", "getenv"})  # what code names that reads environment variables


def environment() -> dict[bytes, bytes]:
    """The dict behind `os.environ`, whose version tells when a variable changed."""
    held: dict[bytes, bytes] = os.environ._data  # type: ignore[attr-defined]
    return held
