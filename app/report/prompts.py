"""What a report is about: prompts, read from a file of JSON lines or given from Python, and made into a model's inputs.

Letters: S tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headscope.app.case import held_out_digit
from headscope.kernels.errors import InputError
from headscope.probe.attribution.target import Scalar, Target
from headscope.probe.models import digits_processor, tokenize

KEYS = ("id", "text", "image", "target", "against")


@dataclass(frozen=True, eq=False)
class Prompt:
    """One example of a report.

    Attributes:
        id: what the report calls it.
        text: for a model that reads text.
        image: the number of a held-out digit, for embedded:vit.
        inputs: keyword inputs of one sample, for any other model; such an example cannot be recomputed from the sidecar.
        target: a token or class, by number or by name; None for the largest logit. From Python also a `Target` or a function.
        against: a token or class whose logit is subtracted.
    """

    id: str
    text: str | None = None
    image: int | None = None
    inputs: Mapping[str, Tensor] | None = None
    target: int | str | Target | Scalar | None = None
    against: int | str | None = None


@dataclass(frozen=True)
class Prompts:
    """The examples, where they came from, and the digest of all of it."""

    rows: tuple[Prompt, ...]
    source: str
    sha256: str
    total: int

    def first(self, count: int | None) -> Prompts:
        """The same with only the first `count` examples; `total` keeps counting all."""
        if count is not None and count < 1:
            raise InputError(f"{count} examples: give 1 or more")
        return self if count is None else Prompts(self.rows[:count], self.source, self.sha256, self.total)


def read_prompts(path: Path) -> Prompts:
    """Every line of a file of JSON lines, such as {"id": "a", "text": "The cat sat on the", "target": " mat"}.

    Raises:
        InputError: the file cannot be read, has no line, or a line is not understood; the message names its number.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if line.strip():
            rows.append(_row(line, f"{path.name} line {number}", str(number)))
    if not rows:
        raise InputError(f'{path.name} has no example: give one JSON object a line, such as {{"text": "…"}}')
    seen: set[str] = set()
    for row in rows:
        if row.id in seen:
            raise InputError(f"{path.name} has two examples with the id {row.id!r}: give each its own, or none")
        seen.add(row.id)
    return Prompts(tuple(rows), path.name, hashlib.sha256(content).hexdigest(), len(rows))


def _row(line: bytes, where: str, number: str) -> Prompt:
    try:
        found = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f'{where} is {type(found).__name__}: give an object such as {{"text": "…"}}')
    unknown = [key for key in found if key not in KEYS]
    if unknown:
        raise InputError(f"{where} has {unknown[0]!r}: a line may have {', '.join(KEYS)}")
    kinds: dict[str, tuple[type, ...]] = {"id": (str, int), "text": (str,), "image": (int,), "target": (int, str), "against": (int, str)}
    for key, value in found.items():
        if not isinstance(value, kinds[key]) or isinstance(value, bool):
            raise InputError(f"{where}: {key} is {value!r}; it must be {' or '.join(kind.__name__ for kind in kinds[key])}")
    if ("text" in found) == ("image" in found):
        raise InputError(f"{where} needs a text, or an image for embedded:vit, and not both")
    return Prompt(str(found.get("id", number)), found.get("text"), found.get("image"), None, found.get("target"), found.get("against"))


def as_prompts(given: str | Path | Prompts | Sequence[str | Prompt]) -> Prompts:
    """What `build_report` takes: one text, a path to JSON lines, texts, or prompts.

    Raises:
        InputError: nothing among them, or what no prompt can be made of.
    """
    if isinstance(given, Prompts):
        return given
    if isinstance(given, Path):
        return read_prompts(given)
    single = isinstance(given, str)
    if not single and not isinstance(given, Sequence):
        raise InputError(f"data is {type(given).__name__}: give a text, texts, prompts, or a pathlib.Path to JSON lines")
    rows = [_prompt(row, str(place)) for place, row in enumerate([given] if isinstance(given, str) else given, 1)]
    if not rows:
        raise InputError("no examples: give at least one text")
    if len({row.id for row in rows}) < len(rows):
        raise InputError("two examples have the same id: give each its own")
    return Prompts(tuple(rows), "one text" if single else "Python", _digest(rows), len(rows))


