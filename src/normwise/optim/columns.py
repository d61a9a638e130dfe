"""The exchangeable parts of a step under a norm. A method is a row: one choice a column, plain values that live in a parameter group.

A step of one group: decay ("gradient") → direction → decay ("direction") → act → rows → scale → velocity → decay ("weight", "cautious") →
apply → hold → rounding.
"""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

from torch import Tensor

from normwise.errors import NormError, PolicyError, nearest
from normwise.low_precision import ROUNDINGS
from normwise.norms import Norm, get_norm
from normwise.norms.linalg import METHODS
from normwise.parameters.layouts import PER

Row = dict[str, Any]
Radius = float | Sequence[float]

CHOICES: dict[str, dict[str, str]] = {
    "direction": {
        "plain": "the gradient g",
        "heavy_ball": "b ← μ·b + g; b (torch's SGD)",
        "nesterov": "b ← μ·b + g; g + μ·b (torch's SGD)",
        "ema": "b ← μ·b + (1 − μ)·g; b",
        "ema_nesterov": "b ← μ·b + (1 − μ)·g; (1 − μ)·g + μ·b (Muon)",
        "adam": "bias-corrected first moment over the root of the second, betas and eps (Kingma & Ba, 2015)",
        "lion": "β₁·b + (1 − β₁)·g, then b ← β₂·b + (1 − β₂)·g (Chen et al., 2023)",
    },
    "act": {
        "none": "the direction as it is",
        "lmo": "−lmo(d, 1) under the norm: the steepest direction of the unit ball",
        "normalize": "d / ‖d‖",
        "ridge": "(y·yᵀ + damping)⁻¹·y, y = d over the root mean square of its singular values: each t becomes t/(t² + damping)",
    },
    "scale": {
        "absolute": "1",
        "original": "√max(1, d_out/d_in) (Jordan et al., 2024; torch's Muon)",
        "match_rms_adamw": "0.2·√max(d_out, d_in): the update's RMS is AdamW's (Liu et al., 2025, Moonlight)",
        "rms_rms": "√(d_out/d_in): one learning rate for every width (Large et al., 2024)",
        "conv_rms_rms": "√(c_out/c_in)/k for a kernel of k entries; √(d_out/d_in) without one (Pethick et al., 2025, Scion)",
        "relative": "max(‖w‖, 0.001·√n)/‖u‖ of n entries: the learning rate is the relative change (floor: Shazeer & Stern, 2018)",
        "init": "R/‖u‖ with R = ‖w‖ when first stepped: the same relative to the initial weight (Hyperball, 2026)",
        "lars": "trust·‖w‖/(‖g‖ + λ‖w‖), 1 where ‖w‖ or ‖g‖ is 0 (You et al., 2017)",
        "lamb": "‖w‖/‖u‖, 1 where either is 0 (You et al., 2020)",
        "normuon": "0.2·√(d_out·d_in)/‖u‖ (Li et al., 2025)",
    },
    "decay": {
        "none": "no decay",
        "gradient": "g ← g + λ·w, before the direction (torch's SGD)",
        "direction": "d ← d + λ·w, after it (LAMB)",
        "weight": "w ← (1 − ηλ)·w, decoupled (Loshchilov & Hutter, 2019)",
        "cautious": "the same, only on entries where the update shrinks the weight too (Chen et al., 2025)",
    },
    "hold": {
        "none": "the weights go where the step takes them",
        "sphere": "w ← R·w/‖w‖ with R = ‖w‖ when first stepped (Hyperball)",
        "ball": "w ← w·min(1, limit/‖w‖)",
        "frank_wolfe": "w ← (1 − η)·w − η·u: stays in the hull of the norm's ball (Pethick et al., 2025)",
        "row_floor": "units shorter than limit·R/√units are stretched to that, R = ‖w‖ when first stepped",
        "radial_brake": "of the growth of ‖w‖ by the step, the share limit is kept; a shrinking is kept whole",
    },
    "rounding": ROUNDINGS,
}  # fmt: skip
"""Every column with its choices and what each means; u is what came out of the columns before, η the learning rate, λ the decay."""

