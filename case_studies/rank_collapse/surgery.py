"""Part d: trained models with their skips taken out, and whether the health report finds what breaks.

Letters: B samples, N tokens, E width, L layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rank import residual
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from headscope.probe import load
from headscope.probe.health.measure import measure_health
from headscope.probe.models import embedded_folder

ROOT = Path(__file__).parents[2]
PARTS = {  # the attention, the norm before it and the norm before the MLP, by the name of the attention
    "self_attn": ("input_layernorm", "post_attention_layernorm"),
    "attention": ("layernorm_before", "layernorm_after"),
}


@dataclass(frozen=True)
class Cut:
    """What is taken out of every block."""

    attention_skip: bool = False
    mlp_skip: bool = False
    mlp: bool = False
    weights: bool = False  # drawn anew
    layers: int | None = None  # of a model with new weights; None: as many as it has


CUTS = {
    "intact": Cut(),
    "without attention skips": Cut(attention_skip=True),
    "without any skip": Cut(attention_skip=True, mlp_skip=True),
    "attention alone": Cut(attention_skip=True, mlp_skip=True, mlp=True),
    "new weights": Cut(weights=True),
    "new weights, no attention skips": Cut(attention_skip=True, weights=True),
    "new weights, 24 layers, no attention skips": Cut(attention_skip=True, weights=True, layers=24),
}


@dataclass(frozen=True)
class Subject:
    """A trained model in float64, and what it is measured on.

    Attributes:
        name: of the model.
        what: the samples, in a sentence.
        model: with its layers in `layers`.
        layers: the list of blocks, which the surgery changes.
        inputs: keyword inputs.
        answers: [B] classes, or [B, N] the tokens that follow; -100 is not counted.
        causal: whether tokens see only what stands before.
    """

    name: str
    what: str
    model: PreTrainedModel
    layers: nn.ModuleList
    inputs: dict[str, Tensor]
    answers: Tensor
    causal: bool


class Block(nn.Module):
    """A pre-norm transformer block without the skip over its attention, over its MLP, or without the MLP; the parts are the model's own."""

    def __init__(self, layer: nn.Module, cut: Cut) -> None:
        super().__init__()
        for name, part in layer.named_children():
            self.add_module(name, part)  # under the same names, so that the attention keeps its module path
        self.attends = next(name for name in PARTS if name in self._modules)
        self.cut = cut

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        before, between = (self.get_submodule(name) for name in PARTS[self.attends])
        x: Tensor = self.get_submodule(self.attends)(before(hidden_states), *args, **kwargs)[0]
        if not self.cut.attention_skip:
            x = hidden_states + x
        if self.cut.mlp:
            return x
        y: Tensor = self.get_submodule("mlp")(between(x))
        return y if self.cut.mlp_skip else x + y


@contextmanager
def broken(layers: nn.ModuleList, cut: Cut) -> Iterator[None]:
    """The blocks without what is cut while the context is open; afterwards the model is as it was."""
    originals = list(layers)
    try:
        if cut.attention_skip or cut.mlp_skip or cut.mlp:
            for place, layer in enumerate(originals):
                layers[place] = Block(layer, cut).train(layer.training)
        yield
    finally:
        for place, layer in enumerate(originals):
            layers[place] = layer


def language(samples: int, tokens: int, cut: Cut) -> Subject:
    """`embedded:lm` (causal) on pieces of this project's licence."""
    model, tokenizer = load("embedded:lm", dtype="float64")
    text = " ".join((ROOT / "LICENSE").read_text(encoding="utf-8").split())
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])[: samples * (tokens - 1)].view(samples, -1)
    ids = torch.cat([torch.full((samples, 1), tokenizer.bos_token_id), ids], 1)
    answers = torch.cat([ids[:, 1:], torch.full((samples, 1), -100)], 1)
    model = drawn_anew(model, cut.layers) if cut.weights else model
    what = f"{samples} pieces of this project's licence, {tokens} tokens each"
    return Subject("embedded:lm", what, model, model.model.layers, {"input_ids": ids}, answers, causal=True)


def digits(samples: int, cut: Cut) -> Subject:
    """`embedded:vit` (bidirectional) on digits that it was not trained on."""
    model, processor = load("embedded:vit", dtype="float64")
    held = load_file(embedded_folder("vit") / "held_out.safetensors")
    pixels = processor(held["images"][:samples].numpy())["pixel_values"].double()
    model = drawn_anew(model, cut.layers) if cut.weights else model
    what = f"{samples} held-out digits, [CLS] and 16 patches each"
    return Subject("embedded:vit", what, model, model.vit.layers, {"pixel_values": pixels}, held["labels"][:samples], causal=False)


def drawn_anew(model: PreTrainedModel, layers: int | None) -> PreTrainedModel:
    """A model of the same class and config with fresh weights, seed 0, and as many layers as asked for."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = layers or config.num_hidden_layers
    with torch.random.fork_rng([]):
        torch.manual_seed(0)
        return type(model)(config).double().eval()


@torch.no_grad()
def measure_states(subject: Subject) -> dict[str, Any]:
    """The residual before and after each block, measured here and not by the report; and how often the model is right."""
    states: list[Tensor] = []
    handles = [
        subject.layers[0].register_forward_pre_hook(lambda module, args, kwargs: states.append(_first(args, kwargs)), with_kwargs=True)
    ]
    handles += [layer.register_forward_hook(lambda module, args, out: states.append(_first(out, {}))) for layer in subject.layers]
    try:
        logits = subject.model(**subject.inputs).logits
    finally:
        for handle in handles:
            handle.remove()
    counted = subject.answers != -100
    right = (logits.argmax(-1) == subject.answers)[counted].double().mean()
    return {"residual": [float(residual(state).mean()) for state in states], "accuracy": float(right)}


def _first(args: Any, kwargs: dict[str, Any]) -> Tensor:
    if isinstance(args, Tensor):
        return args
    found: Tensor = args[0] if args else kwargs["hidden_states"]
    return found


def measure_report(subject: Subject) -> dict[str, Any]:
    """What the health report finds: its findings, the residual it measured behind each block, and the residual's limits."""
    report = measure_health(subject.model, dict(subject.inputs))
    findings = [
        {"severity": row.severity, "rule": row.rule, "layer": row.layer, "head": row.head, "why": row.why} for row in report.findings
    ]
    residuals = {row.layer: row.residual for row in report.streams if row.place == "output"}
    return {
        "findings": findings,
        "residual": [residuals[layer] for layer in sorted(residuals)],
        "warn": report.thresholds["residual-warn"],
        "worst": report.worst,
    }
