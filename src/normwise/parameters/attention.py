"""Which matrices of an attention are its queries, keys, values and output. Only the names of siblings tell them apart.

A name alone says nothing: a layer counts if there are siblings for queries, keys and values, or one layer for all three.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import nn

from normwise.parameters.names import ADAPTED, Site

PARTS = ("q", "k", "v", "out", "qkv", "kv")
# The two circuits of an attention, what it looks at and what it moves (Elhage et al., 2021), and all of it: `qkv`, q, k and v in one
# tensor, and `kv` belong to both and are neither.
CIRCUITS = {"qk": ("q", "k"), "ov": ("v", "out"), "all": PARTS}

# `..._proj_weight` are the tensors that `nn.MultiheadAttention` holds itself.
_NAMES: Mapping[str, tuple[str, ...]] = {
    "q": ("q", "query", "q_proj", "query_proj", "to_q", "wq", "w_q", "q_lin", "q_linear", "linear_q", "Wq", "q_head", "q_attn",
          "projection_query", "q_b_proj", "q_proj_weight"),
    "k": ("k", "key", "k_proj", "key_proj", "to_k", "wk", "w_k", "k_lin", "k_linear", "linear_k", "Wk", "k_head", "projection_key",
          "k_proj_weight"),
    "v": ("v", "value", "v_proj", "value_proj", "to_v", "wv", "w_v", "v_lin", "v_linear", "linear_v", "Wv", "v_head", "projection_value",
          "v_proj_weight"),
    "out": ("out", "o", "out_proj", "o_proj", "to_out", "proj", "c_proj", "wo", "w_o", "Wo", "out_lin", "linear_out",
            "dense", "post_proj", "projection", "output"),
    "qkv": (
        "qkv", "qkv_proj", "to_qkv", "wqkv", "Wqkv", "qkv_linear", "c_attn", "in_proj", "query_key_value", "in_proj_weight", "attn_qkv",
        "att_proj",
    ),
    "kv": ("kv", "to_kv", "wkv", "kv_linear"),
}  # fmt: skip
FUSED_NAMES = _NAMES["qkv"] + _NAMES["kv"]
# Names that count only where the layer's axes say that q, k and v are in it: Mamba's `in_proj` is no attention's.
_AMBIGUOUS = ("in_proj",)
# What XLNet calls its bare (width, heads, d) tensors.
_BARE = ("q", "k", "v", "o")
_SEPARATE = {"q", "k", "v"}
# Siblings that tell an attention two of whose parts are one matrix, and what is left beside it: keys and values of multi-head latent
# attention (DeepSeek-V2), queries and keys of the Reformer. The joint matrix has no part.
_JOINT = {"kv_b_proj": {"q"}, "query_key": {"v"}}
# What a second set of names in one module ends with: the Longformer's.
_SECOND = "_global"
# Of any attention at least one layer has such a name: a model without them has none to look for.
TELLING = {*_NAMES["q"], *FUSED_NAMES, *(f"{name}{_SECOND}" for name in _NAMES["q"]), *_JOINT}
# The path of a module -> the names of its layers -> their matrices.
Layers = Mapping[str, Mapping[str, nn.Parameter]]


def find_attention(places: Iterable[Site], parts_of: Mapping[int, tuple[str, ...]] | None = None) -> dict[int, str]:
    """The part of every matrix of an attention, by the id of the parameter.

    Finds ``nn.MultiheadAttention``, and modules whose children have the names of GPT-2, BERT, ViT, Llama, T5, diffusers or timm. The
    output may lie in a container (``to_out.0`` of diffusers) or beside the module of the other three (``output.dense`` of BERT).
    parts_of: what the layouts say of layers that hold several matrices, by the id of the parameter.
    """
    layers = _layers(places)
    found: dict[int, str] = {}
    for path, named in layers.items():
        second = {name.removesuffix(_SECOND): param for name, param in named.items() if name.endswith(_SECOND)}
        # The Longformer has two attentions in one module; the second would hide behind the first.
        if second.keys() >= {"query", "key", "value"}:
            found |= {id(param): part for part, param in _parts(second, {}).items()}
        parts = _parts(named, parts_of or {})
        kept = next((kind for kind in (_SEPARATE, {"qkv"}, {"q", "kv"}) if parts.keys() >= kind), set())
        joint = next((beside & parts.keys() for name, beside in _JOINT.items() if name in named), None) if not kept else None
        if kept or joint is not None:
            kept = kept or joint or set()
            outputs = {"out": parts["out"]} if "out" in parts else _output_elsewhere(layers, path)
            found |= {id(param): part for part, param in ({part: parts[part] for part in kept} | outputs).items()}
    return found


def _parts(named: Mapping[str, nn.Parameter], parts_of: Mapping[int, tuple[str, ...]]) -> dict[str, nn.Parameter]:
    """Part -> matrix of one module: by the layers' names, and for a fused one by what its layout says is in it."""
    parts: dict[str, nn.Parameter] = {}
    for part, name in ((part, name) for part, names in _NAMES.items() for name in names if name in named):
        inside = set(parts_of.get(id(named[name]), ()))
        if name in FUSED_NAMES and inside & _SEPARATE:
            parts["qkv" if "q" in inside else "kv"] = named[name]
        elif name not in _AMBIGUOUS:
            parts[part] = named[name]
    return parts


def _layers(places: Iterable[Site]) -> Layers:
    layers: dict[str, dict[str, nn.Parameter]] = {}
    for place in places:
        module, local = place.home
        name = "weight" if local == "weight_v" else local.removesuffix("_orig")
        path = place.name.rpartition(".")[0] if module is place.module else place.name.rpartition(".parametrizations.")[0]
        path = ".".join(step for step in path.split(".") if step not in ADAPTED)
        if name == "weight":
            path, _, name = path.rpartition(".")
        elif not name.endswith("_proj_weight") and name not in _BARE:
            continue
        if place.param.ndim == 2 or (name in _BARE and place.param.ndim == 3):
            layers.setdefault(path, {})[name] = place.param
    return layers


def _output_elsewhere(layers: Layers, path: str) -> dict[str, nn.Parameter]:
    """An output that is no sibling: the only matrix of a sibling container, or BERT's ``output.dense`` beside the module of the others."""
    above = path.rpartition(".")[0]
    for place in (*(f"{path}.{name}".lstrip(".") for name in _NAMES["out"]), f"{above}.output".lstrip(".")):
        inside = layers.get(place, {})
        if len(inside) == 1:
            return {"out": next(iter(inside.values()))}
    beside = layers.get(above, {}) if above else {}
    return {"out": beside["output"]} if "output" in beside else {}    # BigBird's and LED's, a Linear beside the module of the others
