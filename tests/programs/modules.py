"""Modules: of torch.nn, containers, hooks, parametrizations, shared parts, and how they are used."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize
from torch.nn.utils.parametrizations import orthogonal, spectral_norm, weight_norm

from tests.programs.table import Call, Family, Inputs, draw, tensors

FAMILY = Family("modules")
X = tensors((3, 4))
IMAGE = tensors((2, 3, 8, 8))
SEQUENCE = tensors((2, 5, 8))
GRADLESS = (torch.no_grad,)


def tokens(i: int) -> tuple[Tensor]:
    return (draw(i, 2, 5, dtype=torch.int64).abs(),)


def mask(i: int) -> Tensor:
    """A causal mask, which eager recognises, and others by turns."""
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    return causal if i % 2 == 0 else causal.roll(i, 0)


LIBRARY: dict[str, tuple[Callable[[], nn.Module], Inputs]] = {
    "linear": (lambda: nn.Linear(4, 5), X),
    "linear_no_bias": (lambda: nn.Linear(4, 5, bias=False), X),
    "bilinear": (lambda: nn.Bilinear(4, 4, 3), tensors((3, 4), (3, 4))),
    "conv1d": (lambda: nn.Conv1d(8, 3, 2), tensors((2, 8, 5))),
    "conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1, stride=2), IMAGE),
    "conv2d_grouped": (lambda: nn.Conv2d(4, 8, 3, groups=2, dilation=2), tensors((1, 4, 9, 9))),
    "conv2d_circular": (lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="circular"), IMAGE),
    "conv2d_same": (lambda: nn.Conv2d(3, 4, 3, padding="same"), IMAGE),
    "conv_transpose": (lambda: nn.ConvTranspose2d(3, 4, 3, stride=2), IMAGE),
    "max_pool": (lambda: nn.MaxPool2d(2, return_indices=True), IMAGE),
    "avg_pool": (lambda: nn.AvgPool2d(3, stride=2, ceil_mode=True), IMAGE),
    "adaptive_pool": (lambda: nn.AdaptiveAvgPool2d((3, None)), IMAGE),
    "upsample": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), IMAGE),
    "pixel_shuffle": (lambda: nn.PixelShuffle(2), tensors((1, 4, 3, 3))),
    "layer_norm": (lambda: nn.LayerNorm(4), X),
    "rms_norm": (lambda: nn.RMSNorm(4), X),
    "group_norm": (lambda: nn.GroupNorm(2, 4), tensors((2, 4, 3))),
    "local_response_norm": (lambda: nn.LocalResponseNorm(2), IMAGE),
    "embedding": (lambda: nn.Embedding(10, 3, padding_idx=0), tokens),
    "embedding_max_norm": (lambda: nn.Embedding(10, 3, max_norm=0.5), tokens),
    "embedding_bag": (lambda: nn.EmbeddingBag(10, 3), tokens),
    "flatten": (lambda: nn.Flatten(), IMAGE),
    "unfold": (lambda: nn.Unfold(2), IMAGE),
    "identity": (lambda: nn.Identity(), X),
    "relu_inplace": (lambda: nn.ReLU(inplace=True), X),
    "gelu_tanh": (lambda: nn.GELU(approximate="tanh"), X),
    "softmax": (lambda: nn.Softmax(-1), X),
    "prelu": (lambda: nn.PReLU(), X),
    "cross_entropy": (lambda: nn.CrossEntropyLoss(), lambda i: (draw(i, 3, 4), torch.tensor([0, 3, 1]))),
    "lstm": (lambda: nn.LSTM(8, 4, batch_first=True), SEQUENCE),
    "lstm_bidirectional": (lambda: nn.LSTM(8, 4, num_layers=2, bidirectional=True), SEQUENCE),
    "lstm_with_state": (
        lambda: nn.LSTM(8, 4, batch_first=True),
        lambda i: (draw(i, 2, 5, 8), (draw(i + 1, 1, 2, 4), draw(i + 2, 1, 2, 4))),
    ),
    "gru": (lambda: nn.GRU(8, 4, batch_first=True), SEQUENCE),
    "rnn": (lambda: nn.RNN(8, 4, nonlinearity="relu"), SEQUENCE),
    "lstm_cell": (lambda: nn.LSTMCell(4, 3), X),
    "attention": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True).eval(),
        lambda i: (draw(i, 2, 5, 8),) * 3,
    ),
    "attention_train": (lambda: nn.MultiheadAttention(8, 2), lambda i: (draw(i, 2, 5, 8),) * 3),
    "attention_masked": (
        lambda: nn.MultiheadAttention(8, 2, batch_first=True).eval(),
        lambda i: Call((draw(i, 2, 5, 8),) * 3, {"attn_mask": torch.ones(5, 5).triu(1).bool(), "need_weights": False}),
    ),
    "encoder_layer": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval(), SEQUENCE),
    "encoder_layer_train": (lambda: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), SEQUENCE),
    "decoder_layer": (
        lambda: nn.TransformerDecoderLayer(8, 2, 16, batch_first=True).eval(),
        tensors((2, 5, 8), (2, 3, 8)),
    ),
    "encoder": (
        lambda: nn.TransformerEncoder(
            nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        ).eval(),
        SEQUENCE,
    ),
    "encoder_masked": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16), 2, enable_nested_tensor=False),
        lambda i: Call((draw(i, 5, 2, 8),), {"mask": mask(i)}),
    ),
    "encoder_masked_eval": (
        lambda: nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, batch_first=True), 2).eval(),
        lambda i: Call((draw(i, 2, 5, 8),), {"mask": mask(i)}),
    ),
    "decoder_masked": (
        lambda: nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, 16, batch_first=True), 1),
        lambda i: Call((draw(i, 2, 5, 8), draw(i + 9, 2, 3, 8)), {"tgt_mask": mask(i)}),
    ),
    "transformer_masked": (
        lambda: nn.Transformer(8, 2, 1, 1, 16, batch_first=True).eval(),
        lambda i: Call((draw(i, 2, 5, 8), draw(i + 9, 2, 5, 8)), {"src_mask": mask(i), "tgt_mask": mask(i).isinf()}),
    ),
    "double": (lambda: nn.Linear(4, 5).double(), tensors((3, 4), dtype=torch.float64)),
    "half": (lambda: nn.Linear(4, 5).bfloat16(), tensors((3, 4), dtype=torch.bfloat16)),
    "channels_last": (
        lambda: nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last),
        lambda i: (draw(i, 2, 3, 8, 8).to(memory_format=torch.channels_last),),
    ),
    "weight_norm": (lambda: weight_norm(nn.Linear(4, 5)), X),
    "orthogonal": (lambda: orthogonal(nn.Linear(4, 4)), X),
    "spectral_norm_eval": (lambda: spectral_norm(nn.Linear(4, 5)).eval(), X),
    "sequential": (lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Sequential(nn.Linear(8, 2))), X),
    "empty_sequential": (lambda: nn.Sequential(), X),
}
for name, (make, inputs) in LIBRARY.items():
    FAMILY.add_factory(name, make, inputs, contexts=GRADLESS)
    FAMILY.add_factory(f"{name}_inference", make, inputs, contexts=(torch.inference_mode,))
FAMILY.add_factory("spectral_norm_train", lambda: spectral_norm(nn.Linear(4, 5)), X, contexts=GRADLESS)
FAMILY.add_factory(
    "conv_autocast",
    lambda: nn.Conv2d(3, 4, 3).requires_grad_(False),
    IMAGE,
    contexts=(lambda: torch.autocast("cpu", dtype=torch.bfloat16),),
)
FAMILY.add_factory(
    "linear_autocast_no_grad",
    lambda: nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4)),
    X,
    contexts=(lambda: NoGradAutocast(),),
)

ATTENTION: dict[str, Callable[[Tensor], Any]] = {
    "plain": lambda q: F.scaled_dot_product_attention(q, q, q),
    "causal": lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True),
    "scaled": lambda q: F.scaled_dot_product_attention(q, q, q, scale=0.1),
    "masked": lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=torch.ones(5, 5, dtype=torch.bool).tril()),
    "additive": lambda q: F.scaled_dot_product_attention(q, q, q, attn_mask=torch.zeros(5, 5).fill_diagonal_(-9)),
    "transposed": lambda q: F.scaled_dot_product_attention(q.transpose(1, 2), q.transpose(1, 2), q.transpose(1, 2)),
}
for name, function in ATTENTION.items():
    FAMILY.add(f"sdpa_{name}", function, tensors((2, 3, 5, 8)))
    FAMILY.add(f"sdpa_{name}_half", function, tensors((2, 3, 5, 8), dtype=torch.bfloat16))


class NoGradAutocast:
    def __enter__(self) -> None:
        self.modes = torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16)
        for mode in self.modes:
            mode.__enter__()

    def __exit__(self, *error: Any) -> None:
        for mode in reversed(self.modes):
            mode.__exit__(*error)


class Net(nn.Module):
    """Submodules in containers, plain attributes, and a method besides forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(3))
        self.heads = nn.ModuleDict({"a": nn.Linear(4, 2), "b": nn.Linear(4, 3)})
        self.weights = nn.ParameterList([nn.Parameter(draw(1, 4)), nn.Parameter(draw(2, 4))])
        self.named = nn.ParameterDict({"gain": nn.Parameter(draw(3, 4))})
        self.config = {"residual": True, "scale": 0.5}
        self.activation = F.relu
        self.depth = 3

    def forward(self, x: Tensor, head: str = "a", *, hidden: bool = False) -> Any:
        states = []
        for layer in self.layers[: self.depth]:
            y = self.activation(layer(x))
            x = x + y * self.config["scale"] if self.config["residual"] else y
            states.append(x)
        x = self.finish(x)
        return (self.heads[head](x), states) if hidden else self.heads[head](x)

    def finish(self, x: Tensor) -> Tensor:
        for weight in self.weights:
            x = x * weight
        return x + self.named["gain"]


