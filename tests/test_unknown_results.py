"""Operators whose results have sizes that depend on values, or that check values, and for which torch has no rule."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from primexec import CaptureError, make_traced

EXECUTORS = ["aten", ("llvm", "aten")]


def alike(found: Any, expected: Any) -> None:
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, equal_nan=True)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    ("reduction", "form"),
    [("mean", "tensors"), ("sum", "tensors"), ("none", "tensors"), ("mean", "tuples"), ("mean", "one")],
)
def test_ctc_loss(executor: Any, reduction: str, form: str) -> None:
    loss = nn.CTCLoss(reduction=reduction, zero_infinity=True)
    traced = make_traced(loss, executor=executor)
    for longest in (3, 5, 2):
        lengths: Any = (torch.tensor([9, 8]), torch.tensor([longest, 1]))
        logits = torch.randn(9, 2, 4)
        targets = torch.randint(1, 4, (2, 5))
        if form == "tuples":
            lengths = ((9, 8), (5, 1))
        elif form == "one":
            logits, targets, lengths = logits[:, 0], targets[0], (torch.tensor(longest + 4), torch.tensor(5))
        results = []
        for fn in (traced, loss):
            x = logits.clone().requires_grad_()
            value = fn(x.log_softmax(-1), targets, *lengths)
            value.sum().backward()
            results.append((value, x.grad))
        alike(*results)
    assert traced.cache_info().traces == 1


def test_ctc_loss_raises_as_eager() -> None:
    traced = make_traced(nn.CTCLoss())
    args = (torch.randn(4, 1, 3).log_softmax(-1), torch.ones(1, 2, dtype=torch.int64), torch.tensor([4]))
    traced(*args, torch.tensor([2]))
    with pytest.raises(RuntimeError, match="Expected tensor to have size at least 3"):
        traced(*args, torch.tensor([3]))


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("driver", [None, "gels", "gelsd"])
@pytest.mark.parametrize("shapes", [((5, 3), (5, 2)), ((2, 3, 3), (2, 3)), ((2, 3, 4), (1, 3, 2)), ((1, 5, 3), (1, 5))])
def test_least_squares(executor: Any, driver: str | None, shapes: Any) -> None:
    def fn(a: Tensor, b: Tensor) -> Any:
        return tuple(torch.linalg.lstsq(a, b, driver=driver))

    rows, columns = shapes[0][-2:]
    traced = make_traced(fn, executor=executor)
    a, b = (torch.randn(shape, dtype=torch.float64) for shape in shapes)  # LAPACK rounds by addresses
    if driver == "gelsd" and rows > columns:  # whether there are residuals depends on ranks
        with pytest.raises(CaptureError, match="depends on the values of its inputs"):
            traced(a, b)
        return
    for x in (a, a * 2):
        alike(traced(x, b), fn(x, b))
    assert traced.cache_info().traces == 1


@pytest.mark.parametrize("executor", EXECUTORS)
def test_gradients_of_least_squares(executor: Any) -> None:
    def fn(a: Tensor, b: Tensor) -> Tensor:
        return torch.linalg.lstsq(a, b).solution

    results = []
    a, b = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 2, dtype=torch.float64)  # LAPACK rounds by addresses
    for run in (make_traced(fn, executor=executor), fn):
        leaves = (a.clone().requires_grad_(), b.clone().requires_grad_())
        run(*leaves).square().sum().backward()
        results.append(tuple(t.grad for t in leaves))
    alike(*results)


@pytest.mark.parametrize("executor", EXECUTORS)
def test_inverse_spectrogram(executor: Any) -> None:
    def fn(x: Tensor, window: Tensor) -> Tensor:
        frames = torch.stft(x, 32, window=window, return_complex=True)
        return torch.istft(frames * 2, 32, window=window, length=x.shape[-1]) + frames.abs().mean()

    traced = make_traced(fn, executor=executor)
    for window in (torch.hann_window(32), torch.hamming_window(32)):
        results = []
        signal = torch.randn(2, 200)
        for run in (traced, fn):
            x = signal.clone().requires_grad_()
            value = run(x, window)
            value.square().mean().backward()
            results.append((value, x.grad))
        alike(*results)
    for run in (traced, fn):
        with pytest.raises(RuntimeError, match="window overlap add min: 1"):
            run(signal, torch.zeros(32))
    assert traced.cache_info().traces == 2  # with gradients, and without


@pytest.mark.parametrize("executor", ["aten", ("llvm", "aten")], ids=str)
def test_a_result_that_is_a_view_of_unknown_size(executor: Any) -> None:
    """A linear layer ends with a view of its product, which has as many rows as the mask has."""

    def visible(x: Tensor, mask: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return nn.functional.linear(x[mask].reshape(2, -1, 8), w, b)

    traced = make_traced(visible, executor=executor)
    for count in (2, 3, 0):
        given = [torch.randn(shape) for shape in ((2, 5, 8), (4, 8), (4,))]
        mask = (torch.arange(5) < count).expand(2, -1)
        mine, own = ([t.clone().requires_grad_() for t in given] for _ in range(2))
        got, expected = (run(x, mask, w, b) for run, (x, w, b) in ((traced, mine), (visible, own)))
        torch.testing.assert_close(got, expected, check_stride=True)
        assert got._is_view() == expected._is_view()
        for result in (got, expected):
            result.square().sum().backward()
        torch.testing.assert_close([t.grad for t in mine], [t.grad for t in own])
    assert traced.cache_info().traces == 1


def chosen(values: Tensor, order: Tensor) -> Tensor:
    return values[order[order > 0]]


SIZES = [  # what is made of a tensor of unknown size, and how many programs that takes where the size changes
    (lambda b: (b.shape[0], b.numel() + 1, {"any": b.numel() > 0, "half": b.size(0) / 2}), 1),
    (lambda b: b * (b.size(0) / 3), 1),
    (lambda b: b * float(b.size(0) / 3), 2),
    (lambda b: b * b.size(0) ** -0.5, 2),
    (lambda b: b * (b.sum().item() / b.size(0)), 2),
    (lambda b: torch.cdist(b, b).flatten(), 1),
    (lambda b: torch.cartesian_prod(b[:, 0], b[:, 1]), 1),
    (lambda b: torch.max(b.new_ones(1, 1, 2), b[None, :, :2]), 1),
    (lambda b: b.quantile(0.5, dim=0), 1),
    (lambda b: b.fill_diagonal_(0), 2),
]


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(("made", "traces"), SIZES)
def test_sizes_in_results_and_arithmetic(executor: Any, made: Any, traces: int) -> None:
    def fn(x: Tensor, order: Tensor) -> Any:
        return made(chosen(x, order))

    traced = make_traced(fn, executor=executor)
    for shift in (0, 1, 0, 1):
        x, order = torch.randn(6, 4), torch.arange(6) - shift
        torch.testing.assert_close(traced(x, order), fn(x, order))
    assert traced.cache_info().traces == traces


def test_a_size_is_assigned() -> None:
    class Counted(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            kept = x[x > 0]
            self.kept, self.some = len(kept.new_zeros(kept.shape[0])), kept.numel() > 0
            return kept.sum()

    eager, module = Counted(), Counted()
    traced = make_traced(module)
    for values in ([1.0, 2.0], [3.0, -1.0], [4.0, 5.0]):
        torch.testing.assert_close(traced(torch.tensor(values)), eager(torch.tensor(values)))
        assert (module.kept, module.some) == (eager.kept, eager.some)


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize(
    "use",
    [
        lambda part, n: nn.functional.pad(part, (0, 0, 0, 6 - part.size(0))) * 2,
        lambda part, n: part.repeat(part.size(0), 1),
        lambda part, n: torch.pow(part, exponent=part.size(0)) + part ** (1 + len(part)),
        lambda part, n: torch.pow(part, n.item()) + (part.size(0) + 1) ** part,
        lambda part, n: (part * 2).pow_(n.item()),
    ],
)
def test_ints_that_formulas_compare(use: Any, executor: Any) -> None:
    def fn(x: Tensor, n: Tensor) -> Any:
        return use(x[torch.arange(6) < n], n)

    traced = make_traced(fn, executor=executor)
    for count in (3, 2, 4, 6, 0, 1, 3, 2):  # a program for each
        results = []
        for run in (traced, fn):
            x = torch.linspace(-2, 2, 24).view(6, 4).requires_grad_()
            out = run(x, torch.tensor(count))
            out.sum().backward()
            results.append((out, x.grad))
        alike(*results)
    assert traced.cache_info().traces == 6


def test_refusals_say_what_to_do() -> None:
    def linearized(x: Tensor) -> Any:
        out, tangent = torch.func.linearize(torch.sin, x)
        return out, tangent(x)

    with pytest.raises(CaptureError, match=r"call linearize\(\) outside of the traced function"):
        make_traced(linearized)(torch.ones(3))
    weight = nn.Parameter(torch.ones(3))

    def differentiated(x: Tensor) -> Tensor:
        weight.grad = torch.func.grad(lambda w: (w * x).square().sum())(weight)
        return x * 2

    with pytest.raises(
        CaptureError, match=r"requires grad itself in weight .*\n.* in .*differentiated\n.*torch.func.grad"
    ):
        make_traced(differentiated)(torch.ones(3))
    assert weight.grad is None


VALUES = [[1.0, -2, 3, 4], [-1.0, 2, -3, -4], [1.0, 2, 3, -4], [-1.0, -2, -3, -4], [2.0, -1, 3, -4]]

# What becomes of sizes that are 1: dimensions vanish, and others take their place.
ONES: dict[str, Any] = {
    "squeeze": lambda x: (x > 0).nonzero().squeeze().ndim,
    "squeeze a dimension": lambda x: x[x > 0].squeeze(0) * 2,
    "squeeze dimensions": lambda x: (x[x > 0] * 2)[:, None].squeeze((0, 1)).exp().dim(),
    "squeeze in place": lambda x: (x[x > 0] * 2).squeeze_().exp(),
    "squeezed places": lambda x: x[(x > 0).nonzero().squeeze()] * 2,
    "two sizes": lambda x: (x[x > 0] + x[x < 0]).sin(),
    "their sum's size": lambda x: (x[x > 0] + x[x < 0]).shape[0],
    "a known size": lambda x: (torch.arange(4.0) * x[x > 0]).sum(0),
    "masked_select": lambda x: torch.masked_select(x, x > 0) * torch.arange(1.0, 5.0),
    "expand": lambda x: x[x > 0].expand(4) * 2,
    "outer": lambda x: (x[x > 0][:, None] * x[x < 0][None]).squeeze(),
}


@pytest.mark.parametrize("executor", EXECUTORS)
@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("name", ONES)
def test_sizes_that_are_one(name: str, first: int, executor: Any) -> None:
    fn = ONES[name]
    traced = make_traced(fn, executor=executor)
    for values in VALUES[first:] * 2:
        results = []
        for function in (traced, fn):
            x = torch.tensor(values, requires_grad=True)
            try:
                out = function(x)
            except RuntimeError as error:
                results.append((torch.zeros(len(str(error))),))
                continue
            if not isinstance(out, Tensor):
                results.append((torch.tensor(out),))
                continue
            out.sum().backward() if out.requires_grad else None
            results.append((out, torch.tensor(0) if x.grad is None else x.grad))
        alike(*results)


def test_sizes_that_are_never_one_cost_one_trace() -> None:
    traced = make_traced(lambda x: (x > 0).nonzero().squeeze())
    for n in (3, 2, 4, 1, 0, 1):
        x = torch.arange(6.0) - 6 + n + 0.5
        assert torch.equal(traced(x), (x > 0).nonzero().squeeze())
    assert traced.cache_info().traces == 2


def test_adaptive_softmax() -> None:
    torch.manual_seed(0)
    loss = nn.AdaptiveLogSoftmaxWithLoss(64, 12, [4, 8])
    traced = make_traced(loss)
    for targets in ([1, 5, 9, 2, 6, 11], [0, 1, 2, 3, 7, 10], [0, 0, 0, 0, 0, 0], [1, 4, 5, 6, 7, 9]):
        x, results = torch.randn(6, 64), []
        for fn in (traced, loss):
            loss.zero_grad()
            out = fn(x, torch.tensor(targets))
            out.loss.backward()
            results.append((out.output, *(p.grad for p in loss.parameters() if p.grad is not None)))
        alike(*results)
