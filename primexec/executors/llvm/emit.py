"""Text of LLVM IR, one instruction at a time, in SSA form with opaque pointers.

No fast-math flag, no `inttoptr` and no `ptrtoint` ever stands in the text: the first changes results, the others are
miscompiled now and then.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from primexec.executors.llvm.target import Target

LLVM_NAMES = {"f64": "double", "f32": "float", "f16": "half", "bf16": "bfloat"}
INTRINSIC_NAMES = {"f64": "f64", "f32": "f32", "f16": "f16", "bf16": "bf16"}
INTEGER_OF = {"f64": "i64", "f32": "i32", "f16": "i16", "bf16": "i16"}

Number = float | int


def type_of(element: str, lanes: int = 1) -> str:
    """The LLVM type of `lanes` elements; a scalar for one.

    >>> type_of("f32", 8), type_of("i64")
    ('<8 x float>', 'i64')
    """
    name = LLVM_NAMES.get(element, element)
    return name if lanes == 1 else f"<{lanes} x {name}>"


def literal(element: str, value: Number) -> str:
    """A scalar constant; floats by their exact bits, rounded to nearest once.

    >>> literal("f32", 0.1), literal("i32", -1)
    ('0x3FB99999A0000000', '-1')
    """
    if element == "f64":
        return f"0x{_bits64(float(value)):016X}"
    if element == "f32":
        return f"0x{_bits64(round_f32(float(value))):016X}"
    if element in LLVM_NAMES:
        raise ValueError(f"constants of {element} are made by truncating f32 ones")
    if element == "i1":
        return "true" if value else "false"
    return str(int(value))


def round_f32(value: float) -> float:
    """The float32 nearest to a float64; infinite beyond its range."""
    try:
        return float(struct.unpack("<f", struct.pack("<f", value))[0])
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")


def _bits64(value: float) -> int:
    return int(struct.unpack("<Q", struct.pack("<d", value))[0])


@dataclass
class ModuleText:
    """What the functions of one module share: declarations and globals, each once."""

    target: Target
    declarations: dict[str, str] = field(default_factory=dict)
    globals: dict[str, str] = field(default_factory=dict)
    functions: list[str] = field(default_factory=list)

    def declare(self, name: str, signature: str) -> None:
        """`declare("omp_get_max_threads", "i32 ()")`."""
        returns, _, rest = signature.partition("(")
        self.declarations.setdefault(name, f"declare {returns.strip()} @{name}({rest}")

    def constant(self, name: str, value: str) -> str:
        """A private constant, by its typed initialiser; returns `@name`."""
        self.globals.setdefault(name, f"@{name} = private unnamed_addr constant {value}")
        return f"@{name}"

    def define(self, text: str) -> None:
        """Add a complete function definition."""
        self.functions.append(text)

    def text(self) -> str:
        """The module. Attribute group #0 is for functions of our own, !0 marks non-temporal stores."""
        attributes = 'attributes #0 = { nounwind "prefer-vector-width"="512" "denormal-fp-math"="ieee,ieee" }'
        notes = ["!0 = !{i32 1}", '!1 = !{!"branch_weights", i32 1, i32 2000}']
        head = [f'target triple = "{self.target.triple}"', *self.globals.values()]
        body = [*self.declarations.values(), *self.functions]
        return "\n".join([*head, *body, attributes, *notes]) + "\n"


