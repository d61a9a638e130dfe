"""State-space models and others without attention, or with little of it. A state's ``A_log`` holds one number a channel and state: no
matrix. What they call ``in_proj`` and ``out_proj``, and RWKV its ``key`` and ``value``, are Linears, but there are no queries."""

from __future__ import annotations

from typing import Any

from census.family import Attention, Family, Table, hf, tokens
from census.words import LLAMA, OUT_PROJ, SEPARATE

STATES: Table = {"*.A_log": ("other", "")}
SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 4,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SSD = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 8}


def _of(
    name: str, model: str, config: dict[str, Any], table: Table | None = None, attention: Attention | None = None, **more: Any
) -> Family:
    given = {"heads": ("lm_head.weight",), "inputs": tokens, **more}
    return Family(name, "state space and recurrent", hf(model, config), attention=attention or {}, table=table or {}, **given)


FAMILIES = [
    _of("mamba", "MambaForCausalLM", {**SMALL, "tie_word_embeddings": True}, STATES, heads=(), tied="*embeddings.weight", default=True),
    _of(
        "mamba2",
        "Mamba2ForCausalLM",
        {**SMALL, "num_heads": 8, "head_dim": 8, "n_groups": 1, "expand": 2, "chunk_size": 8, "tie_word_embeddings": False},
    ),
    _of("falcon_mamba", "FalconMambaForCausalLM", {**SMALL, "tie_word_embeddings": True}, STATES, heads=(), tied="*embeddings.weight"),
    _of(
        "rwkv",
        "RwkvForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48, "attention_hidden_size": 32},
        {"*.time_mix_*": ("other|gain", "")},
        {},
        heads=("head.weight",),
        note="key, value and receptance are no attention: there are no queries",
    ),
    _of(
        "xlstm",
        "xLSTMForCausalLM",
        {"vocab_size": 64, "hidden_size": 32, "embedding_dim": 32, "num_hidden_layers": 2, "num_heads": 4, "num_blocks": 2},
        None,
        {"free": ("*.mlstm_layer.*",)},
        note="matrix memories, addressed by q and k: an attention without softmax, judged as neither",
    ),
    _of(
        "recurrent_gemma",
        "RecurrentGemmaForCausalLM",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "lru_width": 32,
            "num_key_value_heads": 2,
            "attention_window_size": 8,
            "tie_word_embeddings": True,
        },
        {"*_gate_weight": ("hidden|recurrent", "s i o"), "*_gate_bias": ("bias", "")},
        SEPARATE,
        heads=(),
        tied="*embed_tokens.weight",
        note="its gates are one small matrix a head, x @ w",
    ),
    _of(
        "zamba",
        "ZambaForCausalLM",
        {
            **LLAMA,
            "num_hidden_layers": 4,
            "attention_hidden_size": 64,
            "attention_head_dim": 16,
            "num_key_value_heads": 4,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "n_mamba_heads": 2,
            "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"],
            "layer_types": ["mamba", "hybrid", "mamba", "hybrid"],
            "tie_word_embeddings": True,
        },
        {
            "*.x_proj_weight": ("hidden", "e o i"),
            "*.dt_proj_weight": ("hidden", "e o i"),
            "*.dt_proj_bias": ("bias", ""),
            "*.A_log": ("other", ""),
            "*.mamba.D": ("gain|other", ""),
        },
        SEPARATE,
        heads=(),
        tied="*embed_tokens.weight",
        note="x_proj and dt_proj are one matrix a head",
    ),
    _of("bamba", "BambaForCausalLM", {**LLAMA, **SSD, "attn_layer_indices": [1]}, None, SEPARATE),
    _of("falcon_h1", "FalconH1ForCausalLM", {**LLAMA, **SSD, "mamba_d_ssm": 64}, None, SEPARATE),
    _of(
        "granitemoehybrid",
        "GraniteMoeHybridForCausalLM",
        {
            **LLAMA,
            **SSD,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "shared_intermediate_size": 24,
            "layer_types": ["mamba", "attention"],
        },
        {
            "*.experts.gate_up_proj": ("hidden", "e o i|e (s o) i"),
            "*.experts.down_proj": ("hidden", "e o i"),
            "*.router.weight": ("hidden", "o i"),
            "*.shared_mlp.input_linear.weight": ("hidden", "o i|(s o) i"),
        },
        SEPARATE,
        sizes={"s": 2},
    ),
    _of(
        "nemotron_h",
        "NemotronHForCausalLM",
        {
            **LLAMA,
            "layers_block_type": ["mamba", "moe", "attention", "mlp"],
            "num_hidden_layers": 4,
            "mamba_num_heads": 8,
            "mamba_head_dim": 8,
            "ssm_state_size": 8,
            "n_groups": 1,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 24,
            "moe_shared_expert_intermediate_size": 24,
            "chunk_size": 8,
            "expand": 2,
        },
        {"*.experts.up_proj": ("hidden", "e o i"), "*.experts.down_proj": ("hidden", "e o i"), "*.gate.weight": ("hidden", "o i")},
        SEPARATE,
    ),
    _of(
        "lfm2",
        "Lfm2ForCausalLM",
        {**LLAMA, "layer_types": ["conv", "full_attention"], "tie_word_embeddings": True},
        None,
        {**OUT_PROJ, "out": ("*.self_attn.out_proj.weight",)},
        heads=(),
        tied="*embed_tokens.weight",
        note="conv.in_proj and conv.out_proj are no attention",
    ),
    _of(
        "qwen3_5",
        "Qwen3_5ForCausalLM",
        {
            **LLAMA,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
        {"*.linear_attn.in_proj_qkv.weight": ("hidden", "o i|(m o) i")},
        {**SEPARATE, "free": ("*.linear_attn.*",)},
        sizes={"m": (1, 1, 2)},
        note="linear attention beside softmax",
    ),
]
