"""Which matrices of an attention are its queries, keys, values and output: told by torch's module, otherwise by what siblings are called.

Nothing but names tells queries from keys, so a layer counts only where its siblings confirm it: a module has layers for queries, keys and
values under names in use for them, or one layer for all three.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

PARTS = ("q", "k", "v", "out", "qkv")
GROUPS = {"qk": ("q", "k"), "ov": ("v", "out"), "all": PARTS}
"""The two circuits of an attention, what it looks at and what it moves (Elhage et al., 2021), and all of it: ``qkv``, q, k and v in one
tensor, belongs to both and is neither."""

_NAMES: Mapping[str, tuple[str, ...]] = {
    "q": ("q", "query", "q_proj", "query_proj", "to_q", "wq", "w_q", "q_lin", "q_linear", "linear_q"),
    "k": ("k", "key", "k_proj", "key_proj", "to_k", "wk", "w_k", "k_lin", "k_linear", "linear_k"),
    "v": ("v", "value", "v_proj", "value_proj", "to_v", "wv", "w_v", "v_lin", "v_linear", "linear_v"),
    "out": ("out", "o", "out_proj", "o_proj", "to_out", "proj", "c_proj", "wo", "w_o", "out_lin", "linear_out", "dense", "output"),
    "qkv": ("qkv", "qkv_proj", "to_qkv", "wqkv", "Wqkv", "c_attn", "in_proj", "query_key_value"),
}
_TORCHS = {"q_proj_weight": "q", "k_proj_weight": "k", "v_proj_weight": "v", "in_proj_weight": "qkv"}


def find_attention(model: nn.Module) -> dict[int, str]:
    """The part of every weight of an attention, by the id of the parameter.

    Found are ``nn.MultiheadAttention``, and modules whose children are called as in GPT-2, BERT, ViT, Llama, T5, diffusers or timm; the
    output may stand beside the module of the other three, as BERT's does. Only matrices count.
    """
    found: dict[int, str] = {}
    for module in model.modules():
        found |= {id(weight): part for part, weight in _weights(module).items() if weight is not None and weight.ndim == 2}
    return found


def _weights(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The weights that belong to ``module`` as an attention; nothing where it is none."""
    if isinstance(module, nn.MultiheadAttention):
        return {part: getattr(module, name, None) for name, part in _TORCHS.items()} | {"out": module.out_proj.weight}
    found = {part: _weight(_child(module, names)) for part, names in _NAMES.items()}
    if all(found[part] is not None for part in ("q", "k", "v")):
        return found
    if found["qkv"] is not None or _holds_attention(module):
        return {"qkv": found["qkv"], "out": found["out"]}
    return {}


def _holds_attention(module: nn.Module) -> bool:
    """BERT's and ViT's way: q, k and v in a child, the output in a sibling of it."""
    inner = _child(module, ("self", "attention"))
    weights = {} if inner is None or isinstance(inner, nn.MultiheadAttention) else _weights(inner)
    return weights.get("q") is not None and weights.get("out") is None


def _child(module: nn.Module, names: tuple[str, ...]) -> nn.Module | None:
    return next((child for name in names if (child := module._modules.get(name)) is not None), None)


def _weight(layer: nn.Module | None) -> nn.Parameter | None:
    """The matrix of a layer, or of the only layer in a container such as diffusers' ``to_out`` (a Linear and a Dropout)."""
    if layer is None:
        return None
    weight = getattr(layer, "weight", None)
    if isinstance(weight, nn.Parameter):
        return weight
    inside = [w for child in layer.children() if isinstance(w := getattr(child, "weight", None), nn.Parameter) and w.ndim == 2]
    return inside[0] if len(inside) == 1 else None
