"""Named methods: each is rows of parts and a routing of roles, with its source.

A preset is a class, so ``isinstance``, pickles, configuration files and trainers that take a class and its options work with it. Whatever
makes it this method (direction, act, norm, scale) is settled; every other column of its main row is an argument. For columns of other rows
there are ``adamw=`` and ``override=``.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor, nn

from normwise.errors import PolicyError, nearest
from normwise.optim.columns import DEFAULTS, QUINTIC, Radius, Row, check_row, complete, newton_schulz, refuse_unused
from normwise.optim.optimizer import NormOptimizer
from normwise.parameters.inventory import Entry, Inventory, LayoutLike
from normwise.parameters.layouts import QKV
from normwise.parameters.roles import normalises
from normwise.policy import Policy, Rule

Params = nn.Module | Iterable[Any]
Rate = float | Tensor
Betas = tuple[float, float]
Columns = Row | None
Override = Mapping[Any, str | Row | Radius] | None
Rules = Policy | Rule | Iterable[Rule] | None
Layouts = Mapping[Any, LayoutLike] | None
Built = tuple[dict[str, Row], dict[str, str], str]
"""Rows by name, the row of each role, and the row of tensors that are given without a module."""
Preset = TypeVar("Preset", bound=NormOptimizer)

MATRICES = ("hidden", "conv", "recurrent")
"""What the matrix methods take; embeddings, heads, biases, gains and bare parameters go to AdamW, as their authors do."""
UNDECAYED = ("bias", "gain")
"""What the AdamW beside a matrix method does not decay."""
ROLES = ("hidden", "conv", "embedding", "head", "recurrent", "bias", "gain", "other")
EVERYWHERE = ("maximize", "rounding", "seed")
"""Columns of the whole model: given to a preset, every row takes them."""

COMMON = {
    "params": "a module, whose parameters are routed by role; or tensors, named tensors or groups, which all take the main row.",
    "lr": "η, the learning rate; a number, or a tensor of one number.",
    "weight_decay": "λ of ``decay``; default 0.",
    "momentum": "μ of the running average of gradients, in [0, 1).",
    "nesterov": "whether the step looks ahead: (1 − μ)·g + μ·b instead of the average b.",
    "betas": "β₁ and β₂, of the two running averages.",
    "eps": "added to the root of the second moment, in the gradient's unit.",
    "polar": "the iteration behind the spectral LMO: ``\"quintic\"`` (torch's and the authors'), ``\"fast\"`` (cheaper, and nearer to "
             "orthogonal), ``\"polar_express\"``, ``\"accurate\"``, ``\"exact\"``, or a tuple of steps (a, b, c).",
    "decay": "where λ acts: ``\"weight\"`` w ← (1 − ηλ)·w, ``\"cautious\"`` the same where the update shrinks the weight too, "
             "``\"gradient\"``, ``\"direction\"``, ``\"none\"``.",
    "hold": "what weights are held to after the step: ``\"none\"``, ``\"sphere\"``, ``\"ball\"``, ``\"frank_wolfe\"``, ``\"row_floor\"``, "
            "``\"radial_brake\"``; see ``normwise.optim.CHOICES``.",
    "limit": "of ``hold``: the ball's radius, the floor's share, the brake's share.",
    "per": "the block of norms, scales and holds: ``\"tensor\"``, ``\"matrix\"`` (each gate, each of q, k, v), ``\"head\"``, "
           "``\"expert\"``, ``\"unit\"``, ``\"input\"``, ``\"element\"``.",
    "radius": "multiplies the step; a tuple multiplies each block of a tensor by its own number.",
    "row_beta": "above 0, units are divided by the root of the running mean of their squares, as in NorMuon.",
    "maximize": "g ← −g, in every row.",
    "rounding": "of fp16 and bf16 weights, in every row: ``\"nearest\"``, ``\"stochastic\"``, ``\"compensated\"``.",
    "seed": "of the random numbers of stochastic rounding, in every row; replicas of a model need the same.",
    "adamw": "columns of the rest's row, over lr 3e-4, betas (0.9, 0.95), eps 1e-8 and the same decay; biases and gains are not decayed.",
    "override": "selector -> a row's name, a row, a number that multiplies the step, or ``\"skip\"`` for what another optimizer trains.",
    "policy": "rules that run inside the step; they need a module.",
    "layouts": "selector -> ``nw.Layout``, or a function that gives one, where the axes are not what the module's type says.",
}  # fmt: skip
"""Arguments that mean the same in all presets."""


def documented(preset: type[Preset]) -> type[Preset]:
    """Completes ``Args:`` of a preset's docstring by what is ``COMMON``, in the order of its signature."""
    head, _, given = inspect.cleandoc(preset.__doc__ or "").partition("\nArgs:\n")
    own = dict(re.findall(r"^    (\w+): (.+(?:\n {8}.+)*)", given, re.MULTILINE))
    names = list(inspect.signature(preset.__init__).parameters)[1:]
    preset.__doc__ = f"{head.rstrip()}\n\nArgs:\n" + "\n".join(f"    {name}: {own.get(name) or COMMON[name]}" for name in names)
    return preset


