"""A bar on a terminal while something takes longer than a moment."""

from __future__ import annotations

import importlib
import sys
import time
from collections.abc import Generator, Sequence
from typing import Any, TypeVar

T = TypeVar("T")

PATIENCE = 1.0  # seconds before anything is shown


def shown(items: Sequence[T], title: str) -> Generator[T]:
    """The items; where work on them goes on for longer than PATIENCE, with a bar that vanishes after the last.

    It stands on standard error, if that is a terminal. Close the generator where work may raise.
    """
    bar: Any = None
    started = time.monotonic()
    try:
        for done, item in enumerate(items):
            if bar is None and time.monotonic() - started >= PATIENCE:
                bar = _bar(title, len(items))
            if bar is not None:
                bar.update(bar.task_ids[0], completed=done, refresh=True)
            yield item
    finally:
        if bar is not None:
            bar.stop()


def _bar(title: str, total: int) -> Any:
    """A bar that has begun; None where there is no terminal."""
    if not sys.stderr.isatty():
        return None
    console: Any = importlib.import_module("rich.console")  # only here: `import primexec` stays light
    progress: Any = importlib.import_module("rich.progress")
    # Neither a thread of its own nor hands on sys.stdout: user code may run beside it.
    quiet = {"auto_refresh": False, "redirect_stdout": False, "redirect_stderr": False}
    bar = progress.Progress(console=console.Console(stderr=True), transient=True, **quiet)
    bar.add_task(title, total=total)
    bar.start()
    return bar
