"""Conformance of the interception over the zoo: what is measured for one model, and the table of all of them.

`python -m tests.coverage` writes docs/coverage.md. Letters: B batch, H query heads, Q queries, K keys, V width of a value.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import sys
import time
import warnings
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from headscope.interventions import Edit, Plan, call, scale, select
from headscope.kernels.errors import NotIntercepted
from headscope.probe import AttentionCall, AttentionSite, Capture, Keep, Probe
from tests.models import ENTRIES, FAMILIES, Entry
from tests.models.entry import Inputs

TABLE = Path(__file__).resolve().parents[1] / "docs" / "coverage.md"
NEW_TOKENS = 4
IDENTITY_LIMIT = 1e-6  # of the largest output, and at least of 1
EDIT_LIMIT = 3e-6
GRADIENT_LIMIT = 1e-5  # of the largest gradient


@dataclass
class Row:
    """What was measured on one model. Differences are the largest absolute ones; None where there was nothing to compare.

    Attributes:
        entry: the model.
        sites: what `Probe.sites` found.
        pattern: captured patterns against the entry's reference.
        watched: output under capture against output without, 0 where the model's own kernel runs.
        identity_z: output under `scale(1)` on z, over the largest output.
        identity_pattern: output under a callable on the pattern that returns its argument, over the largest output.
        zero_head: output with one head's z set to 0 against that slice zeroed before W_O, over the largest output; the worst site.
        zero_effect: how far that edit moved the output; the smallest site's. The comparison is empty where it is 0.
        generated: decoding gave the same tokens under capture, with one step for every token.
        decoded: each decoded row's pattern against the same row of one full forward.
        gradient: parameter gradients under capture, and under an identity pattern edit, against without; over the largest.
        projections: the output projections found are the ones that the entry names.
        problems: what is wrong, in words; empty for a row that works.
        refusal: what NotIntercepted said, for a row that is known not to work.
    """

    entry: Entry
    sites: list[AttentionSite] = field(default_factory=list)
    pattern: float | None = None
    watched: float | None = None
    identity_z: float | None = None
    identity_pattern: float | None = None
    zero_head: float | None = None
    zero_effect: float | None = None
    generated: bool | None = None
    decoded: float | None = None
    gradient: float | None = None
    projections: bool | None = None
    problems: list[str] = field(default_factory=list)
    refusal: str | None = None

    @property
    def works(self) -> bool:
        """Everything that could be measured is as it should be, and the model is not one that is refused."""
        return not self.problems and self.entry.refused is None


def check(entry: Entry) -> Row:
    """Measure one model.

    Args:
        entry: a row of the zoo that is not `missing()`.

    Returns:
        The measurements; `problems` lists in words what breaks a promise.
    """
    row = Row(entry)
    torch.manual_seed(0)
    if entry.refused is not None:
        check_refusal(row)
        return row
    for measure in (check_patterns, check_identity, check_zero_head, check_generate, check_gradient):
        model, inputs = entry.build()
        try:
            measure(row, model, inputs)
        except Exception as error:  # a row that breaks must not hide the others: the table says so, the tests fail on it
            row.problems.append(f"{measure.__name__.removeprefix('check_')}: {type(error).__name__}: {error}")
    return row


def difference(left: Tensor, right: Tensor) -> float:
    """The largest absolute difference; infinite where shapes differ or one side alone is not finite."""
    if left.shape != right.shape:
        return math.inf
    same = (left == right) | (left.isnan() & right.isnan())
    gap = torch.where(same, torch.zeros_like(left, dtype=torch.float64), (left.double() - right.double()).abs())
    return float(gap.nan_to_num(nan=math.inf).max()) if gap.numel() else 0.0


def relative(left: Tensor, right: Tensor) -> float:
    """The largest absolute difference over the largest value of `right`, or over 1."""
    return difference(left, right) / max(1.0, float(right.abs().max()))


def run(entry: Entry, model: nn.Module, inputs: Inputs) -> Tensor:
    """The model's main output, without a gradient."""
    with torch.no_grad():
        return entry.output(model(**inputs)).detach().clone()


