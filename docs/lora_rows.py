"""Which of LoRA's factors take the matrix method? ``python docs/lora_rows.py`` races all ways, each with the same rates and seeds, and
prints the table of docs/peft.md, into which ``docs/make.py`` writes it.

A small GPT learns the first text of the recipe ``finetune`` and goes on with the second by LoRA. A run's figure is its loss on the second
text's validation part. Each run is a line of ``docs/results/lora-rows.jsonl`` as soon as it is done, and is not done again.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch

import normwise as nw
from normwise.experiments.framework.printing import markdown
from normwise.experiments.framework.provenance import installed, machine
from normwise.experiments.recipes import finetune

RUNS = Path(__file__).parent / "results" / "lora-rows.jsonl"
PRETRAINING, STEPS, SEEDS = 300, 60, (2000, 2001)    # seeds for development
RATES = (0.005, 0.02, 0.08)    # of the matrix method
ADAMW = (0.002, 0.008)    # of what takes AdamW
OWN_RATE = "both by AdamW, B at a rate of its own (LoRA+)"
"""Hayou et al. (2024, arXiv 2402.12354): the rates that are the matrix method's elsewhere are B's."""
WAYS: dict[str, dict[str, str]] = {
    "B by Muon, A by AdamW (the default)": {},
    "both by Muon": {"peft:A": "muon"},
    "A by Muon, B by AdamW": {"peft:A": "muon", "peft:B": "adamw"},
    "both by AdamW": {"peft:B": "adamw"},
    OWN_RATE: {},    # by torch's AdamW
}


def main() -> None:
    """Does what is not done yet, then prints the table."""
    torch.set_num_threads(1)
    done = [json.loads(line) for line in RUNS.read_text().splitlines()] if RUNS.exists() else []
    known = {(r["way"], r["lr"], r["adamw"], r["seed"]) for r in done}
    finetune.PRETRAINING = PRETRAINING
    texts = finetune.texts(None)
    where = machine() | installed("peft")
    todo = [(way, lr, adamw, seed) for seed in SEEDS for lr in RATES for adamw in ADAMW for way in WAYS]
    for i, key in enumerate(todo):
        if key not in known:
            run = dict(zip(("way", "lr", "adamw", "seed"), key, strict=True))
            run |= {"loss": loss(texts, *key), "steps": STEPS, "machine": where}
            done.append(run)
            with RUNS.open("a") as file:
                file.write(json.dumps(run) + "\n")
            print(f"{i + 1} of {len(todo)}: {key}: {run['loss']:.4f}", flush=True)
    print(markdown(rows(done)))


def rows(runs: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A row a way, the lowest mean first: its loss over the seeds (mean ± sample standard deviation) at its best rates, and how many of the
    rates that it was given came to other losses. A rate that changes nothing is "-"."""
    table = []
    for way in WAYS:
        of: dict[tuple[float, float], list[float]] = {}
        for r in sorted((r for r in runs if r["way"] == way), key=lambda r: int(r["seed"])):
            of.setdefault((r["lr"], r["adamw"]), []).append(r["loss"])
        best = min(of.values(), key=mean)
        alike = [{rates[i] for rates, losses in of.items() if losses == best} for i in range(2)]
        first, second = (f"{min(values):g}" if len(values) == 1 else "-" for values in alike)
        muon, adamw = ("-", f"{second}; of B {first}") if way == OWN_RATE else (first, second)
        loss = f"{mean(best):.3f}" + (f" ± {stdev(best):.3f}" if len(best) > 1 else "")
        differ = len({*map(tuple, of.values())})
        row = {"way": way, "loss": loss, "rates tried that differ": str(differ), "best, of Muon": muon, "best, of AdamW": adamw}
        table.append((mean(best), row))
    return [row for _, row in sorted(table, key=lambda pair: pair[0])]


def loss(texts: finetune.Texts, way: str, lr: float, adamw: float, seed: int) -> float:
    """On the second text, after `STEPS`."""
    model = texts.start(seed)
    torch.manual_seed(seed)
    model = finetune.adapted(model)
    optimizer: torch.optim.Optimizer
    if way == OWN_RATE:
        optimizer = torch.optim.AdamW(
            [{"params": [p for name, p in model.named_parameters() if p.requires_grad and part in name], "lr": rate}
             for part, rate in (("lora_A", adamw), ("lora_B", lr))], betas=(0.9, 0.95), weight_decay=0.0,
        )    # fmt: skip
    else:
        optimizer = nw.optim.Muon(model, lr, weight_decay=0.0, adamw={"lr": adamw, "weight_decay": 0.0}, override=WAYS[way])
    for _ in finetune.steps(texts.second, model, optimizer, STEPS, seed):
        pass
    return texts.second.evaluate(model, "validation").loss


if __name__ == "__main__":
    main()
