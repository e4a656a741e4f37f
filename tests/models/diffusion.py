"""Denoisers of diffusers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from tests.models.entry import Entry, Inputs
from tests.models.reference import fused_calls

TEXT = 6
STEP = torch.tensor([7.0])


def denoiser(
    name: str, prefix: str, inputs: Callable[[], Inputs], expected_sites: int, projections: str | tuple[str, ...] = (), **config: Any
) -> Entry:
    """A denoiser named by its class."""
    options = {key: config.pop(key) for key in ("note", "slow") if key in config}

    def make() -> tuple[nn.Module, Inputs]:
        import diffusers

        return getattr(diffusers, prefix)(**config), inputs()

    return Entry(name, "diffusers", make, expected_sites, fused_calls, ("diffusers",), projections, **options)


def text(width: int, batch: int = 1) -> torch.Tensor:
    """Encoded text [B, 6, E]."""
    return torch.randn(batch, TEXT, width)


def flux_inputs() -> Inputs:
    """4 × 4 latent patches and six words."""
    image_ids = torch.zeros(16, 3)
    image_ids[:, 1], image_ids[:, 2] = torch.arange(16) // 4, torch.arange(16) % 4
    return {
        "hidden_states": torch.randn(1, 16, 8),
        "encoder_hidden_states": text(16),
        "pooled_projections": torch.randn(1, 16),
        "timestep": torch.tensor([0.5]),
        "img_ids": image_ids,
        "txt_ids": torch.zeros(TEXT, 3),
    }


def latent(channels: int, *shape: int) -> torch.Tensor:
    """Noise [1, C, …]."""
    return torch.randn(1, channels, *shape)


BLOCKS_TWO = ("transformer_blocks.0.attn1.to_out.0", "transformer_blocks.0.attn2.to_out.0", "transformer_blocks.1.attn1.to_out.0",
              "transformer_blocks.1.attn2.to_out.0")  # fmt: skip
WAN = tuple(f"blocks.{i}.{part}.to_out.0" for i in range(2) for part in ("attn1", "attn2"))

FLUX = ("transformer_blocks.0.attn.to_out.0+transformer_blocks.0.attn.to_add_out", "single_transformer_blocks.0.proj_out")
SD3 = ("transformer_blocks.0.attn.to_out.0+transformer_blocks.0.attn.to_add_out", "transformer_blocks.1.attn.to_out.0")
UNET = tuple(
    f"{part}.transformer_blocks.0.{attention}.to_out.0"
    for part in ("down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.1.attentions.0", "up_blocks.1.attentions.1")
    for attention in ("attn1", "attn2")
)
SANA = ("transformer_blocks.0.attn2.to_out.0", "transformer_blocks.1.attn2.to_out.0")

ENTRIES = [
    denoiser("Flux (joint, single)", "FluxTransformer2DModel", flux_inputs, 2, FLUX, patch_size=1, in_channels=8, num_layers=1,
             num_single_layers=1, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=16, pooled_projection_dim=16,
             axes_dims_rope=(4, 4, 8),
             note="z is split between two output maps, or joined to an MLP's"),
    denoiser("SD3 (joint)", "SD3Transformer2DModel", lambda: {"hidden_states": latent(4, 8, 8), "encoder_hidden_states": text(16),
             "pooled_projections": torch.randn(1, 16), "timestep": STEP}, 2, SD3, sample_size=8, patch_size=2, in_channels=4, num_layers=2,
             attention_head_dim=8, num_attention_heads=4, joint_attention_dim=16, caption_projection_dim=32, pooled_projection_dim=16,
             out_channels=4, pos_embed_max_size=8),
    denoiser("Wan (video, self + cross)", "WanTransformer3DModel", lambda: {"hidden_states": latent(4, 2, 8, 8),
             "encoder_hidden_states": text(16), "timestep": STEP}, 4, WAN, patch_size=(1, 2, 2), num_attention_heads=2,
             attention_head_dim=12, in_channels=4, out_channels=4, text_dim=16, freq_dim=16, ffn_dim=32, num_layers=2, rope_max_seq_len=32),
    denoiser("UNet (Stable Diffusion)", "UNet2DConditionModel", lambda: {"sample": latent(4, 8, 8), "timestep": STEP,
             "encoder_hidden_states": text(16)}, 8, UNET, sample_size=8, in_channels=4, out_channels=4, layers_per_block=1,
             block_out_channels=(16, 32), down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
             mid_block_type="UNetMidBlock2DCrossAttn", up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), cross_attention_dim=16,
             attention_head_dim=2, norm_num_groups=8),
    denoiser("PixArt", "PixArtTransformer2DModel", lambda: {"hidden_states": latent(4, 8, 8), "encoder_hidden_states": text(16),
             "timestep": STEP, "added_cond_kwargs": {"resolution": None, "aspect_ratio": None}}, 4, BLOCKS_TWO, num_attention_heads=2,
             attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=16, sample_size=8, patch_size=2,
             caption_channels=16, norm_num_groups=1, use_additional_conditions=False),
    denoiser("Sana (linear self, softmax cross)", "SanaTransformer2DModel", lambda: {"hidden_states": latent(4, 8, 8),
             "encoder_hidden_states": text(8), "timestep": STEP}, 2, SANA,
             in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_cross_attention_heads=2,
             cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=8, sample_size=8, note="its linear attention is no site"),
]  # fmt: skip
