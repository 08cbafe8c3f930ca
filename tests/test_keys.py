"""A number that keeps changing is looked for among few keys: a program for each that it is, and one for all others."""

import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from primexec import make_traced

FOUR = {2, 4}
MORE = set(range(17))
HELD = types.SimpleNamespace(rates={3: 2.0, 5: 3.0})
NUMBERS = (1, 3, 6, 4, 9, 2, 5)


class Kept:
    among = frozenset({2, 5})

    @property
    def made(self) -> set[int]:
        return {4, 9}


KEPT = Kept()


def written_out(x: Tensor, n: int) -> Tensor:
    return x + 1 if n in {2, 5, 7.0} else x - 1


def negated(x: Tensor, n: int) -> Tensor:
    return x + 1 if n * 2 not in FOUR else x - 1


def used_as_key(x: Tensor, n: int) -> Tensor:
    return x * HELD.rates[n] if n in HELD.rates else x


def of_a_class(x: Tensor, n: int) -> Tensor:
    return x * n if n in KEPT.among else x


def local(x: Tensor, n: int) -> Tensor:
    among = {len(x), 9}
    return torch.cat([x + i for i in range(2) if n in among] or [x])


def read_off(x: Tensor, n: int) -> Tensor:
    return x + 1 if x.sum().item() in {4.0, 10} else x - 1


DECIDED: dict[Callable[[Tensor, int], Tensor], int] = {
    written_out: 6, negated: 5, used_as_key: 5, of_a_class: 6, local: 6, read_off: 5
}  # fmt: skip


def computed(x: Tensor, n: int) -> Tensor:
    return x + 1 if n in KEPT.made else x - 1


def either(x: Tensor, n: int) -> Tensor:
    return x + 1 if n in (FOUR if x.dim() == 1 else {7}) else x - 1


def many(x: Tensor, n: int) -> Tensor:
    return x + 1 if n in MORE else x - 1


def in_a_tuple(x: Tensor, n: int) -> Tensor:
    return x + 1 if (1, n) in {(1, 2), (1, 4)} else x - 1


def hashed(x: Tensor, n: int) -> Tensor:
    return x * float(n.__hash__()) + hash(n)


def put_in(x: Tensor, n: int) -> Tensor:
    return x + len({n} | FOUR)


VALUES_NEEDED = (computed, either, many, in_a_tuple, hashed, put_in)


@pytest.mark.parametrize("fn", [*DECIDED, *VALUES_NEEDED], ids=lambda f: f.__name__)
def test_keys(fn: Any) -> None:
    traced = make_traced(fn)
    for n in (*NUMBERS, *NUMBERS):
        x = torch.full((2,), n / 2)
        assert torch.equal(traced(x, n), fn(x, n))
    assert traced.cache_info().traces == DECIDED.get(fn, len(NUMBERS))
