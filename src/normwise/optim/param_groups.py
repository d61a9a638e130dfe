"""Groups in training: whatever a user or a scheduler writes into one acts on what its step uses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from normwise.optim.columns import DEFAULTS, Row, as_plain, check_row, has_momentum, set_nesterov

# What a group had when it was last settled: direction, momentum, betas, velocity.
Settled = tuple[Any, ...]


def settle(group: Row, last: Settled | None, name: str) -> Settled:
    """Makes the group say one thing: ``momentum`` and the first of ``betas`` are two names of one number, whichever the step uses.

    torch's schedulers choose one of the two names by the optimizer's ``defaults`` and write it into every group; so does a user. What was
    changed since ``last`` counts. Without it, as after loading a checkpoint, the step's own name does. ``nesterov`` becomes a direction,
    and the number of a ``velocity`` without another momentum becomes ``momentum``; numbers of numpy become plain ones.

    ValueError, before any step, for a learning rate that is none.
    """
    now = (group["direction"], group["momentum"], group["betas"], group["velocity"])
    rate = group["lr"]
    ready = type(rate) is float or (isinstance(rate, Tensor) and not rate.ndim)
    if ready and last is not None and now == last and "nesterov" not in group:
        return last
    for column in ("lr", "momentum", "betas", "velocity", "weight_decay", "eps"):
        group[column] = as_plain(group[column], column)
    if "nesterov" in group:
        wanted = group.pop("nesterov")
        if group["direction"] == "plain" and wanted and group["momentum"]:
            group["direction"] = "heavy_ball"
        set_nesterov(group, wanted, name)
    if group["direction"] == "plain" and group["velocity"] and group["velocity"] is not True:
        group["momentum"], group["velocity"] = group["velocity"], True
    _agree(group, last)
    check_row({**DEFAULTS, **{c: group[c] for c in DEFAULTS}}, name)
    return group["direction"], group["momentum"], group["betas"], group["velocity"]


def _agree(group: Row, last: Settled | None) -> None:
    """The momentum by both of its names."""
    same = last is not None and last[0] == group["direction"]    # another direction has other names: its own counts
    new_momentum = last is not None and same and group["momentum"] != last[1]
    new_betas = last is not None and same and group["betas"] != last[2]
    if group["direction"] in ("adam", "lion"):
        if new_momentum and not new_betas:
            group["betas"] = (group["momentum"], *group["betas"][1:])
        group["momentum"] = group["betas"][0]
    elif has_momentum(group):
        if new_betas and not new_momentum:
            group["momentum"] = group["betas"][0]
    elif new_momentum and group["momentum"]:    # of plain descent: torch's SGD begins to have one, too
        group["direction"] = "heavy_ball"
    else:
        group["momentum"] = 0.0


