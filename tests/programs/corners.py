"""State that hides: in classes, containers, modes, offsets and tensors' own attributes.

Where a program is refused or right, nobody may notice the difference: that is what `either` says.
"""

import copy
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from tests.programs import library
from tests.programs.table import Family, Inputs, cases, draw, of, tensors

FAMILY = Family("corners")
X = tensors((3, 4))
TWICE: dict[str, Any] = {"calls": 4, "traces_at": (0, 1)}


class Layer:
    scale = 2.0

    def __init__(self) -> None:
        self.weight = draw(1, 4)
        self.state = SimpleNamespace(k=1.0)
        self.items = [SimpleNamespace(k=1.0)]

    def helper(self, x: Tensor) -> Tensor:
        return x * self.weight

    def __call__(self, x: Tensor) -> Tensor:
        return self.helper(x) * self.scale + self.items[0].k


def reset_layer() -> Layer:
    Layer.scale = 2.0
    return Layer()


def double(x: Tensor) -> Tensor:
    return x * 2


# What was read, and changes between calls.
FAMILY.add_factory("class_attribute", reset_layer, X, before=lambda f, i: setattr(Layer, "scale", i % 2), **TWICE)
FAMILY.add_factory("object_in_list", Layer, X, before=lambda f, i: setattr(f.items[0], "k", i % 2), **TWICE)
FAMILY.add_factory(
    "method_replaced",
    Layer,
    X,
    before=lambda f, i: setattr(f, "helper", (double, torch.sin)[i % 2]),
    **TWICE,
)
FAMILY.add_factory("tensor_attribute_replaced", Layer, X, before=lambda f, i: setattr(f, "weight", draw(i, 4)))
FAMILY.add(
    "module_attribute", lambda x: x * library.SCALE, X, before=lambda f, i: setattr(library, "SCALE", i % 2), **TWICE
)
FAMILY.add("other_file", lambda x: library.scaled(x), X, before=lambda f, i: setattr(library, "SCALE", i % 2), **TWICE)


@FAMILY.factory(X, before=lambda f, i: f.__closure__[0].cell_contents.__setitem__(0, draw(i, 4)))
def tensor_in_list_replaced() -> Any:
    weights = [draw(9, 4)]
    return lambda x: x * weights[0]


@FAMILY.factory(X, before=lambda f, i: f.__closure__[0].cell_contents.update(w=draw(i, 4)))
def tensor_in_dict_replaced() -> Any:
    weights = {"w": draw(9, 4)}
    return lambda x: x * weights["w"]


@FAMILY.factory(X, before=lambda f, i: setattr(f.__closure__[0], "cell_contents", draw(i, 4)))
def tensor_in_cell_replaced() -> Any:
    weight = draw(9, 4)
    return lambda x: x * weight


@FAMILY.factory(X, before=lambda f, i: f.__closure__[0].cell_contents.fill(i), either=True)
def array_in_cell() -> Any:
    array = np.zeros(4, dtype=np.float32)
    return lambda x: x + torch.from_numpy(array)


@FAMILY.factory(X, before=lambda f, i: f.__closure__[0].cell_contents.fill(i), either=True)
def array_element_in_cell() -> Any:
    array = np.zeros(4, dtype=np.float32)
    return lambda x: x * float(array[0])


@FAMILY.factory(X, before=lambda f, i: f.__closure__[0].cell_contents.add(i), either=True)
def set_in_cell() -> Any:
    known: set[int] = set()
    return lambda x: x * len(known)


class Meters(float):
    pass


class Tagged(Tensor):
    pass


# What of an argument is easily forgotten in the key.
def refused_or_right(name: str, function: Any, inputs: Inputs, **options: Any) -> None:
    FAMILY.add(name, function, inputs, either=True, **{"calls": 4, **options})


OFFSETS = cases(of(lambda x: (x[:3],), 6), of(lambda x: (x[2:5],), 6))
FAMILY.add("offset_read", lambda x: x * x.storage_offset(), OFFSETS, **TWICE)
FAMILY.add("offset_used", lambda x: x.as_strided((2,), (1,), x.storage_offset() + 1), OFFSETS, **TWICE)
FAMILY.add("offset_implied", lambda x: x.as_strided((2,), (1,)), OFFSETS, calls=4)
refused_or_right(
    "storage_size", lambda x: x * x.untyped_storage().nbytes(), cases(of(lambda x: (x[:3],), 6), tensors((3,)))
)
refused_or_right("version", lambda x: x.add_(1) * x._version, cases(tensors((3,)), of(lambda x: (x.add_(1),), 3)))
refused_or_right("is_view", lambda x: x * 2 if x._is_view() else x * 3, cases(tensors((3,)), of(lambda x: (x[:],), 3)))
refused_or_right("base", lambda x: x * 2 if x._base is None else x * 3, cases(tensors((3,)), of(lambda x: (x[:],), 3)))
refused_or_right(
    "is_shared", lambda x: x * (2 if x.is_shared() else 3), cases(tensors((3,)), of(lambda x: (x.share_memory_(),), 3))
)


