"""Ways to attribute one logit of a model to its inputs: plain gradients, ours and other tools', each as one function.

Letters: B samples, S tokens, E width of an embedding. Every way goes from the same weights and the same input to a tensor of numbers at
the inputs, [1, S] for text and [1, C, rows, columns] for an image. One whose library changes classes for the whole process runs in a
process of its own, which waits for its turn (`Peer`).
"""

from __future__ import annotations

import gc
import importlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import astuple, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headscope.probe import load
from headscope.probe.attribution.attribute import attribute
from headscope.probe.attribution.target import Target

ROOT = Path(__file__).resolve().parents[1]
LXT = "HEADSCOPE_LXT"  # environment variable: a folder from which `lxt` can be imported
NO_LXT = f"{LXT} is not set"
CLASS = 1  # the class or token whose logit is attributed
STEPS = 50  # of integrated gradients
AT_ONCE = 1024  # tokens that integrated gradients works on at a time
PATCHED = {  # models for which LXT has rules -> the module that it patches
    "lm": "transformers.models.llama.modeling_llama",
    "tiny": "transformers.models.llama.modeling_llama",
    "gpt2": "transformers.models.gpt2.modeling_gpt2",
}


@dataclass(frozen=True)
class Case:
    """What is attributed.

    Attributes:
        model: `lm`, `gpt2`, `vit` or, for tests, `tiny`.
        attention: the model's own, `sdpa` or `eager`.
        tokens: of the text, or 1 and the patches of the image.
    """

    model: str
    attention: str
    tokens: int

    def __str__(self) -> str:
        return f"{self.model}, {self.tokens} tokens, {self.attention}"


@dataclass(frozen=True, eq=False)
class Subject:
    """A model and one input.

    Attributes:
        inputs: as the model takes them.
        start: what gradients are taken with respect to: embeddings [1, S, E], or pixels.
        named: the name under which the model takes `start`.
    """

    case: Case
    model: nn.Module
    inputs: dict[str, Any]
    start: Tensor
    named: str

    def logit(self, start: Tensor) -> Tensor:
        """[B], after the last token where there are several."""
        return self._picked({**{name: v for name, v in self.inputs.items() if not isinstance(v, Tensor)}, self.named: start})

    def from_inputs(self) -> Tensor:
        """[1], the same from the model's own inputs."""
        return self._picked(self.inputs)

    def _picked(self, inputs: dict[str, Any]) -> Tensor:
        logits: Tensor = self.model(**inputs).logits
        return logits[:, CLASS] if logits.dim() == 2 else logits[:, -1, CLASS]

    def folded(self, relevance: Tensor) -> Tensor:
        """Summed over the width of an embedding."""
        return relevance.sum(-1) if self.named == "inputs_embeds" else relevance


