"""``nw.advise``: from a model, and a probe where one is asked for, to a policy, an optimizer and reasons."""

from __future__ import annotations

import glob
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from normwise.advice import costs
from normwise.advice.answer import Advice, Call, Line, Recipe
from normwise.advice.facts import Facts
from normwise.advice.goals import ADAMW, GOALS, do, line
from normwise.advice.probe import STEPS, Loss, Probe, probe
from normwise.advice.sentences import SAID
from normwise.control import attach
from normwise.engine.nonfinite import all_finite
from normwise.errors import NormwiseError, PolicyError, nearest
from normwise.parameters.attention_logits import Attention
from normwise.parameters.inventory import Entry
from normwise.policy import Policy

TAU = 100.0
"""The logit from which QK-clip is advised: its authors' (Kimi K2, 2025)."""
PACE = 0.1
"""Of a weight's length, moved in a step of AdamW: more than this is told; our own rule of thumb."""
SPREAD = 30.0
"""How far apart ‖gradient‖ / ‖weight‖ of matrices may be before one plain rate cannot suit them; our own rule of thumb."""
HOLDING = ("group_lasso", "max_norm", "spectral_cap", "unit_norm", "weight_decay")
"""Rules that work against weights that grow."""

COMPLEX = ("stability", "lipschitz", "finetuning", "plasticity")
"""The goals with rules that would take complex parameters, were they real."""


def advise(
    model: nn.Module, goal: str = "speed", *, batches: Iterable[Any] | None = None, loss: Loss | None = None, steps: int = STEPS,
    copy: bool = False, made_by: str = "",
) -> Advice:  # fmt: skip
    """Where to start with ``model``: a policy, an optimizer, and a reason and a source for each line. Nothing is trained.

    Args:
        model: any module with trainable parameters. Its code is read; it is run only if there are ``batches``.
        goal: ``"speed"`` (default), ``"generalisation"``, ``"sparsity"``, ``"stability"``, ``"lipschitz"``, ``"quantisation"``,
            ``"finetuning"`` or ``"plasticity"``; docs/advise.md says what each means.
        batches: for a probe: an iterable of at least ``steps`` batches. Weights, buffers, gradients and random generators come back bit for
            bit; a plain iterator has moved on.
        loss: for a probe: ``loss(model, batch)``, a scalar tensor, computed by the model that it is given.
        steps: batches of the probe, 8 or more; the default 25 take less than 2% of a run of 1500 steps.
        copy: True probes a deep copy, which takes the model's memory once more; False (default) the model itself, whose trainable weights
            are kept in host memory up to 512 MB and in a temporary file beyond.
        made_by: ``package.module:function`` that makes the model, for ``.python()``.

    Returns:
        The advice; its policy attaches to ``model``.

    Raises:
        PolicyError: no module, no trainable parameters, an unknown goal, batches without a loss or a loss without batches.
        LayoutError: a lazy parameter that has no shape yet.
        DataError: what the probe cannot use: batches that end early, a loss that raises, is no scalar or not finite.

    >>> advice = nw.advise(model, "stability")
    >>> optimizer = advice.optimizer.build(model)
    >>> control = nw.attach(model, optimizer, advice.policy)
    """
    check_goal(goal)
    facts = Facts.of(model)
    if (batches is None) != (loss is None):
        given, absent = ("batches", "loss") if loss is None else ("loss", "batches")
        raise PolicyError(f"advise was given {given}= without {absent}=: a probe needs both.")
    seen = probe(model, batches, loss, steps, copy) if batches is not None and loss is not None else None
    facts = replace(facts, seen=seen)
    recipe, found = GOALS[goal](facts)
    pace = facts.pace(recipe.arguments["lr"]) if recipe.name.endswith("AdamW") else {}
    fast = [role for role, share in pace.items() if share > PACE]
    if fast:
        found.append(line("know", "pace", ", ".join(f"role:{role}" for role in fast), shown=", ".join(f"{r} {pace[r]:.0%}" for r in fast)))
    if facts.complex and goal in COMPLEX and not any(one.what == SAID["complex"].what for one in found):
        found.append(line("leave", "complex", ", ".join(e.name for e in facts.complex[:2]), facts.complex))
    lines = [*_first(facts), *found, *(_measured(facts, seen, recipe, found) if seen is not None else []), *_known(facts, seen, goal)]
    recipe, lines = _fitting(facts, recipe, lines)
    lines.sort(key=lambda one: ("do", "leave", "know").index(one.verdict))
    policy = Policy([rule for one in lines for call in one.rules for rule in call.rules()])
    skip = "skip" if seen is not None and seen.nonfinite else "ignore"
    return Advice(goal, facts.name, policy, recipe, tuple(lines), seen, skip, made_by, tuple(map(_dense_gradients, facts.sparse)))


