"""What a model folder that somebody else wrote may ask for: no code, no pickle by default, no file outside itself."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from headscope.kernels.errors import ModelError

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
CONFIG_BYTES = 32 * 2**20


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that somebody else wrote."""
    try:
        if not path.is_file() or path.stat().st_size > CONFIG_BYTES:
            raise ModelError(f"{path.name} in {path.parent.name} is no ordinary file of at most {CONFIG_BYTES >> 20} MiB")
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path.name} in {path.parent.name} is not readable JSON: {str(error)[:200]}") from error
    if not isinstance(content, dict):
        raise ModelError(f"{path.name} in {path.parent.name} holds a {type(content).__name__}, expected an object")
    return content


def refuse_code(config: dict[str, Any], name: str) -> None:
    """Refuse a config that asks for code from elsewhere: `auto_map` of an unknown model type, or an attention kernel by hub id."""
    from transformers import CONFIG_MAPPING

    known = config.get("model_type") in CONFIG_MAPPING or "_class_name" in config
    if "auto_map" in config and not known:
        raise ModelError(
            f"{name} brings its own code ({json.dumps(config['auto_map'])[:120]}), which Headscope never runs: "
            "build the model yourself after reading that code, and give the module to Probe"
        )
    parts: list[Any] = [config]
    while parts:
        part = parts.pop()
        if isinstance(part, dict):
            for key, value in part.items():
                if key.lstrip("_").startswith(("attn_implementation", "experts_implementation")) and "/" in str(value):
                    raise ModelError(
                        f"{name} asks for a kernel from the hub ({key}: {str(value)[:80]!r}), which would run its code: remove that entry"
                    )
                parts.append(value)
        elif isinstance(part, list):
            parts.extend(part)


def check_weights(folder: Path, name: str, *, allow_pickle: bool) -> bool:
    """True if the weights are safetensors, False if they are pickles and may be read; shards must be files of this folder."""
    for index in sorted(folder.glob("*.index.json")):
        shards = read_json(index).get("weight_map", {})
        for shard in sorted({str(value) for value in shards.values()} if isinstance(shards, dict) else {"?"}):
            if Path(shard).name != shard or "\\" in shard or not shard.endswith((".safetensors", ".bin")):
                raise ModelError(f"{name}: {index.name} points at {shard[:80]!r}, expected the names of weight files in the same folder")
            if shard.endswith(".safetensors") and not (folder / shard).is_file():
                raise ModelError(f"{name}: {index.name} names {shard!r}, which is missing: download it again")
    if any(folder.glob("*.safetensors")):
        return True
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in PICKLES)
    if not pickles:
        raise ModelError(f"{name} has no weights: expected model.safetensors beside config.json")
    if not allow_pickle:
        raise ModelError(
            f"{name} has its weights only as a pickle ({', '.join(pickles[:3])}), which can run code when read: save it as safetensors, "
            "or pass allow_pickle=True to read its tensors and nothing else"
        )
    return False
