"""The published methods: named rules that methods of recent years are made of, each a choice of parts with its source.

``named`` says what all named rules have in common. w is one block, u what the optimizer adds to it, η the learning rate of its parameter
group. "The matrices" are the hidden, convolutional and recurrent weights: embeddings and heads are left out.
"""

from __future__ import annotations

from typing import Any, Unpack

from normwise.errors import PolicyError
from normwise.norms import Orthogonal
from normwise.parameters.inventory import Selector
from normwise.policy import radii
from normwise.policy.named import Common, named, part_of
from normwise.policy.radii import Brake, Inflection, Init, Quantile, StepLength, ZScore
from normwise.policy.rule import EVERYTHING, MATRICES, NormLike, RadiusLike, Rule
from normwise.policy.schedules import Varying


def on_matrices(params: Selector | None, common: Common) -> Common:
    """``common`` with ``params``, which default to :data:`MATRICES`; a model need not have all of these roles."""
    if params is not None:
        return {**common, "params": params}  # type: ignore[typeddict-unknown-key]
    return {"optional": True, **common, "params": MATRICES}  # type: ignore[typeddict-unknown-key]


# ------------------------------------------------------------------------------------------------- lengths of steps


@named
def hyperball(
    radius: RadiusLike = "init", params: Selector | None = None, *, per: str = "tensor", floor: float | None = None,
    **common: Unpack[Common],
) -> list[Rule]:  # fmt: skip
    """Keeps each weight on its sphere and gives each step the length η · R: w ← R · normalise(w + η · R · normalise(u)).

    The learning rate then means the length of a step relative to the weight's norm: about the angle, in radians, that the weight turns by;
    0.01 is a usual value, whatever the optimizer's own scale was. A step of zero stays zero. Hyperball (arXiv 2606.16899, 2026), on any
    optimizer: over ``torch.optim.AdamW`` with ``weight_decay=0`` it equals ``normwise.optim.AdamH``.

    Two rules: the update is normalised, then the weight. Outside normwise's own optimizers a copy of these weights is kept during the step.

    Args:
        radius: R; ``"init"`` (default) for ‖w‖₂ when attached, a multiple of it, a number or a schedule.
        params: default the matrices: hidden, convolutional and recurrent weights, no embeddings and no heads.
        per: default each parameter as one vector.
        floor: the radius of a weight that starts at zero, which otherwise is an error.

    Raises:
        PolicyError: when attached to a parameter whose group has a ``weight_decay``, which would turn the step, not shorten the weight.
    """
    sphere = radii.radius(radius)
    step = StepLength("init", sphere.scale) if isinstance(sphere, Init) else StepLength("number", sphere)  # type: ignore[arg-type]
    shared: Any = {**on_matrices(params, common), "per": per}
    floors = floor if isinstance(sphere, Init) else None
    return [
        Rule(action="normalize", on="update", radius=step, floor=floors, **part_of(shared, "step")),
        Rule(action="normalize", on="weight", radius=sphere, floor=floor, **part_of(shared, "weight")),
    ]


@named
def relative_update(
    scale: Varying = 1.0, params: Selector | None = None, *, norm: NormLike = "l2", per: str = "tensor", floor: float | None = None,
    **common: Unpack[Common],
) -> Rule:  # fmt: skip
    """Gives each step the length scale · η · ‖w‖: the learning rate is the relative change of the weight.

    u ← u · scale · η · ‖w‖ / ‖u‖, w as it was before the step (You et al., 2017, LARS, took gradients so; Bernstein et al., 2020, Fromage).
    A step of zero stays zero. Weights grow by about η²/2 of their norm a step: :func:`hyperball` keeps them, or :func:`radial_brake`.
    The rule ``weight_decay`` acts before it and may stand beside it.

    Args:
        scale: > 0, default 1.
        params: default the matrices: hidden, convolutional and recurrent weights, no embeddings and no heads.
        norm: default ``"l2"``.
        per: default each parameter.
        floor: max(‖w‖, floor) counts for ‖w‖. Without it a weight that is zero when attached is an error, since it could never move.

    Raises:
        PolicyError: when attached to a parameter whose group has a ``weight_decay``, which would be measured as a part of the step.
    """
    shared: Any = on_matrices(params, common)
    return Rule(action="normalize", on="update", norm=norm, per=per, radius=StepLength("weight", scale), floor=floor, **shared)


