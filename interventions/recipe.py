"""A plan as a YAML file that people read, review and keep; every key is known or refused.

    schema: headscope-recipe/1
    model: {class: LlamaForCausalLM, fingerprint: 'sha256:…'}     # optional
    tensors: {file: recipe.1f2e3d4c.safetensors, sha256: …}      # only where an edit holds tensors
    edits:
    - {stage: z, op: scale, value: 0.0, layers: [3], heads: [5]}
    - {stage: scores, op: bias, value: -2.0, layers: {start: 4, stop: 8}, keys: {span: password}}
    - {stage: q.pre, op: rotate, value: {basis: {tensor: edit2.basis}, skew: {tensor: edit2.skew}}, gate: {kind: risk, …}, layers: [5]}

`recipe.schema.json` beside this file says the same in JSON Schema. Tensors are written first and under a name that depends on their
content, so that a recipe and its tensors never disagree, whenever the writing stops.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from headscope.interventions import ops
from headscope.interventions.edit import Edit
from headscope.interventions.gates import Gate
from headscope.interventions.mixing import Mix
from headscope.interventions.recipe_file import MOST_BYTES, dump, parse, read_plain, write
from headscope.interventions.recipe_values import KINDS, decode_gate, decode_op, encode_fields, encode_gate
from headscope.interventions.select import Selector
from headscope.interventions.source import Source, StoredRun, store_run
from headscope.kernels.errors import HeadscopeError, RecipeError
from headscope.probe.models import model_fingerprint

SCHEMA = "headscope-recipe/1"
MOST_EDITS = 512
FINGERPRINT = re.compile(r"sha256:[0-9a-f]{64}")
PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. -]*\.safetensors")
KEYS = ("schema", "model", "tensors", "edits")
EDIT_KEYS = ("stage", "op", "value", "gate")
OPS = {op.name: op for op in (ops.Scale, ops.Add, ops.Assign, ops.Bias, ops.Mask, ops.Patch, ops.Freeze, ops.Renorm, *KINDS.values())}
VALUELESS = ("mask", "renorm")


def save(edits: Sequence[Edit], path: Path, model: nn.Module | None) -> Path:
    """Write a recipe, and its tensors if it has any; see `Plan.save`."""
    document, tensors = _encode(edits)
    if model is not None:
        document["model"] = {"class": type(model).__name__, "fingerprint": model_fingerprint(model)}
    if tensors:
        stem = re.sub(r"[^A-Za-z0-9_-]", "_", path.stem)
        content = safetensors.torch.save(tensors)
        digest = hashlib.sha256(content).hexdigest()
        name = f"{stem}.{digest[:8]}.safetensors"
        document["tensors"] = {"file": name, "sha256": digest}
    text = dump({key: document[key] for key in KEYS if key in document})
    if len(text) > MOST_BYTES:
        raise RecipeError(
            f"{path.name} would have {len(text)} bytes: a recipe has at most {MOST_BYTES}; split the plan, or select ranges, not long lists"
        )
    if tensors:
        write(path.with_name(name), content)
    write(path, text)
    return path


def load(path: Path, model: nn.Module | None, *, force: bool) -> list[Edit]:
    """Read a recipe's edits; see `Plan.load`."""
    try:
        document = parse(path)
        edits = from_dict(document, path.parent)
        if model is not None and isinstance(document, Mapping):
            _compare(document, model, force)
    except RecipeError as error:
        raise RecipeError(f"{path.name}: {error}") from error
    return edits


def to_dict(edits: Sequence[Edit]) -> dict[str, object]:
    """The recipe of edits that hold no tensors, as plain values."""
    document, tensors = _encode(edits)
    if tensors:
        raise RecipeError(
            f"the plan holds tensors ({', '.join(sorted({name.partition('/')[0] for name in tensors}))}): "
            "use plan.save(path), which keeps them in a file"
        )
    return document


def digest(edits: Sequence[Edit]) -> str:
    """`sha256:` over what a recipe of these edits would hold, tensors included.

    Raises:
        RecipeError: an edit that is code, which has no content that could be read.
    """
    document, tensors = _encode(edits)
    found = hashlib.sha256(dump(document))
    for name, tensor in sorted(tensors.items()):
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        found.update(f"|{name}|{tensor.dtype}|{tuple(tensor.shape)}|".encode() + raw.numpy().tobytes())
    return f"sha256:{found.hexdigest()}"


