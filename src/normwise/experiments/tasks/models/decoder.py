"""A character transformer as large models are built today (Touvron et al., 2023; Ainslie et al., 2023).

RMSNorm, rotary places (Su et al., 2021), a gated MLP (Shazeer, 2020), two queries to each key and value, one matrix for embedding and head.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwise.experiments.tasks.models.gpt import EMBEDDING_STD, attend
from normwise.experiments.tasks.task import Recipe, Source, task
from normwise.experiments.tasks.text import TextTask, load_text

BASE = 10_000.0


def rotated(x: Tensor) -> Tensor:
    """``(n, heads, length, width)`` with each pair of channels (i, i + width/2) turned by place · 10000^(−2i/width)."""
    half = x.shape[-1] // 2
    rates = BASE ** (-torch.arange(half, dtype=torch.float32) / half)
    angles = torch.arange(x.shape[-2], dtype=torch.float32)[:, None] * rates
    cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
    first, second = x[..., :half], x[..., half:]
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class GroupedAttention(nn.Module):
    """Causal self-attention in which ``heads // shared`` keys and values serve ``shared`` queries each."""

    def __init__(self, width: int, heads: int, shared: int) -> None:
        super().__init__()
        self.head_width, self.shared = width // heads, shared
        self.q_proj, self.o_proj = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, width // shared, bias=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (-1, self.head_width)).transpose(1, 2) for layer in (self.q_proj, self.k_proj, self.v_proj))
        k, v = (of.repeat_interleave(self.shared, 1) for of in (rotated(k), v))
        out: Tensor = self.o_proj(attend(rotated(q), k, v).transpose(1, 2).flatten(2))
        return out


class DecoderLayer(nn.Module):
    """Attention and a gated MLP, each behind a norm and added to a stream that only they write to."""

    def __init__(self, width: int, heads: int, shared: int) -> None:
        super().__init__()
        hidden = 8 * round(width / 3)    # two thirds of four times the width: a gated MLP has three matrices
        self.input_norm, self.mlp_norm = nn.RMSNorm(width), nn.RMSNorm(width)
        self.attention = GroupedAttention(width, heads, shared)
        self.gate_proj, self.up_proj = nn.Linear(width, hidden, bias=False), nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.input_norm(x))
        inner = self.mlp_norm(x)
        return x + self.down_proj(F.silu(self.gate_proj(inner)) * self.up_proj(inner))


class Decoder(nn.Module):
    """Characters ``(n, length)`` to the next character's logits ``(n, length, vocabulary)``.

    Embeddings are drawn from a normal of standard deviation 0.02, matrices of 1/√(3 · inputs), those that write to the stream divided
    by √(2 · layers), as in :class:`~normwise.experiments.tasks.models.gpt.GPT`.
    """

    def __init__(self, vocabulary: int, width: int = 128, layers: int = 4, heads: int = 4, shared: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.layers = nn.Sequential(*[DecoderLayer(width, heads, shared) for _ in range(layers)])
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                writes = name.endswith(("o_proj.weight", "down_proj.weight"))
                nn.init.normal_(weight, std=(3 * weight.shape[1]) ** -0.5 / (math.sqrt(2 * layers) if writes else 1))
        nn.init.normal_(self.tokens.weight, std=EMBEDDING_STD)
        self.head.weight = self.tokens.weight

    def forward(self, characters: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.layers(self.tokens(characters))))
        return logits


@task("decoder", steps=500, held_out=True)
def decoder(source: Source, tiny: bool, half: bool = False) -> TextTask:
    """Four layers of width 128, 0.74M parameters, on characters of CPython's reference text: batches of 16 × 64."""
    text = load_text(source)
    width, layers, batch, context = (32, 2, 8, 32) if tiny else (64 if half else 128, 4, 16, 64)
    model = partial(Decoder, len(text.vocabulary), width, layers)
    return TextTask(Recipe("decoder", tiny, "loss", batch, model, not tiny, "half" if half else ""), text, context)
