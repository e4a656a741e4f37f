"""`headscope attribute`: which tokens, heads and layers an answer was made from, and whether the books close.

Letters: B batch, S tokens, L layers, H heads, Q queries, K keys.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from headscope.app.attribution_printing import MOST, patches_of, places_of, print_inputs, print_map, print_rest, print_rows, shown, told
from headscope.app.case import Case, case_of
from headscope.app.escape import visible
from headscope.app.printing import print_json, print_table
from headscope.kernels.errors import InputError, SelectionError
from headscope.probe.attribution.aggregate import Groups
from headscope.probe.attribution.as_html import image_of, names_of
from headscope.probe.attribution.attribute import attribute
from headscope.probe.attribution.attribution import Attribution
from headscope.probe.attribution.baselines import METHODS
from headscope.probe.attribution.correlation import rank_correlation
from headscope.probe.attribution.reasoning import attribute_span, open_ended
from headscope.probe.attribution.rules import RULE_SETS
from headscope.probe.attribution.target import Target, id_named
from headscope.probe.models import context_window


def run_attribute(arguments: argparse.Namespace) -> int:
    """Attribute an answer, and print what it was made from."""
    if arguments.list_methods:
        return _list_methods(arguments)
    methods = _methods(arguments)
    head = _check(arguments, methods)
    case = case_of(arguments)
    _check_case(arguments, case)
    if arguments.generate is not None or arguments.span is not None:
        return _explain_span(arguments, case, methods[0])
    target = _target(arguments, case)
    found = []
    for method in methods:
        print(f"attributing with {method} …", file=sys.stderr, flush=True)
        found.append(attribute(case.model, case.inputs, target, method, tokenizer=_tokenizer(case), maps=head is not None))
    if arguments.compare is not None:
        _print_comparison(arguments, case, found)
    else:
        _print_one(arguments, case, found[0], head)
    return _code(arguments, found)


def _list_methods(arguments: argparse.Namespace) -> int:
    rows = [[name, "rules, one backward pass", "yes" if rules.conserves else "no", rules.source] for name, rules in RULE_SETS.items()]
    rows += [[name, "no rules", "no", _purpose(method.__doc__)] for name, method in METHODS.items()]
    if arguments.json:
        keys = ("name", "kind", "books", "about")
        print(json.dumps({"schema": "headscope.methods/v1", "methods": [dict(zip(keys, row, strict=True)) for row in rows]}))
    else:
        print_table(["method", "kind", "books", "source"], rows)
    return 0


def _purpose(told: str | None) -> str:
    return (told or "").strip().splitlines()[0].rstrip(".") if told else ""


def _methods(arguments: argparse.Namespace) -> list[str]:
    if arguments.compare is not None and arguments.method is not None:
        raise InputError("--compare names the methods itself: leave --method out")
    names = [arguments.method or "attnlrp"] if arguments.compare is None else [name.strip() for name in arguments.compare.split(",")]
    for name in names:
        if name not in RULE_SETS and name not in METHODS:
            raise InputError(f"no method {name!r}: there are {', '.join([*RULE_SETS, *METHODS])}")
    if len(set(names)) < len(names):
        raise InputError(f"--compare {arguments.compare!r} names a method twice")
    return names


def _check(arguments: argparse.Namespace, methods: Sequence[str]) -> tuple[int, int] | None:
    """The head of --map; everything that can be refused before a model is loaded is refused here."""
    span = arguments.generate is not None or arguments.span is not None
    asked = {"--" + name: getattr(arguments, name) not in (None, False) for name in (
        "target", "against", "position", "words", "sentences", "map", "html", "png", "save", "heads", "layers", "compare", "strict",
    )}  # fmt: skip
    if span and (other := [name for name in ("--target", "--against", "--position", "--map", "--compare") if asked[name]]):
        raise InputError(f"--generate and --span say what is explained: leave out {', '.join(other)}")
    if asked["--compare"] and (other := [name for name in ("--map", "--html", "--png", "--save", "--heads", "--layers") if asked[name]]):
        raise InputError(f"--compare shows methods side by side: leave out {', '.join(other)}, or name one --method")
    ruled = [name for name in methods if name in RULE_SETS]
    if len(ruled) < len(methods) and (span or asked["--map"]):
        raise InputError(f"{methods[0]} explains one answer, without maps: --generate, --span and --map are for {', '.join(RULE_SETS)}")
    if asked["--strict"] and not all(name in RULE_SETS and RULE_SETS[name].conserves for name in methods):
        raise InputError("--strict asks for books, and this method keeps none: see --list-methods")
    if arguments.generate is not None and arguments.generate < 1:
        raise InputError(f"--generate {arguments.generate}: give a number of tokens from 1 up")
    if arguments.png is not None:
        _pictures()
    if arguments.map is None:
        return None
    match = re.fullmatch(r"(\d{1,6})\.(\d{1,6})", arguments.map.strip())
    if match is None:
        raise InputError(f"--map {arguments.map!r}: write LAYER.HEAD, such as 3.5")
    return int(match[1]), int(match[2])


def _check_case(arguments: argparse.Namespace, case: Case) -> None:
    if not case.reads_text:
        for name in ("words", "sentences", "generate", "span"):
            if getattr(arguments, name) not in (None, False):
                raise InputError(f"--{name} is for text, and {case.name} reads images")


def _tokenizer(case: Case) -> object:
    return case.processor if case.reads_text else None


def _target(arguments: argparse.Namespace, case: Case) -> Target:
    """What --target, --against and --position say, with the largest logit named."""
    labels = getattr(getattr(case.model, "config", None), "id2label", None)

    def number(text: str) -> int:
        return id_named(text, _tokenizer(case), labels)

    positions = (-1 if arguments.position is None else arguments.position,)
    target = Target(None if arguments.target is None else (number(arguments.target),), (), positions)
    if target.ids is None:
        with torch.no_grad():
            target = target.resolved(case.model(**case.inputs))
    return target if arguments.against is None else Target(target.ids, (number(arguments.against),), positions)


def _code(arguments: argparse.Namespace, found: Sequence[Attribution]) -> int:
    return 1 if arguments.strict and not all(one.passed for one in found) else 0


# -- one attribution -----------------------------------------------------------------------------------------------------


def _print_one(arguments: argparse.Namespace, case: Case, found: Attribution, head: tuple[int, int] | None) -> None:
    chosen = None if head is None else _map(found, *head)
    _write_files(arguments, case, found, chosen)
    groups = _groups(arguments, found)
    if arguments.json:
        facts: dict[str, object] = {"attribution": found.to_dict()}
        facts |= {} if groups is None else {"groups": groups.to_dict()}
        facts |= {} if chosen is None else {"map": {"layer": head[0], "head": head[1], "relevance": chosen.tolist()}}  # type: ignore[index]
        print_json("headscope.attribute/v1", case, facts)
        return
    print(f"{found.method}: {told(case, found)}\n")
    print_inputs(case, found, groups)
    if chosen is not None:
        print(f"\nhead {arguments.map}: relevance of each query (row) by the key (column) it came from")
        print_map(chosen)
    print_rest(found, all_heads=arguments.heads, layers=arguments.layers)


def _groups(arguments: argparse.Namespace, found: Attribution) -> Groups | None:
    return found.words() if arguments.words else found.sentences() if arguments.sentences else None


def _map(found: Attribution, layer: int, head: int) -> Tensor:
    """[Q, K] of one head."""
    sites = [site for site in found.sites if site.layer == layer and site.name in found.heads]
    if not sites:
        raise SelectionError(f"no layer {layer}: there are {', '.join(sorted({str(site.layer) for site in found.sites}))}")
    if len(sites) > 1:
        raise SelectionError(f"layer {layer} has {len(sites)} sites: read .map(site) of the attribution in Python")
    if head >= sites[0].query_heads:
        raise SelectionError(f"no head {head}: layer {layer} has {sites[0].query_heads}, 0 to {sites[0].query_heads - 1}")
    return found.map(sites[0].name)[0, head].detach().double().cpu()


# -- several methods -----------------------------------------------------------------------------------------------------


def _print_comparison(arguments: argparse.Namespace, case: Case, found: Sequence[Attribution]) -> None:
    texts, columns = [], []
    for one in found:
        groups = _groups(arguments, one)
        if groups is not None:
            texts, numbers = [shown(row.text, row.kind) for row in groups], [row.relevance for row in groups]
        elif case.reads_text:
            relevance = one.of_tokens()[0].double()
            texts, numbers = [visible(name) for name in names_of(one, 0, len(relevance))], relevance.tolist()
        else:
            patches = patches_of(case, _image(one))
            numbers = patches.flatten().tolist()
            texts = [f"row {row}, column {column}" for row in range(patches.shape[0]) for column in range(patches.shape[1])]
        columns.append(numbers)
    agree = [[rank_correlation(torch.tensor(a), torch.tensor(b)) for b in columns] for a in columns]
    names = [one.method for one in found]
    if arguments.json:
        facts = {"attributions": [one.to_dict() for one in found], "rows": texts, "relevance": columns, "rank_correlation": agree}
        print_json("headscope.comparison/v1", case, facts)
        return
    print(f"{told(case, found[0])}\n")
    size = [sum(map(abs, column)) or 1.0 for column in columns]
    order = sorted(range(len(texts)), key=lambda place: -max(abs(column[place]) / s for column, s in zip(columns, size, strict=True)))
    kept = sorted(order[:MOST])
    rows = [[str(place), texts[place], *(f"{column[place]:+.4f}" for column in columns)] for place in kept]
    print_table(["place", "what", *names], rows, right=(0, *range(2, 2 + len(names))))
    if len(kept) < len(texts):
        print(f"the {len(kept)} of {len(texts)} rows with the largest shares; --json has all")
    print("\nagreement: rank correlation (Spearman) of the rows")
    cells = [[name, *("–" if one is None else f"{one:+.3f}" for one in row)] for name, row in zip(names, agree, strict=True)]
    print_table(["", *names], cells, right=range(1, 1 + len(names)))
    print()
    for one in found:
        state = {None: "none kept", True: "PASS", False: "FAIL"}[one.passed]
        print(f"books of {one.method}: {state}")
        for text in one.warnings:
            print(f"warning: {one.method}: {visible(text)}")


# -- spans ---------------------------------------------------------------------------------------------------------------


def _explain_span(arguments: argparse.Namespace, case: Case, method: str) -> int:
    ids = case.inputs["input_ids"]
    base = 0
    if arguments.generate is not None:
        ids = open_ended(ids, case.processor)
        base, ids = ids.shape[1], _generated(case, ids, arguments.generate)
    start, stop = _span(arguments.span, base, ids.shape[1])

    def progress(done: int, total: int) -> None:
        print(f"\rtoken {done} of {total}", end="\n" if done == total else "", file=sys.stderr, flush=True)

    rows = attribute_span(case.model, ids, start, stop, method, tokenizer=case.processor, progress=progress)
    _write_files(arguments, case, rows.whole, None)
    groups = _groups(arguments, rows.whole)
    if arguments.json:
        facts = {"prompt": base or None, **rows.to_dict()}
        print_json("headscope.span/v1", case, facts if groups is None else {**facts, "groups": groups.to_dict()})
        return _code(arguments, [rows.whole])
    print(f"{method}: tokens {start}:{stop}, each by its logit where it was predicted\n")
    print_rows(rows)
    print(f"\nsummed: {visible(rows.whole.target)} = {rows.whole.value:.6g}\n")
    print_inputs(case, rows.whole, groups)
    print_rest(rows.whole, all_heads=arguments.heads, layers=arguments.layers)
    return _code(arguments, [rows.whole])


def _generated(case: Case, ids: Tensor, count: int) -> Tensor:
    """[1, S], the prompt and what the model goes on to write, always the likeliest token."""
    limit = context_window(case.model)
    if limit is not None and ids.shape[1] + count > limit:
        raise InputError(f"--generate {count} after {ids.shape[1]} tokens: the context window of this model is {limit}")
    if not callable(getattr(case.model, "generate", None)) or not getattr(case.model, "can_generate", bool)():
        raise InputError(f"{case.name} does not generate text: leave out --generate")
    print(f"generating {count} tokens …", file=sys.stderr, flush=True)
    with torch.no_grad():
        found: Tensor = case.model.generate(  # type: ignore[operator]
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=count, do_sample=False, num_beams=1
        )
    return found


def _span(text: str | None, base: int, length: int) -> tuple[int, int]:
    """Positions of the explained tokens, in the whole text; `base` is where those that the user counts begin."""
    if text is None:
        return base, length
    match = re.fullmatch(r"(\d{1,7})?:(\d{1,7})?", text.strip())
    if match is None:
        raise InputError(f"--span {text!r}: write START:STOP, such as 0:3")
    first = int(match[1] or (0 if base else 1))
    last = length - base if match[2] is None else int(match[2])
    if not (first < last <= length - base) or (base == 0 and first == 0):
        what = (
            f"{length - base} tokens were generated, 0 to {length - base}"
            if base
            else f"the text has {length} tokens, of which 1 to {length}"
        )
        raise InputError(
            f"--span {text!r}: {what} can be named; START is less than STOP" + ("" if base else ", and nothing predicts token 0")
        )
    return base + first, base + last


# -- files ---------------------------------------------------------------------------------------------------------------


def _write_files(arguments: argparse.Namespace, case: Case, found: Attribution, chosen: Tensor | None) -> None:
    if arguments.html is not None:
        title = f"{found.method}, {visible(case.name)}"
        page = "".join(("<!doctype html><meta charset='utf-8'><title>", _text(title), "</title>", found._repr_html_()))
        _write(Path(arguments.html), page.encode("utf-8"), "page")
    if arguments.save is not None:
        found.save(arguments.save)
        print(f"result written to {visible(arguments.save)}", file=sys.stderr)
    if arguments.png is not None:
        _write(Path(arguments.png), _picture(case, found, chosen), "picture")


def _text(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;")


def _picture(case: Case, found: Attribution, chosen: Tensor | None) -> bytes:
    pictures = _pictures()
    if chosen is not None:
        drawn: bytes = pictures.matrix(chosen.numpy())
    elif not case.reads_text:
        pixels = case.inputs[next(name for name, value in found.inputs.items() if image_of(value[0]) is not None)][0].double().mean(0)
        low, high = float(pixels.min()), float(pixels.max())
        ink = (pixels - low) / (high - low or 1.0)
        drawn = pictures.over_image(ink.cpu().numpy(), patches_of(case, _image(found)).numpy())
    elif found.heads:
        rows = [value.double().sum((0, 2)).tolist() for value in found.heads.values()]
        places = places_of(found)
        names = [f"layer {places[name]}" if places[name].isdigit() else places[name] for name in found.heads]
        drawn = pictures.table(rows, names, [f"head {head}" for head in range(max(map(len, rows)))])
    else:
        raise InputError(f"{found.method} has no heads to draw: leave out --png, or choose a method with rules")
    return drawn


def _image(found: Attribution) -> Tensor:
    images = [image for image in (image_of(value[0]) for value in found.inputs.values() if value.dim()) if image is not None]
    if not images:
        raise InputError("this model has no image among its inputs that could be drawn")
    return images[0]


def _pictures() -> ModuleType:
    try:
        from headscope.app import relevance_picture
    except ImportError as error:
        raise InputError("--png needs pillow: pip install 'headscope[app]'") from error
    return relevance_picture


def _write(file: Path, content: bytes, what: str) -> None:
    try:
        file.write_bytes(content)
    except OSError as error:
        raise InputError(f"{file} cannot be written: {error.strerror}") from error
    print(f"{what} written to {visible(str(file))}", file=sys.stderr)
