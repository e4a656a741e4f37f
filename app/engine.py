"""The model behind the workbench: runs it under a recipe, keeps q and k, and makes pictures and rows from them on demand.

Letters: V vocabulary, H heads, Q queries, K keys. Everything here runs in the worker's thread.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from headscope.app import pictures
from headscope.app.outcome import Comparison, Token, answer, compare, token_of
from headscope.app.session import HeadScale, Recipe
from headscope.interventions import Edit, Plan, Selector, scale, select
from headscope.kernels.errors import InputError, ModelError, SelectionError
from headscope.probe import AttentionSite, Capture, Keep, Probe
from headscope.probe.models import load, model_fingerprint, tokenize

TOKEN_CAP = 2048  # what one picture of one head still shows in time; longer texts need tiles
MEMORY_CAP = 512 * 1024 * 1024  # bytes of q and k that finished runs may hold
GRID_PIXELS = 432  # width the grid of heads aims at
HEADS_KEPT = 4  # whole patterns kept for the next rows
GRID_TOKENS = 512  # above this the grid shows some queries only
SHOWN = 10  # rows of the next-token table
PICTURE_VERSION = 1  # part of picture addresses, which browsers keep for ever: raise it when a picture changes


@dataclass(eq=False)
class Run:
    """One forward pass under a recipe. `answer` [V]: log-probabilities of the token after the last."""

    key: str
    tokens: tuple[Token, ...]
    recipe: Recipe
    answer: Tensor
    capture: Capture
    seconds: float
    pictures: dict[str, bytes] = field(default_factory=dict)


class Engine:
    """A language model, its sites and its runs.

    Args:
        name: what `headscope.probe.load` takes.
        device: where the model runs.
        threads: how many threads torch may use.
    """

    def __init__(self, name: str, *, device: str = "cpu", threads: int = 1) -> None:
        torch.set_num_threads(threads)
        self.name = name
        self.model, self.tokenizer = load(name, device=device)
        if not callable(getattr(self.tokenizer, "decode", None)):
            raise ModelError(f"{name} takes no text; the workbench shows language models only so far")
        self.fingerprint = model_fingerprint(self.model)
        self.probe = Probe(self.model, self.tokenizer)
        self.runs: OrderedDict[str, Run] = OrderedDict()
        self.first = ""  # the run that stays in memory
        self.sites: list[AttentionSite] = []
        self._recent: OrderedDict[tuple[str, int, int], pictures.Floats] = OrderedDict()

    def open(self, text: str) -> Run:
        """Find the sites with a first run, which stays in memory."""
        self.sites = self.probe.sites(**self._inputs(text))
        run = self.run(text, ())
        self.first = run.key
        return run

    @property
    def heads(self) -> list[int]:
        """How many heads each site has."""
        return [site.query_heads for site in self.sites]

    @property
    def labels(self) -> list[str]:
        """What to call each site: its layer where that is enough, else its place in the list."""
        return [f"L{site.layer}" if self._alone(site) else f"S{row}" for row, site in enumerate(self.sites)]

    @property
    def precision(self) -> str:
        parameter = next(self.model.parameters())
        return f"{parameter.device.type} {str(parameter.dtype).removeprefix('torch.')}"

    def run(self, text: str, recipe: Recipe, report: Callable[[str], None] | None = None) -> Run:
        """The model on a text under a recipe; the same text and recipe give the run that is already there."""
        inputs = self._inputs(text)
        ids: list[int] = inputs["input_ids"][0].tolist()
        key = self._key(ids, recipe)
        if key in self.runs:
            self.runs.move_to_end(key)
            return self.runs[key]
        started = time.perf_counter()
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if report is not None:
                stack.enter_context(self._watched(report))
            stack.enter_context(self.plan(recipe).on(self.model) if recipe else nullcontext())
            capture = stack.enter_context(self.probe.capture(Keep()))
            output = self.model(**inputs)
        run = Run(key, self.tokens(ids), recipe, answer(output), capture, time.perf_counter() - started)
        self._remember(run)
        return run

    def plan(self, recipe: Recipe) -> Plan:
        """The recipe as interventions know it."""
        return Plan([Edit("z", scale(edit.value), self._selector(edit)) for edit in recipe])

    def tokens(self, ids: Sequence[int]) -> tuple[Token, ...]:
        """Token ids with labels that may be shown anywhere text is taken as text."""
        return tuple(token_of(self.tokenizer, id) for id in ids)

    def compare(self, before: Run, after: Run) -> Comparison:
        """The next token of two runs, side by side."""
        return compare(before.answer, after.answer, lambda id: token_of(self.tokenizer, id), SHOWN)

    def find(self, key: str) -> Run:
        """A run that is still in memory."""
        if key not in self.runs:
            raise SelectionError(f"run {key!r} is no longer in memory")
        self.runs.move_to_end(key)
        return self.runs[key]

    def grid(self, run: Run, scale: str) -> bytes:
        """The PNG of all heads; see `pictures.grid`. Of long texts it shows evenly spaced queries, with all their keys."""
        side = max(14, min(64, GRID_PIXELS // max(self.heads) - pictures.GAP))
        thumbnails = []
        for row, (count, (queries, _)) in enumerate(zip(self.heads, self.shapes(run), strict=True)):
            some = None if queries <= GRID_TOKENS else np.linspace(0, queries - 1, 2 * side).round().astype(int).tolist()
            thumbnails.append([pictures.thumbnail(self.probabilities(run, row, head, some), side) for head in range(count)])
        return pictures.grid(thumbnails, scale)

    def pattern(self, run: Run, row: int, head: int, scale: str) -> bytes:
        """The PNG of one head, one pixel for each query and key."""
        return pictures.encode(pictures.indices(self._looked_at(run, row, head), scale))

    def probabilities(self, run: Run, row: int, head: int, queries: list[int] | None = None) -> pictures.Floats:
        """What a head gives each key, [Q, K] in float32, or of some queries only; NaN where the model masked the key."""
        site = self._site(row, head)
        pattern = run.capture.pattern(site=site.name, heads=[head], rows=queries)[0, 0].float()
        hidden = _hidden(run.capture, site, head, pattern, queries)
        cells: pictures.Floats = pattern.masked_fill(hidden, float("nan")).cpu().numpy()
        return cells

    def row(self, run: Run, row: int, head: int, query: int) -> bytes:
        """One row of a head as little-endian float32, exactly as computed; NaN where the model masked the key."""
        probabilities = self._looked_at(run, row, head)
        if query >= len(probabilities):
            raise SelectionError(f"no query {query}: this run has {len(probabilities)}, 0 to {len(probabilities) - 1}")
        return np.ascontiguousarray(probabilities[query]).astype("<f4").tobytes()

    def summary(self, run: Run, row: int, head: int) -> bytes:
        """A head in a few numbers, as JSON: averages over queries of its weights and their entropy (nats)."""
        cells = np.nan_to_num(self._looked_at(run, row, head)).astype(np.float64)
        logs = np.log(cells, out=np.zeros_like(cells), where=cells > 0)
        found = {"entropy": float(-(cells * logs).sum(axis=1).mean()), "first": float(cells[:, 0].mean())}
        if cells.shape[0] == cells.shape[1]:  # positions of queries and keys are the same
            found["itself"] = float(np.diagonal(cells).mean())
            found["previous"] = float(np.diagonal(cells, -1).mean()) if len(cells) > 1 else 0.0
        return json.dumps(found).encode()

    def striking(self, run: Run) -> tuple[int, int]:
        """The head (row, head) with the most to see: weight on keys other than the first, the query itself and the one before."""
        best, chosen = -1.0, (0, 0)
        for row, count in enumerate(self.heads):
            for head in range(count):
                cells = np.nan_to_num(self._looked_at(run, row, head))
                weights = cells - np.triu(np.tril(cells), -1)
                weight = float(weights[:, 1:].max(axis=1, initial=0).mean())
                if weight > best:
                    best, chosen = weight, (row, head)
        return chosen

    def shapes(self, run: Run) -> list[tuple[int, int]]:
        """Queries and keys of each site in a run."""
        found = []
        for site in self.sites:
            q, k = run.capture.q(site=site.name), run.capture.k(site=site.name)
            found.append((q.shape[2], k.shape[2]))
        return found

    def _looked_at(self, run: Run, row: int, head: int) -> pictures.Floats:
        """`probabilities`, kept for the heads looked at last: pointing at cells asks for many rows of one head."""
        place = (run.key, row, head)
        if place not in self._recent:
            self._recent[place] = self.probabilities(run, row, head)
            while len(self._recent) > HEADS_KEPT:
                self._recent.popitem(last=False)
        return self._recent[place]

    def _inputs(self, text: str) -> dict[str, Tensor]:
        inputs = tokenize(self.tokenizer, text, self.model)
        count = inputs["input_ids"].shape[1]
        if count > TOKEN_CAP:
            raise InputError(f"the text has {count:,} tokens; the workbench shows at most {TOKEN_CAP:,}")
        return inputs

    def _key(self, ids: Sequence[int], recipe: Recipe) -> str:
        edits = sorted(([edit.row, edit.head, edit.value] for edit in recipe), key=lambda edit: edit[:2])
        content = json.dumps([self.fingerprint, list(ids), edits], separators=(",", ":"))
        return hashlib.sha256(content.encode()).hexdigest()[:24]

    def _site(self, row: int, head: int) -> AttentionSite:
        if row >= len(self.sites):
            raise SelectionError(f"no site {row}: this model has {len(self.sites)}, 0 to {len(self.sites) - 1}")
        if head >= self.heads[row]:
            raise SelectionError(f"no head {head}: site {row} has {self.heads[row]} heads, 0 to {self.heads[row] - 1}")
        return self.sites[row]

    def _alone(self, site: AttentionSite) -> bool:
        return site.layer is not None and sum(other.layer == site.layer for other in self.sites) == 1

    def _selector(self, edit: HeadScale) -> Selector:
        site = self._site(edit.row, edit.head)
        return select(layer=site.layer, head=edit.head) if self._alone(site) else select(sites=site.name, head=edit.head)

    @contextmanager
    def _watched(self, report: Callable[[str], None]) -> Iterator[None]:
        """Call `report` as each site's module is reached, which may end the run by raising."""
        with ExitStack() as stack:
            for row, site in enumerate(self.sites):

                def reached(module: nn.Module, arguments: tuple[object, ...], row: int = row) -> None:
                    report(f"layer {row + 1} of {len(self.sites)}")

                handle = self.model.get_submodule(site.module).register_forward_pre_hook(reached)
                stack.callback(handle.remove)
            yield

    def _remember(self, run: Run) -> None:
        self.runs[run.key] = run
        held = sum(run.capture.nbytes for run in self.runs.values())
        for key in list(self.runs):
            if held <= MEMORY_CAP or key in (run.key, self.first):
                continue
            held -= self.runs.pop(key).capture.nbytes


