"""Queries and keys of the subject tokens, head by head, as the rotation will meet them.

Letters: B samples, H heads of a side (query heads, or key/value heads), S tokens, D width, n subject tokens of all prompts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interventions.saferope.examples import Prompted
from headscope.kernels.errors import InputError, SelectionError
from headscope.probe.call import AttentionCall, AttentionSite
from headscope.probe.interception import intercept

Places = Mapping[str, tuple[int, ...]]  # where the tokens of the edited role are, by site, part and side; see find_roles


@dataclass(frozen=True)
class Side:
    """One side of one site: where an edit of its queries, or of its keys, is made.

    Attributes:
        site: its name.
        stage: `q.pre` or `k.pre` where the model has a place before rotation, else `q` or `k`.
    """

    site: str
    stage: str


def read_tokens(
    model: nn.Module, examples: Sequence[Prompted], places: Places | None, *, before: bool = True,
    run: Callable[[Prompted], object] | None = None, progress: Callable[[int, int], None] | None = None,
) -> dict[Side, Tensor]:  # fmt: skip
    """The subject tokens [n, H, D] of every site and side, in float32.

    Args:
        model: in eval mode; nothing of it is changed.
        examples: what it is run on.
        places: what `find_roles` found for the role; None where positions count the whole sequence.
        before: before rotation wherever there is a place for it.
        run: runs the model on an example; by default calls it with the inputs. Each call of a site counts, so a pipeline gives all steps.
        progress: told (examples done, examples in all).

    Raises:
        InputError: a subject that the role has not.
        SelectionError: no site whose tokens could be read.
    """
    reader = _Reader(places, before)
    devices = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=devices), torch.no_grad():
        for number, example in enumerate(examples):
            reader.example = example
            with intercept(model, reader):
                if run is None:
                    model(**example.inputs)
                else:
                    run(example)
            if progress is not None:
                progress(number + 1, len(examples))
    found = {side: torch.cat(parts) for side, parts in reader.found.items()}
    if not found:
        raise SelectionError("no token of the role comes by any attention of this model: look at find_roles(model, inputs, ...)")
    return found


@dataclass(eq=False)
class _Reader:
    """A handler that takes the subject tokens out of every call."""

    places: Places | None
    before: bool
    example: Prompted | None = None
    found: dict[Side, list[Tensor]] = field(default_factory=dict)
    tapped: set[tuple[str, str]] = field(default_factory=set)
    changes: bool = True  # so that the places before rotation are shown to it

    def stages(self, site: AttentionSite) -> frozenset[str]:
        return frozenset({"q.pre", "k.pre"}) if self.before and site.mechanism == "module" else frozenset()

    def reads(self, site: AttentionSite) -> frozenset[str]:
        return frozenset()

    def change(self, call: AttentionCall, stage: str, value: Tensor) -> Tensor:
        self.tapped.add((call.site.name, stage[0]))
        self._take(call, stage, value)
        return value

    def see(self, call: AttentionCall) -> None:
        for side, value in (("q", call.q), ("k", call.k)):
            if (call.site.name, side) not in self.tapped:
                self._take(call, side, value)

    def _take(self, call: AttentionCall, stage: str, value: Tensor) -> None:
        assert self.example is not None
        samples = self.example.samples
        if value.shape[0] not in (samples, 2 * samples) or (call.step > 0 and value.shape[2] == 1):
            return  # windows or frames in the batch, where no prompt stands; a decode step, which holds no prompt
        first = value.shape[0] - samples  # of a batch doubled for guidance the prompts are the second half
        rows = list(range(value.shape[2]))
        if self.places is not None:
            rows = list(self.places.get(f"{call.site.name}{'@' + call.part if call.part else ''}/{stage[0]}", ()))
        if not rows:
            return
        parts = []
        for sample, subject in enumerate(self.example.subject):
            wrong = [token for token in subject if not -len(rows) <= token < len(rows)]
            if wrong:
                raise InputError(f"subject token {wrong[0]} of sample {sample}: {call.site.name} has {len(rows)} tokens of that role")
            parts.append(value[first + sample, :, [rows[token] for token in subject]].transpose(0, 1))  # [tokens, H, D]
        self.found.setdefault(Side(call.site.name, stage), []).append(torch.cat(parts).detach().float().cpu())


def first_inputs(examples: Sequence[Prompted]) -> Mapping[str, Any]:
    """The inputs of the first example, to look at the model with."""
    return examples[0].inputs