def check_refusal(row: Row) -> None:
    """The model must raise NotIntercepted, under Probe.sites and under a capture alike; never zero sites without a word."""
    model, inputs = row.entry.build()
    for label, attempt in (("sites", watch_sites), ("capture", watch_capture)):
        try:
            attempt(model, inputs)
        except NotIntercepted as error:
            row.refusal = row.refusal or str(error).splitlines()[0]
        except Exception as error:
            row.problems.append(f"{label} raised {type(error).__name__}: {error}")
        else:
            row.problems.append(f"{label} did not raise NotIntercepted")


def watch_sites(model: nn.Module, inputs: Inputs) -> None:
    """List the sites."""
    Probe(model).sites(**inputs)


def watch_capture(model: nn.Module, inputs: Inputs) -> None:
    """Run the model once under a capture."""
    with Probe(model).capture(Keep(pattern=True)), torch.no_grad():
        model(**inputs)


def captured(seen: Capture) -> list[Tensor]:
    """Every captured pattern [B, H, Q, K], in execution order."""
    return [seen.pattern(site=name, step=step) for name, step in seen.records]


def unchanged(pattern: Tensor, call: AttentionCall) -> Tensor:
    """An edit that changes nothing."""
    return pattern


def check_patterns(row: Row, model: nn.Module, inputs: Inputs) -> None:
    """Sites found, patterns against the reference, the output left alone."""
    entry = row.entry
    plain = run(entry, model, inputs)
    probe = Probe(model)
    row.sites = list(probe.sites(**inputs))
    with probe.capture(Keep(pattern=True, z=True)) as seen:
        watched = run(entry, model, inputs)
    row.watched = difference(watched, plain)
    if row.watched > IDENTITY_LIMIT:
        row.problems.append(f"the output moves by {row.watched:.1e} when it is only watched")
    if len(row.sites) != entry.expected_sites:
        row.problems.append(f"{len(row.sites)} sites, expected {entry.expected_sites}: {[site.name for site in row.sites]}")
    patterns = captured(seen)
    expected = entry.reference(model, inputs) if entry.reference else None
    if expected is not None:
        row.pattern = compare(patterns, expected, entry.visible(inputs) if entry.visible else None, row.problems)
        if row.pattern > entry.tolerance:
            row.problems.append(f"patterns differ from the reference by {row.pattern:.1e}, allowed {entry.tolerance:.0e}")
    if difference(run(entry, model, inputs), plain) != 0:
        row.problems.append("the model is not the same after the capture")
    paths = entry.projection_paths()
    if paths:
        found = [site.output_projection for site in row.sites]
        pairs = zip(found, paths, strict=False)
        row.projections = len(found) == len(paths) and all(one is None or one in path.split("+") for one, path in pairs)
        if not row.projections:
            row.problems.append(f"output projections {found}, expected {paths}")


def compare(patterns: list[Tensor], expected: list[Tensor], visible: Tensor | None, problems: list[str]) -> float:
    """The largest difference of patterns in execution order; `visible` [B, Q] leaves padded queries out."""
    if len(patterns) != len(expected):
        problems.append(f"{len(patterns)} patterns captured, {len(expected)} in the reference")
        return math.inf
    worst = 0.0
    for ours, theirs in zip(patterns, expected, strict=True):
        if ours.shape != theirs.shape:
            problems.append(f"a pattern of shape {tuple(ours.shape)}, the reference has {tuple(theirs.shape)}")
            return math.inf
        if visible is not None:
            chosen = visible[:, None, :, None].expand_as(ours)
            ours, theirs = ours[chosen], theirs[chosen]
        worst = max(worst, difference(ours.float(), theirs.float()))
    return worst


