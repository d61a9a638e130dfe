"""Decoders under other heads than the one for the next word, and bare."""

from __future__ import annotations

from typing import Any

from census.decoders import GPT2
from census.family import Family, hf, tokens
from census.words import LLAMA, SEPARATE, fused

LABELS = {"num_labels": 5}
OF_GPT2: dict[str, Any] = {
    "attention": fused("*.attn.c_attn.weight", "*.attn.c_proj.weight"),
    "table": {"*.attn.c_attn.weight": ("hidden", "i (m o)")},
}
BARE_GPT2: dict[str, Any] = {
    "attention": fused("h.*.attn.c_attn.weight", "h.*.attn.c_proj.weight"),
    "table": {"h.*.attn.c_attn.weight": ("hidden", "i (m o)")},
}
OF_LLAMA: dict[str, Any] = {"attention": SEPARATE}


def _of(name: str, model: str, config: dict[str, Any], **more: Any) -> Family:
    return Family(name, "heads", hf(model, config), **{"inputs": tokens, **more})


FAMILIES = [
    _of(
        "gpt2, two heads",
        "GPT2DoubleHeadsModel",
        GPT2,
        heads=("multiple_choice_head.summary.weight",),
        tied="*.wte.weight",
        note="one tied, one for the choice",
        default=True,
        **OF_GPT2,
    ),
    _of(
        "gpt2, classes of texts", "GPT2ForSequenceClassification", {**GPT2, **LABELS, "pad_token_id": 0}, heads=("score.weight",), **OF_GPT2
    ),
    _of("gpt2, classes of words", "GPT2ForTokenClassification", {**GPT2, **LABELS}, heads=("classifier.weight",), **OF_GPT2),
    _of("gpt2, answers", "GPT2ForQuestionAnswering", GPT2, heads=("qa_outputs.weight",), **OF_GPT2),
    _of("gpt2, backbone", "GPT2Model", GPT2, **BARE_GPT2),
    _of("llama, backbone", "LlamaModel", LLAMA, note="the last down_proj is a layer of the backbone", default=True, **OF_LLAMA),
    _of("llama, classes of texts", "LlamaForSequenceClassification", {**LLAMA, **LABELS}, heads=("score.weight",), **OF_LLAMA),
    _of("llama, classes of words", "LlamaForTokenClassification", {**LLAMA, **LABELS}, heads=("score.weight",), **OF_LLAMA),
    _of("llama, answers", "LlamaForQuestionAnswering", LLAMA, heads=("qa_outputs.weight",), **OF_LLAMA),
    _of(
        "openai-gpt, two heads",
        "OpenAIGPTDoubleHeadsModel",
        {**GPT2, "n_ctx": 32},
        heads=("multiple_choice_head.summary.weight",),
        tied="*.tokens_embed.weight",
        **OF_GPT2,
    ),
    _of(
        "gpt_neox, classes of texts",
        "GPTNeoXForSequenceClassification",
        {**LLAMA, **LABELS},
        heads=("score.weight",),
        sizes={"h": 4},
        attention=fused("*.query_key_value.weight", "*.attention.dense.weight"),
        table={"*.query_key_value.weight": ("hidden", "(h m o) i")},
    ),
    _of(
        "mixtral, backbone",
        "MixtralModel",
        {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
        sizes={"s": 2},
        table={"*.gate.weight": ("hidden", "o i"), "*.gate_up_proj": ("hidden", "e o i|e (s o) i"), "*.down_proj": ("hidden", "e o i")},
        **OF_LLAMA,
    ),
    _of("qwen3, classes of texts", "Qwen3ForSequenceClassification", {**LLAMA, **LABELS}, heads=("score.weight",), **OF_LLAMA),
]
