"""Large and nested containers: what was put in the place of an equal element is told apart."""

import array
import collections
import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import primexec
from primexec import reaching

Edit = Callable[[Any], None]


def traces(traced: Any) -> int:
    return int(traced.cache_info().traces)


class Walked(list[Any]):
    """A list whose own walk says nothing of its elements."""

    def __iter__(self) -> Any:
        return iter(())


class Row(collections.namedtuple("Row", "a b")):
    """A row of a table."""


def put(key: Any, value: Any) -> Edit:
    return lambda held: held.__setitem__(key, copy.deepcopy(value))


# name → (makes the container, reads a number, an edit that keeps the program, an edit that does not)
ROWS: dict[str, tuple[Callable[[], Any], Callable[[Any], Any], Edit, Edit]] = {
    "floats": (lambda: [0.5, 3.0], lambda h: h[1], put(1, float("3")), put(1, 3)),
    "sign_of_zero": (lambda: [0.0, 1.0], lambda h: 1 / torch.tensor(h[0]), put(0, float("0")), put(0, -0.0)),
    "nan": (lambda: [float("nan")], lambda h: h[0], put(0, float("nan")), put(0, 1.0)),
    "whole_numbers": (lambda: [1, 1000], lambda h: h[0], put(1, int("1000")), put(0, True)),
    "pairs": (lambda: [(1, "a"), (2, "b")], lambda h: h[1][0], put(1, (2, "b")), put(1, (2.0, "b"))),
    "named_pairs": (lambda: [Row(1, 2)], lambda h: h[0].a, put(0, Row(1, 2)), put(0, Row(2, 2))),
    "deque": (lambda: collections.deque([1, 2]), lambda h: h[0], lambda h: h.rotate(2), lambda h: h.rotate(1)),
    "set": (lambda: {1, 2}, len, lambda h: (h.remove(1), h.add(1)), lambda h: h.add(3)),  # type: ignore[dict-item]
    "bytes": (lambda: bytearray(b"ab"), lambda h: h[0], put(0, ord("a")), put(0, ord("b"))),
    "own_walk": (lambda: Walked([1, 2]), lambda h: h[0], put(0, 1), put(0, 2)),
    "lists": (lambda: [[1, 2], [3]], lambda h: h[1][0], put(1, [3]), lambda h: h[1].append(h[1].pop() + 1)),
    "moved": (lambda: [[1, 2], [3]], lambda h: len(h[1]), put(0, [1, 2]), lambda h: h[1].insert(0, h[0].pop())),
    "dict_of_lists": (lambda: {"a": [1.0]}, lambda h: h["a"][0], put("a", [1.0]), lambda h: put(0, 1)(h["a"])),
    "dict_in_list": (lambda: [{"a": 1}], lambda h: h[0]["a"], put(0, {"a": 1}), lambda h: put("a", 2)(h[0])),
    "array_in_list": (lambda: [array.array("d", [1])], lambda h: h[0][0], put(0, array.array("d", [1])),
                      lambda h: put(0, 2)(h[0])),
    "ndarray_in_list": (lambda: [np.ones(2)], lambda h: float(h[0][0]), put(0, np.ones(2)), lambda h: put(0, 2)(h[0])),
    "tensors": (lambda: [torch.ones(1)], lambda h: h[0], put(0, torch.zeros(1)), lambda h: h.append(torch.ones(1))),
    "tensors_moved": (lambda: [[torch.ones(1)] * 2, [torch.ones(1)]], lambda h: len(h[1]), put(0, [torch.ones(1)] * 2),
                      lambda h: h[1].append(h[0].pop())),
    "tensor_and_number": (lambda: [torch.ones(1), 2], lambda h: h[0] * h[1], put(0, torch.zeros(1)), put(1, 3)),
    "objects": (lambda: [SimpleNamespace(a=1)], lambda h: h[0].a, lambda h: None, put(0, SimpleNamespace(a=2))),
}  # fmt: skip


