"""The bar that a long compilation shows on a terminal, and nowhere else."""

from __future__ import annotations

import io
import sys
from contextlib import closing

import pytest
import torch

import primexec
from primexec import progress


class Screen(io.StringIO):
    """Standard error that says whether it is a terminal."""

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


def compile_something(monkeypatch: pytest.MonkeyPatch, *, terminal: bool, patience: float) -> str:
    screen = Screen(terminal)
    monkeypatch.setattr(progress, "PATIENCE", patience)
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    x = torch.randn(3, 3)
    with torch.no_grad():
        primexec.make_traced(lambda x: x.sin().exp() @ x, executor=("llvm", "aten"))(x)
    return screen.getvalue()


def test_a_terminal_sees_a_bar_that_vanishes(monkeypatch: pytest.MonkeyPatch) -> None:
    text = compile_something(monkeypatch, terminal=True, patience=0.0)
    assert "compiling" in text
    assert text.rpartition("compiling")[2].count("\x1b[2K")  # its line is erased


@pytest.mark.parametrize(("terminal", "patience"), [(False, 0.0), (True, float("inf"))])
def test_nothing_else_does(monkeypatch: pytest.MonkeyPatch, terminal: bool, patience: float) -> None:
    assert compile_something(monkeypatch, terminal=terminal, patience=patience) == ""


def test_the_bar_goes_when_work_stops_early(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = Screen(True)
    monkeypatch.setattr(progress, "PATIENCE", 0.0)
    monkeypatch.setattr(sys, "stderr", screen)
    with closing(progress.shown([1, 2], "compiling")) as items:
        assert next(items) == 1
    assert screen.getvalue().rpartition("compiling")[2].count("\x1b[2K")
