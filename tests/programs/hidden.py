"""What a function does besides computing: it fills caches, advances iterators, counts in odd places.

Each is refused or right: done once, while tracing, it would be wrong.
"""

import collections
import copy
import functools
import itertools
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tests.programs import library
from tests.programs.table import Family, draw, tensors

FAMILY = Family("hidden")
X = tensors((3, 4))


class Holder:
    count = 0

    def __init__(self) -> None:
        self.weight = draw(1, 4)
        self.state = SimpleNamespace(k=1.0)
        self.items = [SimpleNamespace(k=1.0)]

    @functools.cached_property
    def table(self) -> Tensor:
        return self.weight * 2

    @functools.cached_property
    def size(self) -> int:
        return self.weight.numel()


# Caches that the function fills.
@functools.lru_cache
def cached_table(n: int) -> Tensor:
    return torch.arange(float(n))


@functools.lru_cache
def cached_number(n: int) -> int:
    return 2 * n


def uncached() -> Any:
    cached_table.cache_clear()
    return lambda x: x + cached_table(x.shape[1])


def cached_before() -> Any:
    cached_table.cache_clear()
    cached_table(4)
    return lambda x: x + cached_table(x.shape[1])


def check_cached_table(original: Any, i: int) -> None:
    assert type(cached_table(4)) is Tensor
    cached_table.cache_clear()


FAMILY.add_factory("lru_cache_of_tensor", uncached, X, either=True)
FAMILY.add_factory("lru_cache_left_clean", uncached, X, either=True, before=check_cached_table)
FAMILY.add_factory("lru_cache_filled_before", cached_before, X, either=True)
FAMILY.add("lru_cache_of_number", lambda x: x * cached_number(x.shape[1]), X)
FAMILY.add_factory("cached_property_of_number", lambda: (lambda o: lambda x: x * o.size)(Holder()), X, traces_at=(0, 1))
FAMILY.add_factory("cached_property_of_tensor", lambda: (lambda o: lambda x: x * o.table)(Holder()), X, either=True)


class Lazy(nn.Module):
    def __init__(self, forward: Any) -> None:
        super().__init__()
        self.table: Tensor | None = None
        self.tables: dict[int, Tensor] = {}
        self.size = 0
        self.inner = nn.Linear(4, 4)
        self.inner.weight.scale = 2.0  # type: ignore[assignment]
        self.function = forward

    def forward(self, x: Tensor) -> Any:
        return self.function(self, x)


def lazy(**options: Any) -> Any:
    def register(function: Any) -> Any:
        FAMILY.add_factory(function.__name__, lambda: Lazy(function), X, contexts=(torch.no_grad,), **options)
        return function

    return register


@lazy(traces_at=(0, 1))
def table_made_once(self: Any, x: Tensor) -> Tensor:
    if self.table is None:
        self.table = torch.arange(4.0)
    return x + self.table


@lazy(either=True)
def table_in_dict(self: Any, x: Tensor) -> Tensor:
    if x.shape[1] not in self.tables:
        self.tables[x.shape[1]] = torch.arange(4.0)
    return x + self.tables[x.shape[1]]


@lazy(either=True)
def size_remembered(self: Any, x: Tensor) -> Tensor:
    self.size = max(self.size, x.shape[0])
    return x * self.size


@lazy(traces_at=(0, 1))
def attribute_made(self: Any, x: Tensor) -> Tensor:
    self.fresh = 1
    return x


@lazy(traces_at=(0, 1))
def attribute_set(self: Any, x: Tensor) -> Tensor:
    self.size = x.numel()
    return x


@lazy(traces_at=(0, 1))
def attribute_made_once(self: Any, x: Tensor) -> Tensor:
    if not hasattr(self, "factor"):
        self.factor = 2.0
        return x
    return x * self.factor


@lazy(traces_at=(0, 1))
def attributes_in_order(self: Any, x: Tensor) -> Any:
    names = list(vars(self))
    self.second, self.first = x * 2, x * 3
    return x, names


@lazy(either=True)
def attribute_deleted(self: Any, x: Tensor) -> Tensor:
    if hasattr(self, "table"):
        del self.table
    return x + 1


@lazy()
def parameter_has_attribute(self: Any, x: Tensor) -> Tensor:
    return self.inner(x) * self.inner.weight.scale


@lazy()
def parameter_is_parameter(self: Any, x: Tensor) -> Tensor:
    assert isinstance(self.inner.weight, nn.Parameter)
    assert all(p.requires_grad for p in self.parameters())
    return self.inner(x)


