"""NumPy arrays among the arguments are inputs of a program, by their memory."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from primexec import CaptureError, make_traced

Arrays = list[np.ndarray[Any, Any]]
X = torch.randn(3)


def arrays(seed: int) -> Arrays:
    rng = np.random.default_rng(seed)
    small = rng.integers(0, 3, (4, 3)).astype(np.uint8)
    return [rng.normal(size=(2, 3)).astype(np.float32), rng.normal(size=(3, 2)).T, small, np.array([2, 0, seed % 2])]


def writes(f: Any, d: Any, u: Any, i: Any) -> Any:
    torch.from_numpy(f).add_(1)
    return torch.from_numpy(d).mul_(2).sum()


def describes(f: Any, d: Any, u: Any, i: Any) -> Any:
    assert isinstance(f, np.ndarray)
    assert f.dtype == np.float32
    assert not hasattr(f, "numel")
    return torch.zeros(f.shape) + len(f) + d.ndim + d.size + u.nbytes + u.itemsize, u.shape


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "from_numpy": lambda f, d, u, i: (torch.from_numpy(f) * 2, torch.from_numpy(d)),
    "as_tensor": lambda f, d, u, i: (torch.as_tensor(f), torch.as_tensor(d, dtype=torch.float32), torch.asarray(u)),
    "tensor": lambda f, d, u, i: (torch.tensor(f), torch.tensor(d, dtype=torch.float16), X.new_tensor(d)),
    "index": lambda f, d, u, i: (X[i], torch.from_numpy(d)[:, i], torch.from_numpy(f)[0, 1:]),
    "parts": lambda f, d, u, i: (torch.from_numpy(d[0]), torch.from_numpy(u[1:, ::2]), torch.from_numpy(f.T)),
    "rows": lambda f, d, u, i: torch.stack([torch.from_numpy(row) for row in u]),
    "image": lambda f, d, u, i: (torch.from_numpy(u / 255.0), torch.from_numpy((u.astype(np.float32) - 0.5) / 0.25)),
    "reckons": lambda f, d, u, i: (torch.from_numpy(1 - f * d), torch.from_numpy(i / 2 + u), torch.from_numpy(u * u)),
    "copies": lambda f, d, u, i: (torch.from_numpy(d.copy()).add_(1), torch.from_numpy(np.ascontiguousarray(d))),
    "branches": lambda f, d, u, i: X[: i[2:].size] if torch.from_numpy(f).sum() > 0 else X * torch.from_numpy(d[:1]),
    "numbers": lambda f, d, u, i: (X * f[0, 1], f[0, 1].item() + 1, torch.tensor([f[0, 0], d[0, 1]]), i[:2].tolist()),
    "ints": lambda f, d, u, i: (X[i[0]], X[: i[0]], [X * j for j in range(i[0])], X * 2 if i[0] else X),
    "twice": lambda f, d, u, i: (f is f, torch.from_numpy(f) is torch.from_numpy(f)),
    "writes": writes,
    "describes": describes,
}


@pytest.mark.parametrize("executor", ["auto", "aten"])
@pytest.mark.parametrize("name", FUNCTIONS)
def test_arrays_are_inputs(name: str, executor: str) -> None:
    fn = FUNCTIONS[name]
    traced = make_traced(fn, executor=executor)
    for seed in range(4):
        mine, theirs = arrays(seed), arrays(seed)
        actual, expected = traced(*mine), fn(*theirs)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, check_stride=True)
        for a, b in zip(mine, theirs, strict=True):
            np.testing.assert_array_equal(a, b)
    assert traced.cache_info().traces == (2 if name == "branches" else 1)


def test_results_share_memory_and_gradients_flow() -> None:
    weight = torch.randn(3, requires_grad=True)

    def fn(a: Any) -> tuple[Tensor, Tensor]:
        x = torch.from_numpy(a)
        return x[0], (x * weight).square().sum()

    traced, a = make_traced(fn), arrays(0)[0]
    for _ in range(2):
        row, loss = traced(a)
        (grad,) = torch.autograd.grad(loss, weight)
        (expected,) = torch.autograd.grad(fn(a)[1], weight)
        torch.testing.assert_close(grad, expected)
        row.fill_(7)
        assert (a[0] == 7).all()
        a = arrays(1)[0]
    assert traced.cache_info().traces == 1


def test_kind_shape_and_identity_are_guarded() -> None:
    traced = make_traced(lambda a, b: (torch.as_tensor(a) + torch.as_tensor(b), a is b))
    f, d = np.ones(3, np.float32), np.ones(3)
    calls = [(f, f), (f, f.copy()), (d, d), (f, d), (f[:2], f[:2]), (f[::2], f[:2]), (torch.ones(3), f)]
    for repeat in range(2):
        for a, b in calls:
            sum_, same = traced(a, b)
            torch.testing.assert_close(sum_, torch.as_tensor(a) + torch.as_tensor(b))
            assert same == (a is b)
        assert traced.cache_info().traces == len(calls), repeat


@dataclasses.dataclass
class Batch:
    image: Any
    more: dict[str, Any]


def test_arrays_in_containers_and_objects() -> None:
    traced = make_traced(lambda b: torch.from_numpy(b.image) + torch.from_numpy(b.more["bias"]))
    for seed in range(3):
        a = arrays(seed)
        batch = Batch(a[0], {"bias": a[1]})
        torch.testing.assert_close(traced(batch), torch.from_numpy(a[0]) + torch.from_numpy(a[1]))
    assert traced.cache_info().traces == 1


TABLE = np.ones(3, np.float32)


def also_writes(a: Any) -> Tensor:
    torch.from_numpy(a).add_(1)
    return torch.from_numpy(TABLE) * 2


def catches(a: Any) -> Tensor:
    try:
        return torch.add(X, a)
    except TypeError:
        return X


KEPT: list[Any] = []
REFUSED: dict[str, Callable[..., Any]] = {
    "mean": lambda a: X * a.mean(),
    "float": lambda a: X * math.sqrt(a[0]),
    "ufunc": lambda a: torch.from_numpy(np.sqrt(a)),
    "function": lambda a: torch.from_numpy(np.concatenate([a, a])),
    "asarray": lambda a: torch.from_numpy(np.asarray(a, dtype=np.float64)),
    "array": lambda a: torch.tensor(np.array(a)),
    "list": lambda a: torch.tensor([a, a]),
    "legacy": lambda a: torch.Tensor(a),
    "equal": lambda a: X if (a == 1).all() else -X,
    "times": lambda a: X * a,
    "write": lambda a: (a.__setitem__(0, 1.0), X)[1],
    "axis": lambda a: torch.from_numpy(a[None]),
    "type": lambda a: X if type(a) is np.ndarray else -X,
    "number_returned": lambda a: a[0],
    "text": lambda a: (X, str(a)),
    "to_ints": lambda a: torch.from_numpy(a.astype(np.int64)),
    "returned": lambda a: (X + 1, a),
    "also_writes": also_writes,
    "catches": catches,
    "kept": lambda a: (KEPT.append(a), X + 1)[1],
}


@pytest.mark.parametrize("name", REFUSED)
@pytest.mark.filterwarnings("ignore:Creating a tensor from a list")
def test_what_needs_values_is_refused(name: str) -> None:
    a = np.ones(3, np.float32)
    with pytest.raises(CaptureError, match=r"a, a NumPy array|arrays?\b|float32"):
        make_traced(REFUSED[name])(a)
    assert (a == 1).all()
    assert not KEPT


@pytest.mark.parametrize("make", [lambda: np.array(["a"]), lambda: np.ones(3)[::-1], lambda: np.ones(3, ">f8")])
def test_arrays_that_torch_does_not_know_are_refused(make: Any) -> None:
    with pytest.raises(CaptureError, match="a is of type ndarray"):
        make_traced(lambda a: X + 1)(make())
