"""Modules as Python state: imports inside of traced functions, and modules that are named like a library's."""

import importlib
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from primexec import CaptureError, make_traced
from tests.isolated import python

X = torch.arange(6.0).reshape(2, 3)
NUMBER = 2.0
IMPORTED: Any = types.ModuleType("imported_inside")
sys.modules["imported_inside"] = IMPORTED


@pytest.fixture(autouse=True)
def two() -> None:
    global NUMBER
    IMPORTED.k = NUMBER = 2.0


def by_import(x: Tensor) -> Any:
    import imported_inside as module  # type: ignore[import-not-found]

    return x * module.k


def by_from(x: Tensor) -> Any:
    from imported_inside import k as factor

    return x * factor


def by_name(x: Tensor) -> Any:
    return x * importlib.import_module("imported_inside").k


def by_builtin(x: Tensor) -> Any:
    return x * __import__("imported_inside").k


def by_table(x: Tensor) -> Any:
    return x * sys.modules["imported_inside"].k


@pytest.mark.parametrize("f", [by_import, by_from, by_name, by_builtin, by_table])
def test_what_is_read_from_an_import(f: Callable[[Tensor], Any], monkeypatch: pytest.MonkeyPatch) -> None:
    traced = make_traced(f)
    for k in (2.0, 3.0):
        IMPORTED.k = k
        for _ in range(2):
            assert torch.equal(traced(X), X * k)
    other: Any = types.ModuleType("imported_inside")
    other.k = 4.0
    monkeypatch.setitem(sys.modules, "imported_inside", other)
    assert torch.equal(traced(X), X * 4)
    assert traced.cache_info().traces == 3


def test_what_is_read_from_the_own_module() -> None:
    global NUMBER
    traced = make_traced(lambda x: x * sys.modules[__name__].NUMBER)
    assert torch.equal(traced(X), X * 2)
    NUMBER = 3.0
    assert torch.equal(traced(X), X * 3)


def test_an_effect_on_an_imported_module_is_refused() -> None:
    def f(x: Tensor) -> Tensor:
        import imported_inside

        imported_inside.k = f"{imported_inside.k} and more"
        return x

    with pytest.raises(CaptureError, match=r"changes imported_inside\.k"):
        make_traced(f)(X)
    assert IMPORTED.k == 2


def test_a_module_that_is_imported_first_in_a_trace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def f(x: Tensor) -> Any:
        import imported_first  # type: ignore[import-not-found]

        return x * imported_first.WEIGHT * imported_first.k

    (tmp_path / "imported_first.py").write_text("import torch\nWEIGHT = torch.full((3,), 2.0)\nk = 1.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    traced = make_traced(f)
    for _ in range(2):
        assert torch.equal(traced(X), X * 2)
    assert traced.cache_info().traces == 1
    module = sys.modules.pop("imported_first")
    assert type(module.WEIGHT) is Tensor
    monkeypatch.setitem(sys.modules, "imported_first", module)
    module.k = 3.0
    assert torch.equal(traced(X), X * 6)


def test_a_module_that_is_not_there() -> None:
    def f(x: Tensor) -> Tensor:
        try:
            import not_there  # type: ignore[import-not-found]  # noqa: F401
        except ImportError:
            return x * 2
        return x

    assert torch.equal(make_traced(f)(X), X * 2)


USER = """
SCALE = 2.0

class Holder:
    scale = 2.0

holder = Holder()

def of_global(x):
    return x * SCALE

def of_object(x):
    return x * holder.scale
"""


@pytest.mark.parametrize("file", ["numpy/of_user.py", "sympy/of_user.py", "profile.py", "queue.py"])
def test_names_of_libraries(file: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's folder, or a module, may be named like a library's."""
    path = tmp_path / file
    path.parent.mkdir(exist_ok=True)
    path.write_text(USER)
    make_traced(by_import)(X)  # torch imports what it needs
    monkeypatch.delitem(sys.modules, path.stem, raising=False)
    monkeypatch.syspath_prepend(path.parent)
    module = importlib.import_module(path.stem)
    monkeypatch.setitem(sys.modules, path.stem, module)  # and is taken out again
    of_global, of_object = make_traced(module.of_global), make_traced(module.of_object)
    assert torch.equal(of_global(X), X * 2)
    assert torch.equal(of_object(X), X * 2)
    module.SCALE = module.holder.scale = 3.0
    assert torch.equal(of_global(X), X * 3)
    assert torch.equal(of_object(X), X * 3)


def test_packages_that_torch_imports_meanwhile_stay_whole() -> None:
    done = python("""
import torch
from primexec import make_traced
make_traced(lambda x: x[x > 0].sin(), executor="aten")(torch.ones(9))
import networkx
networkx.DiGraph().add_nodes_from((1, 2))
""")
    assert (done.stdout, done.stderr) == ("", "")
