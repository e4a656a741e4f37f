"""What a plan is tried on: examples from a file of JSON lines or from Python, and each of them as a model's inputs.

    {"id": "a", "text": "The capital of France is", "target": " Paris", "against": " Rome"}
    {"id": "b", "text": "Water is", "benign": true}

Letters: S tokens.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interventions.language.prompts import samples_of
from headscope.kernels.errors import InputError
from headscope.probe.attribution.target import id_named
from headscope.probe.models import tokenize

KINDS: dict[str, tuple[type, ...]] = {
    "id": (str, int), "text": (str,), "prompt": (str,), "image": (int,), "target": (int, str), "label": (int, str),
    "against": (int, str), "benign": (bool,), "roles": (dict,), "facts": (dict,),
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Example:
    """One example.

    Attributes:
        id: what results call it.
        text: what a language model reads.
        inputs: keyword inputs of one sample, for any other model.
        image: the number of a held-out digit, which the command line turns into inputs of embedded:vit.
        target: the token or class that is right (or that should go away), by number or by name.
        against: one to compare it with.
        benign: what should not change.
        roles: positions of its tokens, by role.
        facts: anything else that a metric of one's own wants to know.
        where: its place in a file, for messages.
    """

    id: str
    text: str | None = None
    inputs: Mapping[str, Any] | None = None
    image: int | None = None
    target: int | str | None = None
    against: int | str | None = None
    benign: bool = False
    roles: Mapping[str, Sequence[int]] | None = None
    facts: Mapping[str, Any] = field(default_factory=dict)
    where: str = ""

    @property
    def name(self) -> str:
        """What a message calls it."""
        return f"{self.where} (example {self.id!r})" if self.where else f"example {self.id!r}"


@dataclass(frozen=True, eq=False)
class Case:
    """An example as a model takes it: keyword inputs of one sample, its target and what it is compared with as numbers."""

    example: Example
    inputs: dict[str, Any]
    target: int | None
    against: int | None

    @property
    def input_ids(self) -> Tensor | None:
        """[1, S]; None for what is no text."""
        ids = self.inputs.get("input_ids")
        return ids if isinstance(ids, Tensor) else None

    @property
    def tokens(self) -> int:
        """S; of what is no text, its numbers."""
        return sum(value.numel() for value in self.inputs.values() if isinstance(value, Tensor)) if self.input_ids is None else (
            self.input_ids.shape[-1]
        )  # fmt: skip


def read_examples(path: str | Path) -> list[Example]:
    """Every line of a file of JSON lines.

    Raises:
        InputError: the file cannot be read, holds no line, or a line is not understood; the message names its number.
    """
    file = Path(path)
    try:
        content = file.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except OSError as error:
        raise InputError(f"{str(file)!r} cannot be read: {error.strerror}") from error
    found = [_line(line, f"{file.name} line {number}", str(number)) for number, line in enumerate(content.split(b"\n"), 1) if line.strip()]
    if not found:
        raise InputError(f'{file.name} has no example: give one JSON object a line, such as {{"text": "…", "target": " word"}}')
    return _distinct(found, file.name)


def as_examples(given: str | Path | Iterable[Any], what: str = "data") -> list[Example]:
    """What `evaluate` takes: a path to JSON lines, or texts, examples, mappings of their fields, and keyword inputs of a model.

    Raises:
        InputError: nothing among them, or what no example can be made of.
    """
    if isinstance(given, (str, Path)):
        return read_examples(given)
    if isinstance(given, Mapping) or not isinstance(given, Iterable):
        raise InputError(f"{what} is {type(given).__name__}: give a path to JSON lines, or a list of examples, texts or keyword inputs")
    found: list[Example] = []
    for place, row in enumerate(given, 1):
        if isinstance(row, Example):
            found.append(row)
        elif isinstance(row, str):
            found.append(Example(str(place), row))
        elif isinstance(row, Mapping) and not set(row) & {"text", "prompt", "image", "inputs"}:
            samples = samples_of(row, f"{what}, entry {place},")
            found += [Example(f"{place}.{n}" if len(samples) > 1 else str(place), None, one) for n, one in enumerate(samples, 1)]
        elif isinstance(row, Mapping):
            found.append(_example(dict(row), f"{what}, entry {place}", str(place), ("inputs",)))
        else:
            raise InputError(f"{what}, entry {place}, is {type(row).__name__}: give a text, an Example, or a mapping such as {{'text': …}}")
    if not found:
        raise InputError(f"{what} is empty: give at least one example")
    return _distinct(found, what)


def case_of(example: Example, model: nn.Module, tokenizer: Any) -> Case:
    """An example as inputs of this model.

    Raises:
        InputError: the model cannot take it; the message names the example.
    """
    try:
        inputs = dict(example.inputs) if example.inputs is not None else _read(example, model, tokenizer)
        target, against = (_named(name, model, tokenizer) for name in (example.target, example.against))
    except InputError as error:
        raise InputError(f"{example.name}: {error}") from error
    return Case(example, inputs, target, against)


def digest(examples: Iterable[Example]) -> str:
    """`sha256:` over all that the examples say, tensors included."""
    found = hashlib.sha256()
    for one in examples:
        said = [one.id, one.text, one.image, one.target, one.against, one.benign, one.roles, one.facts]
        found.update(json.dumps(said, default=str).encode())
        for name, value in sorted((one.inputs or {}).items()):
            found.update(f"|{name}|".encode() + _content(value))
    return f"sha256:{found.hexdigest()}"


def _named(name: int | str | None, model: nn.Module, tokenizer: Any) -> int | None:
    """A class by its label where the model is a classifier, else a token."""
    if name is None or isinstance(name, int):
        return name
    labels = None if hasattr(model, "lm_head") else getattr(getattr(model, "config", None), "id2label", None)
    reader = None if labels and name in labels.values() else tokenizer
    try:
        return id_named(name, reader, labels)
    except InputError as error:
        if reader is None or name.startswith(" ") or len(reader.encode(f" {name}", add_special_tokens=False)) != 1:
            raise
        raise InputError(f"{error}; {' ' + name!r}, with the space that stands before a word, is one") from error


def _read(example: Example, model: nn.Module, tokenizer: Any) -> dict[str, Any]:
    if example.image is not None:
        raise InputError(f"image {example.image} is a held-out digit, which only the command line reads: give inputs={{...}}")
    if example.text is None:
        raise InputError("it has neither text nor inputs")
    if not callable(getattr(tokenizer, "decode", None)):
        raise InputError("a text needs a tokenizer: give tokenizer=..., or inputs={...}")
    inputs: dict[str, Any] = tokenize(tokenizer, example.text, model)
    config = getattr(model, "config", None)
    start = getattr(config, "decoder_start_token_id", None)
    if getattr(config, "is_encoder_decoder", False) and isinstance(start, int):
        inputs["decoder_input_ids"] = inputs["input_ids"].new_tensor([[start]])
    return inputs


def _line(line: bytes, where: str, number: str) -> Example:
    try:
        found = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise InputError(f"{where} is not UTF-8 text (byte {error.start})") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where} is no JSON: {error}") from error
    if not isinstance(found, dict):
        raise InputError(f'{where} is {type(found).__name__}: give an object such as {{"text": "…"}}')
    return _example(found, where, number, ())


def _example(found: dict[str, Any], where: str, number: str, also: Sequence[str]) -> Example:
    allowed = (*KINDS, *also)
    for key, value in found.items():
        if key not in allowed:
            raise InputError(f"{where} has {key!r}: an example may have {', '.join(allowed)}; put what only your metric reads under facts")
        kinds = KINDS.get(key)
        if kinds is not None and (not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds)):
            raise InputError(f"{where}: {key} is {value!r}; it must be {' or '.join(kind.__name__ for kind in kinds)}")
    for one, other in (("text", "prompt"), ("target", "label")):
        if one in found and other in found:
            raise InputError(f"{where} has both {one} and {other}, which mean the same: give one of them")
    text, target = found.get("text", found.get("prompt")), found.get("target", found.get("label"))
    if sum(value is not None for value in (text, found.get("image"), found.get("inputs"))) != 1:
        what = "a text" if not also else "a text or inputs"
        raise InputError(f"{where} needs {what} (or an image, for embedded:vit), and only one of them")
    roles = found.get("roles")
    if roles is not None and not all(
        isinstance(places, (list, tuple, range)) and places and all(isinstance(p, int) and not isinstance(p, bool) for p in places)
        for places in roles.values()
    ):
        raise InputError(f'{where}: roles is {roles!r}; give positions for each role, such as {{"subject": [2, 3]}}')
    return Example(
        str(found.get("id", number)), text, found.get("inputs"), found.get("image"), target, found.get("against"),
        found.get("benign", False), roles, found.get("facts", {}), where,
    )  # fmt: skip


def _distinct(examples: list[Example], what: str) -> list[Example]:
    seen: set[str] = set()
    for one in examples:
        if one.id in seen:
            raise InputError(f"{what} has two examples with the id {one.id!r}: give each its own, or none")
        seen.add(one.id)
    return examples


def with_inputs(example: Example, inputs: Mapping[str, Any]) -> Example:
    """The same example, given as inputs."""
    return replace(example, inputs=inputs, image=None, text=None)


def _content(value: Any) -> bytes:
    if not isinstance(value, Tensor):
        return repr(value).encode()
    raw = value.detach().cpu().contiguous().reshape(-1)
    return f"{value.dtype}{tuple(value.shape)}".encode() + (raw.view(torch.uint8).numpy().tobytes() if raw.numel() else b"")
