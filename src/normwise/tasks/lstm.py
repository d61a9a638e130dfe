"""A character language model on a stacked LSTM (Hochreiter & Schmidhuber 1997)."""

from __future__ import annotations

from torch import Tensor, nn


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
        hidden, _ = self.lstm(self.tokens(characters))
        logits: Tensor = self.head(hidden)
        return logits
