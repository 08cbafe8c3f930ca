"""State that no name leads to directly: behind functions in C, in containers of containers, in random generators."""

import collections
import configparser
import dataclasses
import functools
import itertools
import operator
import os
import queue
import random
import threading
import uuid
import weakref
from collections.abc import Callable
from random import getrandbits, normalvariate
from types import SimpleNamespace
from typing import Any

import numpy as np
import numpy.random as of_numpy
import pytest
import torch
from numpy.random import rand
from torch import Tensor, nn

from primexec import CaptureError, make_traced

X = torch.arange(6.0).reshape(2, 3)
Place = tuple[Callable[[Tensor], Any], Callable[[], object]]


class Items(list[Any]):
    scale: float


def scaled(k: float) -> Items:
    items = Items([1])
    items.scale = k
    return items


def behind_get() -> Place:
    table = {"k": 2.0}
    get = table.get
    return lambda x: x * get("k"), lambda: table.update(k=3.0)  # type: ignore[operator]


def behind_getitem() -> Place:
    held = [2.0]
    get = held.__getitem__
    return lambda x: x * get(0), lambda: held.__setitem__(0, 3.0)


def behind_len() -> Place:
    held = [0.0]
    length = held.__len__
    return lambda x: x * length(), lambda: held.append(0.0)


def behind_values() -> Place:
    table = {"k": 2.0}
    values = table.values()
    return lambda x: x * next(iter(values)), lambda: table.update(k=3.0)


def behind_keys() -> Place:
    table = {"k": 2.0}
    keys = table.keys()
    return lambda x: x * len(keys), lambda: table.update(j=3.0)


def in_array_of_list() -> Place:
    held = [np.ones(1)]
    return lambda x: x * float(held[0][0]), lambda: held[0].fill(3.0)


def in_array_of_tuple() -> Place:
    held = (np.ones(1),)
    return lambda x: x * float(held[0][0]), lambda: held[0].fill(3.0)


def in_object_of_deque() -> Place:
    held = collections.deque([SimpleNamespace(k=2.0)])
    return lambda x: x * held[0].k, lambda: setattr(held[0], "k", 3.0)


def in_attribute_of_list() -> Place:
    held = SimpleNamespace(items=scaled(2.0))
    return lambda x: x * held.items.scale, lambda: setattr(held, "items", scaled(3.0))


def in_attribute_of_inner_list() -> Place:
    held = [scaled(2.0)]
    return lambda x: x * held[0].scale, lambda: held.__setitem__(0, scaled(3.0))


def in_parameter_list() -> Place:
    held: Any = nn.ParameterList([nn.Parameter(torch.ones(3), requires_grad=False), 2.0])
    return lambda x: x * held[0] * held[1], lambda: held.__setitem__(1, 3.0)


def in_parameter_dict() -> Place:
    held: Any = nn.ParameterDict({"w": nn.Parameter(torch.ones(3), requires_grad=False), "k": 2.0})
    return lambda x: x * held["w"] * held["k"], lambda: held.__setitem__("k", 3.0)


PLACES = [
    behind_get, behind_getitem, behind_len, behind_values, behind_keys, in_array_of_list, in_array_of_tuple,
    in_object_of_deque, in_attribute_of_list, in_attribute_of_inner_list, in_parameter_list, in_parameter_dict,
]  # fmt: skip


@pytest.mark.parametrize("place", PLACES, ids=lambda p: p.__name__)
def test_state_is_seen(place: Callable[[], Place]) -> None:
    fn, change = place()
    traced = make_traced(fn)
    for count in (1, 2):
        for x in (X, X + 1):
            assert torch.equal(traced(x), fn(x))
        assert traced.cache_info().traces == count
        change()


def effects() -> dict[str, tuple[Any, Callable[[], object]]]:
    held: list[Any] = [1, np.ones(1)]
    numbers = {1}

    def append(x: Tensor, log: Any = held.append) -> Tensor:
        log(1)
        return x

    def append_to_all(x: Tensor, log: Any = (held.append,)) -> Tensor:
        log[0](1)
        return x

    def add(x: Tensor, add: Any = numbers.add) -> Tensor:
        add(object())
        return x

    def into_array(x: Tensor) -> Tensor:
        held[1][0] += 1
        return x

    return {
        "append": (append, lambda: len(held) == 2),
        "append_to_all": (append_to_all, lambda: len(held) == 2),
        "add": (add, lambda: numbers == {1}),
        "into_array": (into_array, lambda: held[1][0] == 1),
    }


@pytest.mark.parametrize("name", effects())
def test_effects_are_refused_and_undone(name: str) -> None:
    fn, unchanged = effects()[name]
    with pytest.raises(CaptureError, match="which a program would do only once"):
        make_traced(fn)(X)
    assert unchanged()


def from_an_import(x: Tensor) -> Any:
    from numpy.random import permutation

    return x * permutation(3)[0]


COUNTS = (itertools.count(1),)


def counting(x: Tensor, numbers: Any = COUNTS) -> Any:
    return x * next(numbers[0])


GENERATOR, STATE = [np.random.default_rng(0)], random.getstate()
NORMAL, UNIFORM, NEXT = GENERATOR[0].normal, random.Random(0).random, itertools.count(1).__next__