def _columns(given: Mapping[str, Any], **own: Any) -> Row:
    """The main row: a preset's arguments as far as they are columns, and what makes it this method."""
    return {**{column: given[column] for column in DEFAULTS if column in given}, **own}


def _checked(rows: dict[str, Row], roles: dict[str, str], main: str) -> Built:
    """PolicyError for an option of the user's that no part of its row uses, where it would be left out in silence."""
    for name, row in rows.items():
        full = complete(row, f"the row {name!r}")
        check_row(full, f"the row {name!r}")
        refuse_unused(row, full, f"the row {name!r}")
    return rows, roles, main


def _everywhere(name: str, row: Row) -> Built:
    """One row for every role."""
    return _checked({name: row}, dict.fromkeys(ROLES, name), name)


def _beside_adamw(name: str, row: Row, adamw: Columns, by_role: Mapping[str, Row] | None = None) -> Built:
    """``row`` for matrices, AdamW for the rest: with the same decay, but none of biases and gains. by_role: columns over those of the row
    that the role takes otherwise."""
    rest: Row = {"lr": 3e-4, "direction": "adam", "betas": (0.9, 0.95), "eps": 1e-8, "decay": "weight", "weight_decay": row["weight_decay"]}
    rest = {**rest, **{column: row[column] for column in EVERYWHERE}, **(adamw or {})}
    rows = {name: row, "adamw": rest, "adamw_undecayed": {**rest, "weight_decay": 0.0}}
    of = {role: "adamw_undecayed" if role in UNDECAYED else "adamw" for role in ROLES} | dict.fromkeys(MATRICES, name)
    for role, columns in (by_role or {}).items():
        if role not in ROLES:
            raise PolicyError(f"by_role has columns for {role!r}, which is no role.{nearest(role, ROLES)}")
        base, of[role] = of[role], f"{of[role]}_{role}"
        rows[of[role]] = {**rows[base], **columns}
    return _checked(rows, of, name)


def _averaged(nesterov: bool) -> str:
    return "ema_nesterov" if nesterov else "ema"


# ---------------------------------------------------------------------------------------------------------- one row for all


@documented
class SGD(NormOptimizer):
    """``torch.optim.SGD``: b ← μ·b + g, w ← w − η·b, or w − η·(g + μ·b) with Nesterov's look ahead (Sutskever et al., 2013).

    Args:
        lr: η, in the weight's unit over the gradient's: it depends on the scale of the loss. 1e-3 is torch's.
        momentum: μ, in [0, 1); 0, torch's default, is plain descent.
        nesterov: the look ahead; it needs a momentum.
        weight_decay: λ of ``decay``; 0, as torch's.
        decay: ``"gradient"``, torch's, is g ← g + λ·w; ``"weight"`` is decoupled; ``"direction"``, ``"cautious"``, ``"none"``.
    """

    def __init__(
        self, params: Params, lr: Rate = 1e-3, *, momentum: float = 0.0, weight_decay: float = 0.0, nesterov: bool = False,
        decay: str = "gradient", hold: str = "none", limit: float = 1.0, per: str = "matrix", radius: Radius = 1.0, maximize: bool = False,
        rounding: str = "nearest", seed: int = 0, override: Override = None, policy: Rules = None, layouts: Layouts = None,
    ) -> None:  # fmt: skip
        if nesterov and momentum == 0:
            raise ValueError("nesterov=True needs a momentum > 0.")
        direction = "plain" if momentum == 0 else "nesterov" if nesterov else "heavy_ball"
        super().__init__(params, *_everywhere("sgd", _columns(locals(), direction=direction)), override, policy, layouts)


