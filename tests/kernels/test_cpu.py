"""The compiled CPU path against the textbook, and how it is built, cached and given up."""

from __future__ import annotations

import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from headscope.kernels.cpu import build
from headscope.kernels.cpu import run as cpu
from headscope.kernels.errors import InputError
from headscope.kernels.problem import Wanted, make_problem
from headscope.kernels.statistics import NAMES, Statistics
from tests.kernels.dense import dense

if build.load() is None:
    pytest.skip(f"no compiled CPU kernel here: {build.state()[1]}", allow_module_level=True)

# Largest difference from float64 where scores stay below 3; it grows with them, as their own rounding does.
TOLERANCE = {
    "output": 8e-7, "lse": 7e-7, "entropy": 1e-6, "p_max": 4e-7, "max_score": 7e-7, "sum_squares": 2e-7, "pooled": 4e-7,
    "received": 6e-6, "rows": 4e-7, "moments": 8e-7,
}  # fmt: skip
HALF = {torch.float32: 0.0, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # rounding of an output of size 1 to 2

Given = dict[str, object]


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def make(
    batch: int = 1, heads: int = 2, groups: int = 2, queries: int = 70, keys: int = 70, width: int = 16, dtype: torch.dtype = torch.float32
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return (
        draw(batch, heads, queries, width, seed=1, dtype=dtype),
        draw(batch, groups, keys, width, seed=2, dtype=dtype),
        draw(batch, groups, keys, width + 3, seed=3, dtype=dtype),
    )


def compute(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, names: tuple[str, ...] = NAMES, **kwargs: object
) -> tuple[torch.Tensor | None, Statistics]:
    extra = dict(kwargs)
    rows, pooled = extra.pop("rows", None), extra.pop("pooled", None)
    problem = make_problem(q, k, v, **extra)  # type: ignore[arg-type]
    return cpu.run(problem, Wanted(frozenset(names), pooled, None if rows is None else tuple(rows)))  # type: ignore[arg-type]


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, loose: float = 1.0, **kwargs: object) -> Statistics:
    """Every number against the twin, NaN and infinities in the same places."""
    output, found = compute(q, k, v, **kwargs)
    expected_output, expected = dense(q, k, v, **kwargs)  # type: ignore[arg-type]
    tensors = found.tensors()
    assert tensors.keys() == expected.keys() - {"scores", "pattern"}
    assert (tensors.pop("argmax").numpy() == expected["argmax"]).all()
    if output is None:
        assert v is None
    else:
        assert output.dtype == q.dtype
        tensors["output"], expected["output"] = output, expected_output
    scores = expected["scores"]
    large = max(1.0, np.max(np.abs(scores), where=np.isfinite(scores), initial=0) / 3)
    for name, tensor in tensors.items():
        allowed = TOLERANCE[name] * large * loose + (HALF[q.dtype] if name == "output" else 0)
        size = np.nanmax(np.abs(expected[name]), initial=1) if name in ("pooled", "received", "moments", "output") else 1
        np.testing.assert_allclose(tensor.float().numpy(), expected[name], rtol=0, atol=allowed * size, err_msg=name)
    return found


CASES: dict[str, Given] = {
    "full": {},
    "causal": {"causal": True},
    "offset": {"causal": True, "offset": 5},
    "negative offset": {"causal": True, "offset": -9},
    "window": {"window": 9},
    "causal window": {"window": 9, "causal": True},
    "packed": {"lengths": [3, 40, 0, 1, 26], "causal": True},
    "packed with other keys": {"lengths": [40, 30], "key_lengths": [0, 70]},
    "softcap": {"softcap": 3.0},
    "scale": {"scale": -0.7},
    "temperature": {"temperature": torch.tensor([0.5, 2.0])},
    "gate": {"gate": torch.tensor([0.0, -2.0])},
    "sink": {"sink": torch.tensor([1.0, -3.0]), "causal": True},
    "huge sink": {"sink": torch.tensor([200.0, -torch.inf])},
    "bias": {"bias": draw(1, 2, 70, 70, seed=4), "causal": True},
    "bias of doubles": {"bias": draw(70, 70, seed=4, dtype=torch.float64)},
    "bias of halves": {"bias": draw(2, 70, 70, seed=4, dtype=torch.float16), "window": 20},
    "bias of bfloats": {"bias": draw(1, 2, 1, 70, seed=4, dtype=torch.bfloat16)},
    "bias per query": {"bias": draw(1, 2, 70, 1, seed=4)},
    "expanded bias": {"bias": draw(1, 1, 1, 70, seed=4).expand(1, 2, 70, 70)},
    "transposed bias": {"bias": draw(1, 2, 70, 70, seed=4).transpose(2, 3)},
    "hiding bias": {"bias": draw(70, 70, seed=4).masked_fill(draw(70, 70, seed=5) < 0, -torch.inf)},
    "mask": {"mask": draw(1, 2, 70, 70, seed=4) > 0, "causal": True},
    "mask per key": {"mask": draw(1, 1, 1, 70, seed=4) > 0},
    "transposed mask": {"mask": (draw(70, 70, seed=4) > 0).T},
    "mask with dead rows": {"mask": (draw(70, 1, seed=4) > 0).expand(70, 70)},
    "key bias": {"key_bias": draw(1, 2, 70, seed=4), "window": 30},
    "hiding key bias": {"key_bias": torch.zeros(70).index_fill(0, torch.arange(0, 70, 3), -torch.inf)},
    "strided key bias": {"key_bias": draw(140, seed=4)[::2]},
    "features": {"features": draw(1, 2, 70, 5, seed=6), "causal": True, "sink": torch.tensor([0.0, 1.0])},
    "shared features": {"features": draw(70, 3, seed=6), "window": 10},
    "pooled": {"pooled": 16, "causal": True},
    "pooled singly": {"pooled": 1, "window": 5},
    "pooled oddly": {"pooled": 27, "sink": torch.tensor([0.0, 1.0])},
    "pooled whole": {"pooled": 1000},
    "rows": {"rows": [3, 69, 3, 0], "causal": True, "sink": torch.tensor([0.0, 1.0])},
    "no rows": {"rows": []},
    "everything": {
        "window": 40, "softcap": 5.0, "bias": draw(2, 70, 1, seed=7), "mask": draw(70, 70, seed=8) > -1, "key_bias": draw(2, 70, seed=9),
        "temperature": torch.tensor([0.5, 2.0]), "gate": torch.tensor([0.5, 2.0]), "sink": torch.tensor([0.5, 2.0]),
        "features": draw(1, 70, 2, seed=10), "pooled": 8, "rows": [5, 66],
    },
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_every_number_is_that_of_the_textbook(name: str) -> None:
    check(*make(), **CASES[name])


@pytest.mark.parametrize("name", CASES)
def test_heads_may_share_keys(name: str) -> None:
    check(*make(heads=2, groups=1), **CASES[name])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["full", "everything"])
def test_half_precision_gives_float32_statistics(name: str, dtype: torch.dtype) -> None:
    found = check(*make(heads=2, groups=1, dtype=dtype), loose=2, **CASES[name])
    assert {tensor.dtype for tensor in found.tensors().values()} == {torch.float32, torch.int64}


@pytest.mark.parametrize(("queries", "keys"), [(1, 1), (1, 200), (200, 1), (33, 150), (150, 33), (129, 513), (300, 300)])
@pytest.mark.parametrize("causal", [False, True])
def test_queries_and_keys_may_differ_in_number(queries: int, keys: int, causal: bool) -> None:
    check(*make(queries=queries, keys=keys), causal=causal, pooled=64, rows=[queries - 1])


@pytest.mark.parametrize(("batch", "heads", "queries", "keys"), [(0, 2, 3, 3), (2, 2, 0, 3), (2, 2, 3, 0), (2, 2, 0, 0)])
def test_nothing_to_do_gives_empty_or_dead_results(batch: int, heads: int, queries: int, keys: int) -> None:
    q, k, v = make(batch, heads, heads, queries, keys)
    output, found = compute(q, k, v, pooled=2, rows=list(range(queries)), features=torch.ones(keys, 2))
    assert output is not None
    assert output.shape == (batch, heads, queries, v.shape[3])
    assert output.eq(0).all()
    assert found.argmax is not None
    assert found.argmax.eq(-1).all()
    assert found.lse is not None
    assert found.lse.eq(-torch.inf).all()
    assert found.received is not None
    assert found.received.shape == (batch, heads, keys)
    assert found.rows is not None
    assert found.rows.shape == (batch, heads, queries, keys)


def test_statistics_come_without_values() -> None:
    q, k, _ = make(batch=2, heads=4)
    check(q, k, None, causal=True)


def test_only_what_is_wanted_comes() -> None:
    output, found = compute(*make(), names=("argmax",))
    assert output is not None
    assert found.tensors().keys() == {"argmax"}


@pytest.mark.parametrize("layout", ["interleaved", "expanded", "stepped", "transposed"])
def test_inputs_may_lie_in_memory_in_any_way(layout: str) -> None:
    def lay(x: torch.Tensor) -> torch.Tensor:
        if layout == "interleaved":  # [B, S, H*D], as projections give it
            return x.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "expanded":
            return x[:, :, :1].expand_as(x)
        if layout == "stepped":
            return torch.stack([x, x], dim=-1)[..., 0]
        return x.transpose(2, 3).contiguous().transpose(2, 3)

    q, k, v = make(batch=2, heads=4)
    check(q, lay(k), lay(v), loose=2)
    check(lay(q), k, v, causal=True)


def test_the_lowest_key_wins_a_tie_whatever_the_length() -> None:
    for keys in (2, 15, 16, 17, 100, 511, 512, 513, 1100):
        q, k = (x.round() for x in make(queries=3, keys=1)[:2])  # whole numbers: in whatever order BLAS adds, equal keys score the same
        found = check(q, k.expand(1, 2, keys, 16), None)
        assert found.argmax is not None
        assert found.argmax.eq(0).all()
        hidden = torch.arange(keys) >= keys - 2
        found = check(q, k.expand(1, 2, keys, 16), None, mask=hidden)
        assert found.argmax is not None
        assert found.argmax.eq(keys - 2).all()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("place", ["bias", "key_bias", "q"])
def test_a_score_that_is_no_number_spoils_its_rows_and_no_other(place: str, bad: float) -> None:
    q, k, v = make(queries=40, keys=600)
    extra: Given = {"causal": True, "pooled": 8, "rows": [3, 30]}
    if place == "q":
        q[0, 1, 3, 5] = bad
    elif place == "bias":
        extra["bias"] = draw(1, 2, 40, 600).index_put([torch.tensor(x) for x in (0, 1, 30, 7)], torch.tensor(bad))
    else:
        extra["key_bias"] = torch.zeros(600).index_fill(0, torch.tensor([580]), bad)
    with np.errstate(invalid="ignore"):
        check(q, k, v, **extra)


def test_nan_is_found_where_every_other_key_is_hidden() -> None:
    q, k, v = make(queries=2, keys=40)
    bias = torch.full((2, 40), -torch.inf)
    bias[1, 39] = torch.nan
    found = check(q, k, v, bias=bias)
    assert found.lse is not None
    assert found.lse[0, 0, 0] == -torch.inf
    assert found.lse[0, 0, 1].isnan()


@pytest.mark.parametrize("name", ["full", "causal", "softcap", "sink", "hiding bias"])
def test_scores_in_the_hundreds_keep_their_precision(name: str) -> None:
    q, k, v = make()
    extra = CASES[name] | ({"softcap": 300.0} if name == "softcap" else {})  # a cap of 3 would make float32 ties
    check(q * 60, k, v, **extra)


@pytest.mark.parametrize("causal", [False, True])
def test_errors_stay_within_the_stated_ones(causal: bool) -> None:
    q, k, v = draw(1, 4, 300, 64, seed=1), draw(1, 2, 300, 64, seed=2), draw(1, 2, 300, 64, seed=3)
    output, found = compute(q, k, v, causal=causal, pooled=16)
    expected_output, expected = dense(q, k, v, causal=causal, pooled=16)
    errors = {name: np.abs(tensor.numpy() - expected[name]).max() for name, tensor in found.tensors().items()}
    assert output is not None
    assert expected_output is not None
    errors["output"] = np.abs(output.numpy() - expected_output).max()
    stated = TOLERANCE | {"argmax": 0, "max_score": 2e-6, "pooled": 4e-7 * max(1, expected["pooled"].max())}
    assert {name: error for name, error in errors.items() if error > stated[name]} == {}


def test_a_common_offset_costs_no_entropy() -> None:
    q, k, v = make()
    plain = compute(q, k, v)[1].entropy
    offset = compute(q, k, v, key_bias=torch.full((70,), 4096.0))[1].entropy
    assert plain is not None
    assert offset is not None
    torch.testing.assert_close(offset, plain, rtol=0, atol=3e-3)  # 4096 + s is rounded to 5e-4; the sums add nothing to it


def test_a_row_masked_with_the_smallest_number_is_uniform() -> None:
    q, k, v = make()
    output, found = compute(q, k, v, bias=torch.full((70, 70), torch.finfo(torch.float32).min))
    assert output is not None
    torch.testing.assert_close(output, v.mean(dim=2, keepdim=True).expand_as(output))
    assert found.argmax is not None
    assert found.argmax.eq(0).all()


def test_softcap_is_accurate_from_tiny_to_saturated_scores() -> None:
    sizes = torch.logspace(-6, 3, 400)
    scores = torch.cat([sizes, -sizes])
    # One key and a query of 1 element each: the only score is the largest.
    q, k = scores[None, None, :, None], torch.ones(1, 1, 1, 1)
    found = compute(q, k, None, softcap=1.0, scale=1.0)[1].max_score
    assert found is not None
    torch.testing.assert_close(found[0, 0].double(), torch.tanh(scores.double()), rtol=5e-7, atol=0)


def test_exponentials_are_accurate_over_their_whole_range() -> None:
    below = torch.linspace(0, 86, 5001)
    q, k = torch.ones(1, 1, 1, 1), -below[None, None, :, None]
    found = compute(q, k, None, scale=1.0, rows=[0])[1].rows
    assert found is not None
    exact = torch.softmax(-below.double(), 0)
    torch.testing.assert_close(found[0, 0, 0].double(), exact, rtol=1e-6, atol=0)


def test_many_panels_add_up() -> None:
    q, k, v = make(heads=2, groups=1, queries=900, keys=1400, width=8)
    check(q, k, v, causal=True, pooled=100)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_problems(data: st.DataObject) -> None:
    batch, groups, shared = (data.draw(st.integers(1, most)) for most in (2, 2, 3))
    heads, queries, keys, width = groups * shared, *(data.draw(st.integers(1, most)) for most in (90, 150, 9))
    q, k, v = make(batch, heads, groups, queries, keys, width)
    extra: Given = {}
    if data.draw(st.booleans()):
        extra["causal"] = True
    if data.draw(st.booleans()):
        extra["window"] = data.draw(st.integers(1, 60))
    if data.draw(st.booleans()):
        extra["offset"] = data.draw(st.integers(-100, 100))
    if data.draw(st.booleans()):
        extra["pooled"] = data.draw(st.integers(1, 70))
    if data.draw(st.booleans()):
        extra["sink"] = draw(heads)
    if data.draw(st.booleans()):
        extra["mask"] = draw(*(data.draw(st.sampled_from((1, full))) for full in (batch, heads, queries, keys)), seed=11) > 0
    if data.draw(st.booleans()):
        extra["bias"] = draw(*(data.draw(st.sampled_from((1, full))) for full in (batch, heads, queries, keys)), seed=12)
    if data.draw(st.booleans()):
        extra["key_bias"] = draw(*(data.draw(st.sampled_from((1, full))) for full in (batch, heads)), keys, seed=13)
    if data.draw(st.booleans()):
        extra["features"] = draw(*(data.draw(st.sampled_from((1, full))) for full in (batch, heads)), keys, 2, seed=14)
    if data.draw(st.booleans()):
        extra["rows"] = data.draw(st.lists(st.integers(0, queries - 1), max_size=4))
    check(q, k, v, **extra)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(threads: int) -> None:
    q, k, v = make(batch=2, heads=6, groups=3, queries=200, keys=300, width=32)
    alone = compute(q, k, v, causal=True, pooled=64)
    torch.set_num_threads(threads)
    try:
        together = compute(q, k, v, causal=True, pooled=64)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(1)
    assert alone[0] is not None
    assert together[0] is not None
    assert alone[0].equal(together[0])
    for name, tensor in alone[1].tensors().items():
        assert tensor.equal(together[1].tensors()[name]), name


def test_a_failure_in_one_thread_reaches_the_caller(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise MemoryError("no room")

    monkeypatch.setattr(cpu, "_point", fail)
    torch.set_num_threads(2)
    try:
        with pytest.raises(MemoryError, match="no room"):
            compute(*make())
    finally:
        torch.set_num_threads(1)


def test_a_long_call_is_interrupted_between_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    library = build.load()
    assert library is not None
    pieces: list[int] = []

    def attend(call: object, begin: int, end: int) -> None:
        pieces.append(begin)
        if len(pieces) == 2:
            raise KeyboardInterrupt
        library.attend(call, begin, end)

    monkeypatch.setattr(build, "load", lambda: replace(library, attend=attend))
    monkeypatch.setattr(cpu, "_PIECE", 1)
    with pytest.raises(KeyboardInterrupt):
        compute(*make(queries=1000))
    assert pieces == [0, 1]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q, k, v: make_problem(q.double(), k.double(), v.double()), "float64"),
        (lambda q, k, v: make_problem(q.requires_grad_(), k, v), "gradients"),
        (lambda q, k, v: make_problem(q.to("meta"), k.to("meta"), v.to("meta")), "not on the CPU"),
    ],
)
def test_what_it_cannot_do_is_said(change: object, says: str) -> None:
    problem = change(*make())  # type: ignore[operator]
    assert says in str(cpu.why_not(problem, Wanted()))
    with pytest.raises(InputError, match=f"'cpu' cannot do this: .*{says}"):
        cpu.run(problem, Wanted())


