"""Draws of 0 or 1, as dropout makes them, from PyTorch's generator for CPUs: its numbers and its state, in vectors.

The generator is the Mersenne Twister of Matsumoto and Nishimura (ACM Transactions on Modeling and Computer Simulation
8, 1998). PyTorch asks it for one number at a time, which took 7 ns an element (AMD Zen 3). Where PyTorch draws with
MKL, on the processors of Intel, other numbers are due: `is_pytorchs` finds that out.
"""

from __future__ import annotations

import ctypes
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx

from primexec.executors.llvm import engine
from primexec.executors.llvm.emit import Emitter, ModuleText, Value, type_of
from primexec.executors.llvm.instructions import splat
from primexec.executors.llvm.target import Target, host
from primexec.passes.instead import Call

SMALLEST = 1 << 13  # elements; below, the call costs more than it saves
LANES, LINE = 8, 16  # words of a vector, and of a line of the cache

WORDS, MIDDLE = 624, 397
MATRIX, UPPER, LOWER = 0x9908B0DF - (1 << 32), -(1 << 31), (1 << 31) - 1
MASK_B, MASK_C = 0x9D2C5680 - (1 << 32), 0xEFC60000 - (1 << 32)
LEFT, NEXT, STATE = 8, 16, 24  # where the bytes of a generator's state hold what is left, the next word, and the words
DIGITS = 53  # bits of a number between 0 and 1: 21 of one word and all of the next
INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
DTYPES = torch.bool, torch.float32, torch.float64, torch.bfloat16, torch.float16

