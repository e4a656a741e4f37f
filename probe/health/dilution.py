"""Does attention spread thinner as the text grows? Every head at several lengths.

Letters: T lengths, H query heads.

With bounded scores a softmax over n keys can keep no probability above e^Δ / (n - 1 + e^Δ), Δ the range of the scores (Veličković et al.
2024), so that a head which is sharp on short texts may be diffuse on long ones. What tells it is how the effective number of keys n_eff
grows with the number n of visible keys: with n for a head that spreads over all of them, not at all for a head that stays sharp.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from headscope.kernels.errors import HeadscopeError, InputError, SelectionError
from headscope.probe.attribution.as_html import table
from headscope.probe.call import AttentionSite
from headscope.probe.health.findings import Finding
from headscope.probe.health.inputs import Inputs
from headscope.probe.health.measure import measure_health
from headscope.probe.health.measures import HeadMeasures, Plain, plain
from headscope.probe.health.thresholds import Thresholds, thresholds_of
from headscope.probe.visible import markup

if TYPE_CHECKING:
    from pandas import DataFrame
    from plotly.graph_objects import Figure

NUMBERS = ("effective_keys", "effective_share", "p_max", "entropy_share", "routing")
SPREADS, SHARP = 0.9, 0.25  # slopes; rules of thumb
REMEDIES = ("scale the scores by log n (scalable softmax)", "a temperature that falls with n", "local windows")
SHOWN = 10


@dataclass(frozen=True, eq=False)
class HeadSweep:
    """The heads of one site at every length.

    Attributes:
        site: where the heads are.
        keys: [T], visible keys of a row, their mean.
        effective_keys, effective_share, p_max, entropy_share, routing: [T, H], as in `HeadMeasures`; NaN where undefined.
        slope: [H], of log n_eff over log n, by least squares over the lengths: 1 where a head spreads over all keys there are, 0 where it
            keeps to as many as before; NaN where there are fewer than two lengths to tell.
        undefined: field -> why it, or some of it, is NaN.
    """

    site: AttentionSite
    keys: Tensor
    effective_keys: Tensor
    effective_share: Tensor
    p_max: Tensor
    entropy_share: Tensor
    routing: Tensor
    slope: Tensor
    undefined: Mapping[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, object]:
        """Plain values, ready for JSON; None where undefined."""
        tables = {name: [[plain(value) for value in row] for row in getattr(self, name).tolist()] for name in NUMBERS}
        vectors = {name: [plain(value) for value in getattr(self, name).tolist()] for name in ("keys", "slope")}
        return {"site": self.site.to_dict(), **vectors, **tables, "undefined": dict(self.undefined)}


@dataclass(frozen=True, eq=False)
class LengthSweep:
    """All heads at growing lengths.

    Attributes:
        lengths: the lengths, ascending.
        heads: one for each site, in execution order.
    """

    lengths: tuple[int, ...]
    heads: tuple[HeadSweep, ...]

    def spreading(self, slope: float = SPREADS) -> list[tuple[str, int]]:
        """(site, head) of the heads whose effective keys grow with the text, so that their share of it does not fall."""
        return self._where(lambda value: value >= slope)

    def sharp(self, slope: float = SHARP) -> list[tuple[str, int]]:
        """(site, head) of the heads that keep to about as many keys as on a short text."""
        return self._where(lambda value: value <= slope)

    def findings(self, thresholds: Mapping[str, float] | Thresholds | None = None) -> tuple[Finding, ...]:
        """Heads whose attention is spread over more than `thresholds["dilution"]` of all keys at the longest text, and grows with it."""
        limit = thresholds_of(thresholds)["dilution"]
        found = []
        for one in self.heads:
            for head in range(one.site.query_heads):
                share, slope = float(one.effective_share[-1, head]), float(one.slope[head])
                if not (share >= limit and slope >= SPREADS):  # also NaN
                    continue
                first, last = float(one.p_max[0, head]), float(one.p_max[-1, head])
                evidence = (
                    ("effective_share at the longest text", share, limit), ("slope of log n_eff over log n", slope, SPREADS),
                    (f"p_max at {self.lengths[0]} tokens", first, None), (f"p_max at {self.lengths[-1]} tokens", last, None),
                )  # fmt: skip
                why = (
                    f"spreads over {100 * share:.0f} % of all keys at {self.lengths[-1]} tokens, and over more the longer the text: "
                    f"its largest probability went from {first:.2g} to {last:.2g}"
                )
                source = "Veličković et al. 2024; Barbero et al. 2024; rule of thumb"
                found.append(Finding("warn", "dilution", one.site.layer, one.site.name, head, evidence, why, REMEDIES, source))
        return tuple(found)

    def rows(self) -> list[dict[str, Plain]]:
        """One line for each head and length."""
        return [
            {"site": one.site.name, "layer": one.site.layer, "head": head, "length": length, "keys": plain(float(one.keys[place])),
             **{name: plain(float(getattr(one, name)[place, head])) for name in NUMBERS}, "slope": plain(float(one.slope[head]))}
            for one in self.heads
            for head in range(one.site.query_heads)
            for place, length in enumerate(self.lengths)
        ]  # fmt: skip

    def to_dict(self) -> dict[str, object]:
        """Everything as plain values, ready for JSON."""
        return {"schema": "headscope.dilution/v1", "lengths": list(self.lengths), "heads": [one.to_dict() for one in self.heads]}

    def to_json(self) -> str:
        return json.dumps(self.to_dict(), allow_nan=False)

    def to_frame(self) -> DataFrame:
        """The lines of `rows` as a data frame; needs pandas.

        Raises:
            HeadscopeError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use to_dict()") from error
        return pandas.DataFrame(self.rows())

    def plot(self, number: str = "effective_keys") -> Figure:
        """A curve over the lengths for every head, both axes logarithmic, coloured by layer, as a Plotly figure.

        Args:
            number: `effective_keys`, `effective_share`, `p_max`, `entropy_share` or `routing`.

        Raises:
            HeadscopeError: plotly is not installed.
            SelectionError: no such number.
        """
        if number not in NUMBERS:
            raise SelectionError(f"no number {number!r}: there are {', '.join(NUMBERS)}")
        try:
            from plotly.graph_objects import Figure, Scatter
        except ImportError as error:
            raise HeadscopeError("plot() needs plotly, which is not installed: pip install 'headscope[app]', or use to_dict()") from error
        found = Figure()
        for place, one in enumerate(self.heads):
            colour = f"hsl({round(210 - 190 * place / max(1, len(self.heads) - 1))},70%,42%)"  # from blue, the first, to orange
            for head in range(one.site.query_heads):
                values = [plain(value) for value in getattr(one, number)[:, head].tolist()]
                title = f"{markup(one.site.name)}, head {head}, slope {float(one.slope[head]):.2f}"
                found.add_trace(Scatter(
                    x=list(self.lengths), y=values, mode="lines+markers", name=title, line={"color": colour, "width": 1},
                    showlegend=False, hoverinfo="name+x+y", opacity=0.7,
                ))  # fmt: skip
        if number == "effective_keys":
            found.add_trace(Scatter(
                x=list(self.lengths), y=list(self.lengths), mode="lines", name="every token", line={"color": "#555", "dash": "dot"},
            ))  # fmt: skip
        found.update_xaxes(type="log", title_text="tokens", tickvals=list(self.lengths))
        found.update_yaxes(type="log", title_text=number.replace("_", " "))
        found.update_layout(template="plotly_white", height=480, title=markup(str(self)))
        return found

    def _repr_html_(self) -> str:
        every = [(one.site.name, head, float(one.slope[head])) for one in self.heads for head in range(one.site.query_heads)]
        known = sorted((row for row in every if not math.isnan(row[2])), key=lambda row: -row[2])
        shares = {(one.site.name, head): float(one.effective_share[-1, head]) for one in self.heads for head in range(one.site.query_heads)}
        shown = [(name, str(head), f"{slope:.2f}", f"{shares[name, head]:.2g}") for name, head, slope in known[:SHOWN]]
        style = "font-family:system-ui,sans-serif;font-size:14px;line-height:1.5;color:#111;background:#fff;padding:.5em"
        title = f"<p><b>{markup(str(self))}</b>; the heads that spread most:</p>"
        head = ("site", "head", "slope of log n_eff", f"n_eff / n at {self.lengths[-1]}")
        return f'<div style="{style}">{title}{table(head, shown)}</div>'

    def __str__(self) -> str:
        count = sum(one.site.query_heads for one in self.heads)
        return (
            f"LengthSweep({self.lengths[0]} to {self.lengths[-1]} tokens, {count} heads: {len(self.spreading())} spread with the text, "
            f"{len(self.sharp())} stay sharp)"
        )

    def _where(self, wanted: Callable[[float], bool]) -> list[tuple[str, int]]:
        return [(one.site.name, head) for one in self.heads for head, slope in enumerate(one.slope.tolist()) if wanted(slope)]


