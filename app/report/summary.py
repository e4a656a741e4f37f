"""What the examples say together: curves with intervals, heads in order, checks with their tolerances, and what stands against it.

Everything here is computed from the records of the examples, so that whoever has the sidecar can compute it again.

Letters: n examples, P points of a curve, H heads of all sites.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from headscope.app.report.measures import SHARES_REMOVED, Settings, levels_of, short
from headscope.app.report.schema import Json
from headscope.probe.attribution.correlation import rank_correlation
from headscope.probe.attribution.interval import Interval, bootstrap
from headscope.probe.attribution.measured import POSITION
from headscope.probe.call import AttentionSite

HeadName = tuple[str, int | None, int]  # site, layer, head

LEVEL = 0.95
EXACT = 12  # up to so many examples every pattern of signs is counted, beyond it a sample of them
FLIPS = 4096
REPEAT_TOLERANCE = 1e-5  # of the largest relevance; kernels that add in another order differ by rounding
RANDOM_WEIGHTS = 0.5  # rank correlation with the relevance of a model with random weights that would be suspicious
WORST = 3  # examples shown as counter-evidence


def summarise(records: Sequence[Json], settings: Settings, names: Sequence[HeadName], joint: Sequence[float]) -> Json:
    """The parts of a sidecar that are about all examples.

    Args:
        records: of `examine`, at least one.
        settings: that they were made with.
        names: of every head, as `names_of` gives them.
        joint: for every example, how far the value falls without the leading heads, as `leading` names them.
    """
    conservation, curves, heads = conserved(records), faithfulness(records, settings), head_table(records, settings, names, joint)
    sanity = sane(records, settings)
    checks = [*_checks_of_books(records, conservation), *_checks_of_curves(records, settings), *_checks_of_sanity(sanity)]
    failed = sum(check["passed"] is False for check in checks)
    return {
        "checks": checks,
        "verdict": {
            "passed": not failed,
            "failed": failed,
            "not_done": sum(check["passed"] is None for check in checks),
            "of": len(checks),
        },
        "conservation": conservation,
        "faithfulness": curves,
        "sanity": sanity,
        "heads": heads,
        "claims": [claim(record, names) for record in records],
        "counter": counter_evidence(records, settings),
    }


def conserved(records: Sequence[Json]) -> Json:
    """The books over all examples; `worst` is the largest |residual| relative to its ledger's scale."""
    ledgers = [record["ledger"] for record in records if record["ledger"] is not None]
    if not ledgers:
        return {"keeps_books": False, "by_kind": {}, "worst": None, "tolerance": None, "open": [], "unruled": []}
    kinds = sorted({kind for ledger in ledgers for kind in ledger["by_kind"]})
    unruled: dict[tuple[str, str], int] = {}
    for operation, module, calls in itertools.chain.from_iterable(record["unruled"] for record in records):
        unruled[operation, module] = unruled.get((operation, module), 0) + calls
    return {
        "keeps_books": True,
        "by_kind": {kind: float(np.mean([ledger["by_kind"].get(kind, 0.0) for ledger in ledgers])) for kind in kinds},
        "worst": max(relative_residual(ledger) for ledger in ledgers),
        "tolerance": max(ledger["tolerance"] for ledger in ledgers),
        "open": [record["id"] for record in records if not record["ledger"]["closes"]],
        "unruled": [[operation, module, calls] for (operation, module), calls in unruled.items()],
    }


def relative_residual(ledger: Json) -> float:
    residual, scale = abs(float(ledger["residual"])), float(ledger["scale"])
    return residual / scale if scale else residual