DEFAULTS: Row = {
    "lr": 1e-3, "direction": "plain", "momentum": 0.9, "betas": (0.9, 0.999), "eps": 1e-8, "act": "none", "norm": "l2", "per": "matrix",
    "polar": "fast", "damping": 0.03, "row_beta": 0.0, "scale": "absolute", "radius": 1.0, "trust": 1e-3, "velocity": 0.0,
    "decay": "weight", "weight_decay": 0.0, "hold": "none", "limit": 1.0, "maximize": False, "rounding": "nearest", "seed": 0,
}  # fmt: skip
"""What a row leaves out. ``radius`` multiplies every scale, a tuple each block of a tensor by its own (q, k, v); ``limit`` belongs to
``hold``; ``row_beta`` > 0 divides each unit by the root of its second moment (NorMuon); ``velocity`` is momentum on the scaled step (LARS);
``rounding`` concerns weights in fp16 and bf16, ``seed`` its random numbers. ``momentum`` is 0 where neither the direction nor a velocity
has one. In a group ``velocity`` is True where its number is ``momentum``, and False where a momentum, when it comes, is to be that of the
scaled step."""

STATE: dict[str, tuple[str, ...]] = {
    "plain": (), "heavy_ball": ("momentum_buffer",), "nesterov": ("momentum_buffer",), "ema": ("momentum_buffer",),
    "ema_nesterov": ("momentum_buffer",), "lion": ("momentum_buffer",), "adam": ("exp_avg", "exp_avg_sq"),
}  # fmt: skip
"""The buffers of the parameter's own shape that a direction keeps."""

NESTEROV = {"heavy_ball": "nesterov", "ema": "ema_nesterov"}
"""Directions without and with Nesterov's look ahead."""

QUINTIC = (3.4445, -4.775, 2.0315)
"""Jordan et al.'s Newton–Schulz coefficients, which torch.optim.Muon iterates."""

TORCHS = {
    **dict.fromkeys(("foreach", "fused"), "is torch's choice between its own loops, and the fastest is always taken here"),
    "capturable": "is torch's switch for CUDA graphs, for which there is no other step here",
    "differentiable": "would record the step for autograd, and the steps here are taken under no_grad",
    "amsgrad": "keeps the largest second moment, which no direction here does",
    "dampening": "is not here: direction='ema' averages gradients, each with the weight 1 - momentum",
    "decoupled_weight_decay": "is said by decay='weight', or 'gradient' for L2",
    **dict.fromkeys(("ns_steps", "ns_coefficients"), "is Muon's; in a row polar= says it: a name, or a tuple of steps (a, b, c)"),
    "adjust_lr_fn": "is Muon's; in a row scale= says it",
}
"""Options of torch's optimizers that are none here, and why."""

NEUTRAL: tuple[Any, ...] = (None, False, 0)
"""Values of torch's options that ask for nothing."""

BLOCKS = tuple(per for per in PER if per != "global")
"""The blocks that a step may have; of all tensors together there is none."""

USERS: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "momentum": lambda row: has_momentum(row),
    "betas": lambda row: row["direction"] in ("adam", "lion"),
    "eps": lambda row: row["direction"] == "adam" or bool(row["row_beta"]) or polar_floor(row) > 0,
    "trust": lambda row: row["scale"] == "lars",
    "damping": lambda row: row["act"] == "ridge",
    "limit": lambda row: row["hold"] in ("ball", "row_floor", "radial_brake"),
}
"""Numbers that only some parts use, and whether those of a row do."""


def norm_of(row: Mapping[str, Any]) -> Norm:
    """The norm of a row that was checked: `check_row` refuses sets."""
    norm = get_norm(row["norm"])
    assert isinstance(norm, Norm)
    return norm


