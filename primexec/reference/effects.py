"""What acts on the world outside of a program, and what draws from a generator."""

from __future__ import annotations

import numpy as np

from primexec.reference.dtypes import Array, cast
from primexec.reference.registry import decline, reference


@reference("aten.copy_.default")
def copy_(self: Array, src: Array, non_blocking: bool = False) -> Array:
    """src in the shape and dtype of self, whose memory the caller writes."""
    return np.broadcast_to(cast(src, self.dtype), self.shape).copy()


@reference("aten._linalg_check_errors.default")
def linalg_check_errors(info: Array, api_name: str, *, is_matrix: bool) -> tuple[()]:
    """Nothing.

    Raises:
        numpy.linalg.LinAlgError: where info is not zero.
    """
    if np.any(info):
        raise np.linalg.LinAlgError(
            f"{api_name}: the factorisation failed, info {int(info.flat[np.argmax(info != 0)])}"
        )
    return ()


@reference("aten._assert_async.msg")
def assert_async(self: Array, assert_msg: str) -> tuple[()]:
    """Nothing.

    Raises:
        RuntimeError: with the message, where the element is zero.
    """
    if not np.all(self):
        raise RuntimeError(assert_msg)
    return ()


def _names(*names: str) -> list[str]:
    return [f"aten.{n}" if "." in n else f"aten.{n}.default" for n in names]


decline(
    _names(
        "rand", "randn", "randint.low", "randperm", "uniform", "normal_functional", "bernoulli", "bernoulli.p",
        "exponential", "geometric", "cauchy", "log_normal", "random.from", "multinomial", "poisson", "binomial",
    ),
    "it draws from PyTorch's generator, whose stream NumPy does not reproduce",
)  # fmt: skip
decline(
    [
        f"_c10d_functional.{name}.default"
        for name in (
            "all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_to_all_single", "broadcast",
            "wait_tensor",
        )
    ],
    "it talks to other processes",
)  # fmt: skip
