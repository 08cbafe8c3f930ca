"""Targets, the text builder and the engine: code for every target, code in memory for the host's."""

import ctypes
import gc
import math
import threading

import pytest

from primexec.errors import ExecutorError
from primexec.executors.llvm import engine
from primexec.executors.llvm.emit import Emitter, ModuleText, Value, literal, unlikely
from primexec.executors.llvm.target import NAMED, X86_64, X86_64_AVX2, Target, host

SCALE = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int64)


def scale_module(target: Target) -> str:
    """`void @scale(ptr, i64 n)`: x[i] = x[i] * 2 + 1 for n a multiple of the lanes."""
    module, lanes = ModuleText(target), target.lanes("f32")
    e = Emitter(module)

    def body(i: str, _: list[str]) -> list[str]:
        place = e.emit(f"getelementptr float, ptr %x, i64 {i}")
        x = Value(e, "f32", lanes, e.emit(f"load <{lanes} x float>, ptr {place}, align 4"))
        e.do(f"store {x.type} {(x.fma(2.0, 1.0)).name}, ptr {place}, align 4")
        return []

    e.loop("0", "%n", lanes, body)
    e.do("ret void")
    e.function("void @scale(ptr %x, i64 %n)")
    return module.text()


@pytest.mark.parametrize("target", NAMED.values(), ids=NAMED)
def test_objects_for_every_target(target: Target) -> None:
    text = scale_module(target)
    engine.verify(text)
    machine = {"x86_64": 62, "aarch64": 183}[target.triple.partition("-")[0]]
    data = engine.emit_object(text, target)
    assert data[:4] == b"\x7fELF"
    assert int.from_bytes(data[18:20], "little") == machine


def test_assembly_uses_the_target_features() -> None:
    assert "vfmadd" in engine.assembly(scale_module(X86_64_AVX2), X86_64_AVX2)
    assert "ymm" not in engine.assembly(scale_module(X86_64), X86_64)
    assert "fmla" in engine.assembly(scale_module(NAMED["aarch64"]), NAMED["aarch64"])
    assert "zmm" in engine.assembly(scale_module(NAMED["x86-64-avx512"]), NAMED["x86-64-avx512"])


def test_the_host_runs_it() -> None:
    module = engine.compile_module(scale_module(host()))
    values = (ctypes.c_float * 32)(*range(32))
    SCALE(module.address("scale"))(ctypes.addressof(values), 32)
    assert list(values) == [2.0 * i + 1 for i in range(32)]
    again = engine.load_object(module.object_bytes, ["scale"])
    del module
    gc.collect()
    SCALE(again.address("scale"))(ctypes.addressof(values), 32)
    assert values[1] == 7.0


def test_a_malformed_module_shows_its_lines() -> None:
    text = "define void @f() {\nentry:\n  %a = fadd float 1.0, %b\n  ret void\n}\n"
    with pytest.raises(ExecutorError, match=r"use of undefined value '%b'(.|\n)*>     3    %a = fadd"):
        engine.compile_module(text)


def test_an_unknown_symbol_is_an_error(capfd: pytest.CaptureFixture[str]) -> None:
    text = "declare void @primexec_nowhere()\ndefine void @f() {\n  call void @primexec_nowhere()\n  ret void\n}\n"
    with pytest.raises(ExecutorError, match="cannot load compiled kernels"):
        engine.compile_module(text)
    assert "primexec_nowhere" in capfd.readouterr().err


def test_symbols_are_given_by_address() -> None:
    called: list[int] = []
    callback = ctypes.CFUNCTYPE(None)(lambda: called.append(1))
    text = "declare void @hook()\ndefine void @f() {\n  call void @hook()\n  ret void\n}\n"
    module = engine.compile_module(text, symbols={"hook": ctypes.cast(callback, ctypes.c_void_p).value or 0})
    ctypes.CFUNCTYPE(None)(module.address("f"))()
    assert called == [1]


def test_threads_compile_side_by_side() -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(5):
                engine.compile_module(scale_module(host()))
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failures == []


def test_constants_are_exact() -> None:
    assert literal("f64", math.pi) == "0x400921FB54442D18"
    assert literal("f32", math.pi) == "0x400921FB60000000"
    assert literal("f32", 1e300) == literal("f32", math.inf) == "0x7FF0000000000000"
    assert literal("f32", -0.0) == "0x8000000000000000"
    with pytest.raises(ValueError, match="bf16"):
        literal("bf16", 1.0)


def test_the_rare_path_merges_lane_by_lane() -> None:
    module = ModuleText(host())
    e = Emitter(module)
    x = Value(e, "f32", 4, e.emit("load <4 x float>, ptr %x, align 4"))
    y = unlikely(x.compare("ogt", 2.0), x + 10.0, lambda: -x)
    e.do(f"store {y.type} {y.name}, ptr %x, align 4")
    e.do("ret void")
    e.function("void @f(ptr %x, i64 %n)")
    values = (ctypes.c_float * 4)(1, 2, 3, 4)
    loaded = engine.compile_module(module.text())
    SCALE(loaded.address("f"))(ctypes.addressof(values), 0)
    assert list(values) == [11.0, 12.0, -3.0, -4.0]
