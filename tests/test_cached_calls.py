"""Functions under functools.lru_cache in traced code."""

import functools

import pytest
import torch
from torch import Tensor

from primexec import CaptureError, make_traced

X = torch.arange(6.0).reshape(2, 3)


@functools.lru_cache(maxsize=1)
def numbers(n: int, scale: float = 1.0) -> Tensor:
    return torch.arange(n) * scale


@functools.cache
def both(n: int) -> tuple[Tensor, int]:
    return torch.ones(n), n


@functools.cache
def doubled(x: Tensor) -> Tensor:
    return x * 2


@pytest.mark.parametrize("warm", [False, True])
def test_cached_functions_are_called_as_in_eager(warm: bool) -> None:
    """Their tensors are read again at every call: the same ones, as long as the cache holds them."""
    numbers.cache_clear()
    both.cache_clear()
    cached = numbers

    def shifted(x: Tensor) -> Tensor:
        ones, n = both(3)
        return x + numbers(3) * n + cached(3, scale=0.5) + ones

    if warm:
        shifted(X)
    traced = make_traced(shifted)
    for _ in range(2):
        assert torch.equal(traced(X), shifted(X))
    assert numbers is cached
    assert isinstance(numbers, type(both))
    both(3)[0].mul_(5)  # in the cache: eager's later calls see it
    assert torch.equal(traced(X), shifted(X))
    assert traced.cache_info().traces == 1
    both.cache_clear()
    assert torch.equal(traced(X), shifted(X))


def test_what_a_program_writes_to_a_cached_tensor_stays() -> None:
    def counted(x: Tensor) -> Tensor:
        return x + both(3)[0].add_(1)

    found = []
    for fn in (make_traced(counted), counted):
        both.cache_clear()
        found.append([fn(X) for _ in range(3)])
    assert torch.equal(torch.stack(found[0]), torch.stack(found[1]))


def test_a_cached_function_holds_no_tensor_of_a_trace_afterwards() -> None:
    with pytest.raises(CaptureError, match="kept somewhere outside"):
        make_traced(lambda x: doubled(x) + 1)(X)
    assert doubled.cache_info().currsize == 0


def test_numbers_are_those_of_the_cache() -> None:
    held = {"gain": 2.0}

    @functools.lru_cache
    def scale(by: int) -> float:
        return held["gain"] * by

    traced = make_traced(lambda x: x * scale(2))
    ones = torch.ones(3)
    for gain in (2.0, 3.0, 4.0):
        held["gain"] = gain
        assert torch.equal(traced(ones), ones * 4)  # kept
    scale.cache_clear()
    assert torch.equal(traced(ones), ones * 8)
