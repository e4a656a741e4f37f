"""What is attributed: one number of a model's output, named so that a report can say it.

Letters: B batch, S tokens, V vocabulary, C classes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from headscope.kernels.errors import AttributionError, InputError, SelectionError

Scalar = Callable[[Any], Tensor]


@dataclass(frozen=True)
class Target:
    """A logit, or a difference or sum of logits.

    Attributes:
        ids: tokens or classes that count; None takes the one with the largest logit. Of several, the logits are summed.
        against: tokens or classes whose logits are subtracted, one for each of `ids`: why this and not that.
        positions: for a language model, after which tokens its prediction counts, one for each of `ids` (or one for all);
            negative ones count from the end.
        log_probability: log-softmax in place of the logit.
    """

    ids: tuple[int, ...] | None = None
    against: tuple[int, ...] = ()
    positions: tuple[int, ...] = (-1,)
    log_probability: bool = False

    def __post_init__(self) -> None:
        if self.ids == () or not self.positions:
            raise SelectionError("a target of no tokens or no positions: give at least one, or leave ids out for the largest logit")

    def __call__(self, output: Any) -> Tensor:
        """The sum of `each` over the batch."""
        return self.each(output).sum()

    def each(self, output: Any) -> Tensor:
        """[B], the value of every sample.

        Raises:
            AttributionError: the output has no logits.
            SelectionError: a class, token or position that is not there.
        """
        rows = self._rows(logits_of(output))  # [B, P, V]
        if self.ids is None:
            return rows.amax(-1).sum(-1)
        wide = rows.shape[-1]
        for id in (*self.ids, *self.against):
            if not 0 <= id < wide:
                raise SelectionError(f"no class or token {id}: there are {wide}, 0 to {wide - 1}")
        if rows.shape[1] not in (1, len(self.ids)) or (self.against and len(self.against) != len(self.ids)):
            raise SelectionError(
                f"{len(self.ids)} tokens, {len(self.against)} against them and {rows.shape[1]} positions: give one position for all or one "
                "for each, and as many against as for"
            )
        rows = rows.expand(-1, len(self.ids), -1)
        value = torch.stack([rows[:, place, id] for place, id in enumerate(self.ids)]).sum(0)
        for place, id in enumerate(self.against):
            value = value - rows[:, place, id]
        return value

    def resolved(self, output: Any) -> Target:
        """The same with `ids` filled in from an output of one sample, where the largest logit was meant.

        Raises:
            AttributionError: the output is of several samples, whose largest logits may differ.
        """
        if self.ids is not None:
            return self
        rows = self._rows(logits_of(output))
        if rows.shape[0] != 1:
            raise AttributionError(f"the largest logit of {rows.shape[0]} samples is not one class: give ids, or one sample at a time")
        return replace(self, ids=tuple(int(id) for id in rows[0].argmax(-1)))

    def _rows(self, logits: Tensor) -> Tensor:
        """[B, P, V], the logits that count."""
        if logits.dim() == 3:
            length = logits.shape[1]
            for position in self.positions:
                if not -length <= position < length:
                    raise SelectionError(f"no prediction at position {position}: there are {length}, {-length} to {length - 1}")
            rows = logits[:, list(self.positions)]
        elif logits.dim() == 2:
            rows = logits[:, None]
        else:
            raise AttributionError(
                f"logits are {list(logits.shape)}: give target= as a function of the model's output that returns one number"
            )
        return rows.log_softmax(-1) if self.log_probability else rows

    def describe(self, name: Callable[[int], str] = str) -> str:
        """In words, with `name` naming an id."""
        what = "log-probability" if self.log_probability else "logit"
        if self.ids is None:
            return f"largest {what}"
        words = f"{what} of {' + '.join(name(id) for id in self.ids)}"
        words += f" minus {' + '.join(name(id) for id in self.against)}" if self.against else ""
        return words if len(self.positions) > 1 or self.positions[0] == -1 else f"{words} at position {self.positions[0]}"

    def to_dict(self) -> dict[str, object]:
        return {
            "ids": None if self.ids is None else list(self.ids),
            "against": list(self.against),
            "positions": list(self.positions),
            "log_probability": self.log_probability,
        }


def contrast(this: int, that: int, position: int = -1) -> Target:
    """Why `this` token or class and not `that`: the difference of their logits."""
    return Target((this,), (that,), (position,))


def generated(ids: Sequence[int], prompt: int, log_probability: bool = False) -> Target:
    """A generated span, summed over its tokens: `ids` follow a prompt of `prompt` tokens, all of which were read in one forward.

    Raises:
        SelectionError: no tokens, or no prompt before them that could have said them.
    """
    if prompt < 1:
        raise SelectionError(f"a prompt of {prompt} tokens: the first token of a text is not predicted, give 1 or more")
    return Target(tuple(ids), (), tuple(range(prompt - 1, prompt - 1 + len(ids))), log_probability)


def id_named(text: str, tokenizer: Any = None, labels: Mapping[int, str] | None = None) -> int:
    """The token or class that a text names: its number, or itself.

    Args:
        text: `1077`, ` be` (with the space, where a word follows another) or a class's label.
        tokenizer: of the model, where it has one.
        labels: of classes, such as `model.config.id2label`.

    Raises:
        InputError: not one token, or no such label.
    """
    if re.fullmatch(r"\d{1,9}", text):
        return int(text)
    if tokenizer is None or not hasattr(tokenizer, "encode"):
        found = [id for id, label in (labels or {}).items() if str(label) == text]
        if len(found) != 1:
            raise InputError(f"no class {text!r}: give a number, or one of {', '.join(map(str, (labels or {}).values())) or 'no labels'}")
        return int(found[0])
    ids = list(tokenizer.encode(text, add_special_tokens=False))
    if len(ids) != 1:
        parts = " ".join(repr(tokenizer.decode([id])) for id in ids[:8])
        raise InputError(f"{text!r} is {len(ids)} tokens here, {parts or 'none'}: give one of them, or a token's number")
    return int(ids[0])


def as_target(given: int | Target | Scalar | None) -> Target | Scalar:
    """What a user may give as a target: a class or token, a `Target`, a function of the output; None for the largest logit."""
    if given is None:
        return Target()
    if isinstance(given, bool):
        raise AttributionError(f"target={given}: give a class or token number, a Target, or a function of the output")
    return Target((given,)) if isinstance(given, int) else given


def logits_of(output: Any) -> Tensor:
    """The logits among what a model returned.

    Raises:
        AttributionError: there are none to be found.
    """
    found = getattr(output, "logits", None)
    if found is None and isinstance(output, dict):
        found = output.get("logits")
    if found is None and isinstance(output, Tensor):
        found = output
    if found is None and isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        found = output[0]
    if not isinstance(found, Tensor) or not found.is_floating_point():
        raise AttributionError(
            f"the output, {type(output).__name__}, has no logits: give target= as a function of the output that returns one number"
        )
    return found


def one_number_of(value: object) -> Tensor:
    """A target's value, checked to be one floating-point number.

    Raises:
        AttributionError: it is not.
    """
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        came = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
        raise AttributionError(f"the target is {came}; it must be one floating-point number: sum it, or pick an entry")
    return value.reshape(())


def one_number(value: object) -> Tensor:
    """The same, checked to depend on the inputs.

    Raises:
        AttributionError: it is no single number, or does not.
    """
    found = one_number_of(value)
    if not found.requires_grad:
        raise AttributionError(
            "the target does not depend on the inputs: something on the way detached it (no_grad, an integer or quantised operation, numpy)"
        )
    return found


def value_of(value: Tensor) -> float:
    """A number out of a graph."""
    return float(value.detach().to(torch.float64))
