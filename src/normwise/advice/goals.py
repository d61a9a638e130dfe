"""What is advised for each goal from the model alone: an optimizer, and lines whose words are in ``sentences``."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from normwise.advice import costs
from normwise.advice.answer import Basis, Call, Line, Recipe, Verdict
from normwise.advice.facts import WEIGHTS, Facts
from normwise.advice.sentences import SAID
from normwise.advice.tied_units import tied_units
from normwise.optim.presets import MATRICES
from normwise.parameters.inventory import Entry
from normwise.prune.dependency_groups import LAYERS

SHARES = {
    "cnn": (0.57, 0.59), "plain": (0.25, 0.30), "unet": (0.19, 0.23), "resnet": (0.29, 0.31), "resnet_gn": (0.25, 0.27),
    "vit": (0.25, 0.27), "mixer": (0.57, 0.64), "lstm": (0.87, 1.14), "gru": (1.00, 0.78), "gpt": (0.33, 0.39), "decoder": (0.66, 0.77),
}  # fmt: skip
"""Task -> the shares of the baseline's samples and seconds that `auto` needed there: the README's."""
NEAREST = {
    "attention": ("gpt", "decoder"), "patches": ("vit", "mixer"), "gates": ("lstm", "gru"),
    "normalised convolutions": ("resnet", "resnet_gn"), "convolutions": ("cnn", "plain", "unet"),
}  # fmt: skip
"""Kind of network -> all tasks of that kind that were raced."""
ADAMW: dict[str, Any] = {"lr": 1e-3, "betas": (0.9, 0.95), "weight_decay": 0.0}
Answer = tuple[Recipe, list[Line]]


def line(
    verdict: Verdict, key: str, on: str, entries: Sequence[Entry] = (), *, cost: str = "", basis: Basis = "model",
    rules: tuple[Call, ...] = (), **values: Any,
) -> Line:  # fmt: skip
    """The sentence ``key`` with its words filled in. on: how to select ``entries``, which are counted; alone what the line is about."""
    said = SAID[key]
    numbers = sum(e.shape.numel() for e in entries)
    where = f"{on}: {costs.count_of(len(entries), 'tensor')}, {costs.size_of(numbers)}" if entries else on
    what, why = said.what.format(**values), said.why.format(**values)
    return Line(verdict, what, where, why, said.source, cost or said.cost, basis, rules, len(entries), numbers, said.needs)


def do(key: str, call: Call, entries: Sequence[Entry], cost: str = "", basis: Basis = "model", **values: Any) -> Line:
    """A rule of the policy. Complex parameters, which rules do not take, are left out of it."""
    mixed = [e.name for e in entries if e.param.is_complex()]
    if mixed:
        call = Call(call.name, {**call.arguments, "exclude": [*call.arguments.get("exclude", ()), *mixed]})
        entries = [e for e in entries if e.name not in mixed]
        if not entries:
            return line("leave", "complex", ", ".join(mixed[:2]))
    params = call.arguments.get("params", "all")
    on = params if isinstance(params, str) else ", ".join(params[:2]) + (" ..." if len(params) > 2 else "")
    return line("do", key, on, entries, cost=cost, basis=basis, rules=(call,), rule=str(call), **values)


# ------------------------------------------------------------------------------------------------------------- the step


def fast_step(facts: Facts) -> Answer:
    """`auto`, where its matrix step has something to do."""
    why = "complex" if facts.complex else "lora" if facts.factors else "few matrices" if facts.matrix_share < 0.5 else ""
    if why or facts.kind == "linear layers":
        return adamw(facts, f"adamw, {why or 'linear'}", what=_lora_is(facts), **(_shares(facts) if why == "few matrices" else {}))
    raw = {e.name: "adamw" for e in facts.computed}
    recipe = Recipe("auto", {"override": raw} if raw else {})
    raced = "None of its races was on a network like yours: on convolutions, gates, attention, and linear layers, where it missed."
    if facts.kind in NEAREST:
        shares = [f"{task} {SHARES[task][0]:.2f} / {SHARES[task][1]:.2f}" for task in NEAREST[facts.kind]]
        raced = f"Of the baseline's samples / seconds it needed, on our nearest task{'s' * (len(shares) > 1)}: {', '.join(shares)}."
    if facts.kind == "gates":
        raced += " On gates it saves the tuning and no training: AdamW, tuned, bears 12 to 24 times its usual rate there."
    stepped = [e for e in facts.trainable if e.role in MATRICES and e.layout.certain and e.name not in raw]
    roles = ", ".join(dict.fromkeys(e.role for e in stepped))
    lines = [line("do", "auto", f"role:{roles}", stepped, cost=costs.ridge(stepped), recipe=recipe, raced=raced)]
    if facts.attentions:
        lines.append(line("know", "auto, circuits", "attention:all", [e for e in facts.trainable if e.attention]))
    if raw:
        lines.append(line("know", "auto, raw tensors", ", ".join([*raw][:2]), facts.computed))
    return recipe, lines


def _shares(facts: Facts) -> dict[str, Any]:
    """Words for "{takes} ... would take{others}"."""
    others = [f"{_percent(share)} are {why}" for why, share in facts.shares.items() if why]
    takes = f"Only {_percent(facts.matrix_share)} of the weights are matrices" if facts.matrix_share else "None of the weights is a matrix"
    return {"takes": takes, "others": f": {', '.join(others)}" if others else ""}


def _percent(share: float) -> str:
    """Of something that is there: 0.2% is no 0%, and what is not all is no 100%."""
    return "under 1%" if share < 0.01 else "over 99%" if 0.99 < share < 1 else f"{share:.0%}"


def _lora_is(facts: Facts) -> str:
    """Words for "LoRA's factors ... trains"."""
    return "are among what" if facts.weights((*WEIGHTS, "embedding")) else "are what"


def adamw(facts: Facts, key: str = "", lr: float = 1e-3, **values: Any) -> Answer:
    """AdamW; torch's where parameters are complex, which a norm-based optimizer refuses."""
    key = key or ("adamw, complex" if facts.complex else "adamw, usual")
    arguments = {"lr": lr, "weight_decay": 0.0} if facts.complex else {**ADAMW, "lr": lr}
    recipe = Recipe("torch.optim.AdamW" if facts.complex else "AdamW", arguments)
    return recipe, [line("do", key, "all trainable", facts.trainable, recipe=recipe, **values)]


