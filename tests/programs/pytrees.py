"""Nested arguments and results."""

from collections import OrderedDict, defaultdict, deque
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast

from tests.programs.library import Batch, Pair, Point
from tests.programs.table import Call, Family, cases, draw, of, tensors

FAMILY = Family("pytrees")
X = tensors((3, 4))


def one(make: Any) -> Any:
    """Give inputs of one argument, which is made from a function that draws tensors of shape (3,)."""
    return lambda i: (make(lambda k: draw(10 * i + k, 3)),)


ARGUMENTS: dict[str, Any] = {
    "list": (one(lambda t: [t(0), t(1)]), lambda xs: xs[0] + xs[1]),
    "empty_list": (one(lambda t: []), lambda xs: torch.zeros(len(xs))),
    "tuple": (one(lambda t: (t(0), 2, t(1))), lambda xs: xs[0] * xs[1] + xs[2]),
    "dict": (one(lambda t: {"a": t(0), "b": t(1)}), lambda d: {"sum": d["a"] + d["b"], "a": d["a"]}),
    "integer_keys": (one(lambda t: {1: t(0), 0: t(1)}), lambda d: [d[0] - d[1], list(d)]),
    "nested": (one(lambda t: {"a": [t(0), (t(1), {"b": t(2)})]}), lambda d: d["a"][1][1]["b"] + d["a"][0]),
    "namedtuple": (one(lambda t: Batch(t(0), t(1))), lambda batch: Batch(batch.tokens * 2, batch.mask > 0)),
    "namedtuple_none": (one(lambda t: Batch(t(0))), lambda batch: (batch.tokens, batch.mask)),
    "dataclass": (one(lambda t: Point(t(0), t(1))), lambda p: Point(p.y, p.x + 1, name=p.name + "!")),
    "custom_node": (one(lambda t: Pair(t(0), [t(1)], "p")), lambda p: Pair(p.right, p.left * 2, p.label * 2)),
    "ordered_dict": (
        one(lambda t: OrderedDict(b=t(0), a=t(1))),
        lambda d: OrderedDict(reversed(list(d.items()))),
    ),
    "defaultdict": (one(lambda t: defaultdict(list, a=[t(0)])), lambda d: d["a"][0] * 2),
    "deque": (one(lambda t: deque([t(0), t(1)])), lambda q: deque([q[1] + 1, q[0]])),
    "model_output": (
        one(lambda t: BaseModelOutput(last_hidden_state=t(0))),
        lambda out: BaseModelOutput(last_hidden_state=out.last_hidden_state + 1, hidden_states=(out[0],)),
    ),
    "none": (one(lambda t: [t(0), None]), lambda xs: xs[0] if xs[1] is None else xs[1]),
    "strings": (
        one(lambda t: {"x": t(0), "mode": "double"}),
        lambda d: d["x"] * (2 if d["mode"] == "double" else 3),
    ),
    "return_types": (one(lambda t: torch.max(t(0), 0)), lambda m: m.values * m.indices),
    "size": (one(lambda t: [t(0), t(0).shape]), lambda xs: torch.zeros(xs[1]) + xs[0]),
    "written_in_list": (one(lambda t: [t(0), t(1)]), lambda xs: [x.add_(k) for k, x in enumerate(xs)]),
    "written_in_dict": (one(lambda t: {"state": t(0), "x": t(1)}), lambda d: d["state"].add_(d["x"]) * 2),
    "popped_copy": (one(lambda t: {"x": t(0), "y": t(1)}), lambda d: dict(d).pop("x") + 1),
}
for name, (inputs, function) in ARGUMENTS.items():
    FAMILY.add(f"in_{name}", function, inputs)

