"""Draws from a random generator: the same seed gives eager's numbers, and every draw moves the generator."""

from primexec.prims.base import ANY, FLOATS, REALS, Prim

_LIKE = "a → a's shape; a's values are not read"
_SIZE = "size → size"
_DTYPE = "dtype, else the default one"
_SAME = "the argument's dtype"


def _row(op: str, meaning: str, shapes: str, dtypes: str = FLOATS, promotion: str = _SAME) -> Prim:
    return Prim(op, "random", meaning, shapes, dtypes, promotion, effects="random", deterministic=False)


ROWS = (
    _row("aten.rand.default", "Uniform over [0, 1).", _SIZE, promotion=_DTYPE),
    _row("aten.randn.default", "Standard normal.", _SIZE, promotion=_DTYPE),
    _row(
        "aten.randint.low",
        "Uniform over the integers from low to high, high left out.",
        "low, high, size → size",
        REALS,
        "dtype, else int64",
    ),
    _row("aten.randperm.default", "A permutation of 0 to n - 1.", "n → (n,)", REALS, "dtype, else int64"),
    _row("aten.uniform.default", "Uniform over [from, to).", _LIKE),
    _row("aten.normal_functional.default", "Normal with the given mean and standard deviation.", _LIKE),
    _row("aten.bernoulli.default", "1 with the probability that the argument holds, else 0.", "p → p's shape"),
    _row("aten.bernoulli.p", "1 with probability p, else 0.", _LIKE, ANY),
    _row("aten.exponential.default", "Exponential with rate lambd.", _LIKE),
    _row("aten.geometric.default", "The number of trials until the first success of probability p.", _LIKE, REALS),
    _row("aten.cauchy.default", "Cauchy with the given median and scale.", _LIKE),
    _row("aten.log_normal.default", "exp of a normal number with the given mean and standard deviation.", _LIKE),
    _row("aten.random.from", "Uniform over the integers from `from` to `to`, `to` left out.", _LIKE, REALS),
    _row(
        "aten.multinomial.default",
        "Indices drawn with probabilities in proportion to the weights of each row.",
        "(n,) or (m, n), num_samples → (num_samples,) or (m, num_samples)",
        FLOATS,
        "int64",
    ),
    _row("aten.poisson.default", "Poisson with the rate that the argument holds.", "rate → rate's shape"),
    _row(
        "aten.binomial.default",
        "The number of successes in count trials of probability prob.",
        "count, prob → the same",
    ),
)