class Emitter:
    """The body of one function. Labels move `block`, the label that a phi must name: ask for it where it counts."""

    def __init__(self, module: ModuleText, block: str = "entry") -> None:
        self.module, self.block = module, block
        self.lines: list[str] = [f"{block}:"]
        self._values = self._labels = 0

    @property
    def target(self) -> Target:
        return self.module.target

    def fresh(self) -> str:
        """A new name for a value that a later line defines."""
        self._values += 1
        return f"%v{self._values}"

    def emit(self, instruction: str) -> str:
        """Add an instruction with a result; returns the result's name."""
        name = self.fresh()
        self.lines.append(f"  {name} = {instruction}")
        return name

    def do(self, instruction: str) -> None:
        """Add an instruction without a result: a store, a branch, a return."""
        self.lines.append(f"  {instruction}")

    def new_label(self, stem: str) -> str:
        """A label that is not used yet; `start` places it."""
        self._labels += 1
        return f"{stem}{self._labels}"

    def start(self, label: str) -> None:
        """Begin a basic block."""
        self.lines.append(f"{label}:")
        self.block = label

    def enter(self, stem: str) -> str:
        """Branch to a new block and begin it."""
        label = self.new_label(stem)
        self.do(f"br label %{label}")
        self.start(label)
        return label

    def phi(self, type_: str, incoming: Sequence[tuple[str, str]]) -> str:
        """A phi over (value, label) pairs."""
        return self.emit(f"phi {type_} " + ", ".join(f"[ {v}, %{label} ]" for v, label in incoming))

    def call(self, returns: str, name: str, arguments: Sequence[tuple[str, str]]) -> str:
        """Call a function by name, declaring it; arguments are (type, value). The empty string for void."""
        self.module.declare(name, f"{returns} (" + ", ".join(t for t, _ in arguments) + ")")
        text = f"call {returns} @{name}(" + ", ".join(f"{t} {v}" for t, v in arguments) + ")"
        if returns == "void":
            self.do(text)
            return ""
        return self.emit(text)

    def least(self, a: str, b: str | int) -> str:
        """The smaller of two i64."""
        return self.call("i64", "llvm.smin.i64", [("i64", a), ("i64", str(b))])

    def prefetch(self, place: str, cache: int) -> None:
        """Asks for a line of memory, to come into the first or the second cache."""
        self.call("void", "llvm.prefetch.p0", [("ptr", place), *(("i32", n) for n in ("0", str(4 - cache), "1"))])

    def loop(
        self,
        begin: str,
        end: str,
        step: int | str,
        body: Callable[[str, list[str]], Sequence[str]],
        carried: Sequence[tuple[str, str]] = (),
    ) -> list[str]:
        """`for i in range(begin, end, step)` over i64, with loop-carried values given as (type, initial value).

        `body(i, carried)` emits one pass and returns the next carried values; the result are those after the last.
        """
        before, head = self.block, self.new_label("head")
        inside, after = self.new_label("body"), self.new_label("after")
        index, following = self.fresh(), self.fresh()
        values = [self.fresh() for _ in carried]
        self.do(f"br label %{head}")
        self.start(head)
        place = len(self.lines)
        going = self.emit(f"icmp slt i64 {index}, {end}")
        self.do(f"br i1 {going}, label %{inside}, label %{after}")
        self.start(inside)
        results = body(index, values)
        self.do(f"{following} = add nsw i64 {index}, {step}")
        self.do(f"br label %{head}")
        phis = [f"  {index} = phi i64 [ {begin}, %{before} ], [ {following}, %{self.block} ]"]
        for (type_, initial), value, result in zip(carried, values, results, strict=True):
            phis.append(f"  {value} = phi {type_} [ {initial}, %{before} ], [ {result}, %{self.block} ]")
        self.lines[place:place] = phis
        self.start(after)
        return values

    def function(self, signature: str, attributes: str = "#0") -> None:
        """Close the function and add it to the module: `function("void @f(ptr %args)")`."""
        body = "\n".join(self.lines)
        self.module.define(f"define {signature} {attributes} {{\n{body}\n}}")


