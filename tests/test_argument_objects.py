"""Objects among the arguments: read, changed and returned as eager does it, and compared from call to call."""

from __future__ import annotations

import dataclasses
import gc
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from torch import Tensor

from primexec import CaptureError, make_traced

X = torch.arange(6.0).reshape(2, 3)


class Layer:
    scale = 1.0

    def __init__(self) -> None:
        self.ready, self.length = False, 0

    def update(self, x: Tensor) -> Tensor:
        if not self.ready:
            self.keys, self.ready = x[:0], True
        self.keys = torch.cat([self.keys, x * self.scale])
        self.length += len(x)
        return self.keys


class Store:
    """As transformers' dynamic cache: layers come as they are needed."""

    def __init__(self) -> None:
        self.layers: list[Layer] = []
        self.used: dict[int, bool] = {}

    def update(self, x: Tensor, number: int) -> Tensor:
        while len(self.layers) <= number:
            self.layers.append(Layer())
        self.used[number] = True
        return self.layers[number].update(x)


def attend(x: Tensor, store: Store) -> tuple[Tensor, Store]:
    return (store.update(x, 0) + store.update(x * 2, 1)).sum(0), store


def assert_like(store: Store, expected: Store) -> None:
    assert len(store.layers) == len(expected.layers)
    assert list(store.used.items()) == list(expected.used.items())
    for mine, eagers in zip(store.layers, expected.layers, strict=True):
        assert list(vars(mine)) == list(vars(eagers))
        assert torch.equal(mine.keys, eagers.keys)
        assert (mine.ready, mine.length) == (eagers.ready, eagers.length)


def traces(traced: Any) -> int:
    count: int = traced.cache_info().traces
    return count


def test_a_growing_store_is_changed_in_place_and_its_like_is_a_hit() -> None:
    traced = make_traced(attend, executor="aten")
    for _ in range(2):
        store, expected = Store(), Store()
        layers, used = store.layers, store.used
        for i in range(3):
            out, same = traced(X + i, store)
            assert same is store
            assert torch.equal(out, attend(X + i, expected)[0])
            assert_like(store, expected)
        assert store.layers is layers
        assert store.used is used
    assert traces(traced) == 3
    dead = weakref.ref(store)
    del store, same, layers, used
    gc.collect()
    assert dead() is None


