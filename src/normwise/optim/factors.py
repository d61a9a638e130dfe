"""What a parameter's part in the model says about the size of its step, beside its shape."""

from __future__ import annotations

from torch import nn

from normwise.optim.parts import Radius
from normwise.policy.inventory import Inventory

SCORES, VALUES = 3.0, 0.5
"""Queries and keys: a score is a product of the two, so a step moves it little while both are small. Values and output: their product goes
straight into the residual stream."""
HEAD_OVER_GATES = 3.0


def convolutional(model: nn.Module) -> bool:
    """Whether it has convolutions that it trains, and neither attention nor gates."""
    entries = [e for e in Inventory(model).entries if e.param.requires_grad]
    roles = {e.role for e in entries}
    return {"conv", "head"} <= roles and "recurrent" not in roles and not any(e.attention for e in entries)


def role_factors(model: nn.Module) -> dict[str, Radius]:
    """Factors of the steps by what the parameters are for, to be given to a matrix preset: ``Ridge(model, override=role_factors(model))``.

    Three times the step for the queries and keys of every attention, half of it for its values and output (block by block where q, k and v
    are one tensor whose layout says so; a plain Linear for all three keeps one step); three times for the head of a model with recurrent
    layers. Selector -> factor, for what ``model`` has and trains; empty where it has none of it. Measured for :func:`Ridge` only, on small
    networks: docs/results.md.
    """
    entries = [e for e in Inventory(model).entries if e.param.requires_grad]
    parts, roles = {e.attention for e in entries}, {e.role for e in entries}
    found: dict[str, Radius] = {}
    if parts & {"q", "k"}:
        found["attention:qk"] = SCORES
    if parts & {"v", "out"}:
        found["attention:ov"] = VALUES
    stacked = [e for e in entries if e.attention == "qkv" and e.layout.certain and e.layout.size("s") == 3]
    found |= {e.name: (SCORES, SCORES, VALUES) for e in stacked}
    if {"recurrent", "head"} <= roles:
        found["role:head"] = HEAD_OVER_GATES
    return found
