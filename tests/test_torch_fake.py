"""Metadata that are asked for without the mode of fake tensors are what the mode gives, also where they come again."""

from contextlib import suppress
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.testing._internal.common_methods_invocations import op_db

from primexec import _torch, _torch_fake

PRIMS, ATEN = torch.ops.prims, torch.ops.aten


def _described(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return tuple(map(_described, value))
    if not isinstance(value, Tensor):
        return value, None, 0
    where = value.untyped_storage()._cdata, value.storage_offset()
    return value.shape, value.stride(), value.dtype, value.device, type(value), where


def results(op: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """What is given the first time, again, and by the mode; memory is told apart where it is an argument's."""
    old = {t.untyped_storage()._cdata for t in _torch.pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)}

    def without_new(value: Any) -> Any:
        if isinstance(value, tuple) and value and not isinstance(value[0], torch.Size):
            return tuple(map(without_new, value))
        *layout, (storage, offset) = value
        return *layout, storage if storage in old else None, offset

    first, again = (_torch_fake.run(op, args, kwargs) for _ in range(2))
    return [without_new(_described(run)) for run in (first, again, op(*args, **kwargs))]


def assert_as_the_mode(op: Any, *args: Any, **kwargs: Any) -> None:
    first, again, by_mode = results(op, *args, **kwargs)
    assert first == again == by_mode


LAYOUTS = {
    "plain": lambda: torch.empty(2, 4, 6),
    "transposed": lambda: torch.empty(6, 4, 2).permute(2, 1, 0),
    "every other": lambda: torch.empty(2, 4, 12)[..., ::2],
    "from the middle": lambda: torch.empty(4, 4, 6)[1:3],
    "expanded": lambda: torch.empty(2, 1, 6).expand(2, 4, 6),
    "empty": lambda: torch.empty(2, 0, 6),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prims(layout: str) -> None:
    with _torch_fake.fake_mode(cached=False), torch.no_grad():
        x = LAYOUTS[layout]()
        y = torch.empty(x.shape)
        assert_as_the_mode(PRIMS.add.default, x, y)
        assert_as_the_mode(PRIMS.add.default, x, 2.0)
        assert_as_the_mode(PRIMS.eq.default, x, y)
        assert_as_the_mode(PRIMS.where.default, x > 0, x, y)
        assert_as_the_mode(PRIMS.where.default, x > 0, torch.empty(()), x)
        assert_as_the_mode(PRIMS.add.default, torch.empty(()), x)
        assert_as_the_mode(PRIMS.exp.default, x)
        assert_as_the_mode(PRIMS.convert_element_type.default, x, torch.float64)
        assert_as_the_mode(PRIMS.sum.default, x, [0, 2])
        assert_as_the_mode(PRIMS.transpose.default, x, [2, 0, 1])
        assert_as_the_mode(PRIMS.broadcast_in_dim.default, x, [3, *x.shape], [1, 2, 3])
        assert_as_the_mode(PRIMS.cat.default, [x, y], 1)
        assert_as_the_mode(PRIMS.clone.default, x)
        assert_as_the_mode(PRIMS.view_of.default, x)
        assert_as_the_mode(PRIMS.copy_to.default, y, x)
        assert_as_the_mode(PRIMS.full_like.default, x, 3, dtype=x.dtype, device=x.device, requires_grad=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("training", [True, False])
def test_batch_norm(dtype: torch.dtype, training: bool) -> None:
    for layout in (torch.contiguous_format, torch.channels_last):
        with _torch_fake.fake_mode(), torch.no_grad():
            x = torch.empty(2, 4, 6, 6, dtype=dtype).to(memory_format=layout)
            scale, running = torch.empty(4, dtype=dtype), torch.empty(4, dtype=torch.float32)
            for given in (x, x[:, ::2], x[..., :3]):
                size = given.shape[1]
                stats = scale[:size], None, running[:size], running[:size]
                assert_as_the_mode(ATEN.native_batch_norm.default, given, *stats, training, 0.1, 1e-5)


class Compared(_torch.TorchDispatchMode):  # type: ignore[misc]
    """Compares each operator that is called with fake tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.compared, self.different = 0, list[Any]()

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        tensors = [t for t in _torch.pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not op._schema.is_mutable and tensors and all(t.numel() for t in tensors):
            first, again, by_mode = results(op, *args, **(kwargs or {}))
            self.compared += 1
            if not first == again == by_mode:
                self.different.append((op, first, again, by_mode))
        return op(*args, **(kwargs or {}))


@pytest.mark.parametrize("part", range(4))
def test_operators(part: int) -> None:
    compared = Compared()
    for entry in op_db[part::4]:
        if torch.float32 not in entry.dtypes or "sparse" in entry.name:
            continue
        sample = next(iter(entry.sample_inputs_func(entry, "cpu", torch.float32, requires_grad=False)))
        with _torch_fake.fake_mode() as mode, torch.no_grad():
            given = _torch.pytree.tree_map_only(Tensor, mode.from_tensor, (sample.input, sample.args, sample.kwargs))
            with compared, suppress(Exception):  # some operators have no metadata without values
                entry(given[0], *given[1], **given[2])
    assert compared.compared > 100
    assert compared.different == []


def test_view_of_nothing_has_strides_of_eager() -> None:
    with _torch_fake.fake_mode():
        x = torch.empty(0, 5, 5)
    args = x.transpose(1, 2), [0, 5, 5]
    assert _torch_fake.run(ATEN.view.default, args, {}).stride() == torch.empty(0, 5, 5).mT.view(0, 5, 5).stride()


def test_what_makes_results_differ_tells_them_apart() -> None:
    with _torch_fake.fake_mode(), torch.no_grad():
        x = torch.empty(4, dtype=torch.int64)
        for number in (1, 1.0, True, 1):
            assert_as_the_mode(ATEN.add.Tensor, x, number)
        old = torch.get_default_dtype()
        try:
            for dtype in (torch.float32, torch.float64):
                torch.set_default_dtype(dtype)
                assert_as_the_mode(ATEN.div.Tensor, x, 2)
        finally:
            torch.set_default_dtype(old)
        for sizes in ([2, 2], [4, 1]):
            assert_as_the_mode(ATEN.new_zeros.default, x, sizes)
            assert_as_the_mode(ATEN._unsafe_view.default, x, sizes)