def faithfulness(records: Sequence[Json], settings: Settings) -> Json:
    """Mean curves of every method, the band of random orders, and the areas with their intervals."""
    methods = []
    for name in (settings.method, *settings.others, POSITION):
        own = [record["curves"][name] for record in records]
        methods.append(
            {
                "name": name,
                "most_first": _mean_curve([curve["most_first"] for curve in own]),
                "least_first": _mean_curve([curve["least_first"] for curve in own]),
                "delta_area": interval([curve["delta_area"] for curve in own], settings),
                "comprehensiveness": interval([curve["comprehensiveness"] for curve in own], settings),
                "sufficiency": interval([curve["sufficiency"] for curve in own], settings),
                "seconds": _mean_seconds(records, name),
            }
        )
    draws = np.mean([record["random"]["most_first"] for record in records], axis=0)  # [n, draws, P] -> [draws, P]
    low, high = np.quantile(draws, [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return {
        "removal": records[0]["removal"],
        "level": LEVEL,
        "shares": SHARES_REMOVED,
        "methods": methods,
        "random": {
            "draws": settings.draws, "mean": _rounded(draws.mean(0)), "low": _rounded(low), "high": _rounded(high),
            "delta_area": interval([float(np.mean(record["random"]["delta_area"])) for record in records], settings),
        },
        "fall": interval([record["fall"] for record in records], settings),
    }  # fmt: skip


def _mean_seconds(records: Sequence[Json], name: str) -> float | None:
    known = [record["method_seconds"][name] for record in records if name in record["method_seconds"]]
    return short(float(np.mean(known)), 4) if known else None


def interval(values: Sequence[float], settings: Settings) -> Json:
    """Mean over examples and its bootstrap interval."""
    found: Interval = bootstrap(values, level=LEVEL, resamples=settings.resamples, seed=settings.seed)
    return {name: short(value) if isinstance(value, float) else value for name, value in found.to_dict().items()}


def leading(records: Sequence[Json], settings: Settings) -> list[int]:
    """The heads with the largest mean effect (by size), in that order, at most `settings.together`; places in execution order."""
    return _by_effect(records)[: settings.together]


def _by_effect(records: Sequence[Json]) -> list[int]:
    effects = np.mean([record["head_effects"] for record in records], axis=0)
    return [int(place) for place in np.argsort(-np.abs(effects), kind="stable")]


def names_of(sites: Sequence[AttentionSite]) -> list[HeadName]:
    """[H], site, layer and number of every head."""
    return [(site.name, site.layer, head) for site in sites for head in range(site.query_heads)]


def head_table(records: Sequence[Json], settings: Settings, names: Sequence[HeadName], joint: Sequence[float]) -> Json:
    """Heads by the size of their effect, each tested against none, and the leading ones ablated together.

    The p-value of a head is that of the sign-flip test over examples (Fisher 1935); p-values are corrected for all heads that were
    tested (Holm 1979). Of one example there is neither interval nor p-value.
    """
    effects = np.asarray([record["head_effects"] for record in records])  # [n, H]
    relevance = None if any(record["heads"] is None for record in records) else np.asarray([record["heads"] for record in records])
    chances = sign_flips(effects, settings.seed) if len(records) > 1 else None
    adjusted = None if chances is None else holm(chances)
    order = _by_effect(records)
    rows = [
        {
            "site": names[place][0], "layer": names[place][1], "head": names[place][2],
            "relevance": None if relevance is None else interval(relevance[:, place].tolist(), settings),
            "effect": interval(effects[:, place].tolist(), settings),
            "p": None if chances is None else chances[place], "p_adjusted": None if adjusted is None else adjusted[place],
        }
        for place in order[: settings.heads]
    ]  # fmt: skip
    first = leading(records, settings)
    return {
        "tested": len(names),
        "shown": len(rows),
        "rows": rows,
        "agreement": None if relevance is None else agreement(relevance.mean(0), effects.mean(0)),
        "map": _map(names, levels_of(effects.mean(0).tolist())),
        "together": {
            "heads": [list(names[place]) for place in first],
            "by_example": list(joint),
            "effect": interval(joint, settings),
            "sum_of_single": float(effects[:, first].sum(1).mean()),
        },
    }  # fmt: skip


def _map(names: Sequence[HeadName], levels: Sequence[int]) -> list[list[Any]]:
    """A row for each site: its name, its layer, and every head's effect in ninths of the largest."""
    rows: dict[str, list[Any]] = {}
    for (site, layer, _), level in zip(names, levels, strict=True):
        rows.setdefault(site, [site, layer, []])[2].append(level)
    return list(rows.values())


def sign_flips(effects: Any, seed: int) -> list[float]:
    """[H], two-sided p-values for effects [n, H] being symmetric around 0: how often random signs give as large a mean."""
    count = len(effects)
    if count <= EXACT:
        signs = np.asarray(list(itertools.product((1.0, -1.0), repeat=count)))
        extra = 0
    else:
        signs = np.random.default_rng(seed).choice((1.0, -1.0), size=(FLIPS, count))
        extra = 1  # the observed signs count as one of the draws
    observed = np.abs(effects.mean(0))
    reached = (np.abs(signs @ effects) / count >= observed * (1 - 1e-12)).sum(0)
    return [float(value) for value in (reached + extra) / (len(signs) + extra)]


def holm(chances: Sequence[float]) -> list[float]:
    """P-values corrected for how many there are (Holm 1979): the k-th smallest times the number that are not smaller, never decreasing."""
    order = np.argsort(chances, kind="stable")
    found, before = [0.0] * len(chances), 0.0
    for rank, place in enumerate(order):
        before = max(before, min(1.0, (len(chances) - rank) * chances[place]))
        found[place] = before
    return found


def agreement(a: Any, b: Any) -> float | None:
    """Spearman's; None where there is nothing to rank."""
    return rank_correlation(torch.as_tensor(a), torch.as_tensor(b))


def sane(records: Sequence[Json], settings: Settings) -> Json:
    """What the close looks found, on the first examples."""
    looks = [record["close_look"] for record in records if record["close_look"] is not None]
    found: Json = {"examples": len(looks), "repeat_difference": max((look["repeat_difference"] for look in looks), default=None)}
    weights = [look["random_weights"] for look in looks if look["random_weights"]]
    last = [steps[-1][1] for steps in weights if steps[-1][1] is not None]
    found["random_weights"] = {
        "correlation": interval([abs(value) for value in last], settings) if last else None,
        "steps": [[rows[0][0], _mean_known([row[1] for row in rows])] for rows in zip(*weights, strict=True)],
    } if weights else None  # fmt: skip
    others = [look["other_removal"] for look in looks if look["other_removal"] is not None]
    found["other_removal"] = None
    if others:
        margins = [other["delta_area"] - float(np.mean(other["random_delta_area"])) for other in others]
        found["other_removal"] = {"removal": others[0]["removal"], "margin": interval(margins, settings)}
    return found


def _mean_known(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return short(float(np.mean(known))) if known else None


def claim(record: Json, names: Sequence[HeadName]) -> Json:
    """What an example's numbers say, with where to look: the tokens with the largest relevance, the heads with the largest effect."""
    heads = np.argsort(-np.abs(record["head_effects"]), kind="stable")[:2].tolist()
    return {
        "example": record["id"],
        "target": record["target"]["words"],
        "value": record["value"],
        "tokens": record["top"][:3],
        "heads": [{"site": names[h][0], "layer": names[h][1], "head": names[h][2], "effect": record["head_effects"][h]} for h in heads],
        "run_sha256": record["run_sha256"],
    }  # fmt: skip


def margin(record: Json, settings: Settings) -> float:
    """ΔA of the method less the mean of random orders."""
    return float(record["curves"][settings.method]["delta_area"] - np.mean(record["random"]["delta_area"]))


def counter_evidence(records: Sequence[Json], settings: Settings) -> Json:
    """The examples where the method is least better than random orders."""
    order = sorted(range(len(records)), key=lambda place: (margin(records[place], settings), place))[:WORST]
    rows = []
    for record in (records[place] for place in order):
        ranks = sorted(record["curves"].items(), key=lambda item: -item[1]["delta_area"])
        own = record["curves"][settings.method]["delta_area"]
        rows.append(
            {
                "example": record["id"], "delta_area": own, "random_delta_area": float(np.mean(record["random"]["delta_area"])),
                "margin": margin(record, settings), "better": [name for name, curve in ranks if curve["delta_area"] > own],
            }
        )  # fmt: skip
    return {
        "rule": f"the examples, at most {WORST}, where the area of {settings.method} exceeds that of random orders least",
        "rows": rows,
        "not_above_random": sum(margin(record, settings) <= 0 for record in records),
        "of": len(records),
    }


def _checks_of_books(records: Sequence[Json], conservation: Json) -> list[Json]:
    count, keeps = len(records), conservation["keeps_books"]
    moved = max(record["forward_difference"] for record in records)
    tolerance = conservation["tolerance"] if keeps else 1e-4
    none = "this method keeps no books" if not keeps else None
    return [
        _check(
            "conservation", "the books close: the largest residual, of the largest entry", "conservation",
            None if not keeps else not conservation["open"], conservation["worst"], "≤", conservation["tolerance"], count, note=none,
        ),
        _check(
            "rules", "operations without a rule", "conservation",
            None if not keeps else not conservation["unruled"], len(conservation["unruled"]) if keeps else None, "≤", 0, count, note=none,
        ),
        _check(
            "forward", "the model's value is the same with the rules in place: largest relative difference", "conservation",
            moved <= tolerance, moved, "≤", tolerance, count,
        ),
    ]  # fmt: skip


def _checks_of_curves(records: Sequence[Json], settings: Settings) -> list[Json]:
    label = "the ranking is more faithful than chance: "
    if len(records) == 1:
        own, others = records[0]["curves"][settings.method]["delta_area"], records[0]["random"]["delta_area"]
        chance = (1 + sum(other >= own for other in others)) / (1 + len(others))
        allowed = 1 - LEVEL
        note = f"with {settings.draws} random orders no smaller chance can be seen" if 1 / (1 + len(others)) > allowed else None
        return [
            _check(
                "faithfulness", f"{label}chance that a random order has as large a ΔA", "faithfulness",
                None if note else chance <= allowed + 1e-12, chance, "≤", round(allowed, 6), 1, note=note,
            )
        ]  # fmt: skip
    above = interval([margin(record, settings) for record in records], settings)
    return [
        _check(
            "faithfulness", f"{label}ΔA less that of random orders, lower end of its interval", "faithfulness",
            above["low"] > 0, above["low"], ">", 0, len(records), low=above["low"], high=above["high"],
        )
    ]  # fmt: skip


def _checks_of_sanity(sanity: Json) -> list[Json]:
    count, repeated = sanity["examples"], sanity["repeat_difference"]
    checks = [
        _check(
            "determinism", "a second run gives the same relevance: largest difference, of the largest relevance", "sanity",
            None if repeated is None else repeated <= REPEAT_TOLERANCE, repeated, "≤", REPEAT_TOLERANCE, count,
        )
    ]  # fmt: skip
    weights = sanity["random_weights"]
    known = weights is not None and weights["correlation"] is not None
    checks.append(
        _check(
            "random-weights", "relevance depends on the weights: rank correlation with that of random weights, by size", "sanity",
            weights["correlation"]["mean"] <= RANDOM_WEIGHTS if known else None, weights["correlation"]["mean"] if known else None, "≤",
            RANDOM_WEIGHTS, count, note=None if known else "not measured",
        )
    )  # fmt: skip
    other = sanity["other_removal"]
    checks.append(
        _check(
            "other-baseline", "the ranking beats random orders with another way to remove too: ΔA less theirs", "sanity",
            None if other is None else other["margin"]["mean"] > 0, None if other is None else other["margin"]["mean"], ">", 0, count,
            note="there is no other way for this input" if other is None else f"removal: {other['removal']}",
        )
    )  # fmt: skip
    return checks


def _check(
    name: str, label: str, section: str, passed: bool | None, value: float | None, relation: str, tolerance: float | None, count: int,
    *, low: float | None = None, high: float | None = None, note: str | None = None,
) -> Json:  # fmt: skip
    return {
        "name": name, "label": label, "section": section, "passed": passed, "value": value, "relation": relation, "tolerance": tolerance,
        "low": low, "high": high, "n": count, "note": note,
    }  # fmt: skip


def _mean_curve(curves: Sequence[Sequence[float]]) -> list[float]:
    return _rounded(np.mean(curves, axis=0))


def _rounded(values: Any) -> list[float]:
    return [float(f"{value:.7g}") for value in values]