def check_goal(goal: object) -> None:
    """PolicyError for an unknown one."""
    if not isinstance(goal, str) or goal not in GOALS:
        raise PolicyError(f"the goal {goal!r} is unknown.{nearest(str(goal), GOALS)}")


# ------------------------------------------------------------------------------------------------- whatever the goal is


def _first(facts: Facts) -> list[Line]:
    """What must be done before anything is trained."""
    lines = []
    if facts.sparse:
        lines.append(line("do", "sparse", ", ".join(facts.sparse[:2]), code="; ".join(map(_dense_gradients, facts.sparse[:2]))))
    here = [e for e in facts.trainable if not e.param.is_meta]
    if not all_finite([e.param.detach() for e in here]):
        wrong = [e for e in here if not all_finite([e.param.detach()])]
        lines.append(line("know", "not finite", ", ".join(e.name for e in wrong[:2]), wrong, worst=wrong[0].name))
    return lines


def _dense_gradients(path: str) -> str:
    return f"model.get_submodule({path!r}).sparse = False"


def _known(facts: Facts, seen: Probe | None, goal: str) -> list[Line]:
    """What somebody who trains this model should know."""
    lines = []
    free, judged = facts.scale_free, facts.judged
    entries = [e for e in facts.inventory.weights if e.name in free]
    if entries:
        norms = sorted({facts.guessed[e.name] for e in entries if e.name in facts.guessed})
        on = f"before {', '.join(norms)}" if norms else "found by the probe"
        lines.append(line("know", "scale-free", on, entries, basis="probe" if judged.keys() >= free.keys() else "guess"))
    wrong = [name for name in facts.guessed if judged.get(name) is False]
    if wrong:
        lines.append(line("know", "not scale-free", ", ".join(wrong[:3]), basis="probe"))
    bounded = [a for a in facts.attentions if a.bounded]
    growing = [a for a in facts.attentions if not a.bounded and (seen is None or a.path not in seen.logits)]
    if goal in ("speed", "stability") and bounded:
        how = ", ".join(sorted({a.bounded for a in bounded}))
        lines.append(line("leave", "qk_clip, bounded", f"{costs.count_of(len(bounded), 'attention')} with {how}", basis="guess"))
    if goal in ("speed", "stability") and growing:
        lines.append(line("know", "watch logits", costs.count_of(len(growing), "attention"), basis="guess"))
    if goal in ("speed", "stability") and facts.stacked:
        lines.append(line("know", "experts", "stacked tensors", facts.stacked, count=sum(e.layout.size("se") for e in facts.stacked)))
    if goal in ("lipschitz", "finetuning") and facts.tied_head is not None:
        lines.append(line("know", "tied", facts.tied_head.name, [facts.tied_head]))
    if unsure := facts.inventory.unsure:
        lines.append(line("know", "unsure", ", ".join(e.name for e in unsure[:2]), unsure))
    return lines


# --------------------------------------------------------------------------------------------------- from measurements


def _measured(facts: Facts, seen: Probe, recipe: Recipe, found: Sequence[Line]) -> list[Line]:
    """What follows from the probe, and agrees with the optimizer and the rules that are advised."""
    lines: list[Line] = []
    if seen.nonfinite:
        worst = max(seen.nonfinite, key=lambda name: seen.nonfinite[name])
        on = costs.count_of(len(seen.nonfinite), "parameter")
        lines.append(line("do", "skip", on, basis="probe", worst=worst, times=seen.nonfinite[worst], batches=seen.batches))
    if seen.idle:
        lines.append(line("know", "idle", ", ".join(seen.idle[:3]), basis="probe", count=len(seen.idle)))
    clips = any(call.name == "zclip" for one in found for call in one.rules)
    if seen.spikes and not clips:
        lines.append(do("zclip, seen", Call("zclip", {"z": 2.5}), facts.trainable, costs.measured("clip"), "probe",
                        count=len(seen.spikes), batches=seen.batches))  # fmt: skip
    elif not seen.spikes:
        clipping = "tighter clipping" if clips else "clipping"
        lines.append(line("leave", "no spikes", "gradients", basis="probe", clipping=clipping, batches=seen.batches))
    if seen.noise is not None:
        lines.append(_noise(seen.noise))
    lines += _growth(facts, seen, found)
    low = min((lowest for lowest, _, _ in seen.ratios.values()), default=0.0)
    high = max((highest for _, _, highest in seen.ratios.values()), default=0.0)
    if low > 0 and high / low >= SPREAD:
        lines.append(line("know", "spread, sgd" if recipe.name == "SGD" else "spread", "role:matrix", basis="probe", low=low, high=high))
    return [*lines, *_grown_logits(facts, seen)]


