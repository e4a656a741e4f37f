"""The numbers at which a finding is made: one table, each with where it comes from, and all of them for the user to change.

Most are rules of thumb. They were set on small trained models, on freshly initialised networks and on networks that were broken on purpose;
none of them is a law.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from headscope.kernels.errors import InputError


@dataclass(frozen=True)
class Threshold:
    """One number at which a finding is made.

    Attributes:
        name: how it is changed.
        value: where it stands unless it is changed.
        unit: what it counts.
        kind: `literature` where a paper gives it, else `heuristic`.
        source: the paper, or what the rule of thumb rests on.
        meaning: which finding it makes, in one sentence.
    """

    name: str
    value: float
    unit: str
    kind: str
    source: str
    meaning: str

    def to_dict(self) -> dict[str, str | float]:
        return {name: getattr(self, name) for name in ("name", "value", "unit", "kind", "source", "meaning")}


OWN = "trained, untrained and broken small models"

TABLE: tuple[Threshold, ...] = (
    Threshold("tokens-least", 8, "tokens", "heuristic", "means over fewer rows say little",
              "Sites where queries see fewer tokens than this get no finding."),
    Threshold("layer-share", 0.75, "share of heads", "heuristic", OWN,
              "From this share of its heads on, what they have in common is said of the layer."),
    Threshold("entropy-low", 0.1, "share of log n", "heuristic", OWN + "; Zhai et al. 2023 tell collapse from training curves",
              "A head whose mean entropy is below this is sharp."),
    Threshold("uniform-entropy", 0.98, "share of log n", "heuristic", OWN,
              "A head whose mean entropy is above this, and whose routing is low, attends to everything alike."),
    Threshold("routing-low", 0.02, "share of the budget", "heuristic", OWN,
              "Routing that exceeds that of uniform attention by less than this does not depend on the query."),
    Threshold("routing-sharp", 0.5, "share of the budget", "heuristic", "previous-token and induction heads have 0.5 to 0.95",
              "A sharp head with at least this much routing is healthy."),
    Threshold("offset-mass", 0.5, "probability", "heuristic", "the usual bound for naming a previous-token head",
              "A head with this much on the own or the previous token is a positional head."),
    Threshold("sink", 0.3, "probability", "literature", "Gu et al. 2025, ε = 0.3",
              "A head that gives one key at least this much, on average over the queries that see it, has a sink."),
    Threshold("sink-excess", 0.2, "probability", "heuristic", "in short causal texts the first key gets much from uniform attention too",
              "A sink has to receive this much more than uniform attention would give it."),
    Threshold("sink-hub", 0.2, "share of the budget", "heuristic", OWN,
              "A sink shows in what all queries share: without this much hub, few queries stand behind the favourite key."),
    Threshold("sink-layer", 0.9, "probability", "heuristic", OWN,
              "A layer in which every head gives this much to one key does next to nothing."),
    Threshold("logit-warn", 100, "score", "literature", "Kimi Team 2025, τ = 100 of QK-Clip",
              "Attention scores above this are watched."),
    Threshold("logit-alarm", 1e4, "score", "literature", "Wortsman et al. 2023: all runs above 1e4 diverged",
              "Attention scores above this go with training that diverges."),
    Threshold("residual-warn", 0.1, "share of the norm", "heuristic", OWN + "; trained models keep 0.3 to 1",
              "Hidden states that differ from their mean by less than this are becoming one."),
    Threshold("residual-alarm", 0.01, "share of the norm", "heuristic", OWN,
              "Hidden states that differ from their mean by less than this have collapsed."),
    Threshold("cosine", 0.9, "mean cosine", "heuristic", OWN + "; a few large dimensions do this too",
              "Hidden states with a higher mean cosine point the same way."),
    Threshold("effective-rank", 0.05, "share of min(tokens - 1, width)", "heuristic", OWN,
              "Hidden states whose centred effective rank is below this lie in few directions."),
    Threshold("effective-rank-fresh", 0.2, "share of that of fresh weights", "heuristic",
              OWN + "; trained models keep what they began with",
              "Hidden states whose centred effective rank is below this share of a freshly initialised network's lose rank."),
    Threshold("contrast", 1.0, "spectral norm", "literature", "Dong et al. 2021: a pattern with ‖ΠP‖ < 1 contracts",
              "A head above this can make tokens more different, not only more alike."),
    Threshold("doubly-stochastic", 0.1, "mean |received - 1|", "heuristic", "exact 0 is the fixed point of Sinkhorn's iteration",
              "Patterns whose columns deviate from 1 by less than this are nearly doubly stochastic."),
    Threshold("gradient-warn", 1e-3, "ratio", "heuristic", "Noci et al. 2022 show the ratio falling to 0; trained skips keep 0.5",
              "Queries and keys that get less than this of the values' gradient hardly learn."),
    Threshold("gradient-alarm", 1e-6, "ratio", "heuristic", "Noci et al. 2022",
              "Queries and keys that get less than this of the values' gradient do not learn."),
    Threshold("dilution", 0.8, "share of n at the longest text", "heuristic", OWN,
              "Attention that spreads over this share of all keys, more the longer the text, is diluted."),
    Threshold("untrained", 0.03, "share of log n", "heuristic", OWN,
              "A model whose heads all lie this near to freshly initialised ones looks untrained."),
)  # fmt: skip
BY_NAME = {row.name: row for row in TABLE}
ORDERED = (("residual-alarm", "residual-warn"), ("logit-warn", "logit-alarm"), ("gradient-alarm", "gradient-warn"))


@dataclass(frozen=True)
class Thresholds(Mapping[str, float]):
    """The table's numbers, some of them changed.

    Attributes:
        changed: those that are not as in the table, by name.
    """

    changed: tuple[tuple[str, float], ...] = ()

    def __getitem__(self, name: str) -> float:
        if name not in BY_NAME:
            raise InputError(_unknown(name))
        return dict(self.changed).get(name, BY_NAME[name].value)

    def __contains__(self, name: object) -> bool:
        return name in BY_NAME

    def __iter__(self) -> Iterator[str]:
        return iter(BY_NAME)

    def __len__(self) -> int:
        return len(BY_NAME)

    def rows(self) -> list[dict[str, str | float | bool]]:
        """One line for each, with the value in force and whether it was changed."""
        return [row.to_dict() | {"value": self[row.name], "changed": row.name in dict(self.changed)} for row in TABLE]

    def to_dict(self) -> dict[str, float]:
        return {name: self[name] for name in self}


def thresholds_of(given: Mapping[str, float] | Thresholds | None) -> Thresholds:
    """The table with the numbers that were given put in.

    Args:
        given: by name; those left out stay as in the table.

    Raises:
        InputError: no such threshold, or a value that is no finite number from 0 up, or a warning that comes after its alarm.
    """
    if given is None or isinstance(given, Thresholds):
        return given or Thresholds()
    if not isinstance(given, Mapping):
        raise InputError(f"thresholds are {type(given).__name__}: give a mapping such as {{'sink': 0.5}}")
    changed: dict[str, float] = {}
    for name, value in given.items():
        if name not in BY_NAME:
            raise InputError(_unknown(name))
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value < 0:
            raise InputError(f"threshold {name} = {value!r}: give a finite number from 0 up, in {BY_NAME[name].unit}")
        if float(value) != BY_NAME[name].value:
            changed[name] = float(value)
    found = Thresholds(tuple((row.name, changed[row.name]) for row in TABLE if row.name in changed))
    for low, high in ORDERED:
        if found[low] > found[high]:
            raise InputError(f"threshold {low} = {found[low]:g} is above {high} = {found[high]:g}: give both so that it is not")
    return found


def _unknown(name: object) -> str:
    near = difflib.get_close_matches(str(name), BY_NAME, 1)
    return f"no threshold {name!r}: {f'did you mean {near[0]!r}? ' if near else ''}There are {', '.join(BY_NAME)}"
