"""Draws what rules and steps do, by running them: ``python docs/gallery.py --pictures``. Nothing in a picture is computed by a formula of
its own, but the outlines of balls.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normwise as nw

BLUE, ORANGE, GREY = "#3f51b5", "#e65100", "#9e9e9e"
Rules = Any

BEFORE = "before and after a step;"
ALONE = "in a step of gradient descent with nothing but the penalty;"
SEEN = "before the rule, and as the optimizer gets it;"
MOVED = "Steps from points in the plane under one gradient: grey without the rule, blue with it."
WEIGHTS: dict[str, tuple[Rules, float, str, str]] = {
    "max_norm": (nw.max_norm(1.0), 0.0, "circle", f"Weights of a unit {BEFORE} radius 1."),
    "unit_norm": (nw.unit_norm(1.0), 0.0, "circle", f"Weights of a unit {BEFORE} radius 1."),
    "min_max_norm": (nw.min_max_norm(0.6, 1.2), 0.0, "circles", f"Weights of a unit {BEFORE} between 0.6 and 1.2."),
    "clip_weight_norm": (nw.clip_weight_norm(1.0), 0.0, "circle", f"A tensor of two weights {BEFORE} radius 1."),
    "clip_weight_value": (nw.clip_weight_value(1.0), 0.0, "box", f"Two weights {BEFORE} value 1."),
    "non_negative": (nw.non_negative(), 0.0, "", "Two weights before and after a step."),
    "l1_ball": (nw.l1_ball(1.0), 0.0, "diamond", f"Weights of a unit {BEFORE} radius 1. In a corner one weight is zero."),
    "l2_penalty": (nw.l2_penalty(0.25), 1.0, "", f"Two weights {ALONE} η · strength = 0.25."),
    "l1_penalty": (nw.l1_penalty(0.25), 1.0, "", f"Two weights {ALONE} η · strength = 0.25."),
    "elastic_net": (nw.elastic_net(0.15, 0.15), 1.0, "", f"Two weights {ALONE} η · l1 = η · l2 = 0.15."),
    "weight_decay": (nw.weight_decay(0.25), 1.0, "", f"Two weights {BEFORE} no gradient, η · strength = 0.25."),
    "decay_to_init": (nw.decay_to_init(0.25), 1.0, "init", f"Two weights {BEFORE} no gradient, η · strength = 0.25. From the dot."),
    "l1_prox": (nw.l1_prox(0.35), 1.0, "", f"Two weights {BEFORE} η · strength = 0.35. What is nearer to an axis than that lands on it."),
    "group_lasso": (nw.group_lasso(0.5), 1.0, "", f"Weights of a unit {BEFORE} η · strength = 0.5. Shorter units become zero."),
}
"""Rule, learning rate, outline, caption."""
GRADIENTS: dict[str, tuple[Rules, str, str]] = {
    "clip_grad_norm": (nw.clip_grad_norm(1.0), "circle", f"A gradient {SEEN} max_norm 1."),
    "clip_grad_value": (nw.clip_grad_value(1.0), "box", f"A gradient {SEEN} value 1."),
    "normalize_grad": (nw.normalize_grad(1.0), "circle", f"A gradient {SEEN} radius 1."),
    "agc": (nw.agc(0.5), "circle", f"A unit's gradient {SEEN} clipping 0.5, weights of length 2."),
}
SINGULAR: dict[str, tuple[Rules, float, str]] = {
    "spectral_cap": (nw.spectral_cap(1.5), 0.0, f"Singular values of a matrix {BEFORE} radius 1.5."),
    "spectral_normalize": (nw.spectral_normalize(1.0), 0.0, f"Singular values of a matrix {BEFORE} radius 1."),
    "orthogonal": (nw.orthogonal(), 0.0, f"Singular values of a matrix {BEFORE} radius 1."),
    "orthogonal_penalty": (nw.orthogonal_penalty(0.1), 1.0, f"Singular values {ALONE} η · strength = 0.1."),
    "nuclear_prox": (nw.nuclear_prox(0.5), 1.0, f"Singular values of a matrix {BEFORE} η · strength = 0.5. Smaller ones become zero."),
}
MOVES: dict[str, tuple[Rules, str]] = {
    "relative_update": (nw.relative_update(), f"{MOVED} Its length is a quarter of the weight's; η = 0.25."),
    "hyperball": (nw.hyperball(), f"{MOVED} A point stays on its circle; η = 0.25."),
    "radial_brake": (nw.radial_brake(0.0), f"{MOVED} With keep = 0 no norm grows."),
}
SERIES = {
    "autoclip": "Norm of the gradient at each step: grey before the rule, blue as the optimizer gets it; percentile 50 here.",
    "zclip": "Norm of the gradient at each step: grey before the rule, blue as the optimizer gets it; z = 2.5.",
    "cpr": "Mean square of a matrix that every step makes longer: grey without the rule, blue with κ = 1.",
    "qk_clip": "Largest logit of each of eight heads: grey as reported, blue what the same inputs give after the step; τ = 100.",
}
STEPS = (
    "A step (blue) for a gradient (grey) that has been the same for ten steps, both scaled to mean square 1. Left: how far each goes along "
    "the gradient's singular directions. Right: their absolute entries, by size."
)
CAPTIONS = {name: str(found[-1]) for kind in (WEIGHTS, GRADIENTS, SINGULAR, MOVES) for name, found in kind.items()}


# ------------------------------------------------------------------------------------------------------- what is run


def stepped(
    rules: Rules, weight: Tensor, gradient: Tensor | None = None, rate: float = 0.0, start: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """One step of gradient descent on one matrix: the weight after it, and the gradient that the optimizer got. start: the weight when
    attached."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    layer.weight.data = (weight if start is None else start).clone()
    optimizer = torch.optim.SGD(layer.parameters(), lr=rate)
    if rules is not None:
        nw.attach(nn.Sequential(layer), optimizer, nw.Policy(rules, roles={"0.weight": "hidden"}))
    layer.weight.data.copy_(weight)
    layer.weight.grad = torch.zeros_like(weight) if gradient is None else gradient.clone()
    optimizer.step()
    return layer.weight.detach(), layer.weight.grad


