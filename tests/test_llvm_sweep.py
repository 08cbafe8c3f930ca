"""What torch ships as samples, on `llvm`: a quarter of the entries by default, with one sample of one dtype each."""

from __future__ import annotations

import zlib
from collections.abc import Iterator

import pytest
import torch

from tests.llvm_sweep import BOTH, DTYPES, FLOATS, judge, supported, sweep
from tests.sweep import OPS

SHARDS = 8
GRADIENTS_OF = 3  # one entry in so many has its gradients checked by default


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def number(name: str) -> int:
    """Tells where an entry belongs, whatever the others are."""
    return zlib.crc32(name.encode())


def chosen(name: str, gradients: bool, everything: bool) -> list[torch.dtype]:
    fit = [d for d in (FLOATS if gradients else DTYPES) if supported(name, d, gradients)]
    if everything or not fit:
        return fit
    return [] if gradients and number(name) % GRADIENTS_OF else [fit[number(name) // SHARDS % len(fit)]]


@pytest.mark.parametrize("gradients", [False, True], ids=["forward", "gradients"])
@pytest.mark.parametrize("shard", range(SHARDS))
def test_operations(shard: int, gradients: bool, request: pytest.FixtureRequest) -> None:
    everything = request.config.getoption("--exhaustive")
    if shard % 4 and not everything:
        pytest.skip("runs only with --exhaustive")
    found = []
    for name in OPS:
        if number(name) % SHARDS == shard:
            for dtype in chosen(name, gradients, everything):
                found += sweep(name, dtype, None if everything else 1, gradients)
    assert not [r for r in found if not judge(r)]
    assert sum(r.kernels > 0 for r in found) > len(found) // 3


def test_complex_numbers_are_declined_with_a_reason() -> None:
    import primexec

    traced, x = primexec.make_traced(lambda t: t * 2 + 1), torch.ones(3, dtype=torch.complex64)
    assert torch.equal(traced(x, executor=BOTH), x * 2 + 1)
    assert "llvm declined" in (text := str(traced.explain(x, executor=BOTH)))
    assert "torch.complex64 has no instructions here" in text
