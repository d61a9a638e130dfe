"""Checkpoints into a live optimizer: its own, under other names of groups and orders, and those of torch's SGD, Adam, AdamW and Muon."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from normwise.errors import PolicyError
from normwise.low_precision import CARRY, NOISE
from normwise.optim.columns import DEFAULTS, NESTEROV, STATE, TORCHS, Row, as_plain, check_row, newton_schulz
from normwise.optim.plan import members, names_of
from normwise.optim.step import LAYOUTS
from normwise.parameters.layouts import Layout

Group = dict[str, Any]
CHANGED = ("direction", "act", "norm", "scale", "hold", "decay")
"""Columns of which users are told when a checkpoint brings others: with them it is another method."""


def adapt(live: Sequence[Group], raw: Mapping[str, Any], state: dict[str, Any], besides: Sequence[str]) -> dict[str, Any]:
    """``state`` as the optimizer of the groups ``live`` can take it; nothing is changed, and ``state`` is not written to.

    raw: the checkpoint as it was given, before the user's own hooks, so that names and axes in it belong together.

    The axes of the parameters are the live ones always, and a difference is told. Where both have names for all parameters, and the same
    ones in another order, each gets the state of its name. PolicyError, by name, for state that does not fit.
    """
    _tell_other_axes(live, raw)
    state = _by_names(live, state)
    saved = state["param_groups"]
    if [len(g["params"]) for g in live] != [len(g["params"]) for g in saved]:
        return state    # torch says so
    known = dict(state["state"])
    groups: list[Group] = []
    for own, given in zip(live, saved, strict=True):
        group = dict(given)
        name = f"the saved group {own.get('name', len(groups))!r}"
        # Having a momentum or Nesterov's look ahead is an option of the same method.
        family = {"heavy_ball": "plain", "nesterov": "plain", "ema_nesterov": "ema"}
        changed = [c for c in CHANGED if c in given and family.get(given[c], given[c]) != family.get(own[c], own[c])]
        if changed:
            others = [f"{c}={given[c]!r} for {own[c]!r}" for c in changed]
            told = f"{name} has {', '.join(others)}: as in torch, the columns of the checkpoint are used from here on."
            warnings.warn(told, stacklevel=7)
        if "direction" not in given:
            known |= {i: _moments(known[i]) for i in given["params"] if i in known}
            group = _from_torch(own, given, [known.get(i, {}) for i in given["params"]], name)
        group = {**DEFAULTS, **group, LAYOUTS: own[LAYOUTS]}
        check_row({c: as_plain(v, c) for c, v in group.items()}, name, besides, extras=True)
        _check_states(own, group, [known.get(i, {}) for i in given["params"]])
        groups.append(group)
    return {**state, "state": known, "param_groups": groups}


def _names(groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """The names of all parameters; empty where some have none."""
    return [n for g in groups for n in g["param_names"]] if all("param_names" in g for g in groups) else []


def _tell_other_axes(live: Sequence[Group], raw: Mapping[str, Any]) -> None:
    saved = [g for g in raw["param_groups"] if LAYOUTS in g and len(g.get("param_names", ())) == len(g[LAYOUTS])]
    axes = {n: _plain(x) for g in saved for n, x in zip(g["param_names"], g[LAYOUTS], strict=True)}
    other = [
        f"{n} ({' '.join(axes[n][0])} {axes[n][1]} when saved, {' '.join(own[0])} {own[1]} now)"
        for g in live for n, x in zip(names_of(g), g[LAYOUTS], strict=True) if (own := _plain(x)) != axes.get(n, own)
    ]  # fmt: skip
    if other:
        warnings.warn(f"the checkpoint was of other axes: {', '.join(other[:5])}. Those of this optimizer are kept.", stacklevel=8)


def _plain(layout: Any) -> tuple[str, tuple[int, ...]]:
    return (layout.axes, layout.shape) if isinstance(layout, Layout) else (layout[0], tuple(layout[1]))


def _by_names(live: Sequence[Group], state: dict[str, Any]) -> dict[str, Any]:
    """The state with its groups and their parameters in the live order, where both have the same names. PolicyError where the same names
    are in other groups: by their places, as torch goes, they would take each other's state."""
    saved = state["param_groups"]
    wanted, names = _names(live), _names(saved)
    same = bool(wanted) and sorted(wanted) == sorted(names) and len(set(names)) == len(names) and len(live) == len(saved)
    if not same or [g["param_names"] for g in live] == [g["param_names"] for g in saved]:
        return state
    groups: list[Group] = []
    for own in live:
        template = next((g for g in saved if set(g["param_names"]) == set(own["param_names"])), None)
        if template is None:
            moved = sorted(set(own["param_names"]) ^ set(saved[len(groups)]["param_names"]))
            raise PolicyError(
                f"the checkpoint has its parameters in other groups: {', '.join(moved[:5])} are not in the group "
                f"{own.get('name', len(groups))!r} now and then. Nothing was loaded: build the optimizer as it was then, by override=."
            )
        ids = dict(zip(template["param_names"], template["params"], strict=True))
        groups.append({**template, "params": [ids[n] for n in own["param_names"]], "param_names": list(own["param_names"])})
    return {**state, "param_groups": groups}


