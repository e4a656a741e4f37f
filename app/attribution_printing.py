"""How an attribution is printed: bars for tokens, the books, tables of heads, layers, maps and spans.

Letters: S tokens, H heads, Q queries, K keys.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from headscope.app.case import Case
from headscope.app.escape import visible
from headscope.app.printing import print_table
from headscope.probe.attribution.aggregate import Groups
from headscope.probe.attribution.as_html import image_of, ledger_rows, names_of, special_of, strongest_heads
from headscope.probe.attribution.attribution import Attribution
from headscope.probe.attribution.reasoning import Rows

MOST = 64  # rows of a table of tokens; of more, those with the largest magnitudes
HALF = 14  # characters of a bar to one side
TOP_HEADS = 5
WIDEST = 16  # a map up to this many keys is printed whole


def told(case: Case, found: Attribution) -> str:
    told = found.target
    named = (found.settings.get("target") or {}) if isinstance(found.settings.get("target"), dict) else {}
    if not case.reads_text and isinstance(named, dict) and named.get("ids"):
        told = f"logit of class {' + '.join(case.token(id).label for id in named['ids'])}"
        told += f" minus class {' + '.join(case.token(id).label for id in named['against'])}" if named["against"] else ""
    return f"{visible(told)} = {found.value:.6g}"


def print_inputs(case: Case, found: Attribution, groups: Groups | None) -> None:
    if groups is not None:
        labels = [(f"{row.places[0]}–{row.places[-1]}" if len(row.places) > 1 else str(row.places[0])) for row in groups]
        _print_bars(groups.of, labels, [shown(row.text, row.kind) for row in groups], [row.relevance for row in groups])
        return
    for name, value in found.inputs.items():
        if value.dim() == 2 and case.reads_text:
            texts, special = names_of(found, 0, value.shape[1]), special_of(found, 0, value.shape[1])
            kinds = ["special" if special is not None and special[place] else "text" for place in range(len(texts))]
            numbers = value[0].double().tolist()
            _print_bars("tokens", [str(p) for p in range(len(texts))], [shown(t, k) for t, k in zip(texts, kinds, strict=True)], numbers)
            continue
        image = image_of(value[0]) if value.dim() else None
        if image is None:
            print(f"{visible(name)} {list(value.shape)}: sum {float(value.double().sum()):+.6g}")
            continue
        patches = patches_of(case, image)
        print(f"{visible(name)}: relevance of {patches.shape[0]} × {patches.shape[1]} patches, sum {float(patches.sum()):+.6g}")
        cells = [[f"{number:+.3f}" for number in row] for row in patches.tolist()]
        rows = [[str(row), *cells[row]] for row in range(len(cells))]
        print_table(["row \\ column", *map(str, range(patches.shape[1]))], rows, right=range(patches.shape[1] + 1))


def shown(text: str, kind: str) -> str:
    return visible(text) if kind == "text" else f"{visible(text)} ({kind})"


def _print_bars(what: str, labels: Sequence[str], texts: Sequence[str], numbers: Sequence[float]) -> None:
    largest = max(map(abs, numbers), default=0.0)
    kept = sorted(sorted(range(len(numbers)), key=lambda place: -abs(numbers[place]))[:MOST])
    rows = [[labels[place], texts[place], f"{numbers[place]:+.4f}", _bar(numbers[place], largest)] for place in kept]
    print_table(["place", what, "relevance", "against │ for".center(2 * HALF + 1)], rows, right=(0, 2))
    if len(kept) < len(numbers):
        print(f"the {len(kept)} of {len(numbers)} {what} with the largest magnitudes; --json has all")


def _bar(number: float, largest: float) -> str:
    size = round(HALF * abs(number) / largest) if largest else 0
    left, right = ("", "█" * size) if number > 0 else ("█" * size, "")
    return f"{left.rjust(HALF)}│{right}"


def print_rest(found: Attribution, *, all_heads: bool, layers: bool) -> None:
    """The books, heads, layers and warnings."""
    print()
    if found.ledger is None:
        print("books: this method keeps none")
    else:
        state, limit = "PASS" if found.ledger.closes else "FAIL", found.ledger.tolerance * found.ledger.scale
        print(f"books: {state} (residual {found.ledger.residual:.2g}, allowed {limit:.2g})")
        print_table(["where relevance is", "amount", "of the target"], ledger_rows(found), right=(1, 2))
    for operation, module, calls in found.unruled:
        print(f"no rule for {visible(operation)} in {visible(module) or 'the model'} ({calls} calls)")
    if found.heads:
        print()
        _print_heads(found, all_of_them=all_heads)
    if layers:
        print()
        rows = [[visible(name), "block", f"{float(value.double().sum()):+.4f}"] for name, value in found.blocks.items()]
        rows += [[visible(name), "part", f"{float(value.double().sum()):+.4f}"] for name, value in found.parts.items()]
        print_table(["module", "what", "relevance"], sorted(rows, key=lambda row: _natural(row[0])), right=(2,))
    for text in found.warnings:
        print(f"warning: {visible(text)}")


def _natural(name: str) -> list[tuple[int, str]]:
    """Modules in the order of their numbers, 2 before 10, and each block before its parts."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _print_heads(found: Attribution, *, all_of_them: bool) -> None:
    places = places_of(found)
    if not all_of_them:
        total = sum(value.shape[1] for value in found.heads.values())
        best = strongest_heads(found, TOP_HEADS)
        print(f"the {len(best)} strongest of {total} heads")
        print_table(
            ["layer", "head", "relevance"], [[places[site], str(head), f"{number:+.4f}"] for site, head, number in best], right=(1, 2)
        )
        return
    rows = [[places[site], *(f"{number:+.3f}" for number in value.double().sum((0, 2)).tolist())] for site, value in found.heads.items()]
    widest = max(map(len, rows))
    print("relevance of every head")
    padded = [[*row, *[""] * (widest - len(row))] for row in rows]
    print_table(["layer \\ head", *map(str, range(widest - 1))], padded, right=range(1, widest))


