"""Fetch a model from the Hugging Face hub: configuration, vocabulary and one copy of the weights, never code.

The hub is asked once, with a deadline; when it does not answer, the local cache is used as it is.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from headscope.kernels.errors import ModelError

HUB_SECONDS = 4.0  # how long the hub may take to say whether it has a model
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
TEXT_FILES = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken")
VARIANTS = ("*.fp16*", "*.bf16*", "*.fp32*", "*.non_ema*")  # second copies of the same weights

Answer = TypeVar("Answer")


def is_hub_name(text: str) -> bool:
    """Whether a text can be a hub id: `name` or `owner/name`."""
    return HUB_NAME.fullmatch(text) is not None and ".." not in text and "--" not in text


def fetch(name: str, revision: str | None = None, *, allow_pickle: bool = False, only: tuple[str, ...] = ()) -> Path:
    """The folder of a hub id, from the cache or downloaded.

    Args:
        name: `owner/name`.
        revision: branch, tag or commit.
        allow_pickle: also fetch `pytorch_model.bin` where there is no safetensors file.
        only: patterns of the files to fetch instead of the usual ones.

    Raises:
        ModelError: the hub has no such model, or cannot be reached and the cache does not have it.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

    offline: Exception | None = None
    has_safe = False
    try:
        info = within(HUB_SECONDS + 0.5, lambda: HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS))
        has_safe = any(file.rfilename.endswith(".safetensors") for file in info.siblings or [])
    except (RepositoryNotFoundError, RevisionNotFoundError, GatedRepoError) as error:
        at = f" at revision {revision!r}" if revision else ""
        raise ModelError(
            f"the hub has no model {name!r}{at} for you ({type(error).__name__}): check the name, or log in if it is private"
        ) from error
    except Exception as error:  # whatever the HTTP client throws; the cache may still have it
        offline = error

    def snapshot(wanted: list[str], unwanted: list[str]) -> Path:
        # by revision, not by commit: only so does the cache learn which commit a branch stood for
        cached = offline is not None
        return Path(snapshot_download(name, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted, local_files_only=cached))

    pickles = ["*pytorch_model*.bin"] if allow_pickle and not has_safe else []
    try:
        if only:
            return snapshot([*only], [])
        folder = snapshot(["config.json", "model_index.json"], [])
        if (folder / "model_index.json").is_file():  # a pipeline: one folder a part
            parts = [f"*/{pattern}" for pattern in (*TEXT_FILES, "*.safetensors", *pickles)]
            return snapshot(["model_index.json", *parts], ["*/*/*", *VARIANTS])
        return snapshot([*TEXT_FILES, "model*.safetensors", "diffusion_pytorch_model*.safetensors", *pickles], ["*/*", *VARIANTS])
    except Exception as error:
        cause = offline or error
        reason = (str(cause).strip() or type(cause).__name__).splitlines()[0][:200]
        raise ModelError(
            f"no model {name!r}: there is no folder of that name, the local hub cache does not have it, and asking the hub failed "
            f"({type(cause).__name__}: {reason}); try embedded:lm, a folder, or again when online"
        ) from cause


def within(seconds: float, question: Callable[[], Answer]) -> Answer:
    """The answer to a question, or TimeoutError. A thread, because no timeout of an HTTP client covers the look-up of an address."""
    answers: list[Answer] = []
    errors: list[Exception] = []

    def ask() -> None:
        try:
            answers.append(question())
        except Exception as error:
            errors.append(error)

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise TimeoutError(f"no answer within {seconds:g} s")
    return answers[0]
