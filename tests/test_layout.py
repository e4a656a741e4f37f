"""The house stands: imports point one way, the packages are what is shipped, and nothing unsafe is called."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
ORDER = ("kernels", "probe", "interventions", "app")  # each may import itself and what stands before it
ERRORS = {
    "AttributionError", "BudgetError", "ClosedError", "EditError", "HeadscopeError", "InputError", "ModelError",
    "NonFiniteError", "NotIntercepted", "RecipeError", "SelectionError", "ShapeError", "StoreError",
}  # fmt: skip
PUBLIC = {
    "probe": {
        "AttentionCall", "AttentionSite", "Attribution", "Capture", "Handler", "HeadAtlas", "HealthMonitor", "HealthReport", "Keep",
        "Probe", "Target", "attribute", "chart_heads", "compare_health", "contrast", "generated", "load", "measure_faithfulness",
        "measure_health", "rank_heads", *ERRORS,
    },
    "interventions": {
        "Edit", "Evaluation", "Gate", "Plan", "PlanDifference", "Prompted", "Role", "SafeRoPE", "Selector", "Span", "add", "assign",
        "band", "bias", "call", "evaluate", "find_roles", "freeze", "gates", "grid", "inject", "mask", "mix", "noise", "patch", "phase",
        "project", "renorm", "reposition", "role", "rotate", "scale", "select", "separate", "sinkhorn", "span", "warp",
    },
    "app": {"build_report"},
}  # fmt: skip
UNSAFE_MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
SKIPPED = {".git", "node_modules", "__pycache__", "build", "dist", "typings", ".hypothesis", ".zoo", "lm-training", "mmdit-training"}
TEXT = {".py", ".md", ".toml", ".txt", ".yaml", ".yml", ".json", ".css", ".js", ".in", ""}


def project() -> dict[str, Any]:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def sources(package: str) -> Iterator[tuple[Path, ast.Module]]:
    for path in sorted((ROOT / package).rglob("*.py")):
        yield path, ast.parse(path.read_text(encoding="utf-8"), filename=str(path))


def imported(path: Path, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Every module that a file imports, by absolute name, with the line. Imports inside functions count."""
    here = ["headscope", *path.relative_to(ROOT).with_suffix("").parts]
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(here[: -node.level]) + "." * bool(node.module) if node.level else ""
            for alias in node.names:
                yield node.lineno, f"{base}{node.module or ''}.{alias.name}"


def shown(path: Path, line: int) -> str:
    return f"{path.relative_to(ROOT)}:{line}"


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_one_way(package: str) -> None:
    allowed = ORDER[: ORDER.index(package) + 1]
    wrong = [
        f"{shown(path, line)} imports {name}"
        for path, tree in sources(package)
        for line, name in imported(path, tree)
        if (name.startswith("headscope.") and name.split(".")[1] not in allowed)
        or name.split(".")[0] in (*ORDER, "tests", "bench", "case_studies")
    ]
    assert not wrong, f"{package} may import {', '.join(allowed)}, and those by their full name"


def test_kernels_has_no_init() -> None:
    # transformers imports another package called kernels; a regular package of that name in the working directory would be taken for it
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "headscope").exists(), "headscope is a namespace: a folder of that name would hide the installed one"


def test_every_folder_of_code_is_shipped() -> None:
    folders = {path.parent for package in ORDER for path in (ROOT / package).rglob("*.py") if "embedded" not in path.parts}
    found = {".".join(["headscope", *folder.relative_to(ROOT).parts]) for folder in folders}
    settings = project()["tool"]["setuptools"]
    assert set(settings["packages"]) == found, "list every folder of Python files under [tool.setuptools] packages"
    assert settings["package-dir"] == {f"headscope.{package}": package for package in ORDER}


@pytest.mark.parametrize("package", ORDER)
def test_every_package_is_typed_and_linked_for_editors(package: str) -> None:
    assert (ROOT / package / "py.typed").is_file()
    assert (ROOT / "typings" / "headscope" / package).resolve() == ROOT / package