def check_identity(row: Row, model: nn.Module, inputs: Inputs) -> None:
    """Edits that change nothing leave the output where it was."""
    entry = row.entry
    plain = run(entry, model, inputs)
    with Plan([Edit("z", scale(1.0), select())]).on(model):
        row.identity_z = relative(run(entry, model, inputs), plain)
    with Plan([Edit("pattern", call(unchanged), select())]).on(model):
        row.identity_pattern = relative(run(entry, model, inputs), plain)
    for stage, value in (("z", row.identity_z), ("pattern", row.identity_pattern)):
        if value > IDENTITY_LIMIT:
            row.problems.append(f"an identity edit of {stage} moves the output by {value:.1e}")
    if difference(run(entry, model, inputs), plain) != 0:
        row.problems.append("the model is not the same after an edit")


@contextmanager
def sliced_out(model: nn.Module, paths: Iterable[str], head: int, width: int) -> Iterator[None]:
    """Some output maps without what one head brings, the slice [..., head·V : (head + 1)·V] of their input, while the block runs.

    The columns of the map's weight are zeroed where it has them in that order, since F.multi_head_attention_forward uses the weight
    and never calls the module; else a plain hook zeroes the slice.
    """
    chosen = slice(head * width, (head + 1) * width)

    def zero(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        x = args[0].clone()
        x[..., chosen] = 0
        return (x, *args[1:])

    def give_back(weight: Tensor, former: Tensor) -> None:
        weight.data.copy_(former)

    with ExitStack() as stack:
        for path in paths:
            module = model.get_submodule(path)
            if isinstance(module, nn.Linear):
                stack.callback(give_back, module.weight, module.weight.detach().clone())
                module.weight.data[:, chosen] = 0
            else:
                stack.callback(module.register_forward_pre_hook(zero).remove)
        yield


def projections_of(row: Row, model: nn.Module) -> dict[str, list[AttentionSite]]:
    """The sites that feed each output projection; the entry's word goes before the interception's."""
    named = row.entry.projection_paths()
    modules = dict(model.named_modules())
    found: dict[str, list[AttentionSite]] = {}
    for index, site in enumerate(row.sites):
        path = named[index] if len(named) == len(row.sites) else site.output_projection
        if path is not None and all(part in modules for part in path.split("+")):
            found.setdefault(path, []).append(site)
    return found


def check_zero_head(row: Row, model: nn.Module, inputs: Inputs) -> None:
    """Setting a head's z to zero is the same as zeroing its slice before W_O."""
    entry = row.entry
    plain = run(entry, model, inputs)
    for path, sites in projections_of(row, model).items():
        head = min(1, sites[0].query_heads - 1)
        with sliced_out(model, set(path.split("+")), head, sites[0].value_dim):
            expected = run(entry, model, inputs)
        with Plan([Edit("z", scale(0.0), select(sites=site.name, head=head)) for site in sites]).on(model):
            edited = run(entry, model, inputs)
        effect, gap = difference(expected, plain), relative(edited, expected)
        row.zero_effect = effect if row.zero_effect is None else min(row.zero_effect, effect)
        row.zero_head = gap if row.zero_head is None else max(row.zero_head, gap)
    if row.zero_head is not None and row.zero_head > EDIT_LIMIT:
        row.problems.append(f"zeroing a head is {row.zero_head:.1e} away from zeroing its slice before W_O")
    if row.zero_effect is not None and row.zero_effect == 0:
        row.problems.append("zeroing a head's slice before W_O has no effect: the comparison says nothing")


def check_generate(row: Row, model: Any, inputs: Inputs) -> None:
    """Decoding under capture: same tokens, one step a token, and each decoded row is the full forward's."""
    entry = row.entry
    if not entry.generate:
        return
    options = dict(max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, **entry.generate_options)
    with torch.no_grad():
        plain = model.generate(**inputs, **options)
        with Probe(model).capture(Keep(pattern=True)) as seen:
            watched = model.generate(**inputs, **options)
    row.generated = torch.equal(plain, watched)
    if not row.generated:
        row.problems.append("generate gives other tokens under capture")
        return
    steps = max(len(seen.steps(site.name)) for site in seen.sites)
    if steps != NEW_TOKENS:
        row.problems.append(f"{steps} steps captured while {NEW_TOKENS} tokens were generated")
    if set(inputs) == {"input_ids"} and plain.shape[1] == inputs["input_ids"].shape[1] + NEW_TOKENS:
        row.decoded = decoded_rows(model, plain, seen)
        if row.decoded > 5 * entry.tolerance:
            row.problems.append(f"decoded rows are {row.decoded:.1e} away from those of a full forward")


def decoded_rows(model: nn.Module, ids: Tensor, seen: Capture) -> float:
    """The last row of each step's pattern against the row of one forward over all tokens [B, S]; the largest difference."""
    with Probe(model).capture(Keep(pattern=True)) as full, torch.no_grad():
        model(input_ids=ids)
    worst = 0.0
    for site in seen.sites:
        whole = full.pattern(site=site.name)
        for step in seen.steps(site.name):
            last = seen.pattern(site=site.name, step=step)[:, :, -1]  # [B, H, K so far], or the last K of a sliding cache
            query = ids.shape[1] - NEW_TOKENS - 1 + step
            first = max(0, query + 1 - last.shape[-1])
            worst = max(worst, difference(last[..., -(query + 1 - first) :].float(), whole[:, :, query, first : query + 1].float()))
    return worst


def gradients(entry: Entry, model: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Gradients of a fixed random projection of the output with respect to every parameter that gets one."""
    model.zero_grad(set_to_none=True)
    output = entry.output(model(**inputs))
    weights = torch.randn(output.shape, generator=torch.Generator().manual_seed(2))
    torch.autograd.backward((output.float() * weights).sum())
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def check_gradient(row: Row, model: nn.Module, inputs: Inputs) -> None:
    """Parameter gradients are the same under a capture, and under an identity edit of the pattern."""
    entry = row.entry
    if not entry.differentiable:
        return
    plain = gradients(entry, model, inputs)
    with Probe(model).capture(Keep(pattern=True, z=True)):
        watched = gradients(entry, model, inputs)
    with Plan([Edit("pattern", call(unchanged), select())]).on(model):
        edited = gradients(entry, model, inputs)
    largest = max(float(gradient.abs().max()) for gradient in plain.values())
    for label, other in (("capture", watched), ("identity edit", edited)):
        if other.keys() != plain.keys():
            row.problems.append(f"under {label} other parameters get a gradient: {sorted(other.keys() ^ plain.keys())[:3]}")
            return
        gap = max(difference(other[name], plain[name]) for name in plain) / max(1.0, largest)
        row.gradient = gap if row.gradient is None else max(row.gradient, gap)
    if row.gradient is not None and row.gradient > GRADIENT_LIMIT:
        row.problems.append(f"gradients differ by {row.gradient:.1e} of the largest")


def number(value: float | None) -> str:
    """A difference as the table shows it."""
    if value is None:
        return "–"
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def line(row: Row) -> str:
    """One line of the table."""
    entry = row.entry
    if entry.refused is not None:
        verdict = "refused" if not row.problems else "**BROKEN: " + "; ".join(row.problems) + "**"
        return f"| {entry.name} | {verdict} | – | – | – | – | – | – | {entry.refused} |"
    mark = f"{len(row.sites)}/{entry.expected_sites}"
    mechanisms = ", ".join(sorted({site.mechanism for site in row.sites})) or "–"
    decoding = "–" if row.generated is None else "yes" if row.generated else "no"
    if row.decoded is not None:
        decoding += f" ({number(row.decoded)})"
    remark = "; ".join([*([entry.note] if entry.note else []), *(f"**{problem}**" for problem in row.problems)])
    cells = (
        entry.name, mark, mechanisms, number(row.pattern), f"{number(row.identity_z)} / {number(row.identity_pattern)}",
        number(row.zero_head), decoding, number(row.gradient), remark,
    )  # fmt: skip
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def table(rows: list[Row], missing: dict[str, str]) -> str:
    """docs/coverage.md."""
    works = sum(row.works for row in rows)
    refused = sum(row.entry.refused is not None for row in rows)
    versions = ", ".join(f"{name} {version(name)}" for name in (
        "torch", "transformers", "diffusers", "timm", "torchvision", "torch-geometric", "transformer-lens") if version(name))  # fmt: skip
    lines = [
        "# Coverage",
        "",
        f"{works} architectures work, {refused} are refused by name, {len(rows) - works - refused} have a problem. Written by "
        "`make coverage-table` from the models in `tests/models`: tiny, random weights, float32, CPU.",
        "",
        f"Versions: {versions}.",
        "",
        "- **sites**: found / expected. **caught by**: the mechanism.",
        "- **pattern**: largest |captured − reference|. The reference is transformers' eager `output_attentions`, the library's own "
        "weights, or a dense recomputation in float64; never our own code.",
        "- **identity**: how far the output moves, relative to its largest value, under an edit of z / the pattern that changes nothing.",
        "- **zero head**: z of one head scaled to 0, against its slice zeroed in front of W_O by a plain hook; worst projection.",
        "- **generate**: the same tokens under capture, one step a token; in brackets, decoded rows against one full forward.",
        "- **gradient**: parameter gradients under capture, and under an identity edit of the pattern, against without; over the largest.",
        "- A dash: there is nothing to compare.",
    ]
    for family in FAMILIES:
        chosen = [row for row in rows if row.entry.family == family]
        if chosen:
            lines += [
                "",
                f"## {family}",
                "",
                "| architecture | sites | caught by | pattern | identity z / pattern | zero head | generate | gradient | remark |",
                "|---|---|---|---|---|---|---|---|---|",
                *(line(row) for row in chosen),
            ]
    if missing:
        lines += ["", "## Not run here", "", *(f"- {name}: {reason}" for name, reason in missing.items())]
    return "\n".join(lines) + "\n"


def keep_attribution(text: str, source: str) -> str:
    """The table with the section that `tests.attribution_coverage` writes at its end, as it stands in another text."""
    heading = "## Attribution\n"
    own = text.partition(f"\n{heading}")[0].rstrip("\n") + "\n"
    return own + "".join(f"\n{part}" for part in (source[source.find(heading) :],) if heading in source)


def version(name: str) -> str | None:
    """The version of an installed distribution, or of a module already imported."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return getattr(sys.modules.get(name.replace("-", "_")), "__version__", None)


def main(argv: list[str] | None = None) -> int:
    """Measure every entry, write docs/coverage.md, and say what is wrong; 1 when something is."""
    parser = argparse.ArgumentParser(description="Measure the interception on every model of the zoo and write docs/coverage.md.")
    parser.add_argument("--only", help="measure entries whose name contains this text, and write no table")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    quiet()
    rows: list[Row] = []
    missing: dict[str, str] = {}
    chosen = [entry for entry in ENTRIES if options.only is None or options.only.lower() in entry.name.lower()]
    for count, entry in enumerate(chosen, 1):
        reason = entry.missing()
        if reason is not None:
            missing[entry.name] = reason
            continue
        start = time.perf_counter()
        row = check(entry)
        rows.append(row)
        state = "refused" if entry.refused and not row.problems else "ok" if row.works else "PROBLEM"
        print(f"{count}/{len(chosen)} {state} {entry.name} ({time.perf_counter() - start:.1f} s)", file=sys.stderr)
        for problem in row.problems:
            print(f"    {problem}", file=sys.stderr)
    if options.only is None:
        TABLE.parent.mkdir(exist_ok=True)
        before = TABLE.read_text(encoding="utf-8") if TABLE.exists() else ""
        TABLE.write_text(keep_attribution(table(rows, missing), before), encoding="utf-8")
    bad = [row.entry.name for row in rows if row.problems]
    print(f"{sum(row.works for row in rows)} work, {len(bad)} have a problem, {len(missing)} not run here")
    return 1 if bad else 0


def quiet() -> None:
    """No progress bars or advice from the libraries."""
    from transformers.utils import logging

    logging.set_verbosity(50)


if __name__ == "__main__":
    sys.exit(main())
