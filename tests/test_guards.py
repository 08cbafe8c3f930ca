"""What a call is checked against: every change that matters traces anew, no other does."""

from collections import OrderedDict, namedtuple
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from primexec import make_traced

X = torch.arange(6.0).reshape(2, 3)


Point = namedtuple("Point", "x y")


def traces(traced: Any) -> int:
    info = traced.cache_info()
    assert info.misses == info.traces
    return info.traces


# Structure and identity of arguments --------------------------------------------------------------------

STRUCTURES: list[Any] = [
    (X,), [X], {"a": X}, {"b": X}, OrderedDict(a=X), X, (X, X), (X, X.clone()), (X, None), [(X,)], [[X]],
    Point(X, X.clone()), {"a": X, "b": 1}, {"b": 1, "a": X}, (), [], {}, None, ((), X), ([], X),
]  # fmt: skip


@pytest.mark.filterwarnings("ignore::primexec.RetraceWarning")
def test_structures_are_told_apart() -> None:
    traced = make_traced(lambda tree: repr(torch.utils._pytree.tree_map(lambda _: 0, tree)), cache_size=100)
    for expected, tree in enumerate(STRUCTURES, start=1):
        for _ in range(2):
            assert traced(tree) == repr(torch.utils._pytree.tree_map(lambda _: 0, tree))
        assert traces(traced) == expected


def test_identity_of_arguments() -> None:
    @make_traced
    def function(a: Tensor, b: Tensor, c: Tensor) -> tuple[bool, bool, Tensor]:
        return a is b, b is c, a.add(b).add(c)

    a, b, c = torch.ones(2), torch.ones(2), torch.ones(2)
    for expected, tensors in enumerate([(a, b, c), (a, a, c), (a, b, b), (a, b, a), (a, a, a)], start=1):
        for x, y, z in (tensors, tensors):
            assert function(x, y, z)[:2] == (x is y, y is z)
        assert traces(function) == expected
    # Views of one memory are separate objects: no retrace
    function(a, a.view(2), a.view(2))
    assert traces(function) == 5


def test_identity_among_many_arguments() -> None:
    traced = make_traced(lambda *xs: len({id(x) for x in xs}))
    xs = [torch.ones(2) for _ in range(8)]
    assert traced(*xs) == 8
    assert traced(*xs[:7], xs[0]) == 7
    assert traced(*xs[:6], xs[0], xs[0]) == 6
    assert traced(*reversed(xs)) == 8
    assert traces(traced) == 3


def test_an_argument_that_the_function_also_reaches_by_itself() -> None:
    weight = torch.ones(2)
    traced = make_traced(lambda x: (x.add_(1), weight * 2)[1])
    assert torch.equal(traced(torch.zeros(2)), torch.full((2,), 2.0))
    assert torch.equal(traced(weight), torch.full((2,), 4.0))
    assert torch.equal(traced(torch.zeros(2)), torch.full((2,), 4.0))
    assert torch.equal(traced(weight), torch.full((2,), 6.0))
    assert traces(traced) == 2


METADATA: dict[str, Callable[[], Tensor]] = {
    "shape": lambda: torch.zeros(3, 2),
    "rank": lambda: torch.zeros(2, 3, 1),
    "empty": lambda: torch.zeros(0, 3),
    "dtype": lambda: torch.zeros(2, 3, dtype=torch.float64),
    "strides": lambda: torch.zeros(3, 2).t(),
    "expanded": lambda: torch.zeros(1, 3).expand(2, 3),
    "device": lambda: torch.zeros(2, 3, device="meta"),
    "class": lambda: nn.Parameter(torch.zeros(2, 3), requires_grad=False),
    "requires_grad": lambda: torch.zeros(2, 3, requires_grad=True),
    "inference": lambda: torch.inference_mode()(torch.zeros)(2, 3),
    "conjugate": lambda: torch.zeros(2, 3, dtype=torch.complex64).conj(),
    "negative": lambda: torch.zeros(2, 3, dtype=torch.complex64).conj().imag,
}


@pytest.mark.parametrize("make", METADATA.values(), ids=METADATA)
@torch.no_grad()
def test_metadata_of_tensors(make: Callable[[], Tensor]) -> None:
    traced = make_traced(lambda x: x * 2)
    plain = torch.zeros(2, 3)
    if make().is_complex():
        plain = torch.zeros(2, 3, dtype=torch.complex64)
    for make_one in (lambda: plain, make, lambda: plain, make):
        out, expected = traced(make_one()), make_one() * 2
        assert (out.shape, out.stride(), out.dtype, out.device) == (
            expected.shape, expected.stride(), expected.dtype, expected.device,
        )  # fmt: skip
    assert traced.cache_info()[:3] == (2, 2, 2)


def test_storage_offset_is_guarded_where_it_is_read() -> None:
    base = torch.arange(6.0)
    reads, ignores = make_traced(lambda x: x + x.storage_offset()), make_traced(lambda x: x + 1)
    for offset in (0, 2, 0, 2):
        x = base[offset : offset + 2]
        assert torch.equal(reads(x), x + offset)
        assert torch.equal(ignores(x), x + 1)
    assert (traces(reads), traces(ignores)) == (2, 1)


# Modules ------------------------------------------------------------------------------------------------


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), nn.Dropout(0.5)), nn.Linear(3, 3)).eval()


def forward_hook(module: nn.Module) -> Any:
    return module.register_forward_hook(lambda m, args, out: out * 2)


def forward_pre_hook(module: nn.Module) -> Any:
    return module.register_forward_pre_hook(lambda m, args: (args[0] + 1,))


