"""The named rules: each is one choice of the parts of a :class:`Rule`, and says which problem it solves.

In the formulas w is one block, g its gradient, u what the optimizer adds to w, and η the learning rate of its parameter group. What all
named rules have in common:

    params: which weights; by default ``"role:matrix"``, all but biases and gains, except where a docstring says otherwise.
    per: the blocks that one norm is measured on, as in :class:`Rule`.
    radius, strength: a number or a schedule of ``nw.schedules``; a radius is above 0, a strength may be 0.
    ``**common``: ``name``, ``exclude``, ``every``, ``start``, ``stop``, ``layout`` and ``optional`` of a Rule, and ``rounding`` where the
    action reads it.

Each returns its Rule, or a list of Rules; each raises PolicyError for an argument that cannot mean anything, and says what is allowed.
To add one, write a function under ``@named``: that alone makes it ``nw.<name>``, a rule in YAML and a line of ``normwise policies``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypedDict, TypeVar, Unpack

from normwise.errors import PolicyError
from normwise.norms import Box, NonNegative
from normwise.parameters.inventory import Selector
from normwise.parameters.layouts import Layout
from normwise.policy import schedules
from normwise.policy.radii import Init, Relative
from normwise.policy.rule import EVERYTHING, CenterLike, NormLike, RadiusLike, Rule
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

    Under adaptive optimizers this does not minimise the penalised loss exactly, since they rescale the gradient (Loshchilov and Hutter,
    2019): see :func:`weight_decay`.

    Args:
        strength: >= 0; the gradient of the penalty is strength · w.
        params: which weights; default all but biases and gains, with ``samples`` *all* parameters.
        samples: the number m of training samples; the penalty is then the article's λ/(2m) · Σθ², with λ = ``strength``.
        center: ``"init"`` penalises the distance from the weights when attached, of which a copy is kept (L2-SP; Li et al., Explicit
            inductive bias for transfer learning, 2018).
    """
    strength, params = _per_sample(strength, params, samples)
    return Rule(params=params, action="penalty", norm="l2", power=2, strength=strength, center=center, **common)


@named
def l1_penalty(
    strength: Varying, params: Selector | None = None, *, samples: int | None = None, center: CenterLike = None,
    **common: Unpack[Common],
) -> Rule:  # fmt: skip
    """Adds strength · ‖w‖₁ to the loss: ``grad += strength * sign(w)`` before the step, with sign(0) = 0.

    It gives small weights but no exact zeros; :func:`l1_prox` gives those. Tibshirani, 1996. Under adaptive optimizers it does not
    minimise the penalised loss exactly.

    Args:
        strength: >= 0; each entry is pulled by this much.
        params: which weights; default all but biases and gains, with ``samples`` *all* parameters.
        samples: the number m of training samples; the penalty is then the article's λ/m · Σ|θ|, with λ = ``strength``.
        center: ``"init"`` penalises the distance from the weights when attached, of which a copy is kept.
    """
    strength, params = _per_sample(strength, params, samples)
    return Rule(params=params, action="penalty", norm="l1", strength=strength, center=center, **common)


@named
def elastic_net(
    l1: Varying, l2: Varying, params: Selector | None = None, *, samples: int | None = None, **common: Unpack[Common]
) -> list[Rule]:
    """Adds l1 · ‖w‖₁ + l2/2 · ‖w‖₂² to the loss: two rules (Zou and Hastie, 2005).

    Args:
        l1, l2: the strengths of :func:`l1_penalty` and :func:`l2_penalty`.
        params, samples: as there.
    """
    return [
        l1_penalty(l1, params, samples=samples, **part_of(common, "l1")), l2_penalty(l2, params, samples=samples, **part_of(common, "l2")),
    ]  # fmt: skip


@named
def weight_decay(strength: Varying, params: Selector | None = None, **common: Unpack[Common]) -> Rule:
    """Decoupled decay: w ← (1 − η · strength) · w before the step, as torch's AdamW does (Loshchilov and Hutter, 2019).

    Set the optimizer's own ``weight_decay`` to 0, or both act.

    Args:
        strength: >= 0, the share of w that a learning rate of 1 would take away.
        params: which weights; default all but biases and gains.
    """
    return Rule(params=params, action="weight_decay", strength=strength, **common)


@named
def decay_to_init(strength: Varying, params: Selector | None = None, **common: Unpack[Common]) -> Rule:
    """Decoupled decay to the initial weights: w ← w − η · strength · (w − w₀) before the step; keeps a copy of w₀.

    The decoupled form of L2-SP (Li et al., 2018), which is ``l2_penalty(strength, center="init")``. Args: as of :func:`weight_decay`.
    """
    return Rule(params=params, action="weight_decay", strength=strength, center="init", **common)


# --------------------------------------------------------------------------------------------- proximal operators


