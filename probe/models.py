"""Load a model safely, feed it, and name it by its weights.

Safe means: weights come from safetensors; nothing that a folder or the hub supplies is ever run as code; nothing is asked
on standard input. A pickle is read only after `allow_pickle=True`, and then with torch's `weights_only`, which builds
tensors and refuses everything else.

Letters: B texts or images, S tokens.
"""

from __future__ import annotations

import difflib
import hashlib
import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from headscope.kernels.errors import InputError, ModelError
from headscope.probe.checkpoint import check_weights, read_json, refuse_code
from headscope.probe.digit_flow import DigitFlow, load_digit_flow
from headscope.probe.hub import fetch, is_hub_name

if TYPE_CHECKING:
    from numpy.typing import ArrayLike
    from transformers import PreTrainedTokenizerBase

EMBEDDED = {
    "lm": "a small Llama that writes English",
    "vit": "a small vision transformer that reads 8 × 8 digits",
    "mmdit": "a small Flux transformer that draws 8 × 8 digits from prompts; needs diffusers",
}
TASKS = {
    "base": "AutoModel",
    "causal-lm": "AutoModelForCausalLM",
    "masked-lm": "AutoModelForMaskedLM",
    "seq2seq-lm": "AutoModelForSeq2SeqLM",
    "text-classification": "AutoModelForSequenceClassification",
    "image-classification": "AutoModelForImageClassification",
}
WHOLE_BYTES = 256 * 2**20  # a fingerprint reads every byte up to here, beyond it sums and samples


def load(
    name: str | Path,
    *,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype | None = None,
    task: str | None = None,
    revision: str | None = None,
    allow_pickle: bool = False,
) -> tuple[nn.Module, Any]:
    """A model in evaluation mode, and what feeds it.

    Args:
        name: `embedded:lm`, `embedded:vit`, `embedded:mmdit`, a folder (transformers or diffusers), a hub id, or `timm:` and a
            timm model name.
        device: where the weights go.
        dtype: their type, as `torch.float16` or `"float16"`; by default float32 on a CPU, elsewhere as stored.
        task: the head on top, one of `TASKS`; by default the class that the model was saved as. transformers only.
        revision: branch, tag or commit on the hub.
        allow_pickle: read `pytorch_model.bin` where there is no safetensors file; tensors only, never code.

    Returns:
        The model, and a tokenizer, a transformers processor, timm's transform, `digits_processor`, or None if the folder has
        none. For a diffusers pipeline: its denoiser (the module with the attention), and the pipeline itself, which runs it;
        for `embedded:mmdit` likewise the transformer and its `DigitFlow`.

    Raises:
        ModelError: there is no such model, it cannot be loaded without running foreign code, or it is damaged.
    """
    place = _device(device)
    number = _dtype(dtype, place)
    if task is not None and task not in TASKS:
        raise ModelError(f"no task {task!r}: choose one of {', '.join(TASKS)}, or leave it out for the class that was saved")
    text = str(name)
    if isinstance(name, str) and text.startswith("timm:"):
        model, processor = _load_timm(text.removeprefix("timm:"), allow_pickle=allow_pickle)
    else:
        folder = _find(name, revision, allow_pickle=allow_pickle)
        if (folder / "model_index.json").is_file():
            model, processor = _load_pipeline(folder, text, place, number, allow_pickle=allow_pickle)
        else:
            model, processor = _load_folder(folder, text, number, task, allow_pickle=allow_pickle)
    other = number is not None and any(value.dtype != number for value in (*model.parameters(), *model.buffers()))
    with _explained(text):
        moved = model.to(device=place, dtype=number) if other else model.to(place)  # diffusers warns of any type it is told
        return moved.eval(), processor


def embedded_folder(name: str) -> Path:
    """The folder of an embedded model, with or without `embedded:` before its name; `lm` and `vit` are ordinary transformers folders."""
    short = name.removeprefix("embedded:")
    if short not in EMBEDDED:
        known = "; ".join(f"embedded:{key} ({what})" for key, what in EMBEDDED.items())
        raise ModelError(f"no embedded model {short!r}: there are {known}")
    folder = Path(__file__).parent / "embedded" / short
    if not (folder / "model.safetensors").is_file():
        raise ModelError(f"embedded:{short} has no weights in this installation: reinstall headscope, or train it with `make train`")
    return folder


