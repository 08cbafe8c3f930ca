"""What the first call of GPT-2 small costs above an eager call, in a fresh process.

The first process finds which modules of torch that call imports; in the others they are imported beforehand,
so that what is left is capture and preparation. Few tokens, so that the kernels' own time hardly counts.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import primexec
from benchmarks.cases import gpt2, tokens
from benchmarks.process import answer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("layers", type=int)
    parser.add_argument("--preload", type=json.loads, default=[])
    parser.add_argument("--train", action="store_true", help="forward and backward, in train mode")
    options = parser.parse_args()

    model = gpt2(options.layers).train(options.train)
    inputs = tokens(50257, 1, 8, use_cache=False)
    for name in options.preload:
        importlib.import_module(name)

    def call(function: Callable[..., Any]) -> tuple[float, float]:
        """Seconds by the clock, and of this thread's processor time."""
        _, kwargs = inputs()
        clock, processor = time.perf_counter(), time.thread_time()
        with torch.set_grad_enabled(options.train):
            out = function(**kwargs)
            if options.train:
                out.logits.sum().backward()
        return time.perf_counter() - clock, time.thread_time() - processor

    call(model)
    eager = min(call(model) for _ in range(3))
    before = set(sys.modules)
    first = call(primexec.make_traced(model, executor="aten"))
    imported = [name for name in sys.modules if name not in before and not name.startswith("primexec")]
    answer(seconds=first[0] - eager[0], processor=first[1] - eager[1], imported=imported)


if __name__ == "__main__":
    main()
