"""Read-outs and edits for models that draw, each a plan made of the edit vocabulary."""

from headscope.interventions.diffusion.bender import bend
from headscope.interventions.diffusion.head_noise import find_anchors, noise_heads
from headscope.interventions.diffusion.maps import TokenMaps, token_maps, watch_maps
from headscope.interventions.diffusion.style import mix_style
from headscope.interventions.diffusion.temporal import separate_events

__all__ = [
    "TokenMaps",
    "bend",
    "find_anchors",
    "mix_style",
    "noise_heads",
    "separate_events",
    "token_maps",
    "watch_maps",
]
