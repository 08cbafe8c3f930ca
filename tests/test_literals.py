"""Tensors that a function makes of Python values, lists and NumPy arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from primexec import CaptureError, make_traced

TABLE = np.arange(3, dtype=np.float32)

MADE: dict[str, Callable[[Tensor], Any]] = {
    "Tensor": lambda x: x * torch.Tensor([1, 2, 3]),
    "typed": lambda x: x[torch.LongTensor([2, 0])] + torch.FloatTensor([0.5]),
    "sized": lambda x: x * torch.Tensor(3).fill_(2),
    "new": lambda x: x * x.new([1, 2, 3]) + x.new_tensor(TABLE),
    "from_numpy": lambda x: x + torch.from_numpy(TABLE) + torch.from_numpy(np.arange(6.0)[::2]),
    "as_tensor": lambda x: x + torch.as_tensor(TABLE) + torch.asarray(np.ones(())),
    "of tensors": lambda x: torch.tensor([x.shape[0], x.sum(), 2.0]) * torch.tensor([[a] for a in x.half()]),
    "of numbers": lambda x: (torch.tensor(x.sum().item()), torch.as_tensor([[(x > 0).sum().item(), x.numel()]])),
    "of its kind": lambda x: (x.new_tensor([x.sum().double(), (x > 0).sum()]), torch.tensor([x.any(), False])),
    "copied": lambda x: (torch.tensor(TABLE), torch.Tensor(TABLE.astype(np.float64)).add_(x)),
}


@pytest.mark.parametrize("name", MADE)
def test_made_of_python_values(name: str) -> None:
    fn, x = MADE[name], torch.randn(3)
    traced = make_traced(fn, executor="aten")
    for _ in range(2):
        torch.testing.assert_close(traced(x), fn(x), rtol=0, atol=0)
    assert traced.cache_info().traces == 1


def test_an_array_is_compared_by_value() -> None:
    array = np.ones(3, dtype=np.float32)

    def fn(x: Tensor) -> Tensor:
        return x + torch.from_numpy(array)

    traced, x = make_traced(fn), torch.randn(3)
    assert torch.equal(traced(x), fn(x))
    array[1] = 5
    assert torch.equal(traced(x), fn(x))
    assert traced.cache_info().traces == 2


def written(x: Tensor) -> Tensor:
    torch.as_tensor(TABLE).add_(x)
    return x + 1


def written_in_a_view(x: Tensor) -> Tensor:
    torch.from_numpy(TABLE)[:1].copy_(x[:1])
    return x + 1


def returned(x: Tensor) -> Tensor:
    return torch.from_numpy(TABLE)[1:]


def changed_later(x: Tensor) -> Tensor:
    array = np.zeros(3, dtype=np.float32)
    y = x * torch.from_numpy(array)
    array += 1
    return y


@pytest.mark.parametrize("fn", [written, written_in_a_view, returned, changed_later], ids=lambda f: f.__name__)
def test_memory_shared_with_an_array_is_refused(fn: Any) -> None:
    before = TABLE.copy()
    with pytest.raises(CaptureError, match=r"NumPy array[\s\S]*which copies"):
        make_traced(fn)(torch.ones(3))
    assert np.array_equal(TABLE, before)


def test_packed_sequences_are_arguments_and_results() -> None:
    packed = torch.nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(1, 2)])
    traced = make_traced(lambda p: p._replace(data=p.data * 2))
    for _ in range(2):
        found = traced(packed)
        assert isinstance(found, torch.nn.utils.rnn.PackedSequence)
        torch.testing.assert_close(found.data, packed.data * 2)
    assert traced.cache_info().traces == 1
