"""The benchmark of the kernels works: timings, tables and verdicts at tiny sizes, the GPU's part too, in triton's interpreter.

No time is asserted.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import gpu, kernels, tune
from bench.attentions import BACKWARD, FORWARD, Variant, make_inputs
from bench.interception import Memory, Timing
from bench.kernels import MEASURED, Report, Row, measure, nbytes, report_memory
from bench.machine import this_machine
from headscope.kernels.attention import attention

COMPILED = {"flex", "flex-lse"}  # compiling takes longer than all other tests of this file
MEBIBYTE = 2**20

# Runs everything of the GPU's part but the compiled peer, on what the interpreter of triton can do in seconds.
ON_A_CPU = """
import json, torch
from bench import gpu, tune

torch.set_num_threads(1)
def refused():
    raise RuntimeError("not compiled here")
gpu._flex = lambda inputs: refused
settings = gpu.Settings(widths=(16,), lengths=(40,), heads=2, groups=1, tokens=40, checked=40, warm_ups=0, repeats=2, product=16,
                        copied=64, device="cpu", dtype=torch.float32)
report = gpu.run(settings, gpu.WallClock())
table = tune.tune(settings, gpu.WallClock(), [(16, 16, 4, 1)])
print(json.dumps([report.to_dict(), gpu.to_markdown(report), table, tune.written(table)]))
"""


def missing(name: str) -> Variant:
    """A variant of the table that cannot run here."""

    def run(inputs: object) -> None:
        raise RuntimeError("\nno compiler | here\nsecond line")

    found = next(variant for variant in FORWARD if variant.name == name)
    return replace(found, run=run)


@pytest.fixture(scope="module")
def report() -> Report:
    variants = [missing(variant.name) if variant.name in COMPILED else variant for variant in FORWARD]
    forward, backward, absent = [], [], {}
    for causal in (True, False):
        row, found = measure(variants, make_inputs(48, causal, width=8), rounds=2, repeats=2)
        forward.append(row)
        absent |= found
        row, found = measure(BACKWARD, make_inputs(48, causal, width=8), rounds=2)
        backward.append(row)
        absent |= found
    memory = {name: Memory(40 * MEBIBYTE, 20 * MEBIBYTE) for name in MEASURED} | {"blockwise": Memory(90 * MEBIBYTE, 20 * MEBIBYTE)}
    return Report(this_machine(["torch"]), forward, backward, memory, 8192, absent, None)


@pytest.mark.parametrize("causal", [True, False])
def test_all_who_compute_the_output_compute_the_same(causal: bool) -> None:
    inputs = make_inputs(40, causal, width=8)
    right = torch.nn.functional.scaled_dot_product_attention(*(t.double() for t in (inputs.q, inputs.k, inputs.v)), is_causal=causal)
    for variant in FORWARD:
        if variant.name not in COMPILED:
            result = variant.run(inputs)
            output = result if isinstance(result, torch.Tensor) else result[0]
            torch.testing.assert_close(output.double(), right, rtol=0, atol=1e-5, msg=lambda text, name=variant.name: f"{name}: {text}")


def test_eager_statistics_are_those_of_the_op() -> None:
    inputs = make_inputs(40, True, width=8)
    eager = next(variant for variant in FORWARD if variant.name == "eager-statistics").run(inputs)
    _, ours = attention(inputs.q, inputs.k, inputs.v, causal=True, implementation="reference")
    names = ("lse", "entropy", "p_max", "argmax", "max_score", "sum_squares")
    for name, found in zip(names, eager[1:], strict=True):
        torch.testing.assert_close(found, getattr(ours, name), rtol=0, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("causal", [True, False])
def test_relevance_by_every_way_is_half_or_a_quarter_of_the_gradients(causal: bool) -> None:
    inputs = make_inputs(24, causal, width=8)
    runs = {variant.name: variant.run(inputs) for variant in BACKWARD}
    for name in ("relevance-stock", "relevance-blockwise"):
        for found, gradient, part in zip(runs[name][:3], runs["backward"], (0.25, 0.25, 0.5), strict=True):
            torch.testing.assert_close(found, part * gradient, rtol=1e-4, atol=1e-5)
    for again, gradient in zip(runs["forward-backward"], runs["backward"], strict=True):
        torch.testing.assert_close(again, gradient)


def test_visible_pairs_are_counted_exactly() -> None:
    for causal in (True, False):
        inputs = make_inputs(7, causal, heads=3, width=4)
        ones = torch.ones(7, 7).tril() if causal else torch.ones(7, 7)
        assert inputs.visible == 3 * int(ones.sum())


def test_every_variant_that_can_run_was_timed_in_every_round(report: Report) -> None:
    for row in report.forward:
        assert set(row.timings) == {variant.name for variant in FORWARD} - COMPILED
        assert all(len(timing.seconds) == 2 for timing in row.timings.values())
        assert row.timings["sdpa"].ratios == (1.0, 1.0)
    assert all(set(row.timings) == {variant.name for variant in BACKWARD} for row in report.backward)


def test_what_cannot_run_is_reported_with_the_first_line_of_its_reason(report: Report) -> None:
    assert report.absent == dict.fromkeys(COMPILED, "cannot run: no compiler / here")
    lines = report.to_markdown().splitlines()
    assert "Missing: `flex` cannot run: no compiler / here. `flex-lse` cannot run: no compiler / here." in lines
    assert next(line for line in lines if line.startswith("| `flex`")).endswith("| – | – |")


def test_a_variant_is_not_run_beyond_its_longest_sequence() -> None:
    short = replace(FORWARD[0], name="short", most=16)
    row, absent = measure([FORWARD[0], short], make_inputs(17, True, width=4), rounds=1)
    assert set(row.timings) == {"sdpa"}
    assert absent == {}
    row, _ = measure([FORWARD[0], short], make_inputs(16, True, width=4), rounds=1)
    assert set(row.timings) == {"sdpa", "short"}


def test_the_tables_have_equal_columns_and_a_row_for_every_variant(report: Report) -> None:
    blocks = [block.splitlines() for block in report.to_markdown().split("\n\n") if block.startswith("|")]
    for block in blocks:
        assert len({line.count("|") for line in block}) == 1
    assert [line.split("|")[1].strip() for line in blocks[0][2:]] == [f"`{variant.name}`" for variant in FORWARD]
    assert "## GPU\n\nNot measured: this machine has none" in report.to_markdown()


def test_time_per_pair_and_equal_work_follow_from_the_medians(report: Report) -> None:
    full = Row(10, False, 800, {"sdpa": Timing((8e-9,), (1.0,)), "cpu": Timing((8e-9,), (1.0,))})
    causal = Row(10, True, 440, {"sdpa": Timing((6.6e-9,), (1.0,)), "cpu": Timing((5.5e-9,), (1.0,))})
    assert full.per_pair("sdpa") == pytest.approx(10.0)
    assert causal.per_pair("cpu") == pytest.approx(12.5)
    assert causal.per_pair("blockwise") is None
    table = replace(report, forward=[causal, full], backward=[], absent={"blockwise": "not here"}).to_markdown()
    assert "| 10 | 15 | 10 | 12 | 10 | 1.25 |" in table


def test_verdicts_follow_the_limits(report: Report) -> None:
    peaks = {target.promise: target for target in report.targets() if target.promise.startswith("peak")}
    assert {target.measured: target.verdict for target in peaks.values()} == {20.0: "pass", 70.0: "miss"}
    timings = {"sdpa": Timing((1.0,), (1.0,)), "cpu": Timing((1.3,), (1.3,)), "blockwise": Timing((4.1,), (4.1,))}
    found = replace(report, forward=[Row(512, False, 1, timings)], memory={}).targets()
    assert [(target.where, target.verdict) for target in found[:2]] == [("512, full", "pass"), ("512, full", "miss")]
    assert {target.verdict for target in found[2:]} == {"not measured"}


def test_the_record_is_plain_json(report: Report) -> None:
    record = json.loads(json.dumps(report.to_dict()))
    assert record["machine"]["versions"]["torch"]
    assert record["forward"][0]["timings"]["cpu"]["seconds"]
    assert record["gpu"] is None
    assert record["memory"]["cpu"] == {"rise": 40 * MEBIBYTE, "kept": 20 * MEBIBYTE}


def test_memory_of_a_call_counts_what_came_out() -> None:
    found = report_memory(next(variant for variant in FORWARD if variant.name == "blockwise"), 64)
    output, rows = 8 * 64 * 64 * 4, 8 * 64 * (5 * 4 + 8)
    assert found.kept == output + rows
    assert found.rise >= 0


def test_bytes_are_counted_through_tuples_and_statistics() -> None:
    result = attention(*(torch.zeros(1, 2, 3, 4) for _ in range(3)), keep=("lse", "argmax"), implementation="reference")
    assert nbytes((result, None, [torch.zeros(5)])) == 2 * 3 * 4 * 4 + 6 * 4 + 6 * 8 + 20


def test_a_quick_run_prints_and_records_nothing_and_a_full_one_joins_the_page(
    report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(kernels, "run", lambda settings: report)
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(command, "PAGE", tmp_path / "bench.md")
    assert command.main(["kernels", "--quick"]) == 0
    assert "Cost of statistics" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert command.main(["kernels"]) == 0
    page = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert "\n## Cost of statistics\n" in page
    assert "\n### Equal work\n" in page


def test_the_whole_run_passes_through_every_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "measure_memory", lambda variant, length: Memory(length, 0))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = kernels.run(kernels.Settings({16: 1, 24: 1}, {16: 2}, {8: 1}, 32, ("flex", "flex-lse", "eager", "cpu-all")))
    assert [(row.length, row.causal) for row in found.forward] == [(16, True), (16, False), (24, True), (24, False)]
    assert [(row.length, row.causal) for row in found.backward] == [(8, True), (8, False)]
    assert found.memory == dict.fromkeys(["sdpa", "cpu", "blockwise"], Memory(32, 0))
    assert found.absent == dict.fromkeys(["flex", "flex-lse", "eager", "cpu-all"], "was left out")


@pytest.mark.slow
@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
def test_the_gpu_part_runs_through_in_the_interpreter() -> None:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", ON_A_CPU], cwd=kernels.ROOT, capture_output=True, text=True, timeout=110,
        env={**os.environ, "TRITON_INTERPRET": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    record, lines, table, written = json.loads(done.stdout.splitlines()[-1])
    own = {name for name in gpu.LABELS if name.startswith(("own", "columns", "map", "relevance", "backward"))}
    for row in record["rows"]:
        assert own <= set(row["spreads"])
        assert row["absent"]["flex-lse"] == "cannot run: not compiled here"
        assert set(row["spreads"]) | set(row["absent"]) == set(gpu.LABELS)
    assert record["errors"].keys() == gpu.TOLERANCES.keys()
    assert lines[0] == "## GPU"
    assert sum(line.startswith("| `own-statistics`") for line in lines) == 2
    assert {table["interpreter"][kernel]["single"]["16"][0] for kernel in ("forward", "columns", "rows", "top")} == {16}
    assert table["source"] == "tuned on cpu"
    assert json.loads(written) == table


def test_what_tuning_writes_differs_from_the_record_only_in_what_was_tuned() -> None:
    recorded = (kernels.ROOT / "kernels" / "triton" / "configurations.json").read_text(encoding="utf-8")
    assert tune.written(json.loads(recorded)) == recorded


def test_tuning_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(RuntimeError, match="tuning needs a GPU"):
        command.main(["kernels", "--quick", "--tune"])


def gpu_report(length: int = 32768) -> gpu.Report:
    times = {
        "sdpa-flash": 2.0, "sdpa-cudnn": 1.0, "own": 2.0, "own-statistics": 1.04, "columns": 1.0, "map": 2.0, "backward": 10.0,
        "relevance-fused": 14.0,
    }  # fmt: skip
    spreads = {name: gpu.Spread(time, time, time) for name, time in times.items()}
    row = gpu.Row(128, length, True, 1, spreads, dict.fromkeys(times, 50 * MEBIBYTE), {"flex-lse": "cannot run: x"})
    return gpu.Report("a GPU", 700.0, 4e12, {"lse": 1e-6}, [row])


def test_the_promises_of_a_gpu_follow_from_its_medians() -> None:
    found = {target.promise.removeprefix("GPU: "): target for target in gpu.targets(gpu_report())}
    measured = {promise: (target.measured, target.verdict) for promise, target in found.items()}
    assert measured["one-pass statistics over the best `sdpa`"] == (1.04, "pass")
    assert measured["`columns` over `own`"] == (0.5, "pass")
    assert measured["AttnLRP over `backward`"] == (1.4, "miss")
    assert measured["MiB of statistics beyond inputs and outputs"] == (50.0, "pass")
    ratio, verdict = measured["copy rate over the rate of the map of one head"]
    assert ratio is not None
    assert math.isclose(ratio, 4e12 / (4 * 32768**2 / 2e-3))
    assert verdict == "miss"


def test_without_a_gpu_its_promises_are_not_measured() -> None:
    assert {target.verdict for target in gpu.targets(None)} == {"not measured"}
    assert {target.promise for target in gpu.targets(None)} == {target.promise for target in gpu.targets(gpu_report())}


def test_wrong_numbers_stop_the_gpu_part_before_anything_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "check", lambda settings: dict.fromkeys(gpu.TOLERANCES, 0.0) | {"lse": math.nan})
    with pytest.raises(RuntimeError, match="lse differs from the reference by nan, more than 1e-03: nothing was timed"):
        gpu.run(gpu.QUICK, gpu.WallClock())


def test_a_variant_that_cannot_run_on_the_gpu_is_reported_and_the_others_are_timed() -> None:
    def broken() -> object:
        raise RuntimeError("No available kernel. Aborting execution.")

    spreads, beyond, absent = gpu.measure({"good": lambda: torch.zeros(4), "broken": broken}, gpu.WallClock(), 1, 3)
    assert set(spreads) == {"good"}
    assert beyond == {"good": -16}
    assert absent == {"broken": "cannot run: No available kernel. Aborting execution."}
