"""Encoders of text, under the heads that people put on them."""

from __future__ import annotations

from typing import Any

from census.family import Attention, Family, Table, hf, tokens
from census.words import BERT, LLAMA, SEPARATE, fused

SMALL: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 40, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "tie_word_embeddings": True,
}  # fmt: skip
WORDS = "*.word_embeddings.weight"
LIN: Attention = {"q": ("*.q_lin.weight",), "k": ("*.k_lin.weight",), "v": ("*.v_lin.weight",), "out": ("*.out_lin.weight",)}
GLOBAL: Attention = {"q": ("*.query.weight", "*.query_global.weight"), "k": ("*.key.weight", "*.key_global.weight"),
                     "v": ("*.value.weight", "*.value_global.weight"), "out": ("*.attention.output.dense.weight",)}  # fmt: skip
"""Longformer has a second set of projections for tokens that attend to everything."""
FUNNEL_TABLE: Table = {"*.r_kernel": ("hidden", "i h o"), "*.r_?_bias": ("bias", ""), "*.seg_embed": ("other|embedding", "")}
CONVBERT_TABLE: Table = {"*.key_conv_attn_layer.bias": ("bias", "")}


NOT = object()
"""An option of `SMALL` that the family refuses."""


def _of(name: str, model: str, config: dict[str, Any] | None = None, attention: Attention = BERT, **more: Any) -> Family:
    given = {key: value for key, value in {**SMALL, **(config or {})}.items() if value is not NOT}
    return Family(name, "encoders", hf(model, given), attention=attention, **{"inputs": tokens, **more})


def _filling(
    name: str, model: str, config: dict[str, Any] | None = None, attention: Attention = BERT, tied: str = WORDS, **more: Any
) -> Family:
    """Under its head for masked words, whose last layer is the table of the words."""
    return _of(name, model, config, attention, tied=tied, **more)