# ------------------------------------------------------------------------------------------------------ torch's optimizers


def _moments(state: Mapping[str, Any]) -> dict[str, Any]:
    """A parameter's state as ours are: nothing where there is None, and the step count as a tensor."""
    kept = {k: v for k, v in state.items() if v is not None}
    if "step" in kept:
        kept["step"] = torch.as_tensor(float(kept["step"]), dtype=torch.float32)
    return kept


def _from_torch(own: Group, saved: Mapping[str, Any], states: Sequence[Mapping[str, Any]], name: str) -> Group:
    """The group of another optimizer as one of the live row, where the mathematics is the same; PolicyError elsewhere."""
    kind = "Muon" if "ns_steps" in saved else "SGD" if "dampening" in saved else "AdamW" if "amsgrad" in saved else None
    if kind is None:
        raise PolicyError(
            f"{name} is of another optimizer: it has none of the columns here, and is of no optimizer that can be resumed "
            f"(torch.optim.SGD, Adam, AdamW, Muon). It has {', '.join(sorted(set(saved) - {'params'}))}."
        )
    group = {**own, **{k: v for k, v in saved.items() if k not in (*TORCHS, "nesterov")}}
    wrong = {"Muon": _as_muon, "SGD": _as_sgd, "AdamW": _as_adamw}[kind](own, saved, group)
    keys = {"momentum_buffer"} if kind != "AdamW" else {"step", "exp_avg", "exp_avg_sq"}
    strange = sorted({k for s in states for k in s if k not in keys})
    if strange:
        wrong.append(f"state {', '.join(strange)}")
    partial = [s for s in states if s and set(s) < keys]
    if partial:
        wrong.append(f"state without {', '.join(sorted(keys - set(partial[0])))}")
    if wrong:
        raise PolicyError(
            f"{name} is of torch.optim.{kind}, and cannot go on here as {own.get('name', 'direction=' + repr(own['direction']))!r}: it has "
            f"{'; '.join(wrong)}. Nothing was loaded: begin with a fresh state, or take the preset whose step is the same."
        )
    return group


def _differs(own: Group, **wanted: Any) -> list[str]:
    """What of the live row is not as the saved method has it."""
    allowed = {c: w if isinstance(w, tuple) else (w,) for c, w in wanted.items()}
    return [f"{c}={allowed[c][0]!r}, here it is {own[c]!r}" for c in wanted if own[c] not in allowed[c]]