@documented
class AdamW(NormOptimizer):
    """``torch.optim.AdamW(fused=True)``, by the same kernel: w ← (1 − ηλ)·w − η·m̂/(√v̂ + ε) (Loshchilov & Hutter, 2019).

    Args:
        lr: η, about the change of each entry a step. 1e-3 is torch's.
        weight_decay: λ of ``decay``; 0.01 is torch's. It decays everything, as torch's does.
    """

    def __init__(
        self, params: Params, lr: Rate = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2, *,
        decay: str = "weight", hold: str = "none", limit: float = 1.0, per: str = "matrix", radius: Radius = 1.0, maximize: bool = False,
        rounding: str = "nearest", seed: int = 0, override: Override = None, policy: Rules = None, layouts: Layouts = None,
    ) -> None:  # fmt: skip
        super().__init__(params, *_everywhere("adamw", _columns(locals(), direction="adam")), override, policy, layouts)


@documented
class NormalizedSGD(NormOptimizer):
    """w ← w − η·b/‖b‖ of each block, b ← μ·b + (1 − μ)·g (Cutkosky & Mehta, 2020, arXiv 2002.03305).

    Args:
        lr: η, the length of the step of each block, in the weight's unit.
        norm: what is 1 afterwards: ``"l2"``, ``"l1"``, ``"linf"``, ``"rms"``, ``"spectral"``, …
    """

    def __init__(
        self, params: Params, lr: Rate = 1e-2, *, momentum: float = 0.9, norm: str = "l2", weight_decay: float = 0.0,
        decay: str = "weight", hold: str = "none", limit: float = 1.0, per: str = "tensor", radius: Radius = 1.0, maximize: bool = False,
        rounding: str = "nearest", seed: int = 0, override: Override = None, policy: Rules = None, layouts: Layouts = None,
    ) -> None:  # fmt: skip
        row = _columns(locals(), direction="ema", act="normalize")
        super().__init__(params, *_everywhere("normalized", row), override, policy, layouts)


@documented
class Signum(NormOptimizer):
    """w ← w − η·sign(b), b ← μ·b + (1 − μ)·g: steepest descent under the largest entry (Bernstein et al., 2018, arXiv 1802.04434).

    Args:
        lr: η, the change of every entry, in the weight's unit.
    """

    def __init__(
        self, params: Params, lr: Rate = 1e-4, *, momentum: float = 0.9, weight_decay: float = 0.0,
        decay: str = "weight", hold: str = "none", limit: float = 1.0, per: str = "tensor", radius: Radius = 1.0, maximize: bool = False,
        rounding: str = "nearest", seed: int = 0, override: Override = None, policy: Rules = None, layouts: Layouts = None,
    ) -> None:  # fmt: skip
        row = _columns(locals(), direction="ema", act="lmo", norm="linf")
        super().__init__(params, *_everywhere("signum", row), override, policy, layouts)


@documented
class Lion(NormOptimizer):
    """w ← (1 − ηλ)·w − η·sign(β₁·b + (1 − β₁)·g), then b ← β₂·b + (1 − β₂)·g (Chen et al., 2023, arXiv 2302.06675).

    Args:
        lr: η, the change of every entry; the authors take a third to a tenth of AdamW's.
        betas: β₁ of the step and β₂ of the average; the authors'.
        weight_decay: λ of ``decay``; the authors take three to ten times AdamW's.
    """

    def __init__(
        self, params: Params, lr: Rate = 1e-4, betas: Betas = (0.9, 0.99), weight_decay: float = 0.0, *,
        decay: str = "weight", hold: str = "none", limit: float = 1.0, per: str = "tensor", radius: Radius = 1.0, maximize: bool = False,
        rounding: str = "nearest", seed: int = 0, override: Override = None, policy: Rules = None, layouts: Layouts = None,
    ) -> None:  # fmt: skip
        row = _columns(locals(), direction="lion", act="lmo", norm="linf")
        super().__init__(params, *_everywhere("lion", row), override, policy, layouts)


