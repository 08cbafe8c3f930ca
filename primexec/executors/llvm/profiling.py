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


def announced(e: Emitter, module: ModuleText, calls: list[tuple[str, str]]) -> None:
    """Emits calls, each with the name under which it shows.

    Args:
        calls: names, and instructions.
    """
    if not symbols() or not calls:
        for _, call in calls:
            e.do(call)
        return
    module.declare(LISTENING, "zeroext i1 ()")
    module.declare(MARK, "void (ptr)")
    observed, quiet, join = (e.new_label(s) for s in ("observed", "quiet", "join"))
    e.do(f"br i1 {e.emit(f'call zeroext i1 @{LISTENING}()')}, label %{observed}, label %{quiet}")
    e.start(observed)
    for number, (name, call) in enumerate(calls):
        text = name.encode("ascii", "replace").replace(b'"', b"'").replace(b"\\", b"/").decode()
        place = module.constant(f"event{number}", f'[{len(text) + 1} x i8] c"{text}\\00"')
        e.do(f"call void @{MARK}(ptr {place})")
        e.do(call)
        e.do(f"call void @{MARK}(ptr null)")
    e.do(f"br label %{join}")
    e.start(quiet)
    for _, call in calls:
        e.do(call)
    e.do(f"br label %{join}")
    e.start(join)