_LIBRARY = torch.library.Library("primexec", "FRAGMENT")
_LIBRARY.define(
    "bernoulli(int[] size, float p, float one, ScalarType dtype, Tensor? after) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)
torch.library.register_fake(
    "primexec::bernoulli", lambda size, p, one, dtype, after: torch.empty(size, dtype=dtype), lib=_LIBRARY
)


def _bernoulli(size: Sequence[int], p: float, one: float, dtype: torch.dtype, after: Tensor | None) -> Tensor:
    made = torch.empty(size, dtype=dtype)
    fill(made, p, torch.default_generator, one)
    return made


_LIBRARY.impl("bernoulli", _bernoulli, "CompositeExplicitAutograd")


def instead(node: fx.Node) -> Call | None:
    """What draws 0 or 1 with one probability, and divides by a number if that follows; None where there is nothing.

    Draws that are kept for a backward pass depend on nothing: all of them can come first. Others come after what the
    program computed them for, so that few are there at once.
    """
    value = node.meta["val"] if node.target is torch.ops.aten.bernoulli.p and not node.kwargs else None
    if value is None or not all(type(n) is int for n in value.shape) or value.numel() < SMALLEST:
        return None
    like, p = node.args
    fits = value.device.type == "cpu" and value.dtype in DTYPES and value.is_contiguous() and type(p) is float
    if not fits or not is_pytorchs():
        return None
    last, one = node, 1.0
    if list(node.users) == [node.next] and node.next.target is torch.ops.aten.div.Scalar:
        divisor: Any = node.next.args[1]
        if divisor > 0 and node.next.meta["val"].dtype == value.dtype:
            last, one = node.next, torch.ones((), dtype=value.dtype).div(divisor).item()
    after = None if _is_kept(last) else like
    return Call(last, torch.ops.primexec.bernoulli.default, (tuple(value.shape), p, one, value.dtype, after))


def _is_kept(drawn: fx.Node) -> bool:
    """Whether a draw, or what is made of nothing else, is returned or used in a backward pass inside of the program."""
    users = list(drawn.users)
    if any(u.op == "output" or u.meta.get("in_backward") for u in users):
        return True
    return any(_is_kept(u) for u in users if u.all_input_nodes == [drawn])


def fill(t: Tensor, p: float, generator: torch.Generator, one: float = 1.0) -> None:
    """Draws each element of a contiguous tensor that has any: a number with probability p, else 0."""
    state = generator.get_state()
    limit, bits = math.ceil(p * 2.0**DIGITS), _bits(one, t.dtype)
    _function(t.dtype.itemsize)(state.data_ptr(), t.data_ptr(), t.numel(), limit, bits)
    generator.set_state(state)


@cache
def _bits(number: float, dtype: torch.dtype) -> int:
    return int(torch.tensor(number, dtype=dtype).view(INTEGERS[dtype.itemsize]))


@cache
def is_pytorchs() -> bool:
    """Whether PyTorch draws the same numbers, and leaves the same state."""
    ours, theirs = (torch.Generator().manual_seed(5) for _ in range(2))
    for count in (1, 700, 2000):
        made, wanted = torch.empty(count), torch.empty(count).bernoulli_(0.7, generator=theirs)
        fill(made, 0.7, ours)
        if not (torch.equal(made, wanted) and torch.equal(ours.get_state(), theirs.get_state())):
            return False
        for generator in (ours, theirs):
            torch.rand(1, generator=generator)  # one word: the next pair begins at the other parity
    return True


@cache
def _function(itemsize: int) -> Callable[..., None]:
    """Called with the addresses of a state and of a result, its elements, a limit in the last digits, and bits."""
    module = engine.compile_module(text(host(), itemsize))
    # The interpreter's lock is kept, so that no other thread draws the same numbers.
    function = ctypes.PYFUNCTYPE(None, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3)(module.address("bernoulli"))
    held = function, module
    return lambda *arguments: held[0](*arguments)


def text(target: Target, itemsize: int) -> str:
    """The module of a function that draws elements of so many bytes."""
    module = ModuleText(target)
    _Twister(module).write(f"i{8 * itemsize}")
    return module.text()


class _Twister(Emitter):
    """A function over 32-bit words. Before those of the generator stands the last one of the block before."""

    def write(self, element: str) -> None:
        before = self.emit(f"alloca [{WORDS + LINE} x i32], align {4 * LINE}")
        self.words = self.emit(f"getelementptr i32, ptr {before}, i64 {LINE}")
        limit = Value(self, "i64", 1, "%limit")
        one = Value(self, "i64", 1, "%one")
        one = one if element == "i64" else one.cast("trunc", element)
        self.choices = {lanes: (splat(limit, lanes), splat(one, lanes)) for lanes in (1, LANES)}
        held = self.emit(f"getelementptr i8, ptr %state, i64 {STATE}")
        left, following = (self.emit(f"getelementptr i8, ptr %state, i64 {n}") for n in (LEFT, NEXT))

        def take(i: str, _: list[str]) -> list[str]:
            word = self._load(self._place("i64", held, i), "i64", LANES)
            self._store(word.cast("trunc", "i32"), self._place("i32", self.words, i))
            return []

        def put(i: str, _: list[str]) -> list[str]:
            word = self._load(self._place("i32", self.words, i), "i32", LANES)
            self._store(word.cast("zext", "i64"), self._place("i64", held, i))
            return []

        self.loop("0", str(WORDS), LANES, take)
        # The words left are counted before one is taken; a new generator has none.
        remaining = self.emit(f"zext i32 {self.emit(f'load i32, ptr {left}')} to i64")
        start = self.emit(f"sub i64 {WORDS + 1}, {remaining}")

        def block(_: str, carried: list[str]) -> list[str]:
            at, done = carried
            pairs = self.emit(f"lshr i64 {self.emit(f'sub i64 {WORDS}, {at}')}, 1")
            count = self.least(pairs, self.emit(f"sub i64 %count, {done}"))
            self._draw(at, done, count)
            at = self.emit(f"add i64 {at}, {self.emit(f'shl i64 {count}, 1')}")
            done = self.emit(f"add i64 {done}, {count}")
            here, twist, join = self.block, self.new_label("twist"), self.new_label("join")
            self.do(f"br i1 {self.emit(f'icmp slt i64 {done}, %count')}, label %{twist}, label %{join}")
            self.start(twist)
            self._twist()
            fresh, there = self.emit(f"sub i64 {at}, {WORDS}"), self.block
            self.do(f"br label %{join}")
            self.start(join)
            return [self.phi("i64", [(at, here), (fresh, there)]), done]

        blocks = self.emit(f"add i64 {self.emit(f'udiv i64 %count, {WORDS // 2}')}, 2")
        at, _ = self.loop("0", blocks, 1, block, [("i64", start), ("i64", "0")])
        self.loop("0", str(WORDS), LANES, put)
        remaining = self.emit(f"sub i64 {WORDS + 1}, {at}")
        self.do(f"store i32 {self.emit(f'trunc i64 {remaining} to i32')}, ptr {left}")
        self.do(f"store i64 {at}, ptr {following}")
        self.do("ret void")
        self.function("void @bernoulli(ptr %state, ptr %result, i64 %count, i64 %limit, i64 %one)")

    def _draw(self, at: str, done: str, count: str) -> None:
        """Elements from pairs of words: the first one's low bits before all of the second one's."""

        def draw(lanes: int) -> Callable[[str, list[str]], list[str]]:
            def some(i: str, _: list[str]) -> list[str]:
                word = self.emit(f"add i64 {at}, {self.emit(f'shl i64 {i}, 1')}")
                tempered = _tempered(self._load(self._place("i32", self.words, word), "i32", 2 * lanes))
                type_ = type_of("i64", lanes)
                pair = Value(self, "i64", lanes, self.emit(f"bitcast {tempered.type} {tempered.name} to {type_}"))
                number = ((pair & ((1 << DIGITS - 32) - 1)) << 32) | _shifted(pair, 32)
                limit, one = self.choices[lanes]
                place = self._place(one.element, "%result", self.emit(f"add i64 {done}, {i}"))
                self._store(number.compare("slt", limit).select(one, 0), place)
                return []

            return some

        whole = self.emit(f"and i64 {count}, {-LANES}")
        self.loop("0", whole, LANES, draw(LANES))
        self.loop(whole, count, 1, draw(1))

    def _twist(self) -> None:
        """The next words; the last one of these before them is kept."""
        last = self._load(self._place("i32", self.words, WORDS - 1), "i32", 1)
        self._store(last, self._place("i32", self.words, -1))
        for begin, end, other in ((0, WORDS - MIDDLE, MIDDLE), (WORDS - MIDDLE, WORDS - 1, MIDDLE - WORDS)):
            whole = begin + (end - begin) // LANES * LANES
            self.loop(str(begin), str(whole), LANES, self._twisting(LANES, other))
            self.loop(str(whole), str(end), 1, self._twisting(1, other))
        first = self._load(self._place("i32", self.words, 0), "i32", 1)
        self._renew(str(WORDS - 1), first, MIDDLE - WORDS)

    def _twisting(self, lanes: int, other: int) -> Callable[[str, list[str]], list[str]]:
        def some(i: str, _: list[str]) -> list[str]:
            following = self._load(self._place("i32", self.words, self.emit(f"add i64 {i}, 1")), "i32", lanes)
            self._renew(i, following, other)
            return []

        return some

    def _renew(self, i: str, following: Value, other: int) -> None:
        place = self._place("i32", self.words, i)
        far = self._load(self._place("i32", self.words, self.emit(f"add i64 {i}, {other}")), "i32", following.lanes)
        mixed = (self._load(place, "i32", following.lanes) & UPPER) | (following & LOWER)
        odd = following.const(0) - (following & 1)
        self._store(far ^ _shifted(mixed, 1) ^ (odd & MATRIX), place)

    def _place(self, element: str, start: str, index: str | int) -> str:
        return self.emit(f"getelementptr {element}, ptr {start}, i64 {index}")

    def _load(self, place: str, element: str, lanes: int) -> Value:
        return Value(self, element, lanes, self.emit(f"load {type_of(element, lanes)}, ptr {place}, align 4"))

    def _store(self, v: Value, place: str) -> None:
        self.do(f"store {v.type} {v.name}, ptr {place}, align 1")


def _tempered(y: Value) -> Value:
    y = y ^ _shifted(y, 11)
    y = y ^ ((y << 7) & MASK_B)
    y = y ^ ((y << 15) & MASK_C)
    return y ^ _shifted(y, 18)


def _shifted(y: Value, by: int) -> Value:
    """To the right; zeros come in."""
    return Value(y.e, y.element, y.lanes, y.e.emit(f"lshr {y.type} {y.name}, {y.like(by).name}"))
