"""A tiny model of any transformers type, without a table of types: default configurations are shrunk by the names of their fields.

A type is tried in several `Variant`s until one builds and runs. Letters: B batch, S tokens, C channels, T frames.
"""

from __future__ import annotations

import importlib
import inspect
import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tests.models.entry import Inputs

LARGEST = 60_000_000
BATCH, LENGTH = 2, 8


class TooLarge(RuntimeError):
    """Even the shrunk model has more parameters than LARGEST."""


@dataclass(frozen=True)
class Variant:
    """One way to shrink a configuration.

    Attributes:
        depth: number of layers; None keeps the type's own.
        width: width of the residual stream; 0 keeps every size as it is.
        heads: query heads.
        kv_heads: key/value heads.
        construct: build the configuration anew from the shrunk fields, so that what is derived from them follows; else set them
            on the default configuration.
        head_dim: shrink `head_dim`; else it is left out, to follow from width and heads.
        sections: give the rotary embedding sections for time, height and width, which some models take from their code.
    """

    depth: int | None = 2
    width: int = 64
    heads: int = 4
    kv_heads: int = 2
    construct: bool = True
    head_dim: bool = True
    sections: bool = False


VARIANTS = (
    Variant(),
    Variant(construct=False),
    Variant(sections=True),
    Variant(kv_heads=4, head_dim=False),
    Variant(depth=None),
    Variant(depth=None, construct=False),
    Variant(depth=4, width=128, kv_heads=4),
    Variant(depth=None, width=0),
)

WIDTHS = re.compile(
    r"^((vision_|text_|audio_|encoder_|decoder_|cross_|out_|output_|backbone_|projector_|attention_|head_|image_text_|mm_|conv_|lm_|moe_|"
    r"vision_output_|memory_attention_|memory_encoder_|input_|reassemble_|fusion_|neck_|patch_embed_|patch_embeds_|semantic_|qformer_|"
    r"proj_|pooler_|bottleneck_|fpn_)?hidden_size(_global|_per_layer_input)?|d_model|n_embd|embed_dim|dim|width|embedding_size|emb_dim|"
    r"hidden_dim|encoder_hidden_dim|projection_dim|project_dim|word_embed_proj_dim|vision_output_dim|text_embed_dim|image_embed_dim|output_dim|"
    r"decoder_dim|encoder_dim|output_channels|d_embed|conditioning_dim|cross_attention_hidden_size|mask_feature_size|hidden_channels|"
    r"feature_size|pooler_output_size|projection_size|output_hidden_size|mask_downsampler_embed_dim|memory_fuser_embed_dim|lru_width|query_dim|"
    r"audio_embed_dim|embedding_dim|d_latents|model_dim|vision_embed_dim|visual_hidden_size|visual_feat_dim|adapter_out_dim|fc_dim)$"
)
INNER = re.compile(
    r"(^|_)(intermediate_size|ffn_dim|ffn_hidden_size|d_ff|d_inner|mlp_dim|n_inner|feedforward_dim|intermediate_dim|dim_feedforward|"
    r"hidden_size_mlp|intermediate_size_mlp|ffn_size|expert_ffn_size|mlp_hidden_size|linear_units|feed_forward_hidden_size|filter_size|"
    r"projection_intermediate_size|fuser_intermediate_dim|ff_dim|moe_intermediate_size|shared_expert_intermediate_size|"
    r"ffn_intermediate_size)$"
)
HEADS = re.compile(
    r"(^|_)(num_attention_heads|n_head|n_heads|num_heads|attention_heads|num_key_value_heads|num_kv_heads|kv_heads|n_kv_heads|"
    r"resampler_n_heads|num_cross_attention_heads|self_attention_heads|linear_num_heads)(_kv)?$"
)
KV_HEADS = re.compile(r"(key_value_heads|kv_heads|num_heads_kv|num_kv)$")
HEAD_DIMS = re.compile(
    r"^(swa_|cross_|attention_|local_|global_)?(head_dim|d_kv|kv_channels|dim_head|d_head|head_size|attention_head_size|v_head_dim|"
    r"attention_head_dim|head_width)$"
)
LAYERS = re.compile(
    r"(^|_)(num_hidden_layers|n_layer|n_layers|num_layers|encoder_layers|decoder_layers|num_encoder_layers|num_decoder_layers|depth|layers|"
    r"num_attention_layers|encoder_depth|decoder_depth|num_blocks|resampler_depth)$"
)
EXPERTS = re.compile(r"^(num_experts|num_local_experts|n_routed_experts|moe_num_experts|num_routed_experts|expert_num)$")
EXPERTS_CHOSEN = re.compile(r"^(num_experts_per_tok|num_experts_per_token|moe_topk|moe_k|moe_top_k|num_experts_per_topk|top_k_experts)$")
FIXED: dict[str, Any] = {
    "vocab_size": 128,
    "vocab_size_per_layer_input": 128,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "context_length": 32,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "qk_head_dim": 16,
    "n_group": 1,
    "topk_group": 1,
    "num_expert_group": 1,
    "first_k_dense_replace": 1,
    "use_pretrained_backbone": False,
    "index_n_heads": 4,
    "index_head_dim": 16,
    "index_topk": 4,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 16,
    "mamba_n_heads": 8,
    "mamba_d_head": 16,
    "rotary_dim": 8,
    "num_conv_pos_embedding_groups": 4,
    "num_conv_pos_embeddings": 16,
    "query_pre_attn_scalar": 16,
    "sliding_window": 4,
    "attention_window": 4,
    "num_query_tokens": 4,
    "num_queries": 8,
    "d_rel": 16,
}
TOKEN = re.compile(r"(token_id|token_index|_token|_id)$")
SIZES = ("hidden_sizes", "embed_dims", "encoder_hidden_sizes", "neck_hidden_sizes", "decoder_hidden_sizes", "embed_dim_per_stage",
         "stage_out_channels", "stage_in_channels", "stage_mid_channels", "embed_dim", "backbone_channel_list", "num_filters")  # fmt: skip


