"""``normwise bench peft``: what rules on LoRA's product s·B·A add to a step of GPT-2.

GPT-2 of 124M parameters: forward, backward and step of AdamW on A and B alone, on one thread, at 64 and at 256 tokens a step. All rules
take turns with the plain step on one model, and each radius is one at which the rule acts in every step, the dearer case. ``share`` is
the time in the control's hooks over that of the whole step (bar: 2%), the median over rounds. ``off`` is how far the products after the
rule are from the dense computation in float64, relatively, at worst over the layers (bar: 1e-5).
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

import normwise as nw
from normwise.experiments.bench.runner import Bar
from normwise.experiments.framework.pool import on_threads
from normwise.experiments.framework.printing import tell
from normwise.experiments.framework.provenance import installed, machine
from normwise.experiments.framework.timing import in_turn, milliseconds
from normwise.norms.native import library

BARS = (Bar("share"), Bar("off", "off_bar"))
NEEDS = ("transformers", "peft")
ROUNDS, STEPS, RADIUS = 7, 2, 0.01
CASES = ((("c_attn",), 8), (("c_attn",), 16), (("c_attn", "c_proj", "c_fc"), 8))
TOKENS = (64, 256)
RULES: dict[str, tuple[Callable[[], Any], Callable[[Tensor], Tensor]]] = {
    "max_norm": (lambda: nw.max_norm(RADIUS, "peft:product"), lambda w: w * (RADIUS / w.norm(dim=1, keepdim=True)).clamp(max=1)),
    "Frobenius": (lambda: nw.clip_weight_norm(RADIUS, "peft:product"), lambda w: w * (RADIUS / w.norm()).clamp(max=1)),
    "spectral_cap": (lambda: nw.spectral_cap(RADIUS, "peft:product", per="tensor"), lambda w: _capped(w)),
}
"""Each rule, and the same on the dense product (units, inputs)."""


def run(rounds: int = ROUNDS, steps: int = STEPS, layers: int = 12, threads: int = 1) -> dict[str, Any]:
    """All measurements; ``steps`` of each way in each round. Without transformers or PEFT there are no rows."""
    missing = [name for name in NEEDS if find_spec(name) is None]
    rows: list[dict[str, Any]] = []
    with on_threads(threads):
        for modules, rank in CASES if not missing else ():
            tell(f"GPT-2 with LoRA of rank {rank} on {', '.join(modules)}")
            torch.manual_seed(0)
            model = _gpt2(modules, rank, layers)
            off = {name: _off(model, name) for name in RULES}
            for tokens in TOKENS:
                found = _shares(model, tokens, rounds, steps)
                rows += [{"modules": ", ".join(modules), "rank": rank, "tokens": tokens, **row, "off": off[row["rule"]], "off_bar": 1e-5}
                         for row in found]    # fmt: skip
    left_out = [f"everything: {name} is not installed" for name in missing]
    where = {"machine": machine() | installed(*NEEDS), "kernels": library() is not None, "threads": threads}
    return {"bench": "peft", **where, "rounds": rounds, "left_out": left_out, "rows": rows}


def _gpt2(modules: tuple[str, ...], rank: int, layers: int) -> Any:
    transformers, peft = (import_module(name) for name in NEEDS)
    base = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=layers))
    model = peft.get_peft_model(base, peft.LoraConfig(r=rank, target_modules=list(modules), fan_in_fan_out=True))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.01)
    return model


def _shares(model: Any, tokens: int, rounds: int, steps: int) -> list[dict[str, Any]]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    x = torch.randint(model.config.vocab_size, (max(1, tokens // 64), 64))

    def burst(make: Callable[[], Any] | None) -> tuple[float, float]:
        """Seconds of a step, and of the control's hooks in it, after a first one that prepares the rules."""
        control = None if make is None else nw.attach(model, optimizer, make(), timed=True)
        at: list[tuple[float, float]] = []
        for _ in range(steps + 1):
            optimizer.zero_grad()
            model(input_ids=x, labels=x).loss.backward()
            optimizer.step()
            at.append((time.perf_counter(), 0.0 if control is None else control.seconds))
        if control is not None:
            control.remove()
        return (at[-1][0] - at[0][0]) / steps, (at[-1][1] - at[0][1]) / steps

    lanes = [partial(burst, make) for make in (None, *(rule for rule, _ in RULES.values()))]
    plain, *ruled = in_turn(lanes, rounds, warm_up=1, threads=None, alternate=True)
    return [
        {"rule": name, "step_ms": milliseconds(t for t, _ in plain), "control_ms": milliseconds(own for _, own in taken),
         "share": statistics.median(own / whole for whole, own in taken), "bar": 0.02}
        for name, taken in zip(RULES, ruled, strict=True)
    ]  # fmt: skip


def _off(model: Any, name: str) -> float:
    """How far the rule's products are from those of the dense computation; the model is put back."""
    rule, dense = RULES[name]
    layers = [m for m in model.modules() if hasattr(m, "get_delta_weight")]
    wanted = [dense(_product(layer)) for layer in layers]
    held = [p for p in model.parameters() if p.requires_grad]
    before = [p.detach().clone() for p in held]
    optimizer = torch.optim.SGD(held, lr=0.0)
    with nw.attach(model, optimizer, rule()):
        for p in held:
            p.grad = torch.zeros_like(p)
        optimizer.step()
    got = [_product(layer) for layer in layers]
    torch._foreach_copy_([p.detach() for p in held], before)
    return max(float((g - w).norm() / w.norm()) for g, w in zip(got, wanted, strict=True))


def _product(layer: nn.Module) -> Tensor:
    of: Any = layer
    a, b = of.lora_A["default"].weight.detach().double(), of.lora_B["default"].weight.detach().double()
    product: Tensor = b @ a * of.scaling["default"]
    return product


def _capped(w: Tensor) -> Tensor:
    u, s, vh = torch.linalg.svd(w, full_matrices=False)
    return (u * s.clamp(max=RADIUS)) @ vh
