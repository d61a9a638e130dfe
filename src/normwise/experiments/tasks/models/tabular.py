"""A residual MLP on a table, in the manner of Gorishniy et al. (2021), "Revisiting Deep Learning Models for Tabular Data"."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from normwise.experiments.tasks.data.table import TableData, load_table
from normwise.experiments.tasks.images import endless
from normwise.experiments.tasks.task import Batch, Part, Recipe, Source, Task, task


class Residual(nn.Module):
    """A norm and two layers with a ReLU between them, added to what they read."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(F.relu(self.up(self.norm(x))))


class ResidualMLP(nn.Module):
    """Rows ``(n, columns)`` to logits ``(n, classes)``. Weights are torch's defaults."""

    def __init__(self, columns: int, classes: int, width: int = 64, layers: int = 3) -> None:
        super().__init__()
        self.first = nn.Linear(columns, width)
        self.blocks = nn.Sequential(*[Residual(width) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, rows: Tensor) -> Tensor:
        logits: Tensor = self.head(self.norm(self.blocks(self.first(rows))))
        return logits


class TableTask(Task):
    """Classify rows of numbers; the model maps ``(n, columns)`` to ``(n, classes)``. Every part is scored whole."""

    def __init__(self, recipe: Recipe, data: TableData) -> None:
        self.parts = {name: (torch.from_numpy(x), torch.from_numpy(y)) for name, (x, y) in data.parts.items()}
        super().__init__(recipe, len(self.parts["train"][1]), data.key)
        # Of a model that knows how often each class comes.
        seen = torch.bincount(self.parts["train"][1], minlength=data.classes)
        self.guess = -float((seen / seen.sum()).log()[self.parts["test"][1]].mean())
        sizes = {name: len(labels) for name, (_, labels) in self.parts.items()}
        self.facts = {"name": data.name, **sizes, "classes": data.classes, "fingerprint": data.key}

    def batches(self, batch: int, seed: int) -> Iterator[Batch]:
        rows, labels = self.parts["train"]
        for some in endless(self.samples, batch, torch.Generator().manual_seed(seed)):
            yield rows[some], labels[some]

    def scored(self, part: Part) -> Iterable[Batch]:
        return [self.parts[part]]


@task("tabular", steps=400)
def tabular(source: Source, tiny: bool) -> TableTask:
    """Three residual blocks of width 64 on scikit-learn's breast cancer table or a CSV file, judged by its loss; 32 rows a batch."""
    data = load_table(source)
    columns = data.parts["train"][0].shape[1]
    model = partial(ResidualMLP, columns, data.classes, *((16, 1) if tiny else (64, 3)))
    return TableTask(Recipe("tabular", tiny, "loss", 32, model), data)