# What a type insists on and no name of a field tells.
HINTS: dict[str, dict[str, Any]] = {
    "autoformer": {"prediction_length": 4, "context_length": 16, "label_length": 4, "num_time_features": 1},
    "informer": {"prediction_length": 4, "context_length": 16, "num_time_features": 1},
    "time_series_transformer": {"prediction_length": 4, "context_length": 16, "num_time_features": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2},
    "deepseek_v2": {"topk_method": "greedy"},
    "lilt": {"hidden_size": 96},
}


LAYER_INDICES = ("global_attn_indexes", "fullatt_block_indexes", "deepstack_visual_indexes", "global_attention_blocks",
                 "cross_attention_layers")  # fmt: skip


def shrunk(config: Any, variant: Variant) -> dict[str, Any]:
    """The fields of a default configuration that a variant changes, with their new values; nested configurations as dicts."""
    from transformers.configuration_utils import PreTrainedConfig

    changes: dict[str, Any] = {}
    fields = {name: value for name, value in vars(config).items() if not name.startswith("_")}
    for name, value in fields.items():
        if isinstance(value, PreTrainedConfig):
            changes[name] = {"model_type": value.model_type, **shrunk(value, variant)}
        elif variant.width and isinstance(value, bool):
            if name in FIXED:
                changes[name] = FIXED[name]
        elif variant.width and isinstance(value, int):
            new = shrunk_number(name, value, variant, fields)
            if new is not None and new != value:
                changes[name] = new
    if not variant.width:
        return changes
    changes.update(shrunk_lists(fields, variant))
    changes.update(token_ids(fields))
    return changes


def shrunk_number(name: str, value: int, variant: Variant, fields: dict[str, Any]) -> int | None:
    """The new value of one integer field; None to leave it alone."""
    if name in FIXED:
        return min(value, FIXED[name]) if value > 0 else None
    if EXPERTS.match(name):
        return min(value, 4) if value > 0 else None
    if EXPERTS_CHOSEN.match(name):
        return min(value, 2)
    if HEADS.search(name):
        if value <= 1 or KV_HEADS.search(name) is None:
            return variant.heads if value > 1 else None
        return variant.kv_heads
    if HEAD_DIMS.match(name):
        return variant.width // variant.heads if variant.head_dim or name != "head_dim" else None
    if LAYERS.search(name):
        return min(value, variant.depth) if variant.depth else None
    if INNER.search(name):
        return 2 * variant.width if value > 0 else None
    if name in ("embed_dim", "base_channels") and isinstance(fields.get("num_heads"), (list, tuple)):
        return 8 * int(fields["num_heads"][0]) if value else None
    if WIDTHS.match(name):
        return variant.width if value > 4 else None
    if name == "image_size" and isinstance(fields.get("patch_size"), int):
        return min(value, 4 * int(fields["patch_size"]))
    return None


