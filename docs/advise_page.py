"""Writes docs/advise-census.md: what ``nw.advise`` says to published architectures. ``--check`` only compares.

Every model is built small and with random weights, as for the census; nothing is downloaded. It needs the ``test`` extra.
"""

from __future__ import annotations

import sys
import warnings
from importlib.metadata import version

import census_page  # it makes the census importable
from torch import nn

import normwise as nw
from census.all import FAMILIES
from census.family import Unavailable
from normwise.advice import GOALS, Advice
from normwise.advice.facts import Facts

PAGE = census_page.ROOT / "docs" / "advise-census.md"
NAMES = (
    "gpt2", "llama", "qwen3", "gemma2", "mixtral", "gpt_oss", "deepseek_v3", "bert", "modernbert", "deberta-v2", "t5", "bart", "vit",
    "swin", "swinv2", "convnext", "resnet", "mobilenet_v2", "detr", "clip", "wav2vec2", "whisper", "mamba", "rwkv",
    "recurrent_gemma", "nanoGPT", "LSTM of letters", "segmentation", "MLP", "two towers and a temperature", "weight_norm",
    "LoRA on Llama, the head trained too",
)  # fmt: skip
"""Of every group of the census, and every kind of attention, normalisation and adapter that advice tells apart."""
COLUMNS = ("model", "steps", "scale-free", "attention logits", "stability", "lipschitz", "sparsity", "quantisation", "finetuning",
           "plasticity", "besides")  # fmt: skip
INTRO = """# Advice for published architectures

What [`nw.advise`](advise.md) says to {models} models of the [census](census.md), from the model alone. They are built small and with random
weights by transformers {version}. `python docs/advise_page.py` writes this page again; `print(nw.advise(model, goal))` has the reasons.

- **steps** is the optimizer for `speed` and `generalisation`, with the share of the parameters that it steps as matrices. From the model
  alone neither goal brings a rule.
- **scale-free** counts the matrices whose length a normalisation divides out, as guessed from the code.
- **attention logits**: how many attentions may let them grow, and what bounds the others.
- The goals' columns have the rules of the policy with the number of tensors; *leave* means that the advice is to leave it alone.
- **besides**: tensors whose axes nobody states, raw tensors of computed weights, weights that are zero at the start.

Reading these answers changed them: a cap on what a BatchNorm divides out is no longer advised, nor a ball around the fresh head of a new
task or around weights of zeros; a network of linear layers alone gets AdamW; and clamps for quantisation went when they were measured.
"""


def cells(model: nn.Module) -> list[str]:
    """A model's row, without its name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = {goal: nw.advise(model, goal) for goal in GOALS}
    facts = Facts.of(model)
    step = next(line for line in found["speed"].lines if line.verdict == "do")
    whole = sum(e.param.numel() for e in facts.trainable)
    steps = f"auto {step.numbers / whole:.0%}" if found["speed"].optimizer.name == "auto" else found["speed"].optimizer.name
    assert str(found["generalisation"].optimizer) == str(found["speed"].optimizer) and not found["speed"].calls
    growing = sum(not a.bounded for a in facts.attentions)
    bounded = sorted({a.bounded for a in facts.attentions if a.bounded})
    besides = [(len(facts.inventory.unsure), "unsure"), (len(facts.computed), "raw"), (len(facts.empty), "zero")]
    rules = [_rules(found[goal]) for goal in COLUMNS[4:10]]
    return [
        steps, str(len(facts.scale_free) or ""), ", ".join([*([f"{growing} may grow"] if growing else []), *bounded]), *rules,
        ", ".join(f"{count} {what}" for count, what in besides if count),
    ]  # fmt: skip


def _rules(advice: Advice) -> str:
    tensors: dict[str, int] = {}
    for line in advice.lines:
        for call in line.rules:
            tensors[call.name] = tensors.get(call.name, 0) + line.tensors
    return ", ".join(f"{name} {count}" for name, count in tensors.items()) or "leave"


def text() -> str:
    """The whole page."""
    families = {family.name: family for family in FAMILIES}
    rows, missing = [], []
    for name in NAMES:
        try:
            rows.append("| " + " | ".join([name, *cells(families[name].build())]) + " |")
        except Unavailable as why:
            missing.append(f"Not built here: {name}: {why}.")
    head = ["| " + " | ".join(COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    return "\n".join([INTRO.format(models=len(rows), version=version("transformers")), *head, *rows, *missing]) + "\n"


if __name__ == "__main__":
    sys.exit(census_page.write(PAGE, text()))
