"""Initial weights that every contender may choose: the model's own, or matrices of equal singular values at the same norm."""

from __future__ import annotations

import torch
from torch import nn

from normwise.norms.linalg import polar
from normwise.parameters.inventory import Inventory
from normwise.parameters.layouts import block_view

_TURNED = ("hidden", "conv", "recurrent")
KINDS = ("own", "orthogonal")


@torch.no_grad()
def prepare(model: nn.Module, kind: str) -> None:
    """``"orthogonal"``: each hidden matrix, convolution (as c_out × c_in·k) and gate becomes its polar factor, at its own Frobenius norm.

    Saxe, McClelland, Ganguli 2014, "Exact solutions to the nonlinear dynamics of learning in deep linear neural networks".
    """
    if kind == "own":
        return
    for entry in Inventory(model).entries:
        if entry.role in _TURNED:
            view = block_view(entry.layout, "matrix", True, name=entry.name)
            blocks = view.blocks(entry.param.detach()).double()
            factor = polar(blocks, "exact")
            scaled = factor * (blocks.norm(dim=(1, 2), keepdim=True) / factor.norm(dim=(1, 2), keepdim=True).clamp(min=1e-30))
            view.write_(entry.param, scaled)
