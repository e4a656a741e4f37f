"""Write docs/reference.md from the docstrings of the public names, so that it says what the code says.

python docs/make_reference.py [--check]

Everything is read from the sources, nothing is imported: signatures stand there as they are written.
"""

from __future__ import annotations

import argparse
import ast
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "reference.md"

# Public names that live outside the `__all__` of their package, because few need them.
FURTHER = {
    "probe": ["models:model_fingerprint", "models:tokenize", "models:context_window", "models:embedded_folder", "models:digits_processor",
              "interception.intercept:intercept", "store:write", "store:Store", "rotary:read_rotary", "rotary:Rotary",
              "health.measures:HeadMeasures", "health.measures:StreamMeasures", "health.measures:GradientMeasures",
              "health.finding:Finding", "health.thresholds:Thresholds", "health.baselines:Baselines", "health.comparison:HealthComparison",
              "health.dilution:sweep_lengths", "health.stability:measure_stability", "health.paths:measure_paths",
              "health.gradients:measure_gradients", "health.bounds:entropy_floor", "atlas.weights:head_weights",
              "atlas.weights:HeadWeights", "atlas.spectra:head_spectra", "atlas.spectra:stack_spectra", "atlas.directions:copying_scores",
              "atlas.directions:read_directions", "atlas.composition:compose_heads", "atlas.probing:probe_heads", "atlas.behaviour:pairs",
              "atlas.behaviour:match_heads", "digit_flow:DigitFlow", "digit_prompts:PromptBook"],
    "interventions": ["activation:Activation", "cost:PlanCost", "cost:EditCost", "cost:SiteCost", "gates:risk", "gates:cosine",
                      "gates:linear", "gates:function", "saferope.training:Schedule", "saferope.saferope:Turned",
                      "language.safety_heads:score_ships", "language.safety_heads:score_sahara", "language.head_search:search_heads",
                      "language.directions:find_directions", "language.directions:choose_direction", "language.directions:Direction",
                      "language.inference_time:fit_truth_heads", "language.spectral:fit_spectral", "language.emphasis:emphasise",
                      "language.emphasis:profile_heads", "language.emphasis:edit_sink", "language.knockout:knock_out",
                      "language.knockout:sweep_windows", "language.path_patching:patch_paths", "language.path_patching:rank_paths",
                      "language.freezing:split_effect", "language.ablation:ablate_heads", "diffusion.bender:bend",
                      "diffusion.maps:watch_maps", "diffusion.maps:token_maps", "diffusion.maps:TokenMaps",
                      "diffusion.temporal:separate_events", "diffusion.style:mix_style", "diffusion.head_noise:noise_heads",
                      "losses.losses:AttentionLoss", "losses.kept_run:keep_run", "losses.kept_run:Run",
                      "losses.loss_terms:laplacian_spectrum", "evaluation.metrics:Metric", "evaluation.metrics:refusal_rate",
                      "evaluation.metrics:generated"],
}  # fmt: skip

# The modules of kernels/ that are for others to call, in the order of the page, and which of their names; None for all.
KERNELS: dict[str, list[str] | None] = {
    "attention": None, "statistics": ["Statistics"], "relevance": ["relevance"], "backward": ["Relevance"], "identities": None,
    "lse_attention": None, "problem": ["Problem", "make_problem", "Wanted"], "choose": ["choose"], "panels": ["statistics_of_pattern"],
    "blockwise": ["pattern"], "sinkhorn": None, "spectrum": None, "reference": None,
}  # fmt: skip

# Names that stand in signatures for a longer type.
ALIASES = {"Heads": "probe/capture.py", "IndicesLike": "interventions/select.py", "Source": "interventions/source.py"}
PLUMBING = {"change", "finish", "reads", "see", "stages"}  # what an interception calls; told once, at Handler

HEAD = """# Reference

Every public name, from its docstring. Written by `python docs/make_reference.py`; do not edit.

Letters: B batch, H query heads, G key/value heads, Q queries, K keys, D width of a query or key, V width of a value, E width of the
residual stream. Guides by task are in [index.md](index.md).
"""
SECTIONS = ("Args", "Attributes", "Returns", "Yields", "Raises")
ITEM = re.compile(r"([\w.*]+(?:, [\w.*]+)*): (.*)")


@dataclass(frozen=True)
class Name:
    """A public name: the module it is imported from, the file that defines it, and the definition."""

    title: str
    module: str
    file: Path
    node: ast.ClassDef | ast.FunctionDef


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where the page is not up to date")
    options = parser.parse_args()
    text = page()
    if not options.check:
        PAGE.write_text(text, encoding="utf-8")
        return 0
    if not PAGE.exists() or PAGE.read_text(encoding="utf-8") != text:
        print("docs/reference.md is not what the docstrings say: run python docs/make_reference.py", file=sys.stderr)
        return 1
    return 0


