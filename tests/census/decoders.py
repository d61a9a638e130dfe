"""Decoders: q, k and v in one tensor in all the ways in which people order them, and the families that keep them apart.

Read from the ``view``, ``split`` and ``chunk`` that follow the fused projection in each ``modeling_*.py``; `census.oracle` finds the same
rows by the forward pass alone.
"""

from __future__ import annotations

from typing import Any

from census.family import Attention, Family, Table, hf, tokens
from census.words import LATENT, LLAMA, OUT_PROJ, SEPARATE, fused

GPT2 = {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "bos_token_id": 1, "eos_token_id": 2}
FALCON = {**{k: v for k, v in LLAMA.items() if k != "head_dim"}, "alibi": False, "ffn_hidden_size": 48, "tie_word_embeddings": True}
"""Tied, as Falcon is."""
BY_HEAD = {"h": 4, "m": (1, 1, 1)}
TIED: dict[str, Any] = {"heads": ()}


def _causal(
    name: str, model: str, config: dict[str, Any], attention: Attention = SEPARATE, table: Table | None = None, **more: Any
) -> Family:
    given: dict[str, Any] = {"heads": ("lm_head.weight",), "inputs": tokens, **more}
    return Family(name, "decoders", hf(model, config), attention=attention, table=table or {}, **given)


def _fused(name: str, model: str, config: dict[str, Any], weight: str, pattern: str, out: str, **more: Any) -> Family:
    more["table"] = {weight: ("hidden", pattern), **more.get("table", {})}
    return _causal(name, model, config, fused(weight, out), **more)


FUSED = [
    _fused(
        "gpt2",
        "GPT2LMHeadModel",
        GPT2,
        "*.attn.c_attn.weight",
        "i (m o)",
        "*.attn.c_proj.weight",
        tied="*.wte.weight",
        default=True,
        **TIED,
    ),
    _fused(
        "openai-gpt",
        "OpenAIGPTLMHeadModel",
        {**GPT2, "n_ctx": 32},
        "*.attn.c_attn.weight",
        "i (m o)",
        "*.attn.c_proj.weight",
        tied="*.tokens_embed.weight",
        **TIED,
    ),
    _fused(
        "gpt_neox",
        "GPTNeoXForCausalLM",
        LLAMA,
        "*.query_key_value.weight",
        "(h m o) i",
        "*.attention.dense.weight",
        sizes=BY_HEAD,
        default=True,
    ),
    _fused(
        "gpt_neox_japanese",
        "GPTNeoXJapaneseForCausalLM",
        {**LLAMA, "intermediate_multiple_size": 2, "tie_word_embeddings": True},
        "*.query_key_value.weight",
        "(h m o) i",
        "*.attention.dense.weight",
        sizes=BY_HEAD,
        tied="*.embed_in.weight",
        **TIED,
    ),
    _fused(
        "bloom",
        "BloomForCausalLM",
        {**LLAMA, "n_layer": 2, "n_head": 4, "tie_word_embeddings": True},
        "*.query_key_value.weight",
        "(h m o) i",
        "*.self_attention.dense.weight",
        sizes=BY_HEAD,
        tied="*.word_embeddings.weight",
        **TIED,
    ),
    _fused(
        "falcon, one key head",
        "FalconForCausalLM",
        {**FALCON, "multi_query": True, "new_decoder_architecture": False},
        "*.query_key_value.weight",
        "(m o) i",
        "*.self_attention.dense.weight",
        sizes={"m": (4, 1, 1)},
        tied="*.word_embeddings.weight",
        default=True,
        **TIED,
    ),
    _fused(
        "falcon, as many key heads",
        "FalconForCausalLM",
        {**FALCON, "multi_query": False, "new_decoder_architecture": False},
        "*.query_key_value.weight",
        "(h m o) i",
        "*.self_attention.dense.weight",
        sizes=BY_HEAD,
        tied="*.word_embeddings.weight",
        **TIED,
    ),
    _fused(
        "falcon, groups",
        "FalconForCausalLM",
        {**FALCON, "num_kv_heads": 2, "new_decoder_architecture": True},
        "*.query_key_value.weight",
        "(h m o) i",
        "*.self_attention.dense.weight",
        sizes={"h": 2, "m": (2, 1, 1)},
        tied="*.word_embeddings.weight",
        **TIED,
    ),
    _fused(
        "gpt_bigcode, one key head",
        "GPTBigCodeForCausalLM",
        {**GPT2, "multi_query": True},
        "*.attn.c_attn.weight",
        "(m o) i",
        "*.attn.c_proj.weight",
        sizes={"m": (4, 1, 1)},
        tied="*.wte.weight",
        **TIED,
    ),
    _fused(
        "gpt_bigcode, as many key heads",
        "GPTBigCodeForCausalLM",
        {**GPT2, "multi_query": False},
        "*.attn.c_attn.weight",
        "(h m o) i",
        "*.attn.c_proj.weight",
        sizes=BY_HEAD,
        tied="*.wte.weight",
        **TIED,
    ),
    _fused(
        "phi3",
        "Phi3ForCausalLM",
        LLAMA,
        "*.qkv_proj.weight",
        "(m o) i",
        "*.o_proj.weight",
        sizes={"m": (4, 2, 2), "s": 2},
        table={"*.gate_up_proj.weight": ("hidden", "o i|(s o) i")},
    ),
    _fused(
        "mpt",
        "MptForCausalLM",
        {"vocab_size": 64, "d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 32},
        "*.Wqkv.weight",
        "(m o) i",
        "*.attn.out_proj.weight",
        tied="*.wte.weight",
        **TIED,
    ),
    _fused(
        "codegen",
        "CodeGenForCausalLM",
        {**GPT2, "rotary_dim": 4, "n_ctx": 32},
        "*.qkv_proj.weight",
        "(h m o) i",
        "*.attn.out_proj.weight",
        sizes={**BY_HEAD, "parts": ("q", "v", "k")},
        note="four shards of queries, values and keys, in this order",
    ),
    _fused("persimmon", "PersimmonForCausalLM", LLAMA, "*.query_key_value.weight", "(h m o) i", "*.self_attn.dense.weight", sizes=BY_HEAD),
]

_LLAMA_LIKE = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "stablelm": "StableLmForCausalLM", "olmo": "OlmoForCausalLM", "olmo2": "Olmo2ForCausalLM", "olmo3": "Olmo3ForCausalLM",
    "granite": "GraniteForCausalLM",
    "nemotron": "NemotronForCausalLM", "glm": "GlmForCausalLM", "glm4": "Glm4ForCausalLM", "exaone4": "Exaone4ForCausalLM",
    "helium": "HeliumForCausalLM", "diffllama": "DiffLlamaForCausalLM", "arcee": "ArceeForCausalLM", "seed_oss": "SeedOssForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM", "smollm3": "SmolLM3ForCausalLM", "ministral": "MinistralForCausalLM",
    "apertus": "ApertusForCausalLM", "nanochat": "NanoChatForCausalLM", "hunyuan_v1_dense": "HunYuanDenseV1ForCausalLM",
    "ernie4_5": "Ernie4_5ForCausalLM", "cwm": "CwmForCausalLM",
}  # fmt: skip
_TIED_LIKE = {
    "gemma": "GemmaForCausalLM", "gemma2": "Gemma2ForCausalLM", "gemma3": "Gemma3ForCausalLM", "cohere": "CohereForCausalLM",
    "cohere2": "Cohere2ForCausalLM",
}  # fmt: skip
_GATE_UP: Table = {"*.gate_up_proj.weight": ("hidden", "o i|(s o) i")}
POSITIONS = {
    **LLAMA,
    "d_model": 32,
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "ffn_dim": 48,
    "num_layers": 2,
    "attention_heads": 4,
    "tie_word_embeddings": True,
}

