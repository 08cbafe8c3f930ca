"""Every failure a user can meet."""

from __future__ import annotations

import linecache
from dataclasses import dataclass


class PrimexecError(RuntimeError):
    """Base class of the errors that primexec raises of its own accord."""


class RetraceWarning(UserWarning):
    """One function keeps being traced again because an argument keeps changing."""


@dataclass(frozen=True, slots=True)
class SourceLine:
    """A line of the user's code: the file, the line number (from 1) and the function's name."""

    file: str
    line: int
    function: str

    @property
    def text(self) -> str:
        """The source text of the line, stripped; empty where the file cannot be read."""
        return linecache.getline(self.file, self.line).strip()

    @property
    def short(self) -> str:
        """`model.py:12 in forward: return x + 1`."""
        return f"{self.file.rpartition('/')[2]}:{self.line} in {self.function}: {self.text}"

    def __str__(self) -> str:
        return f'File "{self.file}", line {self.line}, in {self.function}\n    {self.text}'


class CaptureError(PrimexecError):
    """A call that cannot be captured soundly.

    The message says what happened, on which line of the user's code, and the way out.

    Attributes:
        reason: what happened, in one sentence.
        hint: what to do about it.
        source: the user's line, where one is known.
    """

    def __init__(self, reason: str, *, hint: str = "", source: SourceLine | None = None) -> None:
        self.reason, self.hint, self.source = reason, hint, source
        parts = [reason]
        if source is not None:
            parts.append(f"  {source}")
        if hint:
            parts.append(f"What to do: {hint}")
        super().__init__("\n".join(parts))

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (self.reason, self.hint, self.source)


def _rebuild(reason: str, hint: str, source: SourceLine | None) -> CaptureError:
    return CaptureError(reason, hint=hint, source=source)


class RehearsalError(CaptureError):
    """An operator raises on the values of a call that is traced, and of which a value was asked for.

    Attributes:
        error: what it raises.
    """

    def __init__(self, error: Exception, source: SourceLine | None) -> None:
        self.error = error
        super().__init__(f"an operator raises {type(error).__name__} ({error})", source=source)

    def __reduce__(self) -> tuple[object, ...]:
        return RehearsalError, (self.error, self.source)


class VerificationError(PrimexecError):
    """A program that breaks a law of its level: a bug in primexec or in an executor, never the user's."""


class IndexOutOfRangeError(PrimexecError, IndexError):
    """An index in a tensor lies beyond the dimension that it indexes.

    Eager PyTorch raises IndexError for some operators and RuntimeError for others: this is both.
    """


class ValueCheckError(PrimexecError):
    """Elements of a tensor that its operator does not take; eager PyTorch raises RuntimeError, which this is, too."""


class ExecutorError(PrimexecError):
    """An executor that was asked for cannot be loaded, or broke its protocol."""
