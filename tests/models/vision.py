"""Vision models: of transformers, of timm, of torchvision."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.models.entry import Entry, Inputs, Reference, image
from tests.models.reference import fused_calls, output_attentions, softmaxes

SMALL: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, image_size=16, patch_size=4)
SWIN: dict[str, Any] = dict(image_size=16, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4)


def vision(name: str, prefix: str, projections: str | tuple[str, ...], config: dict[str, Any], **options: Any) -> Entry:
    """A vision model of transformers named by the prefix of its classes."""
    model = options.pop("model", f"{prefix}Model")
    inputs_of = options.pop("inputs", lambda: {"pixel_values": image()})
    reference: Reference = options.pop("reference", output_attentions)

    def make() -> tuple[nn.Module, Inputs]:
        import transformers

        return getattr(transformers, model)(getattr(transformers, f"{prefix}Config")(**config)), inputs_of()

    return Entry(
        name, "transformers", make, reference=reference, requires=("transformers",), projections=projections,
        **{"expected_sites": 2, **options},
    )


def detr() -> tuple[nn.Module, Inputs]:
    """DETR over a tiny ResNet."""
    from transformers import DetrConfig, DetrModel, ResNetConfig

    stages: dict[str, Any] = dict(hidden_sizes=[8, 16], depths=[1, 1], out_features=["stage2"])
    backbone = ResNetConfig(embedding_size=8, layer_type="basic", num_channels=3, **stages)
    config = DetrConfig(
        backbone_config=backbone, d_model=32, encoder_layers=2, decoder_layers=2,
        encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, num_queries=5,
    )  # fmt: skip
    return DetrModel(config), {"pixel_values": image(size=32)}


def sam() -> tuple[nn.Module, Inputs]:
    """SAM with one point a picture."""
    from transformers import SamConfig, SamModel

    config = SamConfig(
        vision_config=dict(hidden_size=32, output_channels=16, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=4,
                           window_size=4, global_attn_indexes=[1], mlp_dim=48, num_pos_feats=8),
        prompt_encoder_config=dict(hidden_size=16, image_size=32, patch_size=4, mask_input_channels=4, image_embedding_size=8),
        mask_decoder_config=dict(hidden_size=16, mlp_dim=24, num_hidden_layers=2, num_attention_heads=2, iou_head_hidden_dim=16),
    )  # fmt: skip
    return SamModel(config), {"pixel_values": image(1, 32), "input_points": torch.tensor([[[[9.0, 20.0]]]])}


def timm_vit() -> tuple[nn.Module, Inputs]:
    """timm's vision transformer, fused attention."""
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5), {"x": image()}


def timm_vit_eager() -> tuple[nn.Module, Inputs]:
    """The same without fused attention."""
    model, inputs = timm_vit()
    for module in model.modules():
        if hasattr(module, "fused_attn"):
            setattr(module, "fused_attn", False)  # noqa: B010
    return model, inputs


def timm_swin() -> tuple[nn.Module, Inputs]:
    """timm's Swin: windows in the batch, shifted in every second block."""
    from timm.models.swin_transformer import SwinTransformer

    return SwinTransformer(
        img_size=16, patch_size=2, embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=4, num_classes=5
    ), {"x": image()}


def timm_deit_eva() -> tuple[nn.Module, Inputs]:
    """timm's EVA: rotary embedding, SwiGLU."""
    from timm.models.eva import Eva

    return Eva(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=4, num_classes=5, use_rot_pos_emb=True), {"x": image()}


def torchvision_vit() -> tuple[nn.Module, Inputs]:
    """torchvision's vision transformer, built on nn.MultiheadAttention."""
    from torchvision.models import VisionTransformer

    model = VisionTransformer(image_size=16, patch_size=4, num_layers=2, num_heads=4, hidden_dim=32, mlp_dim=48, num_classes=5)
    return model, {"x": image()}


