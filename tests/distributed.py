"""Runs functions in several processes that talk over gloo, for tests/test_distributed.py."""

from __future__ import annotations

import datetime
import multiprocessing
import os
import tempfile
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

WORLD = 2
COLLECTIVE_TIMEOUT = datetime.timedelta(seconds=60)
PROCESS_TIMEOUT = 150.0  # s; only a hang takes that long


def run(functions: Sequence[Callable[[int], Any]]) -> list[dict[str, Any]]:
    """For each process, what the functions return, given its rank, by their names.

    They are functions of a module that return picklable values, and run one after the other: starting processes
    takes longer than most of them. The processes meet at a file, so no port is needed. After a failure the rest
    is not run.
    """
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        processes = [context.Process(target=_main, args=(functions, rank, folder)) for rank in range(WORLD)]
        for process in processes:
            process.start()
        try:
            for process in processes:
                process.join(PROCESS_TIMEOUT)
        finally:
            hung = [p for p in processes if p.is_alive()]
            for process in hung:
                process.kill()
                process.join()
        results = [torch.load(f, weights_only=False) for f in sorted(Path(folder).glob("rank*"))]
    failures = [result for result in results if isinstance(result, str)]
    assert not failures, "\n".join(failures)
    assert not hung, "a process did not end in time"
    assert len(results) == WORLD, f"exit codes {[p.exitcode for p in processes]}"
    return results


def _main(functions: Sequence[Callable[[int], Any]], rank: int, folder: str) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    result: Any = {}
    try:
        dist.init_process_group("gloo", f"file://{folder}/meeting", COLLECTIVE_TIMEOUT, world_size=WORLD, rank=rank)
        for fn in functions:
            result[fn.__name__] = fn(rank)
            torch._dynamo.reset()
            dist.barrier()
        dist.destroy_process_group()
    except BaseException:
        result = f"rank {rank}: {traceback.format_exc()}"
    torch.save(result, f"{folder}/partial{rank}")
    os.rename(f"{folder}/partial{rank}", f"{folder}/rank{rank}")
    os._exit(0)  # threads of gloo and of compilers need not be waited for