def page() -> str:
    parts = [HEAD, "In signatures " + ", ".join(f"`{name}` is `{alias(name)}`" for name in ALIASES) + "."]
    seen: Counter[str] = Counter()
    for title, note, names in rooms():
        slug(title, seen)
        places = [(slug(name.title, seen), name) for name in names]
        links = " · ".join(f"[{name.title}](#{anchor})" for anchor, name in places)
        parts += [f"## {title}", note, links, *(entry(name) for name in names)]
    parts += ["## Errors", errors()]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts if part)


def rooms() -> Iterator[tuple[str, str, list[Name]]]:
    """The parts of the page: a title, what to say first, and the names."""
    yield "headscope.probe", "", list(exported("probe"))
    yield "headscope.interventions", "", list(exported("interventions"))
    for module, names in KERNELS.items():
        title, file = f"headscope.kernels.{module}", ROOT / "kernels" / f"{module}.py"
        found = definitions(file)
        chosen = [node.name for node in public(file)] if names is None else names
        yield title, ast.get_docstring(tree(file)) or "", [Name(name, title, file, found[name]) for name in chosen]


def alias(name: str) -> str:
    values = [n.value for n in tree(ROOT / ALIASES[name]).body if isinstance(n, ast.Assign) and ast.unparse(n.targets[0]) == name]
    return ast.unparse(values[0])


def slug(title: str, seen: Counter[str]) -> str:
    """A heading's anchor on GitHub, where a second one of its kind gets a number."""
    plain = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
    seen[plain] += 1
    return plain if seen[plain] == 1 else f"{plain}-{seen[plain] - 1}"


def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"), filename=str(file))


def definitions(file: Path) -> dict[str, ast.ClassDef | ast.FunctionDef]:
    return {node.name: node for node in tree(file).body if isinstance(node, ast.ClassDef | ast.FunctionDef)}


def public(file: Path) -> list[ast.ClassDef | ast.FunctionDef]:
    return [node for name, node in definitions(file).items() if not name.startswith("_")]


