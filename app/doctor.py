"""`headscope doctor`: what is installed, what it enables, and whether the embedded models work from end to end."""

from __future__ import annotations

import argparse
import importlib.util
import json
import platform
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version

NEEDED = ("torch", "numpy", "safetensors", "transformers", "pyyaml")
OPTIONAL = (  # distribution, module, what it enables
    ("dash", "dash", "the workbench (headscope app)"),
    ("fastapi", "fastapi", "the workbench (headscope app)"),
    ("uvicorn", "uvicorn", "the workbench (headscope app)"),
    ("dash-mantine-components", "dash_mantine_components", "the workbench (headscope app)"),
    ("pillow", "PIL", "pictures (capture --png, the workbench)"),
    ("triton", "triton", "GPU kernels"),
    ("diffusers", "diffusers", "diffusion models"),
    ("timm", "timm", "timm models"),
    ("torch_geometric", "torch_geometric", "graph attention"),
    ("transformer-lens", "transformer_lens", "models of TransformerLens"),
    ("nnsight", "nnsight", "comparison in bench/"),
    ("xarray", "xarray", "Capture.to_xarray()"),
    ("pandas", "pandas", "tables: to_frame()"),
    ("playwright", "playwright", "browser tests"),
)
KERNELS = {
    "triton": "fused kernels for GPUs",
    "cpu": "C between the matrix products",
    "blockwise": "query panels in torch, any device, differentiable",
    "reference": "dense, in float64: what the others are tested against",
}


@dataclass(frozen=True)
class Check:
    """One thing that was tried."""

    name: str
    passed: bool
    detail: str


def run_doctor(arguments: argparse.Namespace) -> int:
    """Print the state of the installation; 1 if a check fails."""
    found: dict[str, object] = {
        "schema": "headscope.doctor/v1",
        "versions": {name: _version(name) for name in ("headscope", *NEEDED)},
        "python": platform.python_version(),
        "platform": platform.platform(),
        "devices": _devices(),
        "kernels": _kernels(),
        "mechanisms": _mechanisms(),
        "optional": [
            {"name": name, "version": _version(name) if importlib.util.find_spec(module) else None, "enables": purpose}
            for name, module, purpose in OPTIONAL
        ],
    }
    checks = [*_check_language_model(), *_check_image_model(), *_check_flow_model()]
    found["checks"] = [asdict(check) for check in checks]
    failed = [check for check in checks if not check.passed]
    found["passed"] = not failed
    if arguments.json:
        print(json.dumps(found))
    else:
        _print(found)
    return 1 if failed else 0