@documented
class LARS(NormOptimizer):
    """v ← μ·v + η·ratio·(g + λ·w), w ← w − v, ratio = trust·‖w‖/(‖g‖ + λ‖w‖) per tensor (You, Gitman & Ginsburg, 2017, arXiv 1708.03888).

    Biases and gains take the same step with ratio 1, as the authors' later work does. Where ‖w‖ or ‖g‖ is 0 the ratio is 1.

    Args:
        lr: η; times ``trust`` it is about the relative change of each tensor. Of biases and gains it is the plain rate.
        momentum: μ of the scaled step v, so that a falling rate does not rescale what is under way.
        trust: the share of ‖w‖ that a step may change; 1e-3 is the paper's.
        weight_decay: λ of ``decay``; default 0. The paper trains AlexNet with 5e-4.
        decay: ``"gradient"``, the paper's, is g ← g + λ·w; ``"weight"``, ``"cautious"``, ``"direction"``, ``"none"``.
    """

    def __init__(
        self, params: Params, lr: Rate = 0.1, *, momentum: float = 0.9, trust: float = 1e-3, weight_decay: float = 0.0,
        decay: str = "gradient", hold: str = "none", limit: float = 1.0, per: str = "tensor", radius: Radius = 1.0, maximize: bool = False,
        rounding: str = "nearest", seed: int = 0, override: Override = None, policy: Rules = None, layouts: Layouts = None,
    ) -> None:  # fmt: skip
        row = _columns(locals(), velocity=momentum if momentum != 0 else False, scale="lars")    # False: one that comes is LARS's own
        del row["momentum"]
        unscaled = {column: value for column, value in row.items() if column != "trust"} | {"scale": "absolute"}
        roles = {role: "unscaled" if role in UNDECAYED else "lars" for role in ROLES}
        super().__init__(params, *_checked({"lars": row, "unscaled": unscaled}, roles, "lars"), override, policy, layouts)


@documented
class LAMB(NormOptimizer):
    """w ← w − η·(‖w‖/‖u‖)·u per tensor, u = Adam's direction + λ·w (You et al., 2020, arXiv 1904.00962).

    Where ‖w‖ or ‖u‖ is 0 the ratio is 1.

    Args:
        lr: η, the relative change of each tensor.
        weight_decay: λ of ``decay``; default 0. The paper trains BERT with 0.01.
        decay: ``"direction"``, the paper's, is u ← u + λ·w; ``"weight"``, ``"cautious"``, ``"gradient"``, ``"none"``.
    """

    def __init__(
        self, params: Params, lr: Rate = 1e-3, betas: Betas = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0, *,
        decay: str = "direction", hold: str = "none", limit: float = 1.0, per: str = "tensor", radius: Radius = 1.0, maximize: bool = False,
        rounding: str = "nearest", seed: int = 0, override: Override = None, policy: Rules = None, layouts: Layouts = None,
    ) -> None:  # fmt: skip
        super().__init__(params, *_everywhere("lamb", _columns(locals(), direction="adam", scale="lamb")), override, policy, layouts)


# ---------------------------------------------------------------------------------------------------------- matrices, and AdamW


ADJUST = {
    "original": "original", "match_rms_adamw": "match_rms_adamw", "rms_rms": "rms_rms", "spectral_unclamped": "rms_rms", "none": "absolute",
}  # fmt: skip
TORCH_EPS = 1e-7    # torch.optim.Muon's


