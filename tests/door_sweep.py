"""PyTorch's own AOTAutograd test, run with our compiler in place of its own, over the samples of `op_db`.

`torch.testing._internal.optests.aot_autograd_check` compares an operation with what AOTAutograd makes of it: results,
gradients, and both again for other values. It compiles with `nop`, which runs graphs as they are; here the
backend of `torch.compile(backend="primexec")` stands in its place.
"""

from __future__ import annotations

import functools
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch.testing._internal.optests import aot_autograd

from primexec import dynamo
from primexec.config import Options
from tests.observe import Kind
from tests.sweep import OPS, VALUES_UNDEFINED, Result

VARIANTS = {"AOTAutograd": False, "AOTAutograd, symbolic sizes": True}
QUICK_STEP = 24  # the default run takes every 24th entry, and one sample of it
SEED = 11


def compiler(executor: str = "aten") -> Callable[..., Any]:
    return functools.partial(dynamo.compile_graph, options=Options.of(executor, None))


def samples(op: Any, limit: int | None) -> Iterator[Any]:
    """Float32 samples, with inputs that require grad where the operation is differentiable."""
    torch.manual_seed(SEED)
    random.seed(0)
    np.random.seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for i, sample in enumerate(op.sample_inputs("cpu", torch.float32, requires_grad=op.supports_autograd)):
            if i == limit:
                return
            yield sample


def check(op: Any, sample: Any, compile_graph: Callable[..., Any], symbolic: bool) -> Exception | None:
    """What the test raises with this compiler."""
    torch._dynamo.reset()
    with mock.patch.object(aot_autograd, "nop", compile_graph), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            aot_autograd.aot_autograd_check(
                op.op,
                (sample.input, *sample.args),
                sample.kwargs,
                dynamic=symbolic,
                assert_equals_fn=functools.partial(torch.testing.assert_close, equal_nan=True),
                check_gradients="auto",
                try_check_data_specialization=op.name not in VALUES_UNDEFINED,
                skip_correctness_check=op.name in VALUES_UNDEFINED,
            )
        except Exception as error:
            return error
    return None


def sweep_door(name: str, limit: int | None) -> Iterator[Result]:
    """One result for each sample and variant; wrong is what fails with our compiler and not with PyTorch's own."""
    op = OPS[name]
    if torch.float32 not in op.supported_dtypes("cpu"):
        return
    ours, theirs = compiler(), aot_autograd.nop
    for index, sample in enumerate(samples(op, limit)):
        for variant, symbolic in VARIANTS.items():
            error = check(op, sample, ours, symbolic)
            kind, detail = Kind.SAME, ""
            if error is not None:
                reference = check(op, sample, theirs, symbolic)
                kind = Kind.WRONG if type(reference) is not type(error) else Kind.CAPTURE
                detail = f"{type(error).__name__}: {error}"
            yield Result(name, variant, "float32", index, kind, detail)