@named
def radial_brake(
    keep: float = 0.5, params: Selector | None = None, *, norm: NormLike = "l2", per: str = "tensor", **common: Unpack[Common]
) -> Rule:
    """Keeps only a share of what a step adds to a weight's norm: ‖w‖ ← before + keep · (after − before) where it grew.

    The direction of the weight is the optimizer's; a norm that shrank is left as it is. Needs the norms before the step, no copy of the
    weights. NVIDIA's Emerging-Optimizers v0.5, ``RadialBrakeHook``.

    Args:
        keep: in [0, 1]; 0 lets no norm grow, 1 does nothing. Default 0.5, NVIDIA's.
        params: default the matrices: hidden, convolutional and recurrent weights, no embeddings and no heads.
        norm: default ``"l2"``.
        per: default each parameter.
    """
    shared: Any = on_matrices(params, common)
    return Rule(action="clip_norm", norm=norm, per=per, radius=Brake(keep), **shared)


# ------------------------------------------------------------------------------------------ bounds found in training


@named
def cpr(
    kappa: RadiusLike = Inflection(), params: Selector | None = None, *, mu: Varying = 1.0, per: str = "matrix",  # noqa: B008 - frozen
    **common: Unpack[Common],
) -> Rule:  # fmt: skip
    """Constrained parameter regularization: a weight decay of its own for each matrix, as strong as its bound R(w) ≤ κ needs.

    At step t, with R(w) = ‖w‖₂²/n the mean square of the block's n entries:
    λ ← max(0, λ + mu · (R(w_t) − κ)), then w_{t+1} ← w_t + u_t − λ · 2w_t, which is λ times the gradient of ‖w‖₂² at w_t, without the
    learning rate. This is Algorithm 1 of Franke et al. (Improving deep learning optimization through constrained parameter
    regularization, NeurIPS 2024, arXiv 2311.09058) with the squared L2 norm and the multiplier's rate μ/n: the paper leaves out the
    division, its authors' code has it, and without it μ = 1 overshoots on any matrix of ordinary size. As in the paper λ and the gradient
    are those at w_t, so the term is applied before the optimizer's step, and no copy is needed.

    It stands in the place of weight decay: set the optimizer's own to 0, or both act. λ and κ are in the control's state.

    Args:
        kappa: `nw.radii.Inflection` (default; Kappa-IP), `nw.radii.WarmStart` (Kappa-WS), a number (Kappa-K, a mean square), or ``"init"``
            and multiples ``"k*init"``: k · R(w₀) (Kappa-kI₀).
        params: default all weights but embeddings; never biases and gains.
        mu: default 1, the paper's; it found 0.01 to 10 alike. Weights whose mean square is near 1 need less: beyond λ = 1/2 w would flip.
        per: the blocks; default each matrix that the module applies.
    """
    if params is None and "exclude" not in common:
        common = {"optional": True, **common, "exclude": "role:embedding"}
    return Rule(params=params, action="cpr", per=per, radius=kappa, strength=mu, **common)


@named
def autoclip(
    percentile: float = 10.0, params: Selector | None = EVERYTHING, *, window: int = 10_000, norm: NormLike = "l2", per: str = "global",
    on: str = "grad", **common: Unpack[Common],
) -> Rule:  # fmt: skip
    """Clips the gradient to a percentile of the norms that it had so far: g ← g · min(1, p / ‖g‖), p found anew at each step.

    The history holds the norms before clipping, this step's included, and grows once a step that happens. Seetharaman et al., AutoClip:
    adaptive gradient clipping for source separation networks, 2020.

    Args:
        percentile: in [0, 100]; default 10, the paper's, so that nine of ten steps are clipped.
        params: whose gradients; default everything.
        window: how many norms the history keeps; default 10000, where the paper keeps all.
        norm: default ``"l2"``.
        per: default all as one vector. ``"tensor"`` keeps a history for each parameter: give a smaller window there, since each history is
            sorted once a step (10000 norms: 0.8 ms on a CPU).
        on: ``"update"`` clips what the optimizer adds to the weights instead, by the history of that; ``per="global"`` is then for one
            optimizer.
    """
    return Rule(params=params, action="clip_norm", norm=norm, per=per, on=on, radius=Quantile(percentile, window), **common)


@named
def zclip(
    z: float = 2.5, params: Selector | None = EVERYTHING, *, alpha: float = 0.97, warmup: int = 25, norm: NormLike = "l2",
    per: str = "global", on: str = "grad", **common: Unpack[Common],
) -> Rule:  # fmt: skip
    """Clips only spikes: a gradient norm more than z deviations above its running mean, to mean + z²/score · deviation.

    A spike enters the running mean and variance as what it was clipped to; a norm that is not finite is left to ``on_nonfinite`` and does
    not enter. Kumar et al., ZClip: adaptive spike mitigation for LLM pre-training, 2025 (arXiv 2504.02507), with its defaults.

    Args:
        z: > 0, default 2.5.
        params: whose gradients; default everything.
        alpha: the factor of the running mean and variance, default 0.97.
        warmup: how many norms only start them, default 25. :class:`normwise.radii.ZScore` has the formulas.
        norm: default ``"l2"``.
        per: default all as one vector.
        on: ``"update"`` clips spikes of what the optimizer adds to the weights instead; ``per="global"`` is then for one optimizer.
    """
    return Rule(params=params, action="clip_norm", norm=norm, per=per, on=on, radius=ZScore(z, alpha, warmup), **common)


