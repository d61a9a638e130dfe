"""What advice says: for each piece what to do, why, where that is from and what it costs. Words in braces are filled in.

A figure that stands here comes from the page that ``source`` names; where nobody has measured, the sentence says so.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Said:
    """One piece of advice without the model that it is for."""

    what: str
    why: str
    source: str
    cost: str = ""
    needs: str = ""
    """The rule or optimizer without which it says nothing."""


TUNE = "Tune its rate first: no rule makes up for a wrong one."
STATE = "8 bytes of state a parameter."

SAID: dict[str, Said] = {
    # ------------------------------------------------------------------------------------------------------- the step
    "auto": Said(
        "{recipe}",
        "{raced} It was raced with nothing tuned. nw.optim.schedule(optimizer, steps) warms up and lets the rate fall to zero, as it was "
        "measured.",
        "docs/race-results.md and docs/results.md, small networks and short runs",
    ),
    "auto, circuits": Said(
        "auto: queries and keys step 3 times as far, values half",
        "An attention's two circuits bear different steps. Where q, k and v are one tensor whose parts nobody states, it keeps one step.",
        "docs/results.md, found on small GPTs", needs="auto",
    ),
    "auto, raw tensors": Said(
        "auto: AdamW for the raw tensors of computed weights",
        "The layer's weight is computed from these, and a matrix step would act on the raw tensor.", "docs/optimizers.md#routing",
        needs="auto",
    ),
    "adamw, complex": Said(
        "{recipe}", f"Some parameters are complex, which steps under a norm do not take. {TUNE}", "docs/optimizers.md#routing", STATE,
    ),
    "adamw, lora": Said(
        "{recipe}",
        f"LoRA's factors {{what}} trains. Muon for A, B or both, and a rate of its own for B, ended within the spread of our seeds. {TUNE}",
        "docs/peft.md", STATE,
    ),
    "adamw, few matrices": Said(
        "{recipe}",
        f"{{takes}} that a matrix step would take{{others}}. {TUNE}", "docs/optimizers.md#routing", STATE,
    ),
    "adamw, linear": Said(
        "{recipe}",
        "In our race on a small table, where nearly every method fits the training data, AdamW with a small rate was best and auto did not "
        f"reach it. If your data are many and images or text, try nw.optim.auto(model) beside it. {TUNE}", "docs/race-results.md", STATE,
    ),
    "adamw, usual": Said(
        "{recipe}", f"What is advised below acts beside any optimizer; this one is usual. {TUNE}", "docs/optimizers.md", STATE,
    ),
    "adamw, finetuning": Said(
        "{recipe}", f"From pretrained weights, at a tenth of a usual rate. {TUNE}", "docs/recipes.md#fine-tuning", STATE,
    ),
    "sgd": Said(
        "{recipe}",
        "The lasso shortens each unit by rate times strength. It was measured with SGD; under Adam the same strength means something else.",
        "docs/pruning.md", "4 bytes of state a parameter.",
    ),
    "adamw, refused": Said("{recipe}", "It takes any parameter.", "tried on your model", STATE),
    # ------------------------------------------------------------------------------------------------------ leave alone
    "no clipping": Said(
        "gradient clipping and bounds on weights",
        "auto was measured without either. In our comparison no bound, penalty or decay gained more than chance over a tuned rate.",
        "docs/results.md, docs/compare.md", needs="auto",
    ),
    "no penalties": Said(
        "penalties, bounds and caps on weights",
        "Of the article's eleven strategies, each tuned like the baseline, none was better than nothing by more than chance: on digits and "
        "MNIST, with gradient descent, momentum and Adam. Spend your trials on the rate.", "docs/compare.md",
    ),
    "not sparse, blocks": Said(
        "group lasso and L1",
        "shrink() removes no units of attentions, gates, adapters and complex layers, and single zeros save nothing in a dense product. A "
        "narrower network, trained from the start, is the better way to a smaller one.", "docs/pruning.md",
    ),
    "not sparse, normalised": Said(
        "group lasso and L1",
        "On a residual network with BatchNorm the lasso removed nothing in 600 steps before it cost 2.6 points, and behind other "
        "normalisations shrink() keeps the units. A narrower network, trained from the start, is the better way.", "docs/pruning.md",
    ),
    "not sparse, nothing": Said(
        "group lasso and L1",
        "There are no hidden units that shrink() could remove: all weights are heads, tables, or of layers that are grouped, transposed, "
        "shared or computed.", "docs/pruning.md",
    ),
    "not sparse, tied": Said(
        "group lasso on units that others are mixed with",
        "What these give is summed or multiplied with other units, put through a softmax, joined or split, as of routers, experts and "
        "branches: a unit that is zero cannot be removed there by itself.", "docs/pruning.md",
    ),
    "no product bounds": Said(
        "bounds on the product s·B·A",
        "At equal forgetting no bound was ahead of plain LoRA by more than chance; a cap came nearest. If you need a guarantee that no "
        "unit moves further than a tenth: nw.max_norm('0.1*base', 'peft:product').", "docs/recipes.md#fine-tuning",
    ),
    "no product": Said(
        "bounds on the product s·B·A",
        "These factors are not PEFT's, so that nobody states their product: a bound on A and B alone is none on what they add. With peft's "
        "LoRA there are nw.max_norm and nw.spectral_cap on 'peft:product'.", "docs/peft.md",
    ),
    "no clamps on factors": Said(
        "clamps on LoRA's factors", "What is quantised is the base, which is frozen, or the merged product.", "docs/peft.md",
    ),
    "no clamps": Said(
        "bounds on entries, units and singular values",
        "At four bits no rule was better than nothing. Clipping by value made the rounding error a third of what it was, and the median "
        "accuracy was lower before any rounding.", "docs/recipes.md#four-bits, a small network without outliers",
    ),
    "no caps": Said(
        "spectral caps on what a normalisation divides out",
        "A cap would change nothing of what the network computes, and the normalisation itself has no bound. If you need one, take a "
        "network without normalisation.", "docs/advise.md#what-it-looks-at; Gouk et al., 2021",
    ),
    "nothing to cap": Said(
        "spectral caps", "Nothing that trains here is a matrix whose axes are known, tables aside.", "docs/policies.md#axes",
    ),
    "nothing to keep": Said(
        "bounds on weights", "The base is frozen, or there are no matrices: nothing here can lose its plasticity.",
        "docs/recipes.md#plasticity",
    ),
    "complex": Said(
        "rules on complex parameters",
        "Rules need real numbers: these are left out, and nothing of what is said here holds for them.", "docs/optimizers.md#routing",
    ),
    "qk_clip, bounded": Said(
        "nw.qk_clip",
        "The model itself bounds their logits: under QK-norm the scale of the queries is divided out, so that the rule would do nothing.",
        "docs/published-methods.md#attention-logits",
    ),
    "qk_clip, small": Said(
        "nw.qk_clip", "Their largest logit was {largest}, and it begins to act at 100. Look again later in training.",
        "the probe; Kimi K2, 2025",
    ),
    "no spikes": Said("{clipping}", "None of {batches} batches stood out.", "the probe"),
    "refused": Said("{rule}", "{error}", "tried on your model"),
    # ------------------------------------------------------------------------------------------------------- rules to use
    "lasso": Said(
        "{rule}",
        "Whole units become exactly zero, and normwise.prune.shrink() removes those that nothing ties to others: units in front of a "
        "grouped convolution or a concatenation, and of layers that run twice, stay. The strength is 0.01·√n for units of n numbers; set "
        "start to a quarter of your steps. On MNIST 0.015·√n left a sixth of the parameters for 0.6 points of accuracy, once fine-tuned.",
        "docs/pruning.md; Yuan and Lin, 2006", "5% of a step on MNIST.",
    ),
    "zclip": Said(
        "{rule}",
        "It cuts only gradients that stand out from their history. After bad batches it undid 98% of the harm. A constant, AutoClip and "
        "skipping do as well, but a constant has to be chosen. Clip gradients, not updates: that undid a quarter.",
        "docs/recipes.md#bad-batches; Kumar et al., 2025",
    ),
    "zclip, seen": Said(
        "{rule}", "{count} of {batches} batches had a gradient over four times that of their neighbours. It cuts only those.",
        "the probe; docs/recipes.md#bad-batches",
    ),
    "decay": Said(
        "{rule}",
        "Norms cannot grow without end. Biases and gains are left out: their size is meant. The strength is usual, not measured by us.",
        "Loshchilov and Hutter, 2019",
    ),
    "cap": Said(
        "{rule}",
        "Each of these matrices then amplifies by at most 2.02, a convolution up to the overlap of its patches. No bound on the network "
        "follows: only a chain of linear layers, plain to see, has one. Searches of ours chose radii of 1 to 4; smaller is tighter, learns "
        "less.",
        "Yoshida and Miyato, 2017; Gouk et al., 2021; docs/compare.md",
    ),
    "cap, lora": Said(
        "{rule}",
        "The adapter's product adds at most a tenth of σ₁(W) to its base: σ₁ of W + s·BA is at most 1.1 times that of W.",
        "docs/peft.md; Weyl's inequality",
    ),
    "cap, chain": Said(
        "{rule}",
        "The chain of these layers is then 1-Lipschitz, since what stands between them is. On digits as many images were right "
        "as with nothing, and 59% of all instead of 3% stayed right whatever changed by less than 0.25.",
        "docs/lipschitz.md; Tsuzuku et al., 2018",
    ),
    "ball": Said(
        "{rule}",
        "No unit moves further than a thirtieth of its length, which bounds what can be forgotten. Where little may be forgotten, our ball "
        "was ahead of plain fine-tuning with every seed, and level with a strong decay to the start; a gain over that is not shown. "
        "Units of zeros count as {floor:g} long.", "docs/recipes.md#fine-tuning",
    ),
    "cap, plasticity": Said(
        "{rule}",
        "Singular values stay within 2.25 times the largest one at the start. An MLP whose labels changed sixty times then reached 0.333 "
        "where Adam alone had 0.169 and the best baseline 0.251. Once an epoch is enough: set every.", "docs/recipes.md#plasticity",
    ),
    "sphere": Said(
        "{rule}",
        "A normalisation divides their length out: if it grows, steps only get smaller. Under a LayerNorm 0.277 on the sphere, "
        "0.216 without.",
        "docs/recipes.md#plasticity; Lyle et al., 2024",
    ),
    "qk_clip": Said(
        "{rule}",
        "The largest logit was {largest}. Report each attention's maxima before the step, or it never acts: "
        "control.report_max_logits(attention, maxima).", "the probe; docs/published-methods.md#attention-logits",
        "only heads beyond 100 are scaled.",
    ),
    "skip": Said(
        'nw.attach(..., on_nonfinite="skip")',
        "Gradients were not finite, most often of {worst} ({times} of {batches} batches). Skip such steps, and look for the cause there.",
        "the probe; docs/cookbook.md#survive-bad-batches", "one synchronisation a step.",
    ),
    # ------------------------------------------------------------------------------------------------------- good to know
    "stop early": Said(
        "stop where validation is best",
        "auto reaches the baseline's validation result with about the same test result, earlier. What it does afterwards was not measured, "
        "and on a thousand digits seen 47 times it missed the target.", "docs/results.md", needs="auto",
    ),
    "smaller shape": Said(
        "then train the smaller shape from fresh weights",
        "It did as well as the shrunk network or better: the lasso finds a shape.", "docs/pruning.md",
        needs="group_lasso",
    ),
    "no Lipschitz": Said(
        "no bound on the network: dot-product attention has none", "Its output is not Lipschitz in its input, whatever the weights.",
        "Kim, Papamakarios and Mnih, 2021", needs="spectral_cap",
    ),
    "branches": Said(
        "residual branches add up",
        "x + f(x) is bounded by 1 + the bound on f, so the product of the caps alone is too small.",
        "Gouk et al., 2021", needs="spectral_cap",
    ),
    "recurrence": Said(
        "a recurrence multiplies by its matrix at each step",
        "Over T steps a largest singular value σ counts as σ^T, so that the caps bound one step alone. Where a bound over time matters, a "
        "plain RNN with ReLU or tanh needs σ below 1.",
        "Pascanu, Mikolov and Bengio, 2013", needs="spectral_cap",
    ),
    "products": Said(
        "products of activations have no bound of their own",
        "A gate, a mixture or a bilinear layer multiplies what comes from the input by what comes from the input: it amplifies as its "
        "factors grow, whatever the caps. Only bounded factors, as those of a sigmoid, keep it within the other's size.",
        "the product rule", needs="spectral_cap",
    ),
    "normalisations": Said(
        "normalisations have no bound of their own", "They divide by what they see, which may be small.", "Gouk et al., 2021",
        needs="spectral_cap",
    ),
    "frozen": Said(
        "what is frozen is not capped",
        "No rule bounds a weight that does not train, or that is quantised and no parameter: it amplifies by its own largest singular "
        "value.",
        "Gouk et al., 2021",
    ),
    "magnitudes": Said(
        "DoRA's magnitudes train, too: nw.clip_weight_value(0.5, 2.0, \"peft:magnitude\")",
        "They set the length of each unit anew, and the cap on the product bounds its direction alone. A clip keeps them in an interval; "
        "choose one around their values.", "docs/peft.md", needs="spectral_cap",
    ),
    "critic": Said(
        "for a GAN's critic: nw.clip_weight_value(0.15, params=\"role:all\")",
        "With the hinge loss its images were the nearest to real ones (0.053, nothing 0.071; their seeds overlap); the cap was level with "
        "nothing.", "docs/gan.md",
    ),
    "searched scale": Said(
        "search the scale when you round",
        "The scale with the least squared error instead of the largest entry took the error to a little over half, at no cost in training.",
        "docs/recipes.md#four-bits; Banner et al., 2019",
    ),
    "scaled logits": Said(
        "multiply the logits by 10 or so in the loss",
        "Those of a 1-Lipschitz network are close together: without a scale it learns little.",
        "docs/lipschitz.md", needs="spectral_cap",
    ),
    "outliers": Said(
        "look at outliers afterwards: normwise inspect",
        "In large models large activations matter more than weights, and a bound on weights is not shown to remove them.",
        "Dettmers et al., 2022 (LLM.int8()); docs/inspect.md",
    ),
    "new heads": Said(
        "heads are not held", "A new task's head starts from fresh weights. If yours is pretrained too, hold it like the rest.",
        "docs/advise.md", needs="max_norm",
    ),
    "scale-free": Said(
        "decay of scale-free weights sets their step, not their size",
        "A normalisation divides their length out. If you use a decay, do not tune it as a regulariser: it sets how far a step turns them.",
        "van Laarhoven, 2017; Zhang et al., 2019",
    ),
    "not scale-free": Said(
        "not scale-free after all",
        "The code suggested a normalisation right behind them, but the loss does change with their length: on another path, or because "
        "their outputs are small beside the normalisation's eps.", "the probe",
    ),
    "logits grown": Said(
        "the attention's largest logit is {largest}",
        "Nothing bounds it, and beyond 100 attention learns little. nw.qk_clip(100, query=..., key=..., heads=...) does, and needs to know "
        "how many heads there are, which this attention does not say.", "the probe; docs/published-methods.md#attention-logits",
    ),
    "logits grown, no rule": Said(
        "the attention's largest logit is {largest}",
        "Nothing bounds it, and beyond 100 attention learns little. nw.qk_clip cannot scale these queries and keys: they do not train, or "
        "lie in one tensor whose parts are of different sizes. A smaller rate, or a QK-norm, keeps logits from growing.",
        "the probe; docs/published-methods.md#attention-logits",
    ),
    "sparse": Said(
        "{code}",
        "These tables get sparse gradients, which a step under a norm and every rule on gradients refuse. The alternative without rules is "
        "torch.optim.SparseAdam for the tables alone.", "docs/optimizers.md#routing", "a gradient as large as the table.",
    ),
    "not finite": Said(
        "weights that are not finite", "Of {worst} and others entries are NaN or infinite: no advice helps before these are mended.",
        "the model's weights",
    ),
    "watch logits": Said(
        "watch the attention's logits",
        "Nothing bounds them. If they pass 100, add nw.qk_clip(100), to which your attention reports its largest logits. While they do not "
        "grow it gains nothing: after bad batches it undid 7% of the harm.",
        "Kimi K2, 2025; docs/published-methods.md#attention-logits; docs/recipes.md#bad-batches",
    ),
    "experts": Said(
        "experts are {count} matrices",
        'Rules per="matrix" and matrix steps take each by itself; per="tensor" would let one expert spend the bound of all.',
        "docs/policies.md#axes",
    ),
    "pace": Said(
        "this rate is large for these weights",
        "AdamW moves each entry by up to the rate, which is a large share of them: {shown} a step at first. Warm up, or start lower.",
        "counted from the weights; Kingma and Ba, 2015",
    ),
    "tied": Said(
        "embedding and head are one table", "It has the role embedding, so role:head does not reach it.", "docs/policies.md#roles",
    ),
    "not tried": Said(
        "ask again when the weights are there",
        "Without values nothing of this was tried: attach may refuse a rule, and a weight of zeros is not known.", "docs/advise.md",
    ),
    "unsure": Said(
        "nobody states the axes of these",
        "They may be matrices, and are stepped as none. If they are matrices, state it: layouts={{name: nw.Layout(...)}}.",
        "docs/policies.md#axes",
    ),
    "idle": Said(
        "nothing trains these", "{count} trainable parameters had no gradient in any batch. Freeze them, or use them.", "the probe",
    ),
    "noise": Said(
        "the gradient's noise is that of {many} batches", "{says} It grows as the loss falls.", "the probe; McCandlish et al., 2018",
    ),
    "growth": Said(
        "the loss itself makes weights longer",
        "In steps of {walked} of their length together they grew: {shown}. Harmless at the start of a run, and no reason for a bound yet. "
        "Where it still goes on late in yours, a decay ends it.",
        "the probe",
    ),
    "growth, held": Said(
        "the loss itself makes weights longer",
        "In steps of {walked} of their length together they grew: {shown}. What is advised above works against it ({held}): there is "
        "nothing to add.",
        "the probe",
    ),
    "spread, sgd": Said(
        "search the rate: one for all matrices is a compromise",
        "‖gradient‖ / ‖weight‖ lies between {low:.1g} and {high:.1g}, so that a rate which one matrix bears moves another little. Keep "
        "SGD: the lasso's strength is meant for it. Lower the rate where the loss jumps, and train longer. The lasso shortens by rate "
        "times strength: raise the strength as you lower the rate.",
        "the probe; docs/pruning.md; You et al., 2017 (LARS)", needs="SGD",
    ),
    "spread": Said(
        "plain SGD has no rate that suits all matrices",
        "‖gradient‖ / ‖weight‖ lies between {low:.1g} and {high:.1g}. Adam, auto and relative steps even that out.",
        "the probe; You et al., 2017 (LARS)",
    ),
}