@documented
class Muon(NormOptimizer):
    """Momentum orthogonalised: w ← (1 − ηλ)w − η·scale·UVᵀ of the (Nesterov) momentum UΣVᵀ (Jordan et al., 2024).

    Hidden matrices, convolutions (as c_out × c_in·k matrices) and recurrent gates, each q, k, v and gate on its own; the rest by AdamW.
    The arguments of ``torch.optim.Muon`` stand first, in its order, and mean the same.

    Args:
        lr: η of the matrices. 0.02 is the authors' for ``adjust_lr_fn="original"``; with ``"match_rms_adamw"`` take AdamW's.
            torch has 1e-3.
        weight_decay: λ of ``decay``; 0.01, where torch has 0.1.
        ns_coefficients: (a, b, c) of a Newton–Schulz step t ← a·t + b·t³ + c·t⁵ on the singular values; the authors'.
        eps: the least Frobenius norm that the momentum is divided by before the iteration: below it, steps become smaller.
        ns_steps: how many Newton–Schulz steps, from 1 to 99. Five bring values from 0.003 on to 0.7 to 1.2.
        adjust_lr_fn: scale. ``"original"`` (None is the same) √max(1, d_out/d_in), ``"match_rms_adamw"`` 0.2·√max(d_out, d_in), whose root
            mean square is AdamW's (Liu et al., 2025), ``"rms_rms"`` √(d_out/d_in), one rate for every width (Large et al., 2024), which
            torch 2.15 calls ``"spectral_unclamped"``; that name is taken, too. ``"none"`` 1 is not torch's.
        polar: ``"quintic"`` is torch's iteration, which ``ns_coefficients``, ``ns_steps`` and ``eps`` belong to; ``"fast"`` is cheaper
            and nearer to orthogonal; ``"polar_express"``, ``"accurate"``, ``"exact"``.
    """

    def __init__(
        self, params: Params, lr: Rate = 0.02, weight_decay: float = 0.01, momentum: float = 0.95, nesterov: bool = True,
        ns_coefficients: tuple[float, float, float] = QUINTIC, eps: float = TORCH_EPS, ns_steps: int = 5, adjust_lr_fn: str | None = None,
        *, polar: str = "quintic", decay: str = "weight", hold: str = "none", limit: float = 1.0, per: str = "matrix", radius: Radius = 1.0,
        maximize: bool = False, rounding: str = "nearest", seed: int = 0, adamw: Columns = None, override: Override = None,
        policy: Rules = None, layouts: Layouts = None,
    ) -> None:  # fmt: skip
        if (adjust_lr_fn or "original") not in ADJUST:
            raise PolicyError(f"adjust_lr_fn is {adjust_lr_fn!r}.{nearest(str(adjust_lr_fn), ADJUST)}")
        row = _columns(locals(), direction=_averaged(nesterov), act="lmo", norm="spectral", scale=ADJUST[adjust_lr_fn or "original"])
        row["polar"] = newton_schulz(ns_coefficients, ns_steps)
        if polar != "quintic":
            if row["polar"] != "quintic":
                raise PolicyError(f"polar={polar!r} has steps of its own: leave out ns_coefficients and ns_steps, or take polar='quintic'.")
            row["polar"] = polar
            if eps == TORCH_EPS:    # nobody asked for it
                del row["eps"]
        super().__init__(params, *_beside_adamw("muon", row, adamw), override, policy, layouts)


@documented
class NorMuon(NormOptimizer):
    """Muon whose units are divided by the root of their second moment, the whole scaled to RMS 0.2 (Li et al., 2025, arXiv 2510.05491).

    Args:
        lr: η, of the matrices and of the rest; the step's root mean square is 0.2·η, so AdamW's rate carries over.
        weight_decay: λ of ``decay``, 0.1 as the paper's.
        row_beta: of the running mean of each unit's squares.
        eps: added to the root of a unit's mean square.
        adamw: columns of the rest's row, over the same lr and decay, betas (0.9, 0.95) and eps 1e-8; biases and gains are not decayed.
    """

    def __init__(
        self, params: Params, lr: Rate = 3.6e-4, *, momentum: float = 0.95, nesterov: bool = False, row_beta: float = 0.95,
        eps: float = 1e-8, weight_decay: float = 0.1, polar: str = "quintic", decay: str = "weight", hold: str = "none", limit: float = 1.0,
        per: str = "matrix", radius: Radius = 1.0, maximize: bool = False, rounding: str = "nearest", seed: int = 0, adamw: Columns = None,
        override: Override = None, policy: Rules = None, layouts: Layouts = None,
    ) -> None:  # fmt: skip
        row = _columns(locals(), direction=_averaged(nesterov), act="lmo", norm="spectral", scale="normuon")
        super().__init__(params, *_beside_adamw("normuon", row, {"lr": lr, **(adamw or {})}), override, policy, layouts)