# --------------------------------------------------------------------------------------------------------- attention


@named
def qk_clip(
    tau: RadiusLike = 100.0, params: Selector | None = None, *, query: Selector | None = None, key: Selector | None = None,
    heads: int | tuple[int, int] | None = None, key_heads: int | None = None, **common: Unpack[Common],
) -> Rule:  # fmt: skip
    """Shrinks the queries and keys of attention heads whose largest logit exceeded tau: W_q, W_k ← √γ · W_q, √γ · W_k, γ = min(1, τ/max).

    After the step, for each head from the maxima that the attention reports, ``control.report_max_logits(attention, maxima)``; without a
    report nothing happens. Biases of q and k are scaled too, so that the same inputs give γ times the logits. Under QK-norm the scale of
    W_q is divided away: there it has no effect. Kimi K2 (2025, arXiv 2507.20534).

    Args:
        tau: the largest logit to leave; default 100, the paper's.
        params: one layer of q, k and v stacked in this order: ``params="*c_attn.*", heads=(3, 8)``. Without any selector the q and k of
            every ``nn.MultiheadAttention``.
        query, key: separate layers: ``query="*q_proj.*", key="*k_proj.*", heads=8``.
        heads: how many query heads there are, or (stacked matrices, heads).
        key_heads: how many key heads, where several query heads share one (grouped-query). Only the queries are scaled then, by γ: the
            paper's rule for its shared keys, since scaling a shared one would change heads that did not exceed τ. No ``key`` is needed.
    """
    if query is None:
        if key is not None or key_heads is not None:
            raise PolicyError("qk_clip with key= or key_heads= needs query= too.")
        if params is None:
            params, exclude = "class:MultiheadAttention", [s for s in _listed(common.get("exclude")) if s is not None]
            common = {"optional": True, **common, "exclude": [*ATTENTION_VALUES, *exclude]}
        return Rule(action="qk_clip", params=params, radius=tau, heads=heads, **common)
    shared = key_heads is not None and key_heads != heads
    if params is not None or not isinstance(heads, int):
        raise PolicyError("qk_clip with query= needs heads=, the number of query heads, and no params=.")
    if shared and (not isinstance(key_heads, int) or key_heads < 1 or heads % key_heads):
        raise PolicyError(f"key_heads is {key_heads!r}, but it must divide heads={heads}: each key head serves as many query heads.")
    if not shared and key is None:
        raise PolicyError("qk_clip with query= needs key= too, or key_heads= where query heads share keys.")
    chosen = query if shared else [*_listed(query), *_listed(key)]
    return Rule(action="qk_clip", params=chosen, radius=tau, heads=heads, power=2 if shared else 1, **common)


# Of `nn.MultiheadAttention` what is neither query nor key.
ATTENTION_VALUES = ("*v_proj_weight", "*bias_v")


def _listed(selector: Selector | None) -> list[Any]:
    return list(selector) if isinstance(selector, list | tuple) else [selector]


# ----------------------------------------------------------------------------------------------------- orthogonality


@named
def orthogonal(radius: Varying = 1.0, params: Selector | None = None, *, per: str = "matrix", **common: Unpack[Common]) -> Rule:
    """Makes each matrix orthogonal after the step: radius · UVᵀ, the nearest one whose singular values are all ``radius``.

    The projection onto the Stiefel manifold (the polar factor; Higham, 1986): of a rectangular matrix the shorter side is orthonormal.
    Costs a singular value decomposition.

    Args:
        radius: > 0, default 1.
        params: default the matrices: hidden, convolutional and recurrent weights, no embeddings and no heads.
        per: default each matrix that the module applies, a convolution as its flattened filters.
    """
    shared: Any = on_matrices(params, common)
    return Rule(action="project", norm=Orthogonal(), per=per, radius=radius, **shared)


@named
def orthogonal_penalty(strength: Varying, params: Selector | None = None, *, per: str = "matrix", **common: Unpack[Common]) -> Rule:
    """Adds strength/4 · ‖WWᵀ − I‖_F² to the loss, on the shorter side: ``grad += strength * (WWᵀ − I)W`` before the step.

    Soft orthogonality (Brock et al., 2017; Bansal et al., 2018): it pulls every singular value towards 1. ``control.penalty()`` has its
    value.

    Args:
        strength: >= 0.
        params: default the matrices: hidden, convolutional and recurrent weights, no embeddings and no heads.
        per: default each matrix that the module applies.
    """
    shared: Any = on_matrices(params, common)
    return Rule(action="penalty", norm=Orthogonal(), per=per, strength=strength, **shared)
