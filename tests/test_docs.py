"""The documentation is true: its Python runs, its commands parse and run, its links lead somewhere.

A page's Python blocks run in order and share their names, as a reader would type them. `<!-- setup … -->` in front of a block
holds what it needs and nobody wants to read; `<!-- not run: reason -->` keeps one from being run, `<!-- file: name -->` gives a
block to the commands of its page as a file. Blocks that import a library of the zoo are slow, and nothing after them may need their
names.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from headscope.app import cli
from headscope.interventions import Plan

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CHANGELOG.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "probe/embedded").glob("*/README.md")])
RUN = [ROOT / "README.md", ROOT / "docs/kernels.md", *sorted([*(ROOT / "docs/guides").glob("*.md"), *(ROOT / "docs/math").glob("*.md")])]
LM = ROOT / "probe/embedded/lm/model.safetensors"
NO_LM = "embedded:lm has no weights yet: make train"
HEAVY = {"diffusers", "peft", "torch_geometric", "transformer_lens"}
MADE = dict.fromkeys(("docs/images/workbench.png", "docs/images/heads.png"), "python docs/screenshots.py")  # and what makes them

FENCE = re.compile(
    r"^(?P<lead>(?:<!-- (?:setup\n.*?\n|(?:not run|file): [^\n]*)-->\n+)*)```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
SETUP = re.compile(r"<!-- setup\n(.*?)\n-->", re.DOTALL)
LINK = re.compile(r"!?\[[^\]\n]*\]\(([^)\s]+)\)")
INLINE = re.compile(r"(?<!`)`(headscope [^`\n]+)`(?!`)")


def label(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the line it starts at, and its text, with what has to run before it."""

    page: Path
    line: int
    kind: str
    code: str
    setup: str
    not_run: str | None
    file: str | None

    @property
    def name(self) -> str:
        return f"{label(self.page)}:{self.line}"

    @property
    def imports(self) -> set[str]:
        tree = ast.parse(self.setup + "\n" + self.code)
        whole = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
        parts = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
        return {name.partition(".")[0] for name in whole | parts}

    @property
    def heavy(self) -> bool:
        return bool(self.imports & HEAVY)


def blocks(page: Path, *kinds: str) -> list[Block]:
    text = page.read_text(encoding="utf-8")
    found = []
    for match in FENCE.finditer(text):
        if match["kind"] not in kinds:
            continue
        marks = dict(re.findall(r"<!-- (not run|file): ([^\n]*?) -->", match["lead"]))
        setup = "\n".join(SETUP.findall(match["lead"]))
        line = text.count("\n", 0, match.start("kind")) + 1
        found.append(Block(page, line, match["kind"], match["code"], setup, marks.get("not run"), marks.get("file")))
    return found


@dataclass
class Story:
    """A page's blocks as far as they were run."""

    folder: Path
    names: dict[str, Any] = field(default_factory=lambda: {"__name__": "__main__"})
    outcomes: dict[int, BaseException | str | None] = field(default_factory=dict)  # by line: an error, why it was skipped, or None


@pytest.fixture(scope="module")
def stories(tmp_path_factory: pytest.TempPathFactory) -> dict[Path, Story]:
    return {page: Story(tmp_path_factory.mktemp(page.stem)) for page in RUN}


@contextmanager
def inside(folder: Path) -> Iterator[None]:
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def run(block: Block, story: Story) -> BaseException | str | None:
    missing = sorted(name for name in block.imports if importlib.util.find_spec(name) is None)
    if block.not_run or missing:
        return block.not_run or f"needs {', '.join(missing)}"
    if "embedded:lm" in block.code and not LM.exists():
        return NO_LM
    skipped = next((reason for reason in story.outcomes.values() if isinstance(reason, str)), None)
    code = compile(block.setup + "\n" * (block.line - block.setup.count("\n")) + block.code, label(block.page), "exec")
    try:
        with inside(story.folder):
            exec(code, story.names)
    except NameError as error:
        return skipped or error
    except Exception as error:
        return error
    return None


PYTHON = [block for page in RUN for block in blocks(page, "python")]


@pytest.mark.filterwarnings("ignore")  # other people's, at import
@pytest.mark.parametrize("block", [pytest.param(block, id=block.name, marks=[pytest.mark.slow] if block.heavy else []) for block in PYTHON])
def test_every_python_block_runs(block: Block, stories: dict[Path, Story]) -> None:
    story = stories[block.page]
    if not story.outcomes:
        torch.manual_seed(0)
    for earlier in PYTHON:
        wanted = earlier.page == block.page and earlier.line <= block.line and (earlier is block or not earlier.heavy)
        if wanted and earlier.line not in story.outcomes:
            story.outcomes[earlier.line] = run(earlier, story)
    outcome = story.outcomes[block.line]
    if isinstance(outcome, str):
        pytest.skip(outcome)
    if outcome is not None:
        raise outcome