def test_top_keys_are_refused() -> None:
    assert cpu.why_not(make_problem(*make()), Wanted(top=1)) == "it does not find the top keys"
    assert cpu.why_not(make_problem(*make()), Wanted()) is None


def test_gradients_matter_only_where_they_are_recorded() -> None:
    q, k, v = make()
    with torch.no_grad():
        output, _ = compute(q.requires_grad_(), k, v, sink=torch.ones(2, requires_grad=True))
    assert output is not None
    assert not output.requires_grad


def test_the_defaults_of_torch_do_not_matter() -> None:
    q, k, v = make()
    torch.set_default_dtype(torch.float64)
    try:
        check(q, k, v, causal=True, rows=[1])
    finally:
        torch.set_default_dtype(torch.float32)


def test_without_an_exported_blas_the_products_go_through_torch(monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    monkeypatch.setattr(build, "_symbol", lambda library, name: None)
    assert "torch.mm" in build.state()[1]
    check(*make(heads=2, groups=1), **CASES["everything"])
    check(*make(), causal=True)


@pytest.mark.skipif("AVX" not in torch.backends.cpu.get_cpu_capability(), reason="other widths are those of x86")
@pytest.mark.parametrize(("flag", "level"), [("-march=x86-64", "128 bit"), ("-march=haswell", "AVX2")])
def test_narrower_vectors_compute_the_same(flag: str, level: str, monkeypatch: pytest.MonkeyPatch, fresh: Path) -> None:
    monkeypatch.setattr(build, "_NATIVE", {build.platform.machine(): flag})
    assert level in build.state()[1]
    check(*make(heads=2, groups=1), **CASES["everything"])
    check(*make(), causal=True)
    check(*make(), bias=CASES["hiding bias"]["bias"])


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache, looked at anew, and a quick build; the folder that builds are kept in."""
    monkeypatch.setattr(build, "_FLAGS", tuple("-O0" if flag == "-O3" else flag for flag in build._FLAGS))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    build.forget()
    yield tmp_path / "headscope"
    build.forget()


def kept(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.exists() else []


def works() -> bool:
    return cpu.why_not(make_problem(*make()), Wanted()) is None and compute(*make())[0] is not None


def test_a_build_is_kept_for_this_user_alone_and_used_again(fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usable, detail = build.state()
    assert usable
    assert "-shared" in detail
    [path] = kept(fresh)
    assert path.name in detail
    assert fresh.stat().st_mode & 0o777 == 0o700
    assert path.stat().st_mode & 0o077 == 0
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built twice"))
    build.forget()
    assert works()


def test_the_home_folder_is_written_as_a_tilde(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert "~/.cache/headscope/attention-" in build.state()[1]
    assert str(tmp_path) not in build.state()[1]


@pytest.mark.parametrize(
    ("command", "says"),
    [
        ("/bin/false", "/bin/false failed with status 1"),
        ("/nowhere/cc", "/nowhere/cc cannot be run: No such file"),
        ("true-but-silent", "says nothing, so it is not a C compiler"),
        ("/bin/true", "what was built cannot be loaded"),
    ],
)
def test_a_broken_compiler_is_named_in_one_log_line(
    command: str, says: str, fresh: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    (fresh.parent / "true-but-silent").write_text("#!/bin/sh\n")
    (fresh.parent / "true-but-silent").chmod(0o700)
    monkeypatch.setenv("CC", command.replace("true-but", str(fresh.parent / "true-but")))
    with caplog.at_level(logging.DEBUG, logger="headscope.kernels"):
        for _ in range(3):
            assert build.load() is None
    [record] = caplog.records
    assert record.levelno == logging.WARNING
    assert "runs blockwise" in record.getMessage()
    usable, reason = build.state()
    assert not usable
    assert reason in record.getMessage()
    assert re.search(says, reason)
    assert "no compiled kernel" in str(cpu.why_not(make_problem(*make()), Wanted()))
    assert kept(fresh) == []


def test_no_compiler_is_said_so(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert build.state() == (False, "there is no C compiler: none of cc, gcc, clang is on the PATH, and CC is not set")


def test_a_compiler_that_hangs_is_given_up(fresh: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slow = tmp_path / "slow"
    slow.write_text("#!/bin/sh\nexec sleep 60\n")
    slow.chmod(0o700)
    monkeypatch.setenv("CC", str(slow))
    monkeypatch.setattr(build, "_SECONDS", 0.2)
    assert build.state() == (False, f"{slow} was given up after 0.2 s")


def test_the_switch_turns_it_off_without_a_word(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("HEADSCOPE_CPU_KERNEL", "0")
    assert build.load() is None
    assert build.state() == (False, "switched off by HEADSCOPE_CPU_KERNEL=0")
    assert not caplog.records


def test_a_cache_that_cannot_be_made_is_done_without(tmp_path: Path, fresh: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert works()
    assert "not kept" in build.state()[1]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_cache_is_done_without(fresh: Path) -> None:
    fresh.mkdir(mode=0o500)
    assert works()
    assert "not kept" in build.state()[1]


def test_a_cache_that_others_may_write_is_not_used(fresh: Path) -> None:
    fresh.mkdir()
    fresh.chmod(0o777)
    assert works()
    assert "not kept" in build.state()[1]
    assert kept(fresh) == []


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_cache_of_another_user_is_not_used(fresh: Path) -> None:
    fresh.mkdir(mode=0o700)
    os.chown(fresh, 12345, 12345)
    assert works()
    assert kept(fresh) == []


@pytest.mark.parametrize("how", ["writable", "content", "short", "link", "owner"])
def test_a_file_that_was_tampered_with_is_built_again(how: str, fresh: Path, tmp_path: Path) -> None:
    if how == "owner" and os.geteuid() != 0:
        pytest.skip("only root can give a file away")
    assert build.load() is not None
    [path] = kept(fresh)
    good = path.read_bytes()
    path.unlink()  # the open library keeps the old file
    path.write_bytes({"content": good[:-1] + b"x", "short": good[:100]}.get(how, good))
    path.chmod(0o722 if how == "writable" else 0o700)
    if how == "link":
        shutil.move(path, tmp_path / "elsewhere.so")
        path.symlink_to(tmp_path / "elsewhere.so")
    if how == "owner":
        os.chown(path, 12345, 12345)
    build.forget()
    assert works()
    [path] = kept(fresh)
    assert path.read_bytes() == good
    assert not path.is_symlink()
    assert path.stat().st_uid == os.geteuid()
    assert path.stat().st_mode & 0o022 == 0


def test_processes_that_build_at_once_all_succeed(fresh: Path) -> None:
    code = "from headscope.kernels.cpu import build; usable, detail = build.state(); assert usable and 'not kept' not in detail, detail"
    running = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, text=True) for _ in range(2)]
    for process in running:
        _, said = process.communicate(timeout=100)
        assert process.returncode == 0, said
    assert len(kept(fresh)) == 1


def test_every_field_of_a_call_stands_in_the_source_in_the_same_order() -> None:
    source = build.SOURCE.read_text()
    body = source[source.index("typedef struct {\n    Gemm gemm") : source.index("} Call;")]
    places = [re.search(rf"\b{name}\b[,;]", body) for name, *_ in cpu.Call._fields_]
    assert all(places)
    assert [place.start() for place in places if place] == sorted(place.start() for place in places if place)
