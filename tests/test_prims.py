"""The table of prims: closed, resolvable, documented."""

from pathlib import Path

import pytest
import torch

from primexec import prims
from primexec.prims import TABLE, Prim
from primexec.prims.__main__ import page

ROOT = Path(__file__).parents[1]
LOCAL = [row for row in TABLE.values() if not row.op.startswith("_c10d_functional")]


def test_table_is_small() -> None:
    assert 150 <= len(TABLE) <= 190
    assert len({id(row) for row in TABLE.values()}) == sum(len(family.ROWS) for family in prims.FAMILIES)
    assert {name: row.op for name, row in TABLE.items()} == {name: name for name in TABLE}


@pytest.mark.parametrize("row", LOCAL, ids=lambda row: row.op)
def test_row_agrees_with_torch(row: Prim) -> None:
    op = row.operator
    assert prims.lookup(op) is row
    assert (torch.Tag.nondeterministic_seeded in op.tags) == (row.effects == "random")
    assert op._schema.is_mutable == (row.effects == "writes" or (row.name == "as_strided" and op.namespace == "prims"))
    aliases = any(r.alias_info is not None and not r.alias_info.is_write for r in op._schema.returns)
    assert aliases == row.view
    assert (row.recompute == "free") == row.view
    assert all(getattr(torch, name).__class__ is torch.dtype for name in row.dtypes.split())
    assert row.meaning.endswith(".")


def test_other_operators_are_no_prims() -> None:
    assert not prims.is_prim(torch.ops.aten.softmax.int)
    assert not prims.is_prim(torch.ops.aten.add.Tensor)
    assert not prims.is_prim(torch.add)


def test_page_is_current() -> None:
    assert (ROOT / "docs" / "prims.md").read_text() == page(), "run `make docs/prims.md`"
