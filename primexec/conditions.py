"""Conditions: what Python decides by numbers that are inputs of a program. The guards ask again at every call.

So a program serves all numbers that go the same way, not only the one that it was traced for.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from primexec import _torch
from primexec.errors import SourceLine


@dataclass(frozen=True, slots=True)
class Condition:
    """The answer to a question, a function of `operator`, about numbers.

    Attributes:
        values: plain numbers, and functions of the numbers that are inputs, which are given by their names.
        source: the line that asks.
    """

    question: str
    values: tuple[Any, ...]
    outcome: bool | int
    source: SourceLine | None = field(compare=False)

    def in_code(self, constant: Callable[[Any], str], variables: Mapping[str, str]) -> str:
        """An expression that is true where the answer is the same.

        Args:
            constant: gives a value a name.
            variables: name of an input → variable that holds the number.
        """

        def code(value: Any) -> str:
            if isinstance(value, _Of):
                return f"{constant(value.function)}({', '.join(map(code, value.operands))})"
            return variables[value] if isinstance(value, str) else constant(value)

        asked = f"{constant(getattr(operator, self.question))}({', '.join(map(code, self.values))})"
        return f"{asked} == {self.outcome!r}"


@dataclass(frozen=True, slots=True)
class _Of:
    """What a function of Python makes of numbers."""

    function: Any
    operands: tuple[Any, ...]


def in_terms_of_inputs(value: Any) -> Any:
    """A plain number, the name of an input, or a function of such; None where a node is of something else."""
    if not isinstance(value, fx.Node):
        return value
    if value.target is torch.ops.aten._local_scalar_dense.default:
        tensor: Any = value.args[0]
        return tensor.name if tensor.op == "placeholder" and "largest" in tensor.meta else None
    operands = tuple(map(in_terms_of_inputs, value.args))
    known = not isinstance(value.target, _torch.OpOverload) and None not in operands
    return _Of(value.target, operands) if known else None


def is_of_few(expression: Any) -> bool:
    """Whether an expression comes to few values, however many its numbers have: a remainder, or a quotient."""
    return isinstance(expression, _Of) and expression.function in (operator.mod, operator.floordiv)


def value_of(expression: Any, numbers: Mapping[str, Any]) -> Any:
    """What an expression comes to.

    Args:
        numbers: name of an input → number.
    """
    if isinstance(expression, _Of):
        return expression.function(*(value_of(v, numbers) for v in expression.operands))
    return numbers[expression] if isinstance(expression, str) else expression
