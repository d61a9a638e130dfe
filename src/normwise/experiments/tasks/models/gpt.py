"""A character transformer: pre-norm, learned places, GELU (Radford et al. 2019), with optional QK-norm (Henry et al. 2020)."""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwise.errors import StudyError
from normwise.experiments.tasks.task import Recipe, Source, task
from normwise.experiments.tasks.text import TextTask, load_text

EMBEDDING_STD = 0.02


class Attention(nn.Module):
    """Self-attention; q, k and v are layers of their own, as each is a matrix of its own.

    qk_norm: queries and keys of every head are brought to RMS 1, times a learned gain, which bounds the attention's logits. causal:
    whether a place sees only those before it.
    """

    def __init__(self, width: int, heads: int, qk_norm: bool, causal: bool = True) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.q, self.k, self.v, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.q_norm, self.k_norm = (nn.RMSNorm(width // heads) if qk_norm else nn.Identity() for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (layer(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out: Tensor = self.out(attend(self.q_norm(q), self.k_norm(k), v, self.causal).transpose(1, 2).flatten(2))
        return out


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = True) -> Tensor:
    """Attention over ``(n, heads, length, width)``: ``F.scaled_dot_product_attention(q, k, v, is_causal=causal)``.

    Written out because torch's fused backward pass takes three times as long in bf16 as in fp32 on the CPU, this one half.
    """
    scores = (q * q.shape[-1] ** -0.5) @ k.transpose(-1, -2)
    if causal:
        scores = scores + scores.new_full(scores.shape[-2:], -math.inf).triu(1)
    return scores.softmax(-1) @ v


class Block(nn.Module):
    """Attention and an MLP of four times the width, each added to a stream that only they write to."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False, causal: bool = True) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = Attention(width, heads, qk_norm, causal)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class GPT(nn.Module):
    """Characters ``(n, length)`` to the next character's logits ``(n, length, vocabulary)``; length at most ``context``.

    Embeddings are drawn from a normal of standard deviation 0.02, matrices of 1/√(3 · inputs), which is GPT-2's 0.02 at its
    width of 768 and 0.05 at 128; with 0.02 at 128 too, 500 steps of AdamW end at 2.07 on tinyshakespeare instead of 1.88. The two
    projections of each block that write to the stream are divided by √(2 · layers), so that it starts at one size whatever the
    depth (GPT-2).
    """

    def __init__(
        self, vocabulary: int, width: int = 128, layers: int = 4, heads: int = 4, context: int = 128, qk_norm: bool = False
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.places = nn.Embedding(context, width)
        self.blocks = nn.Sequential(*[Block(width, heads, qk_norm) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        initialise(self)

    def forward(self, characters: Tensor) -> Tensor:
        length = characters.shape[1]
        if length > self.places.num_embeddings:
            raise StudyError(f"This GPT reads at most {self.places.num_embeddings} characters at once, got {length}; cut the text.")
        logits: Tensor = self.head(self.norm(self.blocks(self.tokens(characters) + self.places.weight[:length])))
        return logits


@torch.no_grad()
def initialise(model: nn.Module) -> None:
    """Of a transformer of such blocks, as :class:`GPT` says."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=(3 * module.in_features) ** -0.5)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=EMBEDDING_STD)
    blocks = [module for module in model.modules() if isinstance(module, Block)]
    for writer in (writer for block in blocks for writer in (block.attention.out, block.down)):
        writer.weight.div_(math.sqrt(2 * len(blocks)))


@task("gpt", steps=500)
def gpt(source: Source, tiny: bool, qk_norm: bool = False, half: bool = False) -> TextTask:
    """Four transformer blocks of width 128, 0.82M parameters, on characters of CPython's reference text: batches of 16 × 128."""
    text = load_text(source)
    width, layers, heads, batch, context = (32, 2, 2, 8, 32) if tiny else (128, 4, 4, 16, 128)
    model = partial(GPT, len(text.vocabulary), width // 2 if half else width, layers, heads, context, qk_norm)
    variant = "-".join(name for name, chosen in (("qknorm", qk_norm), ("half", half)) if chosen)
    return TextTask(Recipe("gpt", tiny, "loss", batch, model, not tiny, variant), text, context)
