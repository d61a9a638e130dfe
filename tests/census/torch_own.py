"""torch.nn's own modules, each in a small network, as torch's documentation describes their parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from census.family import Family, Table

OUT = ("head.weight",)


class Net(nn.Module):
    """``core``, a LayerNorm where asked, and a head that gives the output."""

    def __init__(self, core: nn.Module, width: int, norm: bool = True, run: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.core = core
        self.norm = nn.LayerNorm(width) if norm else nn.Identity()
        self.head = nn.Linear(width, 5)
        self.run = run

    def forward(self, *x: torch.Tensor) -> torch.Tensor:
        y = self.core(*x) if self.run is None else self.run(self.core, *x)
        return self.head(self.norm(y[0] if isinstance(y, tuple) else y))


def _of(name: str, build: Callable[[], nn.Module], table: Table | None = None, attention: Any = None, **more: Any) -> Family:
    def seeded() -> nn.Module:
        torch.manual_seed(0)
        return build()

    return Family(name, "torch.nn", seeded, **{"heads": OUT, "table": table or {}, "attention": attention or {}, **more})


def _self_attention(core: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    return core(x, x, x)[0]


def _lazy_done(core: Callable[[], nn.Module], *shape: int) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        net = nn.Sequential(core(), nn.BatchNorm1d(8) if len(shape) == 2 else nn.Identity(), nn.ReLU(), nn.Flatten(), nn.LazyLinear(5))
        net(torch.randn(2, *shape))
        return net

    return build


def _conv_net(name: str, core: Callable[[], nn.Module], *shape: int, table: Table | None = None, normalised: bool = False) -> Family:
    return _of(name, _lazy_done(core, *shape), table, heads=("4.weight",), normalised=normalised)


def _named(name: str, cls: Callable[..., nn.Module], table: Table, gates: int, **options: Any) -> Family:
    return _of(name, lambda: Net(cls(8, 16, **options), options.get("proj_size", 16) or 16), table, sizes={"s": gates})


GATES: Table = {"core.weight_?h*": ("recurrent", "(s o) i")}
IN: Table = {"*in_proj_weight": ("hidden", "(m o) i")}
MHA = {"qkv": ("*in_proj_weight",), "out": ("*out_proj.weight",)}


def _parametrized(how: Callable[[nn.Module], Any], core: nn.Module | None = None) -> Callable[[], nn.Module]:
    def build() -> nn.Module:
        net = Net(nn.Linear(8, 16) if core is None else core, 16)
        how(net.core)
        return net

    return build


FAMILIES = [
    _of(
        "Transformer",
        lambda: nn.Transformer(16, 4, 1, 1, 32, batch_first=True),
        IN,
        MHA,
        heads=(),
        note="a backbone: its last linear2 is none of a head",
        default=True,
    ),
    _of(
        "TransformerEncoder with a head",
        lambda: Net(nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 4, 32, batch_first=True), 2, enable_nested_tensor=False), 16),
        IN,
        MHA,
    ),
    _of("MultiheadAttention", lambda: Net(nn.MultiheadAttention(16, 4), 16, run=_self_attention), IN, MHA),
    _of(
        "MultiheadAttention, kdim and vdim",
        lambda: Net(nn.MultiheadAttention(16, 4, kdim=8, vdim=12, add_bias_kv=True), 16),
        {"core.?_proj_weight": ("hidden", "o i"), "core.bias_?": ("bias", "")},
        {"q": ("core.q_proj_weight",), "k": ("core.k_proj_weight",), "v": ("core.v_proj_weight",), "out": ("core.out_proj.weight",)},
    ),
    _named("LSTM", nn.LSTM, GATES, 4, num_layers=2, bidirectional=False),
    _named("LSTM, proj_size", nn.LSTM, {"core.weight_hr*": ("recurrent", "o i"), **GATES}, 4, proj_size=6),
    _of("LSTM, both directions", lambda: Net(nn.LSTM(8, 16, bidirectional=True), 32), GATES, sizes={"s": 4}, default=True),
    _named("GRU", nn.GRU, GATES, 3),
    _named("RNN", nn.RNN, GATES, 1),
    _of("LSTMCell", lambda: Net(nn.LSTMCell(8, 16), 16), GATES, sizes={"s": 4}),
    _of("GRUCell", lambda: Net(nn.GRUCell(8, 16), 16), GATES, sizes={"s": 3}),
    _of("RNNCell", lambda: Net(nn.RNNCell(8, 16), 16), GATES, sizes={"s": 1}),
    _of("Bilinear", lambda: Net(nn.Bilinear(8, 6, 16), 16), {"core.weight": ("hidden", "o i i")}),
    _of("Embedding", lambda: Net(nn.Embedding(20, 16), 16)),
    _of("EmbeddingBag", lambda: Net(nn.EmbeddingBag(20, 16), 16)),
    _conv_net("Conv1d", lambda: nn.Conv1d(4, 8, 3), 4, 12, normalised=True),
    _conv_net("Conv2d", lambda: nn.Conv2d(4, 8, 3), 4, 8, 8),
    _conv_net("Conv3d", lambda: nn.Conv3d(4, 8, 3), 4, 6, 6, 6),
    _conv_net("Conv2d, groups", lambda: nn.Conv2d(4, 8, 3, groups=2), 4, 8, 8),
    _conv_net("Conv2d, depthwise", lambda: nn.Conv2d(4, 8, 3, groups=4), 4, 8, 8),
    _conv_net("ConvTranspose1d", lambda: nn.ConvTranspose1d(4, 8, 3), 4, 12, normalised=True),
    _conv_net("ConvTranspose2d, groups", lambda: nn.ConvTranspose2d(4, 8, 3, groups=2), 4, 8, 8),
    _conv_net("ConvTranspose3d", lambda: nn.ConvTranspose3d(4, 8, 3), 4, 4, 4, 4),
    _of(
        "AdaptiveLogSoftmaxWithLoss",
        lambda: nn.ModuleDict({"body": nn.Linear(8, 16), "norm": nn.LayerNorm(16), "loss": nn.AdaptiveLogSoftmaxWithLoss(16, 20, [5, 10])}),
        {"loss.tail.*.0.weight": ("head|hidden", "o i")},
        heads=("loss.head.weight", "loss.tail.*.1.weight"),
        note="a head for frequent classes, and one for each cluster of rare ones",
    ),
    _of(
        "BatchNorm, GroupNorm, RMSNorm",
        lambda: nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.GroupNorm(4, 16), nn.RMSNorm(16), nn.Linear(16, 5)),
        heads=("4.weight",),
    ),
    _of(
        "LayerNorm of two dimensions",
        lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.LayerNorm((6, 6)), nn.Flatten(), nn.Linear(144, 5)),
        heads=("3.weight",),
    ),
    _of(
        "PReLU without normalisation",
        lambda: nn.Sequential(nn.Linear(8, 16), nn.PReLU(), nn.Linear(16, 5)),
        heads=("2.weight",),
        normalised=False,
        note="its slope is no normalisation",
        default=True,
    ),
    _of("weight_norm", _parametrized(parametrizations.weight_norm), {"*.original0": ("gain", ""), "*.original1": ("hidden", "o i")}),
    _of(
        "weight_norm, the old one", _parametrized(nn.utils.weight_norm), {"core.weight_g": ("gain", ""), "core.weight_v": ("hidden", "o i")}
    ),
    _of("spectral_norm", _parametrized(parametrizations.spectral_norm), {"*.original": ("hidden", "o i")}),
    _of("spectral_norm, the old one", _parametrized(nn.utils.spectral_norm), {"core.weight_orig": ("hidden", "o i")}),
    _of("orthogonal", _parametrized(parametrizations.orthogonal), {"*.original": ("hidden", "o i")}),
    _of("pruned", _parametrized(lambda core: prune.l1_unstructured(core, "weight", 0.5)), {"core.weight_orig": ("hidden", "o i")}),
]