RESULTS: dict[str, Any] = {
    "none": lambda x: None,
    "nothing_but_static": lambda x: (1, 2.5, "text", True, None, float("nan"), -0.0, 1j, b"bytes"),
    "static_and_tensor": lambda x: {"n": x.shape[0], "y": x + 1, "dtype": x.dtype, "shape": x.shape},
    "list": lambda x: [x + 1],
    "empty": lambda x: ((), [], {}),
    "deep": lambda x: [[[[[x + 1]]]]],
    "generator_to_tuple": lambda x: tuple(row * 2 for row in x),
    "dict_comprehension": lambda x: {f"row{k}": row for k, row in enumerate(x)},
    "return_types": lambda x: x.sort(1),
    "unpacked_return_types": lambda x: list(x.topk(2)),
    "namedtuple": lambda x: Batch(x * 2),
    "dataclass": lambda x: Point(x, x + 1, "q"),
    "model_output": lambda x: CausalLMOutputWithPast(logits=x * 2, hidden_states=(x, x + 1)),
    "model_output_tuple": lambda x: CausalLMOutputWithPast(logits=x * 2).to_tuple(),
    "mixed_keys": lambda x: {1: x + 1, "a": x, (2, 3): x[0]},
    "same_container_twice": lambda x: (lambda pair: [pair, pair])((x, x + 1)),
    "int": lambda x: x.dim(),
    "float": lambda x: x.shape[0] / 2,
    "str": lambda x: str(x.dtype),
    "device": lambda x: x.device,
    "bool": lambda x: x.shape[0] == 3,
    "tuple_of_one": lambda x: (x + 1,),
    "dtype_alone": lambda x: torch.result_type(x, 1),
}
for name, function in RESULTS.items():
    FAMILY.add(f"out_{name}", function, X)

# The structure is part of the key.
FAMILY.add(
    "length_changes",
    lambda xs: sum(xs[1:], xs[0]),
    cases(lambda i: ([draw(i, 3)] * 2,), lambda i: ([draw(i, 3)] * 3,)),
    calls=4,
    traces_at=(0, 1),
)
FAMILY.add(
    "keys_change",
    lambda d: next(iter(d.values())) + len(d),
    cases(lambda i: ({"a": draw(i, 3)},), lambda i: ({"b": draw(i, 3)},)),
    calls=4,
    traces_at=(0, 1),
)
FAMILY.add(
    "list_or_tuple",
    lambda xs: xs,
    cases(lambda i: ([draw(i, 3)],), lambda i: ((draw(i, 3),),)),
    calls=4,
    traces_at=(0, 1),
)
FAMILY.add(
    "label_changes",
    lambda pair: pair.left * len(pair.label),
    cases(lambda i: (Pair(draw(i, 3), None, "a"),), lambda i: (Pair(draw(i, 3), None, "bcd"),)),
    calls=4,
    traces_at=(0, 1),
)
FAMILY.add(
    "static_leaf_changes",
    lambda d: d["x"] * d["k"],
    cases(lambda i: ({"x": draw(i, 3), "k": 2},), lambda i: ({"x": draw(i, 3), "k": 3},)),
    calls=4,
    traces_at=(0, 1),
)
FAMILY.add(
    "none_or_tensor",
    lambda x, mask=None: x if mask is None else x * mask,
    cases(lambda i: (draw(i, 3),), lambda i: (draw(i, 3), draw(i + 1, 3))),
    calls=4,
    traces_at=(0, 1),
)
FAMILY.add("kwargs_nested", lambda **kw: kw["a"]["b"] * 2, lambda i: Call((), {"a": {"b": draw(i, 3)}, "c": [1]}))
FAMILY.add("overlapping_leaves", lambda d: (d["a"].add_(1), d["b"] * 2), of(lambda x: ({"a": x[:3], "b": x[1:]},), 4))


@FAMILY.program(X)
def build_and_take_apart(x: Tensor) -> Any:
    rows = {k: row for k, row in enumerate(x.unbind())}
    stack = [rows.pop(1)]
    stack.append(rows.pop(0))
    stack.extend(rows.values())
    return stack[::-1], sorted(rows), len(stack)
