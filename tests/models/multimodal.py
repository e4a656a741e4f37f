"""Models that read two kinds of input: text with images."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from tests.models.entry import Entry, Inputs, image, tokens
from tests.models.reference import softmaxes

TEXT: dict[str, Any] = dict(
    vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64,
)  # fmt: skip
VISION: dict[str, Any] = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, image_size=16, patch_size=4)
IDS: dict[str, Any] = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)


def clip() -> tuple[nn.Module, Inputs]:
    """CLIP, both towers."""
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(text_config=dict(TEXT, **IDS), vision_config=VISION, projection_dim=16)
    ids = tokens()
    ids[:, -1] = 2
    return CLIPModel(config), {"input_ids": ids, "pixel_values": image()}


def both_embeddings(output: Any) -> Tensor:
    """Text and image embeddings side by side, [B, 2E]: the logits are only their products."""
    return torch.cat([output.text_embeds, output.image_embeds], dim=-1)


def blip() -> tuple[nn.Module, Inputs]:
    """BLIP for captions: a decoder that looks at the picture."""
    from transformers import BlipConfig, BlipForConditionalGeneration

    text = dict(TEXT, **IDS, encoder_hidden_size=32, projection_dim=16, sep_token_id=2, is_decoder=True)
    config = BlipConfig(text_config=text, vision_config=VISION, projection_dim=16)
    return BlipForConditionalGeneration(config), {"pixel_values": image(), "input_ids": tokens()}


def llava() -> tuple[nn.Module, Inputs]:
    """LLaVA: a CLIP tower in front of Llama."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT, **IDS, num_key_value_heads=2),
        image_token_index=3,
        vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )
    ids = torch.cat([torch.full((2, 16), 3), tokens(length=6)], dim=1)
    return LlavaForConditionalGeneration(config), {"input_ids": ids, "pixel_values": image(), "attention_mask": torch.ones_like(ids)}


def qwen_vl() -> tuple[nn.Module, Inputs]:
    """Qwen2.5-VL: patches packed into one sequence, windows as separate calls."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    text = dict(TEXT, **IDS, num_key_value_heads=2, rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 1e4})
    vision = dict(
        depth=2, hidden_size=32, intermediate_size=48, num_heads=4, patch_size=4, spatial_merge_size=2, temporal_patch_size=2,
        window_size=16, out_hidden_size=32, fullatt_block_indexes=[1], in_channels=3,
    )  # fmt: skip
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, image_token_id=3, video_token_id=4, vision_start_token_id=5,
                              vision_end_token_id=6)  # fmt: skip
    ids = torch.cat([torch.tensor([[5]]), torch.full((1, 16), 3), torch.tensor([[6]]), torch.randint(7, 64, (1, 6))], dim=1)
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": torch.randn(64, 3 * 2 * 4 * 4),
        "image_grid_thw": torch.tensor([[1, 8, 8]]),
        "mm_token_type_ids": (ids == 3).int(),
    }
    return Qwen2_5_VLForConditionalGeneration(config), inputs


CLIP_PROJECTIONS = tuple(f"{tower}.encoder.layers.{i}.self_attn.out_proj" for tower in ("vision_model", "text_model") for i in range(2))
BLIP_PROJECTIONS = (
    *(f"vision_model.encoder.layers.{i}.self_attn.projection" for i in range(2)),
    *(f"text_decoder.bert.encoder.layer.{i}.{part}.output.dense" for i in range(2) for part in ("attention", "crossattention")),
)
QWEN_PROJECTIONS = (
    *("model.visual.blocks.0.attn.proj" for _ in range(4)),
    "model.visual.blocks.1.attn.proj",
    *(f"model.language_model.layers.{i}.self_attn.o_proj" for i in range(2)),
)
LLAVA_PROJECTIONS = (
    *(f"model.vision_tower.encoder.layers.{i}.self_attn.out_proj" for i in range(2)),
    *(f"model.language_model.layers.{i}.self_attn.o_proj" for i in range(2)),
)

ENTRIES = [
    Entry("CLIP (two towers)", "transformers", clip, 4, softmaxes(), ("transformers",), CLIP_PROJECTIONS, output=both_embeddings),
    Entry("BLIP (captions, cross)", "transformers", blip, 6, softmaxes(), ("transformers",), BLIP_PROJECTIONS),
    Entry("LLaVA", "transformers", llava, 4, softmaxes(), ("transformers",), LLAVA_PROJECTIONS, generate=True),
    Entry("Qwen2.5-VL (packed windows)", "transformers", qwen_vl, 7, softmaxes(), ("transformers",), QWEN_PROJECTIONS, generate=True,
          note="the windows of one vision layer are ordinals of its module"),
]  # fmt: skip
