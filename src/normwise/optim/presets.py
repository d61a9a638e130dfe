"""Named methods: each is rows of parts and a routing of roles, with its source. None is a class of its own.

Every preset takes, beside what its signature names, any column of its main row by keyword (``maximize=True``, ``per="head"``,
``hold="ball", limit=3.0``; see ``normwise.optim.CHOICES``), ``override=`` (selector -> row, a row's name, a number that multiplies the
step, or ``"skip"`` for what another optimizer trains), ``policy=`` (rules that run inside the step) and ``layouts=`` (selector ->
``nw.Layout``, or a function that gives one, where the axes are not what the module's type says).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from normwise.errors import PolicyError, nearest
from normwise.optim.columns import Radius, Row, check_row, complete, refuse_unused
from normwise.optim.depth_scale import factors_of, over_convolutions
from normwise.optim.optimizer import NormOptimizer
from normwise.parameters.inventory import Inventory, LayoutLike
from normwise.parameters.roles import normalises

Params = nn.Module | Iterable[Any]
Override = Mapping[Any, str | Row | Radius] | None
Layouts = Mapping[Any, LayoutLike] | None
MATRICES = ("hidden", "conv", "recurrent")
"""What the matrix methods take; embeddings, heads, biases, gains and bare parameters go to AdamW, as their authors do."""
UNDECAYED = ("bias", "gain")
"""What the AdamW beside a matrix method does not decay."""
ROLES = ("hidden", "conv", "embedding", "head", "recurrent", "bias", "gain", "other")
EVERYWHERE = ("maximize", "rounding", "seed")
"""Columns of the whole model: given to a preset, every row takes them."""
ADJUST = {"original": "original", "match_rms_adamw": "match_rms_adamw", "rms_rms": "rms_rms", "none": "absolute"}


def adamw_row(lr: float = 1e-3, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 0.0) -> Row:
    """AdamW (Loshchilov & Hutter, 2019)."""
    return {"lr": lr, "direction": "adam", "betas": betas, "eps": eps, "decay": "weight", "weight_decay": weight_decay}


def _made(
    params: Params, rows: Mapping[str, Row], roles: Mapping[str, str], main: str, override: Override, policy: Any, layouts: Layouts
) -> NormOptimizer:  # fmt: skip
    """The optimizer; PolicyError for an option of the user's that no part of its row uses, where it would be left out in silence."""
    for name, row in rows.items():
        full = complete(row, f"the row {name!r}")
        check_row(full, f"the row {name!r}")
        refuse_unused(row, full, f"the row {name!r}")
    return NormOptimizer(params, rows, roles, main, override, policy, layouts)


def _single(params: Params, name: str, row: Row, override: Override, policy: Any, layouts: Layouts) -> NormOptimizer:
    """One row for every role."""
    return _made(params, {name: row}, dict.fromkeys(ROLES, name), name, override, policy, layouts)


def _beside_adamw(
    params: Params, name: str, row: Row, adamw: Row | None, override: Override, policy: Any, layouts: Layouts,
    by_role: Mapping[str, Row] | None = None,
) -> NormOptimizer:
    """``row`` for matrices, AdamW for the rest: with the same decay, but none of biases and gains. by_role: columns over those of the row
    that the role takes otherwise."""
    common = {column: row[column] for column in EVERYWHERE if column in row}
    rest = {**adamw_row(3e-4, (0.9, 0.95), weight_decay=row.get("weight_decay", 0.0)), **common, **(adamw or {})}
    rows = {name: row, "adamw": rest, "adamw_undecayed": {**rest, "weight_decay": 0.0}}
    of = {role: "adamw_undecayed" if role in UNDECAYED else "adamw" for role in ROLES} | dict.fromkeys(MATRICES, name)
    for role, columns in (by_role or {}).items():
        if role not in ROLES:
            raise PolicyError(f"by_role has columns for {role!r}, which is no role.{nearest(role, ROLES)}")
        base, of[role] = of[role], f"{of[role]}_{role}"
        rows[of[role]] = {**rows[base], **columns}
    return _made(params, rows, of, name, override, policy, layouts)


def _direction(momentum: float, nesterov: bool) -> str:
    if nesterov and momentum == 0:
        raise ValueError("nesterov=True needs a momentum > 0.")
    return "plain" if momentum == 0 else "nesterov" if nesterov else "heavy_ball"


