"""What a user is told who passes, or does, what cannot be served."""

import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from primexec import CaptureError, make_traced

X = torch.ones(3)
STATE: dict[str, Any] = {"seen": 3, "n": 0}


def first(x: Any) -> Any:
    return next(iter(x))


def generated(x: Tensor) -> Iterator[Tensor]:
    yield x


async def awaited(x: Tensor) -> Tensor:
    return x


def requires(x: Tensor) -> Tensor:
    x.requires_grad = True
    return (x * 2).sum()


def counted(x: Tensor) -> Tensor:
    STATE["seen"] = x.shape[0]
    STATE["n"] += 1
    return x * 2 if str(STATE["n"]) in "13579" else x


LAYER = nn.Linear(3, 1)
OPTIMIZER = torch.optim.SGD(LAYER.parameters(), 0.1)
SCHEDULE = torch.optim.lr_scheduler.ExponentialLR(OPTIMIZER, 0.9)
OPTIMIZER.step()


def scheduled(x: Tensor) -> Tensor:
    SCHEDULE.step()
    return x * len(str(SCHEDULE.get_last_lr()))


with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    NESTED = torch.nested.nested_tensor([X, X[:2]])

SAID: dict[str, tuple[Callable[..., Any], Any, str]] = {
    "array": (
        first,
        np.ones(3)[::-1],
        r"(?s)x is of type ndarray.*in first.*torch.from_numpy\(\) takes, such as array.copy",
    ),
    "generator": (first, (t for t in (X,)), "(?s)x is of type generator.*pass a list or tuple"),
    "set": (first, {1, 2}, "(?s)x is of type set.*pass a list or tuple"),
    "view": (first, {"a": X}.values(), "(?s)x is of type dict_values.*pass a list or tuple"),
    "nested": (first, NESTED, "x is a quantized or nested tensor"),
    "generates": (generated, X, "(?s)returns a generator, whose code runs later.*in generated.*return a list"),
    "async": (awaited, X, "(?s)returns a coroutine, whose code runs later"),
    "requires_grad": (requires, X, r"(?s)sets x.requires_grad, of an input.*outside of the traced"),
    "key": (counted, X, r'(?s)changes global of test_messages.py: STATE: n.*\n    STATE\["n"\] \+= 1'),
    "scheduler": (scheduled, X, "(?s)changes global of .*lr.*in scheduled"),
    "seed": (lambda x: (torch.manual_seed(0), x)[1], X, "sets the state of torch's random generator"),
    "compiled": (torch.compile(lambda x: x, backend="eager"), X, "(?s)torch.compile made.*pass backend="),
}


@pytest.mark.parametrize(("fn", "argument", "message"), SAID.values(), ids=SAID)
@pytest.mark.filterwarnings("ignore:coroutine")
def test_what_is_said(fn: Callable[..., Any], argument: Any, message: str) -> None:
    with pytest.raises(CaptureError, match=message):
        make_traced(fn)(argument)


OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "no executor": (
        {"executor": None},
        TypeError,
        "executor must be a name or a non-empty sequence of names, got None",
    ),
    "a number": ({"executor": 3}, TypeError, "executor must be a name"),
    "misspelled": ({"executor": "lvm"}, ValueError, "lvm. Allowed values are"),
    "a text": ({"executor_parameters": "strict"}, TypeError, "must be a dict of names and values, got 'strict'"),
    "no size": ({"cache_size": None}, TypeError, "cache_size must be an int, got None"),
}


@pytest.mark.parametrize(("options", "kind", "message"), OPTIONS.values(), ids=OPTIONS)
def test_options(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        make_traced(first, **options)


def test_a_refusal_leaves_state_as_it_was() -> None:
    before = types.SimpleNamespace(**STATE)
    for fn in (counted, scheduled):
        with pytest.raises(CaptureError):
            make_traced(fn)(X)
    assert types.SimpleNamespace(**STATE) == before
    assert SCHEDULE.last_epoch == 0
