"""What torch ships as samples, on `llvm`: a quarter of the entries by default, with one sample of one dtype each."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tests.llvm_sweep import BOTH, Result, judge, number
from tests.sweep import OPS

SHARDS = 16


@pytest.mark.usefixtures("one_thread")
@pytest.mark.parametrize("shard", range(SHARDS))
def test_operations(shard: int, exhaustive: bool, swept: Callable[[str, str], list[Result]]) -> None:
    if shard % 4 and not exhaustive:
        pytest.skip("runs only with --exhaustive")
    found = [r for name in OPS if number(name) % SHARDS == shard for r in swept("llvm", name)]
    assert not [r for r in found if not judge(r)]
    assert sum(r.kernels > 0 for r in found) > len(found) // 3


def test_complex_numbers_are_declined_with_a_reason() -> None:
    import primexec

    traced, x = primexec.make_traced(lambda t: t * 2 + 1), torch.ones(3, dtype=torch.complex64)
    assert torch.equal(traced(x, executor=BOTH), x * 2 + 1)
    assert "llvm declined" in (text := str(traced.explain(x, executor=BOTH)))
    assert "torch.complex64 has no instructions here" in text


@pytest.mark.parametrize("antialias", [False, True])
@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_images_of_bytes_are_resized_in_fixed_point(mode: str, antialias: bool) -> None:
    """As eager does it: in float32 the results differ by one here and there, and wrap around beyond 255."""
    import primexec

    image = torch.randint(0, 256, (1, 2, 5, 7), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))

    def resize(t: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.interpolate(t, size=(9, 11), mode=mode, antialias=antialias)

    assert torch.equal(primexec.make_traced(resize, executor=BOTH)(image), resize(image))