def SGD(
    params: Params, lr: float = 1e-3, *, momentum: float = 0.0, nesterov: bool = False, weight_decay: float = 0.0,
    override: Override = None, policy: Any = None, layouts: Layouts = None, **columns: Any,
) -> NormOptimizer:  # fmt: skip
    """``torch.optim.SGD``: b ← μ·b + g + λ·w, w ← w − η·b (or η·(g + λ·w + μ·b) with ``nesterov``). Defaults are torch's."""
    row = {"lr": lr, "direction": _direction(momentum, nesterov), "momentum": momentum, "decay": "gradient", "weight_decay": weight_decay}
    return _single(params, "sgd", {**row, **columns}, override, policy, layouts)


def AdamW(
    params: Params, lr: float = 1e-3, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8, weight_decay: float = 1e-2,
    override: Override = None, policy: Any = None, layouts: Layouts = None, **columns: Any,
) -> NormOptimizer:  # fmt: skip
    """``torch.optim.AdamW(fused=True)``, by the same kernel (Loshchilov & Hutter, 2019). Defaults are torch's, which decay everything."""
    return _single(params, "adamw", {**adamw_row(lr, betas, eps, weight_decay), **columns}, override, policy, layouts)


def NormalizedSGD(
    params: Params, lr: float = 1e-2, *, momentum: float = 0.9, norm: Any = "l2", per: str = "tensor",
    override: Override = None, policy: Any = None, layouts: Layouts = None, **columns: Any,
) -> NormOptimizer:  # fmt: skip
    """w ← w − η·b/‖b‖ per block, b the averaged gradient (Cutkosky & Mehta, 2020). The learning rate is the length of the step."""
    row = {"lr": lr, "direction": "ema", "momentum": momentum, "act": "normalize", "norm": norm, "per": per}
    return _single(params, "normalized", {**row, **columns}, override, policy, layouts)


def Signum(
    params: Params, lr: float = 1e-4, *, momentum: float = 0.9, weight_decay: float = 0.0,
    override: Override = None, policy: Any = None, layouts: Layouts = None, **columns: Any,
) -> NormOptimizer:  # fmt: skip
    """w ← w − η·sign(b), b ← μ·b + (1 − μ)·g: steepest descent under the largest entry (Bernstein et al., 2018)."""
    row = {"lr": lr, "direction": "ema", "momentum": momentum, "act": "lmo", "norm": "linf", "per": "tensor", "weight_decay": weight_decay}
    return _single(params, "signum", {**row, **columns}, override, policy, layouts)


def Lion(
    params: Params, lr: float = 1e-4, *, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0,
    override: Override = None, policy: Any = None, layouts: Layouts = None, **columns: Any,
) -> NormOptimizer:  # fmt: skip
    """w ← (1 − ηλ)w − η·sign(β₁·b + (1 − β₁)·g), then b ← β₂·b + (1 − β₂)·g (Chen et al., 2023)."""
    row = {"lr": lr, "direction": "lion", "betas": betas, "act": "lmo", "norm": "linf", "per": "tensor", "weight_decay": weight_decay}
    return _single(params, "lion", {**row, **columns}, override, policy, layouts)


def LARS(
    params: Params, lr: float = 0.1, *, momentum: float = 0.9, trust: float = 1e-3, weight_decay: float = 0.0,
    override: Override = None, policy: Any = None, layouts: Layouts = None, **columns: Any,
) -> NormOptimizer:  # fmt: skip
    """v ← μ·v + η·ratio·(g + λ·w), w ← w − v, ratio = trust·‖w‖/(‖g‖ + λ‖w‖) per tensor (You, Gitman & Ginsburg, 2017).

    Biases and gains take the same step with ratio 1, as the authors' later work does.
    """
    plain = {"lr": lr, "direction": "plain", "velocity": momentum, "decay": "gradient", "weight_decay": weight_decay, "per": "tensor"}
    rows = {"lars": {**plain, "scale": "lars", "trust": trust, **columns}, "unscaled": {**plain, **columns, "scale": "absolute"}}
    roles = {role: "unscaled" if role in UNDECAYED else "lars" for role in ROLES}
    return _made(params, rows, roles, "lars", override, policy, layouts)