def with_grad(i: int) -> tuple[Tensor]:
    x = draw(i, 3).requires_grad_()
    x.grad = torch.ones(3)
    return (x,)


def with_attribute(i: int) -> tuple[Tensor]:
    x = draw(i, 3)
    x.tag = 5  # type: ignore[attr-defined]
    return (x,)


GRADS = cases(lambda i: (draw(i, 3).requires_grad_(),), with_grad)
refused_or_right("grad_read", lambda x: x * 2 if x.grad is None else x.grad, GRADS, contexts=(torch.no_grad,))
refused_or_right("attribute_read", lambda x: x * getattr(x, "tag", 1), cases(tensors((3,)), with_attribute))
refused_or_right("attribute_written", lambda x: (setattr(x, "tag", 1), x + 1)[1], tensors((3,)))
refused_or_right("grad_written", lambda x: (setattr(x, "grad", x * 2), x + 1)[1], tensors((3,)))
refused_or_right("requires_grad_written", lambda x: (x.requires_grad_(), 1)[1], tensors((3,)))
refused_or_right("data_assigned", lambda x, y: (setattr(x, "data", y), x + 1)[1], tensors((3,), (3,)))
FAMILY.add("set_", lambda x, y: x.set_(y), tensors((3,), (3,)))
FAMILY.add("resized_larger", lambda x: x.resize_(8).fill_(1), tensors((3,)))
FAMILY.add("out_resizes_input", lambda x, out: torch.exp(x, out=out), tensors((3,), (0,)))
refused_or_right("deepcopied", lambda x: copy.deepcopy(x).add_(1), tensors((3,)))
refused_or_right("copied", lambda x: copy.copy(x).add_(1), tensors((3,)))
FAMILY.add("as_key", lambda x: {x: 2}[x] * x, tensors((3,)))
refused_or_right("sparse", lambda x: x.to_dense() * 2, lambda i: (draw(i, 3, 4).to_sparse(),))
refused_or_right("made_sparse", lambda x: x.to_sparse().to_dense(), X)
refused_or_right("numpy_number", lambda x, k: x * k, lambda i: (draw(i, 3), np.float64(2.0) if i % 2 else 2.0))
refused_or_right("number_of_own_class", lambda x, k: x * k, lambda i: (draw(i, 3), Meters(2.0 + i % 2)))
refused_or_right("subclass", lambda x: x * 2, lambda i: (draw(i, 3).as_subclass(Tagged),))


@FAMILY.factory(X, **TWICE)
def closure_transposed() -> Any:
    weight = draw(1, 4, 4)
    return lambda x: x @ weight.t_()


# Modes that are left changed: the harness sees them before the context ends.
def restored(get: Any, put: Any) -> Any:
    class Restored:
        def __enter__(self) -> None:
            self.before = get()

        def __exit__(self, *_: object) -> None:
            put(self.before)

    return Restored


refused_or_right(
    "grad_mode_left_off",
    lambda x: (torch._C._set_grad_enabled(False), x + 1)[1],
    X,
    contexts=(restored(torch.is_grad_enabled, torch._C._set_grad_enabled),),
)
refused_or_right(
    "set_grad_enabled_left_off",
    lambda x: (torch.set_grad_enabled(False), x + 1)[1],
    X,
    contexts=(restored(torch.is_grad_enabled, torch._C._set_grad_enabled),),
)
refused_or_right(
    "default_dtype_left",
    lambda x: (torch.set_default_dtype(torch.float64), torch.ones(2))[1],
    X,
    contexts=(restored(torch.get_default_dtype, torch.set_default_dtype),),
)
refused_or_right(
    "default_dtype_within",
    lambda x: (torch.set_default_dtype(torch.float64), torch.ones(2), torch.set_default_dtype(torch.float32))[1],
    X,
    contexts=(restored(torch.get_default_dtype, torch.set_default_dtype),),
)