def _growth(facts: Facts, seen: Probe, found: Sequence[Line]) -> list[Line]:
    """The roles whose norms grow, those that an advised rule holds apart from the others."""
    lines: dict[str, list[str]] = defaultdict(list)
    for role, grown in seen.growth.items():
        if grown > seen.walked / 2 and role not in ("bias", "gain"):
            lines[_held_by(facts, role, found)].append(role)
    made = []
    for rules, roles in lines.items():
        shown = ", ".join(f"{role} {seen.growth[role]:+.0%}" for role in roles)
        on, key = ", ".join(f"role:{role}" for role in roles), "growth, held" if rules else "growth"
        made.append(line("know", key, on, basis="probe", walked=f"{seen.walked:.0%}", shown=shown, held=rules))
    return made


def _held_by(facts: Facts, role: str, found: Sequence[Line]) -> str:
    """The advised rules that work against longer weights of this role, "" where one of these goes free."""
    names = {e.name for e in facts.inventory.weights if e.role == role and e.trained}
    calls = [call for one in found for call in one.rules if call.name in HOLDING]
    reached = [{e.name for rule in call.rules() for e in rule.targets(facts.inventory.weights)} & names for call in calls]
    acting = dict.fromkeys(f"nw.{call.name}" for call, those in zip(calls, reached, strict=True) if those)
    return " and ".join(acting) if names <= set().union(*reached) else ""


def _noise(noise: float) -> Line:
    says = "Your batch is about as large as pays now."
    if noise < 0.5:
        says = "Both halves of a batch agree: a smaller batch would need fewer samples."
    elif noise > 8:
        says = "The mean gradient drowns in noise: a larger batch, or a longer average, is not wasted."
    return line("know", "noise", "all gradients", basis="probe", many="more than 1000" if noise > 1000 else f"{noise:.2g}", says=says)


def _grown_logits(facts: Facts, seen: Probe) -> list[Line]:
    """QK-clip for attentions with logits beyond `TAU`, one rule for those with the same heads."""
    if not seen.logits:
        return []
    largest = max(max(first, last) for first, last, _ in seen.logits.values())
    if largest <= TAU:
        on = costs.count_of(len(seen.logits), "attention")
        return [line("leave", "qk_clip, small", on, basis="probe", largest=f"{largest:.3g}")]
    groups: dict[tuple[Any, ...], list[Attention]] = defaultdict(list)
    for a in facts.attentions:
        first, last, heads = seen.logits.get(a.path, (0.0, 0.0, 0))
        if max(first, last) > TAU and not a.bounded:
            groups[type(a.module) is nn.MultiheadAttention, bool(a.fused), a.heads or heads, a.key_heads].append(a)
    lines = []
    for (torchs, fused, heads, key_heads), members in groups.items():
        names = {name for a in members for name in (*a.query, *a.key, *a.fused)}
        scaled = [e for e in facts.trainable if e.name in names]
        on, said = ", ".join(a.path for a in members[:2]), f"{largest:.3g}"
        call = Call("qk_clip", {"tau": TAU}) if torchs else _qk_clip(members, fused, heads, key_heads)
        if not (torchs or heads):
            lines.append(line("know", "logits grown", on, basis="probe", largest=said))
        # Queries and keys of other sizes in one tensor, or weights that do not train.
        elif (fused and key_heads not in (0, heads)) or _refused(facts, [call]):
            lines.append(line("know", "logits grown, no rule", on, basis="probe", largest=said))
        else:
            lines.append(do("qk_clip", call, scaled, basis="probe", largest=said))
    return lines


