"""Data parallel training and distributed tensors in two gloo processes. The oracle is eager PyTorch beside it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_module, distribute_tensor, init_device_mesh
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import primexec
from tests import distributed

STEPS = 3


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.LayerNorm(16), nn.Dropout(0.2), nn.Linear(16, 4))


def train(model: nn.Module, parameters: list[nn.Parameter], rank: int) -> list[Tensor]:
    """Losses, gradients and parameters of a few steps; each rank has its own batches."""
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9)
    generator = torch.Generator().manual_seed(rank)
    torch.manual_seed(rank)
    seen = []
    for _ in range(STEPS):
        x, y = (torch.randn(6, n, generator=generator) for n in (8, 4))
        loss = F.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        seen += [loss.detach().clone(), *(p.grad.clone() for p in parameters if p.grad is not None)]
        optimizer.step()
    return [*seen, *(p.detach().clone() for p in parameters)]


def data_parallel(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    eager, mine = make_model(), make_model()
    expected = train(DistributedDataParallel(eager), list(eager.parameters()), rank)
    compiled: Any = torch.compile(DistributedDataParallel(mine, bucket_cap_mb=1), backend="primexec")
    return train(compiled, list(mine.parameters()), rank), expected


def test_compiled_data_parallel_equals_eager(results: Any) -> None:
    (first, expected), (second, _) = results("data_parallel")
    assert len(expected) == STEPS * 7 + 6
    torch.testing.assert_close(first, expected)
    torch.testing.assert_close(second[-6:], expected[-6:])  # the ranks agree
    assert not torch.equal(first[0], second[0])  # on batches of their own


def inside(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    eager, mine = make_model(), make_model()
    expected = train(DistributedDataParallel(eager), list(eager.parameters()), rank)
    compiled: Any = torch.compile(mine, backend="primexec")
    return train(DistributedDataParallel(compiled), list(mine.parameters()), rank), expected


def test_data_parallel_around_a_compiled_module(results: Any) -> None:
    for actual, expected in results("inside"):
        torch.testing.assert_close(actual, expected)


def traced(rank: int) -> tuple[list[Tensor], list[Tensor]]:
    eager, mine = make_model(), make_model()
    expected = train(DistributedDataParallel(eager), list(eager.parameters()), rank)
    module = DistributedDataParallel(primexec.make_traced(mine))
    return train(module, list(mine.parameters()), rank), expected


def test_data_parallel_around_a_traced_module(results: Any) -> None:
    for actual, expected in results("traced"):
        torch.testing.assert_close(actual, expected)


def columns_and_rows(x: DTensor, up: DTensor, down: DTensor) -> DTensor:
    return F.gelu(x @ up) @ down + x.sum(dim=0)


def distributed_tensors(rank: int) -> list[tuple[Any, ...]]:
    mesh = init_device_mesh("cpu", (distributed.WORLD,))
    torch.manual_seed(0)
    values = [torch.randn(*shape, dtype=torch.float64) for shape in ((6, 8), (8, 16), (16, 8))]
    found = []
    for fn in (columns_and_rows, torch.compile(columns_and_rows, backend="primexec")):
        places = [[Replicate()], [Shard(1)], [Shard(0)]]
        tensors = [distribute_tensor(v.clone(), mesh, p).requires_grad_() for v, p in zip(values, places, strict=True)]
        out = fn(*tensors)
        loss = out.full_tensor().square().sum()
        loss.backward()
        grads = [t.grad for t in tensors]
        assert all(isinstance(t, DTensor) for t in (out, *grads))
        found.append(
            (
                str(out.placements),
                out.full_tensor().detach(),
                [str(g.placements) for g in grads if g is not None],
                [g.full_tensor() for g in grads if g is not None],
            )
        )
    plain = [v.clone().requires_grad_() for v in values]
    expected: Any = F.gelu(plain[0] @ plain[1]) @ plain[2] + plain[0].sum(dim=0)
    expected.square().sum().backward()
    return [*found, (expected.detach(), [p.grad for p in plain])]


def test_distributed_tensors_equal_eager(results: Any) -> None:
    for eager, compiled, (value, grads) in results("distributed_tensors"):
        assert compiled[0] == eager[0]
        assert compiled[2] == eager[2]
        torch.testing.assert_close((compiled[1], compiled[3]), (eager[1], eager[3]))
        torch.testing.assert_close((compiled[1], compiled[3]), (value, grads))


def sharded_batch(rank: int) -> tuple[Tensor, Tensor]:
    """A module with replicated weights and a batch sharded over the ranks."""
    mesh = init_device_mesh("cpu", (distributed.WORLD,))
    torch.manual_seed(0)
    layer = nn.Linear(8, 4)
    twin = copy.deepcopy(layer)
    x = torch.randn(6, 8)
    for module in (layer, twin):
        distribute_module(module, mesh)
    grads = []
    for fn in (layer, torch.compile(twin, backend="primexec")):
        fn(distribute_tensor(x, mesh, [Shard(0)])).sum().backward()
    for module in (layer, twin):
        grad: Any = module.weight.grad
        grads.append(grad.full_tensor())
    return grads[0], grads[1]


def test_module_on_a_sharded_batch(results: Any) -> None:
    for eager, compiled in results("sharded_batch"):
        torch.testing.assert_close(compiled, eager)


@pytest.fixture(scope="module")
def results() -> Callable[[str], list[Any]]:
    """The values of a function of this file, one a rank; all of them run in the same two processes."""
    ranks = distributed.run([data_parallel, inside, traced, distributed_tensors, sharded_batch])
    return lambda name: [rank[name] for rank in ranks]
