"""The benchmark's own code works: timings, tables and verdicts on a tiny model, and a missing peer is said to be missing.

No time is asserted.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from bench import __main__ as command
from bench import attribution, health, interception, saferope, variants, ways
from bench.interception import Memory, Report, Timing, measure, over, report_memory
from bench.machine import this_machine
from bench.variants import DECODE, FORWARD, Models, Shape, Variant
from headscope.probe.attribution.attribute import attribute
from headscope.probe.health.measure import measure_health

TINY = Shape(layers=2, heads=8, head_width=4, vocabulary=64, positions=256)
PEERS = ("transformer-lens", "nnsight")
DECODED = {"plain", "patterns"}

pytestmark = pytest.mark.filterwarnings("ignore")  # the libraries' own


def missing(name: str) -> Variant:
    """A variant of the table whose library is nowhere."""
    found = next(v for v in FORWARD if v.name == name)
    return Variant(found.name, found.tool, found.label, found.run, requires="a_library_that_nobody_wrote")


@pytest.fixture(scope="module")
def models() -> Models:
    return Models(TINY)


@pytest.fixture(scope="module")
def report(models: Models) -> Report:
    rows = [missing(v.name) if v.name in PEERS else v for v in FORWARD]
    forward, absent = measure(models, rows, 16, rounds=2, repeats=1)
    decode, _ = measure(models, [v for v in DECODE if v.name in DECODED], 8, rounds=1, repeats=1)
    sizes = {"plain": Memory(2**20, 0), "patterns": Memory(3 * 2**20, 2**21), "eager-patterns": Memory(2**23, 2**21)}
    return Report(this_machine(["torch", "a-distribution-that-nobody-made"]), TINY, {16: forward}, decode, {16: sizes}, absent)


def test_every_variant_but_the_missing_peers_was_timed_in_every_round(report: Report) -> None:
    assert set(report.forward[16]) == {v.name for v in FORWARD} - set(PEERS)
    assert all(len(t.seconds) == 2 for t in report.forward[16].values())
    assert set(report.decode) == DECODED
    assert report.forward[16]["plain"].ratios == (1.0, 1.0)


def test_a_missing_peer_is_reported_as_not_installed(report: Report) -> None:
    assert report.absent == dict.fromkeys(PEERS, "not installed")
    lines = report.to_markdown().splitlines()
    for name in PEERS:
        assert "not installed" in next(line for line in lines if line.startswith(f"| `{name}`"))
    assert [t.verdict for t in report.targets() if "nnsight" in t.promise] == ["not measured"]


def test_a_peer_that_breaks_at_import_is_reported_with_its_reason(models: Models) -> None:
    def broken(models: Models, ids: object) -> int:
        raise ImportError("no module named torchvision")

    _, absent = measure(models, [FORWARD[0], Variant("broken", "x", "x", broken)], 8, rounds=1, repeats=1)
    assert absent == {"broken": "cannot be imported (no module named torchvision)"}


def test_the_table_has_a_row_for_every_variant_and_equal_columns(report: Report) -> None:
    lines = [line for line in report.to_markdown().splitlines() if line.startswith("|")]
    first = lines[: 2 + len(FORWARD)]
    assert [line.split("|")[1].strip() for line in first[2:]] == [f"`{v.name}`" for v in FORWARD]
    assert len({line.count("|") for line in first}) == 1
    assert "| 3 | " in next(line for line in first if line.startswith("| `patterns`"))


def test_verdicts_follow_the_limits(report: Report) -> None:
    peak = next(t for t in report.targets() if t.promise.startswith("peak"))
    assert (peak.measured, peak.verdict) == (1.0, "pass")
    worse = Report(report.machine, TINY, {}, {}, {16: {"plain": Memory(10, 0), "patterns": Memory(110, 90)}}, {})
    assert [t.verdict for t in worse.targets()] == ["miss"]


def test_ours_over_theirs_compares_the_same_rounds() -> None:
    ours, theirs = Timing((1.0, 2.0, 6.0), (1.0, 1.0, 1.0)), Timing((2.0, 2.0, 3.0), (1.0, 1.0, 1.0))
    assert over(ours, theirs) == 1.0
    assert over(ours, None) is None


def test_the_record_is_plain_json_and_says_which_versions_ran(report: Report) -> None:
    record = json.loads(json.dumps(report.to_dict()))
    assert record["machine"]["versions"]["a-distribution-that-nobody-made"] is None
    assert record["machine"]["versions"]["torch"]
    assert record["forward"]["16"]["patterns"]["seconds"]
    assert record["memory"]["16"]["patterns"] == {"rise": 3 * 2**20, "kept": 2**21}


def test_all_who_keep_patterns_keep_the_same_number_of_bytes(models: Models) -> None:
    ids = models.prompt(16)
    kept = {v.name: v.run(models, ids) for v in FORWARD if v.name in ("eager-patterns", "patterns", "plain", "nothing")}
    pattern_bytes = TINY.layers * TINY.heads * 16 * 16 * 4
    assert kept == {"plain": 0, "eager-patterns": pattern_bytes, "nothing": 0, "patterns": pattern_bytes}


def test_a_copying_edit_leaves_the_output_as_it_was_and_reaches_every_layer(models: Models) -> None:
    calls: list[str] = []
    ids = models.prompt(16)
    before = models.plain(ids, use_cache=False).logits

    def counted(value: object, call: object) -> object:
        calls.append(call.site.name)  # type: ignore[attr-defined]
        return variants.copied(value, call)  # type: ignore[arg-type]

    with variants.Plan([variants.Edit("z", variants.call(counted))]).on(models.plain):  # type: ignore[arg-type]
        after = models.plain(ids, use_cache=False).logits
    assert len(calls) == TINY.layers
    assert bool((before == after).all())


def test_memory_of_a_variant_counts_what_it_kept(models: Models) -> None:
    found = report_memory(next(v for v in FORWARD if v.name == "patterns"), 64, models)
    assert found.kept == TINY.layers * TINY.heads * 64 * 64 * 4
    assert found.rise >= 0


def test_an_unknown_benchmark_is_refused_with_the_valid_names(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        command.main(["speed"])
    assert stopped.value.code == 2
    assert "no benchmark 'speed': choose from interception, kernels" in capsys.readouterr().err


def test_a_quick_run_prints_and_records_nothing(
    report: Report, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(interception, "run", lambda settings: report)
    monkeypatch.setattr(command, "RESULTS", tmp_path / "results")
    monkeypatch.setattr(command, "PAGE", tmp_path / "bench.md")
    assert command.main(["interception", "--quick"]) == 0
    assert "Cost of looking and changing" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []
    assert command.main(["interception"]) == 0
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == ["interception.json", "interception.md"]
    page = (tmp_path / "bench.md").read_text(encoding="utf-8")
    assert page.startswith("# Benchmarks\n")
    assert "\n## Cost of looking and changing\n" in page


SMALL = ways.Case("tiny", "sdpa", 12)


@pytest.fixture(scope="module")
def costs() -> attribution.Report:
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv(ways.LXT, raising=False)
        times, absent, agreement = attribution.measure(SMALL, ways.WAYS, rounds=2, repeats=1)
    sizes = {("attnlrp", "sdpa"): {16: 2**20, 32: 2**21, 64: 5 * 2**20}}
    assert agreement is None
    return attribution.Report(this_machine(["torch"]), {SMALL: times}, {SMALL: absent}, {}, sizes, None)


def test_every_way_but_the_missing_peer_is_timed_in_every_round_and_the_slow_one_once(costs: attribution.Report) -> None:
    row = costs.times[SMALL]
    absent = costs.absent[SMALL]
    assert {name: len(t.seconds) for name, t in row.items()} == {w.name: 1 if w.once else 2 for w in ways.WAYS if w.name not in absent}
    assert row["gradients"].ratios == (1.0, 1.0)
    assert absent["lxt"] == "HEADSCOPE_LXT is not set"
    assert set(absent) <= {"lxt", "captum"}


def test_the_costs_table_has_equal_columns_and_says_what_is_missing(costs: attribution.Report) -> None:
    lines = [line for line in costs.to_markdown().splitlines() if line.startswith("| tiny |")]
    assert len(lines) == 1
    assert "| HEADSCOPE_LXT is not set |" in lines[0]
    head = next(line for line in costs.to_markdown().splitlines() if line.startswith("| model |"))
    assert head.count("|") == lines[0].count("|")


def test_memory_that_grows_faster_than_the_tokens_misses_its_promise(costs: attribution.Report) -> None:
    found = {t.where: t.verdict for t in costs.targets() if t.promise.startswith("peak memory")}
    assert found == {"16 → 32, sdpa": "pass", "32 → 64, sdpa": "miss"}
    assert [t.verdict for t in costs.targets() if "lxt" in t.promise] == ["not measured"]


def test_the_record_of_costs_is_plain_json(costs: attribution.Report) -> None:
    record = json.loads(json.dumps(costs.to_dict()))
    assert record["times"][0]["ways"]["attnlrp"]["seconds"]
    assert record["memory"][0]["bytes"] == {"16": 2**20, "32": 2**21, "64": 5 * 2**20}


def test_the_ways_compute_what_their_names_say() -> None:
    subject = ways.make_subject(SMALL)
    found = attribute(subject.model, subject.inputs, ways.CLASS, "gradient-x-input")
    assert torch.allclose(ways.gradients(subject), found.of_tokens(), rtol=1e-4, atol=1e-7)
    assert torch.equal(ways.attnlrp(subject), ways.attnlrp_inputs(subject))
    assert len(ways.training(subject)) == len(list(subject.model.parameters()))
    assert not any(p.requires_grad for p in subject.model.parameters())


def test_integrated_gradients_sum_to_the_difference_of_their_ends() -> None:
    pytest.importorskip("captum")
    subject = ways.make_subject(SMALL)
    ends = subject.logit(subject.start) - subject.logit(torch.zeros_like(subject.start))
    assert torch.allclose(ways.captum(subject).sum(), ends, rtol=0.1, atol=1e-3)


def test_memory_of_a_way_is_measured_after_a_first_run() -> None:
    assert attribution.report_memory("attnlrp", ways.shorter(SMALL, 64)) >= 0


@pytest.mark.slow
def test_a_peer_computes_and_is_timed_in_a_process_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lxt").mkdir()
    (tmp_path / "lxt" / "efficient.py").write_text("def monkey_patch(module): assert module.__name__.endswith('modeling_llama')\n")
    monkeypatch.setenv(ways.LXT, str(tmp_path))
    peer = ways.Peer(SMALL)
    try:
        assert torch.allclose(peer.relevance.float(), ways.gradients(ways.make_subject(SMALL)), rtol=1e-4, atol=1e-7)
        assert peer.seconds(2) > 0
    finally:
        peer.close()


@pytest.mark.slow
def test_a_peer_that_breaks_at_import_is_absent_with_its_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lxt").mkdir()
    (tmp_path / "lxt" / "efficient.py").write_text("import a_library_that_nobody_wrote\n")
    monkeypatch.setenv(ways.LXT, str(tmp_path))
    times, absent, _ = attribution.measure(SMALL, [ways.WAYS[0], next(w for w in ways.WAYS if w.name == "lxt")], 1, 1)
    assert absent == {"lxt": "cannot be imported (No module named 'a_library_that_nobody_wrote')"}
    assert set(times) == {"gradients"}


NARROW = health.Shape(layers=2, heads=2, width=16, positions=64)


@pytest.fixture(scope="module")
def looks() -> health.Report:
    times, absent = health.measure(NARROW, 16, rounds=2, spectra=1)
    sizes = {16: {"plain": 2**20, "heads": 2**20 + 1024, "health": 2**21, "eager-dense": 2**22}}
    spent = health.Overhead(60.0, 1000, [0, 500], 0.011, 0.3, 0.05)
    return health.Report(this_machine(["torch"]), NARROW, {16: times}, {16: 1}, absent, sizes, spent)


def test_every_way_to_look_at_health_is_timed_in_every_round_and_a_missing_one_is_named(looks: health.Report) -> None:
    row = looks.times[16]
    assert {name: len(t.seconds) for name, t in row.items()} == {
        way.name: 1 if way.once else 2 for way in health.WAYS if way.name not in looks.absent
    }
    assert set(looks.absent) <= {"attnspectra"}
    lines = [line for line in looks.to_markdown().splitlines() if line.startswith("| `")]
    assert [line.split("|")[1].strip() for line in lines[: len(health.WAYS)]] == [f"`{way.name}`" for way in health.WAYS]
    assert len({line.count("|") for line in lines[: len(health.WAYS)]}) == 1


def test_the_promises_about_health_follow_their_limits(looks: health.Report) -> None:
    found = {target.promise: target for target in looks.targets()}
    assert found["memory of `heads` beyond plain, over one layer's maps"].measured == 1024 / (4 * 2 * 16**2)
    assert found["monitor: time measuring over time training"].verdict == "pass"
    assert json.loads(json.dumps(looks.to_dict()))["monitor"]["measured"] == [0, 500]


def test_the_dense_script_computes_the_numbers_that_the_report_gives() -> None:
    ids = health.ids_of(24)
    report = measure_health(health.built(NARROW, "sdpa"), {"input_ids": ids}, baselines=False)
    for one, numbers in zip(report.heads, health.eager_dense(NARROW, ids), strict=True):
        for name, value in numbers.items():
            assert torch.allclose(getattr(one, name).float(), value, rtol=1e-3, atol=1e-4), name


def test_a_watched_training_loop_says_what_the_watching_cost() -> None:
    found = health.train(1.0)
    assert found.measured[0] == 0
    assert found.steps > 0
    assert found.share > 0


def test_memory_of_a_look_is_measured_after_a_first_run() -> None:
    assert health.report_memory(health.WAYS[2], NARROW, 48) >= 0


LAYER_AND_MODEL = saferope.Settings(
    saferope.Shape(heads=2, tokens=12, text=4, width=8, rank=3), health.Shape(layers=1, heads=2, width=16, positions=16), 12, (2, 2)
)


@pytest.fixture(scope="module")
def turned() -> saferope.Report:
    return saferope.run(LAYER_AND_MODEL)


@pytest.mark.slow
def test_every_way_with_saferope_is_timed_in_every_round_and_has_a_row(turned: saferope.Report) -> None:
    assert list(turned.layer) == list(saferope.layer_labels(LAYER_AND_MODEL.layer))
    assert list(turned.model) == list(saferope.MODEL_LABELS)
    assert all(len(timing.seconds) == 2 for timing in (*turned.layer.values(), *turned.model.values()))
    rows = [line for line in turned.to_markdown().splitlines() if line.startswith("| ")]
    assert len(rows) == 2 + len(turned.layer) + len(turned.model) + 1 + len(turned.targets())
    assert [target.limit for target in turned.targets()] == [1.05, 1.05, 1.0, 1.15, 1.15, 1.15, 1.15]
    assert json.loads(json.dumps(turned.to_dict()))["settings"]["layer"]["rank"] == 3


def test_what_is_timed_next_to_saferope_computes_the_same() -> None:
    layer, drawn = saferope.Attention(LAYER_AND_MODEL.layer), saferope.Turned.drawn(LAYER_AND_MODEL.layer)
    plain, expected = layer(), layer(drawn.by_exponentials(layer.q), drawn.by_exponentials(layer.k))
    with drawn.plan().on(layer):
        found = layer()
    assert torch.allclose(found, expected, atol=1e-5)
    assert not torch.allclose(found, plain, atol=1e-3)