def LAMB(
    params: Params, lr: float = 1e-3, *, betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-6, weight_decay: float = 0.0,
    override: Override = None, policy: Any = None, layouts: Layouts = None, **columns: Any,
) -> NormOptimizer:  # fmt: skip
    """w ← w − η·(‖w‖/‖u‖)·u per tensor, u = Adam's direction + λ·w (You et al., 2020). Where ‖w‖ or ‖u‖ is 0 the ratio is 1."""
    row = {"scale": "lamb", "per": "tensor", "decay": "direction"}
    return _single(params, "lamb", {**adamw_row(lr, betas, eps, weight_decay), **row, **columns}, override, policy, layouts)


def Muon(
    params: Params, lr: float = 0.02, *, momentum: float = 0.95, nesterov: bool = True, adjust: str = "original",
    adamw: Row | None = None, override: Override = None, policy: Any = None, layouts: Layouts = None, **columns: Any,
) -> NormOptimizer:  # fmt: skip
    """Momentum orthogonalised: w ← (1 − ηλ)w − η·scale·UVᵀ of the (Nesterov) momentum (Jordan et al., 2024).

    Hidden matrices, convolutions (as c_out × c_in·k matrices) and recurrent gates, each q, k, v and gate on its own; the rest by AdamW.

    Args:
        lr: of the matrices; 0.02 is the authors' for ``adjust="original"``; with ``"match_rms_adamw"`` use AdamW's.
        adjust: ``"original"`` √max(1, d_out/d_in), ``"match_rms_adamw"`` 0.2·√max(d_out, d_in), ``"rms_rms"`` √(d_out/d_in), ``"none"``.
        adamw: columns of the rest's row, over lr 3e-4, betas (0.9, 0.95), eps 1e-8 and the same decay; biases and gains are not decayed.
        columns: ``weight_decay`` (0.01); ``polar``, ``"quintic"`` is torch's and the authors' iteration, ``"fast"`` is cheaper and
            nearer to orthogonal; ``per``, ``"matrix"`` or ``"head"``, attention heads one by one where the layout knows them.
    """
    if adjust not in ADJUST:
        raise PolicyError(f"adjust is {adjust!r}.{nearest(str(adjust), ADJUST)}")
    row = _fitting({**_orthogonal(lr, momentum, nesterov), "scale": ADJUST[adjust], "weight_decay": 0.01}, columns, 0.95)
    return _beside_adamw(params, "muon", row, adamw, override, policy, layouts)


def _fitting(row: Row, columns: Row, momentum: float) -> Row:
    """The row with the user's columns over it. Where they name a direction that keeps no momentum, the preset's own ``momentum``, which
    nobody has asked for, goes; one that the user gave stays, and is refused by name."""
    if columns.get("direction") in ("plain", "adam", "lion") and row["momentum"] == momentum:
        row = {column: value for column, value in row.items() if column != "momentum"}
    return {**row, **columns}


def _averaged(nesterov: bool) -> str:
    return "ema_nesterov" if nesterov else "ema"


def _orthogonal(lr: float, momentum: float, nesterov: bool) -> Row:
    return {"lr": lr, "direction": _averaged(nesterov), "momentum": momentum, "act": "lmo", "norm": "spectral", "polar": "quintic"}


def NorMuon(
    params: Params, lr: float = 3.6e-4, *, momentum: float = 0.95, nesterov: bool = False, row_beta: float = 0.95,
    adamw: Row | None = None, override: Override = None, policy: Any = None, layouts: Layouts = None, **columns: Any,
) -> NormOptimizer:  # fmt: skip
    """Muon whose units are divided by the root of their second moment, the whole scaled to RMS 0.2 (Li et al., 2025, arXiv 2510.05491).

    The rest by AdamW at the same learning rate (``adamw=`` changes its columns), biases and gains undecayed. ``weight_decay`` is 0.1.
    """
    own = {"row_beta": row_beta, "scale": "normuon", "weight_decay": 0.1}
    row = _fitting({**_orthogonal(lr, momentum, nesterov), **own}, columns, 0.95)
    return _beside_adamw(params, "normuon", row, {"lr": lr, **(adamw or {})}, override, policy, layouts)