@cache
def built(model: str, attention: str) -> nn.Module:
    """A model in evaluation mode whose weights want no gradient; random weights come from one seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        found: Any = _made(model)
    found.set_attn_implementation(attention)
    found.eval().requires_grad_(False)
    checked: nn.Module = found
    return checked


def make_subject(case: Case) -> Subject:
    """The model of a case, and an input of its length."""
    model: Any = built(case.model, case.attention)
    generator = torch.Generator().manual_seed(case.tokens)
    if case.model == "vit":
        pixels = torch.randn(1, 3, 224, 224, generator=generator)
        return Subject(case, model, {"pixel_values": pixels}, pixels, "pixel_values")
    ids = torch.randint(3, model.config.vocab_size, (1, case.tokens), generator=generator)
    inputs = {"input_ids": ids, "use_cache": False}
    return Subject(case, model, inputs, model.get_input_embeddings()(ids).detach(), "inputs_embeds")


def gradients(subject: Subject) -> Tensor:
    """Gradient times input: one forward, one backward to the inputs."""
    start = subject.start.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(subject.logit(start).sum(), start)
    return subject.folded(start.detach() * gradient)


def training(subject: Subject) -> Tensor:
    """One forward, one backward to all weights, as a training step does."""
    subject.model.requires_grad_(True)
    try:
        found = torch.autograd.grad(subject.from_inputs().sum(), list(subject.model.parameters()), allow_unused=True)
    finally:
        subject.model.requires_grad_(False)
    return torch.stack([gradient.square().sum() for gradient in found if gradient is not None])


def attnlrp(subject: Subject) -> Tensor:
    """Everything that `attribute` gives by default."""
    return _attributed(subject, whole=True)


def attnlrp_inputs(subject: Subject) -> Tensor:
    """The relevance of the inputs, and the books."""
    return _attributed(subject, whole=False)


def captum(subject: Subject) -> Tensor:
    """Captum's integrated gradients from zeros."""
    at_once = max(1, AT_ONCE // subject.case.tokens)
    method = importlib.import_module("captum.attr").IntegratedGradients(subject.logit)
    found: Tensor = method.attribute(subject.start, n_steps=STEPS, internal_batch_size=at_once)
    return subject.folded(found.detach())


@dataclass(frozen=True)
class Way:
    """One column of the table.

    Attributes:
        name: key in the results and on the command line.
        tool: whose way it is.
        label: what is done.
        run: does it once; None where a `Peer` does it.
        requires: a module that must be importable.
        once: too slow to repeat: timed in the first round alone, and with fused attention only.
    """

    name: str
    tool: str
    label: str
    run: Callable[[Subject], Tensor] | None
    requires: str | None = None
    once: bool = False

    def why_not(self, case: Case) -> str | None:
        """Why this cannot be done here; None where it can."""
        if self.run is None and case.model not in PATCHED:
            return "no rules for this model"
        if self.run is None and not os.environ.get(LXT):
            return NO_LXT
        if self.once and case.attention != "sdpa":
            return "left out"
        if self.requires is not None:
            try:
                importlib.import_module(self.requires)
            except ImportError as error:
                return f"cannot be imported ({error})"
        return None


WAYS = [
    Way("gradients", "torch", "forward, and backward to the inputs", gradients),
    Way("again", "torch", "the same once more: the noise of this table", gradients),
    Way("training", "torch", "forward, and backward to all weights", training),
    Way("attnlrp", "Headscope", "`attribute(…)`: inputs, heads, blocks, their parts, books", attnlrp),
    Way("attnlrp-inputs", "Headscope", "the same with `heads=False, layers=False`: inputs and books", attnlrp_inputs),
    Way("lxt", "LXT", "AttnLRP in `lxt.efficient`, inputs", None),
    Way("captum", "Captum", f"`IntegratedGradients`, {STEPS} steps, inputs", captum, "captum.attr", once=True),
]


class Peer:
    """LXT in a process of its own: it patches classes and cannot take that back.

    Raises:
        ImportError: it cannot be imported there, with the reason.
    """

    def __init__(self, case: Case) -> None:
        self._errors = tempfile.TemporaryFile("w+")  # noqa: SIM115 (close() closes it)
        self._process = subprocess.Popen(
            [sys.executable, "-W", "ignore", "-m", "bench.attribution", "lxt", *map(str, astuple(case))],
            cwd=ROOT, env=peer_environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, text=True,
        )  # fmt: skip
        try:
            first = self._read()
            if "absent" in first:
                raise ImportError(first["absent"])
            self.relevance = torch.tensor(first["relevance"], dtype=torch.float64)
        except BaseException:
            self.close()
            raise

    def seconds(self, repeats: int) -> float:
        """CPU seconds of one attribution, the mean of some."""
        assert self._process.stdin is not None
        print(repeats, file=self._process.stdin, flush=True)
        return float(self._read()["seconds"])

    def close(self) -> None:
        for stream in (self._process.stdin, self._process.stdout, self._errors):
            if stream is not None:
                stream.close()
        self._process.wait(timeout=60)

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._errors.seek(0)
            raise RuntimeError(f"the process of LXT ended:\n{self._errors.read()[-2000:]}")
        found: dict[str, Any] = json.loads(line)
        return found


def peer_environment() -> dict[str, str]:
    """Where `lxt` can be imported: for a process of its own."""
    paths = [os.environ.get(LXT, ""), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}


def patched(case: Case) -> Subject:
    """A case whose model's classes LXT has patched, for good.

    Raises:
        ImportError: LXT cannot be imported.
    """
    importlib.import_module("lxt.efficient").monkey_patch(importlib.import_module(PATCHED[case.model]))
    return make_subject(case)


def serve(case: Case) -> None:
    """The other end of a `Peer`: says what LXT finds, then answers every number of repeats with the time they took."""
    try:
        subject = patched(case)
    except ImportError as error:
        print(json.dumps({"absent": f"cannot be imported ({error})"}), flush=True)
        return
    print(json.dumps({"relevance": gradients(subject).double().tolist()}), flush=True)
    for line in sys.stdin:
        print(json.dumps({"seconds": timed(gradients, subject, int(line))}), flush=True)


def timed(run: Callable[[Subject], Tensor], subject: Subject, repeats: int) -> float:
    """CPU seconds of one run, the mean of some."""
    gc.collect()  # nobody pays for another's garbage
    start = time.process_time()
    for _ in range(repeats):
        run(subject)
    return (time.process_time() - start) / repeats


def lxt_revision() -> str | None:
    """The commit that lies in the folder of LXT, where that is a checkout."""
    folder = os.environ.get(LXT)
    if not folder:
        return None
    done = subprocess.run(["git", "-C", folder, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


def shorter(case: Case, tokens: int) -> Case:
    return replace(case, tokens=tokens)


def _attributed(subject: Subject, whole: bool) -> Tensor:
    found = attribute(subject.model, subject.inputs, Target((CLASS,)), heads=whole, layers=whole)
    return next(iter(found.inputs.values()))


def _made(model: str) -> Any:
    if model == "lm":
        return load("embedded:lm")[0]
    if model == "gpt2":
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(GPT2Config(n_layer=6))
    if model == "vit":
        from transformers import ViTConfig, ViTForImageClassification

        return ViTForImageClassification(ViTConfig(hidden_size=384, num_attention_heads=6, num_hidden_layers=12, intermediate_size=1536))
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
            max_position_embeddings=512, pad_token_id=0,
        )
    )  # fmt: skip