@pytest.mark.parametrize("package", [name for name in ORDER if name != "kernels"])
def test_importing_a_folder_by_its_own_name_is_refused(package: str) -> None:
    done = subprocess.run([sys.executable, "-c", f"import {package}"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"ImportError: import headscope.{package}, not {package}" in done.stderr


@pytest.mark.parametrize("package", sorted(PUBLIC))
def test_the_public_names_are_pinned(package: str) -> None:
    module = importlib.import_module(f"headscope.{package}")
    assert set(module.__all__) == PUBLIC[package]
    assert len(module.__all__) == len(set(module.__all__))
    assert all(getattr(module, name).__doc__ for name in module.__all__)


@pytest.mark.parametrize("package", ORDER)
def test_nothing_unsafe_is_called(package: str) -> None:
    wrong: list[str] = []
    for path, tree in sources(package):
        wrong += [f"{shown(path, line)} imports {name}" for line, name in imported(path, tree) if name.split(".")[0] in UNSAFE_MODULES]
        for node in ast.walk(tree):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            given = {word.arg: word.value for word in node.keywords}
            literal = {key: value.value for key, value in given.items() if isinstance(value, ast.Constant)}
            if called == "torch.load" and literal.get("weights_only") is not True:
                wrong.append(f"{shown(path, node.lineno)} calls torch.load without weights_only=True")
            if "trust_remote_code" in given and literal.get("trust_remote_code") is not False:
                wrong.append(f"{shown(path, node.lineno)} passes trust_remote_code")
            if literal.get("allow_pickle") is True or literal.get("weights_only") is False:
                wrong.append(f"{shown(path, node.lineno)} allows pickles")
            if called in {"eval", "exec", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "os.system"}:
                wrong.append(f"{shown(path, node.lineno)} calls {called}")
    assert not wrong


def test_no_file_names_a_path_of_somebodys_machine() -> None:
    places = "|".join(["home", "Users", "root", "work", "opt", "mnt"])
    pattern = re.compile(rf"(?<![\w./~-])/(?:{places})/\w|[A-Z]:\\\\?Users")
    wrong: list[str] = []
    for path in sorted(ROOT.rglob("*")):
        parts = path.relative_to(ROOT).parts
        hidden = any(part in SKIPPED or part.startswith(".venv") or part.endswith((".egg-info", "_cache")) for part in parts)
        if hidden or path.suffix not in TEXT or not path.is_file() or path.stat().st_size > 2**21:
            continue
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if found := pattern.search(line):
                wrong.append(f"{shown(path, number)}: {found.group()}")
    assert not wrong


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_the_wheel_holds_all_code_models_and_assets_and_nothing_else(tmp_path: Path) -> None:
    tree = tmp_path / "tree"  # a copy: a build leaves folders behind, and old ones hide what is missing
    for name in (*ORDER, "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE", "tests"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name)  # with its __pycache__
        else:
            shutil.copy(source, tree / name)
    done = subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(tmp_path), str(tree)],
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        held = {name for name in archive.namelist() if ".dist-info/" not in name}
        notes = archive.read(next(name for name in archive.namelist() if name.endswith("entry_points.txt"))).decode()
    expected = {
        f"headscope/{path.relative_to(ROOT).as_posix()}"
        for package in ORDER
        for path in (ROOT / package).rglob("*")
        if path.is_file()
        and "__pycache__" not in path.parts
        and (path.suffix in (".py", ".json", ".c") or path.name == "py.typed" or {"assets", "embedded"} & set(path.parts))
    }
    assert held == expected
    assert {"headscope/probe/embedded/lm/model.safetensors", "headscope/probe/embedded/vit/model.safetensors"} <= held
    assert "headscope=headscope.app.cli:main" in notes.replace(" ", "")
