"""The zoo: tiny models of every kind with random weights, each with what is known about its attention. Nothing is downloaded."""

from dataclasses import replace

from tests.models import diffusion, encoder_decoder, encoders, graph, handwritten, language, lens, multimodal, torch_nn, vision
from tests.models.entry import FAMILIES, Entry

# Cousins of a model that the quick tests have already; they are left to the slow tier and stay in the table.
COUSINS = {
    "Qwen2", "OPT", "GPT-NeoX", "Phi", "Phi-3", "Cohere", "OLMo-2", "StarCoder2", "CodeGen", "RoBERTa", "ELECTRA", "DeBERTa", "RoFormer",
    "MPNet", "WavLM", "Marian", "Pegasus", "DINOv2", "DeiT", "AST (spectrogram)", "timm EVA (rotary)", "torchvision Swin", "PixArt",
    "SD3 (joint)", "BLIP (captions, cross)", "LLaVA", "TransformerBridge of GPT-2",
}  # fmt: skip

_EVERY = [
    *language.ENTRIES,
    *encoders.ENTRIES,
    *encoder_decoder.ENTRIES,
    *vision.ENTRIES,
    *multimodal.ENTRIES,
    *diffusion.ENTRIES,
    *torch_nn.ENTRIES,
    *graph.ENTRIES,
    *lens.ENTRIES,
    *handwritten.ENTRIES,
]

ENTRIES: list[Entry] = [replace(entry, slow=True) if entry.name in COUSINS else entry for entry in _EVERY]

__all__ = ["COUSINS", "ENTRIES", "FAMILIES", "Entry"]