@pytest.mark.parametrize("place", ["closure", "attribute"])
@pytest.mark.parametrize("name", ROWS)
def test_element_replaced(name: str, place: str) -> None:
    make, read, keep, change = ROWS[name]
    held, x = make(), torch.ones(1, dtype=torch.int64)
    owner = SimpleNamespace(held=held)
    traced = primexec.make_traced((lambda x: x * read(held)) if place == "closure" else lambda x: x * read(owner.held))
    for edit in (lambda h: None, keep, lambda h: None, change):
        edit(held)
        wanted: Tensor = x * read(held)
        for _ in range(2):
            got = traced(x)
            assert (got.dtype == wanted.dtype and torch.equal(got, wanted)) or (got.isnan() & wanted.isnan()).all()
    assert traces(traced) <= 3


def test_equal_elements_do_not_retrace() -> None:
    for name in ("floats", "nan", "pairs", "lists", "dict_of_lists", "dict_in_list", "set", "bytes", "deque"):
        make, read, keep, _ = ROWS[name]
        held = make()
        traced = primexec.make_traced(lambda x, held=held, read=read: x * read(held))
        for _ in range(3):
            traced(torch.ones(1))
            keep(held)
        assert traces(traced) == 1, name


def test_closed_over_list_is_replaced_by_an_equal_one() -> None:
    held = [1.0, 2.0]
    traced = primexec.make_traced(lambda x: x * held[0])
    x = torch.ones(1)
    for held in ([1.0, 2.0], [1.0, 2.0], [3.0, 2.0]):
        assert torch.equal(traced(x), x * held[0])
    held[0] = 4.0
    assert torch.equal(traced(x), x * 4)
    assert traces(traced) == 3


def test_attribute_is_replaced_by_an_equal_one_that_changes_later() -> None:
    owner = SimpleNamespace(rows=[[1.0], [2.0]], table={"a": [1.0]})
    traced = primexec.make_traced(lambda x: x * owner.rows[0][0] + owner.table["a"][0])
    x = torch.ones(1)
    for _ in range(3):
        assert traced(x).item() == 2
        owner.rows, owner.table = [[1.0], [2.0]], {"a": [1.0]}
    assert traced(x).item() == 2
    assert traces(traced) == 1
    owner.rows[0][0] = 3.0
    assert traced(x).item() == 4
    owner.table = {"a": [1.0]}
    assert traced(x).item() == 4
    owner.table["a"][0] = 3.0
    assert traced(x).item() == 6


def test_order_of_names_in_a_dict() -> None:
    table = {"a": 1.0, "b": 2.0}
    traced = primexec.make_traced(lambda x: x * next(iter(table.values())))
    assert traced(torch.ones(1)).item() == 1
    table["a"] = table.pop("a")
    assert traced(torch.ones(1)).item() == 2


def test_float_arguments() -> None:
    traced = primexec.make_traced(lambda x, d: x * d["k"])
    for k in (2.0, 2, 0.0, -0.0, float("inf"), float("nan"), -2.5e-310, 2.0):
        assert str(traced(torch.ones(1), {"k": k})) == str(torch.ones(1) * k)
    assert traces(traced) == 7


def test_more_objects_than_can_be_watched(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reaching, "MAX_OBJECTS", 50)
    module = nn.Linear(2, 2)
    module.rows = [(i, str(i)) for i in range(100)]  # type: ignore[assignment]  # of numbers only
    module.objects = [SimpleNamespace(a=i) for i in range(100)]  # type: ignore[assignment]
    x = torch.ones(2)
    assert torch.equal(primexec.make_traced(lambda x: x * module.rows[3][0])(x), x * 3)  # type: ignore[index]
    with pytest.raises(primexec.CaptureError, match="more than 50 Python objects"):
        primexec.make_traced(lambda x: x * module.objects[3].a)(x)  # type: ignore[index]