DRAWS: dict[str, Callable[[Tensor], Any]] = {
    "function": lambda x: x * normalvariate(0, 1),
    "bits": lambda x: x * getrandbits(8),
    "numpy_function": lambda x: x * rand(),
    "numpy_module": lambda x: x * of_numpy.permutation(5)[0],
    "from_an_import": from_an_import,
    "partial": functools.partial(lambda draw, x: x * draw(), functools.partial(random.gauss, 0, 1)),
    "generator_in_list": lambda x: x * GENERATOR[0].normal(),
    "method_of_generator": lambda x: x * NORMAL(),
    "method_of_random": lambda x: x * UNIFORM(),
    "state": lambda x: (random.setstate(STATE), x)[1],
    "initial_seed": lambda x: x * torch.initial_seed(),
    "unseeded": lambda x: x * np.random.default_rng().normal(),
    "unseeded_state": lambda x: x * np.random.RandomState().normal(),
    "unseeded_random": lambda x: x * random.Random().random(),
    "system": lambda x: x * random.SystemRandom().random(),
    "uuid": lambda x: x * (uuid.uuid4().int % 7),
    "iterator_in_tuple": counting,
    "method_of_iterator": lambda x: x * NEXT(),
    "partial_of_iterator": functools.partial(lambda draw, x: x * draw(), functools.partial(next, iter([1, 2]))),
}


@pytest.mark.parametrize("name", DRAWS)
def test_draws_are_refused(name: str) -> None:
    before = random.getstate(), np.random.get_state()[1].tolist()  # type: ignore[index,union-attr]
    with pytest.raises(CaptureError, match=r"random|at every call|whose state cannot be compared"):
        make_traced(DRAWS[name])(X)
    assert before == (random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[index,union-attr]


SEEDED: dict[str, Callable[[Tensor], Any]] = {
    "numpy": lambda x: x * np.random.default_rng(0).normal(),
    "state": lambda x: x * np.random.RandomState(0).normal(),
    "random": lambda x: x * random.Random(0).random(),
    "other_method": lambda x: x * len(os.path.join("a", "b")),
}


@pytest.mark.parametrize("name", SEEDED)
def test_what_is_the_same_at_every_call(name: str) -> None:
    traced = make_traced(SEEDED[name])
    for _ in range(2):
        assert torch.equal(traced(X), SEEDED[name](X))
    assert traced.cache_info().traces == 1


@dataclasses.dataclass
class Options:
    scale: float = 2.0


def by_named_pattern(x: Tensor, options: Any) -> Any:
    match options:
        case Options(scale=scale):
            return x * scale


def by_pattern(x: Tensor, options: Any) -> Any:
    match options:
        case Options(scale):
            return x * scale


READS: dict[str, Callable[[Tensor, Any], Any]] = {
    "named_pattern": by_named_pattern,
    "pattern": by_pattern,
    "getter_made_inside": lambda x, options: x * operator.attrgetter("scale")(options),
    "format": lambda x, options: x * float("{o.scale}".format(o=options)),  # noqa: UP032
}


@pytest.mark.parametrize("name", READS)
def test_attributes_that_the_bytecode_does_not_load(name: str) -> None:
    options = Options()
    traced = make_traced(lambda x: READS[name](x, options))
    for k in (2.0, 3.0):
        options.scale = k
        for _ in range(2):
            assert torch.equal(traced(X), X * k)
    assert traced.cache_info().traces == 2


class Key:
    pass


def of_event() -> Place:
    event = threading.Event()
    return lambda x: x * (2 if event.is_set() else 3), event.set


def of_weak_keys() -> Place:
    key = Key()
    table = weakref.WeakKeyDictionary({key: 2.0})
    return lambda x: x * table[key], lambda: table.__setitem__(key, 3.0)


def of_weak_values() -> Place:
    value = Options()
    table = weakref.WeakValueDictionary({"k": value})
    return lambda x: x * table["k"].scale, lambda: setattr(value, "scale", 3.0)


def of_queue() -> Place:
    waiting: queue.Queue[int] = queue.Queue()
    return lambda x: x * waiting.qsize(), lambda: waiting.put(1)


def of_parser() -> Place:
    parser = configparser.ConfigParser()
    parser["a"] = {"k": "2"}
    return lambda x: x * float(parser["a"]["k"]), lambda: parser["a"].__setitem__("k", "3")


def of_single_dispatch() -> Place:
    @functools.singledispatch
    def scale(x: Any) -> float:
        return 2.0

    return lambda x: x * scale(x), lambda: scale.register(torch.Tensor)(lambda x: 3.0)


def of_partial_method() -> Place:
    held = [2.0]

    class Scaling:
        scaled = functools.partialmethod(lambda self, x: x * held[0])

    scaling = Scaling()
    return lambda x: scaling.scaled(x), lambda: held.__setitem__(0, 3.0)


LIBRARY = [of_event, of_weak_keys, of_weak_values, of_queue, of_parser, of_single_dispatch, of_partial_method]


@pytest.mark.parametrize("place", LIBRARY, ids=lambda p: p.__name__)
def test_objects_of_the_standard_library(place: Callable[[], Place]) -> None:
    fn, change = place()
    traced = make_traced(fn)
    for _ in range(2):
        for x in (X, X + 1):
            assert torch.equal(traced(x), fn(x))
        change()


def test_effects_on_a_queue_are_refused() -> None:
    waiting: queue.Queue[int] = queue.Queue()
    with pytest.raises(CaptureError, match="which a program would do only once"):
        make_traced(lambda x: (waiting.put(1), x)[1])(X)
    assert waiting.qsize() == 0
