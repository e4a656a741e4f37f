"""`build_report`: measure prompts on a model, and put everything that was found into one document.

from headscope.app import build_report

build_report(model, tokenizer, "The cat sat on the").save("report.html")
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from torch import nn

from headscope.app.report import html, sidecar
from headscope.app.report.identity import describe_environment, describe_model
from headscope.app.report.interactive import chart_library
from headscope.app.report.measures import LEVELS, Settings, Subject, examine, joint_effect
from headscope.app.report.progress import Progress
from headscope.app.report.prompts import Prompt, Prompts, as_prompts, inputs_of, target_of
from headscope.app.report.schema import Json, check
from headscope.app.report.summary import leading, margin, names_of, summarise
from headscope.interventions import Plan
from headscope.kernels.errors import InputError
from headscope.probe import Probe
from headscope.probe.attribution.baselines import METHODS
from headscope.probe.attribution.rules import RULE_SETS

ORDERS = ("first", "random", "worst")
SHOWN = 50
CAVEATS = (
    "Relevance tells what this model computed with, not whether its answer is right.",
    "What a softmax, a bias or a normalisation kept is explained by no token; the books say how much that is.",
    "Removing units makes inputs that the model may never have seen, and part of a fall may come from that.",
    "A head's effect is measured with all others in place; heads that can stand in for one another look unimportant one by one.",
    "A digest shows that a file changed since, not who wrote it.",
)
NOT_TESTED = (
    "whether the model's answers are right: there are no labels here",
    "prompts that mean the same in other words",
    "pairs and larger groups of heads, other than those ablated together",
    "another device, another kind of kernel, another precision",
)


@dataclass(frozen=True, eq=False)
class Report:
    """A finished report.

    Attributes:
        document: everything in it, as plain values: the sidecar.
    """

    document: Json

    @property
    def passed(self) -> bool:
        """Whether no check failed."""
        return bool(self.document["verdict"]["passed"])

    def to_dict(self) -> Json:
        return self.document

    def to_json(self) -> str:
        return sidecar.canonical(self.document).decode()

    def save(self, path: str | Path, *, interactive: bool = False) -> Path:
        """Write the page, and the sidecar beside it under the same name with `.json`; both appear whole or not at all.

        Args:
            path: of the page; replaced if it exists.
            interactive: put plotly.js into the page for charts that can be read out and zoomed, which is some megabytes.

        Raises:
            InputError: no place to write to, or more than a page may hold.
            NonFiniteError: a number is NaN or infinite.
        """
        path = Path(path)
        sidecar.check_writable(path)
        document = {**self.document, "interactive": chart_library() if interactive else None}
        pages = html.pages(document, path.name)
        document["pages"] = {name: sidecar.page_digest(page) for name, page in pages.items()}
        check(document)
        content = sidecar.canonical(document)
        made = {path.parent / name: page for name, page in sidecar.stamped(pages, content).items()}
        sidecar.write({**made, sidecar.sidecar_of(path): content})
        return path


def build_report(
    model: nn.Module,
    processor: Any,
    data: str | Path | Prompts | Sequence[str | Prompt],
    *,
    settings: Settings | None = None,
    name: str | None = None,
    revision: str | None = None,
    plan: Plan | None = None,
    examples: int | None = None,
    shown: int = SHOWN,
    order: str = "first",
    command: str | None = None,
    resume: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Report:
    """Attribute prompts, measure how far the attribution can be trusted, and write it all down.

    Args:
        model: in eval mode; nothing of it is changed.
        processor: its tokenizer; for embedded:vit `digits_processor`; None where the prompts bring their inputs.
        data: a text, texts, prompts, or a path to JSON lines.
        settings: method and measures; None for the usual ones.
        name: what the report calls the model, such as its hub id.
        revision: of the model on the hub.
        plan: edits that are in place for everything that is measured.
        examples: only the first so many.
        shown: how many examples the page shows; the sidecar has all.
        order: which those are: the `first`, `random` ones, or the `worst`, where the method is least better than chance.
        command: that makes this report again.
        resume: a file of JSON lines that takes every finished example, and from which a repeated call goes on.
        progress: told (examples done, examples in all).

    Raises:
        InputError: nothing to report on, or prompts that the model cannot take; the message names the example.
        NotIntercepted: a model without attention, or whose attention cannot be followed.
        HeadscopeError: what `attribute` and `measure_faithfulness` raise.
    """
    started = time.perf_counter()
    settings = Settings() if settings is None else settings
    if order not in ORDERS or shown < 1:
        raise InputError(f"show {shown} examples, {order!r}: give 1 or more, and one of {', '.join(ORDERS)}")
    prompts = as_prompts(data).first(examples)
    _check(model, processor, prompts, settings)
    first = inputs_of(prompts.rows[0], model, processor)
    sites = tuple(Probe(model).sites(**first))
    settings = settings.settled(sites, len(prompts.rows))
    subject = Subject(model, processor, sites, plan)
    described = describe_model(model, processor, sites, name, revision)
    key = sidecar.digest(
        sidecar.canonical({"model": described, "data": prompts.sha256, "settings": settings.to_dict(), "plan": repr(plan)})
    )
    with Progress(resume, key) as finished:
        for place, prompt in enumerate(prompts.rows):
            if prompt.id not in finished.records:
                finished.add(examine(subject, prompt, settings, place < settings.close))
            if progress is not None:
                progress(place + 1, len(prompts.rows))
        records = [finished.records[prompt.id] for prompt in prompts.rows]
    heads = leading(records, settings)
    joint = [joint_effect(subject, prompt, heads) for prompt in prompts.rows]
    found = summarise(records, settings, names_of(sites), joint)
    rows, rule = _shown(records, settings, shown, order)
    selection = "all" if len(prompts.rows) == prompts.total else "the first in the file"
    document: Json = {
        "schema": sidecar.SCHEMA,
        "title": f"Attribution report: {described['id']}",
        "tool": {
            "name": "headscope",
            "version": describe_environment(next(model.parameters()).device)["packages"].get("headscope", "unknown"),
        },
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "recipe": None if plan is None else plan.to_dict(),
        "model": described,
        "data": {"source": prompts.source, "sha256": prompts.sha256, "n": len(records), "total": prompts.total, "selection": selection},
        "method": _method(settings, prompts),
        "settings": settings.to_dict(),
        "environment": describe_environment(next(model.parameters()).device),
        **found,
        "caveats": [*CAVEATS, *_warnings(records)],
        "not_tested": _not_tested(found, prompts, settings),
        "examples": records,
        "shown": {"rule": rule, "examples": rows, "n": len(rows), "of": len(records), "order": order, "levels": LEVELS},
        "runtime": {"seconds": round(time.perf_counter() - started, 2), "examples_seconds": round(sum(r["seconds"] for r in records), 2)},
        "interactive": None,
        "pages": {},
    }
    document["verdict"]["scope"] = _scope(document)
    finished.discard()
    return Report(json.loads(sidecar.canonical(document)))


def _check(model: nn.Module, processor: Any, prompts: Prompts, settings: Settings) -> None:
    """Everything that can be wrong with a prompt, before hours are spent on those in front of it."""
    known = (*RULE_SETS, *METHODS)
    for method in (settings.method, *settings.others):
        if method not in known:
            raise InputError(f"no method {method!r}: there are {', '.join(known)}")
    if next(model.parameters(), None) is None:
        raise InputError(f"{type(model).__name__} has no weights: there is nothing to name it by")
    for prompt in prompts.rows:
        inputs_of(prompt, model, processor)
        target_of(prompt, model, processor)


def _method(settings: Settings, prompts: Prompts) -> Json:
    rules = RULE_SETS.get(settings.method)
    named = sum(prompt.target is not None for prompt in prompts.rows)
    if named == len(prompts.rows):
        target = "as each example names it"
    else:
        target = "the largest logit of each example" + (", or what it names" if named else "")
    return {
        "name": settings.method,
        "source": "a baseline; see the documentation" if rules is None else rules.source,
        "conserves": rules is not None and rules.conserves,
        "target": target,
    }


def _shown(records: Sequence[Json], settings: Settings, shown: int, order: str) -> tuple[list[str], str]:
    """Which examples the page shows, and how they were chosen."""
    ids = [record["id"] for record in records]
    if len(ids) <= shown:
        return ids, "all of them"
    if order == "first":
        return ids[:shown], "the first ones"
    if order == "random":
        chosen = sorted(random.Random(settings.seed).sample(range(len(ids)), shown))
        return [ids[place] for place in chosen], "drawn at random with the seed above"
    worst = sorted(records, key=lambda record: margin(record, settings))[:shown]
    return [record["id"] for record in worst], "those where the method is least better than random orders"


def _warnings(records: Sequence[Json]) -> list[str]:
    """What the attributions warned of, and on how many examples."""
    found: dict[str, list[str]] = {}
    for record in records:
        for warning in record["warnings"]:
            found.setdefault(warning, []).append(record["id"])
    return [f"{warning} (example {ids[0]}{f' and {len(ids) - 1} others' if len(ids) > 1 else ''})" for warning, ids in found.items()]


def _not_tested(found: Json, prompts: Prompts, settings: Settings) -> list[str]:
    rows = [*NOT_TESTED]
    rows += [f"check {one['name']}: {one['note'] or 'not done'}" for one in found["checks"] if one["passed"] is None]
    if prompts.total > len(prompts.rows):
        rows.append(f"{prompts.total - len(prompts.rows)} further examples of {prompts.source}")
    if settings.close < len(prompts.rows):
        rows.append(f"repetition, random weights and the other removal on all but the first {settings.close} examples")
    return rows


def _scope(document: Json) -> str:
    """One sentence: what the verdict is about, and that it is about nothing else."""
    data, count = document["data"], len(document["examples"])
    what = "one example" if count == 1 else f"{count} examples"
    return (
        f"It is about {document['method']['name']} on {document['model']['id']}, {what} from {data['source']}, explaining "
        f"{document['method']['target']}; it says nothing about other models, inputs or targets."
    )
