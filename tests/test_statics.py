"""Python values among the arguments: what is told apart, and what is the same."""

import dataclasses
import enum
import functools
import math
import struct
from collections import OrderedDict, defaultdict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from primexec import CaptureError, make_traced
from primexec.statics import freeze_static

X = torch.arange(6.0).reshape(2, 3)


class Color(enum.Enum):
    RED = 1
    GREEN = 2


class Level(enum.IntEnum):
    RED = 1


class Flags(enum.IntFlag):
    ONE = 1


@dataclasses.dataclass(frozen=True)
class Config:
    rate: float
    name: str = "a"


@dataclasses.dataclass(frozen=True)
class OtherConfig:
    rate: float
    name: str = "a"


NAN = struct.unpack("d", struct.pack("Q", 0x7FF8000000000001))[0]  # another NaN than math.nan


def traces(traced: Any) -> int:
    info = traced.cache_info()
    assert info.misses == info.traces
    return info.traces


def returns_static(x: Tensor, value: Any) -> tuple[Tensor, Any]:
    return x + 1, value


# Within a row all values are the same static; values of different rows are different ones.
STATICS: list[list[Any]] = [
    [None],
    [True],
    [False],
    [1],
    [1.0],
    [1 + 0j],
    [0],
    [0.0],
    [-0.0],
    [complex(0.0, -0.0)],
    [math.nan, float("nan"), NAN],
    [math.inf],
    [complex(math.nan, 1.0), complex(float("nan"), 1.0)],
    ["1"],
    [b"1"],
    [2**70],
    [Color.RED],
    [Color.GREEN],
    [Level.RED],
    [torch.float32],
    [torch.float64],
    [torch.device("cpu")],
    [torch.strided],
    [torch.channels_last],
    [slice(1, None)],
    [slice(1.0, None)],
    [slice(None, 1)],
    [range(3)],
    [range(0, 3, 2)],
    [range(0, 4, 2)],
    [Flags.ONE],
    [Flags(8), Flags(8)],
    [Flags(16)],
    [torch.Size([2, 3])],
    [torch.Size([3, 2])],
    [Config(1.0), Config(1.0, "a")],
    [Config(1)],
    [Config(1.0, "b")],
    [OtherConfig(1.0)],
    [np.float32(1)],
    [np.float64(1)],
    [np.int64(1)],
    [np.float32(-0.0)],
    [np.float32("nan")],
    [np.bool_(True)],
    [Ellipsis],
    [frozenset({1, 2}), frozenset({2, 1})],
    [frozenset({1.0, 2})],
]


def test_static_values_are_told_apart() -> None:
    traced = make_traced(returns_static, cache_size=100)
    for expected, row in enumerate(STATICS[:8], start=1):
        for value in row * 2:
            out, static = traced(X, value)
            assert torch.equal(out, X + 1)
            assert static is value or repr(static) == repr(value)
        assert traces(traced) == expected


@pytest.mark.parametrize("row", STATICS[8:], ids=lambda row: f"{type(row[0]).__name__} {row[0]}")
def test_static_value_is_told_from_all_others(row: list[Any]) -> None:
    traced = make_traced(lambda x, value: (x + 1, type(value).__name__, repr(value)), cache_size=100)
    for value in row * 2:
        assert traced(X, value)[1:] == (type(value).__name__, repr(value))
    assert traces(traced) == 1
    for other in STATICS:
        if other is not row and type(other[0]).__name__ == type(row[0]).__name__:
            assert traced(X, other[0])[2] == repr(other[0])
    others = sum(type(o[0]).__name__ == type(row[0]).__name__ for o in STATICS)
    assert traces(traced) == others


def exact(value: Any) -> Any:
    """A text that two values share only if they have the same types and bits throughout."""
    if type(value) is float:
        return "float", "nan" if math.isnan(value) else struct.pack("d", value)
    if type(value) is complex:
        return "complex", exact(value.real), exact(value.imag)
    if type(value) in (tuple, slice, frozenset):
        parts = (value.start, value.stop, value.step) if type(value) is slice else value
        inside = [exact(v) for v in parts]
        return type(value), sorted(map(repr, inside)) if type(value) is frozenset else inside
    if isinstance(value, np.generic):
        return type(value), value.dtype.str, value.tobytes()
    if dataclasses.is_dataclass(value):
        return type(value), [exact(getattr(value, f.name)) for f in dataclasses.fields(value)]
    return type(value), repr(value)