def _hidden(capture: Capture, site: AttentionSite, head: int, pattern: Tensor, queries: list[int] | None) -> Tensor:
    """Where the model hid a key from a query, [Q, K]; told by what it handed over, not by how small a probability came out.

    Args:
        capture: what was kept of the run.
        site, head: whose pattern.
        pattern: it, [Q, K].
        queries: which queries its rows are; None for all.
    """
    record = capture.records[site.name, capture.steps(site=site.name)[0]]
    if record.replay is not None:  # its own code made the scores; a hidden key is one with no weight at all
        return pattern == 0
    places = torch.arange(pattern.shape[0]) if queries is None else torch.tensor(queries)
    hidden = torch.zeros_like(pattern, dtype=torch.bool)
    if record.is_causal:
        hidden |= (torch.arange(pattern.shape[1]) > places[:, None]).to(hidden.device)  # query i sees keys 0 to i
    for name in ("mask", "bias"):
        if record.has(name):
            given = record.get(name)[0]
            given = given[head if given.shape[0] > 1 else 0]  # [Q or 1, K or 1]
            given = given[places.to(given.device)] if given.shape[0] > 1 else given
            hidden |= ~given if given.dtype == torch.bool else given <= torch.finfo(given.dtype).min / 2
    return hidden


def recipe_as_json(recipe: Recipe) -> list[dict[str, int | float]]:
    """The recipe for the page."""
    return [asdict(edit) for edit in recipe]
