"""Numbers that a function reads off tensors (`x.item()`), as nodes: what Python reckons with them is recorded.

Such a number is a `torch.SymFloat`, which operators take in place of a float. Its value is known to the program only:
whatever needs it while the function is traced, such as a comparison, is refused.
"""

from __future__ import annotations

import math
import numbers
import operator
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NoReturn

import torch
from torch import Tensor, fx

from primexec import _torch, _torch_autograd
from primexec._torch import pytree
from primexec.bytecode import keys_compared, running_in
from primexec.draws import DRAW
from primexec.errors import PrimexecError
from primexec.lookups import Disguised

if TYPE_CHECKING:
    from primexec.tracer import Tracer

READ = torch.ops.aten._local_scalar_dense.default
_MAX = 10_000
# Autograd nodes that ask whether a product has several zeros: a second derivative would raise.
_UNIQUE_ZEROS = frozenset({"ScatterReduceBackward0", "IndexReduceBackward0"})
# Calls that compare ints before they come to any operator, and behind which argument the last of these stands.
# Those of padding its formula asks for.
_BOUNDS = {Tensor.__getitem__: 2, Tensor.__setitem__: 2, Tensor.narrow: 4, torch.narrow: 4, _torch.pad: 2}


def as_input(value: int | float) -> Tensor:
    """A number as a program takes it; `torch.tensor` would take three times as long."""
    return torch.scalar_tensor(value, dtype=torch.float64 if type(value) is float else torch.int64, device="cpu")


def power(base: Any, exponent: Any) -> float:
    """base ** exponent where that is a float, as a program expects it."""
    result = base**exponent
    if type(result) is not float:
        raise PrimexecError(f"{base} ** {exponent} is no float, and the program was traced for floats")
    return result


@dataclass(slots=True)
class Made:
    """Where a number was made, by which node, what it is in other graphs, the tensor that holds it.

    And the size that it is, unknown or known, where an operator took it for one.
    """

    node: fx.Node
    scope: Any
    nodes: dict[fx.Graph, fx.Node] = field(default_factory=dict)
    tensor: fx.Node | None = None
    size: Any = None
    known: int | None = None
    equal: Any = None  # a key of a container that it was found to be equal to


class Symbol:
    """What a number is to PyTorch: the value of a node. It has those methods of a SymNode that need no value.

    PyTorch keeps symbols for backward passes, where Python's collector cannot see them: they hold no nodes themselves.
    """

    def __init__(self, tracer: Tracer, node: fx.Node, kind: type) -> None:
        self._tracer = weakref.ref(tracer)
        self.kind, self._name = kind, node.name
        tracer.numbers.made[self] = Made(node, tracer.scope, {node.graph: node})

    @property
    def tracer(self) -> Tracer:
        tracer = self._tracer()
        assert tracer is not None
        return tracer

    @property
    def made(self) -> Made:
        return self.tracer.numbers.made[self]

    def is_int(self) -> bool:
        return self.kind is int

    def is_float(self) -> bool:
        return self.kind is float

    def is_symbolic(self) -> bool:
        return True

    def is_bool(self) -> bool:
        return False

    is_constant = is_nested_int = has_hint = is_bool

    def maybe_as_int(self) -> None:
        return None

    def _graph_repr(self) -> str:
        return self._name

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        self.refuse()

    def guard_int(self, file: str = "", line: int = 0) -> Any:
        """The value with which the function goes on."""
        return self.decide("index", self) if self.kind is int else self.refuse()

    int_ = guard_int

    def decide(self, question: str, *values: Any, is_size: bool = False) -> Any:
        """The answer to a question about numbers with which the function goes on."""
        tracer = self.tracer
        each = is_size and tracer.number_inputs.counts
        symbols = [v.node if isinstance(v, Number) else v for v in values]
        answer = tracer.number_inputs.ask(
            question, [v.made.node if isinstance(v, Symbol) else v for v in symbols], each
        )
        if answer is None:
            nodes = [node_of(tracer, v) if isinstance(v, Symbol) else v for v in symbols]
            constant = question == "index" and not each and any(map(tracer.number_inputs.is_made_of, nodes))
            answer = None if constant else tracer.deciding.ask(question, *nodes)
        return self.refuse() if answer is None else answer

    def refuse(self) -> NoReturn:
        reason, hint = _torch.VALUE_NEEDED
        raise self.tracer.fail(reason.format(op=READ), in_optimizer() or hint)


def in_optimizer() -> str:
    """What to do where one of torch's optimizers, or what belongs to them, asks for a value."""
    name = running_in(sys._getframe(), "optim")
    return f"call {name}() outside of the traced function, for it needs values in Python" if name else ""