def _as_adamw(own: Group, saved: Mapping[str, Any], group: Group) -> list[str]:
    decay = "weight" if saved.get("decoupled_weight_decay", True) else "gradient"
    wrong = _differs(own, direction="adam", act="none", scale="absolute", hold="none", velocity=0.0, row_beta=0.0, radius=1.0)
    if saved["weight_decay"]:
        wrong += _differs(own, decay=decay)
    return wrong + (["amsgrad=True"] if saved["amsgrad"] else [])


def _as_sgd(own: Group, saved: Mapping[str, Any], group: Group) -> list[str]:
    directions = ("plain", "heavy_ball", "nesterov")
    wrong = _differs(own, direction=directions, act="none", scale="absolute", hold="none", velocity=0.0, row_beta=0.0, radius=1.0)
    if saved["weight_decay"]:
        wrong += _differs(own, decay="gradient")
    direction = "heavy_ball" if saved["momentum"] else "plain"
    group["direction"] = NESTEROV["heavy_ball"] if saved["nesterov"] and saved["momentum"] else direction
    return wrong + ([f"dampening={saved['dampening']!r}"] if saved["dampening"] and saved["momentum"] else [])


def _as_muon(own: Group, saved: Mapping[str, Any], group: Group) -> list[str]:
    same = {"act": "lmo", "norm": "spectral", "hold": "none", "decay": "weight", "radius": 1.0, "velocity": 0.0}
    wrong = _differs(own, direction=("ema_nesterov", "ema"), row_beta=0.0, **same)
    if isinstance(own["polar"], str):    # where the live one iterates by steps of its own, the saved steps take their place
        wrong += _differs(own, polar="quintic")
    group["direction"] = NESTEROV["ema"] if saved["nesterov"] else "ema"
    group["scale"] = saved.get("adjust_lr_fn") or "original"
    group["polar"] = newton_schulz(saved["ns_coefficients"], saved["ns_steps"])
    return wrong


# ------------------------------------------------------------------------------------------------------------- what must fit


BUFFERS = {direction: {*names, *(("step",) if direction == "adam" else ())} for direction, names in STATE.items()}


def _refuse_gaps(name: str, direction: str, state: Mapping[str, Any]) -> None:
    """PolicyError for a state of which a part is missing: what is not there would begin at zero, beside what goes on. A state of another
    direction, as where the column was written after the last step, is whole; so is what only remembers roundings."""
    missing = sorted(BUFFERS[direction] - set(state))
    others = set().union(*BUFFERS.values()) - BUFFERS[direction]
    if missing and set(state) - {CARRY, NOISE} and not others & set(state):
        raise PolicyError(
            f"the saved state of {name!r} has {', '.join(sorted(state))}, and no {', '.join(missing)}: a part of the checkpoint is lost. "
            "Nothing was loaded: take another checkpoint, or leave this parameter's state out, so that it begins afresh."
        )


def _check_states(own: Group, columns: Row, states: Sequence[Mapping[str, Any]]) -> None:
    """PolicyError for a parameter's state of another shape, which the step would stumble over with half of the weights moved."""
    group = {**columns, "params": own["params"], LAYOUTS: own[LAYOUTS]}
    blocks = [i for i, s in enumerate(states) if "radius" in s or "row_squares" in s]
    views = dict(zip(blocks, (m.view for m in members(group, blocks)), strict=True)) if blocks else {}
    for i, (p, name, s) in enumerate(zip(own["params"], names_of(own), states, strict=True)):
        _refuse_gaps(name, columns["direction"], s)
        wanted = {k: tuple(p.shape) for k in (*STATE[columns["direction"]], "velocity", CARRY)}
        if i in views:
            wanted |= {"radius": (views[i].count,), "row_squares": (views[i].count, views[i].block_shape[0])}
        for key, shape in wanted.items():
            value = s.get(key)
            if isinstance(value, Tensor) and tuple(value.shape) != shape:
                raise PolicyError(
                    f"the saved state of {name!r} has {key} of shape {tuple(value.shape)}, and it must have {shape}: the checkpoint is of "
                    "another model, or its parameters were in another order. Nothing was loaded."
                )