def _prompt(row: object, number: str) -> Prompt:
    if isinstance(row, Prompt):
        return row
    if isinstance(row, str):
        return Prompt(number, row)
    raise InputError(f"example {number} is {type(row).__name__}: give a text or a Prompt")


def _digest(rows: Iterable[Prompt]) -> str:
    """Of what the prompts say; of tensors by their bytes."""
    found = hashlib.sha256()
    for row in rows:
        target = row.target if row.target is None or isinstance(row.target, int | str) else repr(row.target)
        found.update(json.dumps([row.id, row.text, row.image, target, row.against]).encode())
        for name, value in (row.inputs or {}).items():
            found.update(f"|{name}|".encode() + tensor_bytes(value))
    return found.hexdigest()


def tensor_bytes(value: Tensor) -> bytes:
    """Type, shape and content of a tensor."""
    raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8) if value.numel() else torch.empty(0, dtype=torch.uint8)
    return f"{value.dtype}{tuple(value.shape)}".encode() + raw.numpy().tobytes()


def inputs_of(prompt: Prompt, model: nn.Module, processor: Any) -> dict[str, Tensor]:
    """A prompt as keyword inputs of the model, each of one sample.

    Raises:
        InputError: the model cannot take it; the message names the example.
    """
    try:
        if prompt.inputs is not None:
            return dict(prompt.inputs)
        if prompt.image is not None:
            if processor is not digits_processor:
                raise InputError(
                    f"image {prompt.image} is a held-out digit, which only embedded:vit reads: give a text, or inputs from Python"
                )
            weight = next(model.parameters())
            return {name: value.to(weight.device, weight.dtype) for name, value in processor(held_out_digit(prompt.image)).items()}
        if not callable(getattr(processor, "decode", None)):
            raise InputError("this model has no tokenizer, so it cannot read a text: give images, or inputs from Python")
        inputs = tokenize(processor, prompt.text or "", model)
        config = getattr(model, "config", None)
        start = getattr(config, "decoder_start_token_id", None)
        if getattr(config, "is_encoder_decoder", False) and isinstance(start, int):
            inputs["decoder_input_ids"] = inputs["input_ids"].new_tensor([[start]])
    except InputError as error:
        raise InputError(f"example {prompt.id!r}: {error}") from error
    return inputs


def target_of(prompt: Prompt, model: nn.Module, processor: Any) -> int | Target | Scalar | None:
    """A prompt's target as `attribute` takes it: names of tokens and classes become numbers.

    Raises:
        InputError: a name that is no single token, and no class; something to subtract from nothing.
    """
    target = _number(prompt.target, prompt, model, processor) if isinstance(prompt.target, str) else prompt.target
    if prompt.against is None:
        return target
    if not isinstance(target, int):
        raise InputError(f"example {prompt.id!r}: against needs a target that is a token or class")
    against = _number(prompt.against, prompt, model, processor) if isinstance(prompt.against, str) else prompt.against
    return Target((target,), (against,))


def _number(name: str, prompt: Prompt, model: nn.Module, processor: Any) -> int:
    classes: Mapping[int, str] = getattr(getattr(model, "config", None), "id2label", None) or {}
    named = [id for id, label in classes.items() if label == name]
    if named and not hasattr(model, "lm_head"):
        return int(named[0])
    if not callable(getattr(processor, "encode", None)):
        raise InputError(f"example {prompt.id!r}: no class {name!r}: there are {', '.join(map(repr, classes.values())) or 'none'}")
    ids = processor.encode(name, add_special_tokens=False)
    if len(ids) != 1:
        pieces = ", ".join(repr(processor.decode([id])) for id in ids)
        raise InputError(f"example {prompt.id!r}: the target {name!r} is {len(ids)} tokens ({pieces}): give one of them, or its number")
    return int(ids[0])