def tokenize(tokenizer: PreTrainedTokenizerBase, text: str, model: nn.Module) -> dict[str, Tensor]:
    """Token ids of one text, as keyword arguments of the model, on its device, each [1, S].

    Raises:
        InputError: the text is empty, is not text, or has more tokens than the model can look back on.
    """
    if not isinstance(text, str):
        raise InputError(f"expected one text as str, got {type(text).__name__}: call tokenize once a text")
    if not text:
        raise InputError("the text is empty: give at least one character")
    try:
        encoded = tokenizer(text, return_tensors="pt", verbose=False)
    except (UnicodeEncodeError, TypeError) as error:
        raise InputError(f"the text cannot be written as UTF-8, so it has no tokens: {error}") from error
    length = encoded["input_ids"].shape[-1]
    if length == 0:
        raise InputError(f"the tokenizer makes no token of {text[:40]!r}: give another text")
    limit = context_window(model)
    if limit is not None and length > limit:
        raise InputError(f"the text has {length} tokens, the context window of this model {limit}: shorten it by {length - limit} tokens")
    place = next((p.device for p in model.parameters()), torch.device("cpu"))
    return {str(key): value.to(place) for key, value in encoded.items()}


def context_window(model: nn.Module) -> int | None:
    """How many tokens the model can take by its own config, or None where it does not say."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    return limit if isinstance(limit, int) and limit > 0 else None


def digits_processor(images: ArrayLike) -> dict[str, Tensor]:
    """Digit images as `embedded:vit` takes them. (A plain function: transformers' image processors expect photographs.)

    Args:
        images: [8, 8] or [B, 8, 8], ink from 0 (paper) to 16, as scikit-learn's `load_digits` has them.

    Returns:
        `pixel_values` [B, 1, 8, 8] in [-1, 1].
    """
    try:
        pixels = torch.as_tensor(np.asarray(images, dtype=np.float32))
    except (TypeError, ValueError) as error:
        raise InputError(f"expected images as numbers, [8, 8] or [B, 8, 8], got {type(images).__name__}: {error}") from error
    if pixels.ndim not in (2, 3) or tuple(pixels.shape[-2:]) != (8, 8) or pixels.numel() == 0:
        raise InputError(f"expected images [8, 8] or [B, 8, 8], got {list(pixels.shape)}")
    low, high = pixels.min().item(), pixels.max().item()
    if not (low >= 0 and high <= 16):  # also False for NaN
        raise InputError(f"expected ink between 0 and 16, got {low:g} to {high:g}")
    return {"pixel_values": pixels.reshape(-1, 1, 8, 8) / 8 - 1}


def model_fingerprint(model: nn.Module) -> str:
    """A name for exactly these weights: `sha256:` over the class and every parameter's name, shape, type and value.

    Up to 256 MiB every byte is read. Beyond that each tensor counts through an exact sum over its bits and 1,024 samples, so
    one changed weight still changes the name, but not every exchange of two weights does. Same on every device.

    Raises:
        ModelError: a weight lies on the meta device, so there is nothing to read.
    """
    digest = hashlib.sha256(type(model).__name__.encode())
    weights = sorted((key, value) for key, value in model.state_dict().items() if isinstance(value, Tensor))
    whole = sum(value.nbytes for _, value in weights) <= WHOLE_BYTES
    for key, value in weights:
        if value.is_meta:
            raise ModelError(f"the weight {key} is on the meta device (offloaded or never loaded): load it before naming the model")
        digest.update(f"|{key}|{value.dtype}|{tuple(value.shape)}|".encode())
        digest.update(_weight_bytes(value, whole))
    return f"sha256:{digest.hexdigest()}"


def _weight_bytes(value: Tensor, whole: bool) -> bytes:
    raw = value.detach().contiguous().reshape(-1).view(torch.uint8)
    if whole or value.numel() <= 1024:
        return raw.cpu().numpy().tobytes()
    width = value.element_size()
    words = raw.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}.get(width, torch.int64))
    sums = [int(words[start : start + 2**24].sum(dtype=torch.int64)) for start in range(0, len(words), 2**24)]
    total = sum(sums) % 2**64
    chosen = torch.linspace(0, len(words) - 1, 1024, dtype=torch.float64, device=words.device).long()
    return total.to_bytes(8, "little") + words[chosen].cpu().numpy().tobytes()


def _device(device: str | torch.device) -> torch.device:
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built with CUDA
        usable = ["cpu", *(f"cuda:{n}" for n in range(torch.cuda.device_count()))]
        raise ModelError(f"no device {str(device)!r} here: usable are {', '.join(usable)}") from error
    return place


def _dtype(dtype: str | torch.dtype | None, place: torch.device) -> torch.dtype | None:
    if dtype is None:
        return torch.float32 if place.type == "cpu" else None
    number = getattr(torch, dtype.removeprefix("torch."), None) if isinstance(dtype, str) else dtype
    if not isinstance(number, torch.dtype) or not number.is_floating_point:
        raise ModelError(f"no floating-point type {dtype!r}: give one such as 'float32', 'float16' or 'bfloat16'")
    return number


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what a loader throws into a ModelError that names the model and keeps the first line of the reason."""
    try:
        yield
    except (ModelError, MemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip() or "no reason given").splitlines()[0][:300]
        raise ModelError(f"{name} could not be loaded ({type(error).__name__}): {reason}") from error


def _find(name: str | Path, revision: str | None, *, allow_pickle: bool) -> Path:
    """The folder that a name stands for; fetched first where it is a hub id."""
    text = str(name)
    if isinstance(name, str) and text.startswith("embedded:"):
        return embedded_folder(text)
    if text.strip() and "\0" not in text:
        folder = Path(text).expanduser()
        if folder.is_dir():
            return folder
        if folder.is_file():
            raise ModelError(f"{text!r} is a file: give the folder that holds config.json and model.safetensors")
        if isinstance(name, str) and is_hub_name(text):
            return fetch(text, revision, allow_pickle=allow_pickle)
    raise ModelError(
        f"no model {text!r}: there is no such folder, and it is no hub id (owner/name); "
        f"embedded models are {', '.join('embedded:' + key for key in EMBEDDED)}, timm's are timm:<name>"
    )


def _load_folder(folder: Path, name: str, number: torch.dtype | None, task: str | None, *, allow_pickle: bool) -> tuple[nn.Module, Any]:
    if (folder / "adapter_config.json").exists():
        raise ModelError(
            f"{name} is a PEFT adapter, not a model: load its base model, put the adapter on with peft, and give the module to Probe"
        )
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name} has no config.json: give a folder that save_pretrained wrote")
    config = read_json(folder / "config.json")
    refuse_code(config, name)
    safe = check_weights(folder, name, allow_pickle=allow_pickle)
    if config.get("_class_name") == "FluxTransformer2DModel" and (folder / "prompts.json").is_file():
        return _load_digit_flow(folder, name)
    if isinstance(config.get("_class_name"), str):
        return _load_diffusers_model(folder, name, config["_class_name"], safe), None
    with _explained(name):
        model = _load_transformers(folder, name, config, number, task, safe)
        return model, _load_processor(folder, name)


