"""What operators give on fake tensors for which PyTorch has no rule. Like `_torch.py`, this file touches private names.

A rule refuses as PyTorch's own do where the very number of dimensions depends on values.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor

from primexec._torch import asks_unknown_size, private


@cache
def rules() -> dict[Any, Callable[..., Any]]:
    """Operator → what makes its results, under a mode of fake tensors. It is given that mode and the arguments."""
    aten = torch.ops.aten
    return {
        aten._ctc_loss.default: _ctc_loss,
        aten._ctc_loss.Tensor: _ctc_loss,
        aten._ctc_loss_backward.default: _ctc_loss_backward,
        aten._ctc_loss_backward.Tensor: _ctc_loss_backward,
        aten.linalg_lstsq.default: _lstsq,
        **{op: lambda mode, *args, same=same: same(*args) for op, same in shifts().items()},
    }


@cache
def shifts() -> dict[Any, Any]:
    """Shifts whose rules refuse bools beside ints → the same under another name, whose rules take them."""
    aten = torch.ops.aten
    return {
        aten.__lshift__.Scalar: aten.bitwise_left_shift.Tensor_Scalar,
        aten.__lshift__.Tensor: aten.bitwise_left_shift.Tensor,
        aten.__rshift__.Scalar: aten.bitwise_right_shift.Tensor_Scalar,
        aten.__rshift__.Tensor: aten.bitwise_right_shift.Tensor,
    }


def allow_unknown_sizes(mode: Any, ask: Callable[[Any], Any] = lambda expression: None) -> bool:
    """Let operators such as nonzero return tensors of unknown size from now on; false where they already may.

    Args:
        ask: what is asked of such sizes, as SymPy has it, where Python goes on by the answer; None where there is none.
    """
    if mode.shape_env is not None:
        return False
    mode.static_shapes = True  # inputs keep the sizes they have
    mode.shape_env = _sizes()(ask)
    return True


@cache
def _sizes() -> Any:
    class Sizes(private("torch.fx.experimental.symbolic_shapes.ShapeEnv")):  # type: ignore[misc]
        """What is known of unknown sizes."""

        def __init__(self, ask: Callable[[Any], Any]) -> None:
            super().__init__()
            self.ask, self.answers = ask, dict[Any, Any]()

        def evaluate_expr(self, expression: Any, *args: Any, **kwargs: Any) -> Any:
            differ = type(expression).__name__ == "Unequality"
            asked = _in_order(expression) if differ or type(expression).__name__ == "Equality" else expression
            if (answer := self.known(asked)) is None:
                try:
                    return super().evaluate_expr(expression, *args, **kwargs)
                except Exception as error:
                    answer = self.answer(asked) if asks_unknown_size(error) else None
                    if answer is None:
                        raise
                self.answers[asked] = answer
                if answer is True and asked.args[0].is_Integer and asked.args[1].is_Symbol:
                    self.answers[asked.args[1]] = int(asked.args[0])
            return answer is not differ if isinstance(answer, bool) else answer

        def known(self, expression: Any) -> Any:
            """The value of an expression that was asked for before, or whose sizes are known; None of any other."""
            if expression in self.answers or not (symbols := expression.free_symbols):
                return self.answers.get(expression)
            return self.value(expression) if symbols <= self.answers.keys() else None

        def answer(self, expression: Any) -> Any:
            """The value of an expression, from those of its sizes where nobody tells it."""
            if (answer := self.ask(expression)) is not None:
                return answer
            symbols = expression.free_symbols - self.answers.keys()
            self.answers |= {s: v for s in symbols if (v := self.ask(s)) is not None}
            return self.known(expression)

        def value(self, expression: Any) -> Any:
            value = expression.subs({s: self.answers[s] for s in expression.free_symbols})
            return bool(value) if value.is_Boolean else int(value) if value.is_Integer else float(value)

    return Sizes


def _in_order(expression: Any) -> Any:
    """The equality of two sides, of which an equality or inequality tells."""
    return private("torch.fx.experimental.symbolic_shapes.sympy.Eq")(*sorted(expression.args, key=str), evaluate=False)


def unknown_size(mode: Any, largest: int | None = None) -> Any:
    """A size that depends on data."""
    size = mode.shape_env.create_unbacked_symint()
    private("torch.fx.experimental.symbolic_shapes._constrain_range_for_size")(size, min=0, max=largest)
    return size


def _refuse(op: Any) -> NoReturn:
    raise private("torch._subclasses.fake_tensor.DynamicOutputShapeException")(op)


def _ctc_loss(
    mode: Any, log_probs: Tensor, targets: Tensor, input_lengths: Any, target_lengths: Any, *others: Any
) -> tuple[Tensor, Tensor]:
    time, batch, _ = log_probs.shape
    longest = unknown_size(mode) if isinstance(target_lengths, Tensor) else max(target_lengths)
    return log_probs.new_empty(batch), log_probs.new_empty(batch, time, 2 * longest + 1)


def _ctc_loss_backward(mode: Any, gradient: Tensor, log_probs: Tensor, *others: Any) -> Tensor:
    return log_probs.new_empty(log_probs.shape)


def _lstsq(
    mode: Any, a: Tensor, b: Tensor, rcond: float | None = None, *, driver: str | None = None
) -> tuple[Tensor, ...]:
    """As on CPUs: LAPACK leaves solutions in the columns of the right-hand sides."""
    if not a.is_cpu:
        _refuse(torch.ops.aten.linalg_lstsq.default)
    *batch, rows, columns = a.shape
    is_vector = b.dim() == 1 or (a.dim() - 1 == b.dim() and b.shape == a.shape[:-1])
    sides = 1 if is_vector else b.shape[-1]
    batch = list(torch.broadcast_shapes(batch, b.shape[: -1 if is_vector else -2]))
    driver, longest = driver or "gelsy", max(rows, columns)
    strides = list(a.new_empty((*batch, sides, longest), device="meta").stride())
    solution = a.new_empty_strided((*batch, columns, sides), (*strides[:-2], 1, longest))
    has_values = driver in ("gelsd", "gelss")
    if has_values and rows > columns:  # there are no residuals if a rank is not full
        _refuse(torch.ops.aten.linalg_lstsq.default)
    residuals = (*batch, sides) if rows > columns and driver == "gels" else (0,)
    real = a.dtype.to_real()
    return (
        solution.squeeze(-1) if is_vector else solution,
        a.new_empty(residuals, dtype=real),
        a.new_empty(batch if driver != "gels" else (0,), dtype=torch.int64),
        a.new_empty((*batch, min(rows, columns)) if has_values else (0,), dtype=real),
    )
