"""What a head's output says about a label: linear probes, one a head, with a control task.

A probe that reads a label from z shows that the label is there, not that the model uses it. A control task gives every type of token a
random label: what a probe scores there, it memorises. Selectivity is the difference (Hewitt & Liang 2019).

Letters: B samples, S tokens, L sites, H query heads, V width of z, n labelled places.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from headscope.kernels.errors import HeadscopeError, InputError, NotIntercepted, SelectionError
from headscope.probe.atlas.stimuli import inputs_of
from headscope.probe.call import AttentionSite
from headscope.probe.keep import Keep
from headscope.probe.probe import Probe

if TYPE_CHECKING:
    from pandas import DataFrame

IGNORED = -100  # a token with this label has none
RESAMPLES = 1000


@dataclass(frozen=True, eq=False)
class HeadProbes:
    """How well the label can be read from each head; accuracies on samples that a probe was not trained on.

    Attributes:
        sites: the L sites.
        accuracy: [L, H].
        low, high: [L, H], 95 % interval of the accuracy, resampling whole samples.
        control: [L, H], accuracy on the control task; NaN without one.
        majority: the share of the commonest label: what a probe that knows nothing scores.
        classes: the labels.
        places: how many labelled places there were.
        folds: of the cross-validation.
    """

    sites: tuple[AttentionSite, ...]
    accuracy: Tensor
    low: Tensor
    high: Tensor
    control: Tensor
    majority: float
    classes: tuple[int, ...]
    places: int
    folds: int

    @property
    def selectivity(self) -> Tensor:
        """[L, H], accuracy minus that of the control task."""
        return self.accuracy - self.control

    def to_dict(self) -> dict[str, object]:
        tables = {name: getattr(self, name) for name in ("accuracy", "low", "high", "control", "selectivity")}
        rest = {"majority": self.majority, "classes": list(self.classes), "places": self.places, "folds": self.folds}
        plain = {name: [[None if cell != cell else cell for cell in row] for row in table.tolist()] for name, table in tables.items()}
        return {"sites": [site.to_dict() for site in self.sites], **plain, **rest}

    def to_frame(self) -> DataFrame:
        """One line a head; needs pandas.

        Raises:
            HeadscopeError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise HeadscopeError("to_frame() needs pandas, which is not installed: pip install pandas, or use to_dict()") from error
        names = ("accuracy", "low", "high", "control", "selectivity")
        rows = [
            {"site": site.name, "layer": site.layer, "head": head, **{name: float(getattr(self, name)[place, head]) for name in names}}
            for place, site in enumerate(self.sites)
            for head in range(site.query_heads)
        ]
        return pandas.DataFrame(rows)


