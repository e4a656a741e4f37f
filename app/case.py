"""What a command of the shell is run on: a model and its input, as the arguments name them.

Letters: S tokens.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from headscope.app.escape import visible
from headscope.app.outcome import Token, token_of
from headscope.kernels.errors import InputError
from headscope.probe import load
from headscope.probe.models import context_window, embedded_folder, tokenize

SAMPLE = "The quick brown fox jumps over the lazy dog."
SAMPLE_PROMPT = "a plain eight"  # for embedded:mmdit


@dataclass(frozen=True)
class Case:
    """A model and what it is run on."""

    name: str
    model: nn.Module
    processor: Any
    inputs: dict[str, Tensor]

    @property
    def reads_text(self) -> bool:
        return "input_ids" in self.inputs

    def token(self, id: int) -> Token:
        """What to call an entry of the model's answer: a token, or a class."""
        if self.reads_text:
            return token_of(self.processor, id)
        names = getattr(getattr(self.model, "config", None), "id2label", None) or {}
        return Token(id, visible(str(names.get(id, id))))


def case_of(arguments: argparse.Namespace) -> Case:
    """Load the model that is named and read its input.

    Raises:
        InputError: an input that this model cannot take; no input for a command that needs one.
        ModelError: the model cannot be loaded.
    """
    text, tokens = given_text(arguments), getattr(arguments, "tokens", None)
    print(f"loading {visible(arguments.model)} …", file=sys.stderr, flush=True)
    name = str(arguments.model)
    options = {option: getattr(arguments, option) for option in ("device", "dtype", "task", "revision")}
    model, processor = load(name, **options)
    if name == "embedded:vit":
        if text is not None:
            raise InputError("embedded:vit reads images: give --image N instead of text")
        if tokens is not None:
            raise InputError("embedded:vit reads images, which have no --tokens")
        inputs = _as_inputs(model, processor(held_out_digit(0 if arguments.image is None else arguments.image)))
    elif arguments.image is not None:
        raise InputError(f"--image is for embedded:vit, not for {name}")
    elif name == "embedded:mmdit":
        if arguments.command in ("edit", "attribute", "report"):
            raise InputError(f"embedded:mmdit draws pictures and predicts no token or class: `{arguments.command}` is for models that do")
        if tokens is not None:
            raise InputError("embedded:mmdit reads prompts of 8 words, which have no --tokens")
        inputs = processor(SAMPLE_PROMPT if text is None else text)
    elif not callable(getattr(processor, "decode", None)):
        raise InputError(f"{name} has no tokenizer, so the command line cannot feed it: use headscope.probe.Probe from Python")
    else:
        if text is None and arguments.command == "edit":
            raise InputError("nothing to read: give --text, --text-file, or --text - for standard input")
        text = SAMPLE if text is None else text
        inputs = tokenize(processor, text, model) if tokens is None else _repeated(processor, text, model, tokens)
    return Case(name, model, processor, inputs)


def _repeated(tokenizer: Any, text: str, model: nn.Module, count: int) -> dict[str, Tensor]:
    """The text again and again until there are `count` tokens; what the tokenizer puts around a text stands there once."""
    limit = context_window(model)
    if limit is not None and count > limit:
        raise InputError(f"--tokens {count}: the context window of this model is {limit} tokens, so give {limit} or fewer")
    try:
        encoded = dict(tokenizer(text, return_tensors="pt", return_special_tokens_mask=True, verbose=False))
    except (UnicodeEncodeError, TypeError) as error:
        raise InputError(f"the text cannot be written as UTF-8, so it has no tokens: {error}") from error
    own = (encoded.pop("special_tokens_mask")[0] == 0).nonzero().flatten()  # [S]
    if not len(own):
        raise InputError(f"the tokenizer makes no token of {text[:40]!r}: give another text")
    front, back = torch.arange(int(own[0])), torch.arange(int(own[-1]) + 1, encoded["input_ids"].shape[1])
    room = count - len(front) - len(back)
    if room < 1:
        raise InputError(f"--tokens {count}: give at least {len(front) + len(back) + 1}, for the tokenizer adds some of its own")
    order = torch.cat([front, own.repeat(-(-room // len(own)))[:room], back])  # [count]
    device = next(model.parameters()).device
    return {str(name): value[:, order].to(device) for name, value in encoded.items()}


def given_text(arguments: argparse.Namespace) -> str | None:
    """The text that --text, --text-file or standard input gives."""
    if arguments.text == "-":
        text: str = sys.stdin.read()
        return text
    if arguments.text_file is not None:
        try:
            return Path(arguments.text_file).read_text(encoding="utf-8")
        except OSError as error:
            raise InputError(f"{arguments.text_file!r} cannot be read: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise InputError(f"{arguments.text_file!r} is not UTF-8 text (byte {error.start})") from error
    return None if arguments.text is None else str(arguments.text)


def held_out_digit(number: int) -> Any:
    """[8, 8], one of the digits that embedded:vit was not trained on."""
    with safe_open(embedded_folder("vit") / "held_out.safetensors", "pt") as file:
        images = file.get_tensor("images")
    if not 0 <= number < len(images):
        raise InputError(f"no image {number}: there are {len(images)} held-out digits, 0 to {len(images) - 1}")
    return images[number].numpy()


def _as_inputs(model: nn.Module, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    weight = next(model.parameters())
    return {name: value.to(weight.device, weight.dtype) for name, value in inputs.items()}