def hook_with_keywords(module: nn.Module) -> Any:
    return module.register_forward_hook(lambda m, args, kwargs, out: out * 3, with_kwargs=True)


def global_hook(module: nn.Module) -> Any:
    return nn.modules.module.register_module_forward_hook(
        lambda m, args, out: out + 1 if isinstance(m, nn.Linear) else None
    )


@pytest.mark.parametrize("register", [forward_hook, forward_pre_hook, hook_with_keywords, global_hook])
@pytest.mark.parametrize("path", ["", "1.0"], ids=["root", "child"])
@torch.no_grad()
def test_hooks_added_and_removed(register: Callable[[nn.Module], Any], path: str) -> None:
    module = net()
    traced = make_traced(module)
    without = module(X)
    assert torch.equal(traced(X), without)
    handle = register(module.get_submodule(path))
    try:
        hooked = module(X)
        assert not torch.equal(hooked, without)
        for _ in range(2):
            assert torch.equal(traced(X), hooked)
        assert traces(traced) == 2
    finally:
        handle.remove()
    for _ in range(2):
        assert torch.equal(traced(X), without)
    assert traces(traced) == 2


@torch.no_grad()
def test_hooks_of_other_modules_do_not_retrace() -> None:
    traced = make_traced(net())
    for _ in range(3):
        traced(X)
        forward_hook(nn.ReLU())
    assert traces(traced) == 1


def replace_child(module: nn.Sequential) -> None:
    module[1][0] = nn.Tanh()


def replace_by_the_same_kind(module: nn.Sequential) -> None:
    module[0] = nn.Linear(3, 3)


def append_child(module: nn.Sequential) -> None:
    module.append(nn.Sigmoid())


def delete_child(module: nn.Sequential) -> None:
    del module[2]


def remove_bias(module: nn.Sequential) -> None:
    module[0].bias = None


def train_child(module: nn.Sequential) -> None:
    module[0].train()


def replace_forward(module: nn.Sequential) -> None:
    module[1].forward = lambda x: x * 7


def dropout_rate(module: nn.Sequential) -> None:
    module[1][1].train()
    module[1][1].p = 0.0


EDITS = [
    replace_child, replace_by_the_same_kind, append_child, delete_child, remove_bias, train_child, replace_forward,
    dropout_rate,
]  # fmt: skip


@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.__name__)
@torch.no_grad()
def test_edited_module(edit: Callable[[Any], None]) -> None:
    module = net()
    traced = make_traced(module)
    traced(X)
    edit(module)
    for _ in range(2):
        assert torch.equal(traced(X), module(X))
    assert traces(traced) == 2


@torch.no_grad()
def test_tied_weights_that_are_untied_and_tied_again() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    shared = module[0].weight
    module[1].weight = shared
    traced = make_traced(module)
    assert torch.equal(traced(X), module(X))
    assert sum(i.label.endswith("weight") for i in traced.trace(X).inputs) == 1
    module[1].weight = nn.Parameter(torch.eye(3))
    assert torch.equal(traced(X), module(X))
    module[1].weight = shared
    assert torch.equal(traced(X), module(X))
    assert traced.cache_info()[:3] == (1, 2, 2)


@torch.no_grad()
def test_untied_parameters_that_become_tied() -> None:
    module = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    traced = make_traced(lambda x: (module[0].weight.add_(1), module(x))[1])
    traced(X)
    module[1].weight = module[0].weight
    before = module[0].weight.clone()
    out = traced(X)
    assert torch.equal(module[0].weight, before + 1)
    assert torch.equal(out, module(X))


# Global state -------------------------------------------------------------------------------------------


@contextmanager
def setting(get: Callable[[], Any], put: Callable[[Any], None], value: Any) -> Iterator[None]:
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


def matmul(x: Tensor) -> tuple[Tensor, Tensor, bool]:
    return x @ x.t(), torch.ones(2) * 0.5, torch.is_grad_enabled()


STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "no_grad": torch.no_grad,
    "inference_mode": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu"),
    "autocast to half": lambda: torch.autocast("cpu", dtype=torch.float16),
    "default dtype": lambda: setting(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "device context": lambda: torch.device("meta"),
    "default device": lambda: setting(lambda: None, torch.set_default_device, "meta"),
    "deterministic": lambda: setting(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
    "matmul precision": lambda: setting(
        torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "medium"
    ),
    "threads": lambda: setting(torch.get_num_threads, torch.set_num_threads, torch.get_num_threads() + 1),
}


@pytest.mark.parametrize("state", STATES.values(), ids=STATES)
def test_global_state(state: Callable[[], AbstractContextManager[Any]]) -> None:
    traced = make_traced(matmul)
    x = torch.randn(2, 3)
    for _ in range(2):
        for around in (lambda: torch.enable_grad(), state):
            with around():
                out, expected = traced(x), matmul(x)
                assert [(t.dtype, t.device, t.is_inference()) for t in out[:2]] == [
                    (t.dtype, t.device, t.is_inference()) for t in expected[:2]
                ]
                assert out[2] == expected[2]
                assert out[1].device.type == "meta" or torch.equal(out[0], expected[0])
    assert traced.cache_info()[:3] == (2, 2, 2)


def test_default_device_that_is_set_to_another_one() -> None:
    traced = make_traced(lambda: torch.ones(2))
    for device in ("cpu", "meta", "cpu", "meta"):
        with torch.device(device):
            assert traced().device.type == device
    assert traced.cache_info()[:3] == (2, 2, 2)