@dataclass(frozen=True, slots=True)
class Value:
    """A vector (or, with one lane, a scalar) inside a function; operators emit instructions.

    `+ - * /` follow the element type; numbers on the right or left become splats.
    """

    e: Emitter
    element: str
    lanes: int
    name: str

    @property
    def type(self) -> str:
        """Its LLVM type."""
        return type_of(self.element, self.lanes)

    @property
    def is_float(self) -> bool:
        return self.element in LLVM_NAMES

    def const(self, value: Number) -> Value:
        """A splat of this value's type."""
        text = literal(self.element, value)
        if self.lanes > 1:
            text = f"splat ({type_of(self.element)} {text})"
        return Value(self.e, self.element, self.lanes, text)

    def like(self, other: Value | Number) -> Value:
        """The other operand, a number made a splat."""
        return other if isinstance(other, Value) else self.const(other)

    def _op(self, name: str, other: Value | Number) -> Value:
        right = self.like(other)
        return Value(self.e, self.element, self.lanes, self.e.emit(f"{name} {self.type} {self.name}, {right.name}"))

    def _either(self, floats: str, integers: str, other: Value | Number) -> Value:
        return self._op(floats if self.is_float else integers, other)

    def __add__(self, other: Value | Number) -> Value:
        return self._either("fadd", "add", other)

    def __sub__(self, other: Value | Number) -> Value:
        return self._either("fsub", "sub", other)

    def __mul__(self, other: Value | Number) -> Value:
        return self._either("fmul", "mul", other)

    def __truediv__(self, other: Value | Number) -> Value:
        return self._op("fdiv", other)

    def __radd__(self, other: Number) -> Value:
        return self.const(other) + self

    def __rsub__(self, other: Number) -> Value:
        return self.const(other) - self

    def __rmul__(self, other: Number) -> Value:
        return self.const(other) * self

    def __rtruediv__(self, other: Number) -> Value:
        return self.const(other) / self

    def __neg__(self) -> Value:
        if self.is_float:
            return Value(self.e, self.element, self.lanes, self.e.emit(f"fneg {self.type} {self.name}"))
        return self.const(0) - self

    def __and__(self, other: Value | Number) -> Value:
        return self._op("and", other)

    def __or__(self, other: Value | Number) -> Value:
        return self._op("or", other)

    def __xor__(self, other: Value | Number) -> Value:
        return self._op("xor", other)

    def __invert__(self) -> Value:
        return self._op("xor", -1 if self.element != "i1" else 1)

    def __lshift__(self, other: Value | Number) -> Value:
        return self._op("shl", other)

    def __rshift__(self, other: Value | Number) -> Value:
        """Arithmetic shift: the sign is kept."""
        return self._op("ashr", other)

    def compare(self, how: str, other: Value | Number) -> Value:
        """A mask, by LLVM's predicate: `olt`, `ult`, `uno`, ... for floats, `slt`, `eq`, ... for integers."""
        kind, right = "fcmp" if self.is_float else "icmp", self.like(other)
        name = self.e.emit(f"{kind} {how} {self.type} {self.name}, {right.name}")
        return Value(self.e, "i1", self.lanes, name)

    def is_nan(self) -> Value:
        return self.compare("uno", self)

    def select(self, yes: Value | Number, no: Value | Number) -> Value:
        """This mask's choice; at least one of the two must be a Value."""
        pattern = yes if isinstance(yes, Value) else no
        assert isinstance(pattern, Value)
        a, b, mask = pattern.like(yes), pattern.like(no), f"{self.type} {self.name}"
        name = self.e.emit(f"select {mask}, {pattern.type} {a.name}, {pattern.type} {b.name}")
        return Value(self.e, pattern.element, pattern.lanes, name)

    def cast(self, instruction: str, element: str) -> Value:
        """`cast("sitofp", "f32")`, `cast("bitcast", "i32")`: lane by lane."""
        name = self.e.emit(f"{instruction} {self.type} {self.name} to {type_of(element, self.lanes)}")
        return Value(self.e, element, self.lanes, name)

    def bits(self) -> Value:
        """A float's bits as an integer of its size."""
        return self.cast("bitcast", INTEGER_OF[self.element])

    def as_float(self) -> Value:
        """An integer's bits as the float of its size, f32 or f64."""
        return self.cast("bitcast", {"i32": "f32", "i64": "f64"}[self.element])

    def intrinsic(self, name: str, *others: Value | Number) -> Value:
        """An LLVM intrinsic whose operands all have this type, overloaded on it: `x.intrinsic("fabs")`."""
        suffix = INTRINSIC_NAMES.get(self.element, self.element)
        suffix = suffix if self.lanes == 1 else f"v{self.lanes}{suffix}"
        operands = [(self.type, self.like(v).name) for v in (self, *others)]
        return Value(self.e, self.element, self.lanes, self.e.call(self.type, f"llvm.{name}.{suffix}", operands))

    def inserted(self, other: Value) -> Value:
        """With the lanes of a scalar or a smaller vector in place of the first ones."""
        found = self
        for k in range(other.lanes):
            one = other if other.lanes == 1 else picked(other, [k])
            text = f"insertelement {self.type} {found.name}, {one.type} {one.name}, i32 {k}"
            found = Value(self.e, self.element, self.lanes, self.e.emit(text))
        return found

    def abs(self) -> Value:
        return self.intrinsic("fabs") if self.is_float else (self.compare("slt", 0)).select(-self, self)

    def copysign(self, other: Value) -> Value:
        # LLVM's intrinsic looks for the sign through roundings, and asks for `__truncdfhf2` when it found a float64's.
        a, b = self.bits(), other.bits()
        sign = -(1 << int(a.element[1:]) - 1)
        return ((a & ~sign) | (b & sign)).as_float()

    def signed_as(self, other: Value) -> Value:
        """This number, which has no sign, with that of another."""
        sign = other.bits() & -(1 << int(INTEGER_OF[other.element][1:]) - 1)
        return (self.bits() | sign).as_float()

    def fma(self, factor: Value | Number, addend: Value | Number) -> Value:
        """`self * factor + addend`, rounded once (float32 without the instruction: once to 53 bits, then to 24)."""
        if self.element == "f32" and not self.e.target.has_fma:
            a, b, c = (v.cast("fpext", "f64") for v in (self, self.like(factor), self.like(addend)))
            return (a * b + c).cast("fptrunc", "f32")
        return self.intrinsic("fma", factor, addend)

    def muladd(self, factor: Value | Number, addend: Value | Number) -> Value:
        """`self * factor + addend`, rounded once or twice, whatever is faster on the target."""
        if self.e.target.has_fma:
            return self.intrinsic("fma", factor, addend)
        return self * factor + addend

    def at_most(self, limit: Number) -> Value:
        """The smaller of the two; NaN stays NaN."""
        bound = self.const(limit)
        return bound.compare("olt", self).select(bound, self)

    def at_least(self, limit: Number) -> Value:
        """The larger of the two; NaN stays NaN."""
        bound = self.const(limit)
        return bound.compare("ogt", self).select(bound, self)

    def any(self) -> str:
        """Whether any lane of a mask is set, as an i1."""
        if self.lanes == 1:
            return self.name
        packed = self.e.emit(f"bitcast {self.type} {self.name} to i{self.lanes}")
        return self.e.emit(f"icmp ne i{self.lanes} {packed}, 0")

    def lanewise(self, function: str, *others: Value) -> Value:
        """Call a scalar C function of this element type for every lane."""
        scalar, operands = type_of(self.element), (self, *others)
        if self.lanes == 1:
            return Value(self.e, self.element, 1, self.e.call(scalar, function, [(scalar, v.name) for v in operands]))
        result = "poison"
        for lane in range(self.lanes):
            parts = [(scalar, self.e.emit(f"extractelement {v.type} {v.name}, i32 {lane}")) for v in operands]
            one = self.e.call(scalar, function, parts)
            result = self.e.emit(f"insertelement {self.type} {result}, {scalar} {one}, i32 {lane}")
        return Value(self.e, self.element, self.lanes, result)


