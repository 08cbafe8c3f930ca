"""primexec: trace a PyTorch function once, and run the trace on the executor you choose."""

from primexec.api import execute, make_traced
from primexec.compare import Comparison, compare
from primexec.config import disable
from primexec.errors import CaptureError, ExecutorError, PrimexecError, RetraceWarning, VerificationError
from primexec.executors.llvm.pool import empty_cache
from primexec.executors.registry import executors
from primexec.program import Program

__version__ = "0.1.0"

__all__ = [
    "CaptureError",
    "Comparison",
    "ExecutorError",
    "PrimexecError",
    "Program",
    "RetraceWarning",
    "VerificationError",
    "compare",
    "disable",
    "empty_cache",
    "execute",
    "executors",
    "make_traced",
]