# ------------------------------------------------------------------------------------------------------------ the goals


def speed(facts: Facts) -> Answer:
    recipe, lines = fast_step(facts)
    calm = facts.seen is None or not facts.seen.spikes
    return recipe, [*lines, *([line("leave", "no clipping", "everything")] if recipe.name == "auto" and calm else [])]


def generalisation(facts: Facts) -> Answer:
    recipe, lines = fast_step(facts)
    lines.append(line("leave", "no penalties", "everything"))
    return recipe, [*lines, *([line("know", "stop early", "the run")] if recipe.name == "auto" else [])]


def sparsity(facts: Facts) -> Answer:
    """The group lasso where it was seen to work: convolutions and MLPs that nothing normalises."""
    units = [e for e in facts.weights(("conv", "hidden")) if e.layout.certain and e.param.ndim >= 2 and not _is_kept_whole(e)]
    tied = tied_units(facts.model)
    held = [e for e in units if id(e.module) in tied]
    shrinkable = [e for e in units if e not in held]
    blocks = facts.factors or facts.attentions or facts.complex or "recurrent" in facts.roles
    why = "blocks" if blocks else "normalised" if facts.normalised else "" if shrinkable else "tied" if held else "nothing"
    if why:
        recipe, lines = fast_step(facts)
        return recipe, [line("leave", f"not sparse, {why}", "everything"), *lines]
    recipe = Recipe("SGD", {"lr": 0.03, "momentum": 0.9})
    lines = [line("do", "sgd", "all trainable", facts.trainable, recipe=recipe)]
    by_size: dict[int, list[Entry]] = defaultdict(list)
    for e in shrinkable:
        by_size[e.layout.size("Hik")].append(e)
    for size, entries in by_size.items():
        strength = round(0.01 * math.sqrt(size), 4)
        lines.append(do("lasso", Call("group_lasso", {"strength": strength, "params": _names(entries), "start": 250}), entries))
    if held:
        lines.append(line("leave", "not sparse, tied", ", ".join(_names(held)[:2]), held, basis="guess"))
    return recipe, [*lines, line("know", "smaller shape", "the smaller network")]


