"""What many families share: the small configuration, the names of an attention's matrices."""

from __future__ import annotations

from typing import Any

from census.family import Attention, Table

LLAMA: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "tie_word_embeddings": False,
}  # fmt: skip
SEPARATE: Attention = {
    "q": ("*.q_proj.weight",), "k": ("*.k_proj.weight",), "v": ("*.v_proj.weight",), "out": ("*.o_proj.weight",),
}  # fmt: skip
OUT_PROJ: Attention = {**SEPARATE, "out": ("*att*.out_proj.weight",)}
BERT: Attention = {
    "q": ("*.query.weight",), "k": ("*.key.weight",), "v": ("*.value.weight",), "out": ("*.attention.output.dense.weight",),
}  # fmt: skip
LATENT: Attention = {"out": ("*.self_attn.o_proj.weight",), "free": ("*.q_*proj.weight", "*.kv_*proj*.weight")}
"""Multi-head latent attention: q, k and v come out of products of two matrices; which of them is "the" query is a matter of words."""


def plus(*tables: Table) -> Table:
    """All of these; the first that has a glob counts."""
    merged: dict[str, tuple[str, str]] = {}
    for table in tables:
        for glob, statement in table.items():
            merged.setdefault(glob, statement)
    return merged


def fused(weight: str, out: str) -> Attention:
    """Queries, keys and values in one tensor."""
    return {"qkv": (weight,), "out": (out,)}
