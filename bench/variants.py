"""Ways to run one model while looking at its attention or changing it: ours and other tools', each as one function.

Letters: B prompts, S tokens, H heads, Q/K query/key positions. Every function runs one forward (or one decoding) and returns
how many bytes of attention it kept. All tools run the same weights.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interventions import Edit, Plan, bias, call, scale, select
from headscope.probe import AttentionCall, Keep, Probe

NEW_TOKENS = 24


@dataclass(frozen=True)
class Shape:
    """A Llama-shaped model with random weights."""

    layers: int = 4
    heads: int = 8
    head_width: int = 64
    vocabulary: int = 2048
    positions: int = 4096


class Models:
    """The model as each tool wants it, built when first asked for: one set of weights, from one seed."""

    def __init__(self, shape: Shape | None = None) -> None:
        self.shape = shape or Shape()

    @cached_property
    def plain(self) -> Any:
        """With torch's fused attention."""
        return self._build("sdpa", None)

    @cached_property
    def eager(self) -> Any:
        """With transformers' written-out attention; the parameters are those of `plain`."""
        return self._build("eager", self.plain)

    @cached_property
    def probe(self) -> Probe:
        return Probe(self.plain)

    @cached_property
    def bridge(self) -> Any:
        """TransformerLens' wrapper round a copy: it takes the modules of what it wraps apart."""
        from transformer_lens.model_bridge.sources._bridge_builder import build_bridge_from_module

        model = copy.deepcopy(self.eager)
        return build_bridge_from_module(model, "LlamaForCausalLM", hf_config=model.config)

    @cached_property
    def nnsight(self) -> Any:
        """nnsight's wrapper."""
        from nnsight import NNsight

        return NNsight(self.eager)

    def prompt(self, length: int) -> Tensor:
        """Random token ids, [1, S]."""
        return torch.randint(2, self.shape.vocabulary, (1, length), generator=torch.Generator().manual_seed(length))

    def _build(self, attention: str, twin: nn.Module | None) -> Any:
        from transformers import LlamaConfig, LlamaForCausalLM

        shape = self.shape
        hidden = shape.heads * shape.head_width
        config = LlamaConfig(
            vocab_size=shape.vocabulary, hidden_size=hidden, intermediate_size=8 * hidden // 3 // 32 * 32, num_hidden_layers=shape.layers,
            num_attention_heads=shape.heads, num_key_value_heads=shape.heads, max_position_embeddings=shape.positions, pad_token_id=0,
            bos_token_id=1, eos_token_id=None,
        )  # fmt: skip
        config._attn_implementation = attention
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model: Any = LlamaForCausalLM(config)
            model.eval()
        if twin is not None:
            model.load_state_dict(twin.state_dict(), assign=True)
        return model


@dataclass(frozen=True)
class Variant:
    """One row of the table.

    Attributes:
        name: key in the results and on the command line.
        tool: whose way it is.
        label: what is done.
        run: does it once and returns the bytes of attention kept.
        requires: a module that must be importable.
    """

    name: str
    tool: str
    label: str
    run: Callable[[Models, Tensor], int]
    requires: str | None = None

    @property
    def installed(self) -> bool:
        return self.requires is None or find_spec(self.requires) is not None


def nbytes(tensors: Iterable[Tensor]) -> int:
    """Bytes held by tensors, each storage counted once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def plain(models: Models, ids: Tensor) -> int:
    models.plain(ids, use_cache=False)
    return 0


def eager(models: Models, ids: Tensor) -> int:
    models.eager(ids, use_cache=False)
    return 0


def eager_patterns(models: Models, ids: Tensor) -> int:
    return nbytes(models.eager(ids, use_cache=False, output_attentions=True).attentions)


def bridge_patterns(models: Models, ids: Tensor) -> int:
    _, cache = models.bridge.run_with_cache(ids, names_filter=lambda name: name.endswith("hook_pattern"), use_cache=False)
    return nbytes(cache.values())


def nnsight_patterns(models: Models, ids: Tensor) -> int:
    model = models.nnsight
    with model.trace(ids, use_cache=False):
        kept: Any = [layer.self_attn.output[1].save() for layer in model.model.layers]
        kept.save()
    return nbytes(kept)


def keeping(keep: Keep) -> Callable[[Models, Tensor], int]:
    """Headscope's probe round a plain forward."""

    def run(models: Models, ids: Tensor) -> int:
        with models.probe.capture(keep) as seen:
            models.plain(ids, use_cache=False)
        return seen.nbytes

    return run


