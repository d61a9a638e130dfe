"""Mixtures of experts. Read from each family's ``modeling_*.py``: how the experts' tensors enter their products says which axis is which.

Most keep ``gate_up_proj`` (experts, 2·intermediate, hidden) and ``down_proj`` (experts, hidden, intermediate) and apply them by
``F.linear``, outputs before inputs. Llama 4 and gpt-oss multiply from the other side (``x @ w``), inputs before outputs; gpt-oss takes gate
and up in turns. DBRX keeps all experts' rows under one another; its ``w2`` is applied as ``x @ w2``. A gate and an up projection in one
tensor may be told apart or be taken as the one matrix that the module applies: both are right.
"""

from __future__ import annotations

from census.family import Family, Table, hf, tokens
from census.words import LATENT, LLAMA, SEPARATE, plus

EOI: Table = {"*.gate_up_proj": ("hidden", "e o i|e (s o) i"), "*.down_proj": ("hidden", "e o i")}
EIO: Table = {"*.gate_up_proj": ("hidden", "e i o|e i (s o)"), "*.down_proj": ("hidden", "e i o")}
MOE = {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "output_router_logits": False}
FINE = {**LLAMA, "moe_intermediate_size": 24, "num_experts_per_tok": 2}


def router(glob: str) -> Table:
    """A router is a Linear in all but its type: scores = F.linear(hidden, weight)."""
    return {glob: ("hidden", "o i")}


def _causal(name: str, model: str, config: object, table: Table, **more: object) -> Family:
    given = {"heads": ("lm_head.weight",), "attention": SEPARATE, "sizes": {"s": 2}, "inputs": tokens, **more}
    return Family(name, "mixtures of experts", hf(model, config), table=table, **given)  # type: ignore[arg-type]


GATE, ROUTER = router("*.gate.weight"), router("*.router.weight")
LATENT_CONFIG = {
    **FINE,
    "head_dim": 4,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 1,
    "n_routed_experts": 4,
    "n_group": 1,
    "topk_group": 1,
}

FAMILIES = [
    _causal("mixtral", "MixtralForCausalLM", MOE, plus(GATE, EOI), default=True),
    _causal("qwen2_moe", "Qwen2MoeForCausalLM", {**FINE, "num_experts": 4, "shared_expert_intermediate_size": 40}, plus(GATE, EOI)),
    _causal("qwen3_moe", "Qwen3MoeForCausalLM", {**FINE, "num_experts": 4}, plus(GATE, EOI)),
    _causal("olmoe", "OlmoeForCausalLM", {**MOE, "num_experts": 4}, plus(GATE, EOI)),
    _causal("flex_olmo", "FlexOlmoForCausalLM", {**MOE, "num_experts": 4}, plus(GATE, EOI)),
    _causal(
        "deepseek_v2",
        "DeepseekV2ForCausalLM",
        LATENT_CONFIG,
        plus(GATE, {"*.experts.gate_up_proj": EOI["*.gate_up_proj"], "*.experts.down_proj": EOI["*.down_proj"]}),
        attention=LATENT,
    ),
    _causal("deepseek_v3", "DeepseekV3ForCausalLM", LATENT_CONFIG, plus(GATE, EOI), attention=LATENT, default=True),
    _causal("llama4", "Llama4ForCausalLM", {**MOE, "intermediate_size_mlp": 40, "interleave_moe_layer_step": 1}, EIO, default=True),
    _causal(
        "gpt_oss",
        "GptOssForCausalLM",
        MOE,
        plus(ROUTER, {"*.gate_up_proj": ("hidden", "e i o|e i (o s)"), "*.down_proj": EIO["*.down_proj"], "*_proj_bias": ("bias", "")}),
        default=True,
    ),
    _causal("granitemoe", "GraniteMoeForCausalLM", MOE, plus(ROUTER, EOI)),
    _causal("granitemoeshared", "GraniteMoeSharedForCausalLM", {**MOE, "shared_intermediate_size": 40}, plus(ROUTER, EOI)),
    _causal("phimoe", "PhimoeForCausalLM", MOE, EOI),
    _causal(
        "jamba",
        "JambaForCausalLM",
        {
            **MOE,
            "num_experts": 4,
            "num_hidden_layers": 4,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 4,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        plus(ROUTER, EOI, {"*.A_log": ("other", "")}),
        note="A_log holds one number a state, it is no matrix",
    ),
    _causal(
        "dbrx",
        "DbrxForCausalLM",
        {
            "vocab_size": 64,
            "d_model": 32,
            "n_heads": 4,
            "n_layers": 2,
            "max_seq_len": 32,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
            "ffn_config": {"ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2, "hidden_size": 32},
            "pad_token_id": 0,
        },
        {
            "*.experts.mlp.w1": ("hidden", "(e o) i"),
            "*.experts.mlp.v1": ("hidden", "(e o) i"),
            "*.experts.mlp.w2": ("hidden", "(e i) o"),
            "*.Wqkv.weight": ("hidden", "(m o) i"),
        },
        sizes={"e": 4, "m": (4, 2, 2)},
        attention={"qkv": ("*.Wqkv.weight",), "out": ("*.out_proj.weight",)},
    ),
    _causal(
        "ernie4_5_moe",
        "Ernie4_5_MoeForCausalLM",
        {**FINE, "moe_num_experts": 4, "moe_k": 2, "moe_layer_start_index": 1, "tie_word_embeddings": False},
        plus(GATE, EOI),
    ),
    _causal(
        "glm4_moe",
        "Glm4MoeForCausalLM",
        {**FINE, "n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        plus(GATE, EOI),
    ),
    _causal("hunyuan_v1_moe", "HunYuanMoEV1ForCausalLM", {**MOE, "num_experts": 4, "moe_topk": 2}, EOI),
    _causal(
        "minimax",
        "MiniMaxForCausalLM",
        MOE,
        plus(GATE, EOI, {"*.qkv_proj.weight": ("hidden", "(h m o) i")}),
        sizes={"s": 2, "h": 4, "m": (1, 1, 1)},
        attention={**SEPARATE, "qkv": ("*.qkv_proj.weight",), "out": ("*.o_proj.weight", "*.self_attn.out_proj.weight")},
    ),
    _causal("afmoe", "AfmoeForCausalLM", {**FINE, "num_experts": 4}, plus(GATE, EOI)),
    _causal(
        "jetmoe",
        "JetMoeForCausalLM",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_key_value_heads": 2,
            "kv_channels": 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "max_position_embeddings": 32,
        },
        {
            "*.input_linear.weight": ("hidden", "e o i|e (s o) i"),
            "*.output_linear.weight": ("hidden", "e o i"),
            "*.kv_proj.weight": ("hidden", "o i|(s o) i"),
        },
        attention={"free": ("*.self_attention.*",)},
        heads=(),
        tied="*.embed_tokens.weight",
        note="queries and outputs of its attention are experts; keys and values are one matrix",
    ),
    _causal(
        "dots1",
        "Dots1ForCausalLM",
        {**FINE, "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1},
        plus(GATE, EOI),
    ),
    _causal(
        "lfm2_moe",
        "Lfm2MoeForCausalLM",
        {**FINE, "num_experts": 4, "layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
        plus(GATE, EOI),
        attention={**SEPARATE, "out": ("*.self_attn.out_proj.weight",)},
    ),
    _causal(
        "qwen3_next",
        "Qwen3NextForCausalLM",
        {
            **FINE,
            "num_experts": 4,
            "shared_expert_intermediate_size": 24,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "layer_types": ["linear_attention", "full_attention"],
        },
        plus(GATE, EOI),
    ),
]
