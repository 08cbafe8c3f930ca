"""Random draws: eager's numbers, and eager's generator state afterwards."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.programs.table import Call, Family, draw, tensors

FAMILY = Family("random")
X = tensors((3, 4))

DRAWS: dict[str, Callable[[Tensor], Any]] = {
    "rand": lambda x: torch.rand(3, 4) + x,
    "randn": lambda x: torch.randn(3, 4) + x,
    "randint": lambda x: torch.randint(0, 10, (3, 4)) + x,
    "randint_low": lambda x: torch.randint(5, (2,)),
    "randperm": lambda x: x[:, torch.randperm(4)],
    "rand_like": lambda x: torch.rand_like(x),
    "randn_like": lambda x: torch.randn_like(x, dtype=torch.float64),
    "randint_like": lambda x: torch.randint_like(x, 3),
    "bernoulli": lambda x: torch.bernoulli(x.sigmoid()),
    "bernoulli_p": lambda x: torch.bernoulli(x, 0.3),
    "multinomial": lambda x: torch.multinomial(x.softmax(-1), 2),
    "multinomial_replacement": lambda x: x.softmax(-1).multinomial(6, replacement=True),
    "normal": lambda x: torch.normal(x, x.abs() + 1),
    "normal_floats": lambda x: torch.normal(2.0, 3.0, (3,)),
    "normal_mean": lambda x: torch.normal(x, 0.5),
    "normal_std": lambda x: torch.normal(0.5, x.abs()),
    "poisson": lambda x: torch.poisson(x.abs() * 4),
    "uniform_": lambda x: x.uniform_(),
    "normal_": lambda x: x.normal_(1, 2),
    "exponential_": lambda x: x.exponential_(0.5),
    "geometric_": lambda x: x.geometric_(0.3),
    "cauchy_": lambda x: x.cauchy_(),
    "log_normal_": lambda x: x.log_normal_(),
    "random_": lambda x: x.random_(0, 50),
    "bernoulli_tensor_": lambda x: x.bernoulli_(torch.full((3, 4), 0.5)),
    "dropout": lambda x: F.dropout(x, 0.4),
    "dropout_inplace": lambda x: F.dropout(x, 0.4, inplace=True),
    "dropout_half": lambda x: F.dropout(x),
    "dropout_all": lambda x: F.dropout(x, 1.0),
    "dropout_none": lambda x: F.dropout(x, 0.0),
    "dropout1d": lambda x: F.dropout1d(x, 0.5),
    "alpha_dropout": lambda x: F.alpha_dropout(x, 0.5, training=True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x, hard=True),
    "dead_draw": lambda x: (torch.rand(5), x + 1)[1],
    "draw_into_view": lambda x: (x[1].uniform_(), x * 2),
    "draw_twice": lambda x: (torch.rand(2), torch.rand(2)),
    "draw_in_order": lambda x: (torch.rand(2), torch.randn(3), torch.randperm(4), x.bernoulli_(0.5)),
    "draw_empty": lambda x: torch.rand(0),
    "rand_out": lambda x: torch.rand(3, 4, out=x),
    "init": lambda x: nn.init.xavier_uniform_(x),
    "trunc_normal": lambda x: nn.init.trunc_normal_(x),
    "half": lambda x: torch.randn(8, dtype=torch.bfloat16),
    "double": lambda x: torch.rand(8, dtype=torch.float64),
    "complex": lambda x: torch.randn(4, dtype=torch.complex64),
    "large": lambda x: torch.randn(50, 50).sum(0),
    "in_loop": lambda x: [torch.rand(()) * k for k in range(4)],
    "attention_dropout": lambda x: F.scaled_dot_product_attention(x[None], x[None], x[None], dropout_p=0.5),
    "feature_dropout": lambda x: F.feature_alpha_dropout(x, 0.5, training=True),
    "sampled_softmax": lambda x: torch.distributions.Categorical(logits=x, validate_args=False).sample(),
}
for name, function in DRAWS.items():
    # Sampling from a truncated normal repeats until every value is accepted.
    FAMILY.add(name, function, X, calls=4, either=name == "trunc_normal")


def generator(i: int) -> torch.Generator:
    return torch.Generator().manual_seed(500 + i)


WITH_GENERATOR: dict[str, Callable[[Tensor, torch.Generator], Any]] = {
    "rand": lambda x, g: torch.rand(3, generator=g),
    "randn": lambda x, g: torch.randn(3, 4, generator=g) + x,
    "randint": lambda x, g: torch.randint(0, 9, (3,), generator=g),
    "randperm": lambda x, g: torch.randperm(4, generator=g),
    "normal_": lambda x, g: x.normal_(generator=g),
    "normal_of_a_new_tensor": lambda x, g: x + torch.empty_like(x).normal_(generator=g),
    "bernoulli": lambda x, g: torch.bernoulli(x.sigmoid(), generator=g),
    "multinomial": lambda x, g: torch.multinomial(x.softmax(-1), 2, generator=g),
    "both": lambda x, g: (torch.rand(2), torch.rand(2, generator=g), torch.rand(2)),
    "unused": lambda x, g: x + 1,
}
for name, function in WITH_GENERATOR.items():
    FAMILY.add(f"generator_{name}", function, lambda i: (draw(i, 3, 4), generator(i)))
FAMILY.add(
    "generator_keyword",
    lambda x, *, rng=None: torch.randn(3, generator=rng) + x,
    lambda i: Call((draw(i, 3),), {"rng": generator(i)}),
)
FAMILY.add(
    "generator_or_none",
    lambda x, g=None: torch.rand(3, generator=g) + x,
    lambda i: (draw(i, 3), generator(i)) if i % 2 else (draw(i, 3),),
    calls=4,
    traces_at=(0, 1),
)
FAMILY.add(
    "two_generators",
    lambda g, h: (torch.rand(2, generator=g), torch.rand(2, generator=h), torch.rand(2, generator=g)),
    lambda i: (generator(i), generator(i + 20)),
)
FAMILY.add(
    "one_generator_twice",
    lambda g, h: (torch.rand(2, generator=g), torch.rand(2, generator=h), torch.rand(2, generator=g)),
    lambda i: (lambda g: (g, g))(generator(i)),
)


@FAMILY.factory(X)
def generator_in_closure() -> Any:
    """Its numbers go on from call to call."""
    held = torch.Generator().manual_seed(3)
    return lambda x: torch.randn(3, 4, generator=held) + x


class Noise(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.register_buffer("last", torch.zeros(3, 4))

    def forward(self, x: Tensor) -> Tensor:
        noise = torch.randn_like(x) if self.training else torch.zeros_like(x)
        self.last.copy_(noise)
        return self.linear(x + noise)


MODULES: dict[str, Callable[[], nn.Module]] = {
    "dropout": lambda: nn.Dropout(0.3),
    "dropout_inplace": lambda: nn.Dropout(0.3, inplace=True),
    "dropout_in_sequence": lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(), nn.ReLU(), nn.Dropout(0.1)),
    "noise": Noise,
    "lstm_dropout": lambda: nn.LSTM(4, 3, num_layers=2, dropout=0.5),
}
for name, make in MODULES.items():
    FAMILY.add_factory(f"{name}_train", make, X, contexts=(torch.no_grad,))
    FAMILY.add_factory(f"{name}_eval", lambda make=make: make().eval(), X, contexts=(torch.no_grad,))
    FAMILY.add_factory(
        f"{name}_toggled",
        make,
        X,
        calls=4,
        traces_at=(0, 1),
        contexts=(torch.no_grad,),
        before=lambda module, i: module.train(i % 2 == 1),
    )
FAMILY.add(
    "dropout_on_and_off",
    lambda x, on: F.dropout(x, 0.5, on),
    lambda i: (draw(i, 3), i % 2 == 0),
    calls=4,
    traces_at=(0, 1),
)


@FAMILY.program(X)
def fork_rng(x: Tensor) -> Tensor:
    """What is drawn between two draws of one shape is drawn again in the same order."""
    a = torch.rand(3, 4)
    x.mul_(a)
    b = torch.rand(3, 4)
    return a - b + x
