"""What a model is measured on: its batches, which of their tokens count, and which of those are special.

Letters: B batch, N tokens, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headscope.kernels.checks import shown
from headscope.kernels.errors import InputError
from headscope.probe.call import AttentionCall
from headscope.probe.interception.intercept import check_model

Inputs = Mapping[str, Any] | Tensor | Sequence[Mapping[str, Any]] | Sequence[Tensor]


@dataclass(eq=False)
class Tokens:
    """Which tokens of a batch count, and which of them are special.

    Attributes:
        counts: [B, N], bool; None counts all.
        special: [B, N], bool, such as [CLS] and [SEP]; None where nobody said.
        ignore_special: special tokens do not count as queries; as keys they stay.
        decoder: of a model with an encoder and a decoder, the same as `counts` of the decoder's tokens, `counts` being the encoder's.
        two_sides: the model has both.
    """

    counts: Tensor | None = None
    special: Tensor | None = None
    ignore_special: bool = False
    decoder: Tensor | None = None
    two_sides: bool = False
    used: bool = False  # some call had queries of this number
    _rows: dict[tuple[bool, int, int, int, bool], Tensor | None] = field(default_factory=dict, repr=False)

    def rows(self, call: AttentionCall) -> Tensor | None:
        """[B, Q], bool: the queries of a call that count; None where all do, or where its queries are not these tokens.

        In a call with fewer queries than keys, as after a cache, the queries are the last of the keys.
        """
        decoding = self.two_sides and (call.site.kind == "cross" or "decoder" in call.site.module)
        alike = call.site.kind != "cross"
        place = (decoding, call.q.shape[0], call.queries, call.keys, alike)
        if place not in self._rows:
            special = self.special if self.ignore_special and not decoding else None
            self._rows[place] = _both(
                _fitted(self.decoder if decoding else self.counts, *place[1:]), _inverted(_fitted(special, *place[1:]))
            )
        found = self._rows[place]
        self.used |= found is not None
        return found

    def special_keys(self, call: AttentionCall) -> Tensor | None:
        """[B, K], bool: the special keys of a call; None where nobody said, or where its keys are not these tokens."""
        if self.special is None or tuple(self.special.shape) != (call.q.shape[0], call.keys):
            return None
        if self.two_sides and call.site.kind != "cross" and "decoder" in call.site.module:
            return None
        return self.special.to(call.q.device)

    def of_states(self, batch: int, tokens: int, path: str = "") -> Tensor | None:
        """[B, N], bool: the tokens that count of hidden states [B, N, d] in the module at `path`; None for all."""
        decoding = self.two_sides and "decoder" in path
        special = self.special if self.ignore_special and not decoding else None
        masks = (self.decoder if decoding else self.counts, _inverted(special))
        fitting = [None if mask is None or tuple(mask.shape) != (batch, tokens) else mask for mask in masks]
        return _both(*fitting)


@dataclass(frozen=True, eq=False)
class Batch:
    """One forward: positional and keyword inputs of the model, and their tokens."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    tokens: Tokens

    def run(self, model: nn.Module) -> Any:
        """The model's output."""
        return model(*self.args, **self.kwargs)


def batches_of(
    model: nn.Module,
    inputs: Inputs,
    *,
    tokens: Tensor | Sequence[Tensor] | None = None,
    special: Tensor | Sequence[Tensor] | None = None,
    ignore_special: bool = False,
) -> list[Batch]:
    """The batches that `inputs` names, with what counts in each.

    Args:
        model: what they are for.
        inputs: keyword inputs, the first positional input as a tensor, or a list of either, one for each batch. Token ids without a
            batch axis get one.
        tokens: bool [B, N], True counts; one for each batch where there are several. None takes `attention_mask` of the inputs.
        special: bool [B, N], True is a special token; likewise.
        ignore_special: special tokens are not counted as queries.

    Raises:
        InputError: no inputs, inputs of another kind, masks that are not bool [B, N] or not one for each batch.
    """
    check_model(model)
    given = [inputs] if isinstance(inputs, (Mapping, Tensor)) else list(inputs) if isinstance(inputs, (list, tuple)) else None
    if given is None:
        raise InputError(
            f"inputs is {type(inputs).__name__}: give keyword inputs, such as tokenizer(text, return_tensors='pt'), or a tensor"
        )
    if not given:
        raise InputError("no inputs: give at least one batch")
    if ignore_special and special is None:
        raise InputError("ignore_special=True without special: say which tokens are special, bool [B, N]")
    counted, specials = _one_each("tokens", tokens, len(given)), _one_each("special", special, len(given))
    return [_batch(model, *one, ignore_special) for one in zip(given, counted, specials, strict=True)]