def has_momentum(row: Mapping[str, Any]) -> bool:
    """Whether ``momentum`` is what the row's step uses; Adam and Lion have betas instead."""
    return row["direction"] in ("heavy_ball", "nesterov", "ema", "ema_nesterov") or (row["direction"] == "plain" and bool(row["velocity"]))


def newton_schulz(coefficients: Sequence[float], steps: int) -> str | tuple[tuple[float, ...], ...]:
    """The column ``polar`` of torch's ``ns_coefficients`` and ``ns_steps``: the name where there is one, else step by step."""
    abc = tuple(map(float, coefficients))
    if len(abc) != 3 or type(steps) is not int or not 1 <= steps < 100:
        raise ValueError(f"ns_coefficients={coefficients!r} and ns_steps={steps!r}: three numbers are needed, and 1 to 99 steps.")
    return "quintic" if (abc, steps) == (QUINTIC, 5) else (abc,) * steps


def polar_floor(row: Mapping[str, Any]) -> float:
    """The least Frobenius norm that a polar iteration divides by: ``eps``, where no other part of the row has it."""
    iterates = row["act"] == "lmo" and (row["polar"] == "quintic" or not isinstance(row["polar"], str))
    mine = iterates and row["direction"] != "adam" and not row["row_beta"] and norm_of(row).polar
    return float(row["eps"]) if mine else 0.0


def complete(given: Mapping[str, Any], name: str, base: Mapping[str, Any] | None = None) -> Row:
    """What is ``given`` over ``base`` (the defaults), its numbers as plain ones, and ``nesterov`` told as a direction."""
    stated = {column: as_plain(value, column) for column, value in given.items()}
    row = {**(DEFAULTS if base is None else base), **stated}
    wanted = row.pop("nesterov", None)
    if row["direction"] not in STATE:
        return row    # check_row says which there are
    if row["direction"] == "plain" and not row["velocity"]:
        if stated.get("momentum") and row["velocity"] is False:    # LARS's, of the scaled step, where there was none
            row["velocity"] = True
        elif stated.get("momentum") and "direction" not in stated:
            row["direction"] = "heavy_ball"    # as in torch's SGD, where it is the momentum that says so
        elif "momentum" not in stated:
            row["momentum"] = 0.0
    elif row["direction"] == "plain" and row["velocity"] is not True:    # which is then the momentum: one number, by both names
        if "velocity" in stated or "momentum" not in stated:
            row["momentum"] = row["velocity"]
        else:
            row["velocity"] = bool(row["momentum"])
    if wanted is not None:
        set_nesterov(row, wanted, name)
    return row


def refuse_unused(given: Mapping[str, Any], row: Mapping[str, Any], name: str, copied: Sequence[Mapping[str, Any]] = ()) -> None:
    """PolicyError for a number that somebody gave, and nothing in the complete ``row`` uses; not for one that came with a copy of one of
    the groups ``copied``."""
    for column, used in USERS.items():
        if any(column in given and other.get(column) == given[column] for other in copied):
            continue
        if column not in given or used(row) or as_plain(given[column], column) in (DEFAULTS[column], 0):
            continue
        if column == "momentum" and row["direction"] in ("adam", "lion") and as_plain(given[column], column) == row["betas"][0]:
            continue    # another name of the same number, as in a copy of a group
        parts = ", ".join(f"{c}={row[c]!r}" for c in ("direction", "act", "scale", "hold") if row[c] != DEFAULTS[c] or c == "direction")
        raise PolicyError(
            f"{name} has {column}={given[column]!r}, which no part of it uses ({parts}), so that it would be left out in silence. "
            f"{_INSTEAD.get(column, '')}Give it to the row that it is meant for (adamw={{...}}, by_role={{...}}, override={{...}}), "
            "or leave it out."
        )


_INSTEAD = {"momentum": "Adam and Lion have betas, a plain direction has none. ", "betas": "A direction with one buffer has momentum=. "}