def Scion(
    params: Params, lr: float = 2.0**-12, *, momentum: float = 0.9, constrained: bool = False, radius: float = 50.0,
    head_radius: float = 3000.0, override: Override = None, policy: Any = None, layouts: Layouts = None, **columns: Any,
) -> NormOptimizer:  # fmt: skip
    """w ← w − η·ρ·(−lmo(b)) under a norm per layer (Pethick et al., 2025, arXiv 2502.07529).

    Hidden and recurrent matrices: spectral·√(d_out/d_in); convolutions the same with √(c_out/c_in)/k² of a k×k kernel; biases and gains
    RMS; embeddings and heads sign / d_in with ``head_radius``. ``constrained``: w ← (1 − η)·w − η·ρ·(−lmo(b)), which keeps every weight
    within ρ of its norm, so no decay is needed. Radii and lr are the paper's for GPT; for MLPs 1 and 1024 at 2⁻⁶, for CNNs 8 and 128
    at 2⁻⁴. ``momentum`` is 1 − α of the paper. ``columns`` are of all three rows.
    """
    hold = "frank_wolfe" if constrained else "none"
    base = {"lr": lr, "direction": "ema", "momentum": momentum, "act": "lmo", "hold": hold, "polar": "quintic", **columns}
    rows = {
        "spectral": {"norm": "spectral", "scale": "conv_rms_rms", "radius": radius, **base},
        "sign": {"norm": "sign", "per": "tensor", "radius": head_radius, **base},
        "rms": {"norm": "rms", "per": "tensor", "radius": radius, **base},
    }
    roles = {role: "spectral" if role in MATRICES else "sign" if role in ("embedding", "head") else "rms" for role in ROLES}
    return _made(params, rows, roles, "spectral", override, policy, layouts)


def AdamH(
    params: Params, lr: float = 1e-2, *, betas: tuple[float, float] = (0.9, 0.95), eps: float = 1e-8,
    adamw: Row | None = None, override: Override = None, policy: Any = None, layouts: Layouts = None, **columns: Any,
) -> NormOptimizer:  # fmt: skip
    """Hyperball over Adam: w ← R·normalise(w − η·R·normalise(u)), u Adam's direction, R = ‖w‖_F at the first step (arXiv 2606.16899).

    The learning rate is the relative length of a step; there is no weight decay. Matrices only, each parameter as one (``per="tensor"``);
    the rest by AdamW without decay (``adamw=`` changes its columns). A matrix that is zero at the first step is an error.
    """
    row = {**adamw_row(lr, betas, eps), "per": "tensor", "scale": "init", "hold": "sphere", **columns}
    return _beside_adamw(params, "adamh", row, {"betas": betas, "eps": eps, **(adamw or {})}, override, policy, layouts)


def MuonH(
    params: Params, lr: float = 1e-2, *, momentum: float = 0.95, nesterov: bool = True,
    adamw: Row | None = None, override: Override = None, policy: Any = None, layouts: Layouts = None, **columns: Any,
) -> NormOptimizer:  # fmt: skip
    """Hyperball over Muon: w ← R·normalise(w − η·R·normalise(UVᵀ)), R = ‖w‖_F at the first step (arXiv 2606.16899).

    Each matrix (q, k, v, gate) on its own sphere; the rest as in :func:`AdamH`.
    """
    row = _fitting({**_orthogonal(lr, momentum, nesterov), "scale": "init", "hold": "sphere"}, columns, 0.95)
    return _beside_adamw(params, "muonh", row, adamw, override, policy, layouts)