@documented
class Scion(NormOptimizer):
    """w ← w − η·ρ·(−lmo(b)) under a norm per layer, b ← μ·b + (1 − μ)·g (Pethick et al., 2025, arXiv 2502.07529).

    Hidden and recurrent matrices: spectral·√(d_out/d_in); convolutions the same with √(c_out/c_in)/k² of a k×k kernel; biases and gains
    RMS; embeddings and heads sign / d_in. Radii and lr are the paper's for GPT; for MLPs 1 and 1024 at 2⁻⁶, for CNNs 8 and 128 at 2⁻⁴.

    Args:
        lr: η; the step in each layer's norm is η·ρ. Constrained, it is the share of the way to the ball's boundary.
        momentum: μ, 1 − α of the paper.
        constrained: w ← (1 − η)·w − η·ρ·(−lmo(b)), which keeps every weight within ρ of its norm, so no decay is needed.
        radius: ρ of all but embeddings and heads.
        head_radius: ρ of embeddings and heads.
        per: the block of hidden matrices, as ``"matrix"`` or ``"head"``; other parameters are one block each.
    """

    def __init__(
        self, params: Params, lr: Rate = 2.0**-12, *, momentum: float = 0.9, constrained: bool = False, radius: Radius = 50.0,
        head_radius: Radius = 3000.0, weight_decay: float = 0.0, polar: str = "quintic", decay: str = "weight", hold: str = "none",
        limit: float = 1.0, per: str = "matrix", maximize: bool = False, rounding: str = "nearest", seed: int = 0,
        override: Override = None, policy: Rules = None, layouts: Layouts = None,
    ) -> None:  # fmt: skip
        if constrained and hold != "none":
            raise PolicyError(f"constrained=True is hold='frank_wolfe', and hold is {hold!r}: choose one.")
        row = _columns(locals(), direction="ema", act="lmo", hold="frank_wolfe" if constrained else hold)
        rows = {
            "spectral": {**row, "norm": "spectral", "scale": "conv_rms_rms"},
            "sign": {**row, "norm": "sign", "per": "tensor", "radius": head_radius},
            "rms": {**row, "norm": "rms", "per": "tensor"},
        }
        roles = {role: "spectral" if role in MATRICES else "sign" if role in ("embedding", "head") else "rms" for role in ROLES}
        super().__init__(params, *_checked(rows, roles, "spectral"), override, policy, layouts)


@documented
class AdamH(NormOptimizer):
    """Hyperball over Adam: w ← R·normalise(w − η·R·normalise(u)), u Adam's direction, R = ‖w‖_F at the first step (arXiv 2606.16899).

    Matrices only, each parameter as one; the rest by AdamW without decay. A matrix that is zero at the first step is an error.

    Args:
        lr: η, the length of a step relative to the weight: the angle, since the norm stays R.
        weight_decay: 0: a norm that is held needs none.
        adamw: columns of the rest's row, over lr 3e-4, the same betas and eps, and no decay.
    """

    def __init__(
        self, params: Params, lr: Rate = 1e-2, *, betas: Betas = (0.9, 0.95), eps: float = 1e-8, weight_decay: float = 0.0,
        decay: str = "weight", hold: str = "sphere", limit: float = 1.0, per: str = "tensor", radius: Radius = 1.0, maximize: bool = False,
        rounding: str = "nearest", seed: int = 0, adamw: Columns = None, override: Override = None, policy: Rules = None,
        layouts: Layouts = None,
    ) -> None:  # fmt: skip
        row = _columns(locals(), direction="adam", scale="init")
        super().__init__(params, *_beside_adamw("adamh", row, {"betas": betas, "eps": eps, **(adamw or {})}), override, policy, layouts)


