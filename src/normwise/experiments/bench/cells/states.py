"""The states that weights and gradients are put into before every measured step: how much of them is beyond the rules' radius, 1."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from normwise.experiments.bench.cells.by_hand import BOTH, CAP, CAP_WITHIN, CLIP, MAX_NORM, RADIUS, VALUE, RuleSet
from normwise.experiments.bench.cells.networks import CNN_CASE, LARGE, MANY, SMALL, WIDE, WIDEST, Weight

NOTHING, ONE, ALL, ZEROS, HUGE, TINY = "nothing violated", "one block violated", "all violated", "zero blocks", "huge", "tiny"
INSIDE, OUTSIDE = 0.5, 2.0                 # norms of units, and of all gradients
CAP_INSIDE, CAP_OUTSIDE = 0.9, 1.25        # largest singular values
HUGE_ENTRY, TINY_ENTRY = 1e18, 1e-25       # of gradients: 400 squares of the one are above fp32's range, those of the other below
SPECIAL = (SMALL, MANY, WIDE)


def cells_of(case: str) -> list[tuple[str, str]]:
    """Rule sets and states that are measured on this network."""
    short = case in (WIDEST, LARGE)    # a step of which takes long
    bound = (NOTHING, ALL) if short else (NOTHING, ONE, ALL)
    cells = [(rules, state) for rules in (MAX_NORM, BOTH, VALUE) for state in bound]
    cells += [(CLIP, state) for state in (NOTHING, ALL)]    # one norm of all gradients: there is no "one"
    if case in (SMALL, CNN_CASE) or case.startswith("residual"):
        cells += [(CAP, state) for state in bound]
    if case.startswith("GPT of"):
        cells += [(CAP_WITHIN, state) for state in bound]
    if case in SPECIAL:
        cells += [(BOTH, ZEROS), (CLIP, HUGE), (CLIP, TINY)]
    return cells


class Memory:
    """Weights and gradients of a network, and their copy in a state. Only what the rules act on is put back: nothing else changes.

    Attributes:
        weights: that the rules bound.
        params: whose gradients are clipped; each has one.
    """

    def __init__(self, model: nn.Module, weights: Sequence[Weight], rules: RuleSet, state: str) -> None:
        generator = torch.Generator().manual_seed(0)
        self.params, self.weights = list(model.parameters()), list(weights)
        self.now: list[Tensor] = [w.tensor.detach() for w in weights]
        start = start_weights(self.weights, rules.sets, state, generator)
        grads = start_gradients(self.params, state, generator)
        for p, grad in zip(self.params, grads, strict=True):
            p.grad = grad.clone()
            if rules.gradients:
                self.now.append(p.grad)
        self.start = [*start, *grads] if rules.gradients else start

    def put_back(self) -> None:
        torch._foreach_copy_(self.now, self.start)


def start_weights(weights: Sequence[Weight], sets: str, state: str, generator: torch.Generator) -> list[Tensor]:
    """Random weights whose norms are known. One violated is the first block of the weight in the middle; of zero blocks every second."""
    drawn = [torch.randn(w.tensor.shape, generator=generator).to(w.tensor.device) for w in weights]
    make = {"rows": _rows, "entries": _entries, "singular values": _singular}.get(sets)
    if make is not None:
        for k, (w, x) in enumerate(zip(weights, drawn, strict=True)):
            make(Weight(x, w.axis, w.matrices), state, k == len(weights) // 2)
    return drawn


def _rows(w: Weight, state: str, chosen: bool) -> None:
    """Units of one length."""
    length = OUTSIDE if state == ALL else INSIDE
    w.tensor.mul_(length / torch.linalg.vector_norm(w.tensor, dim=w.others, keepdim=True))
    units = w.tensor.movedim(w.axis, 0)
    if state == ONE and chosen:
        units[0] *= OUTSIDE / INSIDE
    elif state == ZEROS:
        units[::2] = 0.0


def _entries(w: Weight, state: str, chosen: bool) -> None:
    """Entries of a quarter to half of the radius, or of two to four times."""
    w.tensor.copy_(w.tensor.sign() * (1 + w.tensor.abs().clamp(max=1)) * (OUTSIDE if state == ALL else INSIDE / 2) * RADIUS)
    if state == ONE and chosen:
        w.tensor.view(-1)[0] = OUTSIDE


def _singular(w: Weight, state: str, chosen: bool) -> None:
    """Matrices whose largest singular value is known."""
    for k, matrix in enumerate(w.each_matrix()):
        outside = state == ALL or (state == ONE and chosen and k == 0)
        matrix.mul_((CAP_OUTSIDE if outside else CAP_INSIDE) / torch.linalg.matrix_norm(matrix.double(), 2).float())


def start_gradients(params: Sequence[nn.Parameter], state: str, generator: torch.Generator) -> list[Tensor]:
    """Random gradients of a known norm all together, of entries whose squares leave fp32's range, or half of the tensors zero."""
    drawn = [torch.randn(p.shape, generator=generator).to(p.device) for p in params]
    if state in (HUGE, TINY):
        entry = HUGE_ENTRY if state == HUGE else TINY_ENTRY
        return [x.sign() * entry for x in drawn]
    if state == ZEROS:
        drawn = [x if k % 2 else torch.zeros_like(x) for k, x in enumerate(drawn)]
    total = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(x) for x in drawn]))
    return [x * ((OUTSIDE if state == ALL else INSIDE) / total) for x in drawn]
