"""A smoke suite for CUDA devices: `make_traced` gives there what eager gives there."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from primexec import make_traced

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here"),
]


def on(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).cuda()


def test_function_of_two_tensors() -> None:
    def example(a: Tensor, b: Tensor) -> Tensor:
        return torch.sigmoid(a.cos() + b).sum(0) * a

    traced = make_traced(example)
    a, b = on(10, 10), on(10, 10, seed=1)
    for _ in range(2):
        out = traced(a, b, executor="aten")
        assert torch.equal(out, example(a, b))
        assert out.is_cuda
    assert traced.cache_info()[:3] == (1, 1, 1)


def test_device_is_guarded() -> None:
    traced = make_traced(lambda x: x * 2 + torch.ones(3, device=x.device))
    for x in (on(3), on(3).cpu(), on(3)):
        assert torch.equal(traced(x), x * 2 + 1)
        assert traced(x).device == x.device
    assert traced.cache_info()[:3] == (4, 2, 2)


@torch.no_grad()
def test_module_and_moving_it() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 36, 5)).cuda()
    traced = make_traced(module)
    x = on(2, 3, 8, 8)
    for _ in range(2):
        state = {name: t.clone() for name, t in module.state_dict().items()}
        expected, after = module(x), {name: t.clone() for name, t in module.state_dict().items()}
        module.load_state_dict(state)
        assert torch.equal(traced(x), expected)
        assert all(torch.equal(t, after[name]) for name, t in module.state_dict().items())
    assert traced.cache_info()[:3] == (1, 1, 1)
    traced.cpu()
    assert not traced(x.cpu()).is_cuda
    assert traced.cache_info().traces == 2


def write_views(x: Tensor) -> Any:
    row = x[0]
    row.mul_(2)
    x[:, 1] += row.sum()
    return x, row


def cpu_scalar(x: Tensor) -> Any:
    return x * torch.tensor(2.0) + x.sum().cpu().cuda()


def attention(x: Tensor) -> Any:
    q = x.view(1, 1, 4, 4).half()
    return nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)


def transfers(x: Tensor) -> Any:
    return x.cpu() + 1, x.to("cuda:0", non_blocking=True), x.new_zeros(2), torch.arange(3, device="cuda")


def strided(x: Tensor) -> Any:
    return x.t().contiguous() @ x.t(), x.t().clone(), x.to(memory_format=torch.contiguous_format).half().float()


FUNCTIONS = [write_views, cpu_scalar, attention, transfers, strided]


@pytest.mark.parametrize("fn", FUNCTIONS, ids=lambda f: f.__name__)
def test_same_as_eager(fn: Callable[[Tensor], Any]) -> None:
    traced = make_traced(fn)
    for _ in range(2):
        mine, eagers = on(4, 4), on(4, 4)
        outs, expected = (torch.utils._pytree.tree_leaves(f(x)) for f, x in ((traced, mine), (fn, eagers)))
        for a, b in [*zip(outs, expected, strict=True), (mine, eagers)]:
            assert torch.equal(a, b)
            assert (a.dtype, a.stride(), a.device) == (b.dtype, b.stride(), b.device)
    assert traced.cache_info()[:3] == (1, 1, 1)


@torch.no_grad()
def test_autocast() -> None:
    linear = nn.Linear(4, 4).cuda()
    traced = make_traced(lambda x: (linear(x), x @ x, linear(x).sum()))
    x = on(4, 4)
    for dtype, expected_traces in ((torch.float16, 1), (torch.bfloat16, 2), (torch.float16, 2)):
        with torch.autocast("cuda", dtype=dtype):
            out, expected = traced(x), (linear(x), x @ x, linear(x).sum())
        assert [t.dtype for t in out] == [t.dtype for t in expected]
        assert all(torch.equal(a, b) for a, b in zip(out, expected, strict=True))
        assert traced.cache_info().traces == expected_traces


def test_random_numbers() -> None:
    def draws(x: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        dropped = nn.functional.dropout(x, 0.5)
        return dropped, torch.rand_like(x), torch.randn(3, device="cuda", generator=generator), torch.rand(2)

    traced = make_traced(draws)
    generator = torch.Generator("cuda")
    results = []
    for fn in (draws, traced, traced):
        torch.manual_seed(3)
        generator.manual_seed(4)
        out = fn(on(4, 4), generator)
        results.append([*out, torch.cuda.get_rng_state(), torch.get_rng_state(), generator.get_state()])
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))
    assert traced.cache_info()[:3] == (1, 1, 1)


def test_streams_are_the_callers() -> None:
    traced = make_traced(lambda x: (x @ x).relu() + 1)
    x = on(64, 64)
    expected = (x @ x).relu() + 1
    traced(x)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        out = traced(x)
    stream.synchronize()
    assert torch.equal(out, expected)
    assert traced.cache_info().traces == 1