@documented
class MuonH(NormOptimizer):
    """Hyperball over Muon: w ← R·normalise(w − η·R·normalise(UVᵀ)), R = ‖w‖_F at the first step (arXiv 2606.16899).

    Each matrix (q, k, v, gate) on its own sphere; the rest by AdamW without decay. A matrix that is zero at the first step is an error.

    Args:
        lr: η, the length of a step relative to the weight: the angle, since the norm stays R.
        weight_decay: 0: a norm that is held needs none.
    """

    def __init__(
        self, params: Params, lr: Rate = 1e-2, *, momentum: float = 0.95, nesterov: bool = True, weight_decay: float = 0.0,
        polar: str = "quintic", decay: str = "weight", hold: str = "sphere", limit: float = 1.0, per: str = "matrix", radius: Radius = 1.0,
        maximize: bool = False, rounding: str = "nearest", seed: int = 0, adamw: Columns = None, override: Override = None,
        policy: Rules = None, layouts: Layouts = None,
    ) -> None:  # fmt: skip
        row = _columns(locals(), direction=_averaged(nesterov), act="lmo", norm="spectral", scale="init")
        super().__init__(params, *_beside_adamw("muonh", row, adamw), override, policy, layouts)


@documented
class Ridge(NormOptimizer):
    """Momentum through its damped pseudo-inverse: w ← (1 − ηλ)w − η·0.2·√(d_out·d_in)·u/‖u‖, u = (y·yᵀ + δ)⁻¹·y of the scaled momentum y.

    As Muon, for hidden matrices, convolutions and gates; but small singular values of the momentum come out larger than its largest
    ones, instead of equal to them, and tiny ones stay tiny. An inverse by Cholesky takes the place of an iteration, at about its price.
    Found by this project, see docs/results.md; :func:`normwise.norms.linalg.ridge_inverse` has the formula and its sources.

    Args:
        lr: η of the matrices; the root mean square of an update is 0.2·η, as AdamW's is about, whatever the shape.
        momentum: μ, shorter than Muon's 0.95; docs/results.md has both.
        damping: δ, relative to the mean squared singular value. Larger is nearer to momentum itself, and safer where it is noise.
        weight_decay: λ of ``decay``, 0.3 of matrices; the rest has 0.1.
        by_role: role -> columns, over those of the row that it takes otherwise: ``{"conv": {"damping": 0.1}}``. Gates, ``"recurrent"``,
            have momentum 0.9 and ten times the damping where nothing else is said. PolicyError for an unknown role.
        adamw: columns of the rest's row, over 0.4·lr, betas (0.9, 0.99) and decay 0.1; biases and gains are not decayed.
    """

    def __init__(
        self, params: Params, lr: Rate = 0.02, *, momentum: float = 0.8, nesterov: bool = True, damping: float = 0.03,
        row_beta: float = 0.0, weight_decay: float = 0.3, decay: str = "weight", hold: str = "none", limit: float = 1.0,
        per: str = "matrix", radius: Radius = 1.0, maximize: bool = False, rounding: str = "nearest", seed: int = 0,
        by_role: Mapping[str, Row] | None = None, adamw: Columns = None, override: Override = None, policy: Rules = None,
        layouts: Layouts = None,
    ) -> None:  # fmt: skip
        row = _columns(locals(), direction=_averaged(nesterov), act="ridge", scale="normuon")
        full = complete(row, "the row 'ridge'")
        check_row(full, "the row 'ridge'")    # before anything is reckoned from it
        given = by_role or {}
        roles = {**given, "recurrent": {"momentum": 0.9, "damping": 10 * damping, **given.get("recurrent", {})}}
        rest = {"lr": 0.4 * float(full["lr"]), "betas": (0.9, 0.99), "weight_decay": 0.1, **(adamw or {})}
        super().__init__(params, *_beside_adamw("ridge", row, rest, roles), override, policy, layouts)


# ---------------------------------------------------------------------------------------------------------- asked of the model


SCORES, VALUES, HEAD_OVER_GATES = 3.0, 0.5, 3.0
"""Found by trial on development seeds, docs/results.md: for queries and keys, for values and output, for the head over gates."""


