"""The registry of executors: how they are found, loaded and refused."""

from importlib.metadata import EntryPoint

import pytest
import torch
from torch import Tensor

import primexec
from primexec import ExecutorError, make_traced
from primexec.executors import registry
from primexec.executors.base import PROTOCOL_VERSION, Executor
from tests.toy import MODULE, Other, Toy, broken, install

X = torch.arange(6.0).reshape(2, 3)
Y = X + 1


def mixed(x: Tensor, y: Tensor) -> Tensor:
    return (x + y).exp() * x


class RaisesWhenMade(Toy):
    def __init__(self) -> None:
        raise OSError("no such device")


UNUSABLE: dict[str, tuple[type, str]] = {
    "version": (
        broken(protocol_version=PROTOCOL_VERSION + 1),
        "speaks version 2 of the protocol, this primexec version 1",
    ),
    "no compile": (broken(compile=None), r"'toy' \(toy_executors:toy\) lacks compile$"),
    "no parameters": (broken(parameters=None, fingerprint=None), "lacks parameters, fingerprint$"),
    "raises": (RaisesWhenMade, r"'toy' \(toy_executors:toy\) cannot be loaded: no such device"),
}


@pytest.mark.parametrize(("kind", "message"), UNUSABLE.values(), ids=UNUSABLE)
def test_unusable_executor(monkeypatch: pytest.MonkeyPatch, kind: type, message: str) -> None:
    install(monkeypatch, toy=kind, other=Other)
    for use in (
        lambda: make_traced(mixed, executor="toy"),
        lambda: make_traced(mixed)(X, Y, executor=["other", "toy"]),
    ):
        with pytest.raises(ExecutorError, match=message):
            use()
    assert torch.equal(make_traced(mixed)(X, Y), mixed(X, Y))
    report = primexec.executors()
    unusable = {"aten": False, "numpy": False, "llvm": False, "toy": True, "other": False}
    assert {name: bool(reason) for name, reason in report.items()} == unusable
    assert message.strip("$").split("lacks")[-1].split("cannot")[-1].strip() in report["toy"]


MISSING: dict[str, tuple[str, str]] = {
    "module": ("no_such_module_of_executors:Toy", "No module named 'no_such_module_of_executors'"),
    "attribute": (f"{MODULE}:Nothing", "has no attribute 'Nothing'"),
}


@pytest.mark.parametrize(("value", "message"), MISSING.values(), ids=MISSING)
def test_executor_that_cannot_be_imported(monkeypatch: pytest.MonkeyPatch, value: str, message: str) -> None:
    install(monkeypatch, EntryPoint("absent", value, registry.GROUP))
    with pytest.raises(ExecutorError, match=r"'absent' .* cannot be loaded") as failed:
        make_traced(mixed, executor="absent")
    assert message in str(failed.value)
    assert message in str(primexec.executors())


def test_two_executors_of_one_name(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, EntryPoint("toy", "elsewhere:Toy", registry.GROUP), toy=Toy)
    with pytest.raises(ExecutorError, match=r"two executors .* 'toy': toy_executors:toy and elsewhere:Toy"):
        make_traced(mixed, executor="toy")


def test_nobody_replaces_aten(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, EntryPoint("aten", f"{MODULE}:toy", registry.GROUP), toy=Toy)
    with pytest.raises(ExecutorError, match="two executors are named 'aten'"):
        make_traced(mixed)


def test_the_same_entry_point_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as a package that is installed twice on the path."""
    install(monkeypatch, EntryPoint("toy", f"{MODULE}:toy", registry.GROUP), toy=Toy)
    assert torch.equal(make_traced(mixed, executor="toy")(X, Y), mixed(X, Y))


def test_unknown_executor_names_those_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, toy=Toy)
    with pytest.raises(ValueError, match="unexpected") as unknown:
        make_traced(mixed, executor="tow")
    assert (
        str(unknown.value)
        == "Received unexpected value for 'executor': tow. Allowed values are: aten, numpy, llvm, toy."
    )


def test_code_is_loaded_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Lazy(Toy):
        def __init__(self) -> None:
            super().__init__()
            made.append("lazy")

    install(monkeypatch, lazy=Lazy)
    make_traced(mixed)(X, Y)
    assert made == []
    for _ in range(2):
        make_traced(mixed, executor="lazy")
    assert made == ["lazy"]


def test_report_of_executors(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, toy=Toy, broken=RaisesWhenMade)
    report = primexec.executors()
    assert list(report) == ["aten", "numpy", "llvm", "toy", "broken"]
    assert len(report) == 5
    assert report["toy"] == ""
    lines = str(report).splitlines()
    assert lines[:4] == ["aten    available", "numpy   available", "llvm    available", "toy     available"]
    assert "no such device" in lines[4]
    assert repr(report) == str(report)


def test_toy_follows_the_protocol() -> None:
    assert isinstance(Toy(), Executor)
    assert isinstance(registry.load("aten"), Executor)
