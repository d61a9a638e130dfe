"""Axes that a module's type alone does not tell: several matrices in one layer, stacked experts, bare parameters.

Fused layers of known classes are registered here as a user would (`register_layout` with ``child=``). Of others, what transformers'
modules of experts state about themselves (``is_transposed``) and the source of the forward pass (`normwise.parameters.forward_source`)
tell the axes. ``inventory.statement`` asks all of them in their order.
"""

from __future__ import annotations

import ast
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from normwise.parameters import forward_source
from normwise.parameters.layouts import QKV, Describe, Layout, register_layout
from normwise.parameters.names import class_of

GATE_UP = ("gate", "up")
HEADS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "heads", "nhead", "num_query_heads")
KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_kv_heads", "kv_heads", "kv_n_heads")


@dataclass(frozen=True)
class Statement:
    """What is known of a parameter: its axes, its role where they tell one, and ``adapter``, "A" or "B" of a low-rank product B·A."""

    layout: Layout
    role: str | None = None
    adapter: str = ""


# ------------------------------------------------------------------------------------------ several matrices in one layer


def outputs_split(tensor: Tensor, letters: str, sizes: Sequence[int], parts: Sequence[str], transposed: bool = False) -> Layout | None:
    """The outputs of a layer's ``weight`` or ``bias`` taken apart: ``letters`` and ``sizes`` are the axes before the last, ``o``. None
    where they do not divide them. transposed: of GPT-2's ``Conv1D``, whose outputs are the second axis."""
    flipped = transposed and tensor.ndim == 2
    if tensor.ndim == 0 or math.prod(sizes) < 1 or tensor.shape[int(flipped)] % math.prod(sizes):
        return None
    shape = (*sizes, tensor.shape[int(flipped)] // math.prod(sizes))
    if flipped:
        return Layout(f"i{letters}o", (tensor.shape[0], *shape), parts=tuple(parts))
    inner = ("i" + "k" * tensor.ndim)[: tensor.ndim - 1]
    return Layout(f"{letters}o{inner}", (*shape, *tensor.shape[1:]), parts=tuple(parts))


def pieces(queries: int, keys: int) -> tuple[str, ...]:
    """The parts of q, k, v where ``queries`` heads share ``keys``: the queries in pieces of the keys' size, so that all are equal."""
    return ("q",) * (queries // keys) + ("k", "v") if keys and queries % keys == 0 else ()


def whole_number(module: nn.Module, names: Sequence[str]) -> int:
    """The first of these attributes that is a whole number, of the module or of its ``config``; 0 without one."""
    held = [getattr(of, name, None) for of in (module, getattr(module, "config", None)) for name in names]
    return next((n for n in held if type(n) is int and n > 0), 0)


def _is_transposed(module: nn.Module, child: str) -> bool:
    layer = getattr(module, child, None)
    layer = getattr(layer, "base_layer", layer)
    return any(cls.__name__ == "Conv1D" for cls in type(layer).__mro__)


def stacked(child: str, parts: tuple[str, ...] = QKV) -> Describe:
    """(part, head, d): all of q, then all of k, then all of v; two parts where there is room for no more, as in GPT-2's cross-attention."""

    def describe(module: nn.Module, name: str, tensor: Tensor) -> Layout | None:
        transposed = _is_transposed(module, child)
        present = parts
        if getattr(module, "is_cross_attention", False) and len(parts) == 3:
            present = parts[1:]
        heads = whole_number(module, HEADS)
        width = tensor.shape[int(transposed and tensor.ndim == 2)]
        if heads and width % (len(present) * heads) == 0:
            return outputs_split(tensor, "sh", (len(present), heads), present, transposed)
        return outputs_split(tensor, "s", (len(present),), present, transposed)

    return describe


def interleaved(module: nn.Module, name: str, tensor: Tensor) -> Layout | None:
    """(head, part, d): each head's q, k and v beside each other."""
    return outputs_split(tensor, "hs", (whole_number(module, HEADS), 3), QKV)


def shared_keys(module: nn.Module, name: str, tensor: Tensor) -> Layout | None:
    """(q heads, k heads, v heads): all of q, then the fewer heads of k and of v."""
    queries, keys = whole_number(module, HEADS), whole_number(module, KEY_HEADS)
    parts = pieces(queries, keys)
    return outputs_split(tensor, "sh", (len(parts), keys), parts) if parts else None


def _falcon(module: Any, name: str, tensor: Tensor) -> Layout | None:
    """Three layouts in one class: (group, q of the group and k and v, d); (q heads, one k, one v); (head, part, d)."""
    heads = int(module.num_heads)
    if module.new_decoder_architecture:
        groups = int(module.num_kv_heads)
        parts = pieces(heads, groups)
        return outputs_split(tensor, "hs", (groups, len(parts)), parts) if parts else None
    if module.multi_query:
        return outputs_split(tensor, "s", (heads + 2,), pieces(heads, 1))
    return interleaved(module, name, tensor)


def _bigcode(module: Any, name: str, tensor: Tensor) -> Layout | None:
    """One k and one v for all heads, or each head's q, k and v beside each other."""
    if getattr(module, "is_cross_attention", False):
        return None
    return outputs_split(tensor, "s", (module.num_heads + 2,), pieces(module.num_heads, 1)) if module.multi_query else interleaved(
        module, name, tensor
    )


def _codegen(module: Any, name: str, tensor: Tensor) -> Layout | None:
    """(shard, part, d) in the order q, v, k: as it was trained, on four shards."""
    return outputs_split(tensor, "os", (getattr(module, "mp_num", 4), 3), ("q", "v", "k"))


def _gate_up(module: nn.Module, name: str, tensor: Tensor) -> Layout | None:
    return outputs_split(tensor, "s", (2,), GATE_UP)


# The child's name, what its axes are, and the classes that hold it: read from each one's forward pass.
_FUSED: tuple[tuple[str, Describe, str], ...] = (
    ("c_attn", stacked("c_attn"), "GPT2Attention DecisionTransformerGPT2Attention ImageGPTAttention "
     "transformers.models.openai.modeling_openai.Attention"),
    ("query_key_value", interleaved, "GPTNeoXAttention GPTNeoXJapaneseAttention BloomAttention PersimmonAttention"),
    ("query_key_value", _falcon, "FalconAttention"),
    ("c_attn", _bigcode, "GPTBigCodeAttention"),
    ("qkv_proj", _codegen, "CodeGenAttention"),
    ("qkv_proj", shared_keys, "Phi3Attention Phi4MultimodalAttention"),
    ("qkv_proj", interleaved, "MiniMaxLightningAttention"),
    ("in_proj", interleaved, "DisentangledSelfAttention"),
    ("Wqkv", shared_keys, "DbrxAttention"),
    ("Wqkv", stacked("Wqkv"), "ModernBertAttention MptAttention"),
    ("qkv_linear", stacked("qkv_linear"), "LayoutLMv2SelfAttention"),
    ("qkv", stacked("qkv"), "BlipAttention Blip2Attention InstructBlipAttention InstructBlipVideoAttention "
     "Qwen2_5_VLVisionAttention transformers.models.qwen2_vl.modeling_qwen2_vl.VisionAttention Qwen3VLVisionAttention "
     "Qwen3VLMoeVisionAttention Glm4vVisionAttention Glm4vMoeVisionAttention SamVisionAttention SamHQVisionAttention "
     "GotOcr2VisionAttention SegGptAttention VitDetAttention TimesformerSelfAttention MgpstrAttention HieraMaskUnitAttention "
     "Sam2MultiScaleAttention Florence2VisionChannelAttention Florence2VisionWindowAttention Ernie4_5_VLMoeVisionAttention"),
    ("qkv", stacked("qkv"), "timm.layers.attention.Attention timm.layers.attention.AttentionRope timm.models.beit.Attention "
     "timm.models.eva.EvaAttention timm.models.swin_transformer.WindowAttention timm.models.swin_transformer_v2.WindowAttention"),
    ("to_kv", stacked("to_kv", ("k", "v")), "GraniteSpeechConformerAttention EvollaSequenceCompressorAttention"),
    ("gate_up_proj", _gate_up, "Phi3MLP Phi4MultimodalMLP GlmMLP Glm4MLP Glm4vTextMLP GlmOcrTextMLP GlmImageTextMLP DiaMLP"),
)  # fmt: skip
for _child, _describe, _classes in _FUSED:
    for _cls in _classes.split():
        register_layout(_cls, _describe, child=_child)


def split_by_source(module: nn.Module, child: str, tensor: Tensor) -> Layout | None:
    """A layer of q, k and v in one, told by how the forward pass of the module that holds it takes the result apart; what it says in two
    ways counts for nothing."""
    ways = forward_source.splits(type(module)).get(child, frozenset())
    way = next(iter(ways)) if len(ways) == 1 else None
    if way is None or way.count != 3:
        return None
    transposed = _is_transposed(module, child)
    heads = forward_source.number(way.heads, module) or (whole_number(module, HEADS) if not way.inner else 0)
    if way.sizes is not None:
        sizes = [forward_source.number(size, module) for size in way.sizes]
        keys = sizes[1]
        parts = pieces(sizes[0], keys) if keys and sizes[1] == sizes[2] else ()
        return outputs_split(tensor, "s", (len(parts),), parts, transposed) if parts and len(parts) * keys in tensor.shape else None
    if way.inner:
        return outputs_split(tensor, "hs", (heads, 3), QKV, transposed) if heads else None
    width = tensor.shape[int(transposed)]
    if heads and width % (3 * heads) == 0:
        return outputs_split(tensor, "sh", (3, heads), QKV, transposed)
    return outputs_split(tensor, "s", (3,), QKV, transposed)


# ------------------------------------------------------------------------------------------------------- stacked experts


def stated_experts(module: Any, name: str, tensor: Tensor) -> Statement | None:
    """What transformers' modules of experts say of themselves: each tensor is (expert, out, in), or (expert, in, out) where
    ``is_transposed``; gate and up lie one after the other where ``is_concatenated``, else in turns."""
    if not isinstance(getattr(module, "is_transposed", None), bool) or not isinstance(getattr(module, "has_gate", None), bool):
        return None
    if name.endswith("_bias") and tensor.ndim == 2:
        return Statement(Layout("eo", tuple(tensor.shape)))
    if tensor.ndim != 3 or not name.endswith("_proj"):
        return None
    layout = Layout("eio" if module.is_transposed else "eoi", tuple(tensor.shape))
    if name == "gate_up_proj" and module.has_gate:
        layout = _two(layout, bool(getattr(module, "is_concatenated", True)))
    return Statement(layout, "hidden")


def _two(layout: Layout, concatenated: bool) -> Layout:
    """Gate and up in one tensor as two matrices."""
    at = layout.axes.index("o")
    if layout.shape[at] % 2:
        return layout
    half = layout.shape[at] // 2
    letters, sizes = ("so", (2, half)) if concatenated else ("os", (half, 2))
    axes, shape = layout.axes, layout.shape
    return Layout(axes[:at] + letters + axes[at + 1 :], (*shape[:at], *sizes, *shape[at + 1 :]), parts=GATE_UP)


def _dbrx(module: Any, name: str, tensor: Tensor) -> Layout | None:
    """All experts' rows one after the other: w1 and v1 (expert · out, in), w2 (expert · in, out)."""
    experts = int(module.moe_num_experts)
    if tensor.ndim != 2 or name not in ("w1", "v1", "w2") or tensor.shape[0] % experts:
        return None
    return Layout("eio" if name == "w2" else "eoi", (experts, tensor.shape[0] // experts, tensor.shape[1]))


register_layout("DbrxExpertGLU", _dbrx, role="hidden")


def _zamba(_module: nn.Module, name: str, tensor: Tensor) -> Layout | None:
    """One small matrix a Mamba head, applied from the left: ``w[:, None] @ x``."""
    return Layout("soi", tuple(tensor.shape)) if name in ("x_proj_weight", "dt_proj_weight") and tensor.ndim == 3 else None


register_layout("ZambaMambaMixer", _zamba, role="hidden")


# ---------------------------------------------------------------------------------------------------- the source of the forward pass


def by_source(module: nn.Module, name: str, tensor: Tensor) -> Statement | None:
    """A bare parameter, by how the forward pass multiplies by it; None where it does not, or in ways that differ."""
    cls = class_of(module)
    if _LOOKED_UP.search(name):
        return None
    if tensor.ndim >= 2 and (found := _by_einsum(cls, name, tensor)) is not None:
        return found
    ways = forward_source.uses(cls).get(name, frozenset())
    shape = tuple(tensor.shape)
    if tensor.ndim == 2 and ways and ways <= {"oi", "table"}:
        return Statement(Layout("oi", shape), "embedding" if "table" in ways else "hidden")
    if tensor.ndim == 2 and ways == {"io"}:
        return Statement(Layout("io", shape), "hidden")
    orders = {way.removeprefix("[]").removeprefix("batch ") for way in ways}
    if tensor.ndim == 3 and len(orders) == 1 and orders <= {"oi", "io"} and "oi" not in ways:
        layout = Layout(_lead(cls, name) + orders.pop(), shape)
        return Statement(_two(layout, _concatenated(cls)) if name == "gate_up_proj" else layout, "hidden")
    return None


# How names end of what is a set of vectors, though a product with it (a score of each) looks like a layer's.
_LOOKED_UP = re.compile(
    r"(^|_)(pos|positions?|embed|embeds|embeddings?|emb|tokens?|table|encodings?|latents?|prompts?|codebooks?|codevectors)$"
)


def _lead(cls: type, name: str) -> str:
    """Of a stack of matrices: experts where the class or the attribute says so."""
    return "e" if any(word in f"{cls.__name__} {name}".lower() for word in ("expert", "moe")) else "s"


def _concatenated(cls: type) -> bool:
    return not any("::2" in ast.unparse(f) for f in forward_source.functions(cls))


def _by_einsum(cls: type[nn.Module], name: str, tensor: Tensor) -> Statement | None:
    ways = forward_source.contractions(cls).get(name, frozenset())
    axes = next(iter(ways)) if len(ways) == 1 else ""
    if len(axes) != tensor.ndim or axes.count("s") > 1 or "o" not in axes or "i" not in axes:
        return None
    return Statement(Layout(axes.replace("s", _lead(cls, name)), tuple(tensor.shape)), "hidden")
