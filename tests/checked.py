"""Functions that check the values of their argument; apart from the tests, whose `assert` pytest rewrites."""

import torch
from torch import Tensor, nn


class TooLargeError(Exception):
    """A class that its module names."""


def assert_without_text(x: Tensor) -> Tensor:
    assert (x < 100).all()
    return x + 1


def assert_with_text(x: Tensor) -> Tensor:
    bound = 100
    assert (x < bound).all(), f"not below {bound}: {x.shape}, {x.dtype}"
    return x + 1


def negated(x: Tensor) -> Tensor:
    if not x.max() < 100:
        raise ValueError("too large")
    return x + 1


def second_of_two(x: Tensor) -> Tensor:
    if x.ndim == 2 and (x.min() < -100 or x.max() > 100):
        raise TooLargeError
    return x + 1


def after_a_write(x: Tensor) -> Tensor:
    x.mul_(2)
    with torch.no_grad():
        if torch.any(x > 100):
            raise TooLargeError("doubled")
    return x.add_(1)


def inside_of_torch(x: Tensor) -> Tensor:
    return nn.functional.gaussian_nll_loss(x, x, 100 - x)


def caught_by_the_function(x: Tensor) -> Tensor:
    try:
        return negated(x)
    except ValueError:
        return x


def both_sides_raise(x: Tensor) -> Tensor:
    if x.max() < 100:
        raise ValueError("small")
    raise ValueError("large")


def text_of_a_value(x: Tensor) -> Tensor:
    if x.max() > 100:
        raise ValueError(f"{x.dim()}: {x.max():.2f} of {list(x)!r} in {x.shape}")
    return x


def text_after_a_write(x: Tensor) -> Tensor:
    x.mul_(2)
    if x.max() > 100:
        raise ValueError(f"{x.dim()}: {x.max():.2f} of {list(x)!r} in {x.shape}")
    return x


def local_class(x: Tensor) -> Tensor:
    class LocalError(Exception):
        pass

    if x.max() > 100:
        raise LocalError("too large")
    return x


def more_than_a_raise(x: Tensor) -> Tensor:
    if x.max() > 100:
        x = x.clone()
        raise ValueError("too large")
    return x
