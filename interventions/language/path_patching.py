"""Which heads act through which: a head's output from a corrupted run, shown to its receivers' q, k or v alone (Wang et al. 2022,
arXiv 2211.00593; Goldowsky-Dill et al. 2023, arXiv 2304.05969).

Three runs on the intact input's tokens. First the z of all heads, of both inputs, are read. In the second the senders have the z of
the corrupted input and every other head that of the intact one, so that what senders write reaches later layers through the residual
stream (and feed-forward layers) alone; q, k and v of the receivers are read there. In the third the receivers have these q, k, v, and
all else follows. With `output` the model's last block is a receiver too: it gets what the second run changed in its output.

Under grouped-query attention k and v belong to a group, so a receiver's k or v is that of all heads that share it.

Letters: n sets of senders, H query heads, G key/value heads, Q queries, V width of a value, E width of the residual stream.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interventions.edit import Edit
from headscope.interventions.language.head_sets import Head, checked_model
from headscope.interventions.language.prompts import Reading, blocks_of, copies, heads_of, read_states, samples_of, sites_of
from headscope.interventions.ops import add, patch
from headscope.interventions.plan import Plan
from headscope.interventions.select import select
from headscope.kernels.errors import InputError, SelectionError
from headscope.probe.attribution.head_ranking import HeadRanking
from headscope.probe.attribution.question import Question
from headscope.probe.attribution.target import Scalar, Target
from headscope.probe.call import AttentionSite

SIDES = ("q", "k", "v")


@dataclass(frozen=True)
class Receiver:
    """An input of a head.

    Attributes:
        site: the site's name.
        head: which query head.
        side: `q`, `k` or `v`.
    """

    site: str
    head: int
    side: str


@dataclass(frozen=True)
class PathEffect:
    """The target on the intact input, on the corrupted one, and on the intact one with paths patched.

    Attributes:
        intact, corrupted, patched: the target's value.
    """

    intact: float
    corrupted: float
    patched: float

    @property
    def effect(self) -> float:
        """What the target loses by the paths: intact - patched."""
        return self.intact - self.patched

    @property
    def share(self) -> float | None:
        """Of what it loses by the whole corruption; None where that is nothing."""
        whole = self.intact - self.corrupted
        return None if whole == 0 else self.effect / whole

    def to_dict(self) -> dict[str, float | None]:
        return {
            "intact": self.intact,
            "corrupted": self.corrupted,
            "patched": self.patched,
            "effect": self.effect,
            "share": self.share,
        }

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def __str__(self) -> str:
        share = "" if self.share is None else f", {100 * self.share:.1f} % of what the corruption takes"
        return f"{self.intact:.4g} → {self.patched:.4g} by these paths (corrupted {self.corrupted:.4g}{share})"


def patch_paths(
    model: nn.Module,
    inputs: Mapping[str, Any],
    corrupted: Mapping[str, Any],
    senders: Collection[Head],
    receivers: Sequence[Receiver] = (),
    target: int | Target | Scalar | None = None,
    *,
    output: bool = False,
    modules: Sequence[str] = (),
) -> PathEffect:
    """The effect of some heads through some inputs of later heads, or straight on the output.

    Args:
        model: in eval mode; nothing of it is changed.
        inputs: keyword inputs of one sample.
        corrupted: the same with what matters changed, of the same shape.
        senders: heads (site, head) that get their output of the corrupted input.
        receivers: which inputs of which heads see it.
        target: as in `attribute`; the largest logit is that of the intact input.
        output: the model's output sees it too.
        modules: paths of modules whose output is held at the intact run while the senders are patched, such as feed-forward layers, so
            that no path leads through them.

    Raises:
        InputError: more than one sample, shapes that differ, no receiver.
        SelectionError: no such head or module.
    """
    work = _Work.of(model, inputs, corrupted, target, modules, output)
    (value,) = work.patched([frozenset(senders)], receivers)
    return PathEffect(work.intact, work.corrupted, value)


def rank_paths(
    model: nn.Module,
    inputs: Mapping[str, Any],
    corrupted: Mapping[str, Any],
    receivers: Sequence[Receiver] = (),
    target: int | Target | Scalar | None = None,
    *,
    output: bool = False,
    modules: Sequence[str] = (),
    batch: int = 16,
    progress: Callable[[int, int], None] | None = None,
) -> HeadRanking:
    """Every head as the only sender: what the target loses by its paths to the receivers.

    Args:
        model, inputs, corrupted, receivers, target, output, modules: as in `patch_paths`.
        batch: senders that are patched together, each in a copy of the input.
        progress: told (senders done, senders in all).

    Returns:
        Scores by "path-patching", in the target's unit; positive where the head's paths raise the target.

    Raises:
        InputError, SelectionError: as in `patch_paths`.
    """
    if batch < 1:
        raise InputError(f"batch={batch}: give 1 or more senders to patch together")
    work = _Work.of(model, inputs, corrupted, target, modules, output)
    heads = heads_of(work.sites)
    together = batch if isinstance(work.question.scalar, Target) else 1
    values: list[float] = []
    for start in range(0, len(heads), together):
        values += work.patched([frozenset({head}) for head in heads[start : start + together]], receivers)
        if progress is not None:
            progress(len(values), len(heads))
    scores = (work.intact - torch.tensor(values, dtype=torch.float64)).reshape(len(work.sites), -1)
    settings: dict[str, object] = {
        "receivers": [[r.site, r.head, r.side] for r in receivers],
        "output": output,
        "intact": work.intact,
        "corrupted": work.corrupted,
        "target": work.question.describe(),
    }
    return HeadRanking({"path-patching": scores}, {"path-patching": scores[None]}, work.sites, settings)


@dataclass(frozen=True, eq=False)
class _Work:
    """Both runs, read once."""

    question: Question
    sites: tuple[AttentionSite, ...]
    z: Mapping[str, Tensor]  # [1, H, Q, V] by site, on the intact input
    other: Mapping[str, Tensor]  # on the corrupted one
    held: Mapping[str, Tensor]  # outputs [1, 1, S, E] of modules on the intact input
    end: tuple[str, Tensor] | None  # the last block and its output [1, 1, S, E] on the intact input, where the output is a receiver
    intact: float
    corrupted: float

    @classmethod
    def of(
        cls, model: nn.Module, inputs: Mapping[str, Any], corrupted: Mapping[str, Any], target: int | Target | Scalar | None,
        modules: Sequence[str], direct: bool,
    ) -> _Work:  # fmt: skip
        samples, others = samples_of(inputs, "inputs"), samples_of(corrupted, "corrupted")
        if len(samples) != 1 or len(others) != 1:
            raise InputError(f"{len(samples)} and {len(others)} samples: paths are patched in one sample at a time")
        question = Question.of(checked_model(model), samples[0], target).resolved()
        sites = sites_of(model, samples[0])
        names = [site.name for site in sites]
        z, output = read_states(model, samples[0], "z", names)
        other, gone = read_states(model, others[0], "z", names)
        for name, value in z.items():
            if name not in other or other[name].shape != value.shape:
                came = list(other[name].shape) if name in other else "nothing"
                raise InputError(f"{name} gives {list(value.shape)} for the input and {came} for its corrupted twin: give the same shape")
        held = read_states(model, samples[0], "out", list(modules))[0] if modules else {}
        for name in modules:
            if name not in held:
                raise SelectionError(f"modules={name!r}: no module of that path ran")
        end = None
        if direct:
            block = blocks_of(sites)[-1]
            end = block, read_states(model, samples[0], "resid", [block])[0][block]
        return cls(question, sites, z, other, held, end, float(question.read(output).sum()), float(question.read(gone).sum()))

    def patched(self, sets: Sequence[frozenset[Head]], receivers: Sequence[Receiver]) -> list[float]:
        """The target for each set of senders."""
        self._check(sets, receivers)
        model, inputs = self.question.model, copies(self.question.inputs, len(sets))
        sides = {side: tuple(dict.fromkeys(r.site for r in receivers if r.side == side)) for side in SIDES}
        readings = [Reading(side, names) for side, names in sides.items() if names]
        if self.end is not None:
            readings.append(Reading("resid", (self.end[0],)))
        with torch.no_grad():
            with self._senders(sets).on(model), _together(readings).on(model):
                model(**inputs)
            found = {(reading.stage, name): value for reading in readings for name, value in reading.found.items()}
            edits: list[Edit] = []
            for receiver in dict.fromkeys(receivers):
                value = found[receiver.side, receiver.site]
                chosen = self._place(receiver)
                if not any(edit.stage == receiver.side and edit.selector == chosen for edit in edits):
                    edits.append(Edit(receiver.side, patch(value), chosen))
            if self.end is not None:
                edits.append(Edit("resid", add(found["resid", self.end[0]] - self.end[1]), select(sites=self.end[0])))
            with Plan(edits).on(model):
                values = self.question.read(model(**inputs)).double()
        return [float(value) for value in values]

    def _senders(self, sets: Sequence[frozenset[Head]]) -> Plan:
        """Every head's z: corrupted at the senders of a copy, intact at all others."""
        edits = []
        for name, intact in self.z.items():
            value = intact.repeat(len(sets), 1, 1, 1)  # [n, H, Q, V]
            for copy, heads in enumerate(sets):
                for own in (head for site, head in heads if site == name):
                    value[copy, own] = self.other[name][0, own]
            edits.append(Edit("z", patch(value), select(sites=name)))
        for name, value in self.held.items():
            edits.append(Edit("out", patch(value.repeat(len(sets), 1, 1, 1)), select(sites=name)))
        return Plan(edits)

    def _place(self, receiver: Receiver) -> Any:
        site = self._site(receiver.site)
        if receiver.side == "q":
            return select(sites=receiver.site, head=receiver.head)
        return select(sites=receiver.site, kv_group=receiver.head // (site.query_heads // site.kv_heads))

    def _site(self, name: str) -> AttentionSite:
        found = next((site for site in self.sites if site.name == name), None)
        if found is None:
            raise SelectionError(f"no site {name!r}: there are {', '.join(site.name for site in self.sites[:8])}")
        return found

    def _check(self, sets: Sequence[frozenset[Head]], receivers: Sequence[Receiver]) -> None:
        if not receivers and self.end is None:
            raise InputError("no receiver: name inputs of heads, or say output=True")
        if not isinstance(self.question.scalar, Target) and len(sets) > 1:
            raise InputError("a target that is a function may look at the whole batch: patch one set of senders at a time")
        named = [(r.site, r.head) for r in receivers] + [head for heads in sets for head in heads]
        for name, head in named:
            if not 0 <= head < self._site(name).query_heads:
                raise SelectionError(f"no head {head} in {name}: it has {self._site(name).query_heads}, from 0")
        for receiver in receivers:
            if receiver.side not in SIDES:
                raise InputError(f"side={receiver.side!r}: a head receives at q, k or v")


def _together(readings: Sequence[Reading]) -> Plan:
    return Plan([edit for reading in readings for edit in reading.plan])