def _print(found: dict[str, object]) -> None:
    def lines(title: str, rows: list[tuple[str, str]]) -> None:
        print(title)
        width = max(len(name) for name, _ in rows)
        for name, text in rows:
            print(f"  {name.ljust(width)}  {text}")
        print()

    versions = found["versions"]
    assert isinstance(versions, dict)
    lines("Versions", [("python", f"{found['python']} on {found['platform']}"), *((name, str(text)) for name, text in versions.items())])
    for title, key, name, text in (
        ("Devices", "devices", "name", "{detail}"),
        ("Kernels", "kernels", "name", "{state}: {purpose}"),
        ("Attention is caught by", "mechanisms", "name", "{state}: {purpose}"),
    ):
        rows = found[key]
        assert isinstance(rows, list)
        lines(title, [(str(row[name]), text.format(**row)) for row in rows])
    optional, checks = found["optional"], found["checks"]
    assert isinstance(optional, list)
    assert isinstance(checks, list)
    lines("Optional packages", [(row["name"], f"{row['version'] or '– absent'}  ({row['enables']})") for row in optional])
    lines("Checks", [(row["name"], f"{'ok' if row['passed'] else 'FAILED'}: {row['detail']}") for row in checks])
    failed = sum(not row["passed"] for row in checks)
    print("Everything works." if not failed else f"{failed} of {len(checks)} checks failed.")


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _devices() -> list[dict[str, str]]:
    import torch

    rows = [{"name": "cpu", "detail": f"{torch.get_num_threads()} threads, {platform.machine()}"}]
    for place in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(place)
        rows.append({"name": f"cuda:{place}", "detail": f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB"})
    if torch.backends.mps.is_available():
        rows.append({"name": "mps", "detail": "Apple GPU"})
    return rows


def _kernels() -> list[dict[str, str]]:
    """Each implementation of `attention`: whether it can do a small float32 call on the best device here, and which one runs it."""
    import torch

    from headscope.kernels.choose import choose
    from headscope.kernels.cpu import build
    from headscope.kernels.errors import InputError
    from headscope.kernels.problem import Wanted, make_problem
    from headscope.kernels.statistics import NAMES

    device = "cuda" if torch.cuda.is_available() else "cpu"
    call = make_problem(*torch.zeros(3, 1, 2, 8, 16, device=device), causal=True)
    wanted = Wanted(frozenset(NAMES), tile=4)
    chosen = choose(call, wanted)
    rows = []
    for name, purpose in KERNELS.items():
        try:
            state = f"usable, runs float32 on {device}" if choose(call, wanted, name) is chosen else "usable"
        except InputError as error:
            reason = str(error).removeprefix(f"implementation {name!r} cannot do this: ").partition("; choose another")[0]
            state = f"unusable ({reason})"
        built = f" ({build.state()[1]})" if name == "cpu" and build.state()[0] else ""
        rows.append({"name": name, "state": state, "purpose": purpose + built})
    return rows


def _mechanisms() -> list[dict[str, str]]:
    import torch

    flex = importlib.util.find_spec("torch.nn.attention.flex_attention") is not None
    graph = importlib.util.find_spec("torch_geometric") is not None
    return [
        {"name": "sdpa", "state": "usable", "purpose": f"scaled_dot_product_attention, nn.MultiheadAttention (torch {torch.__version__})"},
        {"name": "flex", "state": "usable" if flex else "unusable: this torch has none", "purpose": "flex_attention"},
        {"name": "dataflow", "state": "usable", "purpose": "hand-written attention, found by where its numbers come from"},
        {"name": "torch_geometric", "state": "usable" if graph else "not needed: absent", "purpose": "graph attention"},
    ]


def _check_language_model() -> list[Check]:
    import torch

    from headscope.interventions import Edit, Plan, scale, select
    from headscope.kernels.errors import HeadscopeError
    from headscope.probe import Probe, load
    from headscope.probe.models import tokenize

    print("checking embedded:lm …", file=sys.stderr, flush=True)
    checks: list[Check] = []
    try:
        started = time.perf_counter()
        model, tokenizer = load("embedded:lm")
        checks.append(Check("embedded:lm loads", True, f"{time.perf_counter() - started:.2f} s"))
        inputs = tokenize(tokenizer, "The quick brown fox jumps over the lazy dog.", model)
        heads = sum(site.query_heads for site in Probe(model).sites(**inputs))
        checks.append(Check("embedded:lm heads", heads == 48, f"{heads} of 48 found"))
        with torch.no_grad():
            plain = model(**inputs).logits
            with Plan([Edit("z", scale(1.0), select(layer=3, head=5))]).on(model):
                same = model(**inputs).logits
            with Plan([Edit("z", scale(0.0), select(layer=3, head=5))]).on(model):
                moved = model(**inputs).logits
            after = model(**inputs).logits
        apart = float((moved - plain).abs().max())
        exact = torch.equal(plain, same)
        checks.append(Check("embedded:lm identity edit", exact, "bit-exact" if exact else "changes the logits"))
        checks.append(Check("embedded:lm zeroed head", apart > 0, f"moves the logits by up to {apart:.3g}"))
        checks.append(Check("embedded:lm restored", torch.equal(plain, after), "bit-exact after the edits"))
    except HeadscopeError as error:
        checks.append(Check("embedded:lm", False, str(error)))
    return checks


def _check_image_model() -> list[Check]:
    import torch

    from headscope.kernels.errors import HeadscopeError
    from headscope.probe import Keep, Probe, load

    print("checking embedded:vit …", file=sys.stderr, flush=True)
    try:
        model, processor = load("embedded:vit")
        inputs = processor([[0.0] * 8] * 8)
        with torch.no_grad(), Probe(model).capture(Keep()) as seen:
            model(**inputs)
        sums = torch.stack([seen.pattern(site=site.name).sum(-1) for site in seen.sites])
    except HeadscopeError as error:
        return [Check("embedded:vit", False, str(error))]
    heads = sum(site.query_heads for site in seen.sites)
    exact = bool(torch.allclose(sums, torch.ones_like(sums), atol=1e-5))
    return [Check("embedded:vit patterns", exact, f"{heads} heads, rows sum to 1" if exact else "rows do not sum to 1")]


def _check_flow_model() -> list[Check]:
    """Left out where diffusers, which embedded:mmdit is built with, is not installed."""
    import torch

    from headscope.kernels.errors import HeadscopeError
    from headscope.probe import Probe, load

    if importlib.util.find_spec("diffusers") is None:
        return []
    print("checking embedded:mmdit …", file=sys.stderr, flush=True)
    try:
        model, flow = load("embedded:mmdit")
        heads = sum(site.query_heads for site in Probe(model).sites(**flow("a plain eight")))
        drawn = bool(torch.isfinite(flow.sample("a plain eight", steps=2)).all())
    except HeadscopeError as error:
        return [Check("embedded:mmdit", False, str(error))]
    words = "draws" if drawn else "draws numbers that are not finite"
    return [Check("embedded:mmdit heads", heads == 16 and drawn, f"{heads} of 16 found, {words}")]