def set_nesterov(row: Row, wanted: Any, name: str) -> None:
    """Turns the direction into its twin with, or without, Nesterov's look ahead; PolicyError where it has none."""
    direction = row["direction"]
    plain = {v: k for k, v in NESTEROV.items()}.get(direction, direction)
    if not wanted:
        row["direction"] = plain
    elif plain in NESTEROV:
        row["direction"] = NESTEROV[plain]
    else:
        raise PolicyError(f"{name} has nesterov={wanted!r}, and direction={direction!r}, which has no momentum to look ahead with.")


def as_plain(value: Any, column: str) -> Any:
    """Numbers of numpy and tensors of one number as Python's, which checkpoints and kernels take. ``lr`` stays a tensor, without axes."""
    if column == "betas" and not isinstance(value, str | Mapping):
        try:
            return tuple(as_plain(beta, "beta") for beta in value)
        except TypeError:
            return value
    if column == "lr" and isinstance(value, Tensor):
        return value.reshape(()) if value.numel() == 1 and value.ndim else value    # a view: who keeps the tensor may go on filling it
    if (column not in DEFAULTS and column != "beta") or type(value) in (bool, int, float, str):
        return value
    single = getattr(value, "size", None) == 1 or (isinstance(value, Tensor) and value.numel() == 1)
    return value.item() if single and hasattr(value, "item") else value


def refused_option(preset: str, option: str, value: Any, known: Collection[str]) -> PolicyError:
    """The error for an option that a preset does not take."""
    if option in TORCHS:
        return PolicyError(f"{preset} has {option}={value!r}, which is no option: it {TORCHS[option]}. Leave it out.")
    if option in ("direction", "act", "norm", "scale"):
        return PolicyError(
            f"{preset} has {option}={value!r}, and its {option} is what makes it {preset}: state a row of your own, by override={{...}} or "
            "NormOptimizer(model, rows, roles, main)."
        )
    if option in DEFAULTS:
        return PolicyError(
            f"{preset} has {option}={value!r}, which no part of it uses. {_INSTEAD.get(option, '')}Give it to the row that it is meant for "
            "(adamw={...}, by_role={...}, override={...}), or leave it out."
        )
    return PolicyError(f"{preset} has the unknown option {option!r}.{nearest(option, known)}")


def check_row(row: Mapping[str, Any], name: str = "a group", besides: Collection[str] = (), extras: bool = False) -> None:
    """Refuses unknown columns (but those named in ``besides``), unknown choices, and numbers out of their range.

    extras: keys that are like no column may stand there, as in any group of torch's; what looks like a slip of the pen may not, nor an
    option of torch's that asks for something.
    """
    for unknown in sorted(set(row) - set(DEFAULTS) - set(besides)):
        if unknown in TORCHS and not (extras and (row[unknown] in NEUTRAL or unknown in ("foreach", "fused", "decoupled_weight_decay"))):
            raise PolicyError(f"{name} has {unknown}={row[unknown]!r}, which is no option: it {TORCHS[unknown]}. Leave it out.")
        if not extras or difflib.get_close_matches(unknown, DEFAULTS, n=1, cutoff=0.8):
            raise PolicyError(f"{name} has the unknown option {unknown!r}.{nearest(unknown, DEFAULTS)}")
    polar = row["polar"] if isinstance(row["polar"], tuple | list) else ()
    own_steps = bool(polar) and all(len(s) == 3 and all(isinstance(x, int | float) and math.isfinite(x) for x in s) for s in polar)
    if row["per"] == "global":
        raise PolicyError(
            f"{name} has per='global', and a step takes each tensor by itself; one norm of all together is a rule's: "
            "policy=[nw.clip_grad_norm(...)], or nw.clip_grad_norm_ before the step. Here per='tensor' is the largest block."
        )
    for column, allowed in {**CHOICES, "per": BLOCKS, "polar": (*METHODS, "exact")}.items():
        choice = row[column]
        if not (isinstance(choice, str) and choice in allowed) and not (column == "polar" and own_steps):
            raise PolicyError(f"{name} has {column}={choice!r}.{nearest(str(choice), allowed)}")
    try:
        norm = get_norm(row["norm"])
    except NormError as error:
        raise NormError(f"{name} has norm={row['norm']!r}: {error}") from None
    if not isinstance(norm, Norm):
        raise PolicyError(f"{name} has norm={row['norm']!r}, which is a set: a step needs a norm.")
    _check_numbers(row, name)