def places_of(found: Attribution) -> dict[str, str]:
    """What to call each site: its layer where that is enough, else its name."""
    layers = {site.name: site.layer for site in found.sites}
    numbers = [layers.get(name) for name in found.heads]
    plain = None not in numbers and len(set(numbers)) == len(numbers)
    return {name: str(layers[name]) if plain else visible(name) for name in found.heads}


def print_map(cells: Tensor) -> None:
    if cells.shape[1] <= WIDEST:
        rows = [[str(query), *(f"{number:+.3f}" if number else "·" for number in row)] for query, row in enumerate(cells.tolist())]
        print_table(["query \\ key", *map(str, range(cells.shape[1]))], rows, right=range(cells.shape[1] + 1))
        return
    kept = sorted(cells.abs().sum(1).topk(min(MOST, len(cells))).indices.tolist())
    rows = []
    for query in kept:
        best = cells[query].abs().topk(4).indices.tolist()
        pairs = [f"{key} ({float(cells[query, key]):+.3f})" for key in best if float(cells[query, key])]
        rows.append([str(query), f"{float(cells[query].sum()):+.4f}", "  ".join(pairs)])
    print_table(["query", "sum", "from keys"], rows, right=(0, 1))
    if len(kept) < len(cells):
        print(f"the {len(kept)} of {len(cells)} queries with the largest magnitudes; --json has all")


def print_rows(rows: Rows) -> None:
    names = names_of(rows.whole, 0, len(rows.tokens))
    lines = []
    for place, value, row in zip(rows.places, rows.values, rows.relevance, strict=True):
        best = row[:place].abs().topk(min(4, place)).indices.tolist()
        pairs = [f"{visible(names[other])!r}@{other} ({float(row[other]):+.3f})" for other in best]
        lines.append([str(place), visible(names[place]), f"{value:.4f}", f"{float(row.sum()):+.4f}", "  ".join(pairs)])
    print_table(["place", "token", "logit", "on tokens", "mostly from"], lines, right=(0, 2, 3))


def patches_of(case: Case, image: Tensor) -> Tensor:
    """[rows, columns], relevance [height, width] summed over the model's patches; an eighth of the height a side where it names none."""
    side = getattr(getattr(case.model, "config", None), "patch_size", None)
    side = side if isinstance(side, int) and side > 0 else max(1, image.shape[0] // 8)
    high, wide = (-(-size // side) for size in image.shape)
    padded = torch.nn.functional.pad(image, (0, wide * side - image.shape[1], 0, high * side - image.shape[0]))
    return padded.reshape(high, side, wide, side).sum((1, 3))
