"""The attentions of a model, how many heads each has, and what keeps its logits from growing."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass

from torch import nn

from normwise.parameters.inventory import Entry
from normwise.parameters.layout_registry import HEADS, KEY_HEADS, whole_number
from normwise.parameters.names import ADAPTED, sites
from normwise.parameters.roles import is_normalisation

_QK_NORM = re.compile(r"(q|k|qk|query|key)_?(layer)?_?(norm|ln)|(layer)?_?(norm|ln)_(q|k|qk|query|key)|attn_(q|k)_norm")
_CAPS = ("attn_logit_softcapping", "logit_softcap", "softcap")


@dataclass(frozen=True, eq=False)
class Attention:
    """``path`` is the clean name of ``module``, which holds the layers. ``query`` and ``key`` are names of parameters, biases too, or both
    are empty and ``fused`` names the tensor of q, k and v. ``heads`` and ``key_heads`` are 0 where the module does not say.
    ``bounded`` says what bounds the logits (``"QK-norm"``, ``"soft cap"``, ``"cosine"``), "" for nothing that was seen.
    """

    path: str
    module: nn.Module
    query: tuple[str, ...]
    key: tuple[str, ...]
    fused: tuple[str, ...]
    heads: int
    key_heads: int
    bounded: str


def find_attentions(model: nn.Module, entries: Iterable[Entry]) -> list[Attention]:
    """Every attention whose queries are known, in the model's order."""
    known = {id(e.param): e for e in entries if e.attention in ("q", "k", "qkv")}
    held: dict[str, tuple[nn.Module, dict[str, list[str]]]] = {}
    for site in sites(model) if known else ():
        if (e := known.get(id(site.param))) is None:
            continue
        above = [(parent, path) for parent, path in site.above() if path]
        module, inside = (site.home[0], "") if site.local_name.endswith("_proj_weight") else above[0] if above else (site.module, "")
        steps = site.name.removesuffix(f".{site.local_name}").split(".")
        while steps[-1] in ADAPTED:    # q_proj.base_layer, which `inside` leaves out
            steps.pop()
        path = ".".join(steps).removesuffix(inside).rstrip(".")
        held.setdefault(path, (module, {}))[1].setdefault(e.attention, []).append(e.name)
    return [_attention(path, module, parts) for path, (module, parts) in held.items() if {"q", "qkv"} & parts.keys()]


def _attention(path: str, module: nn.Module, parts: dict[str, list[str]]) -> Attention:
    heads = whole_number(module, HEADS)
    query, key, fused = (tuple(parts.get(part, ())) for part in ("q", "k", "qkv"))
    return Attention(path, module, query, key, fused, heads, whole_number(module, KEY_HEADS) or heads, _bounded(module))


def _bounded(module: nn.Module) -> str:
    norms = [name for name, child in module.named_children() if is_normalisation(child) and _QK_NORM.fullmatch(name.lower())]
    if norms:
        return "QK-norm"
    if any(isinstance(getattr(module, name, None), int | float) for name in _CAPS):
        return "soft cap"
    return "cosine" if hasattr(module, "logit_scale") else ""