def _check_numbers(row: Mapping[str, Any], name: str) -> None:
    for column in ("lr", "eps", "weight_decay", "trust", "limit", "damping"):
        _number(row[column], column, name)
    for radius in row["radius"] if apart(row) and row["radius"] else [row["radius"]]:
        _number(radius, "radius", name)
    if row["act"] == "ridge" and not row["damping"]:
        raise ValueError(f"{name} has act='ridge' and damping=0, and needs a damping > 0: 0.03 is the default.")
    for column in ("momentum", "row_beta", "velocity"):
        if column != "velocity" or not isinstance(row[column], bool):
            _number(row[column], column, name, 1.0)
    if not isinstance(row["betas"], tuple | list) or len(row["betas"]) != 2:
        raise ValueError(f"{name} has betas={row['betas']!r}, and needs two numbers in [0, 1).")
    for beta in row["betas"]:
        _number(beta, "betas", name, 1.0)
    if not isinstance(row["maximize"], bool):
        raise ValueError(f"{name} has maximize={row['maximize']!r}, and needs True or False.")
    if type(row["seed"]) is not int or not 0 <= row["seed"] < 2**32:
        raise ValueError(f"{name} has seed={row['seed']!r}, and needs an integer from 0 to 2**32 - 1.")


def _number(value: Any, column: str, name: str, below: float = math.inf) -> None:
    if type(value) is float and 0 <= value < below:    # first, since schedules ask at every step
        return
    single = isinstance(value, Tensor) and value.numel() == 1
    number = float(value) if single or (isinstance(value, int | float) and not isinstance(value, bool)) else math.nan
    if not 0 <= number < below:
        wanted = "a finite number >= 0" if below == math.inf else f"a number in [0, {below:g})"
        shown = f"a tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) and value.numel() > 8 else repr(value)
        raise ValueError(f"{name} has {column}={shown}, and needs {wanted}.")


def needs_matrices(row: Mapping[str, Any]) -> bool:
    """Whether the blocks of a group must be matrices: for a norm of matrices, or a part that asks for units."""
    by_norm = row["act"] != "none" and norm_of(row).matrix
    return by_norm or row["act"] == "ridge" or row["scale"] in SHAPED or row["row_beta"] > 0 or row["hold"] == "row_floor"


def acts_on_blocks(row: Mapping[str, Any]) -> bool:
    """Whether a step of the group needs blocks at all; a row of elementwise parts takes tensors of any shapes together."""
    holds = row["hold"] not in ("none", "frank_wolfe")
    return row["act"] != "none" or row["scale"] != "absolute" or holds or row["row_beta"] > 0 or apart(row)


def apart(row: Mapping[str, Any]) -> bool:
    """Whether each block of a tensor has a radius of its own."""
    return isinstance(row["radius"], tuple | list)


def stores_radius(row: Mapping[str, Any]) -> bool:
    """Whether the blocks' initial norms R belong to the state."""
    return row["scale"] == "init" or row["hold"] in ("sphere", "row_floor")


SHAPED = ("original", "match_rms_adamw", "rms_rms", "conv_rms_rms", "normuon")


