"""Kernels as events of torch.profiler: compiled programs ask PyTorch whether anybody listens, and only then tell."""

from __future__ import annotations

import ctypes
import threading
from functools import cache
from typing import Any

import torch

from primexec._torch import load_libtorch
from primexec.executors.llvm.emit import Emitter, ModuleText

LISTENING = "_ZN2at12hasCallbacksEv"  # at::hasCallbacks(), which every operator of ATen asks too
MARK = "primexec_mark"

_running = threading.local()


def _mark(name: bytes | None) -> None:
    """A kernel starts; without a name, the last one ends."""
    stack: list[Any] = _running.__dict__.setdefault("stack", [])
    if name is None:
        stack.pop().__exit__(None, None, None)
        return
    event = torch.profiler.record_function(name.decode())
    event.__enter__()
    stack.append(event)


_callback = ctypes.CFUNCTYPE(None, ctypes.c_char_p)(_mark)


@cache
def symbols() -> dict[str, int]:
    """Addresses of what programs call; empty where PyTorch cannot be asked."""
    library = load_libtorch()
    if library is None or not hasattr(library, LISTENING):
        return {}
    listening, mark = (ctypes.cast(f, ctypes.c_void_p).value for f in (getattr(library, LISTENING), _callback))
    return {LISTENING: listening, MARK: mark} if listening and mark else {}


def event(module: ModuleText, name: str) -> str:
    """A pointer to the name under which a kernel shows; null where nobody can listen."""
    if not symbols():
        return "null"
    text = name.encode("ascii", "replace").replace(b'"', b"'").replace(b"\\", b"/").decode()
    return module.constant(f"event{len(module.globals)}", f'[{len(text) + 1} x i8] c"{text}\\00"')


def listening(e: Emitter, module: ModuleText) -> str:
    """Emits the question whether anybody listens; the empty string where nobody can."""
    if not symbols():
        return ""
    module.declare(LISTENING, "zeroext i1 ()")
    module.declare(MARK, "void (ptr)")
    return e.emit(f"call zeroext i1 @{LISTENING}()")


def mark(e: Emitter, listening: str, event: str) -> None:
    """Emits that an event starts, or, for null, that the last one ends, to whoever listens."""
    if not listening:
        return
    observed, join = e.new_label("observed"), e.new_label("join")
    e.do(f"br i1 {listening}, label %{observed}, label %{join}")
    e.start(observed)
    e.do(f"call void @{MARK}(ptr {event})")
    e.do(f"br label %{join}")
    e.start(join)