def _is_kept_whole(e: Entry) -> bool:
    """Whether shrink() leaves a layer's units alone, whatever stands around it."""
    plain = isinstance(e.module, LAYERS) and e.local_name == "weight" and e.computed is None and not e.tied
    return not plain or getattr(e.module, "groups", 1) > 1


def stability(facts: Facts) -> Answer:
    recipe, lines = adamw(facts)
    lines.append(do("zclip", Call("zclip", {"z": 2.5}), facts.trainable, costs.measured("clip")))
    decayed = facts.weights((*WEIGHTS, "embedding"))
    if decayed:
        lines.append(do("decay", Call("weight_decay", {"strength": 0.1, **_on(facts, decayed)}), decayed, "one pass over them."))
    return recipe, lines


def lipschitz(facts: Facts) -> Answer:
    recipe, lines = adamw(facts)
    lines += _low_rank_caps(facts)
    capped = [e for e in facts.weights(WEIGHTS) if e.layout.certain and e.param.ndim >= 2 and e.name not in facts.scale_free]
    left = [e for e in facts.inventory.weights if e.name in facts.scale_free]
    if facts.chained and capped and not left:
        call = Call("spectral_cap", {"radius": 1.0, **_on(facts, capped)})
        lines.append(do("cap, chain", call, capped, f"{costs.measured('exact cap')} Less with tolerance=0.01."))
        return recipe, [*lines, line("know", "scaled logits", "the loss")]
    if capped:
        arguments = {"radius": 2.0, **_on(facts, capped, left), "tolerance": 0.01}
        lines.append(do("cap", Call("spectral_cap", arguments), capped, costs.measured("cap")))
    if left:
        measured = all(e.name in facts.judged for e in left)
        lines.append(line("leave", "no caps", "scale-free weights", left, basis="probe" if measured else "guess"))
    if still := [*facts.packed, *_names(facts.frozen)]:
        lines.append(line("know", "frozen", ", ".join(still[:2]) + (" ..." if len(still) > 2 else ""), facts.frozen))
    if capped or facts.products:
        return recipe, [*lines, *_beyond_caps(facts)]
    return recipe, [*lines, *([] if left or facts.factors or facts.complex else [line("leave", "nothing to cap", "everything")])]


def _low_rank_caps(facts: Facts) -> list[Line]:
    """For LoRA's products, and what a bound on them leaves free."""
    lines = []
    if facts.products:
        call = Call("spectral_cap", {"radius": "0.1*base", "params": "peft:product"})
        lines.append(do("cap, lora", call, facts.products, costs.measured("cap")))
    elif facts.factors:
        lines.append(line("leave", "no product", "LoRA's factors", facts.factors))
    if facts.magnitudes:
        lines.append(line("know", "magnitudes", "peft:magnitude", facts.magnitudes))
    return lines


def _beyond_caps(facts: Facts) -> list[Line]:
    """What bounds on the layers do not bound."""
    lines = []
    if facts.attentions:
        lines.append(line("know", "no Lipschitz", costs.count_of(len(facts.attentions), "attention")))
    if facts.recurrences:
        lines.append(line("know", "recurrence", costs.count_of(facts.recurrences, "recurrent layer")))
    if facts.multiplied:
        lines.append(line("know", "products", costs.count_of(facts.multiplied, "module"), basis="guess"))
    if facts.branches:
        lines.append(line("know", "branches", costs.count_of(facts.branches, "module"), basis="guess"))
    if facts.normalised:
        lines.append(line("know", "normalisations", "the normalisation layers"))
    elif "conv" in facts.roles:
        lines.append(line("know", "critic", "role:all"))
    return lines