def probe_heads(
    model: nn.Module,
    inputs: Mapping[str, Any] | Sequence[Mapping[str, Any]],
    labels: Tensor | Sequence[Tensor],
    *,
    position: int | None = None,
    control: bool = True,
    folds: int = 5,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> HeadProbes:
    """Train a linear probe on every head's z, cross-validated so that a sample is never in training and test at once.

    z is standardised; the probe is a logistic regression with scikit-learn's default penalty. Needs scikit-learn.

    Args:
        model: in eval mode.
        inputs: keyword inputs, or a list of them.
        labels: int64, for each of the inputs [B, S] for every token (-100 for those without), or [B] for every sample.
        position: with a label per sample: of which token z is read; None for the mean over the tokens that are not padding.
        control: train on the control task too. Tokens of one type share a random label, drawn as often as the true ones; samples that
            read the same tokens likewise.
        folds: of the cross-validation.
        seed: of folds, control task and resampling.
        progress: told (heads done, heads in all).

    Raises:
        HeadscopeError: scikit-learn is not installed.
        InputError: a model in training mode; labels that do not fit the inputs; fewer than two classes, or samples than folds.
        NotIntercepted: no attention was caught.
    """
    sklearn = _scikit_learn()
    stimuli = inputs_of(model, inputs)
    given = [labels] if isinstance(labels, Tensor) else list(labels)
    if len(given) != len(stimuli):
        raise InputError(f"{len(given)} tensors of labels for {len(stimuli)} inputs: give one for each")
    if folds < 2:
        raise InputError(f"folds={folds}: give 2 or more")
    if any(module.training for module in model.modules()):
        raise InputError("the model is in training mode, where dropout makes z random: call model.eval() first")
    sites: dict[str, AttentionSite] = {}
    rows: dict[str, list[Tensor]] = {}
    targets, groups, types = [], [], []
    count = 0
    for stimulus, label in zip(stimuli, given, strict=True):
        with torch.no_grad(), Probe(model).capture(Keep(z=True), steps=0) as seen:
            model(**stimulus.inputs)
        if not seen.records:
            raise NotIntercepted("no attention was caught in this model, so there are no heads to probe")
        batch = label.shape[0]
        for record in seen.records.values():
            z = record.get("z")  # [B, H, Q, V]
            if z.shape[0] != batch or (label.dim() == 2 and z.shape[2] != label.shape[1]):
                raise InputError(f"labels are {list(label.shape)} and z of {record.site.name} is {list(z.shape)}: give [B] or [B, S]")
            sites.setdefault(record.site.name, record.site)
            rows.setdefault(record.site.name, []).append(_read(z, label, stimulus.counted, position))
        chosen = (label != IGNORED).cpu()
        place = chosen.nonzero()  # [n, 1 or 2]
        targets.append(label.cpu()[chosen])
        groups.append(place[:, 0] + count)
        types.append(_types(stimulus.tokens, chosen, place[:, 0] + count))
        count += batch
    y, group = torch.cat(targets).numpy(), torch.cat(groups).numpy()
    kind = [name for part in types for name in part]
    classes = tuple(sorted(set(y.tolist())))
    _check(classes, len(set(group.tolist())), folds)
    random = np.random.default_rng(seed)
    drawn = {name: y[random.integers(len(y))] for name in dict.fromkeys(kind)}
    tasks = {"accuracy": y, **({"control": np.array([drawn[name] for name in kind])} if control else {})}
    splitter = sklearn["splitter"](n_splits=folds, shuffle=True, random_state=seed)
    splits = list(splitter.split(np.zeros(len(y)), y, group))
    wide = max(site.query_heads for site in sites.values())
    tables = {name: torch.full((len(sites), wide), torch.nan, dtype=torch.float64) for name in ("accuracy", "control", "low", "high")}
    done, total = 0, sum(site.query_heads for site in sites.values())
    for layer, site in enumerate(sites.values()):
        outputs = torch.cat(rows[site.name]).double().cpu().numpy()  # [n, H, V]
        for head in range(site.query_heads):
            for name, target in tasks.items():
                right = _held_out(outputs[:, head], target, splits, sklearn)
                tables[name][layer, head] = float(right.mean())
                if name == "accuracy":
                    tables["low"][layer, head], tables["high"][layer, head] = _interval(right, group, np.random.default_rng(seed))
            done += 1
            if progress is not None:
                progress(done, total)
    majority = float(np.unique(y, return_counts=True)[1].max() / len(y))
    return HeadProbes(
        tuple(sites.values()), tables["accuracy"], tables["low"], tables["high"], tables["control"], majority, classes, len(y), folds
    )


def _read(z: Tensor, label: Tensor, counted: Tensor | None, position: int | None) -> Tensor:
    """[n, H, V], z [B, H, Q, V] at the labelled places."""
    rows = z.transpose(1, 2)  # [B, Q, H, V]
    chosen = (label != IGNORED).to(z.device)
    if label.dim() == 2:
        return rows[chosen]
    if position is not None:
        if not -z.shape[2] <= position < z.shape[2]:
            raise SelectionError(f"position {position}: there are {z.shape[2]} tokens, 0 to {z.shape[2] - 1}")
        return rows[chosen][:, position]
    weight = torch.ones(rows.shape[:2], device=z.device) if counted is None else counted.to(z.device, rows.dtype)
    mean = (rows * weight[..., None, None]).sum(1) / weight.sum(1).clamp_min(1)[:, None, None]
    return mean[chosen]


def _types(tokens: Tensor | None, chosen: Tensor, samples: Tensor) -> list[object]:
    """What shares a label in the control task: the token at each labelled place, or all tokens of a sample."""
    if tokens is None:
        return list(samples.tolist())
    if chosen.dim() == 2:
        return list(tokens.cpu()[chosen].tolist())
    return [tuple(row) for row in tokens.cpu()[chosen].tolist()]


def _check(classes: Sequence[int], samples: int, folds: int) -> None:
    if len(classes) < 2:
        raise InputError(f"labels hold {len(classes)} classes: a probe needs at least two to tell apart")
    if samples < folds:
        raise InputError(
            f"{samples} labelled samples for {folds} folds: a sample is never in training and test at once; give more, or fewer folds="
        )


def _held_out(z: npt.NDArray[Any], target: npt.NDArray[Any], splits: Sequence[Any], sklearn: Mapping[str, Any]) -> npt.NDArray[Any]:
    """[n], 1.0 where the probe of the other folds is right."""
    right = np.zeros(len(target))
    for train, test in splits:
        if len(set(target[train].tolist())) < 2:
            right[test] = target[test] == target[train][0]
            continue
        probe = sklearn["pipeline"](sklearn["scaler"](), sklearn["regression"](max_iter=1000))
        right[test] = probe.fit(z[train], target[train]).predict(z[test]) == target[test]
    return right


def _interval(right: npt.NDArray[Any], group: npt.NDArray[Any], random: np.random.Generator) -> tuple[float, float]:
    """95 % interval of the mean, from samples drawn with replacement."""
    _, index = np.unique(group, return_inverse=True)
    sums, counts = np.bincount(index, weights=right), np.bincount(index)
    drawn = random.integers(len(sums), size=(RESAMPLES, len(sums)))
    low, high = np.quantile(sums[drawn].sum(1) / counts[drawn].sum(1), (0.025, 0.975))
    return float(low), float(high)


def _scikit_learn() -> dict[str, Any]:
    try:
        from sklearn.linear_model import LogisticRegression
        from sklearn.model_selection import StratifiedGroupKFold
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler
    except ImportError as error:
        raise HeadscopeError("probes need scikit-learn, which is not installed: pip install 'headscope[attribution]'") from error
    return {"regression": LogisticRegression, "splitter": StratifiedGroupKFold, "pipeline": make_pipeline, "scaler": StandardScaler}