def _qk_clip(members: Sequence[Attention], fused: bool, heads: int, key_heads: int) -> Call:
    def layers(names: Iterable[str]) -> list[str]:
        return [f"{glob.escape(name.rpartition('.')[0])}.*" for name in names]

    if fused:
        return Call("qk_clip", {"tau": TAU, "params": layers(n for a in members for n in a.fused), "heads": (3, heads)})
    shared = {"key_heads": key_heads} if key_heads and key_heads != heads else {"key": layers(n for a in members for n in a.key)}
    return Call("qk_clip", {"tau": TAU, "query": layers(n for a in members for n in a.query), "heads": heads, **shared})


# ------------------------------------------------------------------------------------------------------- does it attach?


def _fitting(facts: Facts, recipe: Recipe, lines: Sequence[Line]) -> tuple[Recipe, list[Line]]:
    """The optimizer and the rules that this model takes, each tried; what is refused becomes a line that says why."""
    if any(e.param.is_meta for e in facts.inventory):
        return recipe, [*_needed(recipe, lines), line("know", "not tried", "weights on the meta device")]
    kept: list[Line] = []
    if error := _says(lambda: recipe.build(facts.model)):
        kept.append(line("leave", "refused", "everything", rule=recipe, error=error))
        lines = [one for one in lines if one.what != str(recipe)]
        recipe = Recipe("torch.optim.AdamW", ADAMW)
        kept.append(line("do", "adamw, refused", "all trainable", facts.trainable, recipe=recipe))
    whole = [call for one in lines for call in one.rules]
    refused = whole and _refused(facts, whole)
    for one in lines:    # which one, is asked only where there is one: to attach may decompose every matrix
        calls = [call for other in kept for call in other.rules]
        why = _refused(facts, [*calls, *one.rules]) if refused and one.rules else ""
        kept += _without(facts, one, calls, why) if why else [one]
    return recipe, _needed(recipe, kept)


def _needed(recipe: Recipe, lines: Sequence[Line]) -> list[Line]:
    """The lines without those that say something of a rule which is not there."""
    there = {recipe.name, *(call.name for one in lines for call in one.rules)}
    return [one for one in lines if not one.needs or one.needs in there]


def _without(facts: Facts, one: Line, calls: Sequence[Call], why: str) -> list[Line]:
    """A line whose rule was refused, without the computed weights that refuse it; one to leave where that does not help."""
    try:
        chosen = [e for c in one.rules for rule in c.rules() for e in rule.targets(facts.inventory.weights)]
    except NormwiseError:    # a selector that nothing fits
        chosen = []
    computed = [e for e in chosen if e.computed is not None and e.trained]
    apart = {e.name: _refused(facts, [replace(c, arguments=_for_one(c, e)) for c in one.rules]) for e in computed}
    computed = [e for e in computed if apart[e.name]]
    raw = sorted(e.name for e in computed)
    fewer = tuple(Call(c.name, {**c.arguments, "exclude": [*c.arguments.get("exclude", ()), *raw]}) for c in one.rules)
    if not raw or _refused(facts, [*calls, *fewer]):
        return [line("leave", "refused", one.on, rule=one.what, error=why)]
    tensors, numbers = one.tensors - len(computed), one.numbers - sum(e.shape.numel() for e in computed)
    on = f"{one.on.rpartition(': ')[0]}: {costs.count_of(tensors, 'tensor')}, {costs.size_of(numbers)}"
    return [
        replace(one, what="; ".join(map(str, fewer)), rules=fewer, on=on, tensors=tensors, numbers=numbers),
        line("leave", "refused", ", ".join(raw[:2]), computed, rule=one.what, error=apart[raw[0]]),
    ]  # fmt: skip


def _for_one(call: Call, e: Entry) -> dict[str, Any]:
    """The rule's arguments for this weight alone."""
    return {**{k: v for k, v in call.arguments.items() if k != "exclude"}, "params": [glob.escape(e.name)]}


def _refused(facts: Facts, calls: Sequence[Call]) -> str:
    """Why these rules cannot be attached together; "" if they can."""
    optimizer = torch.optim.SGD([e.param for e in facts.trainable], lr=0.1)
    return _says(lambda: attach(facts.model, optimizer, [call.rules() for call in calls]).remove())


def _says(act: Callable[[], object]) -> str:
    """What an error of ours says, "" for none. Warnings are for whoever attaches."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            act()
        except NormwiseError as error:
            return str(error)
    return ""