def Ridge(
    params: Params, lr: float = 0.02, *, momentum: float = 0.8, nesterov: bool = True, damping: float = 0.03,
    by_role: Mapping[str, Row] | None = None, adamw: Row | None = None, override: Override = None, policy: Any = None,
    layouts: Layouts = None, **columns: Any,
) -> NormOptimizer:  # fmt: skip
    """Momentum through its damped pseudo-inverse: w ← (1 − ηλ)w − η·0.2·√(d_out·d_in)·u/‖u‖, u = (y·yᵀ + δ)⁻¹·y of the scaled momentum y.

    As Muon, for hidden matrices, convolutions and gates; but small singular values of the momentum come out larger than its largest
    ones, instead of equal to them, and tiny ones stay tiny. An inverse by Cholesky takes the place of an iteration, at about its price.
    Found by this project, see docs/results.md; :func:`normwise.norms.linalg.ridge_inverse` has the formula and its sources.

    Args:
        lr: of the matrices; the root mean square of an update is 0.2·lr, as AdamW's is about, whatever the shape.
        momentum: shorter than Muon's 0.95; docs/results.md has both.
        damping: δ, relative to the mean squared singular value. Larger is nearer to momentum itself, and safer where it is noise.
        by_role: role -> columns, over those of the row that it takes otherwise: ``{"conv": {"damping": 0.1}}``. Gates, ``"recurrent"``,
            have momentum 0.9 and ten times the damping where nothing else is said. PolicyError for what is no role.
        adamw: columns of the rest's row, over 0.4·lr, betas (0.9, 0.99); biases and gains are not decayed.
        columns: ``weight_decay`` (0.3, of matrices; the rest has 0.1); every other one of the main row.
    """
    own: Row = {
        "lr": lr, "direction": _averaged(nesterov), "momentum": momentum, "act": "ridge", "damping": damping, "scale": "normuon",
        "weight_decay": 0.3,
    }  # fmt: skip
    row = _fitting(own, columns, 0.8)
    full = complete(row, "the row 'ridge'")
    check_row(full, "the row 'ridge'")    # before anything is reckoned from it
    given = by_role or {}
    gates = {"momentum": 0.9, "damping": 10 * damping, **given.get("recurrent", {})}
    rest = {"lr": 0.4 * float(full["lr"]), "betas": (0.9, 0.99), "weight_decay": 0.1, **(adamw or {})}
    return _beside_adamw(params, "ridge", row, rest, override, policy, layouts, {**given, "recurrent": gates})


def auto(
    params: Params, *, maximize: bool = False, override: Override = None, policy: Any = None, layouts: Layouts = None
) -> NormOptimizer:
    """The preset to start with where nothing is known: no number to choose. It is :func:`Ridge` with what the model itself tells.

    - Linear layers take Ridge's step at 0.028, and gates at 0.04 with more damping and less decay.
    - Where there are normalisation layers, of torch or of the model, convolutions take 0.04 with more damping, and the rest AdamW's 0.008.
      A model without them bears smaller steps of convolutions, 0.02, and needs larger ones of the rest, 0.016.
    - Queries and keys, values and output, and the head over gates step as :func:`role_factors` says; the head of a network of
      convolutions, without attention or gates, has ten times the decay.

    ``print(optimizer.routing)`` shows who takes what. The numbers were chosen for short runs of small networks, with warm-up over 5% of the
    steps, then a rate that falls linearly to zero, and no clipping; docs/results.md says, task by task, what that is worth beside tuning.

    Args, returns and errors are those of every preset: a module (or matrices, which take the main row), ``maximize=``, ``override=``,
    ``policy=``, ``layouts=``. Your ``override`` acts after those factors, and takes the place of one with the same selector.
    """
    if not isinstance(params, nn.Module):
        return Ridge(params, 0.028, override=override, policy=policy, layouts=layouts, maximize=maximize)
    inventory = Inventory(params, layouts=layouts)
    normalised = normalises(params)    # with frozen layers, too, and those without gains
    by_role: dict[str, Row] = {
        "conv": {"lr": 0.04, "damping": 0.1} if normalised else {"lr": 0.02},
        "recurrent": {"lr": 0.04, "damping": 1.0, "momentum": 0.85, "weight_decay": 0.1},
    }
    if over_convolutions(inventory.trainable):
        by_role["head"] = {"weight_decay": 1.0}
    rest = {"lr": 0.008 if normalised else 0.016}
    told = {**factors_of(inventory.trainable), **(override or {})}
    return Ridge(params, 0.028, by_role=by_role, adamw=rest, override=told, policy=policy, layouts=layouts, maximize=maximize)


PRESETS = {
    f.__name__: f for f in (SGD, AdamW, NormalizedSGD, Signum, Lion, LARS, LAMB, Muon, NorMuon, Scion, AdamH, MuonH, Ridge)
}
"""Every preset by its name."""