def shrunk_lists(fields: dict[str, Any], variant: Variant) -> dict[str, Any]:
    """Lists with one value a layer are cut so that every kind of layer stays; lists of widths are scaled; depths become 1."""
    changes: dict[str, Any] = {}
    counts = [name for name in ("num_hidden_layers", "n_layer", "num_layers", "n_layers") if isinstance(fields.get(name), int)]
    layers = fields[counts[0]] if counts else 0
    per_layer = {
        name: list(value) for name, value in fields.items() if isinstance(value, (list, tuple)) and len(value) == layers and layers > 2
    }
    if variant.depth and per_layer:
        chosen = representatives(per_layer, layers, variant.depth)
        for name, values in per_layer.items():
            changes[name] = [values[i] for i in chosen]
        changes.update({name: len(chosen) for name in counts})
    for name, value in fields.items():
        if not isinstance(value, (list, tuple)) or not value or name in changes:
            continue
        if name in ("depths", "blocks_per_stage", "depth", "stage_num_blocks") and all(isinstance(one, int) for one in value):
            changes[name] = [1 for _ in value]
        elif name in SIZES and all(isinstance(one, int) and not isinstance(one, bool) for one in value) and min(value) >= 16:
            changes[name] = [max(8, one * 16 // min(value)) for one in value]
        elif name == "image_size" and all(isinstance(one, int) for one in value):
            changes[name] = [min(one, 128) for one in value]
        elif name in LAYER_INDICES and variant.depth:
            changes[name] = [variant.depth - 1]
        elif name == "conv_dim" and len(value) == 7:
            changes[name] = [32 for _ in value]
        if isinstance(value, tuple) and name in changes:
            changes[name] = tuple(changes[name])
    rope = fields.get("rope_parameters")
    if isinstance(rope, dict) and (variant.sections or isinstance(rope.get("mrope_section"), (list, tuple))):
        half = int(variant.width // variant.heads // 2 * rope.get("partial_rotary_factor", 1.0))
        sections = [half // 4, half // 4, half - 2 * (half // 4)]
        changes["rope_parameters"] = {**rope, "mrope_section": sections}
    return changes


def representatives(per_layer: dict[str, list[Any]], layers: int, depth: int) -> list[int]:
    """Indices of layers such that every kind in a list of strings is there, and at least `depth` of them."""
    chosen: list[int] = []
    for values in per_layer.values():
        kinds: set[str] = set()
        for index, value in enumerate(values):
            if isinstance(value, str) and value not in kinds:
                kinds.add(value)
                chosen.append(index)
    chosen = sorted(set(chosen))
    extra = (index for index in range(layers) if index not in chosen)
    while len(chosen) < min(depth, layers):
        chosen.append(next(extra))
    return sorted(chosen)


def token_ids(fields: dict[str, Any]) -> dict[str, Any]:
    """Special tokens inside the small vocabulary: padding 0, start 1, end 2, and 3, 4, … for the others."""
    changes: dict[str, Any] = {}
    known = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1, "sep_token_id": 2, "cls_token_id": 1}
    following = 3
    for name, value in fields.items():
        if not TOKEN.search(name) or isinstance(value, bool):
            continue
        first = value[0] if isinstance(value, (list, tuple)) and value else value
        if isinstance(first, int) and first >= 128:
            if name in known:
                changes[name] = known[name]
            else:
                changes[name] = following
                following += 1
    return changes


def apply(config: Any, changes: dict[str, Any]) -> Any:
    """Set the changes on a configuration that exists already."""
    for name, value in changes.items():
        if isinstance(value, dict) and "model_type" in value:
            apply(getattr(config, name), value)
        elif name != "model_type":
            setattr(config, name, value)
    return config


def tiny_config(model_type: str, variant: Variant) -> Any:
    """A shrunk configuration of a type."""
    from transformers import CONFIG_MAPPING

    cls = CONFIG_MAPPING[model_type]
    hint = HINTS.get(model_type, {}) if variant.width else {}
    config = cls(**hint)
    changes = {**shrunk(config, variant), **hint}
    return cls(**changes) if variant.construct else apply(config, changes)


def classes_of(model_type: str) -> list[str]:
    """Names of the classes that transformers' auto models know for a type, the bare model first."""
    from transformers.models.auto import modeling_auto as auto

    first = ("MODEL", "MODEL_FOR_CAUSAL_LM", "MODEL_FOR_MULTIMODAL_LM", "MODEL_FOR_IMAGE_TEXT_TO_TEXT", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
             "MODEL_FOR_MASKED_LM", "MODEL_FOR_IMAGE_CLASSIFICATION", "MODEL_FOR_OBJECT_DETECTION",
             "MODEL_FOR_SPEECH_SEQ_2_SEQ")  # fmt: skip
    rest = [name.removesuffix("_MAPPING_NAMES") for name in vars(auto) if name.startswith("MODEL_") and name.endswith("_MAPPING_NAMES")]
    found: list[str] = []
    for name in dict.fromkeys((*first, *rest)):
        value = getattr(auto, f"{name}_MAPPING_NAMES", {}).get(model_type)
        for one in value if isinstance(value, (list, tuple)) else [value]:
            if one is not None and one not in found:
                found.append(one)
    return found or nested_classes(model_type)


def nested_classes(model_type: str) -> list[str]:
    """Models of a type that only stands inside another, as `module:class`: those in its modelling file that name its configuration."""
    from transformers import CONFIG_MAPPING
    from transformers.modeling_utils import PreTrainedModel

    config = CONFIG_MAPPING[model_type]
    try:
        module = importlib.import_module(config.__module__.replace(".configuration_", ".modeling_"))
    except ImportError:
        return []
    found = [
        name
        for name, value in vars(module).items()
        if isinstance(value, type) and issubclass(value, PreTrainedModel) and not name.endswith("PreTrainedModel")
        and value.__module__ == module.__name__ and takes(value, config)
    ]  # fmt: skip
    return [f"{module.__name__}:{name}" for name in found]


def takes(model: type, config: type) -> bool:
    """The model's constructor is annotated with this configuration, or its class names it."""
    annotation = inspect.signature(model).parameters.get("config")
    named = str(getattr(annotation, "annotation", "")).strip("'")
    return config.__name__ in (named, *named.split(".")[-1].split(" | ")) or getattr(model, "config_class", None) is config


def build(class_name: str, config: Any, shrunken: bool = True) -> nn.Module:
    """A model with random weights in eval mode, refused when it is too large."""
    import transformers

    module, _, name = class_name.rpartition(":")
    cls = getattr(importlib.import_module(module) if module else transformers, name)
    create = getattr(cls, "_from_config", cls)
    try:
        with torch.device("meta"):
            size = sum(parameter.numel() for parameter in create(config).parameters())
    except (RuntimeError, NotImplementedError, ValueError, TypeError):
        if not shrunken:
            raise TooLarge("a default configuration that cannot be sized without building it") from None
        size = 0  # some models compute with their weights while they are built
    if size > LARGEST:
        raise TooLarge(f"{size / 1e6:.0f}M parameters")
    torch.manual_seed(0)
    model: nn.Module = create(config).eval()
    size = sum(parameter.numel() for parameter in model.parameters())
    if size > LARGEST:
        raise TooLarge(f"{size / 1e6:.0f}M parameters")
    return model


def find(config: Any, *names: str, default: int) -> int:
    """The first integer field of that name, in the configuration or in one nested in it."""
    from transformers.configuration_utils import PreTrainedConfig

    for name in names:
        value = vars(config).get(name)
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], int):
            value = value[0]
        if isinstance(value, int) and not isinstance(value, bool):
            return value
    for value in vars(config).values():
        if isinstance(value, PreTrainedConfig):
            inner = find(value, *names, default=-1)
            if inner != -1:
                return inner
    return default


def ids(config: Any, length: int = LENGTH) -> Tensor:
    """Token ids [B, S] that avoid special tokens, with the end token last, where some models look for it."""
    vocabulary = max(16, min(128, find(config, "vocab_size", default=128)))
    drawn = torch.randint(min(40, vocabulary // 2), vocabulary, (BATCH, length))
    end = find(config, "eos_token_id", default=-1)
    if 0 <= end < vocabulary:
        drawn[:, -1] = end
    return drawn


def pixels(config: Any, side: int | None = None, frames: int | None = None) -> Tensor:
    """Pixels [B, C, side, side], or [B, T, C, side, side]."""
    side = side or find(config, "image_size", "img_size", "input_size", default=64)
    channels = find(config, "num_channels", "in_channels", "in_chans", default=3)
    return torch.randn(BATCH, *([frames] if frames else []), channels if channels < 8 else 3, side, side)


def features(config: Any, frames: int, channels_first: bool) -> Tensor:
    """A spectrogram, [B, mel, T] or [B, T, mel]."""
    mel = find(config, "num_mel_bins", "feature_size", "input_feat_per_channel", "mel_dim", "n_mels", "input_dim", default=80)
    return torch.randn(BATCH, mel, frames) if channels_first else torch.randn(BATCH, frames, mel)


def options(name: str, config: Any, packed: bool = False) -> list[Any]:
    """Values to try for one argument of a forward; `packed`: pictures come as one sequence of patches with a grid beside it."""
    width = find(config, "hidden_size", "d_model", default=64)
    if name in ("input_ids", "decoder_input_ids"):
        return [ids(config, LENGTH if name == "input_ids" else 5)]
    if name == "attention_mask":
        return [torch.ones(BATCH, LENGTH, dtype=torch.long)]
    if name in ("pixel_values", "hidden_states", "flattened_patches", "pixel_values_videos", "images") and packed:
        patch = find(config, "patch_size", default=14)
        size = find(config, "in_channels", "num_channels", default=3) * find(config, "temporal_patch_size", default=1) * patch * patch
        return [torch.randn(64, size), torch.randn(64, width), torch.randn(64, find(config, "num_channels", default=3), patch, patch)]
    if name in ("pixel_values", "flattened_patches", "pixel_values_videos", "images"):
        frames = find(config, "num_frames", "frames_per_clip", default=4)
        square = [pixels(config)]
        moving = [pixels(config, frames=frames)]
        sizes = [pixels(config, side) for side in (64, 224, 32, 128, 448)]
        return moving + square if "video" in name else square + moving + sizes
    if name in ("input_features", "input_values", "audio_values", "input_audio", "audio", "spectrogram", "audio_features"):
        long = find(config, "max_source_positions", "max_length", default=64)
        wave = [torch.randn(BATCH, 4000), torch.randn(BATCH, 1, 4000)]
        spectrum = [features(config, frames, first) for frames in (2 * long, long, 64) if frames <= 3000 for first in (True, False)]
        return wave + spectrum if name in ("input_values", "audio_values", "input_audio", "audio") else spectrum + wave
    if name == "bbox":
        return [torch.zeros(BATCH, LENGTH, 4, dtype=torch.long), torch.zeros(BATCH, LENGTH, 8)]
    if name in ("inputs_embeds", "hidden_states", "encoder_hidden_states"):
        return [torch.randn(BATCH, LENGTH, width)]
    if name in ("past_values", "past_observed_mask"):
        length = find(config, "context_length", default=32) + max(getattr(config, "lags_sequence", None) or [0])
        channels = find(config, "num_input_channels", "input_size", default=1)
        shape = (BATCH, length) if channels == 1 else (BATCH, length, channels)
        return [torch.randn(shape), torch.randn(BATCH, length, channels)] if name == "past_values" else [torch.ones(shape)]
    if name in ("past_time_features", "future_time_features"):
        length = find(config, "context_length", default=32) + max(getattr(config, "lags_sequence", None) or [0])
        length = length if name.startswith("past") else find(config, "prediction_length", default=4)
        return [torch.randn(BATCH, length, find(config, "num_time_features", default=0))]
    if name == "visual_feats":
        return [torch.randn(BATCH, 6, find(config, "visual_feat_dim", default=64))]
    if name == "visual_pos":
        return [torch.rand(BATCH, 6, 4)]
    if name in ("input_points",):
        return [torch.rand(BATCH, 1, 1, 2) * 10]
    if name in ("grid_thw", "image_grid_thw"):
        return [torch.tensor([[1, 8, 8]])]
    if name == "qformer_input_ids":
        return [ids(config, 4)]
    if name in ("input_features_mask",):
        return [torch.ones(BATCH, 64, dtype=torch.long)]
    if name in ("prompt_pixel_values", "prompt_masks"):
        return [pixels(config)]
    if name == "pixel_attention_mask":
        return [torch.ones(BATCH, 16, dtype=torch.long)]
    if name == "spatial_shapes":
        return [torch.tensor([[4, 4]] * BATCH)]
    if name == "audio_codes":
        return [torch.randint(0, 8, (BATCH, find(config, "num_quantizers", "num_codebooks", default=8), 10))]
    if name == "actions":
        return [torch.randn(BATCH, LENGTH, find(config, "act_dim", default=4))]
    if name == "states":
        return [torch.randn(BATCH, LENGTH, find(config, "state_dim", default=17))]
    if name in ("rewards", "returns_to_go"):
        return [torch.randn(BATCH, LENGTH, 1)]
    if name == "timesteps":
        return [torch.arange(LENGTH).repeat(BATCH, 1)]
    if name == "inputs":
        return [ids(config, LENGTH), torch.randn(BATCH, LENGTH, width), pixels(config)]
    return []


def candidates(model: nn.Module, config: Any) -> Iterator[Inputs]:
    """Inputs to try, the likeliest first: the main input, what has no default, and what the kind of model usually wants."""
    signature = inspect.signature(model.forward).parameters
    named = {name: one for name, one in signature.items() if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)}
    required = [name for name, one in named.items() if one.default is one.empty]
    main = getattr(model, "main_input_name", "input_ids")
    decoder = ["decoder_input_ids"] if "decoder_input_ids" in signature and getattr(config, "is_encoder_decoder", False) else []
    visual = [name for name in ("pixel_values", "flattened_patches") if name in signature]
    text = ["input_ids"] if "input_ids" in signature else []
    boxes = ["bbox"] if "bbox" in signature else []
    audio = [name for name in ("input_features", "input_values") if name in signature]
    sets = [
        [*dict.fromkeys([*([main] if main in signature else []), *required, *decoder])],
        [*dict.fromkeys([*text, *boxes, *decoder, *required])],
        [*dict.fromkeys([*visual, *required, *decoder])],
        [*dict.fromkeys([*text, *boxes, *visual, *required, *decoder])],
        [*dict.fromkeys([*audio, *required, *decoder])],
        [*dict.fromkeys([*text, *audio, *required, *decoder])],
        ["inputs_embeds"] if "inputs_embeds" in signature else [],
    ]
    for names in dict.fromkeys(tuple(one) for one in sets if one):
        choices = {name: options(name, config, "grid_thw" in required) for name in names}
        if any(not values for name, values in choices.items() if name in required):
            choices = {name: values for name, values in choices.items() if values}
        for index in range(max((len(values) for values in choices.values()), default=0)):
            yield {name: values[min(index, len(values) - 1)] for name, values in choices.items() if values}


def tiny_model(model_type: str) -> tuple[nn.Module, Inputs, Variant]:
    """A tiny model of a type that runs, and inputs for it.

    Raises:
        TooLarge: every variant that builds is too large.
        RuntimeError: nothing built, or nothing that built ran; the message starts with `build` or `run`.
    """
    failures: dict[str, str] = {}
    names = classes_of(model_type)
    if not names:
        raise RuntimeError("build: no class for this type among the auto models")
    for variant in VARIANTS:
        try:
            config = tiny_config(model_type, variant)
        except Exception as error:  # a variant that does not fit this type; the next one may
            failures.setdefault("build", f"{type(error).__name__}: {error}")
            continue
        for name in names[:3]:
            try:
                model = build(name, config, shrunken=variant.width > 0)
            except TooLarge as error:
                failures["large"] = str(error)
                continue
            except Exception as error:
                failures.setdefault("build", f"{type(error).__name__}: {error}")
                continue
            torch.manual_seed(1)
            for inputs in candidates(model, model.config):
                try:
                    with torch.no_grad():
                        model(**inputs)
                except Exception as error:
                    failures.setdefault("run", f"{type(error).__name__}: {error}")
                    continue
                return model, inputs, variant
    for stage in ("run", "build"):
        if stage in failures:
            raise RuntimeError(f"{stage}: {failures[stage]}")
    raise TooLarge(failures.get("large", "no variant"))
