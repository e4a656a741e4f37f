"""Every transformers model type and every diffusers denoiser that builds tiny, swept: what is caught, and is anything missed in silence?

`python -m tests.census` writes bench/results/census.jsonl, one line a type, as it goes (`--resume` skips what is there), and
docs/census.md. A worker process does the types; the parent kills it when one takes too long and goes on with the next.
Letters: B batch, H query heads, Q queries, K keys.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import selectors
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from tests.models.entry import Inputs, redraw

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench" / "results" / "census.jsonl"
TABLE = ROOT / "docs" / "census.md"
LIMIT = 25.0
BATCH = 60
TOLERANCE = 1e-5
UNSEEN = ("mra", "yoso")  # attention without a product and a softmax of torch's: chosen blocks, hashes
SITES = ("equal", "differs", "no-reference", "refused", "silent-miss")


@dataclass
class Result:
    """One type.

    Attributes:
        type: transformers' model type, or `diffusers:` and a class name.
        status: `equal` (patterns are the reference's), `differs`, `no-reference`, `refused` (NotIntercepted was raised), `silent-miss`
            (less was caught than the independent counter saw, and nothing was raised), `no-attention` (neither saw any),
            `build-failed`, `run-failed`, `timeout`, `worker-died`.
        message: why, for a status that needs a reason.
        model: the class that was built.
        parameters: their number.
        mechanisms: how sites were caught.
        sites: places where attention was caught.
        calls: executions of them in one forward.
        seen: attention calls that the independent counter saw in one forward; its softmaxes over products and its fused calls.
        unattributed: operations that the interception saw and did not claim.
        reference: `output_attentions`, `dense`, or none.
        compared: patterns compared with it; `of`: tensors in it.
        difference: the largest one.
        seconds: for all of it.
    """

    type: str
    status: str = "run-failed"
    message: str = ""
    model: str = ""
    parameters: int = 0
    mechanisms: list[str] = field(default_factory=list)
    sites: int = 0
    calls: int = 0
    seen: int = 0
    unattributed: int = 0
    reference: str = ""
    compared: int = 0
    of: int = 0
    difference: float | None = None
    seconds: float = 0.0


class Counting(TorchFunctionMode):
    """A second opinion, with no code of the interception's: how many attentions does a forward compute?

    A fused call counts one. A tensor that is a product of two activations carries a mark through pointwise functions and views;
    a softmax over a marked tensor counts one and takes the mark away, as does any function with a parameter.
    """

    PRODUCTS = ("matmul", "bmm", "baddbmm", "einsum", "__matmul__", "__rmatmul__")
    STOPS = ("linear", "conv1d", "conv2d", "conv3d", "layer_norm", "group_norm", "rms_norm", "batch_norm", "embedding", "bilinear")

    def __init__(self) -> None:
        super().__init__()
        self.fused = 0
        self.softmaxes = 0
        self.marked: dict[int, Tensor] = {}  # kept alive, so that an id is not used twice

    def __torch_function__(
        self, func: Callable[..., Any], types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name == "scaled_dot_product_attention":
            self.fused += 1
            return func(*args, **kwargs)
        tensors = list(flat((args, kwargs)))
        result = func(*args, **kwargs)
        if name in self.PRODUCTS:
            operands = [tensor for tensor in tensors if tensor.ndim >= 3 and tensor.is_floating_point()]
            activations = [tensor for tensor in operands if not isinstance(tensor, nn.Parameter)]
            if len(activations) >= 2 and not any(id(tensor) in self.marked for tensor in activations):
                self.mark(result)
        elif name in ("softmax", "_softmax"):
            if any(id(tensor) in self.marked for tensor in tensors[:1]) and isinstance(result, Tensor) and result.ndim >= 3:
                self.softmaxes += 1
        elif name not in self.STOPS and any(id(tensor) in self.marked for tensor in tensors):
            for one in flat(result):
                self.mark(one)
        return result

    def mark(self, tensor: Any) -> None:
        """Remember a product of activations, or what came of one."""
        if isinstance(tensor, Tensor) and tensor.is_floating_point() and tensor.ndim >= 2:
            self.marked[id(tensor)] = tensor


def flat(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for part in value:
            yield from flat(part)
    elif isinstance(value, dict):
        yield from flat(list(value.values()))


@contextmanager
def composites_open(counter: Counting) -> Iterator[None]:
    """nn.MultiheadAttention hides its inner calls from a mode: each counts as one fused call."""
    original = F.multi_head_attention_forward

    def counted(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            result = original(*args, **kwargs)
        counter.fused += 1
        return result

    with mock.patch.object(F, "multi_head_attention_forward", counted):
        yield


def seeded(model: nn.Module, inputs: Inputs, **options: Any) -> Any:
    """One forward without a gradient, the random state the same each time: some models sample even in eval mode."""
    torch.manual_seed(3)
    with torch.no_grad():
        return model(**inputs, **options)


def count(model: nn.Module, inputs: Inputs) -> int:
    """How many attentions one forward computes, by the independent counter."""
    former = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    counter = Counting()
    try:
        with composites_open(counter), counter:
            seeded(model, inputs)
    finally:
        torch.backends.mha.set_fastpath_enabled(former)
    return counter.fused + counter.softmaxes


def returned_attentions(output: Any) -> list[Tensor]:
    """Every [B, H, Q, K] tensor under a key that speaks of attentions, at any depth."""
    found: list[Tensor] = []
    if isinstance(output, dict):
        for name, value in output.items():
            if "attention" in name:
                found += [tensor for tensor in flat(value) if tensor.ndim == 4 and tensor.is_floating_point()]
            elif isinstance(value, dict):
                found += returned_attentions(value)
    return found


def eager_twin(model: Any) -> nn.Module:
    """The same model with the same weights, built for transformers' eager attention."""
    config = copy.deepcopy(model.config)
    config._attn_implementation = "eager"
    twin: nn.Module = type(model)._from_config(config).eval()
    twin.load_state_dict(model.state_dict())
    return twin


def references(model: nn.Module, inputs: Inputs) -> Iterator[tuple[str, list[Tensor]]]:
    """Patterns from elsewhere, the best source first.

    Eager `output_attentions`, where the eager twin computes the same output (some models mask differently in eager); what the
    model's own fused calls compute, densely in float64; the outputs of its softmaxes over four axes.
    """
    from tests.models.reference import fused_calls, softmaxes

    attentions: list[Tensor] = []
    if hasattr(type(model), "_from_config"):
        try:
            plain, output = seeded(model, inputs), seeded(eager_twin(model), inputs, output_attentions=True)
            attentions = returned_attentions(output) if same_output(plain, output) else []
        except Exception:  # a model without that argument, or without eager attention; the other sources are left
            attentions = []
    if attentions:
        yield "output_attentions", attentions
    for kind, source in (("dense", fused_calls), ("softmax", softmaxes(set_eager=False))):
        torch.manual_seed(3)
        found = source(model, inputs)
        if found:
            yield kind, found


def same_output(one: Any, two: Any) -> bool:
    """The first floating-point tensors of two outputs agree to a thousandth of the largest value."""
    left, right = (next((tensor for tensor in flat(value) if tensor.is_floating_point()), None) for value in (one, two))
    if left is None or right is None or left.shape != right.shape:
        return False
    return float((left.double() - right.double()).abs().max()) <= 1e-3 * max(1.0, float(left.abs().max()))


def compare(patterns: list[Tensor], reference: list[Tensor]) -> tuple[int, float | None]:
    """How many reference tensors have a captured pattern of their shape, and the largest difference to the nearest one.

    Both lists in execution order where they are equally long; some models return attentions by tower.
    """
    compared, worst = 0, None
    ordered = len(patterns) == len(reference) and all(one.shape == two.shape for one, two in zip(patterns, reference, strict=False))
    if ordered:
        gaps = [gap(one, two) for one, two in zip(patterns, reference, strict=True)]
        if max(gaps, default=0.0) <= TOLERANCE:
            return len(gaps), max(gaps, default=None)
    for theirs in reference:
        fitting = [gap(ours, theirs) for ours in patterns if ours.shape == theirs.shape]
        if fitting:
            compared += 1
            worst = min(fitting) if worst is None else max(worst, min(fitting))
    return compared, worst


def gap(ours: Tensor, theirs: Tensor) -> float:
    """The largest difference where the reference is a pattern: rows that see nothing are 0 in one and uniform in the other."""
    alive = (ours.sum(-1, keepdim=True) != 0).expand_as(theirs)
    difference = (ours.double() - theirs.double()).abs().nan_to_num(nan=9.0)
    return float(torch.where(alive, difference, torch.zeros_like(difference)).max()) if theirs.numel() else 0.0


def examine(name: str) -> Result:
    """Build a type, run it, and say what was caught."""
    from headscope.kernels.errors import NotIntercepted
    from headscope.probe import Keep, Probe

    result = Result(name)
    try:
        model, inputs = make(name)
    except Exception as error:  # whatever a model's own code raises is the row's reason
        text = f"{type(error).__name__}: {error}".replace("\n", " ")[:300]
        result.status = "run-failed" if text.startswith("RuntimeError: run:") else "build-failed"
        result.message = text.removeprefix("RuntimeError: ")
        return result
    result.model, result.parameters = type(model).__name__, sum(parameter.numel() for parameter in model.parameters())
    result.seen = count(model, inputs)
    known = list(references(model, inputs))
    if known:
        result.reference, result.of = known[0][0], len(known[0][1])
    refusal: str | None = None
    try:
        with Probe(model).capture(Keep(pattern=True)) as seen:
            seeded(model, inputs)
    except NotIntercepted as error:
        refusal = " ".join(str(error).split())[:400]
        lenient = Probe(model, strict=False)
        try:
            with lenient.capture(Keep(pattern=True)) as seen:
                seeded(model, inputs)
        except NotIntercepted:
            seen = None
        except Exception as error:
            seen = None
            result.message = f"lenient: {type(error).__name__}: {error}"[:300]
        result.unattributed = len(lenient.unclaimed)
    except Exception as error:
        result.status, result.message = "capture-failed", f"{type(error).__name__}: {error}".replace("\n", " ")[:400]
        return result
    if seen is not None:
        result.sites = len(seen.sites)
        result.mechanisms = sorted({site.mechanism for site in seen.sites})
        patterns = [seen.pattern(site=site, step=step) for site, step in seen.records]
        result.calls = len(patterns)
        choose_reference(result, patterns, known)
    judge(result, refusal)
    return result


def choose_reference(result: Result, patterns: list[Tensor], known: list[tuple[str, list[Tensor]]]) -> None:
    """Compare with each source until one agrees in full; where a better source did not, the message says so."""
    for index, (kind, tensors) in enumerate(known):
        compared, difference = compare(patterns, tensors)
        agrees = compared == len(tensors) and difference is not None and difference <= TOLERANCE
        if index == 0 or agrees:
            result.reference, result.of, result.compared, result.difference = kind, len(tensors), compared, difference
            if index and agrees:
                best = known[0][0]
                result.message = f"{best} holds something else; {kind} patterns agree"
        if agrees:
            return


def judge(result: Result, refusal: str | None) -> None:
    """The status of a type that ran."""
    if refusal is not None:
        none = result.seen == 0 and result.unattributed == 0 and result.reference in ("", "softmax")  # a softmax need not be attention
        result.status = "no-attention" if none and result.type not in UNSEEN else "refused"
        result.message = refusal
    elif result.calls < result.seen or (result.calls == 0 and result.of):
        result.status, result.message = "silent-miss", f"{result.calls} calls caught, {result.seen} counted independently"
    elif result.calls == 0:
        result.status = "no-attention"
    elif result.reference == "":
        result.status = "no-reference"
    elif result.compared == result.of and result.difference is not None and result.difference <= TOLERANCE:
        result.status = "equal"
    else:
        result.status = "differs"
        result.message = f"{result.compared} of {result.of} reference tensors have a pattern of their shape"


def make(name: str) -> tuple[nn.Module, Inputs]:
    """The tiny model of a type, and inputs; its weights re-drawn so that patterns are uneven, unless it then overflows."""
    from tests.models.generic import tiny_model
    from tests.models.generic_diffusers import tiny_denoiser

    model, inputs = tiny_denoiser(name.removeprefix("diffusers:")) if name.startswith("diffusers:") else tiny_model(name)[:2]
    former = {key: value.clone() for key, value in model.state_dict().items()}
    redraw(model)
    try:
        fine = all(bool(tensor.isfinite().all()) for tensor in flat(seeded(model, inputs)) if tensor.is_floating_point())
    except (RuntimeError, ValueError, IndexError):
        fine = False
    if not fine:
        model.load_state_dict(former)
    return model, inputs


def types() -> list[str]:
    """Everything that is swept."""
    from transformers import CONFIG_MAPPING

    from tests.models.generic_diffusers import denoisers

    return [*CONFIG_MAPPING.keys(), *(f"diffusers:{name}" for name in denoisers())]


def work(names: list[str]) -> None:
    """The worker: a line `start <type>` and a line of JSON for each type, on stdout."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a library prints must not get in between
    from tests.models.torchvision_path import torchvision_missing

    torchvision_missing()  # before transformers, so that timm backbones can be built where torchvision is there
    import transformers

    transformers.logging.set_verbosity(50)
    for name in names:
        print(f"start {name}", file=channel, flush=True)
        start = time.perf_counter()
        try:
            result = examine(name)
        except Exception as error:
            result = Result(name, "capture-failed", message=f"{type(error).__name__}: {error}".replace("\n", " ")[:400])
        result.seconds = round(time.perf_counter() - start, 2)
        print(json.dumps(asdict(result)), file=channel, flush=True)


def sweep(names: list[str], results: Path) -> None:
    """Run workers over the names, one batch after the other, and append each result to the file at once."""
    results.parent.mkdir(parents=True, exist_ok=True)
    todo, done, began = list(names), 0, time.perf_counter()
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    tally: Counter[str] = Counter()
    with results.open("a", encoding="utf-8") as file:
        while todo:
            worker = subprocess.Popen(
                [sys.executable, "-m", "tests.census", "--worker", *todo[:BATCH]], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                text=True, cwd=ROOT, env=environment,
            )  # fmt: skip
            for result in watched(worker, len(todo[:BATCH]), todo):
                file.write(json.dumps(asdict(result)) + "\n")
                file.flush()
                done += 1
                tally[result.status] += 1
                left = (time.perf_counter() - began) / done * (len(names) - done)
                print(f"{done}/{len(names)} {result.type}: {result.status} ({result.seconds} s; {left / 60:.0f} min left) {dict(tally)}",
                      file=sys.stderr)  # fmt: skip


def watched(worker: subprocess.Popen[str], batch: int, todo: list[str]) -> Iterator[Result]:
    """The worker's results as they come; each takes its name off `todo`. Ends when the batch is done, or the worker is gone."""
    assert worker.stdout is not None
    selector = selectors.DefaultSelector()
    selector.register(worker.stdout, selectors.EVENT_READ)
    deadline = time.monotonic() + 60 + LIMIT  # the first one has to import everything
    buffer = b""
    descriptor = worker.stdout.fileno()
    try:
        while batch:
            lines: list[bytes] = []
            if selector.select(max(0.0, deadline - time.monotonic())):
                chunk = os.read(descriptor, 1 << 16)
                buffer += chunk
                *lines, buffer = buffer.split(b"\n")
                if not chunk:
                    yield Result(todo.pop(0), "worker-died", message=f"exit status {worker.wait()}")
                    return
            elif time.monotonic() >= deadline:
                yield Result(todo.pop(0), "timeout", message=f"more than {LIMIT:.0f} s", seconds=LIMIT)
                return
            for line in lines:
                if line.startswith(b"start "):
                    deadline = time.monotonic() + LIMIT
                else:
                    result = Result(**json.loads(line))
                    todo.remove(result.type)
                    batch -= 1
                    yield result
    finally:
        selector.close()
        worker.kill()
        worker.wait()


def table(results: list[Result]) -> str:
    """docs/census.md."""
    import diffusers
    import transformers

    tally = Counter(result.status for result in results)
    caught = [result for result in results if result.sites]
    ours = [result for result in results if not result.type.startswith("diffusers:")]
    ran = [result for result in results if result.status not in ("build-failed", "run-failed", "timeout", "worker-died")]
    mechanisms = Counter("+".join(result.mechanisms) for result in caught)
    referred = [result for result in caught if result.reference == "output_attentions"]
    lines = [
        "# Census",
        "",
        f"{len(ours)} model types of transformers {transformers.__version__} and {len(results) - len(ours)} denoisers of diffusers "
        f"{diffusers.__version__}, each from one generic tiny configuration (`tests/models/generic.py`), torch {torch.__version__}, CPU. "
        "Written by `make census`.",
        "",
        f"- {len(ran)} built and ran. **{len(caught)} have sites** ({', '.join(f'{name} {n}' for name, n in mechanisms.most_common())}).",
        f"- {len(referred)} of those return `output_attentions`; "
        f"{sum(one.status == 'equal' for one in referred)} agree to {TOLERANCE:.0e}.",
        f"- **{tally['silent-miss']} silent misses**: an independent counter saw more attention than was caught, and nothing was raised.",
        f"- {tally['refused']} refused with `NotIntercepted`; {tally['no-attention']} compute no attention.",
        "",
        "| status | types |",
        "|---|---|",
        *(f"| {status} | {n} |" for status, n in tally.most_common()),
        "",
        "## Types that ran",
        "",
        "| type | class | sites | calls / counted | caught by | reference | compared | largest difference | status |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for one in sorted(ran, key=lambda one: (one.status != "silent-miss", one.status in ("equal", "no-reference"), one.type)):
        difference = "–" if one.difference is None else f"{one.difference:.0e}"
        lines.append(
            f"| {one.type} | {one.model} | {one.sites} | {one.calls} / {one.seen} | {', '.join(one.mechanisms) or '–'} | "
            f"{one.reference or '–'} | {one.compared}/{one.of} | {difference} | {one.status}{reason(one)} |"
        )
    lines += ["", "## Types that did not build or run", "", "| type | status | reason |", "|---|---|---|"]
    lines += [f"| {one.type} | {one.status} | {clean(one.message)[:140]} |" for one in results if one not in ran]
    return "\n".join(lines) + "\n"


def reason(result: Result) -> str:
    """The message, for a status that asks why."""
    return f": {clean(result.message)[:160]}" if result.message and result.status not in ("no-reference", "no-attention") else ""


def clean(text: str) -> str:
    """A message inside a table cell."""
    return text.replace("|", "\\|").replace("\n", " ").replace(str(Path.home()), "~")


def load(results: Path) -> dict[str, Result]:
    """What the file holds, the last line of a type counting."""
    if not results.exists():
        return {}
    lines = (json.loads(line) for line in results.read_text(encoding="utf-8").splitlines() if line.strip())
    return {line["type"]: Result(**line) for line in lines}


def main(argv: list[str] | None = None) -> int:
    """Sweep, and write the table; 1 when something was missed in silence."""
    parser = argparse.ArgumentParser(description="Sweep every transformers model type and every diffusers denoiser that builds tiny.")
    parser.add_argument("--limit", type=int, help="at most so many types in this run")
    parser.add_argument("--only", help="these types, separated by commas")
    parser.add_argument("--resume", action="store_true", help="skip types that the results already hold")
    parser.add_argument("--again", help="with --resume: do types of this status once more, several separated by commas")
    parser.add_argument("--table", action="store_true", help="only write the table from the results")
    parser.add_argument("--worker", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args(argv)
    if asked.worker:
        work(asked.worker)
        return 0
    known = load(RESULTS)
    if not asked.table:
        names = asked.only.split(",") if asked.only else types()
        if not asked.resume and not asked.only:
            RESULTS.unlink(missing_ok=True)
            known = {}
        repeat = set((asked.again or "").split(","))
        if asked.resume:
            names = [name for name in names if name not in known or known[name].status in repeat]
        sweep(names[: asked.limit], RESULTS)
    every = load(RESULTS)
    RESULTS.write_text("".join(json.dumps(asdict(one)) + "\n" for one in every.values()), encoding="utf-8")
    TABLE.parent.mkdir(exist_ok=True)
    TABLE.write_text(table(list(every.values())), encoding="utf-8")
    tally = Counter(one.status for one in every.values())
    print(f"{len(every)} types: {', '.join(f'{status} {n}' for status, n in tally.most_common())}; "
          f"{sum(one.sites > 0 for one in every.values())} with sites")  # fmt: skip
    return 1 if tally["silent-miss"] else 0


if __name__ == "__main__":
    sys.exit(main())