def picked(v: Value, lanes: Sequence[int], other: Value | None = None) -> Value:
    """A vector of some lanes; those of `other` are counted on. One lane is a scalar."""
    if len(lanes) == 1 and other is None:
        return Value(v.e, v.element, 1, v.e.emit(f"extractelement {v.type} {v.name}, i32 {lanes[0]}"))
    mask = ", ".join(f"i32 {k}" for k in lanes)
    second = other.name if other else "poison"
    text = f"shufflevector {v.type} {v.name}, {v.type} {second}, <{len(lanes)} x i32> <{mask}>"
    return Value(v.e, v.element, len(lanes), v.e.emit(text))


def joined(parts: Sequence[Value]) -> Value:
    """Vectors of one size, a power of two of them, after each other."""
    if len(parts) == 1:
        return parts[0]
    pairs = zip(parts[::2], parts[1::2], strict=True)
    return joined([picked(a, range(2 * a.lanes), b) for a, b in pairs])


def unlikely(mask: Value, usual: Value, rare: Callable[[], Value]) -> Value:
    """`rare()` in lanes of the mask, `usual` in the others; what rare emits runs only where some lane needs it."""
    e, seldom, join = mask.e, mask.e.new_label("rare"), mask.e.new_label("join")
    some, before = mask.any(), e.block
    e.do(f"br i1 {some}, label %{seldom}, label %{join}, !prof !1")
    e.start(seldom)
    merged = mask.select(rare(), usual)
    behind = e.block
    e.do(f"br label %{join}")
    e.start(join)
    name = e.phi(usual.type, [(usual.name, before), (merged.name, behind)])
    return Value(e, usual.element, usual.lanes, name)