def source(module: str) -> Path:
    """`headscope.probe.call` -> probe/call.py."""
    place = ROOT.joinpath(*module.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def defining(module: str, name: str) -> Path:
    """The file that defines a name which a module has, perhaps from another."""
    file = source(module)
    if name in definitions(file):
        return file
    passed = (node for node in tree(file).body if isinstance(node, ast.ImportFrom) and any(alias.name == name for alias in node.names))
    return defining(next(passed).module or "", name)


def exported(package: str) -> Iterator[Name]:
    """The names in `__all__`, errors left out, then those of FURTHER."""
    init = tree(ROOT / package / "__init__.py")
    home = {alias.asname or alias.name: node.module or "" for node in init.body if isinstance(node, ast.ImportFrom) for alias in node.names}
    listed = next(
        ast.literal_eval(node.value) for node in init.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    )
    for name in listed:
        if home[name] == f"headscope.{package}":  # a module: FURTHER says what of it is told
            continue
        if not home[name].endswith(".errors"):
            file = defining(home[name], name)
            yield Name(name, f"headscope.{package}", file, definitions(file)[name])
    for place in FURTHER[package]:
        module, _, name = place.partition(":")
        file = source(f"headscope.{package}.{module}")
        yield Name(name, f"headscope.{package}.{module}", file, definitions(file)[name])


def entry(name: Name) -> str:
    node = name.node
    where = f"`from {name.module} import {name.title}` · [source](../{name.file.relative_to(ROOT).as_posix()})"
    if isinstance(node, ast.FunctionDef):
        return "\n".join([f"### {name.title}", "", where, "", code(signature(node)), "", documented(node)])
    head = fields_of(node) if is_dataclass(node) else f"class {name.title}"
    initial = next((m for m in methods(node, private=True) if m.name == "__init__"), None)
    if initial is not None and not is_dataclass(node):
        head = signature(initial, name.title)
    lines = [f"### {name.title}", "", where, "", code(head), "", documented(node)]
    if initial is not None and ast.get_docstring(initial):
        lines.append(documented(initial))
    for method in methods(node):
        if method.name in PLUMBING and name.title != "Handler":
            continue
        decorators = {ast.unparse(d) for d in method.decorator_list}
        shown = (
            f"{name.title}.{method.name}: {returns(method)}"
            if "property" in decorators
            else signature(method, f"{name.title}.{method.name}")
        )
        lines += ["", code(shown), "", documented(method)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(lines))


def is_dataclass(node: ast.ClassDef) -> bool:
    return any(ast.unparse(d).startswith("dataclass") for d in node.decorator_list)


def methods(node: ast.ClassDef, private: bool = False) -> list[ast.FunctionDef]:
    found = [item for item in node.body if isinstance(item, ast.FunctionDef)]
    return found if private else [m for m in found if not m.name.startswith("_") and ast.get_docstring(m)]


def returns(node: ast.FunctionDef) -> str:
    return "None" if node.returns is None else ast.unparse(node.returns)


def signature(node: ast.FunctionDef, title: str | None = None) -> str:
    """A call as one would write it: without self and cls, one argument a line where it is long."""
    given = node.args
    plain = [*given.posonlyargs, *given.args]
    defaults: list[ast.expr | None] = [None] * (len(plain) - len(given.defaults)) + list(given.defaults)
    parts = [argument(a, d) for a, d in zip(plain, defaults, strict=True) if a.arg not in ("self", "cls")]
    if given.vararg is not None:
        parts.append("*" + argument(given.vararg, None))
    elif given.kwonlyargs:
        parts.append("*")
    parts += [argument(a, d) for a, d in zip(given.kwonlyargs, given.kw_defaults, strict=True)]
    if given.kwarg is not None:
        parts.append("**" + argument(given.kwarg, None))
    arrow = "" if node.name == "__init__" else f" -> {returns(node)}"
    return call(title or node.name, parts, arrow)


def argument(node: ast.arg, default: ast.expr | None) -> str:
    text = node.arg if node.annotation is None else f"{node.arg}: {ast.unparse(node.annotation)}"
    if default is None:
        return text
    return f"{text} = {ast.unparse(default)}" if node.annotation is not None else f"{text}={ast.unparse(default)}"


def call(title: str, parts: list[str], arrow: str = "") -> str:
    line = f"{title}({', '.join(parts)}){arrow}"
    return line if len(line) <= 110 else f"{title}(\n" + "".join(f"    {part},\n" for part in parts) + f"){arrow}"


def fields_of(node: ast.ClassDef) -> str:
    parts = []
    for item in node.body:
        if not isinstance(item, ast.AnnAssign) or not isinstance(item.target, ast.Name) or item.target.id.startswith("_"):
            continue
        if ast.unparse(item.annotation).startswith("ClassVar"):
            continue
        text, default = f"{item.target.id}: {ast.unparse(item.annotation)}", item.value
        if isinstance(default, ast.Call) and ast.unparse(default.func) == "field":
            default = next((k.value for k in default.keywords if k.arg == "default"), None)
        parts.append(text if default is None else f"{text} = {ast.unparse(default)}")
    return call(node.name, parts)


def documented(node: ast.ClassDef | ast.FunctionDef) -> str:
    """A docstring as Markdown: its text, then each section as a list."""
    text = ast.get_docstring(node) or ""
    out: list[str] = []
    section = ""
    for line in text.splitlines():
        word = line.rstrip(":")
        if word in SECTIONS and line.endswith(":"):
            section = word
            out += ["", f"*{word}*", ""]
        elif section and line.startswith("    "):
            body = line.strip()
            item = ITEM.fullmatch(body) if line[4:5] != " " else None
            if item and section not in ("Returns", "Yields"):
                names = ", ".join(f"`{part.lstrip('*')}`" for part in item[1].split(", "))
                out.append(f"- {names}: {item[2]}")
            elif item is None and out and out[-1].startswith("- "):
                out[-1] += " " + body
            else:
                out.append(body)
        elif line.startswith("    "):
            out.append(line)
        else:
            section = "" if line else section
            out.append(line)
    return re.sub(r"\n{3,}", "\n\n", "\n".join(out)).strip("\n") + "\n"


def code(text: str) -> str:
    return f"```text\n{text}\n```"


def errors() -> str:
    """The tree as it stands in the module, then what each means."""
    file = ROOT / "kernels" / "errors.py"
    lines = [
        "All are in `headscope.probe` and, for code that needs no more, in `headscope.kernels.errors`.",
        "",
        "| error | also a | means |",
        "|---|---|---|",
    ]
    for node in public(file):
        if isinstance(node, ast.ClassDef):
            bases = [ast.unparse(base) for base in node.bases if ast.unparse(base) != "HeadscopeError"]
            lines.append(f"| `{node.name}` | {', '.join(f'`{base}`' for base in bases)} | {ast.get_docstring(node)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
