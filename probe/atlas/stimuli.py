"""What the heads are looked at on: random tokens made here, and texts or inputs of the user's.

Letters: B samples, S tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import InputError
from headscope.probe.models import context_window, tokenize

TEXTS = (
    "Four score and seven years ago our fathers brought forth on this continent, a new nation, conceived in Liberty, and dedicated to "
    "the proposition that all men are created equal. Now we are engaged in a great civil war, testing whether that nation, or any nation "
    "so conceived and so dedicated, can long endure.",
    "It was the best of times, it was the worst of times, it was the age of wisdom, it was the age of foolishness, it was the epoch of "
    "belief, it was the epoch of incredulity, it was the season of Light, it was the season of Darkness.",
    "The village lies in a valley between two rivers. The northern river was used by mills until 1890, and the southern river by boats. "
    "The village has a church, which was built in 1412, and a school, which was opened by the mayor in 1903.",
    "Friends, Romans, countrymen, lend me your ears; I come to bury Caesar, not to praise him. The evil that men do lives after them; "
    "The good is oft interred with their bones; So let it be with Caesar.",
)


@dataclass(frozen=True, eq=False)
class Stimulus:
    """One batch a model is run on.

    Attributes:
        inputs: its keyword inputs.
        counted: [B, S], bool, the tokens that count: not padding, not special; None where all do.
        tokens: [B, S], the token ids, where the model reads tokens.
        image: the model reads images.
    """

    inputs: Mapping[str, Any]
    counted: Tensor | None = None
    tokens: Tensor | None = None
    image: bool = False


@dataclass(frozen=True, eq=False)
class Alphabet:
    """How to write random tokens for a model.

    Attributes:
        argument: name of the input that takes them.
        tokens: the ids to draw from: no special ones.
        before, after: ids that the tokenizer puts around a text, such as a token for its beginning.
        window: how many tokens the model can take; None where it does not say.
        device: where the model is.
        decoder_start: of an encoder-decoder: what its decoder begins with.
    """

    argument: str
    tokens: Tensor
    before: tuple[int, ...]
    after: tuple[int, ...]
    window: int | None
    device: torch.device
    decoder_start: int | None = None

    def write(self, length: int, repeats: int, samples: int, seed: int) -> Stimulus:
        """[samples, S] of a random block of `length` tokens, repeated; within a block no token comes twice while there are enough.

        Raises:
            InputError: it does not fit into the context window.
        """
        size = len(self.before) + length * repeats + len(self.after)
        if self.window is not None and size > self.window:
            most = (self.window - len(self.before) - len(self.after)) // repeats
            raise InputError(
                f"length={length}: {size} tokens are needed and the context window of this model is {self.window}: give {most} or less"
            )
        source = torch.Generator().manual_seed(seed)
        drawn = [torch.cat([torch.randperm(len(self.tokens), generator=source) for _ in range(-(-length // len(self.tokens)))])[:length]
                 for _ in range(samples)]  # fmt: skip
        block = self.tokens[torch.stack(drawn)].repeat(1, repeats)  # [samples, length · repeats]
        ends = [torch.tensor(ids, dtype=torch.long).expand(samples, -1) for ids in (self.before, self.after)]
        ids = torch.cat([ends[0], block, ends[1]], dim=1).to(self.device)
        counted = torch.zeros_like(ids, dtype=torch.bool)
        counted[:, len(self.before) : len(self.before) + block.shape[1]] = True
        inputs: dict[str, Tensor] = {self.argument: ids}
        if self.decoder_start is not None:
            inputs["decoder_input_ids"] = torch.cat([torch.full_like(ids[:, :1], self.decoder_start), ids[:, :-1]], dim=1)
        return Stimulus(inputs, counted, ids)


def alphabet_of(model: nn.Module, tokenizer: Any = None) -> Alphabet | None:
    """How random tokens are written for this model; None where it does not read tokens.

    What stands before a text is asked of the tokenizer; without one, of the model's config.

    Raises:
        InputError: fewer than two ordinary tokens.
    """
    embedding = _embedding(model)
    names = list(inspect.signature(model.forward).parameters)
    if embedding is None or not names or (tokenizer is None and "input_ids" not in names):
        return None
    config = _text_config(model)
    special = {getattr(config, f"{name}_token_id", None) for name in ("bos", "eos", "pad", "decoder_start")}
    count, before, after = embedding.num_embeddings, (), ()  # type: tuple[int, tuple[int, ...], tuple[int, ...]]
    if tokenizer is not None and callable(getattr(tokenizer, "decode", None)):
        special |= set(getattr(tokenizer, "all_special_ids", ()))
        count = min(count, len(tokenizer))
        before, after = _frame(tokenizer)
    elif isinstance(getattr(config, "bos_token_id", None), int) and not getattr(config, "is_encoder_decoder", False):
        before = (config.bos_token_id,) if 0 <= config.bos_token_id < count else ()
    flat = {id for entry in special for id in (entry if isinstance(entry, list | tuple) else (entry,))}
    tokens = torch.tensor([id for id in range(count) if id not in flat], dtype=torch.long)
    if len(tokens) < 2:
        raise InputError(f"this model has {len(tokens)} ordinary tokens: random texts need at least 2")
    start = getattr(config, "decoder_start_token_id", None) if getattr(config, "is_encoder_decoder", False) else None
    start = getattr(config, "pad_token_id", None) if start is None and getattr(config, "is_encoder_decoder", False) else start
    argument = "input_ids" if "input_ids" in names else names[0]
    return Alphabet(argument, tokens, before, after, context_window(model), embedding.weight.device, start)


def texts_of(model: nn.Module, tokenizer: Any, texts: Sequence[str]) -> list[Stimulus]:
    """One stimulus for each text; special tokens do not count, unless there is nothing else.

    Raises:
        InputError: a text that is empty or too long, or several at once as one string.
    """
    if isinstance(texts, str) or not texts:
        raise InputError(f"texts={texts!r}: give a list of texts, at least one")
    argument = next(iter(inspect.signature(model.forward).parameters))
    found = []
    for text in texts:
        inputs = tokenize(tokenizer, text, model)
        ids = inputs["input_ids"]
        special = torch.tensor([int(id) in set(tokenizer.all_special_ids) for id in ids[0].tolist()], device=ids.device)
        if "input_ids" not in inspect.signature(model.forward).parameters:
            inputs = {argument: ids}
        found.append(Stimulus(inputs, (~special if not bool(special.all()) else torch.ones_like(special))[None], ids))
    return found


def shortened(model: nn.Module, tokenizer: Any, text: str) -> str:
    """The beginning of a text that fits into the model's context window."""
    window = context_window(model)
    while window is not None and len(text) > 1 and (size := len(tokenizer(text, verbose=False)["input_ids"])) > window:
        text = text[: max(1, min(len(text) - 1, len(text) * window // size))]
    return text


def inputs_of(model: nn.Module, inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]] | Tensor) -> list[Stimulus]:
    """The user's own inputs: keyword inputs, a list of them, or one tensor for the first argument.

    Raises:
        InputError: none of these, or nothing in it.
    """
    if isinstance(inputs, Tensor):
        inputs = {next(iter(inspect.signature(model.forward).parameters)): inputs}
    given = [inputs] if isinstance(inputs, Mapping) else list(inputs)
    if not given or not all(isinstance(one, Mapping) and one for one in given):
        raise InputError("inputs are empty or no keyword inputs: give a mapping such as tokenizer(text, return_tensors='pt'), or several")
    found = []
    for one in given:
        tensors = {name: value for name, value in one.items() if isinstance(value, Tensor)}
        for name, value in tensors.items():
            if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                raise InputError(f"{name} holds NaN or infinity: what the heads do on it is undefined; give finite numbers")
        first = next(iter(tensors.values()), None)
        tokens = tensors.get("input_ids", first if first is not None and first.dtype in (torch.int64, torch.int32) else None)
        tokens = tokens if tokens is not None and tokens.dim() == 2 else None
        mask = tensors.get("attention_mask")
        counted = mask.bool() if mask is not None and tokens is not None and mask.shape == tokens.shape else None
        image = any(value.is_floating_point() and value.dim() == 4 for value in tensors.values())
        found.append(Stimulus(dict(one), counted, tokens, image))
    return found


def _embedding(model: nn.Module) -> nn.Embedding | None:
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        found = None
    if isinstance(found, nn.Embedding):
        return found
    every = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    return max(every, key=lambda module: module.num_embeddings, default=None)


def _text_config(model: nn.Module) -> Any:  # a config is whatever its library says
    config: Any = getattr(model, "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _frame(tokenizer: Any) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The special tokens that a tokenizer puts before and after a text."""
    encoded = tokenizer("a b", return_special_tokens_mask=True)
    ids, special = encoded["input_ids"], encoded["special_tokens_mask"]
    own = [place for place, apart in enumerate(special) if not apart]
    return (tuple(ids[: own[0]]), tuple(ids[own[-1] + 1 :])) if own else ((), ())