FLOATS = st.floats() | st.sampled_from([0.0, -0.0, 1.0, math.nan, NAN, math.inf])
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-2, 2)
    | FLOATS
    | st.builds(complex, FLOATS, FLOATS)
    | st.sampled_from(["", "1", b"1", Color.RED, Level.RED, Ellipsis, torch.float32, torch.strided, range(2)])
    | st.builds(torch.Size, st.lists(st.integers(0, 2), max_size=2))
    | st.sampled_from([np.float32, np.float64, np.float16]).flatmap(lambda t: FLOATS.map(t))
    | st.sampled_from([np.int32(1), np.int64(1), np.uint8(1), np.bool_(True), np.complex64(1)])
)


def nested(values: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return (
        st.lists(values, max_size=3).map(tuple)
        | st.builds(slice, values, values, values)
        | st.builds(Config, values, values)
        | st.builds(OtherConfig, values)
        | st.frozensets(values.filter(is_hashable), max_size=2)
    )


def is_hashable(value: Any) -> bool:
    try:
        hash(value)
    except TypeError:  # slices are not before Python 3.12, and so what holds them is not
        return False
    return True


VALUES = st.recursive(LEAVES, nested, max_leaves=4)


@pytest.mark.filterwarnings("ignore:overflow encountered in cast")
@given(VALUES, VALUES)
def test_frozen_is_equal_for_the_same_type_and_bits_only(a: Any, b: Any) -> None:
    frozen = freeze_static(a), freeze_static(b)
    assert None not in frozen
    assert freeze_static(a) == frozen[0]
    assert hash(freeze_static(a)) == hash(frozen[0])
    assert (frozen[0] == frozen[1]) == (exact(a) == exact(b))


@pytest.mark.parametrize(
    "value", [[1], {}, {1}, bytearray(b"1"), object(), (1, [2]), slice([1]), Config([])], ids=lambda v: type(v).__name__
)
def test_what_can_change_is_not_static(value: Any) -> None:
    assert freeze_static(value) is None


def test_objects_that_cannot_be_compared_are_refused() -> None:
    with pytest.raises(CaptureError, match="odd is of type object, which can be neither traced nor compared"):
        make_traced(lambda x, odd: x)(X, object())


@dataclasses.dataclass(frozen=True)
class Rate:
    """Sets what is no field."""

    rate: float
    times: dataclasses.InitVar[float]
    scale = 1.0

    def __post_init__(self, times: float) -> None:
        object.__setattr__(self, "product", self.rate * times)

    @functools.cached_property
    def twice(self) -> float:
        return self.rate * 2


def test_what_a_frozen_dataclass_holds_beside_its_fields(monkeypatch: pytest.MonkeyPatch) -> None:
    traced = make_traced(lambda x, r: x * r.product * r.scale + r.twice)  # type: ignore[attr-defined]
    for times in (1.0, 3.0, 1.0):
        assert torch.equal(traced(X, Rate(2.0, times)), X * 2 * times + 4)
    assert traces(traced) == 2
    monkeypatch.setattr(Rate, "scale", 2.0)
    assert torch.equal(traced(X, Rate(2.0, 1.0)), X * 4 + 4)


def test_attributes_of_members_and_of_metaclasses(monkeypatch: pytest.MonkeyPatch) -> None:
    class Meta(type):
        scale = 2.0

    class Scaled(metaclass=Meta):
        pass

    monkeypatch.setattr(Color.RED, "scale", 2.0, raising=False)
    red: Any = Color.RED
    by_class, by_closure = make_traced(lambda x: x * Scaled.scale), make_traced(lambda x: x * red.scale)
    by_argument = make_traced(lambda x, color: x * color.scale)
    for expected in (2.0, 2.0, 3.0):
        monkeypatch.setattr(Meta, "scale", expected)
        monkeypatch.setattr(Color.RED, "scale", expected)
        for out in (by_class(X), by_closure(X), by_argument(X, Color.RED)):
            assert torch.equal(out, X * expected)
    assert [traces(t) for t in (by_class, by_closure, by_argument)] == [2, 2, 2]


class Key(enum.StrEnum):
    A = "a"


@pytest.mark.parametrize("kind", [dict, OrderedDict, functools.partial(defaultdict, int)], ids=str)
def test_keys_are_told_apart_by_their_types(kind: Any) -> None:
    traced = make_traced(lambda held: [*map(repr, held)])
    for key in (1, 1.0, True, "a", Key.A, 1):
        assert traced(kind({key: X})) == [repr(key)]
    assert traces(traced) == 5
