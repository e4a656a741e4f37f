"""Why a model generated what it did: relevance of every token for every generated one, and the way back from an answer to the prompt.

A generated token t is the target logit(t) at position t - 1, all of them read in one forward pass; each is one backward pass and gives a
row r_t over the tokens before it. Rows are additive: their sum is the relevance for the whole span.

Much of the relevance for an answer lands on tokens that the model generated itself. A hop sends it on, from every generated token t to
what made the model say t, in the shares of the evidence for it:

    share_t(s) = max(r_t(s), 0) / Σ_u max(r_t(u), 0)
    w_{k+1}(s) = [s in the prompt] w_k(s) + Σ_{t generated} w_k(t) share_t(s)

w_0 is the relevance for the answer. A share is never negative and a token's shares add up to 1, so Σ w_k is the same after every hop;
a token without evidence keeps its relevance. As r_t reaches only tokens before t, all of it is on the prompt after as many hops as tokens
were generated. (Hops through generated reasoning: arXiv 2602.01914; relevance as it flows between tokens: Ferrando and Voita 2024.)

Letters: S tokens of prompt and generated text, T tokens that are explained, n prompt tokens.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import AttributionError, HeadscopeError, InputError, NonFiniteError, SelectionError
from headscope.probe.attribution.as_html import tokens_html
from headscope.probe.attribution.attribute import Taps, attribute, ruled
from headscope.probe.attribution.attribution import Attribution
from headscope.probe.attribution.ledger import Books
from headscope.probe.attribution.question import Question
from headscope.probe.attribution.rules import rule_set
from headscope.probe.attribution.target import Target, generated, logits_of
from headscope.probe.models import context_window, tokenize
from headscope.probe.visible import markup

if TYPE_CHECKING:
    from pandas import DataFrame

Progress = Callable[[int, int], None]


@dataclass(frozen=True, eq=False)
class Rows:
    """Relevance for each of several tokens of one text.

    Attributes:
        tokens: the whole text, [S].
        places: positions of the explained tokens, [T]; each is at least 1.
        values: the logit of each, where it was predicted.
        relevance: [T, S] in float64; zero from the explained token on.
        whole: the attribution of their sum, with heads, layers and books.
    """

    tokens: tuple[str, ...]
    places: tuple[int, ...]
    values: tuple[float, ...]
    relevance: Tensor
    whole: Attribution

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return {
            "tokens": list(self.tokens),
            "places": list(self.places),
            "values": list(self.values),
            "relevance": self.relevance.tolist(),
            "whole": self.whole.to_dict(),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_frame(self) -> DataFrame:
        """One line for each explained token and token before it; needs pandas.

        Raises:
            HeadscopeError: pandas is not installed.
        """
        lines = [
            {"place": place, "token": self.tokens[place], "from": other, "from_token": self.tokens[other], "relevance": number}
            for place, row in zip(self.places, self.relevance.tolist(), strict=True)
            for other, number in enumerate(row[:place])
        ]
        return _frame(lines, ["place", "token", "from", "from_token", "relevance"])

    def _repr_html_(self) -> str:
        parts = []
        for place, row in zip(self.places, self.relevance.tolist(), strict=True):
            parts.append(f"<p><b>{markup(self.tokens[place])}</b> at {place}</p>{tokens_html(self.tokens[:place], row[:place])}")
        return f'<div style="color:#111;background:#fff">{"".join(parts)}</div>'

    def __str__(self) -> str:
        return f"Rows({len(self.places)} of {len(self.tokens)} tokens, {self.whole.method})"


@dataclass(frozen=True, eq=False)
class Trace:
    """Relevance of an answer, hop by hop on its way to the prompt.

    Attributes:
        tokens: prompt and generated text up to the end of the answer, [S].
        prompt: n, how many of them are the prompt.
        answer: first position of the answer, and the one after its last.
        rows: relevance for each generated token.
        masses: w_0, w_1 …, each [S] in float64; all have one sum.
        whole: the attribution of the answer, whose relevance is w_0, with heads and books.
    """

    tokens: tuple[str, ...]
    prompt: int
    answer: tuple[int, int]
    rows: Tensor
    masses: tuple[Tensor, ...]
    whole: Attribution

    @property
    def on_prompt(self) -> tuple[float, ...]:
        """What lies on the prompt after 0, 1 … hops."""
        return tuple(float(mass[: self.prompt].sum()) for mass in self.masses)

    @property
    def on_generated(self) -> tuple[float, ...]:
        """What still lies on generated tokens after 0, 1 … hops."""
        return tuple(float(mass[self.prompt :].sum()) for mass in self.masses)

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON."""
        return {
            "tokens": list(self.tokens),
            "prompt": self.prompt,
            "answer": list(self.answer),
            "hops": [mass.tolist() for mass in self.masses],
            "on_prompt": list(self.on_prompt),
            "on_generated": list(self.on_generated),
            "rows": self.rows.tolist(),
            "whole": self.whole.to_dict(),
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_frame(self) -> DataFrame:
        """One line for each hop and token; needs pandas.

        Raises:
            HeadscopeError: pandas is not installed.
        """
        lines = [
            {"hop": hop, "position": place, "token": token, "generated": place >= self.prompt, "relevance": number}
            for hop, mass in enumerate(self.masses)
            for place, (token, number) in enumerate(zip(self.tokens, mass.tolist(), strict=True))
        ]
        return _frame(lines, ["hop", "position", "token", "generated", "relevance"])

    def _repr_html_(self) -> str:
        parts = []
        for hop, mass in enumerate(self.masses):
            told = f"{self.on_prompt[hop]:+.4g} on the prompt, {self.on_generated[hop]:+.4g} on generated tokens"
            made = [place >= self.prompt for place in range(len(self.tokens))]
            parts.append(f"<p><b>{hop} hops</b>: {told} (dashed)</p>{tokens_html(self.tokens, mass.tolist(), made)}")
        return f'<div style="color:#111;background:#fff">{"".join(parts)}</div>'

    def __str__(self) -> str:
        return f"Trace({len(self.masses) - 1} hops, {self.on_prompt[-1]:.4g} of {float(self.masses[-1].sum()):.4g} on the prompt)"


def attribute_span(
    model: nn.Module,
    ids: Tensor,
    start: int,
    stop: int,
    method: str = "attnlrp",
    *,
    tokenizer: Any = None,
    log_probability: bool = False,
    progress: Progress | None = None,
) -> Rows:
    """Relevance for each of the tokens start … stop - 1 of a text, and for their sum.

    Two forward passes (one for the rows, one for the sum with its heads), one backward pass a token and one more.

    Args:
        model: a language model that predicts the next token, in eval mode.
        ids: token ids of one text, [1, S].
        start: the first token that is explained; at least 1, since nothing predicts token 0.
        stop: the one after the last.
        method: a rule set, as in `attribute`.
        tokenizer: names the tokens.
        log_probability: explain the log-probability in place of the logit.
        progress: called with rows done and rows to do.

    Raises:
        InputError: ids of another shape; an encoder-decoder.
        SelectionError: a span outside of the text, or a method that is no rule set.
        AttributionError: the model gives no logits for every token.
    """
    _check_text(model, ids)
    if not 1 <= start < stop <= ids.shape[1]:
        raise SelectionError(f"no tokens {start}:{stop} to explain: give START:STOP between 1 and {ids.shape[1]}")
    ids = ids[:, :stop]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    span = generated(ids[0, start:].tolist(), start, log_probability)
    values, rows = _rows(Question.of(model, inputs, span, tokenizer), span, method, progress)
    whole = attribute(model, inputs, span, method, tokenizer=tokenizer)
    return Rows(_named(whole, ids), tuple(range(start, stop)), values, rows, whole)


def trace(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    generated_text: str | Sequence[int],
    answer_span: tuple[int, int],
    *,
    hops: int | None = None,
    method: str = "attnlrp",
    progress: Progress | None = None,
) -> Trace:
    """From an answer through the tokens that the model generated before it, back to the prompt; see the module docstring.

    Args:
        model: a language model in eval mode.
        tokenizer: of the model.
        prompt: what it was asked.
        generated_text: what it said, as text or as token ids (as text it may be tokenised in another way than it was generated).
        answer_span: which of the generated tokens are the answer, (start, stop), counted from the first generated one.
        hops: how many; None for as many as it takes until nothing can be sent on.
        method: a rule set, as in `attribute`.
        progress: called with backward passes done and to do, one for each generated token up to the end of the answer.

    Raises:
        InputError: nothing was generated; more tokens than the model can look back on; an encoder-decoder.
        SelectionError: an answer outside of the generated text, or fewer than 0 hops.
    """
    if hops is not None and hops < 0:
        raise SelectionError(f"{hops} hops: give 0 or more, or None for all")
    before = open_ended(tokenize(tokenizer, prompt, model)["input_ids"], tokenizer)
    said = list(tokenizer.encode(generated_text, add_special_tokens=False)) if isinstance(generated_text, str) else list(generated_text)
    if not said:
        raise InputError("the generated text has no tokens: there is no answer to trace")
    first, last = answer_span
    if not 0 <= first < last <= len(said):
        raise SelectionError(f"no answer {first}:{last}: {len(said)} tokens were generated, give START:STOP between 0 and {len(said)}")
    ids = torch.cat([before, torch.tensor([said[:last]], device=before.device)], dim=1)  # [1, S]
    limit = context_window(model)
    if limit is not None and ids.shape[1] > limit:
        raise InputError(f"prompt and answer have {ids.shape[1]} tokens, the context window of this model {limit}: shorten them")
    n = before.shape[1]
    _check_text(model, ids)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    span = generated(said[:last], n)
    _, rows = _rows(Question.of(model, inputs, span, tokenizer), span, method, progress)
    whole = attribute(model, inputs, generated(said[first:last], n + first), method, tokenizer=tokenizer)
    masses = redistribute(rows[first:].sum(0), rows, n, hops)
    return Trace(_named(whole, ids), n, (n + first, n + last), rows, tuple(masses), whole)


def redistribute(mass: Tensor, rows: Tensor, prompt: int, hops: int | None = None) -> list[Tensor]:
    """w_0, w_1 … of the module docstring.

    Args:
        mass: w_0, [S].
        rows: r_t of every generated token, [S - prompt, S]; what a row holds at its own token or later is not looked at.
        prompt: n, at least 1.
        hops: at most so many; None until nothing can be sent on.
    """
    length = len(mass)
    shares = torch.zeros(length, length, dtype=torch.float64)  # shares[t, s]
    for place in range(length):
        evidence = rows[place - prompt, :place].double().clamp_min(0) if place >= prompt else torch.zeros(0)
        total = float(evidence.sum())
        if total > 0:
            shares[place, :place] = evidence / total
        else:
            shares[place, place] = 1.0
    found = [mass.double()]
    moves = torch.tensor([place >= prompt and not bool(shares[place, place]) for place in range(length)])
    while (hops is None or len(found) <= hops) and bool(found[-1][moves].any()):
        found.append(found[-1] @ shares)
    return found


def open_ended(ids: Tensor, tokenizer: Any) -> Tensor:
    """[1, n], the tokens of a text that is to go on: without the end of text that the tokenizer put behind it."""
    end = getattr(tokenizer, "eos_token_id", None)
    return ids[:, :-1] if ids.shape[1] > 1 and end is not None and int(ids[0, -1]) == end else ids


def _rows(question: Question, span: Target, method: str, progress: Progress | None) -> tuple[tuple[float, ...], Tensor]:
    """The value of each token of a span, and its relevance [T, S]: one forward pass, one backward pass each."""
    rules = rule_set(method)
    length = question.inputs["input_ids"].shape[1]
    with ruled(question, Taps(False), rules, Books() if rules.conserves else None) as (mode, floats):
        logits = logits_of(question.model(**{**question.inputs, **floats}))
        if logits.dim() != 3 or logits.shape[1] != length:
            raise AttributionError(f"logits are {list(logits.shape)}; a row for each token needs those of every position, [1, {length}, V]")
        values = [_one(span, place)(logits) for place in range(len(span.positions))]
    leaves = [leaf.tensor for leaf in mode.leaves if leaf.name == "input_ids"]
    if not leaves:
        raise AttributionError("this model looks up no token ids in an embedding, so no relevance reaches them")
    rows = torch.zeros(len(values), length, dtype=torch.float64)
    for place, value in enumerate(values):
        gradients = torch.autograd.grad(value, leaves, retain_graph=place + 1 < len(values), allow_unused=True)
        for leaf, g in zip(leaves, gradients, strict=True):
            if g is not None:
                rows[place] += (leaf.detach() * g).reshape(length, -1).sum(-1).double().cpu()
        if not bool(torch.isfinite(rows[place]).all()):
            raise NonFiniteError(
                f"the relevance for token {span.positions[place] + 1} is not finite: use float32 instead of half precision"
            )
        if progress is not None:
            progress(place + 1, len(values))
    return tuple(float(value.detach()) for value in values), rows


def _named(whole: Attribution, ids: Tensor) -> tuple[str, ...]:
    return tuple(whole.tokens[0]) if whole.tokens is not None else tuple(str(id) for id in ids[0].tolist())


def _one(span: Target, place: int) -> Target:
    """The target of one token of a span."""
    assert span.ids is not None
    return Target((span.ids[place],), (), (span.positions[place],), span.log_probability)


def _check_text(model: nn.Module, ids: Tensor) -> None:
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[0] != 1 or ids.is_floating_point():
        came = list(ids.shape) if isinstance(ids, Tensor) else type(ids).__name__
        raise InputError(f"ids are {came}: give the token ids of one text, [1, S]")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(
            f"{type(model).__name__} has an encoder for its prompt: spans and traces are of models that go on writing one text"
        )


def _frame(lines: list[dict[str, Any]], columns: list[str]) -> DataFrame:
    try:
        import pandas
    except ImportError as error:
        raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use to_dict()") from error
    return pandas.DataFrame(lines, columns=columns)