def torchvision_swin(version: int) -> tuple[nn.Module, Inputs]:
    """torchvision's Swin; version 2 compares by cosine."""
    from torchvision.models import swin_transformer as swin

    parts = dict(block=swin.SwinTransformerBlockV2, downsample_layer=swin.PatchMergingV2) if version == 2 else {}
    model = swin.SwinTransformer(
        patch_size=[2, 2], embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=[4, 4], num_classes=5,
        stochastic_depth_prob=0.0, **parts,
    )
    return model, {"x": image()}


FOUR_WIDE = softmaxes(set_eager=False)
VIT = "layers.{}.attention.o_proj"
TIMM_SWIN = ("layers.0.blocks.0.attn.proj", "layers.0.blocks.1.attn.proj", "layers.1.blocks.0.attn.proj", "layers.1.blocks.1.attn.proj")
HF_SWIN = tuple(f"encoder.layers.{i}.blocks.{j}.attention.o_proj" for i in range(2) for j in range(2))
TV_SWIN = tuple(f"features.{i}.{j}.attn.proj" for i in (1, 3) for j in range(2))
SIGLIP = (*(f"encoder.layers.{i}.self_attn.out_proj" for i in range(2)), "head.attention.out_proj")
DETR = tuple(
    [f"encoder.layers.{i}.self_attn.o_proj" for i in range(2)]
    + [f"decoder.layers.{i}.{part}.o_proj" for i in range(2) for part in ("self_attn", "encoder_attn")]
)
TWO_WAY = ("self_attn", "cross_attn_token_to_image", "cross_attn_image_to_token")
SAM = (
    *(f"vision_encoder.layers.{i}.attn.proj" for i in range(2)),
    *(f"mask_decoder.transformer.layers.{i}.{part}.out_proj" for i in range(2) for part in TWO_WAY),
    "mask_decoder.transformer.final_attn_token_to_image.out_proj",
)
AUDIO: dict[str, Any] = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48, patch_size=4, num_mel_bins=8,
                             max_length=16, frequency_stride=4, time_stride=4)  # fmt: skip

ENTRIES = [
    vision("ViT", "ViT", VIT, SMALL),
    vision("DINOv2", "Dinov2", "encoder.layer.{}.attention.o_proj", SMALL),
    vision("DeiT", "DeiT", VIT, SMALL),
    vision("BEiT (relative bias)", "Beit", VIT, dict(SMALL, use_relative_position_bias=True, use_mask_token=False)),
    vision("Swin (windows)", "Swin", HF_SWIN, SWIN, expected_sites=4, reference=softmaxes()),
    vision("SigLIP vision", "SiglipVision", SIGLIP, SMALL, expected_sites=3, reference=fused_calls,
           note="the pooling head attends too",
           output=lambda output: output.pooler_output),
    vision("AST (spectrogram)", "AST", VIT, AUDIO, model="ASTModel", inputs=lambda: {"input_values": torch.randn(2, 16, 8)}),
    Entry("DETR (cross)", "transformers", detr, 6, output_attentions, ("transformers",), DETR, tolerance=5e-6),
    Entry("SAM", "transformers", sam, 9, fused_calls, ("transformers",), SAM, note="window, global, self and two-way cross attention"),
    Entry("timm ViT", "timm", timm_vit, 2, fused_calls, ("timm",), "blocks.{}.attn.proj"),
    Entry("timm ViT (not fused)", "timm", timm_vit_eager, 2, FOUR_WIDE, ("timm",), "blocks.{}.attn.proj"),
    Entry("timm Swin (windows)", "timm", timm_swin, 4, FOUR_WIDE, ("timm",), TIMM_SWIN),
    Entry("timm EVA (rotary)", "timm", timm_deit_eva, 2, fused_calls, ("timm",), "blocks.{}.attn.proj"),
    Entry("torchvision ViT", "torchvision", torchvision_vit, 2, fused_calls, ("torchvision",),
          "encoder.layers.encoder_layer_{}.self_attention.out_proj"),
    Entry("torchvision Swin", "torchvision", lambda: torchvision_swin(1), 4, FOUR_WIDE, ("torchvision",), TV_SWIN),
    Entry("torchvision SwinV2 (cosine)", "torchvision", lambda: torchvision_swin(2), 4, FOUR_WIDE, ("torchvision",), TV_SWIN),
]  # fmt: skip
