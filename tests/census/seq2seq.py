"""Encoders with decoders."""

from __future__ import annotations

from typing import Any

import torch

from census.family import Attention, Family, hf
from census.words import OUT_PROJ

BART: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
    "decoder_start_token_id": 2, "forced_eos_token_id": None, "tie_word_embeddings": True,
}  # fmt: skip
T5: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_decoder_layers": 1, "num_heads": 4, "pad_token_id": 0,
    "eos_token_id": 1, "decoder_start_token_id": 0, "relative_attention_num_buckets": 8, "tie_word_embeddings": True,
}  # fmt: skip
OF_T5: Attention = {
    "q": ("*Attention.q.weight",), "k": ("*Attention.k.weight",), "v": ("*Attention.v.weight",), "out": ("*Attention.o.weight",),
}  # fmt: skip
QKV = {"q": ("*.query*.weight", "*.q_proj.weight"), "k": ("*.key*.weight", "*.k_proj.weight"), "v": ("*.value*.weight", "*.v_proj.weight")}
SHARED = "*shared.weight"
LOCAL: Attention = {**QKV, "out": ("*.out_proj.weight", "*.self_attn.output.weight")}
"""BigBird and LED: the encoder's output projection lies beside the module of the other three."""
PROPHET: Attention = {
    "q": ("*.query_proj.weight",),
    "k": ("*.key_proj.weight",),
    "v": ("*.value_proj.weight",),
    "out": ("*.out_proj.weight",),
}


def both(model: Any) -> dict[str, Any]:
    return {"input_ids": torch.tensor([[5, 7, 11]]), "decoder_input_ids": torch.tensor([[5, 7, 11]])}


def _of(name: str, model: str, config: dict[str, Any], attention: Attention, tied: str = "*shared.weight", **more: Any) -> Family:
    return Family(name, "encoder-decoders", hf(model, config), tied=tied, attention=attention, inputs=both, **more)


FAMILIES = [
    _of("t5", "T5ForConditionalGeneration", T5, OF_T5, "shared.weight", default=True),
    _of("t5, backbone", "T5Model", T5, OF_T5, ""),
    _of("t5, encoder", "T5EncoderModel", T5, OF_T5, "", note="the last wo is a layer of the backbone", default=True),
    _of("t5, answers", "T5ForQuestionAnswering", T5, OF_T5, "", heads=("qa_outputs.weight",)),
    _of(
        "mt5",
        "MT5ForConditionalGeneration",
        {**T5, "tie_word_embeddings": False, "feed_forward_proj": "gated-gelu"},
        OF_T5,
        "shared.weight",
    ),
    _of("umt5", "UMT5ForConditionalGeneration", T5, OF_T5, "shared.weight"),
    _of("longt5", "LongT5ForConditionalGeneration", {**T5, "local_radius": 4}, OF_T5, "shared.weight"),
    _of(
        "switch_transformers",
        "SwitchTransformersForConditionalGeneration",
        {**T5, "num_experts": 4, "num_sparse_encoder_layers": 1, "num_sparse_decoder_layers": 1},
        OF_T5,
        "shared.weight",
        note="experts are Linears of their own",
    ),
    _of(
        "nllb-moe",
        "NllbMoeForConditionalGeneration",
        {**BART, "num_experts": 4, "encoder_sparse_step": 1, "decoder_sparse_step": 1, "expert_capacity": 8},
        {**OUT_PROJ, "out": ("*.self_attn.out_proj.weight", "*.cross_attention.out_proj.weight")},
        note="experts are Linears of their own",
    ),
    _of("bart", "BartForConditionalGeneration", BART, OUT_PROJ),
    _of("bart, classes of texts", "BartForSequenceClassification", BART, OUT_PROJ, "", heads=("classification_head.out_proj.weight",)),
    _of("bart, backbone", "BartModel", BART, OUT_PROJ, ""),
    _of("mbart", "MBartForConditionalGeneration", BART, OUT_PROJ),
    _of("pegasus", "PegasusForConditionalGeneration", BART, OUT_PROJ),
    _of("pegasus_x", "PegasusXForConditionalGeneration", {**BART, "num_global_tokens": 4, "block_size": 8}, OUT_PROJ),
    _of("bigbird_pegasus", "BigBirdPegasusForConditionalGeneration", {**BART, "attention_type": "original_full"}, LOCAL),
    _of("marian", "MarianMTModel", {**BART, "decoder_vocab_size": 64}, OUT_PROJ),
    _of("m2m_100", "M2M100ForConditionalGeneration", BART, OUT_PROJ),
    _of("blenderbot", "BlenderbotForConditionalGeneration", BART, OUT_PROJ),
    _of("blenderbot-small", "BlenderbotSmallForConditionalGeneration", BART, OUT_PROJ),
    _of("mvp", "MvpForConditionalGeneration", BART, OUT_PROJ),
    _of("plbart", "PLBartForConditionalGeneration", BART, OUT_PROJ),
    _of(
        "led",
        "LEDForConditionalGeneration",
        {**BART, "max_encoder_position_embeddings": 32, "max_decoder_position_embeddings": 32, "attention_window": 4},
        LOCAL,
    ),
    _of(
        "prophetnet",
        "ProphetNetForConditionalGeneration",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_encoder_layers": 1,
            "num_decoder_layers": 1,
            "num_encoder_attention_heads": 4,
            "num_decoder_attention_heads": 4,
            "max_position_embeddings": 32,
            "num_buckets": 8,
            "pad_token_id": 0,
            "tie_word_embeddings": True,
        },
        PROPHET,
        "*word_embeddings.weight",
        note="relative_pos_embeddings is a Linear",
    ),
    _of(
        "fsmt",
        "FSMTForConditionalGeneration",
        {**{k: v for k, v in BART.items() if k != "vocab_size"}, "langs": ["en", "de"], "src_vocab_size": 64, "tgt_vocab_size": 64},
        OUT_PROJ,
        "*embed_tokens.weight",
    ),
]