def refuse_training(model: nn.Module, what: str = "health is") -> None:
    """Raises InputError for a model in training mode."""
    if any(module.training for module in model.modules()):
        raise InputError(
            f"the model is in training mode, where dropout changes every number; {what} measured in eval mode: call model.eval()"
        )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """No gradients inside, and the random state afterwards as it was before."""
    devices = sorted({p.device.index or 0 for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        yield


def _batch(model: nn.Module, given: Any, tokens: Tensor | None, special: Tensor | None, ignore_special: bool) -> Batch:
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = {}
    if isinstance(given, Tensor):
        args = (given[None] if given.dim() == 1 and not given.is_floating_point() else given,)
    elif isinstance(given, Mapping):
        kwargs = {str(name): value for name, value in given.items()}
        ids = kwargs.get("input_ids")
        if isinstance(ids, Tensor) and ids.dim() == 1:
            kwargs = {name: value[None] if isinstance(value, Tensor) and value.dim() == 1 else value for name, value in kwargs.items()}
    else:
        raise InputError(
            f"a batch is {type(given).__name__}: give keyword inputs, such as tokenizer(text, return_tensors='pt'), or a tensor"
        )
    for name, value in (*((f"input {place}", one) for place, one in enumerate(args)), *kwargs.items()):
        if name in ("input 0", "input_ids") and isinstance(value, Tensor) and value.numel() == 0:
            raise InputError(f"{name} is {shown(value)}: there is no token to measure")
    counts = _mask("tokens", tokens) if tokens is not None else _padding(kwargs.get("attention_mask"))
    two_sides = "decoder_input_ids" in kwargs or bool(getattr(getattr(model, "config", None), "is_encoder_decoder", False))
    decoder = _padding(kwargs.get("decoder_attention_mask")) if two_sides else None
    return Batch(args, kwargs, Tokens(counts, None if special is None else _mask("special", special), ignore_special, decoder, two_sides))


def _mask(name: str, given: Tensor) -> Tensor:
    if not isinstance(given, Tensor) or given.dtype != torch.bool or given.dim() not in (1, 2):
        came = f"{shown(given)} of {given.dtype}" if isinstance(given, Tensor) else type(given).__name__
        raise InputError(f"{name} is {came}; give bool [B, N], one for each token")
    return given[None] if given.dim() == 1 else given


def _padding(given: object) -> Tensor | None:
    """A two-dimensional attention mask as bool."""
    return given != 0 if isinstance(given, Tensor) and given.dim() == 2 else None


def _one_each(name: str, given: Tensor | Sequence[Tensor] | None, count: int) -> list[Tensor | None]:
    if given is None:
        return [None] * count
    found = [given] if isinstance(given, Tensor) else list(given)
    if len(found) != count:
        raise InputError(f"{len(found)} masks in {name} for {count} batches: give one for each")
    return list(found)


def _fitted(mask: Tensor | None, batch: int, queries: int, keys: int, alike: bool) -> Tensor | None:
    """A mask over tokens as one over queries, which are the last of the keys; None where they are not these tokens."""
    if mask is None or mask.shape[0] != batch:
        return None
    if mask.shape[1] == queries:
        return mask
    return mask[:, keys - queries :] if alike and mask.shape[1] == keys and queries < keys else None


def _inverted(mask: Tensor | None) -> Tensor | None:
    return None if mask is None else ~mask


def _both(a: Tensor | None, b: Tensor | None) -> Tensor | None:
    return a if b is None else b if a is None else a & b.to(a.device)