class Shared(nn.Module):
    """One submodule under two names, run twice."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.second = self.first
        self.norm = nn.BatchNorm1d(4)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.norm(self.first(x))))


class Symmetric(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return weight.triu() + weight.triu(1).t()


def parametrized() -> nn.Module:
    layer = nn.Linear(4, 4)
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def hooked(register: Callable[[nn.Module], Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        module = nn.Sequential(nn.Linear(4, 4), nn.ReLU())
        register(module)
        return module

    return make


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward": lambda m: m.register_forward_hook(lambda module, args, out: out * 2),
    "forward_none": lambda m: m.register_forward_hook(lambda module, args, out: None),
    "forward_writes": lambda m: m.register_forward_hook(lambda module, args, out: out.add_(1)),
    "forward_inner": lambda m: m[0].register_forward_hook(lambda module, args, out: out + args[0]),
    "forward_kwargs": lambda m: m.register_forward_hook(lambda module, args, kwargs, out: -out, with_kwargs=True),
    "forward_pre": lambda m: m.register_forward_pre_hook(lambda module, args: (args[0] + 1,)),
    "forward_pre_inner": lambda m: m[1].register_forward_pre_hook(lambda module, args: args[0] - 0.5),
    "two": lambda m: (
        m.register_forward_hook(lambda module, args, out: out + 1),
        m.register_forward_hook(lambda module, args, out: out * 2, prepend=True),
    ),
}
for name, register in HOOKS.items():
    FAMILY.add_factory(f"hook_{name}", hooked(register), X, contexts=GRADLESS)


def add_hook(module: nn.Module, i: int) -> None:
    if i == 1:
        module.register_forward_hook(lambda module, args, out: out + 100)


FAMILY.add_factory("hook_added_later", hooked(lambda m: None), X, contexts=GRADLESS, before=add_hook, traces_at=(0, 1))
FAMILY.add_factory("containers", Net, X, contexts=GRADLESS)
FAMILY.add_factory("keywords", Net, lambda i: Call((draw(i, 3, 4),), {"head": "b", "hidden": True}), contexts=GRADLESS)
FAMILY.add_factory(
    "head_changes", Net, lambda i: (draw(i, 3, 4), "ab"[i % 2]), contexts=GRADLESS, calls=4, traces_at=(0, 1)
)
FAMILY.add_factory("other_method", lambda: Net().finish, X, contexts=GRADLESS)
FAMILY.add_factory("shared", Shared, X, contexts=GRADLESS)
FAMILY.add_factory("shared_eval", lambda: Shared().eval(), X, contexts=GRADLESS)
FAMILY.add_factory("parametrized", parametrized, X, contexts=GRADLESS)
FAMILY.add_factory("frozen_parameters", lambda: Net().requires_grad_(False), X)
FAMILY.add_factory("module_in_partial", lambda: (lambda net: lambda x: net(x, "b"))(Net()), X, contexts=GRADLESS)


def deepen(net: Any, i: int) -> None:
    net.depth = 3 - i % 2


def flip(net: Any, i: int) -> None:
    net.config["residual"] = i % 2 == 0


def other_activation(net: Any, i: int) -> None:
    net.activation = (F.relu, F.gelu)[i % 2]


def grow(net: Any, i: int) -> None:
    if i == 1:
        net.layers.append(nn.Linear(4, 4))
        net.depth = 4


def exchange(net: Any, i: int) -> None:
    if i == 1:
        net.heads["a"] = nn.Linear(4, 2, bias=False)


def read_by_forward(change: Callable[[Any, int], None]) -> dict[str, Any]:
    return {"before": change, "contexts": GRADLESS, "calls": 4, "traces_at": (0, 1)}


FAMILY.add_factory("attribute_changes", Net, X, **read_by_forward(deepen))
FAMILY.add_factory("config_changes", Net, X, **read_by_forward(flip))
FAMILY.add_factory("activation_changes", Net, X, **read_by_forward(other_activation))
FAMILY.add_factory("layer_added", Net, X, **read_by_forward(grow))
FAMILY.add_factory("layer_replaced", Net, X, **read_by_forward(exchange))
FAMILY.add_factory(
    "unread_attribute_changes", Net, X, contexts=GRADLESS, before=lambda net, i: setattr(net, "unread", i)
)