APART = [
    *(
        _causal(name, model, LLAMA, table=_GATE_UP if name in ("glm", "glm4") else None, sizes={"s": 2}, default=name == "llama")
        for name, model in _LLAMA_LIKE.items()
    ),
    *(
        _causal(name, model, {**LLAMA, "tie_word_embeddings": True}, tied="*.embed_tokens.weight", **TIED)
        for name, model in _TIED_LIKE.items()
    ),
    _causal("gptj", "GPTJForCausalLM", {**GPT2, "rotary_dim": 4}, OUT_PROJ),
    _causal(
        "gpt_neo",
        "GPTNeoForCausalLM",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 32,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 8,
        },
        OUT_PROJ,
        tied="*.wte.weight",
        **TIED,
    ),
    _causal("phi", "PhiForCausalLM", LLAMA, {**SEPARATE, "out": ("*.self_attn.dense.weight",)}),
    _causal("opt", "OPTForCausalLM", {**POSITIONS, "word_embed_proj_dim": 32}, OUT_PROJ, tied="*.embed_tokens.weight", **TIED),
    _causal("biogpt", "BioGptForCausalLM", POSITIONS, OUT_PROJ, tied="*.embed_tokens.weight", **TIED),
    _causal("xglm", "XGLMForCausalLM", POSITIONS, OUT_PROJ, tied="*.embed_tokens.weight", **TIED),
    _causal(
        "ctrl",
        "CTRLLMHeadModel",
        {**GPT2, "dff": 48},
        {"q": ("*.Wq.weight",), "k": ("*.Wk.weight",), "v": ("*.Wv.weight",), "out": ("*.multi_head_attention.dense.weight",)},
        tied="*.w.weight",
        **TIED,
    ),
    _causal(
        "minicpm3",
        "MiniCPM3ForCausalLM",
        {
            **LLAMA,
            "num_key_value_heads": 4,
            "head_dim": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
        },
        LATENT,
    ),
    _causal(
        "modernbert-decoder",
        "ModernBertDecoderForCausalLM",
        {**LLAMA, "tie_word_embeddings": True},
        {**SEPARATE, "out": ("*.attn.Wo.weight",)},
        {"*.mlp.Wi.weight": ("hidden", "o i|(s o) i")},
        sizes={"s": 2},
        tied="*.tok_embeddings.weight",
        **TIED,
    ),
    _causal(
        "xlnet",
        "XLNetLMHeadModel",
        {"vocab_size": 64, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        {"q": ("*.rel_attn.q",), "k": ("*.rel_attn.k",), "v": ("*.rel_attn.v",), "out": ("*.rel_attn.o",), "free": ("*.rel_attn.r",)},
        {
            "*.rel_attn.o": ("hidden", "o i i"),
            "*.rel_attn.[qkvr]": ("hidden", "i h o"),
            "*.r_?_bias": ("bias", ""),
            "*.seg_embed": ("other|embedding", ""),
            "*.mask_emb": ("other|embedding", ""),
        },
        tied="*.word_embedding.weight",
        note="bare parameters: einsum 'ibh,hnd->ibnd' for q, k, v, r and 'ibnd,hnd->ibh' for the output",
        **TIED,
    ),
]
FAMILIES = [*FUSED, *APART]