def command_lines(page: Path) -> list[tuple[str, list[str], bool]]:
    """Each `headscope …` line of a page: as written, as arguments, and whether it stands in a block that may be run."""
    found = []
    text = page.read_text(encoding="utf-8")
    for block in blocks(page, "sh", "bash", "console"):
        for line in re.sub(r"\\\n\s*", " ", block.code).splitlines():
            part = line.removeprefix("$ ").rpartition(" | ")[2].strip()
            if part.startswith("headscope "):
                found.append((part, shlex.split(part, comments=True), block.not_run is None))
    prose = FENCE.sub("", text)
    found += [(part, shlex.split(part), False) for part in INLINE.findall(prose) if not re.search(r"[…|]", part)]
    return found


def arguments(words: list[str]) -> list[str]:
    """What a shell would hand to the program: nothing from a pipe or a redirection on."""
    stop = next((i for i, word in enumerate(words) if re.fullmatch(r"[|;&]+|\d?[<>]+", word)), len(words))
    return words[1:stop]


COMMANDS = [(page, *line) for page in PAGES for line in command_lines(page)]


@pytest.mark.parametrize(("page", "line", "words", "_"), [pytest.param(*c, id=f"{label(c[0])}: {c[1]}") for c in COMMANDS])
def test_every_command_line_parses(page: Path, line: str, words: list[str], _: bool) -> None:
    if {"--help", "--version"} & set(words):
        with pytest.raises(SystemExit, match="0|None"):
            cli._parser().parse_args(arguments(words))
    else:
        assert isinstance(cli._parser().parse_args(arguments(words)), argparse.Namespace)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", [pytest.param(p, id=label(p)) for p in (ROOT / "README.md", ROOT / "docs/guides/command-line.md")])
def test_the_command_lines_run_in_order(page: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [(line, words) for line, words, may_run in command_lines(page) if may_run and words[1] not in ("app", "doctor")]
    assert lines
    if not LM.exists():
        pytest.skip(NO_LM)
    with inside(tmp_path):
        for block in blocks(page, "yaml", "json"):
            if block.file is not None:
                Path(block.file).write_text(block.code, encoding="utf-8")
        for line, words in lines:
            code = cli.main(arguments(words))
            assert code == 0, f"{line}\n{capsys.readouterr().err}"


RECIPES = [block for page in PAGES for block in blocks(page, "yaml")]


@pytest.mark.parametrize("block", [pytest.param(block, id=block.name) for block in RECIPES])
def test_every_recipe_can_be_loaded(block: Block, tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(block.code, encoding="utf-8")
    assert len(Plan.load(path)) > 0


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", re.sub(r"[`*]", "", heading).lower()).strip().replace(" ", "-")


def anchors(page: Path) -> set[str]:
    found: Counter[str] = Counter()
    every = set()
    for title in re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE):
        plain = slug(title)
        every.add(f"{plain}-{found[plain]}" if found[plain] else plain)
        found[plain] += 1
    return every


@pytest.mark.parametrize("page", [pytest.param(page, id=label(page)) for page in PAGES])
def test_every_link_and_image_is_there(page: Path) -> None:
    wrong, waiting = [], []
    for target in LINK.findall(FENCE.sub("", page.read_text(encoding="utf-8"))):
        path, _, anchor = target.partition("#")
        if re.match(r"[a-z]+:", target):
            continue
        place = page if not path else (page.parent / path).resolve()
        if not place.exists():
            relative = place.relative_to(ROOT).as_posix() if place.is_relative_to(ROOT) else str(place)
            (waiting if relative in MADE else wrong).append(relative)
        elif anchor and anchor not in anchors(place):
            wrong.append(target)
    assert not wrong
    if waiting:
        pytest.skip("; ".join(f"{name} is not made yet: {MADE[name]}" for name in waiting))


def test_every_page_can_be_reached_from_the_readme() -> None:
    seen, todo = set(), [ROOT / "README.md"]
    while todo:
        page = todo.pop()
        if page in seen or not page.exists():
            continue
        seen.add(page)
        targets = (target.partition("#")[0] for target in LINK.findall(page.read_text(encoding="utf-8")))
        todo += [(page.parent / path).resolve() for path in targets if path.endswith(".md")]
    assert {label(page) for page in PAGES} <= {label(page) for page in seen if page.is_relative_to(ROOT)}


def test_the_reference_is_what_the_docstrings_say() -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "docs/make_reference.py"), "--check"], cwd=ROOT, capture_output=True, text=True, timeout=110
    )
    assert done.returncode == 0, done.stderr