def _load_transformers(
    folder: Path, name: str, config: dict[str, Any], number: torch.dtype | None, task: str | None, safe: bool
) -> nn.Module:
    import transformers

    saved = config.get("architectures")
    chosen = TASKS[task] if task else str(saved[0]) if isinstance(saved, list) and saved else "AutoModel"
    kind: Any = getattr(transformers, chosen, None)
    if chosen not in TASKS.values() and not _is_kind(kind, transformers.PreTrainedModel):
        raise ModelError(
            f"{name} was saved as {chosen!r}, which is no model of transformers {transformers.__version__}: pass task=, "
            f"one of {', '.join(TASKS)}"
        )
    model, notes = kind.from_pretrained(
        folder, dtype=number or "auto", use_safetensors=safe, weights_only=True, local_files_only=True,
        trust_remote_code=False, output_loading_info=True,
    )  # fmt: skip
    missing = sorted(notes["missing_keys"])
    if missing:
        raise ModelError(
            f"{name} lacks {len(missing)} weights of {type(model).__name__}, such as {missing[0]!r}, which would be random: "
            "choose another task="
        )
    loaded: nn.Module = model
    return loaded


def _load_processor(folder: Path, name: str) -> Any:  # its type is the folder's choice
    import transformers

    if folder == Path(__file__).parent / "embedded" / "vit":
        return digits_processor
    files = {path.name for path in folder.iterdir()}
    if files & {"preprocessor_config.json", "processor_config.json"}:
        kind: Any = transformers.AutoProcessor
    elif "tokenizer_config.json" in files or "tokenizer.json" in files:
        kind = transformers.AutoTokenizer
    else:
        return None
    try:
        return kind.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except ImportError as error:
        raise ModelError(f"the processor of {name} needs a package that is not installed: {str(error).strip().splitlines()[0]}") from error