def from_dict(document: object, folder: Path | None = None) -> list[Edit]:
    """The edits of a recipe; its tensors are looked for in `folder`.

    Raises:
        RecipeError: what is wrong, and with which edit.
    """
    if document is None:
        raise RecipeError(f"the recipe is empty: it is a mapping with the keys {', '.join(KEYS)}, and begins with schema: {SCHEMA}")
    if not isinstance(document, Mapping):
        raise RecipeError(f"a recipe is a mapping with the keys {', '.join(KEYS)}; this is {_kind(document)}")
    _known(document, KEYS, "key")
    if "schema" not in document:
        raise RecipeError(f"schema is missing: the recipe begins with the line schema: {SCHEMA}")
    if document.get("schema") != SCHEMA:
        raise RecipeError(f"schema is {document.get('schema')!r}: this version reads {SCHEMA!r}")
    _model(document)
    listed = document.get("edits")
    if not isinstance(listed, list):
        raise RecipeError(
            f"edits is {_kind(listed)}: it is a list, each entry such as {{stage: z, op: scale, value: 0.0, layers: [3], heads: [5]}}"
        )
    if len(listed) > MOST_EDITS:
        raise RecipeError(f"{len(listed)} edits: a recipe has at most {MOST_EDITS}")
    tensors = _tensors(document, folder)
    edits = []
    for index, entry in enumerate(listed):
        try:
            edits.append(_decode(entry, tensors))
        except HeadscopeError as error:
            raise RecipeError(f"edits[{index}]: {error}") from error
    return edits


def _encode(edits: Sequence[Edit]) -> tuple[dict[str, object], dict[str, Tensor]]:
    if len(edits) > MOST_EDITS:
        raise RecipeError(f"{len(edits)} edits: a recipe has at most {MOST_EDITS}")
    listed: list[dict[str, object]] = []
    tensors: dict[str, Tensor] = {}
    for index, edit in enumerate(edits):
        entry: dict[str, object] = {"stage": edit.stage, "op": edit.op.name}
        if edit.op.name not in VALUELESS:
            entry["value"] = _encode_value(index, edit, tensors)
        if isinstance(edit.gate, Gate):
            entry["gate"] = encode_gate(edit.gate, f"edit{index}", tensors)
        elif edit.gate != 1.0:
            entry["gate"] = edit.gate
        listed.append({**entry, **edit.selector.to_dict()})
    return {"schema": SCHEMA, "edits": listed}, tensors


def _encode_value(index: int, edit: Edit, tensors: dict[str, Tensor]) -> object:
    """A number, a word, or the name under which tensors were added."""
    op, name = edit.op, f"edit{index}"
    if type(op) not in OPS.values():
        raise RecipeError(
            f"edit {index} ({edit}) cannot be saved: a recipe holds no code; keep it in a Python script, or use {', '.join(OPS)}"
        )
    if isinstance(op, Mix) and not isinstance(op.source, Tensor):
        run = _stored(index, edit, op.source, tensors)
        return {**encode_fields(replace(op, source=torch.zeros(())), name, {}), "source": run}
    if op.name in KINDS:
        return encode_fields(op, name, tensors)
    (field,) = fields(op)
    value: object = getattr(op, field.name)
    if isinstance(value, Tensor):
        tensors[name] = value.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if not isinstance(op, ops.Patch) or isinstance(op.source, Tensor):
        return value
    return _stored(index, edit, op.source, tensors)


def _stored(index: int, edit: Edit, source: Source, tensors: dict[str, Tensor]) -> dict[str, object]:
    """The name under which the run that an edit takes its tensors from was added."""
    assert not isinstance(source, Tensor)
    name = f"edit{index}"
    run = source if isinstance(source, StoredRun) else store_run(source, edit.stage, edit.selector.matches)
    if not run.tensors:
        raise RecipeError(f"edit {index} ({edit}) cannot be saved: the run it patches from has no site that it selects")
    tensors.update({f"{name}/{site}/{step}": tensor.contiguous().clone() for (site, step), tensor in run.tensors.items()})
    return {"run": name}


def _decode(entry: object, tensors: Mapping[str, Tensor]) -> Edit:
    if not isinstance(entry, Mapping):
        raise RecipeError(f"an edit is a mapping such as {{stage: z, op: scale, value: 0.0}}; this is {_kind(entry)}")
    conditions = tuple(Selector.__dataclass_fields__)
    _known(entry, EDIT_KEYS + conditions, "key")
    for key in ("stage", "op"):
        if not isinstance(entry.get(key), str):
            raise RecipeError(f"{key} is {_kind(entry.get(key))}: every edit names its stage and op")
    name = entry["op"]
    if name not in OPS:
        hint = "assign is written set" if name == "assign" else f"the ops are {', '.join(OPS)}"
        raise RecipeError(f"unknown op {name!r}: {hint}")
    if (name in VALUELESS) == ("value" in entry):
        raise RecipeError(f"{name} takes no value" if name in VALUELESS else f"{name} needs a value")
    given = entry.get("gate", 1.0)
    gate = decode_gate(given, lambda found: _tensor(found, tensors)) if isinstance(given, Mapping) else _number("gate", given)
    op = _decode_op(name, entry["stage"], entry.get("value"), tensors)
    return Edit(entry["stage"], op, Selector.from_dict({key: entry[key] for key in conditions if key in entry}), gate)