def points(reach: float = 2.0, steps: int = 9) -> list[Tensor]:
    line = torch.linspace(-reach, reach, steps).tolist()
    return [torch.tensor([[x, y]]) for x in line for y in line]


def step_of(preset: Any) -> tuple[Tensor, Tensor]:
    """What the tenth step adds to a hidden matrix, without decay, and the gradient of all ten."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(48, 32, bias=False), nn.ReLU(), nn.Linear(32, 4))
    u, v = (torch.linalg.qr(torch.randn(n, 32))[0] for n in (32, 48))
    gradient = u @ torch.diag(torch.logspace(0, -2, 32)) @ v.T
    optimizer = preset(model)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0    # the picture is of the step
    for _ in range(10):
        before = model[0].weight.detach().clone()
        model[0].weight.grad = gradient.clone()
        optimizer.step()
    return model[0].weight.detach() - before, gradient


# ------------------------------------------------------------------------------------------------------ how it looks


def plane(axes: Any, outline: str) -> None:
    import matplotlib.patches as shapes

    made = {
        "circle": [shapes.Circle((0, 0), 1)], "circles": [shapes.Circle((0, 0), 0.6), shapes.Circle((0, 0), 1.2)],
        "box": [shapes.Rectangle((-1, -1), 2, 2)], "diamond": [shapes.Polygon([(1, 0), (0, 1), (-1, 0), (0, -1)])],
        "init": [shapes.Circle((1.0, 0.5), 0.08)],
    }  # fmt: skip
    for shape in made.get(outline, ()):
        shape.set(fill=outline == "init", color=ORANGE, linewidth=1.5)
        axes.add_patch(shape)
    axes.axhline(0, color=GREY, linewidth=0.5)
    axes.axvline(0, color=GREY, linewidth=0.5)
    axes.set(xlim=(-2.3, 2.3), ylim=(-2.3, 2.3), aspect="equal")


def arrows(axes: Any, begins: Sequence[Tensor], ends: Sequence[Tensor], color: str) -> None:
    a, b = (torch.cat(list(found)).numpy() for found in (begins, ends))
    move = b - a
    axes.quiver(*a.T, *move.T, angles="xy", scale_units="xy", scale=1, color=color, width=0.004, headwidth=4, headlength=5)
    axes.plot(*b.T, ".", color=color, markersize=3)


def drawn(name: str, figure: Any) -> None:
    """One picture onto an empty figure."""
    if name in PRESET_PAGES:
        step, gradient = step_of(PRESET_PAGES[name])
        u, _, v = torch.linalg.svd(gradient, full_matrices=False)
        left, right = figure.subplots(1, 2)
        for color, matrix in ((GREY, gradient), (BLUE, step)):
            scaled = matrix / matrix.square().mean().sqrt()
            left.semilogy((u.T @ scaled @ v.T).diagonal().abs().numpy(), ".-", color=color)
            right.plot(scaled.abs().flatten().sort(descending=True).values.numpy()[::8], color=color)
        left.set(title="singular directions", xlabel="from the largest value to the smallest", ylim=(1e-1, 50))
        right.set(title="entries", xlabel="from the largest to the smallest", xticks=[], ylim=(0, 4))
        return
    axes = figure.subplots()
    if name in WEIGHTS:
        rules, rate, outline, _ = WEIGHTS[name]
        plane(axes, outline)
        start = torch.tensor([[1.0, 0.5]]) if outline == "init" else None
        arrows(axes, points(), [stepped(rules, w, rate=rate, start=start)[0] for w in points()], BLUE)
    elif name in GRADIENTS:
        rules, outline, _ = GRADIENTS[name]
        plane(axes, outline)
        arrows(axes, points(), [stepped(rules, torch.tensor([[2.0, 0.0]]), g)[1] for g in points()], BLUE)
    elif name in MOVES:
        plane(axes, "")
        begins = [w for w in points(1.75, 8) if w.norm() > 0.3]
        for color, rules in ((GREY, None), (BLUE, MOVES[name][0])):
            arrows(axes, begins, [stepped(rules, w, torch.tensor([[-1.0, -0.4]]), rate=0.25)[0] for w in begins], color)
    elif name in SINGULAR:
        torch.manual_seed(0)
        rules, rate, _ = SINGULAR[name]
        u, v = (torch.linalg.qr(torch.randn(8, 8))[0] for _ in range(2))
        weight = u @ torch.diag(torch.linspace(2.6, 0.2, 8)) @ v.T
        for color, place, matrix in ((GREY, -0.2, weight), (BLUE, 0.2, stepped(rules, weight, rate=rate)[0])):
            axes.bar(torch.arange(8).numpy() + place, torch.linalg.svdvals(matrix).numpy(), 0.4, color=color)
        axes.set(ylabel="singular value", xticks=[])
    else:
        series(name, axes)


def series(name: str, axes: Any) -> None:
    """The rules that remember, and the one that is told logits."""
    torch.manual_seed(0)
    if name == "qk_clip":
        attention = nn.MultiheadAttention(64, 8)
        control = nw.attach(nn.Sequential(attention), torch.optim.SGD(attention.parameters(), lr=0.0), nw.qk_clip(100.0))
        told = torch.tensor([30.0, 60.0, 90.0, 120.0, 160.0, 220.0, 80.0, 300.0])
        before = attention.in_proj_weight.detach().clone().view(3, 8, -1)[:2].norm(dim=2)
        for p in attention.parameters():
            p.grad = torch.zeros_like(p)
        control.report_max_logits(attention, told)
        control.optimizers[0].step()
        factor = (attention.in_proj_weight.detach().view(3, 8, -1)[:2].norm(dim=2) / before).prod(0)
        for color, place, logits in ((GREY, -0.2, told), (BLUE, 0.2, told * factor)):
            axes.bar(torch.arange(8).numpy() + place, logits.numpy(), 0.4, color=color)
        axes.axhline(100, color=ORANGE)
        axes.set(xlabel="head", ylabel="largest logit")
        return
    layer = nn.Linear(8, 8, bias=False)
    free = layer.weight.detach().clone()
    rules = {"autoclip": nw.autoclip(50.0), "zclip": nw.zclip(2.5), "cpr": nw.cpr(1.0, "role:all", mu=0.3)}[name]
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.05 if name == "cpr" else 0.0)
    nw.attach(nn.Sequential(layer), optimizer, rules)
    seen: list[tuple[float, float]] = []
    for step in range(120):
        direction = torch.randn(8, 8) if name != "cpr" else -layer.weight.detach()
        length = torch.exp(0.15 * torch.randn(()) - step / 200) * (6 if step % 37 == 36 else 1) if name != "cpr" else 8.0
        gradient = direction / direction.norm() * length
        layer.weight.grad = gradient.clone()
        optimizer.step()
        free -= 0.05 * -free / free.norm() * 8.0
        now = (float(free.square().mean()), float(layer.weight.detach().square().mean()))
        seen.append(now if name == "cpr" else (float(gradient.norm()), float(layer.weight.grad.norm())))
    for color, line in zip((GREY, BLUE), zip(*seen, strict=True), strict=True):
        axes.plot(line, color=color)
    axes.set(xlabel="step", ylabel="mean square" if name == "cpr" else "norm of the gradient", ylim=(0, 3 if name == "cpr" else None))


PRESET_PAGES = {name.lower(): made for name, made in {**nw.optim.PRESETS, "auto": nw.optim.auto}.items()}


def draw(folder: Path) -> None:
    """Every picture of the gallery, in a few colours, which makes small files."""
    import io

    import matplotlib as mpl
    from matplotlib.figure import Figure
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    with mpl.rc_context({"font.size": 9, "axes.spines.top": False, "axes.spines.right": False}):
        for name in (*CAPTIONS, *SERIES, *PRESET_PAGES):
            figure = Figure(figsize=(5.6, 2.8) if name in PRESET_PAGES or name in SERIES else (3.4, 3.2), layout="constrained")
            drawn(name, figure)
            stored = io.BytesIO()
            figure.savefig(stored, dpi=150)
            Image.open(stored).convert("RGB").quantize(16).save(folder / f"{name}.png", optimize=True)