FAMILIES = [
    _filling("bert", "BertForMaskedLM"),
    _of(
        "bert, pretraining",
        "BertForPreTraining",
        heads=("cls.seq_relationship.weight",),
        tied=WORDS,
        note="two heads, one of them tied",
        default=True,
    ),
    _of("bert, backbone", "BertModel", note="the pooler is a layer of the backbone", default=True),
    _of("bert, classes of texts", "BertForSequenceClassification", heads=("classifier.weight",)),
    _of("bert, classes of words", "BertForTokenClassification", heads=("classifier.weight",)),
    _of("bert, answers", "BertForQuestionAnswering", heads=("qa_outputs.weight",), default=True),
    _of("bert, choices", "BertForMultipleChoice", heads=("classifier.weight",)),
    _filling("roberta", "RobertaForMaskedLM"),
    _of(
        "roberta, classes of texts",
        "RobertaForSequenceClassification",
        heads=("classifier.out_proj.weight",),
        note="the head has a hidden layer, classifier.dense",
    ),
    _filling(
        "xlm-roberta", "XLMRobertaForMaskedLM", tied="lm_head.decoder.weight", note="the head is registered before the table that it shares"
    ),
    _filling("camembert", "CamembertForMaskedLM", tied="lm_head.decoder.weight"),
    _filling("electra", "ElectraForMaskedLM", {"embedding_size": 16}),
    _of(
        "electra, replaced words",
        "ElectraForPreTraining",
        {"embedding_size": 16},
        heads=("discriminator_predictions.dense_prediction.weight",),
    ),
    _filling(
        "albert",
        "AlbertForMaskedLM",
        {"embedding_size": 16},
        {**BERT, "out": ("*.attention.dense.weight",)},
        note="one layer, used several times",
    ),
    _filling("distilbert", "DistilBertForMaskedLM", {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}, LIN),
    _of(
        "distilbert, classes of texts",
        "DistilBertForSequenceClassification",
        {"dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
        LIN,
        heads=("classifier.weight",),
        note="pre_classifier is a hidden layer",
    ),
    _filling(
        "deberta",
        "DebertaForMaskedLM",
        {"relative_attention": True, "pos_att_type": ["c2p", "p2c"]},
        fused("*.in_proj.weight", "*.attention.output.dense.weight"),
        table={"*.in_proj.weight": ("hidden", "(h m o) i")},
        sizes={"h": 4},
        note="pos_proj and pos_q_proj project positions",
    ),
    _filling(
        "deberta-v2",
        "DebertaV2ForMaskedLM",
        None,
        {
            "q": ("*.query_proj.weight",),
            "k": ("*.key_proj.weight",),
            "v": ("*.value_proj.weight",),
            "out": ("*.attention.output.dense.weight",),
        },
    ),
    _filling(
        "modernbert",
        "ModernBertForMaskedLM",
        None,
        fused("*.Wqkv.weight", "*.attn.Wo.weight"),
        "*.tok_embeddings.weight",
        table={"*.Wqkv.weight": ("hidden", "(m o) i"), "*.mlp.Wi.weight": ("hidden", "o i|(s o) i")},
        sizes={"s": 2},
        default=True,
    ),
    _of(
        "modernbert, classes of words",
        "ModernBertForTokenClassification",
        None,
        fused("*.Wqkv.weight", "*.attn.Wo.weight"),
        heads=("classifier.weight",),
        table={"*.Wqkv.weight": ("hidden", "(m o) i"), "*.mlp.Wi.weight": ("hidden", "o i|(s o) i")},
        sizes={"s": 2},
    ),
    _filling("xlm", "XLMWithLMHeadModel", {"emb_dim": 32, "n_layers": 2, "n_heads": 4}, LIN, "*.embeddings.weight"),
    _filling("flaubert", "FlaubertWithLMHeadModel", {"emb_dim": 32, "n_layers": 2, "n_heads": 4}, LIN, "*.embeddings.weight"),
    _filling(
        "funnel",
        "FunnelForMaskedLM",
        {"num_hidden_layers": NOT, "d_model": 32, "n_head": 4, "d_head": 8, "d_inner": 48, "block_sizes": [1, 1], "num_decoder_layers": 1},
        {
            "q": ("*.q_head.weight",),
            "k": ("*.k_head.weight",),
            "v": ("*.v_head.weight",),
            "out": ("*.post_proj.weight",),
            "free": ("*.r_kernel",),
        },
        table=FUNNEL_TABLE,
        note="r_kernel projects positions: einsum 'td,dnh->tnh'",
    ),
    _filling(
        "mpnet",
        "MPNetForMaskedLM",
        None,
        {"q": ("*.attn.q.weight",), "k": ("*.attn.k.weight",), "v": ("*.attn.v.weight",), "out": ("*.attn.o.weight",)},
    ),
    _filling("convbert", "ConvBertForMaskedLM", {"embedding_size": 16}, table=CONVBERT_TABLE),
    _filling(
        "squeezebert",
        "SqueezeBertForMaskedLM",
        {
            "embedding_size": 32,
            "q_groups": 2,
            "k_groups": 2,
            "v_groups": 2,
            "post_attention_groups": 1,
            "intermediate_groups": 2,
            "output_groups": 2,
        },
        {"free": ("*.attention.*.weight", "*.post_attention.*")},
        note="its projections are convolutions of width 1",
    ),
    _filling(
        "mobilebert",
        "MobileBertForMaskedLM",
        {"embedding_size": 32, "hidden_size": 64, "intra_bottleneck_size": 32, "true_hidden_size": 32, "num_feedforward_networks": 2},
        table={"cls.predictions.dense.weight": ("hidden|head", "o i|i o")},
        note="its scores are hidden @ concat(word table.T, cls.predictions.dense): the second is a part of the head",
    ),
    _filling("longformer", "LongformerForMaskedLM", {"attention_window": 4}, GLOBAL),
    _filling("big_bird", "BigBirdForMaskedLM", {"attention_type": "original_full"}),
    _of(
        "rembert",
        "RemBertForMaskedLM",
        {"input_embedding_size": 16, "output_embedding_size": 24, "tie_word_embeddings": False},
        heads=("cls.predictions.decoder.weight",),
        note="its tables of input and output differ in size",
    ),
    _filling("roformer", "RoFormerForMaskedLM", {"embedding_size": 32}),
    _filling("nystromformer", "NystromformerForMaskedLM", {"num_landmarks": 4, "segment_means_seq_len": 8, "conv_kernel_size": 5}),
    _filling("yoso", "YosoForMaskedLM"),
    _filling("fnet", "FNetForMaskedLM", None, {}, note="Fourier transforms in the place of attention"),
    _filling("mra", "MraForMaskedLM", {"block_per_row": 1, "num_block": 1}),
    _filling("esm", "EsmForMaskedLM", {"mask_token_id": 3}),
    _of(
        "ibert",
        "IBertForMaskedLM",
        table={
            "*_embeddings.weight": ("embedding", "o i"),
            "ibert.encoder.*.LayerNorm.weight": ("gain", ""),
            "ibert.encoder.*.weight": ("hidden", "o i"),
        },
        note="layers of its own classes, quantised where asked: F.linear and F.embedding of a float weight; the head is tied",
    ),
    _filling("megatron-bert", "MegatronBertForMaskedLM"),
    _filling("data2vec-text", "Data2VecTextForMaskedLM"),
    _filling("ernie", "ErnieForMaskedLM"),
    _filling("xmod", "XmodForMaskedLM", note="adapters of every language, two Linears each"),
    _filling("nomic_bert", "NomicBertForMaskedLM", None, SEPARATE),
    _of("eurobert", "EuroBertForMaskedLM", {**LLAMA, "tie_word_embeddings": False}, SEPARATE, heads=("lm_head.weight",)),
    _filling("layoutlm", "LayoutLMForMaskedLM", {"max_2d_position_embeddings": 32}),
    _of(
        "layoutlmv3, answers",
        "LayoutLMv3ForQuestionAnswering",
        {"input_size": 32, "patch_size": 16, "max_2d_position_embeddings": 32, "coordinate_size": 6, "shape_size": 4},
        heads=("qa_outputs.out_proj.weight",),
        table={"*.cls_token": ("other|embedding", ""), "*.pos_embed": ("other|embedding", "")},
    ),
    _of(
        "tapas, answers",
        "TapasForQuestionAnswering",
        heads=(),
        table={"output_weights": ("gain|other|head", ""), "column_output_weights": ("gain|other|head", "")},
        note="its head is a bare vector",
    ),
    _of(
        "canine, answers",
        "CanineForQuestionAnswering",
        {"num_hash_buckets": 16, "max_position_embeddings": 64, "downsampling_rate": 4, "local_transformer_stride": 8},
        heads=("qa_outputs.weight",),
    ),
    _of(
        "splinter, answers",
        "SplinterForQuestionAnswering",
        heads=(),
        table={"splinter_qass.*_classifier.weight": ("hidden|head", "o i")},
        note="scores are products of two projections",
    ),
    _of(
        "lxmert, answers",
        "LxmertForQuestionAnswering",
        {"l_layers": 1, "x_layers": 1, "r_layers": 1, "visual_feat_dim": 24, "num_qa_labels": 5},
        {**BERT, "out": ("*ttention.output.dense.weight", "*self_att.output.dense.weight")},
        heads=("answer_head.logit_fc.3.weight",),
    ),
    _of("visual_bert, answers", "VisualBertForQuestionAnswering", {"visual_embedding_dim": 24}, heads=("cls.weight",)),
    _of(
        "luke, classes of entities",
        "LukeForEntityClassification",
        {"entity_vocab_size": 16, "entity_emb_size": 8, "use_entity_aware_attention": False},
        heads=("classifier.weight",),
    ),
    _of(
        "xlnet, answers",
        "XLNetForQuestionAnsweringSimple",
        {"max_position_embeddings": NOT, "d_model": 32, "n_layer": 2, "n_head": 4, "d_inner": 48},
        {"q": ("*.rel_attn.q",), "k": ("*.rel_attn.k",), "v": ("*.rel_attn.v",), "out": ("*.rel_attn.o",), "free": ("*.rel_attn.r",)},
        table={
            "*.rel_attn.o": ("hidden", "o i i"),
            "*.rel_attn.[qkvr]": ("hidden", "i h o"),
            "*.r_?_bias": ("bias", ""),
            "*.seg_embed": ("other|embedding", ""),
            "*.mask_emb": ("other|embedding", ""),
        },
        heads=("qa_outputs.weight",),
    ),
    _of(
        "reformer",
        "ReformerModelWithLMHead",
        {
            "attention_head_size": 8,
            "attn_layers": ["local", "lsh"],
            "axial_pos_shape": [4, 8],
            "axial_pos_embds_dim": [16, 16],
            "feed_forward_size": 48,
            "is_decoder": True,
            "tie_word_embeddings": False,
            "num_buckets": 2,
            "lsh_attn_chunk_length": 4,
            "local_attn_chunk_length": 4,
        },
        {
            "q": ("*.query.weight",),
            "k": ("*.key.weight",),
            "v": ("*.self_attention.value.weight",),
            "out": ("*.attention.output.dense.weight",),
            "free": ("*.query_key.weight",),
        },
        heads=("lm_head.decoder.weight",),
        table={"*.position_embeddings.weights.*": ("other|embedding", "")},
    ),
    _of(
        "perceiver",
        "PerceiverForMaskedLM",
        {
            "num_latents": 8,
            "d_latents": 32,
            "d_model": 32,
            "num_self_attends_per_block": 1,
            "num_blocks": 1,
            "num_self_attention_heads": 4,
            "num_cross_attention_heads": 4,
        },
        {
            "q": ("*.self.query.weight",),
            "k": ("*.self.key.weight",),
            "v": ("*.self.value.weight",),
            "out": ("*.attention.output.dense.weight",),
        },
        heads=(),
        tied="",
        table={"*.latents": ("other|embedding", ""), "*.output_position_encodings.position_embeddings": ("other|embedding", "")},
        note="its scores are products with the table of the words",
    ),
]
