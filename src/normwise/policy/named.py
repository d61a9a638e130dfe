"""The named rules: each is one choice of the parts of a :class:`Rule`, and says which problem it solves.

All take the keywords ``name``, ``exclude``, ``every``, ``start``, ``stop``, ``layout``, ``optional`` of a rule, and
``rounding`` where the action reads it. In the formulas w is one block, g its gradient, η the learning rate of its parameter group.
Selectors (``params``) default to the weights (``"role:matrix"``: no biases, no gains), except where a docstring says otherwise.

To add one, write a function under ``@named``: that alone makes it ``nw.<name>``, a rule in YAML and a line of ``normwise policies``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict, TypeVar, Unpack

from normwise.errors import PolicyError
from normwise.norms import Box, NonNegative
from normwise.parameters.layouts import Layout
from normwise.parameters.selectors import Selector
from normwise.policy import schedules
from normwise.policy.radii import Init, Relative
from normwise.policy.rule import EVERYTHING, Rule
from normwise.policy.rule_fields import CenterLike, NormLike, RadiusLike
from normwise.policy.schedules import Varying


class Common(TypedDict, total=False):
    """The keywords that every named rule hands on to its Rule."""

    exclude: Selector | None
    every: int
    start: int
    stop: int | None
    layout: Layout | None
    optional: bool
    rounding: str
    name: str | None


Made = TypeVar("Made", bound=Callable[..., Rule | list[Rule]])
NAMED: dict[str, Callable[..., Rule | list[Rule]]] = {}
"""Every named rule by its name, those of ``published`` too."""


def named(make: Made) -> Made:
    """Lists a function among the named rules."""
    NAMED[make.__name__] = make
    return make


def part_of(common: Common, part: str) -> Common:
    """The keywords of one of the several rules that a named rule is made of: each needs a name of its own."""
    name = common.get("name")
    return common if name is None else {**common, "name": f"{name} {part}"}


# -------------------------------------------------------------------------------------------- penalties and decay


@named
def l2_penalty(
    strength: Varying, params: Selector | None = None, *, samples: int | None = None, center: CenterLike = None,
    **common: Unpack[Common],
) -> Rule:  # fmt: skip
    """Adds strength/2 · ‖w‖₂² to the loss: ``grad += strength * w`` before the step.

    With ``samples=m``, the number of training samples, it is the article's λ/(2m) · Σθ² with λ = ``strength``, by default over
    *all* parameters, biases too. ``center="init"`` penalises the distance from the weights when attached (L2-SP; Li et al.,
    Explicit inductive bias for transfer learning, 2018). Under adaptive optimizers this does not minimise the penalised loss
    exactly, since they rescale the gradient (Loshchilov and Hutter, 2019): see :func:`weight_decay`.
    """
    strength, params = _per_sample(strength, params, samples)
    return Rule(params=params, action="penalty", norm="l2", power=2, strength=strength, center=center, **common)


@named
def l1_penalty(
    strength: Varying, params: Selector | None = None, *, samples: int | None = None, center: CenterLike = None,
    **common: Unpack[Common],
) -> Rule:  # fmt: skip
    """Adds strength · ‖w‖₁ to the loss: ``grad += strength * sign(w)`` before the step, with sign(0) = 0.

    With ``samples=m`` it is the article's λ/m · Σ|θ|, by default over *all* parameters. It gives small weights but no exact
    zeros, for which there is :func:`l1_prox` (Tibshirani, 1996, is the penalty's source). Under adaptive optimizers it does
    not minimise the penalised loss exactly.
    """
    strength, params = _per_sample(strength, params, samples)
    return Rule(params=params, action="penalty", norm="l1", strength=strength, center=center, **common)


@named
def elastic_net(
    l1: Varying, l2: Varying, params: Selector | None = None, *, samples: int | None = None, **common: Unpack[Common]
) -> list[Rule]:
    """Adds l1 · ‖w‖₁ + l2/2 · ‖w‖₂² to the loss: two rules (Zou and Hastie, 2005). ``samples`` as in :func:`l2_penalty`."""
    return [
        l1_penalty(l1, params, samples=samples, **part_of(common, "l1")), l2_penalty(l2, params, samples=samples, **part_of(common, "l2")),
    ]  # fmt: skip


@named
def weight_decay(strength: Varying, params: Selector | None = None, **common: Unpack[Common]) -> Rule:
    """Decoupled decay: w ← (1 − η · strength) · w before the step, as torch's AdamW does (Loshchilov and Hutter, 2019).

    Set the optimizer's own ``weight_decay`` to 0, or both act.
    """
    return Rule(params=params, action="weight_decay", strength=strength, **common)


@named
def decay_to_init(strength: Varying, params: Selector | None = None, **common: Unpack[Common]) -> Rule:
    """Decoupled decay to the initial weights: w ← w − η · strength · (w − w₀) before the step; keeps a copy of w₀.

    The decoupled form of L2-SP (Li et al., 2018), which is ``l2_penalty(strength, center="init")``.
    """
    return Rule(params=params, action="weight_decay", strength=strength, center="init", **common)


# --------------------------------------------------------------------------------------------- proximal operators


@named
def l1_prox(strength: Varying, params: Selector | None = None, **common: Unpack[Common]) -> Rule:
    """Soft threshold after the step, with exact zeros: w ← argmin over v of ½‖v − w‖² + η · strength · ‖v‖₁.

    Each entry moves η · strength towards zero and stays there (ISTA; Daubechies, Defrise and De Mol, 2004). Exact for gradient
    descent; under adaptive optimizers, whose step sizes differ by entry, the minimum is another.
    """
    return Rule(params=params, action="prox", norm="l1", strength=strength, **common)


@named
def group_lasso(strength: Varying, params: Selector | None = None, *, per: str = "unit", **common: Unpack[Common]) -> Rule:
    """Shortens each block's L2 norm by η · strength after the step; short ones become exactly zero.

    w ← argmin over v of ½‖v − w‖² + η · strength · Σ‖v_block‖₂: the prox of the sum of the blocks' norms is the L2 prox of
    each. ``per="unit"`` removes whole units, ``per="input"`` whole inputs (Yuan and Lin, 2006).
    """
    return Rule(params=params, action="prox", norm="l2", per=per, strength=strength, **common)


@named
def nuclear_prox(strength: Varying, params: Selector | None = None, *, per: str = "matrix", **common: Unpack[Common]) -> Rule:
    """Soft threshold of the singular values after the step: w ← argmin over v of ½‖v − w‖² + η · strength · ‖v‖_nuclear.

    Lowers the rank (Cai, Candès and Shen, 2010). ``per="matrix"``: of each matrix that the module applies.
    """
    return Rule(params=params, action="prox", norm="nuclear", per=per, strength=strength, **common)


# --------------------------------------------------------------------------------------------- constraints on weights


@named
def max_norm(
    radius: RadiusLike, params: Selector | None = None, *, per: str = "unit", center: CenterLike = None, relative: bool = False,
    floor: float | None = None, **common: Unpack[Common],
) -> Rule:  # fmt: skip
    """Keeps the L2 norm of each unit's weights at most ``radius``: w ← w · min(1, radius / ‖w‖₂) after the step.

    For L2 this is also the nearest point of the ball. ``per="unit"``: the incoming weights of one output, a whole filter of a
    convolution (Srebro and Shraibman, 2005; Hinton et al., 2012; radii of 3 to 4 are usual with dropout, Srivastava et al.,
    2014).

    Args:
        radius: a number > 0, a schedule, or ``"init"`` and multiples of it.
        params: which weights; default all but biases and gains.
        per: the blocks; default each output unit.
        center: ``"init"`` makes it a trust region: ‖w − w₀‖₂ ≤ radius, with w₀ the weights when attached, of which a copy is kept.
        relative: counts the radius in the norms that the blocks had when attached: ``max_norm(0.1, center="init", relative=True)`` is
            ‖w − w₀‖₂ ≤ 0.1 · ‖w₀‖₂, so that no unit moves further than a tenth of its length. In YAML ``radius: 0.1*init``.
        floor: under ``relative`` or ``radius="init"`` the least norm that counts for ‖w₀‖₂; without it a block of zeros is an error.

    Raises:
        PolicyError: for a radius that means nothing, ``relative`` with a radius that is no number or schedule or around weights given
            by name.
    """
    if relative:
        if not (schedules.is_number(radius) or callable(radius)) or not (center is None or center == "init"):
            allowed = "give radius a number or a schedule, and center None or 'init'"
            raise PolicyError(f"relative=True counts in the norms when attached: {allowed}.")
        radius = Init(radius)  # type: ignore[arg-type]
    return Rule(params=params, action="clip_norm", norm="l2", per=per, radius=radius, center=center, floor=floor, **common)


@named
def unit_norm(radius: RadiusLike = 1.0, params: Selector | None = None, *, per: str = "unit", **common: Unpack[Common]) -> Rule:
    """Puts each unit's weights on the sphere: w ← w · radius / ‖w‖₂ after the step. A zero unit stays zero, and is counted.

    The default radius 1 gives unit vectors, as Keras's UnitNorm does.
    """
    return Rule(params=params, action="normalize", norm="l2", per=per, radius=radius, **common)


@named
def min_max_norm(
    min: float, max: RadiusLike, rate: float = 1.0, params: Selector | None = None, *, per: str = "unit", **common: Unpack[Common]
) -> Rule:
    """Keeps each unit's L2 norm within [min, max]: w ← w · (rate · clip(‖w‖, min, max) + (1 − rate) · ‖w‖) / ‖w‖.

    Keras's MinMaxNorm. ``rate`` below 1 (default 1) goes only that share of the way at each step, so that the bounds are
    approached, not held. ``min=0`` means no lower bound.
    """
    lower = None if schedules.is_number(min) and min == 0 else min
    return Rule(params=params, action="clip_norm", norm="l2", per=per, min_radius=lower, radius=max, rate=rate, **common)


@named
def clip_weight_norm(
    radius: RadiusLike, params: Selector | None = None, *, norm: NormLike = "l2", per: str = "tensor", **common: Unpack[Common]
) -> Rule:
    """Clips the norm of each whole weight tensor: w ← w · min(1, radius / ‖w‖) after the step (``tf.clip_by_norm``)."""
    return Rule(params=params, action="clip_norm", norm=norm, per=per, radius=radius, **common)


@named
def clip_weight_value(
    value: RadiusLike, high: float | None = None, params: Selector | None = None, **common: Unpack[Common]
) -> Rule:
    """Clamps each entry after the step: to [−value, value], or with two numbers to [value, high] (``tf.clip_by_value``).

    The nearest point of the box; with one number, of the LInf ball. WGAN's critic uses 0.01 (Arjovsky et al., 2017).
    """
    if high is None:
        return Rule(params=params, action="project", norm="linf", radius=value, **common)
    return Rule(params=params, action="project", norm=_box(value, high), **common)


@named
def non_negative(params: Selector | None = None, **common: Unpack[Common]) -> Rule:
    """Sets negative weights to zero after the step: the nearest point with w ≥ 0 (Keras's NonNeg)."""
    return Rule(params=params, action="project", norm=NonNegative(), **common)


@named
def l1_ball(radius: RadiusLike, params: Selector | None = None, *, per: str = "unit", **common: Unpack[Common]) -> Rule:
    """The nearest point with ‖w‖₁ ≤ radius for each unit, after the step: sparse weights with a sum that is known.

    A soft threshold, found by sorting (Duchi et al., 2008).
    """
    return Rule(params=params, action="project", norm="l1", per=per, radius=radius, **common)


@named
def spectral_cap(
    radius: RadiusLike, params: Selector | None = None, *, per: str = "matrix", tolerance: float = 0.0, **common: Unpack[Common]
) -> Rule:
    """The nearest matrix whose singular values are all at most ``radius``, after the step: the larger ones are cut to it.

    ``per="matrix"``: each matrix that the module applies, a convolution's being its flattened filters. The layer is then
    ``radius``-Lipschitz in L2, for a convolution up to the overlap of its patches (Yoshida and Miyato, 2017; Gouk et al., 2021).

    ``tolerance=0`` (default) decomposes each matrix that may exceed, exactly, which costs about a training step for matrices of width
    256. ``tolerance=0.01`` keeps σ₁ ≤ 1.01·radius at a small part of that, whatever the updates are. One pass over a matrix bounds how far
    σ₁ can have grown since it was last looked at, which takes a copy of the matrix; those that may exceed are looked at, and what exceeds
    is cut to (1 − tolerance/2)·radius, so that a matrix is cut every few steps. The state is in the control's. The more matrices are at
    their radius, the dearer: :func:`normwise.norms.linalg.cap` says how it works, docs/benchmarks.md what it costs.
    """
    return Rule(params=params, action="project", norm="spectral", per=per, radius=radius, tolerance=tolerance, **common)


@named
def spectral_normalize(
    radius: RadiusLike = 1.0, params: Selector | None = None, *, per: str = "matrix", **common: Unpack[Common]
) -> Rule:
    """Scales each matrix so that its largest singular value is ``radius`` (default 1), after the step.

    Not the parametrization of ``torch.nn.utils.parametrizations.spectral_norm`` (Miyato et al., 2018): there the module uses
    w / σ₁(w) in its forward pass and the gradient flows through σ₁. Here the plain weights are rescaled after each step, the
    gradient knows nothing of it, and the state dict keeps its keys.
    """
    return Rule(params=params, action="normalize", norm="spectral", per=per, radius=radius, **common)


# ----------------------------------------------------------------------------------------------------------- gradients


@named
def clip_grad_norm(
    max_norm: RadiusLike, params: Selector | None = EVERYTHING, *, norm: NormLike = "l2", per: str = "global", **common: Unpack[Common]
) -> Rule:
    """Clips the gradient: g ← g · min(1, max_norm / ‖g‖) before the step, by default all gradients as one vector.

    ``params`` defaults to everything, as ``torch.nn.utils.clip_grad_norm_`` is used (Pascanu et al., 2013); there 1e-6 is added
    to the norm, here nothing is. ``per="tensor"`` clips each parameter by itself.
    """
    return Rule(params=params, action="clip_norm", norm=norm, per=per, on="grad", radius=max_norm, **common)


@named
def clip_grad_value(value: RadiusLike, params: Selector | None = EVERYTHING, **common: Unpack[Common]) -> Rule:
    """Clamps each entry of the gradient to [−value, value] before the step, as ``torch.nn.utils.clip_grad_value_`` does."""
    return Rule(params=params, action="project", norm="linf", on="grad", radius=value, **common)


@named
def normalize_grad(
    radius: RadiusLike = 1.0, params: Selector | None = None, *, norm: NormLike = "l2", per: str = "tensor", **common: Unpack[Common]
) -> Rule:
    """Gives each gradient the norm ``radius``: g ← g · radius / ‖g‖ before the step; a zero gradient stays zero.

    ``per="tensor"`` normalises layer by layer (Yu et al., Block-normalized gradient method, 2017), ``per="global"`` all at once.
    """
    return Rule(params=params, action="normalize", norm=norm, per=per, on="grad", radius=radius, **common)


@named
def agc(clipping: Varying = 0.01, params: Selector | None = None, *, eps: float = 1e-3, **common: Unpack[Common]) -> Rule:
    """Adaptive gradient clipping: each unit's gradient is at most ``clipping`` times as long as its weights.

    g ← g · min(1, clipping · max(‖w‖₂, eps) / ‖g‖₂) before the step, per unit (Brock et al., 2021; defaults 0.01 and 1e-3 are
    theirs). By default all weights but the head's, which the paper leaves unclipped; give ``params`` or ``exclude`` to choose.
    """
    if params is None and "exclude" not in common:
        common = {"optional": True, **common, "exclude": "role:head"}
    radius = Relative(clipping, eps)
    return Rule(params=params, action="clip_norm", norm="l2", per="unit", on="grad", radius=radius, **common)


# ------------------------------------------------------------------------------------------------------------ helpers


def _per_sample(strength: Varying, params: Selector | None, samples: int | None) -> tuple[Varying, Selector | None]:
    """The article's λ as a strength: λ/m, over all parameters unless some are chosen."""
    if samples is None:
        return strength, params
    if not isinstance(samples, int) or isinstance(samples, bool) or samples < 1:
        raise PolicyError(f"samples is {samples!r}, but samples must be the number of training samples, a whole number >= 1.")
    if callable(strength):
        raise PolicyError("samples needs strength to be a number: divide a schedule's values by the number of samples yourself.")
    return schedules.number(strength, "strength", zero=True) / samples, EVERYTHING if params is None else params


def _box(low: RadiusLike, high: float) -> Box:
    if not schedules.is_number(low) or not schedules.is_number(high):
        raise PolicyError(f"a box has two numbers as its ends, given {low!r} and {high!r}.")
    ends = [schedules.as_float(end) for end in (low, high)]
    if not ends[0] <= ends[1]:
        raise PolicyError(f"the box [{ends[0]}, {ends[1]}] holds nothing: give low <= high.")
    return Box(*ends)