@lazy()
def module_asked(self: Any, x: Tensor) -> Any:
    names = [name for name, _ in self.named_modules()], list(self.state_dict()), type(self).__name__
    return self.inner(x), names, "inner" in self._modules, self.inner.in_features


@lazy()
def module_copied(self: Any, x: Tensor) -> Tensor:
    return copy.deepcopy(self.inner)(x)


@lazy()
def functional_call(self: Any, x: Tensor) -> Tensor:
    doubled = {name: p * 2 for name, p in self.inner.named_parameters()}
    return torch.func.functional_call(self.inner, doubled, (x,))


@lazy(either=True)
def module_frozen_within(self: Any, x: Tensor) -> Tensor:
    self.inner.requires_grad_(False)
    return self.inner(x)


@lazy(either=True)
def module_converted_within(self: Any, x: Tensor) -> Tensor:
    self.inner.double()
    return self.inner(x.double())


@lazy()
def hook_registered_within(self: Any, x: Tensor) -> Tensor:
    handle = self.inner.register_forward_hook(lambda m, args, out: out * 2)
    y = self.inner(x)
    handle.remove()
    return y + self.inner(x)


# Writes that hide: each of these, done once at tracing only, would be wrong.
def hidden(**options: Any) -> Any:
    return FAMILY.factory(X, either=True, **options)


@hidden()
def iterator_advanced() -> Any:
    numbers = itertools.count()
    return lambda x: x * next(numbers)


@hidden()
def generator_advanced() -> Any:
    def squares() -> Iterator[int]:
        for k in itertools.count():
            yield k * k

    numbers = squares()
    return lambda x: x * next(numbers)


@hidden()
def list_iterator_advanced() -> Any:
    numbers = iter([1, 2, 3, 4])
    return lambda x: x * next(numbers)


@hidden()
def deque_rotated() -> Any:
    numbers = collections.deque([1, 2, 3])

    def run(x: Tensor) -> Tensor:
        numbers.rotate(1)
        return x * numbers[0]

    return run


@hidden()
def counter_updated() -> Any:
    counts: collections.Counter[str] = collections.Counter()

    def run(x: Tensor) -> Tensor:
        counts["calls"] += 1
        return x * counts["calls"]

    return run


@hidden()
def array_written() -> Any:
    array = np.zeros(1)

    def run(x: Tensor) -> Tensor:
        array[0] += 1
        return x * float(array[0])

    return run


@hidden()
def class_counter() -> Any:
    Holder.count = 0

    def run(x: Tensor) -> Tensor:
        Holder.count += 1
        return x * Holder.count

    return run


@hidden()
def nested_object_written() -> Any:
    holder = Holder()

    def run(x: Tensor) -> Tensor:
        holder.state.k += 1
        return x * holder.state.k

    return run


@hidden()
def object_in_list_written() -> Any:
    holder = Holder()

    def run(x: Tensor) -> Tensor:
        holder.items[0].k += 1
        return x * holder.items[0].k

    return run


@hidden()
def object_reached_by_method_written() -> Any:
    holder = Holder()

    def bump(o: Any) -> float:
        o.k += 1
        return o.k

    return lambda x: x * bump(holder.state)


@hidden()
def function_attribute_written() -> Any:
    def run(x: Tensor) -> Tensor:
        run.calls += 1  # type: ignore[attr-defined]
        return x * run.calls  # type: ignore[attr-defined]

    run.calls = 0  # type: ignore[attr-defined]
    return run


@hidden()
def nested_list_written() -> Any:
    table = {"a": [0]}

    def run(x: Tensor) -> Tensor:
        table["a"][0] += 1
        return x * table["a"][0]

    return run


@hidden()
def default_argument_written() -> Any:
    def run(x: Tensor, seen: list[int] = []) -> Tensor:  # noqa: B006
        seen.append(1)
        return x * len(seen)

    run.__defaults__ = ([],)
    return run


@hidden()
def helper_writes_global() -> Any:
    library.CALLS.clear()
    return lambda x: x * library.counted()


@hidden()
def python_generator_object() -> Any:
    import random

    rng = random.Random(0)
    return lambda x: x * rng.random()


@hidden()
def numpy_generator_object() -> Any:
    rng = np.random.default_rng(0)
    return lambda x: x * rng.random()


@hidden()
def torch_generator_seeded() -> Any:
    held = torch.Generator()

    def run(x: Tensor) -> Tensor:
        held.manual_seed(5)
        return torch.rand(3, 4, generator=held) + x

    return run


@hidden()
def torch_generator_made() -> Any:
    return lambda x: torch.rand(3, 4, generator=torch.Generator().manual_seed(5)) + x