def editing(*edits: Edit) -> Callable[[Models, Tensor], int]:
    """Headscope's plan round a plain forward."""

    def run(models: Models, ids: Tensor) -> int:
        with Plan(edits).on(models.plain):
            models.plain(ids, use_cache=False)
        return 0

    return run


def copied(value: Tensor, _: AttentionCall) -> Tensor:
    """An edit that changes nothing but goes all the way: what comes back is a new tensor."""
    return value.clone()


FORWARD = [
    Variant("plain", "transformers", "fused attention, nothing looked at", plain),
    Variant("plain-again", "transformers", "the same once more: the noise of this table", plain),
    Variant("eager", "transformers", "eager attention, nothing looked at", eager),
    Variant("eager-patterns", "transformers", "eager, `output_attentions=True`", eager_patterns),
    Variant("transformer-lens", "TransformerLens", "`run_with_cache`, patterns only", bridge_patterns, "transformer_lens"),
    Variant("nnsight", "nnsight", "patterns saved in a trace (eager)", nnsight_patterns, "nnsight"),
    Variant("nothing", "Headscope", "`Keep(qk=False)`: nothing kept", keeping(Keep(qk=False))),
    Variant("qk", "Headscope", "`Keep()`: q and k, patterns on demand", keeping(Keep())),
    Variant("statistics", "Headscope", "`Keep(statistics=True)`", keeping(Keep(statistics=True))),
    Variant("row", "Headscope", "`Keep(rows=[-1])`: one row of each pattern", keeping(Keep(rows=[-1]))),
    Variant("patterns", "Headscope", "`Keep(pattern=True)`", keeping(Keep(pattern=True))),
    Variant("identity-call", "Headscope", "`z` of all layers through a callable that copies it", editing(Edit("z", call(copied)))),
    Variant("identity-scale", "Headscope", "`scale(1.0)` on `z` of all layers", editing(Edit("z", scale(1.0)))),
    Variant("zero-head", "Headscope", "`scale(0.0)` on `z` of one head", editing(Edit("z", scale(0.0), select(layer=1, head=5)))),
    Variant("bias", "Headscope", "`bias(-2.0)` on one key, all layers", editing(Edit("scores", bias(-2.0), select(keys=[1])))),
    Variant(
        "pattern-edit", "Headscope", "`pattern` of one layer through a callable that copies it",
        editing(Edit("pattern", call(copied), select(layer=1))),
    ),
]  # fmt: skip


def generate(model: Any, ids: Tensor, **options: bool) -> Any:
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW_TOKENS, do_sample=False, **options)


def plain_decode(models: Models, ids: Tensor) -> int:
    generate(models.plain, ids)
    return 0


def eager_decode(models: Models, ids: Tensor) -> int:
    generate(models.eager, ids)
    return 0


def eager_patterns_decode(models: Models, ids: Tensor) -> int:
    found = generate(models.eager, ids, return_dict_in_generate=True, output_attentions=True)
    return nbytes(layer for step in found.attentions for layer in step)


def keeping_decode(keep: Keep) -> Callable[[Models, Tensor], int]:
    def run(models: Models, ids: Tensor) -> int:
        with models.probe.capture(keep) as seen:
            generate(models.plain, ids)
        return seen.nbytes

    return run


def editing_decode(*edits: Edit) -> Callable[[Models, Tensor], int]:
    def run(models: Models, ids: Tensor) -> int:
        with Plan(edits).on(models.plain):
            generate(models.plain, ids)
        return 0

    return run


DECODE = [
    Variant("plain", "transformers", "", plain_decode),
    Variant("plain-again", "transformers", "", plain_decode),
    Variant("eager", "transformers", "", eager_decode),
    Variant("eager-patterns", "transformers", "", eager_patterns_decode),
    Variant("nothing", "Headscope", "", keeping_decode(Keep(qk=False))),
    Variant("qk", "Headscope", "", keeping_decode(Keep())),
    Variant("patterns", "Headscope", "", keeping_decode(Keep(pattern=True))),
    Variant("identity-call", "Headscope", "", editing_decode(Edit("z", call(copied)))),
]
