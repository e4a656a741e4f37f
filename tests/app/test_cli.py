"""The command line: results on stdout, progress on stderr, one line and exit code 2 on bad input."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from headscope.app.cli import main
from headscope.kernels.errors import HeadscopeError, InputError
from headscope.probe import Capture, Keep, Probe, load
from headscope.probe.models import embedded_folder, tokenize

COMMANDS = ("sites", "capture", "edit", "attribute", "health", "atlas", "report", "app", "doctor")
Shell = pytest.CaptureFixture[str]


def said(capsys: Shell, *arguments: object, code: int = 0) -> str:
    """What a command prints on stdout; it must end with `code`."""
    ended = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert ended == code, captured.err
    return captured.out


def read(capsys: Shell, *arguments: object, code: int = 0) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(said(capsys, *arguments, "--json", code=code))
    return found


def refused(capsys: Shell, *arguments: object) -> str:
    """The one line that bad input gets."""
    ended = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("error: ")]
    assert (ended, captured.out, len(lines)) == (2, "", 1), captured
    assert "Traceback" not in captured.err
    return lines[0]


def needs(name: str) -> None:
    try:
        embedded_folder(name)
    except HeadscopeError as error:
        pytest.skip(str(error))


def test_help_is_quick_and_imports_nothing_heavy() -> None:
    code = (
        "import sys, time; start = time.perf_counter(); from headscope.app.cli import main; main(['--help']);"
        "print(time.perf_counter() - start, [m for m in ('torch', 'dash', 'numpy', 'transformers') if m in sys.modules], file=sys.stderr)"
    )
    started = time.perf_counter()
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    seconds, heavy = found.stderr.strip().split(" ", 1)
    assert heavy == "[]"
    assert float(seconds) < 0.5
    assert time.perf_counter() - started < 5
    for command in COMMANDS:
        assert command in found.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help_with_an_example_and_json(command: str, capsys: Shell) -> None:
    text = said(capsys, command, "--help")
    assert f"example: headscope {command}" in text
    assert "--json" in text


def test_version_is_that_of_the_distribution(capsys: Shell) -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+\S*\n", said(capsys, "--version"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ([], "required: command"),
        (["explode"], "invalid choice"),
        (["sites", "--modle", "x"], "unrecognized arguments"),
        (["sites", "--model", "no-such-folder/x/y"], "no model"),
        (["sites", "--text", "a", "--text-file", "b"], "not allowed with"),
        (["capture"], "give --keep statistics to look at every head, --png FILE to draw them, --out DIR"),
        (["capture", "--out", "x", "--show", "y"], "--out DIR"),
        (["capture", "--keep", "qk"], "--keep qk is kept in a folder: give --out DIR"),
        (["capture", "--keep", "pooled"], "--keep pooled is kept in a folder: give --out DIR, or --png FILE"),
        (["capture", "--keep", "statistics", "--tokens", "0"], "--tokens 0: give a number from 1 up"),
        (["capture", "--png", "x.png", "--tile", "0"], "--tile 0: the side of a tile"),
        (["capture", "--keep", "statistics", "--tile", "4"], "--png FILE or --keep pooled"),
        (["capture", "--out", "x", "--keep", "everything"], "there are qk, pattern"),
        (["capture", "--out", "x", "--layers", "1-"], "give numbers such as"),
        (["capture", "--out", "x", "--layers", "4-2"], "2 is less than 4"),
        (["capture", "--show", "nowhere"], "say which head"),
        (["capture", "--show", "nowhere", "--layer", "3", "--head", "5"], "there is no capture 'nowhere'"),
        (["app", "--port", "70000"], "0 to 65535"),
        (["app", "--threads", "0"], "from 1 up"),
        (["app", "--host", "0.0.0.0"], "binds 127.0.0.1 only"),
        (["app", "--json"], "no JSON output"),
    ],
)
def test_bad_arguments_get_one_line_and_exit_code_two(arguments: list[str], reason: str, capsys: Shell) -> None:
    assert reason in refused(capsys, *arguments)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["capture", "--keep", "statistics", "--tokens", "257"], "--tokens 257: the context window of this model is 256 tokens"),
        (["capture", "--keep", "statistics", "--text", "", "--tokens", "9"], "the tokenizer makes no token of ''"),
        (["capture", "--keep", "statistics", "--text", "\udcff", "--tokens", "9"], "UTF-8"),
        (["sites", "--device", "quantum"], "no device 'quantum'"),
        (["sites", "--dtype", "int8"], "float"),
    ],
)
def test_what_the_model_does_not_have_is_named(arguments: list[str], reason: str, tiny: Path, capsys: Shell) -> None:
    assert reason in refused(capsys, *arguments, "--model", tiny)


def test_control_characters_of_a_name_do_not_reach_the_terminal(capsys: Shell) -> None:
    line = refused(capsys, "sites", "--model", "\x1b[31mred\u202e")
    assert "\x1b" not in line
    assert "\u202e" not in line


def test_sites_lists_six_layers_of_eight_heads(tiny: Path, capsys: Shell) -> None:
    found = read(capsys, "sites", "--model", tiny)
    assert found["schema"] == "headscope.sites/v1"
    assert found["fingerprint"].startswith("sha256:")
    assert [(site["layer"], site["query_heads"], site["kv_heads"], site["key_dim"]) for site in found["sites"]] == [
        (layer, 8, 4, 16) for layer in range(6)
    ]
    table = said(capsys, "sites", "--model", tiny, "--text", "hi")
    assert "model.layers.3.self_attn#0" in table
    assert "6 sites, 48 heads" in table


def test_a_capture_is_read_back_one_head_at_a_time(tiny: Path, tmp_path: Path, capsys: Shell) -> None:
    folder = tmp_path / "run"
    made = read(capsys, "capture", "--model", tiny, "--text", "hello there", "--out", folder)
    assert (made["schema"], made["folder"], len(made["sites"])) == ("headscope.capture/v1", str(folder), 6)
    head = read(capsys, "capture", "--show", folder, "--layer", 3, "--head", 5)
    assert head["shape"] == [11, 11]
    expected = Capture.open(folder).pattern(layer=3, heads=[5])[0, 0]
    assert torch.equal(torch.tensor(head["pattern"]), expected)
    some = read(capsys, "capture", "--show", folder, "--layer", 3, "--head", 5, "--rows", "0,9-10")
    assert some["queries"] == [0, 9, 10]
    assert torch.equal(torch.tensor(some["pattern"]), expected[[0, 9, 10]])


def test_a_head_is_printed_as_a_table_and_drawn(tiny: Path, tmp_path: Path, capsys: Shell) -> None:
    folder, picture = tmp_path / "run", tmp_path / "head.png"
    said(capsys, "capture", "--model", tiny, "--text", "hello", "--out", folder)
    table = said(capsys, "capture", "--show", folder, "--layer", 0, "--head", 0, "--png", picture)
    assert table.splitlines()[2].split() == ["0", "1.000", "·", "·", "·", "·"]
    with Image.open(picture) as image:
        assert image.size == (5, 5)
    said(capsys, "capture", "--model", tiny, "--text", "a longer text than sixteen tokens", "--out", tmp_path / "long")
    assert "entropy (nats)" in said(capsys, "capture", "--show", tmp_path / "long", "--layer", 0, "--head", 0)


def test_a_capture_keeps_what_is_asked_and_overwrites_only_when_told(tiny: Path, tmp_path: Path, capsys: Shell) -> None:
    folder = tmp_path / "run"
    options = [
        "--model",
        tiny,
        "--text",
        "hello",
        "--out",
        folder,
        "--layers",
        "1,3-4",
        "--heads",
        "0,5",
        "--keep",
        "pattern,z",
        "--keep",
        "statistics",
    ]
    made = read(capsys, "capture", *options)
    assert [site["layer"] for site in made["sites"]] == [1, 3, 4]
    assert {"pattern", "z"} <= set(made["kept"])
    assert "q" not in made["kept"]
    assert "exists already" in refused(capsys, "capture", *options)
    read(capsys, "capture", *options, "--overwrite")
    assert "head 1" in refused(capsys, "capture", "--show", folder, "--layer", 3, "--head", 1)
    assert "layers" in refused(capsys, "capture", "--show", folder, "--layer", 0, "--head", 0)
    assert "no query 9" in refused(capsys, "capture", "--show", folder, "--layer", 3, "--head", 5, "--rows", 9)


def test_heads_are_summed_up_without_a_folder(tiny: Path, tmp_path: Path, capsys: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    found = read(capsys, "capture", "--model", tiny, "--text", "hello", "--tokens", 12, "--keep", "statistics")
    assert not list(tmp_path.iterdir())
    assert (found["schema"], found["tokens"], len(found["heads"])) == ("headscope.heads/v1", 12, 48)
    assert found["seconds"] > 0
    assert found["peak_bytes"] >= 0
    model, tokenizer = load(tiny)
    with torch.no_grad(), Probe(model).capture(Keep(pattern=True, scores=True)) as seen:
        model(**tokenize(tokenizer, "hellohellohe", model))
    for head in found["heads"]:
        pattern = seen.pattern(head["layer"], heads=head["head"])[0, 0].double()
        received = pattern.sum(0)
        assert head["entropy"] == pytest.approx(float(-torch.xlogy(pattern, pattern).sum(-1).mean()), abs=1e-5)
        assert head["p_max"] == pytest.approx(float(pattern.amax(-1).mean()), abs=1e-5)
        assert float(received[head["key"]]) == pytest.approx(float(received.max()), abs=1e-5)
        assert head["share"] == pytest.approx(float(received.max()) / 12, abs=1e-5)
        assert head["max_score"] == pytest.approx(float(seen.scores(head["layer"])[0, head["head"]].max()), abs=1e-4)
    table = said(capsys, "capture", "--model", tiny, "--tokens", 12, "--keep", "statistics", "--layers", 2, "--heads", "1,5")
    lines = table.splitlines()
    assert [line.split()[:2] for line in lines[2:4]] == [["2", "1"], ["2", "5"]]
    assert re.fullmatch(
        r"2 heads, 12 tokens: \d+\.\d\d s, memory in use grew by at most \S+ \w+; their whole maps in float32 would be 1.1 KiB", lines[-1]
    )


def test_a_site_that_runs_twice_has_a_line_for_each_time(tiny: Path, capsys: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from headscope.app import case

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = nn.Linear(4, 12)

        def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
            x = nn.functional.one_hot(input_ids % 4, 4).float()[:, None]
            for _ in range(2):
                q, k, v = self.proj(x).chunk(3, -1)
                weights = (q @ k.mT).exp().tril()
                x = x + weights / weights.sum(-1, keepdim=True) @ v
            return x

    tokenizer = load(tiny)[1]
    monkeypatch.setattr(case, "load", lambda name, **_: (Twice(), tokenizer))
    lines = said(capsys, "capture", "--keep", "statistics", "--text", "abc").splitlines()
    assert len(lines) == 6
    assert len({line.split()[0] for line in lines[2:4]}) == 2


@pytest.mark.parametrize("count", [5, 11, 12, 40])
def test_tokens_repeats_or_cuts_the_text_and_leaves_what_surrounds_it(count: int, tiny: Path, tmp_path: Path, capsys: Shell) -> None:
    from tokenizers.processors import TemplateProcessing

    from headscope.app.case import _repeated

    model, tokenizer = load(tiny)
    plain = tokenizer("hello there")["input_ids"]
    assert _repeated(tokenizer, "hello there", model, count)["input_ids"][0].tolist() == (plain * 4)[:count]
    tokenizer.add_special_tokens({"cls_token": "<b>", "sep_token": "<br>"})
    first, last = tokenizer.cls_token_id, tokenizer.sep_token_id
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<b> $A <br>", special_tokens=[("<b>", first), ("<br>", last)])
    found = _repeated(tokenizer, "hello there", model, count)
    assert found["input_ids"][0].tolist() == [first, *(plain * 4)[: count - 2], last]
    assert found["attention_mask"].tolist() == [[1] * count]
    with pytest.raises(InputError, match="--tokens 2: give at least 3"):
        _repeated(tokenizer, "hello there", model, 2)


def test_looking_at_a_long_text_needs_a_small_part_of_the_memory_of_its_maps(tmp_path: Path, capsys: Shell) -> None:
    from tests.app.tiny import save_tiny

    model = save_tiny(tmp_path / "model", layers=3, window=2048)
    found = read(capsys, "capture", "--model", model, "--tokens", 2048, "--keep", "statistics", "--png", tmp_path / "heads.png")
    assert (found["tokens"], len(found["heads"])) == (2048, 24)
    assert found["peak_bytes"] < 4 * 24 * 2048 * 2048 / 3
    with Image.open(tmp_path / "heads.png") as image:
        assert image.width > 8 * 256
        assert image.height > 3 * 256


def test_all_heads_are_drawn_as_shares_of_their_queries_attention(tiny: Path, tmp_path: Path, capsys: Shell) -> None:
    from headscope.app import pictures
    from headscope.app.capture_command import _shares, _shown

    folder, picture = tmp_path / "run", tmp_path / "heads.png"
    arguments = ["--model", tiny, "--text", "hello there", "--png", picture, "--tile", 4]
    made = read(capsys, "capture", *arguments, "--out", folder)
    assert {"q", "k", "statistics.pooled"} <= set(made["kept"])
    seen = Capture.open(folder)
    pattern = seen.pattern(layer=3)[0]
    shares = _shares(seen.records["model.layers.3.self_attn#0", 0])
    for i, j in ((0, 0), (1, 0), (2, 0), (2, 2), (0, 2)):
        expected = pattern[:, 4 * i : 4 * i + 4, 4 * j : 4 * j + 4].sum((1, 2)) / (4 if i < 2 else 3)  # 11 queries: the last tile has 3
        torch.testing.assert_close(shares[:, i, j], expected, atol=1e-6, rtol=0)
    torch.testing.assert_close(shares.sum(-1), torch.ones(8, 3))
    with Image.open(picture) as image:
        shown = np.asarray(image.convert("P"))
    colours = pictures.indices(_shown(shares), "log")
    assert set(np.unique(colours)) <= set(np.unique(shown))
    assert (shown == pictures.MASKED).any()
    said(capsys, "capture", *arguments[:-2], "--layers", 1)
    assert "cannot be written" in refused(capsys, "capture", "--model", tiny, "--png", tmp_path / "no" / "x.png")


def test_memory_that_a_run_needs_and_returns_is_seen() -> None:
    from headscope.probe.footprint import measure

    size = 64 * 2**20
    result, cost = measure(lambda: torch.ones(size // 4).sum().item(), torch.device("cpu"))
    assert result == size // 4
    assert cost.seconds > 0
    if cost.peak_bytes is not None and Path("/proc/self/clear_refs").exists():
        assert 0.9 * size < cost.peak_bytes < 2 * size
    with pytest.raises(ZeroDivisionError):
        measure(lambda: 1 / 0, torch.device("cpu"))


def test_progress_goes_to_stderr(tiny: Path, capsys: Shell) -> None:
    assert main(["sites", "--model", str(tiny), "--json"]) == 0
    captured = capsys.readouterr()
    assert "loading" in captured.err
    assert len(captured.out.splitlines()) == 1


def test_digits_can_be_looked_at_and_edited(capsys: Shell) -> None:
    needs("vit")
    assert len(read(capsys, "sites", "--model", "embedded:vit")["sites"]) == 4
    found = read(capsys, "edit", "--model", "embedded:vit", "--image", 3, "--scale", "1.2=0")
    assert found["predicts"] == "class"
    assert {row["class"] for row in found["rows"]} == {str(digit) for digit in range(10)}
    assert "no image 99999" in refused(capsys, "edit", "--model", "embedded:vit", "--image", 99999, "--scale", "1.2=0")
    assert "reads images" in refused(capsys, "edit", "--model", "embedded:vit", "--text", "x", "--scale", "1.2=0")


def test_doctor_tells_what_is_there_and_fails_when_a_check_fails(capsys: Shell) -> None:
    code = main(["doctor", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert found["schema"] == "headscope.doctor/v1"
    assert {"versions", "python", "platform", "devices", "kernels", "mechanisms", "optional", "checks", "passed"} <= set(found)
    assert code == (0 if all(check["passed"] for check in found["checks"]) else 1)
    assert found["passed"] == (code == 0)


def test_doctor_says_which_kernel_runs_and_why_another_does_not(capsys: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from headscope.kernels.cpu import build

    def kernels() -> dict[str, dict[str, str]]:
        main(["doctor", "--json"])
        return {row["name"]: row for row in json.loads(capsys.readouterr().out)["kernels"]}

    found = kernels()
    assert set(found) == {"triton", "cpu", "blockwise", "reference"}
    assert sum("runs float32 on" in row["state"] for row in found.values()) == 1
    if not torch.cuda.is_available() and find_spec("triton") is not None:
        from headscope.kernels.triton import launch

        monkeypatch.setattr(launch, "INTERPRETED", False)  # as it is outside of these tests
        assert kernels()["triton"]["state"].startswith("unusable (")
        assert found["cpu"]["state"] == ("usable, runs float32 on cpu" if build.state()[0] else f"unusable ({build.state()[1]})")
        monkeypatch.setenv("HEADSCOPE_CPU_KERNEL", "0")
        without = kernels()
        assert "switched off by HEADSCOPE_CPU_KERNEL=0" in without["cpu"]["state"]
        assert without["blockwise"]["state"] == "usable, runs float32 on cpu"


def test_doctor_fails_on_a_model_whose_edits_do_nothing(capsys: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    from headscope.probe import models

    monkeypatch.setattr(models, "EMBEDDED", {})
    text = said(capsys, "doctor", code=1)
    assert "FAILED" in text
    assert "checks failed." in text


def test_the_embedded_language_model_passes_the_doctor(capsys: Shell) -> None:
    needs("lm")
    found = read(capsys, "doctor")
    assert {check["name"]: check["passed"] for check in found["checks"]} == dict.fromkeys(
        (check["name"] for check in found["checks"]), True
    )
    assert "48 of 48" in json.dumps(found["checks"])


def test_the_embedded_language_model_has_its_heads_listed(capsys: Shell) -> None:
    needs("lm")
    found = read(capsys, "sites", "--model", "embedded:lm")
    assert [site["query_heads"] for site in found["sites"]] == [8] * 6
    assert all(site["kv_heads"] < 8 for site in found["sites"])