def role_factors(model: nn.Module) -> dict[str, Radius]:
    """Factors of the steps by what the parameters are for, to be given to a matrix preset: ``Ridge(model, override=role_factors(model))``.

    Three times the step for the queries and keys of every attention, half of it for its values and output, the two circuits of Elhage et
    al. (2021); block by block where q, k and v are one tensor whose layout says so, while one that nobody has told apart keeps one step.
    Three times for the head of a model with recurrent layers. Measured for :class:`Ridge` only, on small networks: docs/results.md.

    Returns:
        selector -> factor, for what ``model`` has and trains; empty where it has none of it.

    Raises:
        LayoutError: a lazy parameter that has no shape yet.
    """
    return factors_of(Inventory(model).trainable)


def factors_of(entries: Sequence[Entry]) -> dict[str, Radius]:
    """:func:`role_factors` of what an inventory found."""
    attention, roles = {e.attention for e in entries}, {e.role for e in entries}
    found: dict[str, Radius] = {}
    if attention & {"q", "k"}:
        found["attention:qk"] = SCORES
    if attention & {"v", "out"}:
        found["attention:ov"] = VALUES
    for e in entries:
        if e.attention in ("qkv", "kv") and e.layout.certain:    # a factor for each matrix, where somebody has told them apart
            parts = e.layout.parts or (QKV if e.attention == "qkv" and e.layout.size("s") == len(QKV) else ())
            if parts:
                found[e.name] = tuple({"q": SCORES, "k": SCORES, "v": VALUES}.get(part, 1.0) for part in parts)
    if {"recurrent", "head"} <= roles:
        found["role:head"] = HEAD_OVER_GATES
    return found


def over_convolutions(entries: Sequence[Entry]) -> bool:
    """Whether there is a head over convolutions, with neither attention nor gates."""
    roles = {e.role for e in entries}
    return {"conv", "head"} <= roles and "recurrent" not in roles and not any(e.attention for e in entries)


@documented
class auto(Ridge):    # in lower case as enum.auto: it is called for what it does, and is still the class that trainers want
    """The preset to start with: nothing to tune. It is :class:`Ridge`, configured from your model.

    - Linear layers take Ridge's step at 0.028, and gates at 0.04 with more damping and less decay.
    - Where there are normalisation layers, of torch or of the model, convolutions take 0.04 with more damping, and the rest AdamW's 0.008.
      A model without them bears smaller steps of convolutions, 0.02, and needs larger ones of the rest, 0.016.
    - Queries and keys, values and output, and the head over gates step as :func:`role_factors` says; the head of a network of
      convolutions, without attention or gates, has ten times the decay.

    ``print(optimizer.routing)`` shows who takes what. The numbers were chosen for short runs of small networks, with the rates of
    :func:`normwise.optim.schedule` and no clipping; docs/results.md says, task by task, what that is worth beside tuning.

    >>> optimizer = normwise.optim.auto(model)
    >>> schedule = normwise.optim.schedule(optimizer, steps=1000)    # schedule.step() after each optimizer.step()

    Args:
        params: a module; or matrices, which all take the main row.
        override: as in every preset; yours acts after those factors, and takes the place of one with the same selector.
    """

    def __init__(
        self, params: Params, *, maximize: bool = False, override: Override = None, policy: Rules = None, layouts: Layouts = None
    ) -> None:
        by_role: dict[str, Row] = {}
        rest: Columns = None
        if isinstance(params, nn.Module):
            entries = Inventory(params, layouts=layouts).trainable
            normalised = normalises(params)    # with frozen layers, too, and those without gains
            by_role["conv"] = {"lr": 0.04, "damping": 0.1} if normalised else {"lr": 0.02}
            by_role["recurrent"] = {"lr": 0.04, "damping": 1.0, "momentum": 0.85, "weight_decay": 0.1}
            if over_convolutions(entries):
                by_role["head"] = {"weight_decay": 1.0}
            rest = {"lr": 0.008 if normalised else 0.016}
            override = {**factors_of(entries), **(override or {})}
        super().__init__(params, 0.028, by_role=by_role, adamw=rest, override=override, policy=policy, layouts=layouts, maximize=maximize)


PRESETS: dict[str, type[NormOptimizer]] = {
    c.__name__: c for c in (SGD, AdamW, NormalizedSGD, Signum, Lion, LARS, LAMB, Muon, NorMuon, Scion, AdamH, MuonH, Ridge)
}
"""Every preset by its name; :class:`auto` is the one that chooses for you."""