def _is_kind(found: object, base: type) -> bool:
    return isinstance(found, type) and issubclass(found, base)


def _diffusers(name: str) -> Any:  # a module
    try:
        return importlib.import_module("diffusers")
    except ImportError as error:
        raise ModelError(f"{name} is a diffusers model: pip install 'headscope[diffusion]'") from error


def _load_diffusers_model(folder: Path, name: str, kind: str, safe: bool) -> nn.Module:
    diffusers = _diffusers(name)
    found: Any = getattr(diffusers, kind, None)
    if not _is_kind(found, diffusers.ModelMixin):
        raise ModelError(f"{name} was saved as {kind!r}, which is no model of diffusers {diffusers.__version__}")
    with _explained(name):
        model: nn.Module = found.from_pretrained(folder, use_safetensors=safe, local_files_only=True)
        return model


def _load_digit_flow(folder: Path, name: str) -> tuple[nn.Module, DigitFlow]:
    kind = _diffusers(name).FluxTransformer2DModel
    with _explained(name):
        flow = load_digit_flow(folder, kind)
        return flow.model, flow


def _load_pipeline(
    folder: Path, name: str, place: torch.device, number: torch.dtype | None, *, allow_pickle: bool
) -> tuple[nn.Module, Any]:
    """The denoiser of a pipeline, and the pipeline. Only classes of diffusers and transformers, never a file of the folder."""
    diffusers = _diffusers(name)
    index = read_json(folder / "model_index.json")
    kind = index.get("_class_name")
    found: Any = getattr(diffusers, kind, None) if isinstance(kind, str) else None
    if not _is_kind(found, diffusers.DiffusionPipeline):
        raise ModelError(
            f"{name} was saved as {kind!r}, which is no pipeline of diffusers {diffusers.__version__}; code in the folder is never run"
        )
    for part, value in index.items():
        if part.startswith("_") or not isinstance(value, list):
            continue
        library, _ = value if len(value) == 2 else ("?", None)
        own = library in ("diffusers", "transformers") or (isinstance(library, str) and hasattr(diffusers.pipelines, library))
        if library is None:
            continue
        if not own or Path(part).name != part or (folder / part / f"{library}.py").exists():
            raise ModelError(
                f"{name}: the part {part!r} asks for code from {library!r}; only classes of diffusers and transformers are loaded"
            )
        if (folder / part / "config.json").is_file():
            refuse_code(read_json(folder / part / "config.json"), f"{name}/{part}")
            check_weights(folder / part, f"{name}/{part}", allow_pickle=allow_pickle)
    with _explained(name):
        pipeline = found.from_pretrained(
            folder, use_safetensors=None if allow_pickle else True, local_files_only=True, trust_remote_code=False
        )
        pipeline.to(place, *([] if number is None else [number]))
    for part in ("transformer", "unet", "prior"):
        model = getattr(pipeline, part, None)
        if isinstance(model, nn.Module):
            return model, pipeline
    raise ModelError(f"{name} has no denoiser: expected a part named transformer, unet or prior among {sorted(pipeline.components)}")


def _load_timm(name: str, *, allow_pickle: bool) -> tuple[nn.Module, Any]:
    try:
        timm: Any = importlib.import_module("timm")
    except (ImportError, RuntimeError) as error:  # RuntimeError: torchvision built for another torch
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"timm:{name} needs timm and a torchvision that fits torch ({reason}): pip install timm torchvision") from error
    if not timm.is_model(name):
        near = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ModelError(
            f"timm has no model {name!r}" + (f": did you mean {', '.join(near)}?" if near else ": see timm.list_models(pretrained=True)")
        )
    with _explained(f"timm:{name}"):  # an unknown tag, as in resnet50.poetry
        source = timm.get_pretrained_cfg(name)
    if source is None or not source.hf_hub_id:
        raise ModelError(f"timm:{name} has no weights in a safe format on the hub: choose one of timm.list_models(pretrained=True)")
    only = ("config.json", "model.safetensors", *(("pytorch_model.bin",) if allow_pickle else ()))
    folder = fetch(source.hf_hub_id, None, allow_pickle=allow_pickle, only=only)
    safe = check_weights(folder, f"timm:{name}", allow_pickle=allow_pickle)
    with _explained(f"timm:{name}"):
        file = folder / ("model.safetensors" if safe else "pytorch_model.bin")
        model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay={"file": str(file), "custom_load": False})
        transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return model, transform