@named
def l1_prox(strength: Varying, params: Selector | None = None, **common: Unpack[Common]) -> Rule:
    """Soft threshold after the step, with exact zeros: w ← argmin over v of ½‖v − w‖² + η · strength · ‖v‖₁.

    ISTA (Daubechies, Defrise and De Mol, 2004). Exact for gradient descent; under adaptive optimizers, whose step sizes differ by entry,
    it finds another minimum.

    Args:
        strength: >= 0; each entry moves η · strength towards zero and stays there.
        params: which weights; default all but biases and gains.
    """
    return Rule(params=params, action="prox", norm="l1", strength=strength, **common)


@named
def group_lasso(strength: Varying, params: Selector | None = None, *, per: str = "unit", **common: Unpack[Common]) -> Rule:
    """Shortens each block's L2 norm by η · strength after the step; short ones become exactly zero.

    w ← argmin over v of ½‖v − w‖² + η · strength · Σ‖v_block‖₂: the prox of the sum of the blocks' norms is the L2 prox of each (Yuan and
    Lin, 2006). ``normwise prune`` removes the units that it set to zero.

    Args:
        strength: >= 0; each block gets η · strength shorter.
        params: which weights; default all but biases and gains.
        per: ``"unit"`` (default) removes whole units, ``"input"`` whole inputs.
    """
    return Rule(params=params, action="prox", norm="l2", per=per, strength=strength, **common)


@named
def nuclear_prox(strength: Varying, params: Selector | None = None, *, per: str = "matrix", **common: Unpack[Common]) -> Rule:
    """Soft threshold of the singular values after the step: w ← argmin over v of ½‖v − w‖² + η · strength · ‖v‖_nuclear.

    Lowers the rank (Cai, Candès and Shen, 2010). Costs a singular value decomposition.

    Args:
        strength: >= 0; each singular value shrinks by η · strength.
        params: which weights; default all but biases and gains.
        per: default each matrix that the module applies.
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

    Args:
        radius: > 0; default 1, unit vectors, as in Keras's UnitNorm.
        params: which weights; default all but biases and gains.
        per: the blocks; default each output unit.
    """
    return Rule(params=params, action="normalize", norm="l2", per=per, radius=radius, **common)


@named
def min_max_norm(
    min: float, max: RadiusLike, rate: float = 1.0, params: Selector | None = None, *, per: str = "unit", **common: Unpack[Common]
) -> Rule:
    """Keeps each unit's L2 norm within [min, max]: w ← w · (rate · clip(‖w‖, min, max) + (1 − rate) · ‖w‖) / ‖w‖.

    Keras's MinMaxNorm.

    Args:
        min: shorter units are stretched to it; 0 for no lower bound.
        max: longer units are shortened to it, > 0.
        rate: the fraction of the correction applied at each step, in (0, 1]; default 1, which holds the bounds at once. Below 1 they are
            approached, not held.
        params: which weights; default all but biases and gains.
        per: the blocks; default each output unit.
    """
    lower = None if schedules.is_number(min) and min == 0 else min
    return Rule(params=params, action="clip_norm", norm="l2", per=per, min_radius=lower, radius=max, rate=rate, **common)


@named
def clip_weight_norm(
    radius: RadiusLike, params: Selector | None = None, *, norm: NormLike = "l2", per: str = "tensor", **common: Unpack[Common]
) -> Rule:
    """Clips the norm of each whole weight tensor: w ← w · min(1, radius / ‖w‖) after the step (``tf.clip_by_norm``).

    Args:
        radius: the largest norm to leave, > 0.
        params: which weights; default all but biases and gains.
        norm: default ``"l2"``.
        per: the blocks; default each parameter.
    """
    return Rule(params=params, action="clip_norm", norm=norm, per=per, radius=radius, **common)


@named
def clip_weight_value(
    value: RadiusLike, high: float | None = None, params: Selector | None = None, **common: Unpack[Common]
) -> Rule:
    """Clamps each entry after the step: to [−value, value], or with two numbers to [value, high] (``tf.clip_by_value``).

    The nearest point of the box; with one number, of the LInf ball. WGAN's critic uses 0.01 (Arjovsky et al., 2017).

    Args:
        value: > 0, or the lower end.
        high: the upper end.
        params: which weights; default all but biases and gains.
    """
    if high is None:
        return Rule(params=params, action="project", norm="linf", radius=value, **common)
    if not schedules.is_number(value) or not schedules.is_number(high):
        raise PolicyError(f"a box has two numbers as its ends, given {value!r} and {high!r}.")
    ends = [schedules.as_float(end) for end in (value, high)]
    if not ends[0] <= ends[1]:
        raise PolicyError(f"the box [{ends[0]}, {ends[1]}] holds nothing: give low <= high.")
    return Rule(params=params, action="project", norm=Box(*ends), **common)


@named
def non_negative(params: Selector | None = None, **common: Unpack[Common]) -> Rule:
    """Sets negative weights to zero after the step: the nearest point with w ≥ 0 (Keras's NonNeg).

    Args:
        params: which weights; default all but biases and gains.
    """
    return Rule(params=params, action="project", norm=NonNegative(), **common)