def _binary(op: Callable[[Any, Any], Any], reflected: bool = False) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if type(other) is torch.SymInt and symbol_of(other) is None:
            other = int(other)  # a size that depends on values: a decision
        if type(other) not in (int, float, bool) and not isinstance(other, Number):
            return self.node.refuse() if isinstance(other, numbers.Number) else NotImplemented  # complex, NumPy's
        a, b = (other, self) if reflected else (self, other)
        kinds = {v.node.kind if isinstance(v, Number) else type(v) for v in (a, b)}
        kind = float if float in kinds or op is operator.truediv else int
        if op is power and kind is int:
            return _known(a) ** _known(b)
        return reckon(op, (a, b), kind)

    return method


def _compared(op: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        if type(other) not in (int, float, bool) and not isinstance(other, Number):
            return self.node.refuse() if isinstance(other, numbers.Number) else NotImplemented
        return self.node.decide(op.__name__, self, other)

    return method


def _both(quotient: Callable[[Any, Any], Any], remainder: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def method(self: Any, other: Any) -> Any:
        first, second = quotient(self, other), remainder(self, other)
        return NotImplemented if first is NotImplemented else (first, second)

    return method


def _unary(op: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda self: reckon(op, (self,), self.node.kind)


def _rounded(op: Callable[[Any], Any]) -> Callable[[Any], Any]:
    """A function that makes an int of a float, and is none to an int."""
    return lambda self: self if self.node.kind is int else reckon(op, (self,), int)


def _known(value: Any) -> Any:
    """A number as Python has it: an int is one with which the function goes on."""
    return value.node.guard_int() if isinstance(value, Number) else value


def _by_value(name: str) -> Callable[..., Any]:
    """A method of Python's ints that needs the value."""
    return lambda self, *args: getattr(_known(self), name)(*map(_known, args))


class Number(Disguised):
    """A number as the function holds it, which says that it is of the class that eager's is of."""

    node: Symbol
    symbol: type
    __array_ufunc__ = None  # NumPy's numbers are of other classes than Python's, and results with them would be, too

    def __init__(self, node: Symbol) -> None:
        self.node = node
        node.tracer.numbers.add(self)

    def __bool__(self) -> bool:
        return bool(self.node.decide("truth", self))

    def __index__(self) -> int:
        return int(self.node.guard_int())

    def __int__(self) -> int:
        return int(self.__trunc__().node.guard_int())

    def __round__(self, digits: Any = None) -> Any:
        if digits is None:
            return _rounded(round)(self)
        if self.node.kind is int or type(digits) is not int:
            return _known(self).__round__(_known(digits))
        return reckon(round, (self, digits), float)

    def __hash__(self) -> int:
        """Where it is looked for among few keys, it is decided whether it is one of them, and not what it is."""
        made = self.node.made
        if made.equal is None:
            keys = keys_compared(sys._getframe(1))
            if keys is None:
                return hash(_known(self))
            made.equal = next((key for key in keys if self == key), None)
        return object.__hash__(self) if made.equal is None else hash(made.equal)

    def varies(self) -> bool:
        """Whether it depends on a number that is an input of the program."""
        return self.node.tracer.number_inputs.is_made_of(node_of(self.node.tracer, self.node))

    def __dir__(self) -> list[str]:
        return dir(self.node.kind)

    def as_pytorch_has_it(self) -> Any:
        """What operators take: PyTorch keeps it for backward passes, and the number itself is the function's."""
        return self.symbol(self.node)

    @property  # type: ignore[misc]  # as mocks have it, for isinstance
    def __class__(self) -> Any:
        return self.node.kind

    def __getattr__(self, name: str) -> Any:
        if hasattr(self.node.kind, name):
            return getattr(_known(self), name)
        raise AttributeError(f"{self.node.kind.__name__!r} object has no attribute {name!r}")

    __add__, __radd__ = _binary(operator.add), _binary(operator.add, True)
    __sub__, __rsub__ = _binary(operator.sub), _binary(operator.sub, True)
    __mul__, __rmul__ = _binary(operator.mul), _binary(operator.mul, True)
    __truediv__, __rtruediv__ = _binary(operator.truediv), _binary(operator.truediv, True)
    __floordiv__, __rfloordiv__ = _binary(operator.floordiv), _binary(operator.floordiv, True)
    __mod__, __rmod__ = _binary(operator.mod), _binary(operator.mod, True)
    __pow__, __rpow__ = _binary(power), _binary(power, True)
    __divmod__, __rdivmod__ = _both(__floordiv__, __mod__), _both(__rfloordiv__, __rmod__)
    __floor__, __ceil__, __trunc__ = _rounded(math.floor), _rounded(math.ceil), _rounded(math.trunc)
    __neg__, __pos__, __abs__ = _unary(operator.neg), _unary(operator.pos), _unary(abs)
    __eq__, __ne__ = _compared(operator.eq), _compared(operator.ne)
    __lt__, __le__ = _compared(operator.lt), _compared(operator.le)
    __gt__, __ge__ = _compared(operator.gt), _compared(operator.ge)


for _name in [
    "and", "float", "format", "invert", "lshift", "or", "rand",
    "reduce_ex", "repr", "rlshift", "ror", "rrshift", "rshift", "rxor", "str", "xor",
]:  # fmt: skip
    setattr(Number, f"__{_name}__", _by_value(f"__{_name}__"))
for _name in ("as_integer_ratio", "bit_length", "conjugate", "hex", "is_integer"):  # PyTorch's numbers have their own
    setattr(Number, _name, _by_value(_name))


class Float(Number, torch.SymFloat):
    """A float, which operators take."""

    symbol = torch.SymFloat


class Int(Number, torch.SymInt):
    """An int, which operators take for a number; one that takes it for a size asks for its value."""

    symbol = torch.SymInt


class Numbers:
    """The numbers that a tracer has given to the function."""

    def __init__(self) -> None:
        self._given: dict[int, weakref.ref[Number]] = {}
        self.made: dict[Symbol, Made] = {}
        self.places: set[fx.Node | None] = set()  # those at which parts of tensors begin or end, and that stay unknown

    def add(self, number: Number) -> None:
        self._given[id(number)] = weakref.ref(number)
        if len(self._given) > _MAX:
            raise number.node.tracer.fail(
                f"more than {_MAX} numbers are read off tensors, or reckoned from such", "keep them tensors"
            )

    def __bool__(self) -> bool:
        return bool(self._given)

    def kept(self) -> list[Number]:
        """Those that somebody still refers to."""
        return [n for ref in self._given.values() if (n := ref()) is not None]


def item(tracer: Tracer, t: Tensor) -> Number | None:
    """What `t.item()` is; None where that is known, or no int or float."""
    known = getattr(t, "constant", None) is not None
    if known or t.numel() != 1 or t.is_complex() or t.dtype is torch.bool:
        return None
    return _wrapped(_emit(tracer, READ, (tracer.node_of(t),), float if t.is_floating_point() else int))


def drawn(tracer: Tracer, generator: str, function: str, arguments: list[int | float], kind: type) -> Number | None:
    """A number that the program draws from a generator of another module's than torch; None where it cannot."""
    if tracer.scope.parent is not None:
        return None
    with _torch.modes_off(), tracer.fake_mode:
        value = torch.empty((), dtype=torch.int64 if kind is int else torch.float64)
    return item(tracer, tracer.add_node(DRAW, (generator, function, arguments), {}, value))


def whole(tracer: Tracer, t: Tensor) -> Any:
    """The truth value or int of a tensor, with which the function goes on; None where it is none, known or refused."""
    if t.is_floating_point() or t.is_complex() or t.numel() != 1 or getattr(t, "constant", None) is not None:
        return None
    if t.dtype is torch.bool:
        if (node := _torch_autograd.autograd_node()) is not None and node.name() in _UNIQUE_ZEROS:
            with tracer.recording():
                torch._assert_async(
                    ~t, "a derivative of a product of factors of which several are zero is differentiated"
                )
            return False
        return tracer.deciding.ask("truth", tracer.node_of(t))
    return Int(_emit(tracer, READ, (tracer.node_of(t),), int)).__index__() if tracer.scope.parent is None else None


def sizes_decided(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments in which ints stand for numbers that the operator takes for sizes, bounds or dimensions."""
    formals = {f.name: str(f.type) for f in op._schema.arguments} if isinstance(op, _torch.OpOverload) else {}
    if formals and op.overloadpacket in _RANGES:
        formals = dict.fromkeys(formals, "int")
    given = [_decided(f, a) for f, a in zip(formals.values(), args, strict=False)]
    return (*given, *args[len(given) :]), {k: _decided(formals.get(k, ""), v) for k, v in kwargs.items()}


def bounds_decided(fn: Any, args: tuple[Any, ...]) -> tuple[Any, ...]:
    """As `sizes_decided`, of a call of the API."""
    end = _BOUNDS.get(fn, 0)
    return (*(_decided("int", a) for a in args[:end]), *args[end:])


def all_decided(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    """Arguments in which all ints are known; None where they are already."""
    if not any((symbol := symbol_of(v)) is not None and symbol.kind is int for v in pytree.tree_leaves((args, kwargs))):
        return None
    return tuple(_decided("int", a) for a in args), {k: _decided("int", v) for k, v in kwargs.items()}


def _decided(formal: str, value: Any) -> Any:
    if "int" not in formal.lower():
        return value
    if isinstance(value, (list, tuple)):
        return type(value)(_decided(formal, v) for v in value)
    if isinstance(value, slice):
        return slice(*(_decided(formal, v) for v in (value.start, value.stop, value.step)))
    symbol = symbol_of(value)
    if symbol is None or symbol.kind is float:
        return value
    made = symbol.made
    if symbol.tracer.scope.parent is None or (made.size is None and made.known is None):
        made.known = symbol.decide("index", symbol, is_size=True)
        return made.known
    return made.known if made.size is None else made.size  # autograd keeps the number for backward


def answer(tracer: Tracer, op: Any, args: tuple[Any, ...]) -> Any:
    """What an operator answers that gives a bool, such as `aten.equal`; None where it is none of these, or refused."""
    if tracer.scope.parent is not None or not _gives_bool(op):
        return None
    return tracer.deciding.ask("truth", _emit(tracer, op, args, bool).made.node)


@cache
def _gives_bool(op: Any) -> bool:
    tagged = isinstance(op, _torch.OpOverload) and torch.Tag.data_dependent_output in op.tags
    return tagged and [str(r.type) for r in op._schema.returns] == ["bool"]


def asked_by_pytorch(tracer: Tracer, t: Tensor) -> Any:
    """What PyTorch itself gets that takes a tensor for a number, as in `x.add(y, alpha=t)`."""
    number = item(tracer, t) if t.is_floating_point() else None
    if number is not None and tracer.calling == Tensor.__int__:
        return int(number)
    return None if number is None else number.as_pytorch_has_it()


def _wrapped(symbol: Symbol) -> Number:
    return Float(symbol) if symbol.kind is float else Int(symbol)


def node_of(tracer: Tracer, symbol: Symbol) -> fx.Node:
    """The node of a number in the current graph; one of another graph comes as a tensor, and is read off it again."""
    nodes = symbol.made.nodes
    if tracer.graph not in nodes:
        tensor = tracer.node_of(as_tensor(tracer, symbol))
        nodes[tracer.graph] = _emit(tracer, READ, (tensor,), symbol.kind).made.node
    return nodes[tracer.graph]


def as_tensor(tracer: Tracer, symbol: Symbol) -> Tensor:
    """A tensor of float64 or int64 that holds a number."""
    made = symbol.made
    if made.tensor is None:
        inner, tracer.scope = tracer.scope, made.scope
        dtype = torch.float64 if symbol.kind is float else torch.int64
        try:
            with _torch.modes_off(), tracer.fake_mode:
                value = torch.empty((), dtype=dtype)
            tracer.add_node(torch.ops.aten.scalar_tensor.default, (made.node,), {"dtype": dtype}, value)
            made.tensor = tracer.node_of(value)
        finally:
            tracer.scope = inner
    tensor: Tensor = made.tensor.meta["val"]
    return tensor


def reckon(op: Any, operands: tuple[Any, ...], kind: type) -> Number:
    """The number that a function of Python's makes of others."""
    tracer = next(v.node.tracer for v in operands if isinstance(v, Number))
    args = tuple(node_of(tracer, v.node) if isinstance(v, Number) else v for v in operands)
    return _wrapped(_emit(tracer, op, args, kind))


def on_metadata(op: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Arguments with which an operator gives the same metadata, and asks for no number's value.

    What takes an element's value, `Scalar` or a wrapped number, gives the same for any; a size does not, nor do the
    bounds of a range.
    """
    if not isinstance(op, _torch.OpOverload) or op.overloadpacket in _RANGES:
        return args, kwargs
    formals = {f.name: f for f in op._schema.arguments}
    given = [_any(f, a) for f, a in zip(formals.values(), args, strict=False)]
    return tuple(given), {k: _any(formals[k], v) for k, v in kwargs.items()}


_RANGES = frozenset({torch.ops.aten.arange, torch.ops.aten.range})


def _any(formal: Any, value: Any) -> Any:
    if isinstance(value, list):
        return [_any(formal, v) for v in value]
    return any_number(value) if "number" in (kind := str(formal.type)) or "Tensor" in kind else value


def any_number(value: Any) -> Any:
    """A number in place of one whose value is known to the program only; anything else as it is."""
    symbol = symbol_of(value)
    return value if symbol is None else symbol.kind(2)


def _emit(tracer: Tracer, op: Any, args: tuple[Any, ...], kind: type) -> Symbol:
    if tracer.scope.is_body:
        raise tracer.fail(
            "a number that was read off a tensor is used in a branch or loop body",
            "keep it a tensor: leave out .item()",
        )
    node = tracer.graph.call_function(op, args)
    symbol = Symbol(tracer, node, kind)
    value = (torch.SymFloat if kind is float else torch.SymInt)(symbol)
    node.meta.update(val=value, spec=kind.__name__)
    tracer.describe(node)
    return symbol


def symbol_of(value: Any) -> Symbol | None:
    """What stands for a number among the arguments of an operator."""
    symbol = value.node if isinstance(value, _torch.SYMBOLS) else None
    return symbol if isinstance(symbol, Symbol) else None
