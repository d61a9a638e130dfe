"""Rules under Lightning: one callback more than without.

Run it with ``python examples/lightning_fit.py``. It needs lightning, downloads nothing, and takes a few seconds on a CPU.
"""

from __future__ import annotations

import sys

import lightning
import torch
from torch import Tensor, nn

import normwise as nw


class Spirals(lightning.LightningModule):
    """Two spirals, which no linear model can tell apart."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        points, labels = batch
        return nn.functional.cross_entropy(self.net(points), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


def data() -> torch.utils.data.TensorDataset:
    made = torch.Generator().manual_seed(0)
    t, label = torch.rand(1000, generator=made) * 3 + 0.3, torch.randint(0, 2, (1000,), generator=made)
    angle = 2.5 * t + torch.pi * label
    return torch.utils.data.TensorDataset(torch.stack([t * angle.cos(), t * angle.sin()], dim=1), label)


def main() -> int:
    lightning.seed_everything(0)
    torch.set_num_threads(1)
    module, points = Spirals(), data()
    rules = nw.integrations.lightning.NormwiseCallback([nw.max_norm(2.0), nw.clip_grad_norm(1.0)])
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(max_epochs=20, accelerator="cpu", callbacks=[rules], **quiet)
    trainer.fit(module, torch.utils.data.DataLoader(points, batch_size=100, shuffle=True))
    accuracy = float((module.net(points.tensors[0]).argmax(1) == points.tensors[1]).float().mean())
    assert rules.control is not None
    print(f"accuracy {accuracy:.1%}\n{rules.control.verify()}")
    return 0 if rules.control.verify() else 1


if __name__ == "__main__":
    sys.exit(main())
