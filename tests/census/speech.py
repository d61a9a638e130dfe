"""Speech, sound and music."""

from __future__ import annotations

from typing import Any

from census.family import Attention, Family, Table, hf
from census.words import BERT, OUT_PROJ, SEPARATE, fused

WAV2VEC: dict[str, Any] = {
    "vocab_size": 24, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48, "conv_dim": (8, 8),
    "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_conv_pos_embeddings": 8, "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16, "feat_extract_norm": "layer", "num_labels": 5,
}  # fmt: skip
WEIGHT_NORM: Table = {"*.original0": ("gain", ""), "*.original1": ("conv", "(s o) i k")}
"""torch's weight_norm keeps a weight as a length, one a unit or a tap, and a direction of the weight's own shape."""
BART: dict[str, Any] = {
    "vocab_size": 64, "d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 4, "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_source_positions": 16, "max_target_positions": 16, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
LINEAR: Attention = {"q": ("*.linear_q.weight",), "k": ("*.linear_k.weight",), "v": ("*.linear_v.weight",), "out": ("*.linear_out.weight",)}
DEBERTA: Attention = {
    "q": ("*.query_proj.weight",),
    "k": ("*.key_proj.weight",),
    "v": ("*.value_proj.weight",),
    "out": ("*.attention.output.dense.weight",),
}
LAST: Table = {"conv_post.weight": ("conv|head", ""), "decoder.conv_post.weight": ("conv|head", "")}
"""A vocoder's last convolution gives the wave: an output layer, and a filter as the others."""


def _of(name: str, model: str, config: dict[str, Any], attention: Attention = OUT_PROJ, table: Table | None = None, **more: Any) -> Family:
    return Family(name, "speech", hf(model, config), attention=attention, table=table or {}, **more)


def _ctc(
    name: str, model: str, config: dict[str, Any] | None = None, attention: Attention = OUT_PROJ, table: Table | None = None, **more: Any
) -> Family:
    """Under the head for connectionist temporal classification."""
    given = {"heads": ("lm_head.weight",), "sizes": {"s": 2}, **more}
    return _of(name, model, {**WAV2VEC, **(config or {})}, attention, {**(table or {}), **WEIGHT_NORM}, **given)


FAMILIES = [
    _ctc("wav2vec2", "Wav2Vec2ForCTC", default=True),
    _ctc("wav2vec2, classes", "Wav2Vec2ForSequenceClassification", heads=("classifier.weight",), note="the projector is a hidden layer"),
    _ctc(
        "wav2vec2, pretraining",
        "Wav2Vec2ForPreTraining",
        {"num_codevectors_per_group": 8, "codevector_dim": 16, "proj_codevector_dim": 16},
        OUT_PROJ,
        {"quantizer.codevectors": ("other|embedding", ""), "project_*.weight": ("hidden|head", "o i")},
        heads=(),
        note="what it gives are two projections",
    ),
    _ctc("hubert", "HubertForCTC"),
    _ctc("wavlm", "WavLMForCTC", None, OUT_PROJ, {"*.gru_rel_pos_const": ("gain|other", "")}),
    _ctc("sew", "SEWForCTC", {"squeeze_factor": 2}),
    _ctc("sew-d", "SEWDForCTC", {"squeeze_factor": 2, "position_buckets": 8, "max_position_embeddings": 16}, DEBERTA),
    _ctc("unispeech", "UniSpeechForCTC"),
    _ctc("unispeech-sat", "UniSpeechSatForCTC"),
    _ctc("data2vec-audio", "Data2VecAudioForCTC", {"num_conv_pos_embeddings": 2, "conv_pos_kernel_size": 5}),
    _ctc(
        "wav2vec2-conformer",
        "Wav2Vec2ConformerForCTC",
        None,
        LINEAR,
        {"*.pos_bias_?": ("bias|other", "")},
        note="linear_pos projects positions",
    ),
    _ctc("wav2vec2-bert", "Wav2Vec2BertForCTC", {"feature_projection_input_dim": 16}, LINEAR),
    _of("whisper", "WhisperForConditionalGeneration", {**BART, "num_mel_bins": 8}, tied="*embed_tokens.weight", default=True),
    _of(
        "whisper, classes",
        "WhisperForAudioClassification",
        {**BART, "num_mel_bins": 8, "classifier_proj_size": 16},
        heads=("classifier.weight",),
    ),
    _of(
        "speech_to_text",
        "Speech2TextForConditionalGeneration",
        {**BART, "input_feat_per_channel": 8, "conv_channels": 16},
        tied="*embed_tokens.weight",
    ),
    _of(
        "speecht5",
        "SpeechT5ForSpeechToText",
        {
            **WAV2VEC,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "tie_word_embeddings": True,
        },
        OUT_PROJ,
        WEIGHT_NORM,
        sizes={"s": 2},
        tied="*embed_tokens.weight",
    ),
    _of(
        "moonshine",
        "MoonshineForConditionalGeneration",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "encoder_num_hidden_layers": 1,
            "decoder_num_hidden_layers": 1,
            "encoder_num_attention_heads": 4,
            "decoder_num_attention_heads": 4,
            "tie_word_embeddings": True,
        },
        {**SEPARATE, "out": ("*.o_proj.weight",)},
        {"model.decoder.*.fc1.weight": ("hidden", "o i|(s o) i")},
        sizes={"s": 2},
        tied="*embed_tokens.weight",
    ),
    _of(
        "audio-spectrogram-transformer",
        "ASTForAudioClassification",
        {
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "num_mel_bins": 32,
            "max_length": 32,
        },
        SEPARATE,
        {"*_token": ("other|embedding", ""), "*.position_embeddings": ("other|embedding", "")},
        heads=("classifier.dense.weight",),
    ),
    _of(
        "clap, text",
        "ClapTextModel",
        {
            "vocab_size": 64,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "intermediate_size": 48,
            "max_position_embeddings": 16,
        },
        BERT,
    ),
    _of(
        "musicgen, decoder",
        "MusicgenForCausalLM",
        {
            "vocab_size": 32,
            "hidden_size": 32,
            "num_hidden_layers": 1,
            "num_attention_heads": 4,
            "ffn_dim": 48,
            "num_codebooks": 2,
            "max_position_embeddings": 16,
        },
        heads=("lm_heads.0.weight", "lm_heads.1.weight"),
        note="a head for every codebook",
    ),
    _of(
        "bark, semantic",
        "BarkSemanticModel",
        {"hidden_size": 32, "num_layers": 1, "num_heads": 4, "block_size": 16, "input_vocab_size": 32, "output_vocab_size": 32},
        fused("*.att_proj.weight", "*.attn.out_proj.weight"),
        {"*.att_proj.weight": ("hidden", "(m o) i")},
        heads=("lm_head.weight",),
        note="mlp.in_proj and mlp.out_proj are no attention",
    ),
    _of(
        "encodec",
        "EncodecModel",
        {"num_filters": 4, "hidden_size": 16, "codebook_size": 16, "upsampling_ratios": [2, 2], "num_lstm_layers": 1},
        {},
        {
            "*.original0": ("gain", ""),
            "encoder.layers.*.original1": ("conv", "o i k"),
            "decoder.layers.*.original1": ("conv|head", "o i k|i o k"),
            "*.lstm.weight_*": ("recurrent", "(s o) i"),
        },
        sizes={"s": 4},
        normalised=False,
        note="its normalisation is of weights, by parametrization; which convolutions are transposed, their modules say",
    ),
    _of(
        "univnet",
        "UnivNetModel",
        {"model_in_channels": 8, "model_hidden_channels": 8, "num_mel_bins": 8, "kernel_predictor_hidden_channels": 8},
        {},
        {"conv_post.weight": ("conv|head", "o i k")},
        normalised=False,
    ),
    _of(
        "dac",
        "DacModel",
        {
            "encoder_hidden_size": 4,
            "downsampling_ratios": [2, 2],
            "decoder_hidden_size": 16,
            "n_codebooks": 2,
            "codebook_size": 16,
            "codebook_dim": 4,
            "upsampling_ratios": [2, 2],
        },
        {},
        {"*.alpha": ("gain|other", ""), "decoder.conv2.weight": ("conv|head", "o i k")},
        normalised=False,
    ),
]