@named
def l1_ball(radius: RadiusLike, params: Selector | None = None, *, per: str = "unit", **common: Unpack[Common]) -> Rule:
    """The nearest point with ‖w‖₁ ≤ radius for each unit, after the step: sparse weights with a sum that is known.

    A soft threshold, found by sorting (Duchi et al., 2008).

    Args:
        radius: > 0.
        params: which weights; default all but biases and gains.
        per: the blocks; default each output unit.
    """
    return Rule(params=params, action="project", norm="l1", per=per, radius=radius, **common)


@named
def spectral_cap(
    radius: RadiusLike, params: Selector | None = None, *, per: str = "matrix", tolerance: float = 0.0, **common: Unpack[Common]
) -> Rule:
    """The nearest matrix whose singular values are all at most ``radius``, after the step: the larger ones are cut to it.

    The layer is then ``radius``-Lipschitz in L2, a convolution up to the overlap of its patches (Yoshida and Miyato, 2017; Gouk et al.,
    2021).

    Args:
        radius: the largest singular value to leave, > 0.
        params: which weights; default all but biases and gains.
        per: default each matrix that the module applies, a convolution's being its flattened filters.
        tolerance: 0 (default) decomposes each matrix that may exceed, exactly, which costs a third to over half of a
            training step of a GPT of width 256. 0.01 keeps σ₁ ≤ 1.01·radius for a small part of that, whatever the updates are: one pass
            over a matrix bounds how far σ₁ can have grown since it was last looked at, and only those that may exceed are looked at. It
            takes a copy of each matrix, in the control's state, and costs more the more matrices are at their radius.
            :func:`normwise.norms.linalg.cap` says how it works, docs/benchmarks.md what it costs.
    """
    return Rule(params=params, action="project", norm="spectral", per=per, radius=radius, tolerance=tolerance, **common)


@named
def spectral_normalize(
    radius: RadiusLike = 1.0, params: Selector | None = None, *, per: str = "matrix", **common: Unpack[Common]
) -> Rule:
    """Scales each matrix so that its largest singular value is ``radius`` (default 1), after the step.

    ``torch.nn.utils.parametrizations.spectral_norm`` (Miyato et al., 2018) is something else: there the module uses w / σ₁(w) in its
    forward pass and the gradient flows through σ₁. Here the plain weights are rescaled after each step, the gradient knows nothing of it,
    and the state dict keeps its keys.

    Args:
        radius: > 0, default 1.
        params: which weights; default all but biases and gains.
        per: default each matrix that the module applies.
    """
    return Rule(params=params, action="normalize", norm="spectral", per=per, radius=radius, **common)


# ----------------------------------------------------------------------------------------------------------- gradients


@named
def clip_grad_norm(
    max_norm: RadiusLike, params: Selector | None = EVERYTHING, *, norm: NormLike = "l2", per: str = "global", **common: Unpack[Common]
) -> Rule:
    """Clips the gradient: g ← g · min(1, max_norm / ‖g‖) before the step, by default all gradients as one vector.

    Pascanu et al., 2013. ``torch.nn.utils.clip_grad_norm_`` adds 1e-6 to the norm, here nothing is added.

    Args:
        max_norm: the largest norm to leave, > 0.
        params: whose gradients; default everything, as torch's function is used.
        norm: default ``"l2"``.
        per: default ``"global"``; ``"tensor"`` clips each parameter by itself.
    """
    return Rule(params=params, action="clip_norm", norm=norm, per=per, on="grad", radius=max_norm, **common)


@named
def clip_grad_value(value: RadiusLike, params: Selector | None = EVERYTHING, **common: Unpack[Common]) -> Rule:
    """Clamps each entry of the gradient to [−value, value] before the step, as ``torch.nn.utils.clip_grad_value_`` does.

    Args:
        value: > 0.
        params: whose gradients; default everything.
    """
    return Rule(params=params, action="project", norm="linf", on="grad", radius=value, **common)


@named
def normalize_grad(
    radius: RadiusLike = 1.0, params: Selector | None = None, *, norm: NormLike = "l2", per: str = "tensor", **common: Unpack[Common]
) -> Rule:
    """Gives each gradient the norm ``radius``: g ← g · radius / ‖g‖ before the step; a zero gradient stays zero.

    Args:
        radius: > 0, default 1.
        params: whose gradients; default all but those of biases and gains.
        norm: default ``"l2"``.
        per: ``"tensor"`` (default) normalises layer by layer (Yu et al., Block-normalized gradient method, 2017), ``"global"`` all at once.
    """
    return Rule(params=params, action="normalize", norm=norm, per=per, on="grad", radius=radius, **common)


@named
def agc(clipping: Varying = 0.01, params: Selector | None = None, *, eps: float = 1e-3, **common: Unpack[Common]) -> Rule:
    """Adaptive gradient clipping: each unit's gradient is at most ``clipping`` times as long as its weights.

    g ← g · min(1, clipping · max(‖w‖₂, eps) / ‖g‖₂) before the step, per unit (Brock et al., 2021; both defaults are theirs).

    Args:
        clipping: > 0, default 0.01.
        params: whose gradients; default all weights but the head's, which the paper leaves unclipped; ``exclude`` chooses as well.
        eps: the least norm of a unit's weights that counts, so that units that start at zero can move; default 1e-3.
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
