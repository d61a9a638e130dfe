"""A character language model on a stacked LSTM (Hochreiter & Schmidhuber 1997)."""

from __future__ import annotations

import functools

import torch
from torch import Tensor, nn

from normwise.experiments.tasks.task import Recipe, Source, task
from normwise.experiments.tasks.text import TextTask, load_text


class CharLSTM(nn.Module):
    """Characters ``(n, length)`` to the next character's logits ``(n, length, vocabulary)``, from a state of zeros.

    width: of the embedding. hidden: of each of the LSTM's layers. Weights are torch's defaults.
    """

    def __init__(self, vocabulary: int, width: int = 128, hidden: int = 256, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.lstm = nn.LSTM(width, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=torch.is_autocast_enabled("cpu") and has_bf16_lstm()):
            hidden, _ = self.lstm(self.tokens(characters))
        logits: Tensor = self.head(hidden)
        return logits


@functools.cache
def has_bf16_lstm() -> bool:
    """Whether torch can run an LSTM in bf16 on this CPU. Without AVX-512 oneDNN has no such kernel, and autocast raises instead of going on
    in fp32 (torch 2.13); the rest of the model takes bf16 all the same."""
    try:
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            nn.LSTM(2, 2)(torch.zeros(1, 1, 2))
    except RuntimeError:
        return False
    return True


@task("lstm", steps=600)
def lstm(source: Source, tiny: bool, half: bool = False) -> TextTask:
    """Two LSTM layers of 256, 0.96M parameters, on characters of CPython's reference text: batches of 32 × 64."""
    text = load_text(source)
    width, hidden, batch, context = (16, 32, 8, 32) if tiny else (128, 256, 32, 64)
    model = functools.partial(CharLSTM, len(text.vocabulary), width, hidden // 2 if half else hidden)
    return TextTask(Recipe("lstm", tiny, "loss", batch, model, not tiny, "half" if half else ""), text, context)
