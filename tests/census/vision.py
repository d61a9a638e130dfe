"""Images and video, alone and beside text."""

from __future__ import annotations

from typing import Any

import torch

from census.family import Attention, Family, Table, hf
from census.words import BERT, OUT_PROJ, SEPARATE, fused

VIT: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 32, "patch_size": 16,
    "num_labels": 5,
}  # fmt: skip
VIT_TABLE: Table = {
    "*_tokens": ("other|embedding", ""),
    "*_token": ("other|embedding", ""),
    "*.position_embeddings": ("other|embedding", ""),
}
TOKEN, POSITION = {"*_token": ("other|embedding", "")}, {"*.position_embeddings": ("other|embedding", "")}
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
TEXT = {
    **TOWER,
    "vocab_size": 64,
    "max_position_embeddings": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
    "projection_dim": 16,
}
IMAGE = {**TOWER, "image_size": 32, "patch_size": 16, "projection_dim": 16}
CLIP = {"text_config": TEXT, "vision_config": IMAGE, "projection_dim": 16}
PROJECTIONS: Table = {"*_projection.weight": ("head|hidden", "o i")}
"""Each tower's last layer gives what the model returns, and what the scores are products of: a head of the tower."""
GATE: Table = {"*gamma*": ("gain|other", ""), "*lambda*": ("gain|other", "")}
CLASSIFIER: dict[str, Any] = {"heads": ("classifier.weight",)}
QKV_OUT: Attention = {"qkv": ("*.qkv.weight",), "out": ("*.attn.proj.weight",)}


def pixels(model: Any) -> dict[str, Any]:
    torch.manual_seed(0)
    return {"pixel_values": torch.randn(1, 3, 32, 32)}


def _of(
    name: str, model: str, config: dict[str, Any], attention: Attention | None = None, table: Table | None = None, **more: Any
) -> Family:
    return Family(name, "vision", hf(model, config), attention=attention or {}, table=table or {}, **{"inputs": pixels, **more})


SWIN = {"embed_dim": 16, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2, "image_size": 32, "patch_size": 4, "num_labels": 5}
STAGES = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_stages": 2, "num_labels": 5}
RESNET = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 5}
PYRAMID = {
    "depths": [1, 1],
    "num_encoder_blocks": 2,
    "hidden_sizes": [8, 16],
    "num_attention_heads": [1, 2],
    "sr_ratios": [2, 1],
    "mlp_ratios": [2, 2],
    "patch_sizes": [7, 3],
    "strides": [4, 2],
    "num_labels": 5,
    "decoder_hidden_size": 16,
    "image_size": 32,
}

