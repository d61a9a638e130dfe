"""A character language model on a stacked GRU (Cho et al., 2014)."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from normwise.experiments.tasks.task import Recipe, Source, task
from normwise.experiments.tasks.text import TextTask, load_text


class CharGRU(nn.Module):
    """Characters ``(n, length)`` to the next character's logits ``(n, length, vocabulary)``, from a state of zeros.

    width: of the embedding. hidden: of each of the GRU's layers. Weights are torch's defaults.
    """

    def __init__(self, vocabulary: int, width: int = 96, hidden: int = 192, layers: int = 2) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.gru = nn.GRU(width, hidden, layers, batch_first=True)
        self.head = nn.Linear(hidden, vocabulary)

    def forward(self, characters: Tensor) -> Tensor:
        hidden, _ = self.gru(self.tokens(characters))
        logits: Tensor = self.head(hidden)
        return logits


@task("gru", steps=400, held_out=True)
def gru(source: Source, tiny: bool) -> TextTask:
    """Two GRU layers of 192, 0.41M parameters, on characters of CPython's reference text: batches of 32 × 64."""
    text = load_text(source)
    width, hidden, batch, context = (16, 32, 8, 32) if tiny else (96, 192, 32, 64)
    model = partial(CharGRU, len(text.vocabulary), width, hidden)
    return TextTask(Recipe("gru", tiny, "loss", batch, model), text, context)
