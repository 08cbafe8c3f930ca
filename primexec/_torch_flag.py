"""What code is told that asks whether it is compiled. Like `_torch.py`, this file touches private names."""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from primexec._torch import torch_directory

state = threading.local()


class _Answers(threading.local):
    """Of this thread: whether captures are kept secret, and whether code was told of one."""

    secret = told = False


_answers = _Answers()


def capturing() -> bool:
    """Whether this thread is inside a capture of ours."""
    return getattr(state, "depth", 0) > 0


class CapturingFlag:
    """Stands in for torch's process-wide `_is_compiling_flag`: true only in the thread that captures.

    The plain flag is seen by every thread, and library code branches on it: another thread's eager call
    would take the path meant for tracing.
    """

    def __init__(self, before: object) -> None:
        self.before = before

    def __bool__(self) -> bool:
        asking = sys._getframe(1).f_code.co_filename
        if asking.startswith(tuple(os.path.join(torch_directory(), *p) for p in (("nn", "modules"), ("optim",)))):
            return False  # torch.nn leaves its fast paths when compiling, optimizers reckon in tensors; eager does not
        told = capturing() and not _answers.secret
        _answers.told |= told
        return told or bool(self.before)


def _as_bool(name: str) -> Callable[..., Any]:
    return lambda self, *other: getattr(bool(self), name)(*other)


# Library code also combines the flag with others: transformers writes `is_compiling() | is_proxy(x)`.
for _name in ("or", "ror", "and", "rand", "xor", "rxor", "eq", "ne", "int", "index", "hash", "repr"):
    setattr(CapturingFlag, f"__{_name}__", _as_bool(f"__{_name}__"))


def was_told() -> bool:
    """Whether code was told of a capture since this was last asked."""
    told, _answers.told = _answers.told, False
    return told


@contextmanager
def in_secret() -> Iterator[None]:
    """Captures in this thread go unnoticed by code that asks whether it is compiled."""
    _answers.secret = True
    try:
        yield
    finally:
        _answers.secret = False
