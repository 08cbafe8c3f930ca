"""What `import primexec` costs after `import torch`, and which optional modules it pulls in."""

from __future__ import annotations

import sys
import time

from benchmarks.process import answer

OPTIONAL = ("jax", "triton", "onnx", "onnxruntime", "llvmlite", "torch._inductor", "torch._dynamo")


def main() -> None:
    started = time.perf_counter()
    import torch

    torch_done = time.perf_counter()
    before = set(sys.modules)
    import primexec

    done = time.perf_counter()
    imported = set(sys.modules) - before
    answer(
        torch=torch_done - started,
        primexec=done - torch_done,
        optional=sorted(name for name in OPTIONAL if name in imported),
        torch_version=torch.__version__,
        executors=str(primexec.executors()),
    )


if __name__ == "__main__":
    main()