FAMILIES = [
    _of("vit", "ViTForImageClassification", VIT, SEPARATE, VIT_TABLE, default=True, **CLASSIFIER),
    _of(
        "vit, backbone",
        "ViTModel",
        VIT,
        SEPARATE,
        {"*cls_token": VIT_TABLE["*_token"], "*position_embeddings": VIT_TABLE["*.position_embeddings"]},
    ),
    _of(
        "vit, masked pixels",
        "ViTForMaskedImageModeling",
        {**VIT, "encoder_stride": 16},
        SEPARATE,
        VIT_TABLE,
        heads=("decoder.0.weight",),
        note="the head is a convolution of width 1 before a PixelShuffle",
    ),
    _of("deit", "DeiTForImageClassification", VIT, SEPARATE, VIT_TABLE, **CLASSIFIER),
    _of(
        "deit, with teacher",
        "DeiTForImageClassificationWithTeacher",
        VIT,
        SEPARATE,
        VIT_TABLE,
        heads=("cls_classifier.weight", "distillation_classifier.weight"),
        note="two heads",
    ),
    _of(
        "beit",
        "BeitForImageClassification",
        {**VIT, "use_relative_position_bias": True},
        SEPARATE,
        {**VIT_TABLE, "*relative_position_bias_table": ("other|embedding|bias", "")},
        **CLASSIFIER,
    ),
    _of("data2vec-vision", "Data2VecVisionForImageClassification", VIT, BERT, VIT_TABLE, **CLASSIFIER),
    _of("dinov2", "Dinov2ForImageClassification", VIT, SEPARATE, VIT_TABLE, **CLASSIFIER),
    _of("dinov2_with_registers", "Dinov2WithRegistersForImageClassification", VIT, SEPARATE, VIT_TABLE, **CLASSIFIER),
    _of("dinov3_vit", "DINOv3ViTModel", VIT, SEPARATE, {"*_token*": ("other|embedding", "")}),
    _of("ijepa", "IJepaForImageClassification", VIT, SEPARATE, VIT_TABLE, **CLASSIFIER),
    _of("vit_msn", "ViTMSNForImageClassification", VIT, SEPARATE, VIT_TABLE, **CLASSIFIER),
    _of(
        "vit_mae",
        "ViTMAEForPreTraining",
        {
            **VIT,
            "decoder_hidden_size": 16,
            "decoder_num_hidden_layers": 1,
            "decoder_num_attention_heads": 2,
            "decoder_intermediate_size": 24,
        },
        SEPARATE,
        {**VIT_TABLE, "*_pos_embed": ("other|embedding", "")},
        heads=("decoder.decoder_pred.weight",),
    ),
    _of("videomae", "VideoMAEForVideoClassification", {**VIT, "num_frames": 2}, BERT, **CLASSIFIER),
    _of("vivit", "VivitForVideoClassification", {**VIT, "num_frames": 2, "tubelet_size": [2, 16, 16]}, SEPARATE, VIT_TABLE, **CLASSIFIER),
    _of(
        "timesformer",
        "TimesformerForVideoClassification",
        {**VIT, "num_frames": 2},
        fused("*.attention.qkv.weight", "*attention.output.dense.weight"),
        {**VIT_TABLE, "*.time_embeddings": ("other|embedding", ""), "*.qkv.weight": ("hidden", "(m o) i")},
        **CLASSIFIER,
    ),
    _of(
        "swin", "SwinForImageClassification", SWIN, SEPARATE, {"*relative_position_bias_table": ("other|embedding|bias", "")}, **CLASSIFIER
    ),
    _of("swinv2", "Swinv2ForImageClassification", SWIN, BERT, {"*.logit_scale": ("gain|other", "")}, **CLASSIFIER),
    _of("donut-swin", "DonutSwinModel", SWIN, BERT, {"*relative_position_bias_table": ("other|embedding|bias", "")}),
    _of(
        "hiera",
        "HieraForImageClassification",
        {
            "embed_dim": 16,
            "depths": [1, 1],
            "num_heads": [1, 2],
            "image_size": [32, 32],
            "query_stride": [2, 2],
            "num_query_pool": 1,
            "masked_unit_size": [4, 4],
            "masked_unit_attention": [True, False],
            "num_labels": 5,
        },
        QKV_OUT,
        {"*.position_embeddings": ("other|embedding", ""), "*.qkv.weight": ("hidden", "(m o) i")},
        **CLASSIFIER,
    ),
    _of("convnext", "ConvNextForImageClassification", STAGES, **CLASSIFIER),
    _of(
        "convnextv2",
        "ConvNextV2ForImageClassification",
        STAGES,
        None,
        {"*.grn.weight": ("gain", ""), "*.grn.bias": ("bias", "")},
        **CLASSIFIER,
    ),
    _of("resnet", "ResNetForImageClassification", RESNET, heads=("classifier.1.weight",), default=True),
    _of("regnet", "RegNetForImageClassification", {**RESNET, "groups_width": 4}, heads=("classifier.1.weight",)),
    _of("bit", "BitForImageClassification", {**RESNET, "num_groups": 2}, heads=("classifier.1.weight",)),
    _of("mobilenet_v1", "MobileNetV1ForImageClassification", {"depth_multiplier": 0.125, "min_depth": 4, "num_labels": 5}, **CLASSIFIER),
    _of("mobilenet_v2", "MobileNetV2ForImageClassification", {"depth_multiplier": 0.125, "min_depth": 4, "num_labels": 5}, **CLASSIFIER),
    _of(
        "mobilenet_v2, segmentation",
        "MobileNetV2ForSemanticSegmentation",
        {"depth_multiplier": 0.125, "min_depth": 4, "num_labels": 5},
        heads=("segmentation_head.classifier.convolution.weight",),
        note="the head is a convolution",
    ),
    _of(
        "mobilevit",
        "MobileViTForImageClassification",
        {
            "hidden_sizes": [8, 16, 16],
            "neck_hidden_sizes": [4, 4, 8, 8, 8, 8, 16],
            "num_attention_heads": 2,
            "image_size": 32,
            "num_labels": 5,
            "expand_ratio": 2.0,
        },
        BERT,
        **CLASSIFIER,
    ),
    _of(
        "mobilevitv2",
        "MobileViTV2ForImageClassification",
        {"width_multiplier": 0.25, "image_size": 32, "num_labels": 5, "base_attn_unit_dims": [16, 16, 16]},
        {"free": ("*.qkv_proj.*", "*.attention.out_proj.*")},
        {"*.qkv_proj.convolution.weight": ("conv", "o i k k|(m o) i k k")},
        note="separable attention: one query channel",
        **CLASSIFIER,
    ),
    _of(
        "efficientnet",
        "EfficientNetForImageClassification",
        {"width_coefficient": 0.125, "depth_coefficient": 0.1, "image_size": 32, "num_labels": 5, "hidden_dim": 16},
        **CLASSIFIER,
    ),
    _of(
        "poolformer",
        "PoolFormerForImageClassification",
        {
            "hidden_sizes": [8, 16],
            "depths": [1, 1],
            "num_encoder_blocks": 2,
            "patch_sizes": [7, 3],
            "strides": [4, 2],
            "padding": [2, 1],
            "num_labels": 5,
        },
        **CLASSIFIER,
    ),
    _of(
        "focalnet",
        "FocalNetForImageClassification",
        {
            "embed_dim": 16,
            "hidden_sizes": [16, 32],
            "depths": [1, 1],
            "focal_levels": [2, 2],
            "focal_windows": [3, 3],
            "image_size": 32,
            "num_labels": 5,
        },
        **CLASSIFIER,
    ),
    _of(
        "cvt",
        "CvtForImageClassification",
        {
            "embed_dim": [16, 32],
            "num_heads": [1, 2],
            "depth": [1, 2],
            "patch_sizes": [7, 3],
            "patch_stride": [4, 2],
            "patch_padding": [2, 1],
            "mlp_ratio": [2.0, 2.0],
            "attention_drop_rate": [0.0, 0.0],
            "drop_rate": [0.0, 0.0],
            "drop_path_rate": [0.1, 0.1],
            "qkv_bias": [True, True],
            "cls_token": [False, True],
            "qkv_projection_method": ["dw_bn", "dw_bn"],
            "kernel_qkv": [3, 3],
            "padding_kv": [1, 1],
            "stride_kv": [2, 2],
            "padding_q": [1, 1],
            "stride_q": [1, 1],
            "num_labels": 5,
        },
        {
            "q": ("*.projection_query.weight",),
            "k": ("*.projection_key.weight",),
            "v": ("*.projection_value.weight",),
            "out": ("*.attention.output.dense.weight",),
        },
        TOKEN,
        **CLASSIFIER,
    ),
    _of(
        "levit",
        "LevitForImageClassificationWithTeacher",
        {
            "image_size": 64,
            "hidden_sizes": [16, 24],
            "num_attention_heads": [2, 2],
            "depths": [1, 1],
            "key_dim": [8, 8],
            "mlp_ratio": [2, 2],
            "attention_ratio": [2, 2],
            "num_labels": 5,
            "down_ops": [["Subsample", 8, 2, 2, 2, 2], [""]],
        },
        {"free": ("*.queries_keys_values.*", "*.projection.linear.*", "*.queries.*", "*.keys_values.*")},
        {"*.queries_keys_values.linear.weight": ("hidden", "o i|(h m o) i"), "*.attention_biases": ("bias|other", "")},
        heads=("classifier.linear.weight", "classifier_distill.linear.weight"),
        sizes={"h": 2, "m": (8, 8, 16)},
        note="two heads; keys are narrower than values",
    ),
    _of(
        "pvt",
        "PvtForImageClassification",
        {**PYRAMID, "sequence_reduction_ratios": [2, 1], "num_encoder_blocks": 2, "mlp_ratios": [2, 2]},
        BERT,
        {"*.position_embeddings": ("other|embedding", ""), "*cls_token": ("other|embedding", "")},
        **CLASSIFIER,
    ),
    _of(
        "pvt_v2",
        "PvtV2ForImageClassification",
        {**PYRAMID, "num_encoder_blocks": 2},
        {"q": ("*.query.weight",), "k": ("*.key.weight",), "v": ("*.value.weight",), "out": ("*.attention.proj.weight",)},
        **CLASSIFIER,
    ),
    _of(
        "segformer, segmentation",
        "SegformerForSemanticSegmentation",
        PYRAMID,
        SEPARATE,
        heads=("decode_head.classifier.weight",),
        note="the head is a convolution",
        default=True,
    ),
    _of("segformer", "SegformerForImageClassification", PYRAMID, SEPARATE, **CLASSIFIER),
    _of(
        "swiftformer",
        "SwiftFormerForImageClassification",
        {"depths": [1, 1, 1, 1], "embed_dims": [8, 8, 16, 16], "image_size": 64, "num_labels": 5},
        {"free": ("*.attn.*",)},
        {"*layer_scale*": ("gain|other", ""), "*.w_g": ("other|hidden|gain", "")},
        heads=("head.weight", "dist_head.weight"),
        note="two heads; attention without values",
    ),
    _of(
        "imagegpt",
        "ImageGPTForImageClassification",
        {"vocab_size": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 32, "num_labels": 5},
        fused("*.attn.c_attn.weight", "*.attn.c_proj.weight"),
        {"*.attn.c_attn.weight": ("hidden", "i (m o)")},
        heads=("score.weight",),
        inputs=None,
    ),
    _of(
        "sam, image encoder",
        "SamVisionModel",
        {
            **{k: v for k, v in VIT.items() if k != "num_labels"},
            "mlp_dim": 48,
            "output_channels": 16,
            "num_pos_feats": 8,
            "global_attn_indexes": [1],
            "window_size": 2,
        },
        QKV_OUT,
        {"*pos_embed": ("other|embedding", ""), "*rel_pos_?": ("other|embedding", ""), "*.qkv.weight": ("hidden", "(m o) i")},
        note="its neck is two convolutions of the backbone",
    ),
    _of(
        "vitdet",
        "VitDetModel",
        {**{k: v for k, v in VIT.items() if k != "num_labels"}, "window_size": 0},
        fused("*.qkv.weight", "*.attention.proj.weight"),
        {"*position_embeddings": ("other|embedding", ""), "*.qkv.weight": ("hidden", "(m o) i")},
    ),
    _of(
        "yolos",
        "YolosForObjectDetection",
        {**VIT, "image_size": [32, 32], "num_detection_tokens": 4, "use_mid_position_embeddings": False},
        BERT,
        VIT_TABLE,
        heads=("class_labels_classifier.layers.2.weight", "bbox_predictor.layers.2.weight"),
        note="two heads, each with two hidden layers",
    ),
    _of("clip", "CLIPModel", CLIP, OUT_PROJ, {**PROJECTIONS, "logit_scale": ("gain", "")}, default=True),
    _of("clip, text with projection", "CLIPTextModelWithProjection", TEXT, OUT_PROJ, heads=("text_projection.weight",)),
    _of("clip, image classes", "CLIPForImageClassification", {**CLIP, "num_labels": 5}, OUT_PROJ, **CLASSIFIER),
    _of(
        "siglip",
        "SiglipModel",
        {
            "text_config": {k: v for k, v in TEXT.items() if k != "projection_dim"},
            "vision_config": {k: v for k, v in IMAGE.items() if k != "projection_dim"},
        },
        {**OUT_PROJ, "qkv": ("*.head.attention.in_proj_weight",), "out": ("*.out_proj.weight",)},
        {
            "*.head.probe": ("other|embedding", ""),
            "*.head.attention.in_proj_weight": ("hidden", "(m o) i"),
            "text_model.head.weight": ("head|hidden", "o i"),
        },
    ),
    _of(
        "siglip, image classes",
        "SiglipForImageClassification",
        {
            "text_config": TEXT,
            "vision_config": {**{k: v for k, v in IMAGE.items() if k != "projection_dim"}, "vision_use_head": False},
            "num_labels": 5,
        },
        OUT_PROJ,
        **CLASSIFIER,
    ),
    _of(
        "blip",
        "BlipForConditionalGeneration",
        {"text_config": {**TEXT, "encoder_hidden_size": 32, "tie_word_embeddings": True}, "vision_config": IMAGE, "projection_dim": 16},
        {**BERT, "qkv": ("*.qkv.weight",), "out": ("*ttention.output.dense.weight", "*.projection.weight")},
        {
            **VIT_TABLE,
            "*position_embedding": ("other|embedding", ""),
            "*class_embedding": ("other|embedding", ""),
            "*.qkv.weight": ("hidden", "(m o) i"),
        },
        tied="*word_embeddings.weight",
    ),
    _of(
        "chinese_clip",
        "ChineseCLIPModel",
        CLIP,
        {
            **BERT,
            "q": ("*.query.weight", "*.q_proj.weight"),
            "k": ("*.key.weight", "*.k_proj.weight"),
            "v": ("*.value.weight", "*.v_proj.weight"),
            "out": ("*.attention.output.dense.weight", "*.self_attn.out_proj.weight"),
        },
        PROJECTIONS,
    ),
    _of("align, text", "AlignTextModel", {k: v for k, v in TEXT.items() if k != "projection_dim"}, BERT),
    _of("altclip, text", "AltCLIPTextModel", {**TEXT, "project_dim": 16}, BERT, {"transformation.weight": ("head|hidden", "o i")}),
    _of("owlvit", "OwlViTModel", CLIP, OUT_PROJ, PROJECTIONS),
    _of("x_clip", "XCLIPTextModel", {k: v for k, v in TEXT.items() if k != "projection_dim"}, OUT_PROJ),
    _of("groupvit, text", "GroupViTTextModel", {k: v for k, v in TEXT.items() if k != "projection_dim"}, OUT_PROJ),
    _of(
        "vilt, answers",
        "ViltForQuestionAnswering",
        {**VIT, "vocab_size": 64, "max_position_embeddings": 16, "num_images": -1},
        BERT,
        VIT_TABLE,
        heads=("classifier.3.weight",),
        note="the head has a hidden layer",
    ),
    _of(
        "flava, image",
        "FlavaImageModel",
        {k: v for k, v in VIT.items() if k != "num_labels"},
        BERT,
        {"*_token": ("other|embedding", ""), "*position_embeddings": ("other|embedding", "")},
    ),
    _of(
        "dpt, depth",
        "DPTForDepthEstimation",
        {**VIT, "backbone_out_indices": [0, 0, 1, 1], "neck_hidden_sizes": [8, 8, 8, 8], "fusion_hidden_size": 8, "is_hybrid": False},
        BERT,
        VIT_TABLE,
        heads=("head.head.4.weight",),
        note="the head is a convolution of width 1",
    ),
    _of(
        "detr",
        "DetrForObjectDetection",
        {
            "d_model": 32,
            "encoder_layers": 1,
            "decoder_layers": 1,
            "encoder_attention_heads": 4,
            "decoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "decoder_ffn_dim": 48,
            "num_queries": 4,
            "use_timm_backbone": False,
            "use_pretrained_backbone": False,
            "backbone": None,
            "num_labels": 5,
            "backbone_config": {"model_type": "resnet", **RESNET, "out_features": ["stage2"]},
        },
        {**SEPARATE, "out": ("*attn.o_proj.weight",)},
        heads=("class_labels_classifier.weight", "bbox_predictor.layers.2.weight"),
        note="two heads over a ResNet",
    ),
    _of("timm_wrapper", "TimmWrapperForImageClassification", {"architecture": "resnet18"}, **CLASSIFIER),
    _of("layoutlmv2", "LayoutLMv2Model", {}),
    _of(
        "trocr",
        "TrOCRForCausalLM",
        {
            "vocab_size": 64,
            "d_model": 32,
            "decoder_layers": 1,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 48,
            "max_position_embeddings": 16,
        },
        OUT_PROJ,
        tied="*embed_tokens.weight",
    ),
    _of(
        "git",
        "GitForCausalLM",
        {
            **TOWER,
            "vocab_size": 64,
            "max_position_embeddings": 16,
            "vision_config": IMAGE,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        },
        {
            **BERT,
            "q": ("*.query.weight", "*.q_proj.weight"),
            "k": ("*.key.weight", "*.k_proj.weight"),
            "v": ("*.value.weight", "*.v_proj.weight"),
            "out": ("*.attention.output.dense.weight", "*.self_attn.out_proj.weight"),
        },
        heads=("output.weight",),
    ),
]
