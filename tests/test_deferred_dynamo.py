"""Dynamo is imported when somebody asks for it, never by a traced call alone, and then it is whole."""

import threading

import pytest
import torch

from primexec._torch_dynamo import capture_lock
from primexec.lookups import stand_ins
from tests.isolated import python

_TRACED = """
import sys, threading, torch, primexec
x = torch.linspace(-1, 1, 6)
traced = primexec.make_traced(lambda x: (x * 2).relu(), executor=("llvm", "aten"))
assert torch.equal(traced(x), (x * 2).relu())
weight = torch.nn.Parameter(x.clone())
weight.grad = torch.ones(6)
trained = primexec.make_traced(lambda x: (x * weight).sum(), executor=("llvm", "aten"))
trained(x[:]).backward()
assert torch.equal(weight.grad, x + 1)
"""
_COMPILED = """
compiled = torch.compile(lambda x: getattr(x, "sin")().relu(), backend="eager", fullgraph=True)
assert torch.allclose(compiled(x), x.sin().relu())
"""


def _prints(code: str) -> str:
    done = python(code)
    assert done.stderr == ""
    return done.stdout


def test_a_traced_call_does_without() -> None:
    assert _prints(f"{_TRACED}\nprint(sorted(name for name in sys.modules if name.startswith('torch._dynamo')))") == (
        "['torch._dynamo', 'torch._dynamo.config', 'torch._dynamo.source']\n"
    )


def test_it_is_whole_when_asked_for() -> None:
    assert (
        _prints(f"""{_TRACED}
settings = torch._dynamo.config
settings.recompile_limit = 5
assert "torch._dynamo.utils" not in sys.modules
from torch._dynamo import disable, eval_frame
from torch._dynamo.source import AttrSource, ConstantSource, RandomValueSource
print(torch._dynamo.config is settings, settings.recompile_limit, disable.__module__, isinstance(3, RandomValueSource))
print(AttrSource(ConstantSource("a"), "b").name, type(torch._dynamo).__name__, len(torch._dynamo.__path__))
{_COMPILED}
assert torch.equal(traced(x[:5]), (x[:5] * 2).relu())
print(traced.cache_info().misses)
""")
        == "True 5 torch._dynamo.decorators False\na.b module 1\n2\n"
    )


@pytest.mark.parametrize("part", ["utils", "decorators", "variables", "eval_frame"])
def test_a_part_of_it_is_imported_first(part: str) -> None:
    assert (
        _prints(f"""{_TRACED}
import importlib
executed = []
real = importlib.machinery.SourceFileLoader.exec_module
def exec_module(self, module):
    executed.append(module.__name__)
    real(self, module)
importlib.machinery.SourceFileLoader.exec_module = exec_module
part = importlib.import_module("torch._dynamo.{part}")
print(part.__name__, part is torch._dynamo.{part}, part.__spec__.name, len(executed) - len(set(executed)))
{_COMPILED}
""")
        == f"torch._dynamo.{part} True torch._dynamo.{part} 0\n"
    )


def test_a_traced_function_asks_for_it() -> None:
    assert _prints(f"""{_TRACED}
def fn(x):
    return x + len(torch._dynamo.list_backends(None))
asks = primexec.make_traced(fn, executor=("llvm", "aten"))
assert torch.equal(asks(x), fn(x))
from torch._dynamo.trace_rules import lookup
print(lookup(getattr).__name__, lookup(torch.overrides.has_torch_function).__name__)
{_COMPILED}
""") == _prints("""
import torch, torch._dynamo
from torch._dynamo.trace_rules import lookup
print(lookup(getattr).__name__, lookup(torch.overrides.has_torch_function).__name__)
""")


def test_another_thread_compiles_meanwhile() -> None:
    x, results = torch.linspace(-1, 1, 6), []
    compiled = torch.compile(lambda x: x.sin() * 2, backend="eager", fullgraph=True)
    thread = threading.Thread(target=lambda: results.append(compiled(x)))

    class Asked:
        def ask(self, name: str, asks: bool) -> bool:
            return True

    asked = Asked()
    places = stand_ins(asked.ask)
    with capture_lock():
        places.start()
        thread.start()
        thread.join(0.5)
        places.stop()
    thread.join()
    torch.testing.assert_close(results, [x.sin() * 2])


def test_nothing_keeps_what_stood_there_before() -> None:
    assert (
        _prints(f"""{_TRACED}
before = [*vars(torch._dynamo.source).values(), vars(torch._dynamo)["disable"]]
kept = [value for value in before if getattr(value, "__module__", "") == "primexec._torch_dynamo"]
import torch._dynamo.utils
parts = [vars(module) for name, module in sys.modules.items() if name.startswith("torch._dynamo")]
print(bool(kept), [name for part in parts for name, value in part.items() if any(value is k for k in kept)])
""")
        == "True []\n"
    )


def test_what_users_disable_is_not_compiled() -> None:
    assert (
        _prints(f"""{_TRACED}
assert "torch._dynamo.utils" not in sys.modules
kept = torch._dynamo.disable(lambda x: x + torch.compiler.is_compiling())
compiled = torch.compile(lambda x: kept(x * 2), backend="eager")
print(torch.equal(compiled(x), x * 2), kept._torchdynamo_disable)
""")
        == "True True\n"
    )
