"""Draws the pictures of docs/concepts.md: ``python docs/drawings.py``. Where a point goes is what nw.norms says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib as mpl
import torch
from gallery_pictures import BLUE, GREY, ORANGE  # beside this file
from matplotlib.figure import Figure

import normwise as nw

IMAGES = Path(__file__).resolve().parent / "images"
GREEN = "#2e7d32"
SHADES = ["#c5cae9", "#7986cb", "#3949ab", "#1a237e"]


def balls(figure: Any) -> None:
    """Level sets of three norms, and what becomes of one point."""
    angle = torch.linspace(0, 2 * torch.pi, 721)
    around = torch.stack([angle.cos(), angle.sin()], dim=1)
    point = torch.tensor([[1.7, 0.9]])
    for axes, name in zip(figure.subplots(1, 3), ("l1", "l2", "linf"), strict=True):
        norm = nw.norms.get_norm(name)
        edge = around / norm.measure(around).unsqueeze(1)
        axes.fill(*edge.T.numpy(), color=SHADES[0])
        axes.plot(*edge.T.numpy(), color=BLUE)
        radial = point / norm.measure(point)
        for end, color, label in ((norm.project(point, 1.0), ORANGE, "project"), (radial, GREEN, "clip_norm")):
            axes.annotate("", end[0].tolist(), point[0].tolist(), arrowprops={"arrowstyle": "->", "color": color, "linewidth": 1.5})
            axes.plot([], [], color=color, label=label)
        axes.plot(*point.T.numpy(), "o", color="black", markersize=4)
        axes.set(title=name, xlim=(-1.4, 2.0), ylim=(-1.4, 1.4), aspect="equal", xticks=[-1, 0, 1], yticks=[-1, 0, 1])
    figure.axes[1].legend(loc="lower right", fontsize=7, frameon=False)


def blocks(figure: Any) -> None:
    """A matrix of four outputs and six inputs, each block in a colour of its own."""
    kinds = {"tensor": torch.zeros(4, 6), "unit": torch.arange(4).unsqueeze(1).expand(4, 6), "input": torch.arange(6).expand(4, 6),
             "element": torch.arange(24).view(4, 6)}  # fmt: skip
    for axes, (name, block) in zip(figure.subplots(1, 4), kinds.items(), strict=True):
        axes.imshow(block * 7 % 20, cmap="tab20", vmin=0, vmax=19)
        axes.set_xticks(torch.arange(7).numpy() - 0.5, labels=[])
        axes.set_yticks(torch.arange(5).numpy() - 0.5, labels=[])
        axes.grid(color="white", linewidth=1.5)
        axes.tick_params(length=0)
        axes.set(title=f'per="{name}"', xlabel="inputs", ylabel="outputs" if name == "tensor" else "")
        axes.spines[:].set_visible(False)


def order(figure: Any) -> None:
    """The phases of a step from left to right; what rules do is blue."""
    phases = ("backward", "penalties", "rules on\ngradients", "weight\ndecay", "optimizer's\nstep", "rules on\nupdates", "prox",
              "rules on\nweights")  # fmt: skip
    axes = figure.subplots()
    for place, phase in enumerate(phases):
        yours = phase in ("backward", "optimizer's\nstep")
        axes.text(place, 0, phase, ha="center", va="center", color="black" if yours else "white", fontsize=8,
                  bbox={"boxstyle": "round,pad=0.5", "facecolor": "#e0e0e0" if yours else BLUE, "edgecolor": "none"})  # fmt: skip
        if place:
            axes.annotate("", (place - 0.42, 0), (place - 0.58, 0), arrowprops={"arrowstyle": "->", "color": GREY})
    axes.set(xlim=(-0.6, len(phases) - 0.4), ylim=(-0.5, 0.5))
    axes.axis("off")


def main() -> None:
    with mpl.rc_context({"svg.hashsalt": "normwise", "svg.fonttype": "none", "font.size": 9}):
        for draw, size in ((balls, (8, 2.6)), (blocks, (8, 1.9)), (order, (9, 0.9))):
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            figure.savefig(IMAGES / f"{draw.__name__}.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