def shape_scale(scale: str, rows: int, columns: int, kernel: int) -> float:
    """The scales that depend on the block's shape alone: ``(d_out, d_in)``, the kernel's entries counted in d_in."""
    return {
        "original": math.sqrt(max(1.0, rows / columns)),
        "match_rms_adamw": 0.2 * math.sqrt(max(rows, columns)),
        "rms_rms": math.sqrt(rows / columns),
        "conv_rms_rms": math.sqrt(rows * kernel / columns) / kernel,
        "normuon": 0.2 * math.sqrt(rows * columns),
    }.get(scale, 1.0)


# ------------------------------------------------------------------------------------------------------------ groups in training


Settled = tuple[int, tuple[Any, ...]]
"""What a group had when it was last settled: how many keys, and the columns of `WATCHED`."""
WATCHED = tuple(column for column in DEFAULTS if column != "lr")
SETTLED = operator.itemgetter(*WATCHED)
FREE = frozenset(("weight_decay", "eps", "trust", "limit"))
"""Numbers that nothing else hangs on, so that schedules may write them at every step."""


def settle(group: Row, last: Settled | None, name: str, besides: Collection[str] = ()) -> Settled:
    """Checks a group in which something was written since ``last``, and makes it say one thing: ``momentum`` and the first of ``betas`` are
    two names of one number, whichever the step uses.

    torch's schedulers choose one of the two names by the optimizer's ``defaults`` and write it into every group; so does a user. What was
    changed since ``last`` counts. Without it, as after loading a checkpoint, the step's own name does. ``nesterov`` becomes a direction,
    and the number of a ``velocity`` without another momentum becomes ``momentum``; numbers of numpy become plain ones.

    PolicyError or ValueError, with nothing changed, for what no new group may have either: a misspelt choice or option, a number out of
    range.
    """
    missing = [column for column in DEFAULTS if column not in group]
    if missing:
        raise PolicyError(f"{name} has no {missing[0]!r}: give a new group to optimizer.add_param_group, which fills in the rest.")
    before = None if last is None else dict(zip(WATCHED, last[1], strict=True))
    changed = [c for c in WATCHED if before is None or group[c] is not before[c]]
    if last is not None and len(group) == last[0] and FREE.issuperset(changed) and "nesterov" not in group:
        row = {column: as_plain(group[column], column) for column in ("lr", *changed)}
        for column, value in row.items():
            _number(value, column, name)
        group.update(row)
        return last[0], SETTLED(group)
    row = {column: as_plain(group[column], column) for column in DEFAULTS}
    check_row({**group, **row}, name, (*besides, "nesterov"), extras=True)
    if "nesterov" in group:
        wanted = group["nesterov"]
        if row["direction"] == "plain" and row["velocity"] == 0 and row["velocity"] is not False and wanted and row["momentum"]:
            row["direction"] = "heavy_ball"
        set_nesterov(row, wanted, name)
    if row["direction"] == "plain" and row["velocity"] and row["velocity"] is not True:
        row["momentum"], row["velocity"] = row["velocity"], True
    _agree(row, before)
    group.pop("nesterov", None)
    group.update(row)
    return len(group), SETTLED(group)


def _agree(group: Row, last: Mapping[str, Any] | None) -> None:
    """The momentum by both of its names."""
    same = last is not None and last["direction"] == group["direction"]    # another direction has other names: its own counts
    new_momentum = last is not None and same and group["momentum"] != last["momentum"]
    new_betas = last is not None and same and group["betas"] != last["betas"]
    if group["direction"] in ("adam", "lion"):
        if new_momentum and not new_betas:
            group["betas"] = (group["momentum"], *group["betas"][1:])
        group["momentum"] = group["betas"][0]
    elif has_momentum(group):
        if new_betas and not new_momentum:
            group["momentum"] = group["betas"][0]
    elif new_momentum and group["momentum"]:    # of plain descent: torch's SGD begins to have one, too, and LARS
        group |= {"velocity": True} if group["velocity"] is False else {"direction": "heavy_ball"}
    else:
        group["momentum"] = 0.0