def quantisation(facts: Facts) -> Answer:
    recipe, lines = fast_step(facts)
    if facts.factors:
        lines.append(line("leave", "no clamps on factors", "LoRA's factors"))
    if not facts.factors or facts.weights(WEIGHTS):
        lines.append(line("leave", "no clamps", "everything"))
    return recipe, [*lines, line("know", "searched scale", "the rounding"), line("know", "outliers", "the checkpoint")]


def finetuning(facts: Facts) -> Answer:
    if facts.factors:
        recipe, lines = adamw(facts, "adamw, lora", lr=5e-4, what=_lora_is(facts))
        if facts.products:
            lines.append(line("leave", "no product bounds", "peft:product", facts.products))
        else:
            lines.append(line("leave", "no product", "LoRA's factors", facts.factors))
    else:
        recipe, lines = adamw(facts, "adamw, finetuning", lr=1e-4)
    left = [*facts.new_heads, *(e for e in facts.empty if e not in facts.new_heads)]
    held = [e for e in facts.weights((*WEIGHTS, "embedding")) if e not in left]
    if held:
        # A unit of zeros, such as a padding token, has no length of its own: a thousandth of √n is about 1/20 of a fresh unit's.
        floor = round(1e-3 * math.sqrt(min(e.layout.size("Hik") for e in held)), 6)
        call = Call("max_norm", {"radius": 0.0333, **_on(facts, held, left), "center": "init", "relative": True, "floor": floor})
        lines.append(do("ball", call, held, f"{costs.measured('bound')} A copy of these weights.", floor=floor))
    if facts.new_heads:
        lines.append(line("know", "new heads", ", ".join(_names(facts.new_heads)[:2]), facts.new_heads))
    return recipe, lines


def plasticity(facts: Facts) -> Answer:
    recipe, lines = adamw(facts)
    held = [e for e in facts.weights(WEIGHTS) if e.layout.certain and e.param.ndim >= 2 and e not in facts.empty]
    if not held:
        return recipe, [*lines, *([] if facts.complex else [line("leave", "nothing to keep", "everything")])]
    free = [e for e in held if e.name in facts.scale_free]
    others = [e for e in held if e not in free]
    if others:
        call = Call("spectral_cap", {"radius": "2.25*init", **_on(facts, others, [*free, *facts.empty]), "every": 8})
        lines.append(do("cap, plasticity", call, others, "an exact decomposition every 8th step."))
    if free:
        call = Call("unit_norm", {"radius": "init", "params": _names(free), "per": "tensor"})
        lines.append(do("sphere", call, free, costs.measured("bound")))
    return recipe, lines


GOALS: dict[str, Callable[[Facts], Answer]] = {
    goal.__name__: goal for goal in (speed, generalisation, sparsity, stability, lipschitz, quantisation, finetuning, plasticity)
}
"""Goal -> what is advised for it from the model alone."""


def _names(entries: Sequence[Entry]) -> list[str]:
    return [e.name for e in entries]


def _on(facts: Facts, entries: Sequence[Entry], left: Sequence[Entry] = ()) -> dict[str, list[str]]:
    """``params=`` of their roles, and ``exclude=`` for those of ``left`` and the complex weights that these would select; their names
    beside LoRA's factors, which have roles, too."""
    if facts.factors:
        return {"params": _names(entries)}
    roles = dict.fromkeys(e.role for e in entries)
    out = [e.name for e in (*left, *facts.complex_weights) if e.role in roles]
    return {"params": [f"role:{role}" for role in roles], **({"exclude": list(dict.fromkeys(out))} if out else {})}
