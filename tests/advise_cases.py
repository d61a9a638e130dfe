"""Models, batches and losses for the tests of advice: small, one for each thing that advice looks at."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

WIDTH, TOKENS, CLASSES = 16, 13, 5


class Attention(nn.Module):
    """q, k and v apart; logits by hand or by torch's fused call; with or without QK-norm."""

    def __init__(self, fused: bool = False, qk_norm: bool = False) -> None:
        super().__init__()
        self.num_heads, self.fused = 4, fused
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
        if qk_norm:
            self.q_norm, self.k_norm = nn.RMSNorm(4), nn.RMSNorm(4)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (4, 4)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True) if self.fused else self.by_hand(q, k, v)
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def by_hand(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        logits = q @ k.mT / 2
        hidden = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        return logits.masked_fill(hidden, -torch.inf).softmax(-1) @ v


class Decoder(nn.Module):
    def __init__(self, fused: bool = False, qk_norm: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = Attention(fused, qk_norm)
        self.up, self.down = nn.Linear(WIDTH, 32), nn.Linear(32, WIDTH)
        self.head = nn.Linear(WIDTH, TOKENS, bias=False)
        if tied:
            self.head.weight = self.tokens.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        x = x + self.attention(self.norm1(x))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        logits: Tensor = self.head(x)
        return logits


class Residual(nn.Module):
    """Convolutions right before a BatchNorm, one behind none."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.conv2, self.bn2 = nn.Conv2d(8, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 8, 3, padding=1)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        out = self.conv2(x)
        out = self.bn2(out)
        x = F.relu(out + x)
        logits: Tensor = self.head(F.relu(self.conv3(x)).mean((2, 3)))
        return logits


class Torchs(nn.Module):
    """torch's own attention, q, k and v in one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(TOKENS, WIDTH)
        self.attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True)
        self.head = nn.Linear(WIDTH, TOKENS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids)
        logits: Tensor = self.head(self.attention(x, x, x)[0])
        return logits


class Gates(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.lstm, self.head = nn.Embedding(TOKENS, WIDTH), nn.LSTM(WIDTH, WIDTH, batch_first=True), nn.Linear(WIDTH, TOKENS)

    def forward(self, ids: Tensor) -> Tensor:
        logits: Tensor = self.head(self.lstm(self.tokens(ids))[0])
        return logits


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.head = nn.Linear(6, 6, dtype=torch.complex64), nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.mix(x.to(torch.complex64)).real)
        return logits


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, CLASSES))


def empty_unit() -> nn.Module:
    """A matrix of zeros, and a row of zeros in another."""
    model = mlp()
    with torch.no_grad():
        model[2].weight.zero_()
        model[0].weight[3].zero_()
    return model


def weight_normed() -> nn.Module:
    model = mlp()
    torch.nn.utils.parametrizations.weight_norm(model[2])
    return model


def plain_convolutions() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 16, CLASSES))


def experts() -> nn.Module:
    from census.plain import FAMILIES

    return next(f for f in FAMILIES if f.name == "stacked experts").build()


def adapted() -> nn.Module:
    peft = pytest.importorskip("peft")
    model: nn.Module = peft.get_peft_model(Decoder(), peft.LoraConfig(r=2, target_modules=["q_proj", "up"]))
    return model


IDS, IMAGES, ROWS = (4, 6), (4, 1, 8, 8), (8, 6)
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "mlp": (mlp, ROWS), "zeros": (empty_unit, ROWS), "weight_norm": (weight_normed, ROWS), "complex": (Complex, ROWS),
    "convolutions": (plain_convolutions, IMAGES), "residual": (Residual, IMAGES), "decoder": (Decoder, IDS),
    "qk-norm": (lambda: Decoder(True, True), IDS), "tied": (lambda: Decoder(tied=True), IDS), "multihead": (Torchs, IDS),
    "gates": (Gates, IDS), "embeddings": (lambda: nn.Sequential(nn.Embedding(TOKENS, 4), nn.Linear(4, TOKENS)), IDS),
    "lora": (adapted, IDS), "experts": (experts, IDS),
}  # fmt: skip


def made(case: str) -> nn.Module:
    torch.manual_seed(0)
    return CASES[case][0]()


def batches(case: str, count: int = 30) -> list[tuple[Tensor, Tensor]]:
    shape = CASES[case][1]
    source = torch.Generator().manual_seed(1)
    if shape == IDS:
        ids = [torch.randint(TOKENS, shape, generator=source) for _ in range(count)]
        return [(x, x.roll(-1, 1)) for x in ids]
    return [(torch.randn(shape, generator=source), torch.randint(CLASSES, shape[:1], generator=source)) for _ in range(count)]


def loss(model: nn.Module, batch: Any) -> Tensor:
    logits = model(batch[0])
    logits = getattr(logits, "logits", logits)
    return F.cross_entropy(logits.flatten(0, -2), batch[1].flatten())


def states(model: nn.Module) -> Iterator[Tensor]:
    """Everything that must come back, as it lies in memory."""
    for tensor in (*model.parameters(), *model.buffers()):
        yield tensor.detach().clone()
        if isinstance(tensor, nn.Parameter) and tensor.grad is not None:
            yield tensor.grad.clone()