def _decode_op(name: str, stage: str, value: object, tensors: Mapping[str, Tensor]) -> ops.Op:
    if name in KINDS:

        def tensor(found: Mapping[str, object]) -> Any:
            return _referenced(name, stage, found, tensors) if name == "mix" else _tensor(found, tensors)

        return decode_op(name, value, tensor)
    if name == "mask":
        return ops.mask()
    if name == "renorm":
        return ops.renorm()
    if name == "scale":
        return ops.scale(_number("value", value))
    if name in ("patch", "freeze"):
        source = _referenced(name, stage, value, tensors)
        return ops.patch(source) if name == "patch" else ops.freeze(source)
    if name == "set" and isinstance(value, str):
        return ops.assign(value)  # type: ignore[arg-type]
    amount = _tensor(value, tensors) if isinstance(value, Mapping) else _number("value", value)
    return {"add": ops.add, "set": ops.assign, "bias": ops.bias}[name](amount)


def _referenced(name: str, stage: str, value: object, tensors: Mapping[str, Tensor]) -> Tensor | StoredRun:
    if not isinstance(value, Mapping) or set(value) not in ({"tensor"}, {"run"}):
        raise RecipeError(f"{name} takes {{tensor: name}} or {{run: name}} as its value, not {value!r}")
    if "tensor" in value:
        return _tensor(value, tensors)
    run: dict[tuple[str, int], Tensor] = {}
    for place, tensor in tensors.items():
        edit, _, rest = place.partition("/")
        site, _, step = rest.rpartition("/")
        if edit == value["run"] and site and step.isdecimal() and len(step) < 10:
            run[site, int(step)] = tensor
    if not run:
        raise RecipeError(f"the tensor file holds no run {value['run']!r}")
    return StoredRun(stage, run)


def _tensor(value: Mapping[str, object], tensors: Mapping[str, Tensor]) -> Tensor:
    name = value.get("tensor")
    if set(value) != {"tensor"} or not isinstance(name, str):
        raise RecipeError(f"value {dict(value)!r}: a tensor is written {{tensor: name}}")
    if name not in tensors:
        raise RecipeError(f"the tensor file holds no {name!r}; it has {', '.join(sorted(tensors)) or 'nothing'}")
    return tensors[name]


def _tensors(document: Mapping[str, object], folder: Path | None) -> dict[str, Tensor]:
    """The tensors beside the recipe, from the very bytes that were checked."""
    named = document.get("tensors")
    if named is None and "tensors" not in document:
        return {}
    if not isinstance(named, Mapping):
        raise RecipeError(f"tensors is {_kind(named)}: it is a mapping with the keys file, sha256")
    _known(named, ("file", "sha256"), "tensors key")
    name, digest = named.get("file"), named.get("sha256")
    if not isinstance(name, str) or not PLAIN_NAME.fullmatch(name):
        raise RecipeError(f"tensors.file is {name!r}: it is the plain name of a .safetensors file beside the recipe")
    if not isinstance(digest, str) or not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise RecipeError(f"tensors.sha256 is {digest!r}: it is 64 hexadecimal digits")
    if folder is None:
        raise RecipeError(f"the recipe's tensors are in {name}: use Plan.load(path)")
    content = read_plain(folder / name)
    if hashlib.sha256(content).hexdigest() != digest:
        raise RecipeError(f"{name} is not the file the recipe was saved with: its sha256 differs")
    try:
        return safetensors.torch.load(content)
    except safetensors.SafetensorError as error:
        raise RecipeError(f"{name} is damaged: {error}") from error


def _model(document: Mapping[str, object]) -> str | None:
    """The fingerprint that the recipe names."""
    if "model" not in document:
        return None
    model = document["model"]
    if not isinstance(model, Mapping):
        raise RecipeError(f"model is {_kind(model)}: it is a mapping with the keys class, fingerprint")
    _known(model, ("class", "fingerprint"), "model key")
    if not isinstance(model.get("class", ""), str):
        raise RecipeError(f"model.class is {_kind(model['class'])}: it is the name of a class")
    fingerprint = model.get("fingerprint")
    if not isinstance(fingerprint, str) or not FINGERPRINT.fullmatch(fingerprint):
        raise RecipeError(f"model.fingerprint is {fingerprint!r}: it is 'sha256:' and 64 hexadecimal digits")
    return fingerprint


def _compare(document: Mapping[str, object], model: nn.Module, force: bool) -> None:
    expected = _model(document)
    if expected is None:
        return
    found = model_fingerprint(model)
    if found == expected:
        return
    message = f"the recipe was made for another model: it names {expected[:19]}…, this {type(model).__name__} is {found[:19]}…"
    if not force:
        raise RecipeError(f"{message}; load that model, or use force=True if the heads mean the same")
    warnings.warn(message, stacklevel=4)


def _known(found: Mapping[str, object], allowed: Sequence[str], what: str) -> None:
    for key in found:
        if key not in allowed:
            raise RecipeError(f"unknown {what} {key!r}: the keys are {', '.join(allowed)}")


def _number(key: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise RecipeError(f"{key} is {value!r}: it is a number")
    try:
        return float(value)
    except OverflowError:
        raise RecipeError(f"{key} is too large for a number") from None


def _kind(value: object) -> str:
    return "missing" if value is None else f"a {type(value).__name__}"