def test_attributes_of_classes_are_read_like_any_state(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = make_traced(attend, executor="aten")
    for scale in (1.0, 3.0):
        monkeypatch.setattr(Layer, "scale", scale)
        for _ in range(2):
            store, expected = Store(), Store()
            assert torch.equal(traced(X, store)[0], attend(X, expected)[0])
            assert_like(store, expected)
    assert traces(traced) == 2


def test_gradients_flow_through_what_is_stored() -> None:
    found = []
    for run in (attend, make_traced(attend, executor="aten")):
        store, x = Store(), X.clone().requires_grad_()
        run(x, store)
        out, _ = run(x * 2, store)
        (out.sum() + store.layers[1].keys.square().sum()).backward()
        found.append(x.grad)
    assert torch.equal(*found)


@dataclasses.dataclass
class Batch:
    x: Tensor
    size: int
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def test_dataclasses_plain_values_and_tensors_written_in_place() -> None:
    def f(batch: Batch) -> Tensor:
        batch.x.add_(1)
        batch.extra["y"] = [batch.x, batch.x * batch.size]
        batch.size = 2
        return batch.x * 2

    traced = make_traced(f)
    for size, count in ((2, 1), (2, 1), (3, 2)):
        mine, expected = Batch(X.clone(), size), Batch(X.clone(), size)
        assert torch.equal(traced(mine), f(expected))
        assert torch.equal(mine.x, expected.x)
        assert mine.extra["y"][0] is mine.x
        assert torch.equal(mine.extra["y"][1], expected.extra["y"][1])
        assert mine.size == 2
        assert traces(traced) == count


def test_parts_change_places() -> None:
    def f(store: Store) -> list[Any]:
        store.layers.reverse()
        store.first, store.last = store.layers[0], store.layers  # type: ignore[attr-defined]
        return store.layers

    traced = make_traced(f)
    for _ in range(2):
        store = Store()
        attend(X, store)
        one, two = store.layers
        assert traced(store) is store.layers is store.last  # type: ignore[attr-defined]
        assert store.layers == [two, one]
        assert store.first is two  # type: ignore[attr-defined]
    assert traces(traced) == 1


def test_a_number_read_off_a_tensor_is_stored() -> None:
    def f(x: Tensor, batch: Batch) -> Tensor:
        batch.size = x.max().item()
        return x + batch.size

    traced = make_traced(f)
    for k in range(2):
        batch = Batch(X, 3)
        assert torch.equal(traced(X + k, batch), X + k + 5 + k)
        assert batch.size == 5 + k
        assert type(batch.size) is float
    assert traces(traced) == 1


OTHER = Store()
LISTS: list[Any] = [[]]


def aliased(x: Tensor, store: Store) -> Tensor:
    return x * len(OTHER.layers) + attend(x, store)[0]


def listed(x: Tensor, store: Store) -> Tensor:
    return attend(x, store)[0] * (1 + len(LISTS[0]))


def test_what_the_function_reaches_by_itself_is_no_argument_of_it() -> None:
    traced = make_traced(aliased)
    assert torch.equal(traced(X, Store()), aliased(X, Store()))
    with pytest.raises(CaptureError, match="holds, a Store that the function also reaches"):
        traced(X, OTHER)


WEIGHTS: Any = weakref.WeakKeyDictionary()


def test_an_object_that_is_a_key() -> None:
    traced = make_traced(lambda x, store: x * WEIGHTS.get(store, 1))
    assert torch.equal(traced(X, Store()), X)
    WEIGHTS[store := Store()] = 7
    with pytest.raises(CaptureError, match="holds, a Store that the function also reaches"):
        traced(X, store)


def test_a_list_that_came_to_where_an_equal_one_was() -> None:
    traced = make_traced(listed)
    assert torch.equal(traced(X, Store()), listed(X, Store()))
    store = Store()
    LISTS[0] = store.layers
    with pytest.raises(CaptureError, match="holds, a list that the function also reaches"):
        traced(X, store)
    LISTS[0] = []


def test_an_object_in_two_places() -> None:
    traced = make_traced(lambda a, b: attend(X, a)[0] + attend(X, b)[0])
    traced(Store(), Store())
    store = Store()
    with pytest.raises(CaptureError, match="stands in two places among the arguments"):
        traced(store, store)


class Holder:
    def __init__(self, **held: Any) -> None:
        vars(self).update(held)


def removes(h: Holder) -> None:
    del h.x


def orders(h: Holder) -> None:
    h.x.move_to_end("a")


def becomes(h: Holder) -> None:
    h.__class__ = Store  # type: ignore[assignment]


def shares(h: Holder) -> None:
    h.x = h.y = [1, 2]


def shares_result(h: Holder) -> list[int]:
    h.x = [1, 2]
    return h.x  # type: ignore[no-any-return]


def keeps_a_global(h: Holder) -> None:
    h.x = LISTS


def keeps_an_object(h: Holder) -> None:
    h.x = OTHER


def keeps_a_function(h: Holder) -> None:
    z = h.z
    h.x = lambda y: y + z


@pytest.mark.parametrize(
    ("function", "held"),
    [
        (removes, 1),
        (orders, OrderedDict(a=1, b=2)),
        (becomes, 1),
        (shares, 1),
        (shares_result, 1),
        (keeps_a_global, 1),
        (keeps_an_object, 1),
        (keeps_a_function, 1),
    ],
)
def test_what_is_done_to_objects_and_cannot_be_done_again_is_refused(function: Any, held: Any) -> None:
    h = Holder(x=held, z=X)
    with pytest.raises(CaptureError):
        make_traced(function)(h)
    assert type(h) is Holder
    assert h.x is held  # type: ignore[attr-defined]


def test_what_is_in_an_object_must_be_comparable() -> None:
    with pytest.raises(CaptureError, match=r"h\.x\.y\[0\] is of type object"):
        make_traced(lambda h: X)(Holder(x=Holder(y=[object()])))
    cyclic = Holder()
    cyclic.me = cyclic  # type: ignore[attr-defined]
    with pytest.raises(CaptureError, match=r"h\.me is of type Holder"):
        make_traced(lambda h: X)(cyclic)


def test_transforms_look_into_objects() -> None:
    traced = make_traced(lambda x, h: x * h.y)
    out = torch.func.vmap(lambda x: traced(x, Holder(y=x + 1)))(X)
    assert torch.equal(out, X * (X + 1))
