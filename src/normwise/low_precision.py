"""Weights of fp16 and bf16 that move by less than half an ulp: stochastic and compensated rounding keep what rounding to nearest loses.

>>> wide = widened(weights, states)     # float32 copies, to which the step is applied
>>> narrow_(weights, wide, states)      # rounded back; ``states`` come from memory(...), one a weight
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence

import torch
from torch import Tensor
from torch._compile import _disable_dynamo

from normwise.norms.reduce import HALF

ROUNDINGS = {
    "nearest": "to the nearest number: a change below half an ulp (bf16: 1/512 to 1/256 of the entry) is lost",
    "stochastic": "up or down by chance, right on average (Gupta et al., 2015); keeps one number of state a tensor",
    "compensated": "to the nearest, and what that lost is carried into the next step (Kahan; Zamirai et al., 2020); 2 bytes an entry",
}
# The names of what is remembered: an int64 scalar on the CPU; an int16 of the weight's shape.
NOISE, CARRY = "noise", "carry"
# The carry counts in this part of an ulp, so that bf16 or fp16 and the carry are together as exact as float32; a carry kept in bf16, as
# in the paper, would itself lose what is below 2⁻¹⁶ of the weight.
UNITS = 65536
MASK = 2**63 - 1

State = Mapping[str, Tensor]


def memory(weight: Tensor, rounding: str, seed: int) -> dict[str, Tensor]:
    """The state that ``rounding`` needs for one weight; empty for "nearest", and for fp32 and float64 weights.

    seed: an integer; equal seeds give equal roundings. Give replicas of one weight the same, or they drift apart.
    """
    if weight.dtype not in HALF or rounding == "nearest":
        return {}
    if rounding == "stochastic":
        return {NOISE: torch.tensor(_mixed(seed & MASK))}
    return {CARRY: torch.zeros_like(weight, dtype=torch.int16, memory_format=torch.preserve_format)}


def rounds(states: Sequence[State]) -> bool:
    """Whether any of the weights is rounded in another way than to nearest."""
    return any([NOISE in s or CARRY in s for s in states])    # noqa: C419 - a list is faster than a generator


def widened(weights: Sequence[Tensor], states: Sequence[State]) -> list[Tensor]:
    """The weights to compute with: float32 copies with their carry where there is a state, the weights themselves elsewhere.

    states: one a weight, or none at all where no weight has one.
    """
    if not states:
        return list(weights)
    wide = [w.float() if rounds([s]) else w for w, s in zip(weights, states, strict=True)]
    for weight, exact, state in zip(weights, wide, states, strict=True):
        if CARRY in state:
            exact.addcmul_(state[CARRY].float(), ulp(exact, weight.dtype), value=1 / UNITS)
    return wide


def narrow_(
    weights: Sequence[Tensor], wide: Sequence[Tensor], states: Sequence[MutableMapping[str, Tensor]], parts: Sequence[int] = ()
) -> None:
    """Writes the float32 copies back into the weights, rounded, and remembers what the next step needs.

    parts: where the weights are parts of larger ones, the number of each part: different parts draw different random numbers, copies the
    same.
    """
    for k, (weight, exact, state) in enumerate(zip(weights, wide, states, strict=bool(states))):
        if NOISE in state:
            weight.copy_(stochastic(exact, weight.dtype, _uniform(exact, state[NOISE], parts[k] if parts else 0)))
        elif CARRY in state:
            weight.copy_(exact)
            rounded = weight.float()
            # In units of the rounded number's ulp: the next step finds the same ulp from the weight alone.
            lost = (exact - rounded).div_(ulp(rounded, weight.dtype)).mul_(UNITS).round_()
            state[CARRY].copy_(lost.nan_to_num_(0.0, 0.0, 0.0).clamp_(-UNITS // 2, UNITS // 2 - 1))


def stochastic(exact: Tensor, dtype: torch.dtype, uniform: Tensor) -> Tensor:
    """Rounds ``exact`` (float32) to one of its two neighbours in ``dtype``, the nearer one more likely: right on average.

    uniform: numbers of [0, 1), one an entry. Numbers of ``dtype`` stay as they are.
    """
    spacing = ulp(exact, dtype)
    return (exact.abs() / spacing).add_(uniform).floor_().mul_(spacing).copysign_(exact).to(dtype)


@_disable_dynamo    # a generator has no place in a graph
def _uniform(like: Tensor, noise: Tensor, part: int) -> Tensor:
    """Numbers of [0, 1) from the state ``noise``, which moves on."""
    # Parts of one tensor must not round alike, copies of one part must.
    seed = _mixed(int(noise) ^ part) if part else int(noise)
    generator = torch.Generator(like.device).manual_seed(seed >> 31)    # the CPU's takes 32 bits
    # Advanced by arithmetic, not by the generator: one integer in the checkpoint resumes it on any device.
    noise.fill_(_mixed(int(noise)))
    return torch.rand(like.shape, generator=generator, device=like.device, dtype=like.dtype)


def _mixed(state: int) -> int:
    """The next state: SplitMix64 (Steele, Lea & Flood, 2014), of which 63 bits are kept."""
    z = state + 0x9E3779B97F4A7C15
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
    return (z ^ (z >> 31)) & MASK


def ulp(value: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between neighbouring numbers of ``dtype`` around each value."""
    # frexp gives a mantissa in [0.5, 1), hence the 1 less in the exponent.
    spacing = torch.ldexp(torch.full_like(value, torch.finfo(dtype).eps), torch.frexp(value).exponent - 1)
    return spacing.clamp(min=torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps)