def sweep_lengths(
    model: nn.Module,
    inputs_at: Callable[[int], Inputs],
    lengths: Sequence[int],
    *,
    tokens_at: Callable[[int], Tensor] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> LengthSweep:
    """How every head's attention spreads as the text grows.

        sweep_lengths(model, lambda n: {"input_ids": ids[:, :n]}, (64, 128, 256, 512))

    Args:
        model: in evaluation mode; nothing of it is changed.
        inputs_at: the inputs of a length, as `measure_health` takes them. A prefix of one text keeps what is read the same.
        lengths: two or more numbers of tokens, ascending.
        tokens_at: bool [B, N] for a length, True = counts.
        progress: told (lengths done, lengths in all).

    Raises:
        InputError: fewer than two lengths, or not ascending; a length beyond the model's context window; inputs that are shorter than
            was asked; a model in training mode.
        SelectionError: sites that come and go with the length.
    """
    wanted = tuple(int(length) for length in lengths)
    if len(wanted) < 2 or wanted[0] < 2 or any(a >= b for a, b in zip(wanted, wanted[1:], strict=False)):
        raise InputError(f"lengths={list(lengths)}: give two or more numbers of tokens from 2 up, each larger than the one before")
    limit = context_window(model)
    if limit is not None and wanted[-1] > limit:
        raise InputError(
            f"a length of {wanted[-1]} tokens: the context window of {type(model).__name__} has {limit}; beyond it the numbers would tell "
            "of positions that the model never saw"
        )
    measured: list[tuple[HeadMeasures, ...]] = []
    for number, length in enumerate(wanted):
        tokens = None if tokens_at is None else tokens_at(length)
        inputs = inputs_at(length)
        _check_length(inputs, length)
        measured.append(measure_health(model, inputs, tokens=tokens, spectrum=0, baselines=False).heads)
        if progress is not None:
            progress(number + 1, len(wanted))
    names = [one.site.name for one in measured[0]]
    for length, heads in zip(wanted, measured, strict=True):
        if [one.site.name for one in heads] != names:
            raise SelectionError(f"the sites at {length} tokens are not those at {wanted[0]}: sweep lengths at which they are the same")
    return LengthSweep(wanted, tuple(_swept([heads[place] for heads in measured]) for place in range(len(names))))


def context_window(model: nn.Module) -> int | None:
    """How many tokens a model was made for, by its configuration; None where that does not say."""
    config: Any = getattr(model, "config", None)
    find = getattr(config, "get_text_config", None)
    config = find() if callable(find) else config
    for name in ("max_position_embeddings", "n_positions", "max_sequence_length", "block_size", "n_ctx"):
        value = getattr(config, name, None)
        if isinstance(value, int) and not isinstance(value, bool) and value > 0:
            return value
    return None


def _check_length(inputs: Inputs, length: int) -> None:
    """Raises InputError for token ids that are fewer than was asked: a text that has run out."""
    for one in [inputs] if isinstance(inputs, Mapping | Tensor) else inputs:
        ids = one.get("input_ids") if isinstance(one, Mapping) else one
        if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.shape[-1] < length:
            raise InputError(f"inputs_at({length}) gave {ids.shape[-1]} tokens: the text has run out; give a longer one, or repeat it")


def _swept(heads: Sequence[HeadMeasures]) -> HeadSweep:
    keys = torch.tensor([one.keys for one in heads], dtype=torch.float64)
    tables = {name: torch.stack([getattr(one, name) for one in heads]) for name in NUMBERS}
    slope, reason = _slope(keys, tables["effective_keys"])
    undefined = {name: why for one in heads for name, why in one.undefined.items() if name in NUMBERS}
    if reason is not None:
        undefined["slope"] = reason
    return HeadSweep(heads[0].site, keys, slope=slope, undefined=undefined, **tables)


def _slope(keys: Tensor, effective: Tensor) -> tuple[Tensor, str | None]:
    """[H], and why some of it is NaN. From keys [T] and effective keys [T, H]; lengths at which a head has no number are left out."""
    x, y = keys.log(), effective.log()
    known = (y.isfinite() & x.isfinite()[:, None]).to(y.dtype)  # [T, H]
    count = known.sum(0)
    x_all = x.nan_to_num(0.0, 0.0, 0.0)[:, None] * known
    y = y.nan_to_num(0.0, 0.0, 0.0) * known
    dx = (x_all - x_all.sum(0) / count) * known
    dy = (y - y.sum(0) / count) * known
    spread = dx.square().sum(0)
    slope = (dx * dy).sum(0) / spread
    enough = (count >= 2) & (spread > 1e-6)
    reason = None if bool(enough.all()) else "no two lengths with different numbers of visible keys have a number"
    return slope.masked_fill(~enough, torch.nan), reason
