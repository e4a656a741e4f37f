"""What the study found, in words and tables made from results.json alone: results.md, and the marked places of README.md."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from decay import DIGITS, EPSILONS
from over_seeds import number, over_seeds, spoken

from headscope.probe.attribution.interval import Interval

TITLES = {
    "a": "(a) Decay in untrained networks",
    "b": "(b) Softmax against Sinkhorn",
    "c": "(c) Gradients of queries and keys",
    "d": "(d) Trained models that were broken on purpose",
}


def write_tables(report: dict[str, Any], out: Path) -> None:
    """Write results.md, and put the same numbers between the marks of a README.md that stands in the folder.

    A block called x goes between `<!-- x -->` and `<!-- /x -->`. A mark without a block of its name stays as it is.
    """
    blocks: dict[str, str] = {}
    text = ["# Results", "", "Written by `run.py`. Brackets: Student's 95 % intervals over seeds."]
    for part, make in (("a", decay), ("b", normalisers), ("c", gradients), ("d", surgery)):
        if part not in report:
            continue
        found = make(report[part])
        blocks |= found
        text += ["", f"## {TITLES[part]}", "", made(report["made"][part]), *(f"\n{block}" for block in found.values())]
    (out / "results.md").write_text("\n".join(text) + "\n", encoding="utf-8")
    readme = out / "README.md"
    if readme.is_file():
        whole = readme.read_text(encoding="utf-8")
        for name, block in blocks.items():
            whole = re.sub(
                rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", lambda found, block=block: f"{found[1]}{block}\n{found[2]}", whole, flags=re.S
            )
        readme.write_text(whole, encoding="utf-8")


def made(row: dict[str, Any]) -> str:
    seeds = f"{row['seeds']} seeds; " if row["seeds"] else ""
    return f"{seeds}torch {row['torch']}, {row['threads']} thread of {row['cores']}, {row['seconds']:.0f} seconds."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *rows))


def at(values: Sequence[float | None], digits: int = 2) -> str:
    """The mean over seeds with its interval, or that rounding is all that is left."""
    kept = [value for value in values if value is not None]
    return "floor" if len(kept) < len(values) else spoken(over_seeds(kept), digits)


def mean_of(values: Sequence[float | None], digits: int = 2) -> str:
    kept = [value for value in values if value is not None]
    return "floor" if len(kept) < len(values) else number(sum(kept) / len(kept), digits)


def decay(found: dict[str, Any]) -> dict[str, str]:
    """Part a."""
    first = next(iter(found["decay"]["bidirectional"].values()))
    depth = len(first[0]["composite"]) - 1
    layers = [layer for layer in (1, 2, 3, 4, 12, 24) if layer <= depth]
    blocks = {}
    for kind, cell in (("composite", mean_of), ("composite-intervals", at), ("frobenius-intervals", at)):
        rows = []
        for mask, variants in found["decay"].items():
            for name, seeds in variants.items():
                columns = list(zip(*(row[kind.removesuffix("-intervals")] for row in seeds), strict=True))
                rows.append([mask, name, *(cell(columns[layer]) for layer in layers)])
        blocks[f"decay-{kind}"] = table(["mask", "network", *(f"layer {layer}" for layer in layers)], rows)
    ratios = list(zip(*(row["ratios"] for row in found["cubic"]), strict=True))
    counted = [(place + 1, ratio) for place, ratio in enumerate(ratios) if None not in ratio]
    logs = list(zip(*(row["log_residual"] for row in found["cubic"]), strict=True))
    blocks["cubic"] = table(
        ["layer", "log₁₀ of the residual", "over that of the layer before"],
        [
            [str(layer), at(logs[layer], 1), at(ratios[layer - 1], 3) if layer and None not in ratios[layer - 1] else "–"]
            for layer in range(len(logs))
        ],
    )
    terms = {
        name: [over_seeds(values) for values in zip(*(row[name] for row in found["leading_term"]), strict=True)]
        for name in ("softmax", "sinkhorn")
    }
    blocks["leading-term"] = table(
        ["ε", *terms],
        [[f"{epsilon:g}", *(f"{means[place].mean:.1e}" for means in terms.values())] for place, epsilon in enumerate(EPSILONS)],
    )
    order = {name: math.log10(means[0].mean / means[-1].mean) / math.log10(EPSILONS[0] / EPSILONS[-1]) for name, means in terms.items()}
    factors = {name: causal_factor(found["decay"]["causal"][name], depth) for name in ("attention alone", "with LayerNorm", "with MLPs")}
    limit = found["uniform_causal"][-1]
    law = "not reached in so few layers"
    if counted:
        layer, last = counted[-1][0], over_seeds(counted[-1][1])
        law = f"{spoken(last, 3)} from layer {layer - 1} to {layer}: " + (
            "the factor of 3 is reproduced" if abs(last.mean - 3) < 0.05 else "not yet 3"
        )
    falls = ", ".join(f"{spoken(factor)} ({name})" for name, factor in factors.items())
    blocks["said-a"] = (
        f"- **The cubic law.** In arithmetic of {DIGITS} digits the logarithm of the residual is multiplied by {law}. One layer's residual "
        "is R W_QK Rᵀ R W_V / (N √d) up to a relative error that falls with the power "
        f"{number(order['softmax'])} of ε for softmax and {number(order['sinkhorn'])} for Sinkhorn: one law for both.\n"
        "- **A causal mask changes the kind of decay**, from doubly to singly exponential. Uniform causal attention soon halves the "
        f"residual with every layer (ratio {limit:.9f} after {len(found['uniform_causal'])}); random networks without skips multiply it "
        f"a layer, between layers {depth // 2} and {depth}, by {falls}."
    )
    return blocks


def causal_factor(seeds: Sequence[dict[str, Any]], depth: int) -> Interval:
    """By how much the residual is multiplied a layer, in the second half of the network; the Frobenius measure."""
    half = depth // 2
    return over_seeds([10 ** ((row["frobenius"][depth] - row["frobenius"][half]) / (depth - half)) for row in seeds])


def normalisers(found: dict[str, Any]) -> dict[str, str]:
    """Part b."""
    blocks = {}
    names = {"sigma": "σ₁", "contrast": "‖ΠP‖₂", "effective_rank": "effective rank", "product_log_contrast": "product of 12: log₁₀ ‖Π∏P‖₂",
             "product_effective_rank": "product of 12: effective rank"}  # fmt: skip
    rows = [
        [f"{float(spread):g}", kind, *(at([row[kind][name] for row in seeds], 3 if name == "contrast" else 2) for name in names)]
        for spread, seeds in found["random_scores"].items()
        for kind in ("softmax", "sinkhorn")
    ]
    blocks["random-scores"] = table(["spread of the scores", "normaliser", *names.values()], rows)
    for when, name in (("trained", "digits"), ("init", "digits-untrained")):
        rows = []
        for half_steps, runs in found["skip"].items():
            path = [run[when]["path"] for run in runs]
            deviations = [layer for run in runs for layer in run[when]["column_deviation"]]
            rows.append([
                half_steps, at([run[when]["accuracy"] for run in runs], 3),
                *(by_depth([one[key] for one in path], 1) for key in ("rank", "effective_rank")),
                by_depth([one["log_residual"] for one in path], 2),
                mean_of([run[when]["shuffled"]["log_residual"][-1] for run in runs]),
                at([run[when]["hidden"]["residual"][-1] for run in runs], 3),
                mean_of(deviations, 3),
            ])  # fmt: skip
        head = [
            "half-steps",
            "accuracy",
            "rank",
            "effective rank",
            "log₁₀ residual",
            "the last, images shuffled",
            "hidden residual",
            "deviation",
        ]
        blocks[name] = table(head, rows)
    blocks["digits-no-skip"] = table(
        ["half-steps", "seed", "accuracy", "log₁₀ residual", "hidden residual behind each layer"],
        [
            [
                half_steps, str(seed), number(run["trained"]["accuracy"], 3),
                ", ".join(floored(value) for value in run["trained"]["path"]["log_residual"]),
                ", ".join(f"{value:.1g}" if value > 1e-14 else "floor" for value in run["trained"]["hidden"]["residual"][1:]),
            ]
            for half_steps, runs in found["no_skip"].items()
            for seed, run in enumerate(runs)
        ],
    )  # fmt: skip
    measures: dict[str, tuple[Callable[[dict[str, Any]], float], int]] = {
        "product of 8 layers: decades of residual": (lambda run: run["path"]["log_residual"][-1], 2),
        "the same, images shuffled": (lambda run: run["shuffled"]["log_residual"][-1], 2),
        "product of 2 layers: effective rank": (lambda run: run["path"]["effective_rank"][1], 2),
        "hidden residual behind layer 4": (lambda run: run["hidden"]["residual"][4], 3),
        "hidden residual behind layer 8": (lambda run: run["hidden"]["residual"][-1], 3),
        "hidden effective rank behind layer 8": (lambda run: run["hidden"]["effective_rank_centred"][-1], 2),
        "accuracy": (lambda run: run["accuracy"], 3),
    }
    others = [half_steps for half_steps in found["skip"] if half_steps != "1"]

    def apart(what: str, when: str, half_steps: str) -> str:
        read, digits = measures[what]
        return spoken(difference(found["skip"], when, half_steps, read), digits)

    blocks["digits-differences"] = table(
        [
            "Sinkhorn minus softmax, same seed",
            *(f"{half_steps} half-steps, {when}" for when in ("before", "after") for half_steps in others),
        ],
        [[what, *(apart(what, when, half_steps) for when in ("init", "trained") for half_steps in others)] for what in measures],
    )
    most = others[-1]
    other = found["skip"]["1"][0]["trained"]["swapped"]["half_steps"]
    swapped = {
        half_steps: [
            over_seeds([run["trained"][key]["log_residual"][-1] for run in found["skip"][half_steps]]) for key in ("path", "swapped")
        ]
        for half_steps in ("1", most)
    }
    blocks["digits-swapped"] = table(
        ["scores learned with", "computed with the same", "computed with the other"],
        [["softmax", *map(spoken, swapped["1"])], [f"{most} half-steps", *map(spoken, swapped[most])]],
    )
    decades, same = "product of 8 layers: decades of residual", "the same, images shuffled"
    claim = difference(found["skip"], "trained", most, measures[decades][0])
    gained = over_seeds(
        [run["trained"]["swapped"]["log_residual"][-1] - run["trained"]["path"]["log_residual"][-1] for run in found["skip"]["1"]]
    )
    names = {half_steps: "softmax" if half_steps == "1" else f"{half_steps} half-steps" for half_steps in found["no_skip"]}
    bare = "; ".join(
        f"{', '.join(number(run['trained']['accuracy']) for run in found['no_skip'][half_steps])} ({name})"
        for half_steps, name in names.items()
    )

    def both(what: str) -> str:
        return " and ".join(f"{apart(what, 'trained', half_steps)} ({half_steps} half-steps)" for half_steps in others)

    blocks["said-b"] = (
        f"- **Before training there is no difference**: {apart(decades, 'init', most)} decades of residual between {most} half-steps and "
        "softmax, through 8 layers.\n"
        f"- **After training the claim is {verdict(claim)} for products of patterns**: Sinkhorn keeps {both(decades)} decades more; with "
        f"the images shuffled {both(same)}.\n"
        f"- **The states gain too, but not by decades**, as they have the skips to live on: the residual differs by "
        f"{both('hidden residual behind layer 4')} behind layer 4 and by {both('hidden residual behind layer 8')} behind layer 8.\n"
        f"- **It is what was learned, not what is computed.** Scores that softmax networks learned keep {spoken(gained)} decades more when "
        f"put through {other} half-steps, of the {number(claim.mean)}; those learned with Sinkhorn keep theirs under softmax.\n"
        f"- **Rank is not quality**: the accuracy differs by {both('accuracy')}.\n"
        f"- **Sinkhorn does not replace the skip.** Without attention skips the accuracies of the seeds are {bare}."
    )
    return blocks


def by_depth(runs: Sequence[Sequence[float]], digits: int) -> str:
    """The means over seeds, one for each depth."""
    return ", ".join(mean_of(values, digits) for values in zip(*runs, strict=True))


def floored(value: float) -> str:
    """A logarithm of a residual in float64."""
    return number(value) if value > -14 else "floor"


def difference(runs: dict[str, Any], when: str, half_steps: str, read: Callable[[dict[str, Any]], float]) -> Interval:
    """Sinkhorn minus softmax, seed by seed: the same split, first weights and order of the images."""
    return over_seeds([read(sinkhorn[when]) - read(softmax[when]) for sinkhorn, softmax in zip(runs[half_steps], runs["1"], strict=True)])


def verdict(interval: Interval) -> str:
    """Of the claim that a difference is above zero."""
    assert interval.low is not None  # there are two seeds or more
    assert interval.high is not None
    return "reproduced" if interval.low > 0 else "refuted" if interval.high < 0 else "neither reproduced nor refuted"


def gradients(found: dict[str, Any]) -> dict[str, str]:
    """Part c."""
    layers = range(len(next(iter(found.values()))[0]["ratio"]))
    means, intervals = [], []
    for name, seeds in found.items():
        columns = [over_seeds([math.log10(max(row["ratio"][layer], 1e-300)) for row in seeds]) for layer in layers]
        means.append([name, *(scientific(10**column.mean) for column in columns)])
        intervals.append([name, *(spoken(column) for column in columns)])
    head = ["network", *(f"layer {layer + 1}" for layer in layers)]
    return {"gradients": table(head, means), "gradients-log": "log₁₀ of the same:\n\n" + table(head, intervals)}


def scientific(value: float) -> str:
    return f"{value:.2f}" if value >= 0.01 else "< 1e-16" if value < 1e-16 else f"{value:.0e}"


def surgery(found: dict[str, Any]) -> dict[str, str]:
    """Part d."""
    rows, others, factors, right, missed, false = [], [], [], 0, 0, 0
    for model, cuts in found.items():
        for cut, row in cuts.items():
            named: dict[str, dict[str, list[int]]] = {}  # rule -> severity -> layers
            for finding in row["report"]["findings"]:
                layers = named.setdefault(finding["rule"], {}).setdefault(finding["severity"], [])
                layers.append(-1 if finding["layer"] is None else finding["layer"])
            below = {layer for layer, value in enumerate(row["residual"][1:]) if value < row["report"]["warn"]}
            collapsed = {layer for layers in named.get("token-collapse", {}).values() for layer in layers}
            right, missed, false = right + len(below & collapsed), missed + len(below - collapsed), false + len(collapsed - below)
            shown = row["residual"][1:] if len(row["residual"]) <= 8 else row["residual"][4::4]
            rows.append([
                model, cut, number(row["accuracy"]), ", ".join(f"{value:.2g}" for value in shown), ranges(sorted(below)),
                said(named.get("token-collapse", {})), said(named.get("rank-collapse", {})),
            ])  # fmt: skip
            rest = [f"{rule} {said(layers)}" for rule, layers in named.items() if rule not in ("token-collapse", "rank-collapse")]
            others.append([model, cut, "; ".join(rest) or "–"])
            if row["causal"]:
                deep = row["residual"][-1] / row["residual"][len(row["residual"]) // 2]
                factors.append([cut, f"{deep ** (1 / (len(row['residual']) - 1 - len(row['residual']) // 2)):.2f}"])
    return {
        "surgery": table(
            ["model", "what was done", "right answers", "residual behind each block", "below 0.1", "`token-collapse`", "`rank-collapse`"],
            rows,
        ),
        "said-d": f"Of {right + missed} layers whose residual is below 0.1 the report names {right}, and it names {false} others.",
        "surgery-others": table(["model", "what was done", "other findings"], others),
        "surgery-factors": table(["`embedded:lm`", "factor a layer"], factors),
    }


def said(layers: dict[str, list[int]]) -> str:
    """Severities and their layers: "warn 7 to 11, alarm 12"."""
    return (
        ", ".join(f"{severity} {ranges(sorted(set(layers[severity])))}" for severity in ("info", "warn", "alarm") if severity in layers)
        or "–"
    )


def ranges(layers: Sequence[int]) -> str:
    """[0, 1, 2, 5] as "0 to 2, 5"; -1 is the model as a whole."""
    parts: list[list[int]] = []
    for layer in layers:
        if parts and layer == parts[-1][-1] + 1:
            parts[-1].append(layer)
        else:
            parts.append([layer])
    found = ["model" if part == [-1] else f"{part[0]}" if len(part) == 1 else f"{part[0]} to {part[-1]}" for part in parts]
    return ", ".join(found) or "–"
