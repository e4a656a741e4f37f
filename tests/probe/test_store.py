"""The store on disk: whole or absent, and never silently wrong."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from torch import Tensor

from headscope.kernels.errors import SelectionError, StoreError
from headscope.probe import store as module
from headscope.probe.store import DTYPES, FORMAT, MANIFEST, Store, write

linux = pytest.mark.skipif(sys.platform != "linux", reason="kills and locks are tried on Linux only")


def captured() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return {f"layers.{layer}#0": {name: torch.randn(2, 4, 6, 8, generator=generator) for name in ("q", "k")} for layer in range(3)}


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def rewrite_manifest(folder: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """Change a manifest as someone would who knows how its checksum is made."""
    path = folder / MANIFEST
    document = json.loads(path.read_bytes())
    change(document)
    document["sha256"] = ""
    document["sha256"] = hashlib.sha256((json.dumps(document, indent=1) + "\n").encode()).hexdigest()
    path.write_text(json.dumps(document, indent=1) + "\n")


def flip(path: Path, position: int) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1
    path.write_bytes(content)


@pytest.fixture(autouse=True, scope="module")
def _no_waiting_for_the_disk() -> Iterator[None]:
    """No power is cut in these tests; one of them checks that the disk is waited for, and when."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture
def run(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    write(folder, captured(), {"command": "capture"})
    return folder


tensors = st.builds(
    lambda dtype, shape: (torch.arange(max(1, torch.Size(shape).numel()))[: torch.Size(shape).numel()] % 7).reshape(shape).to(dtype),
    st.sampled_from(list(DTYPES.values())),
    st.lists(st.integers(0, 3), max_size=4),
)
texts = st.text(max_size=12).filter(lambda name: name != "__metadata__" and not any("\ud800" <= c <= "\udfff" for c in name))
plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)


shard_sets = st.dictionaries(texts, st.dictionaries(texts, tensors, max_size=3), max_size=3)


@settings(max_examples=60, deadline=None, derandomize=True)
@given(shard_sets, st.dictionaries(st.text(max_size=5), plain, max_size=3))
def test_what_was_written_is_what_is_read(shards: dict[str, dict[str, Tensor]], manifest: dict[str, object]) -> None:
    with tempfile.TemporaryDirectory() as place:
        write(Path(place) / "run", shards, manifest)
        assert os.listdir(place) == ["run"]
        store = Store.open(Path(place) / "run")
        store.verify()
        assert store.manifest == manifest
        assert store.shards == {shard: tuple(named) for shard, named in shards.items()}
        for shard, named in shards.items():
            for name, x in named.items():
                got = store.read(shard, name)
                assert (got.dtype, got.shape) == (x.dtype, x.shape) == (store.dtype(shard, name), store.shape(shard, name))
                assert torch.equal(got, x)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.data(), st.sampled_from([torch.bfloat16, torch.float32, torch.bool]))
def test_a_slice_read_equals_the_slice_of_a_full_read(data: st.DataObject, dtype: torch.dtype) -> None:
    shape = data.draw(st.lists(st.integers(1, 5), min_size=1, max_size=4))
    x = torch.randn(*shape).to(dtype)
    bound = st.none() | st.integers(-6, 6)
    index = tuple(
        data.draw(st.integers(-size, size - 1) | st.builds(slice, bound, bound, st.none() | st.integers(1, 3)))
        for size in shape[: data.draw(st.integers(0, len(shape)))]
    )
    with tempfile.TemporaryDirectory() as place:
        write(Path(place) / "run", {"a": {"x": x}}, {})
        got = Store.open(Path(place) / "run").read_slice("a", "x", index)
        assert got.dtype == dtype
        assert torch.equal(got, x[index])


@pytest.mark.parametrize("value", ["nan", "inf", "transposed", "expanded", "shared", "parameter", "part"])
def test_awkward_tensors_come_back_bit_for_bit(value: str, tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    x = {
        "nan": torch.tensor([float("nan"), 1.0]),
        "inf": torch.tensor([-float("inf"), float("inf")]),
        "transposed": base.T,
        "expanded": base[:, :1].expand(4, 3),
        "shared": base,
        "parameter": torch.nn.Parameter(base),
        "part": base[1:3],
    }[value]
    write(tmp_path / "run", {"a": {"x": x, "again": x, "overlapping": base[0]}}, {})
    store = Store.open(tmp_path / "run")
    for name in ("x", "again"):
        torch.testing.assert_close(store.read("a", name), x.detach(), rtol=0, atol=0, equal_nan=True)
    assert not store.read("a", "x").requires_grad


def test_file_names_do_not_depend_on_what_a_shard_is_called_but_on_its_hash(tmp_path: Path) -> None:
    names = ["../../escape", "/etc/passwd", "a\0b", "CON", "x" * 5000, "", "manifest.json", "é/\n"]
    write(tmp_path / "run", {name: {"../x": torch.ones(1)} for name in names}, {})
    found = {path.name for path in (tmp_path / "run").iterdir()}
    assert found == {MANIFEST} | {hashlib.sha256(name.encode()).hexdigest()[:32] + ".safetensors" for name in names}
    assert os.listdir(tmp_path) == ["run"]
    assert all(Store.open(tmp_path / "run").read(name, "../x").item() == 1 for name in names)


def test_tuples_come_back_as_lists_and_what_json_would_change_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "run", {}, {"shape": torch.Size([2, 3])})
    assert Store.open(tmp_path / "run").manifest == {"shape": [2, 3]}
    refused = [({3: "x"}, r"has the key 3.*give '3'"), ([float("nan")], r"manifest\['a'\]\[0\] is nan"), (Path("x"), "cannot keep")]
    for value, message in refused:
        with pytest.raises(StoreError, match=message):
            write(tmp_path / "other", {}, {"a": value})
    assert os.listdir(tmp_path) == ["run"]


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(2, dtype=torch.complex64), "tensor 'x' of shard 'a' is torch.complex64; a store holds bfloat16"),
        (torch.zeros(2, device="meta"), "is on the meta device"),
        (torch.eye(2).to_sparse(), "is torch.sparse_coo"),
        ([1.0], "is a list; give a tensor"),
    ],
)
def test_a_tensor_without_storable_bytes_is_refused_before_anything_is_written(x: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=message):
        write(tmp_path / "run", {"a": {"x": x}}, {})
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["__metadata__", "\ud800", 3])
def test_names_a_file_could_not_give_back_are_refused(name: Any, tmp_path: Path) -> None:
    for shards in ({name: {"x": torch.ones(1)}}, {"a": {name: torch.ones(1)}}):
        with pytest.raises(StoreError, match="cannot be a name"):
            write(tmp_path / "run", shards, {})


def test_an_existing_target_is_refused_and_left_alone(run: Path) -> None:
    with pytest.raises(StoreError, match=r"run exists; give another folder, or overwrite=True"):
        write(run, {}, {})
    Store.open(run).verify()


@pytest.mark.parametrize("exchange", [True, False])
def test_overwriting_leaves_only_the_new_capture(exchange: bool, run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not exchange:
        monkeypatch.setattr(module, "_exchange", lambda a, b: False)
    write(run, {"new": {"x": torch.ones(2)}}, {"n": 2}, overwrite=True)
    store = Store.open(run)
    store.verify()
    assert store.shards == {"new": ("x",)}
    assert len(files(run)) == 1
    assert os.listdir(run.parent) == ["run"]


@pytest.mark.parametrize("made", ["file", "link", "foreign folder"])
def test_overwriting_never_replaces_anything_but_a_capture(made: str, run: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    if made == "file":
        target.write_text("mine")
    elif made == "link":
        target.symlink_to(run)
    else:
        target.mkdir()
        (target / "thesis.txt").write_text("mine")
    with pytest.raises(StoreError, match="holds something else than a capture"):
        write(target, {}, {}, overwrite=True)
    assert made != "file" or target.read_text() == "mine"
    assert made != "foreign folder" or (target / "thesis.txt").read_text() == "mine"
    Store.open(run).verify()


def test_a_failed_overwrite_keeps_the_old_capture(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> bool:
        raise OSError("no")

    monkeypatch.setattr(module, "_exchange", fail)
    with pytest.raises(StoreError, match="nothing was kept"):
        write(run, {}, {}, overwrite=True)
    Store.open(run).verify()
    assert len(files(run)) == 3
    assert os.listdir(run.parent) == ["run"]


def test_where_folders_cannot_be_exchanged_a_failed_rename_puts_the_old_capture_back(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rename = Path.rename

    def fail(path: Path, target: Path) -> Path:
        if target == run and not path.name.endswith("-old.tmp"):
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(module, "_exchange", lambda a, b: False)
    monkeypatch.setattr(Path, "rename", fail)
    with pytest.raises(StoreError, match="nothing was kept"):
        write(run, {}, {}, overwrite=True)
    Store.open(run).verify()
    assert len(files(run)) == 3
    assert os.listdir(run.parent) == ["run"]


@pytest.mark.parametrize(("function", "times"), [("save_file", 3), ("_flush", 5), ("_sha256", 3), ("_seal", 1), ("_move", 1)])
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), SafetensorError("disk"), KeyboardInterrupt()])
def test_a_failure_at_any_step_leaves_nothing(
    function: str, times: int, error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(module, function)
    calls = 0

    def counted(*given: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == fail_at:
            raise error
        return real(*given)

    monkeypatch.setattr(module, function, counted)
    for fail_at in range(1, times + 1):
        calls = 0
        with pytest.raises(KeyboardInterrupt if isinstance(error, KeyboardInterrupt) else StoreError):
            write(tmp_path / "run", captured(), {})
        assert calls == fail_at
        assert os.listdir(tmp_path) == []
    calls, fail_at = 0, 0
    write(tmp_path / "run", captured(), {})
    assert calls == times + (function == "_flush")  # the last flush confirms a capture that is already in place
    monkeypatch.undo()
    Store.open(tmp_path / "run").verify()


def test_a_finished_capture_that_the_disk_did_not_confirm_is_said_to_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = module._flush

    def fail(path: Path) -> None:
        if path == tmp_path:
            raise OSError(5, "Input/output error")
        real(path)

    monkeypatch.setattr(module, "_flush", fail)
    with pytest.raises(StoreError, match="written, but the disk did not confirm it"):
        write(tmp_path / "run", captured(), {})
    Store.open(tmp_path / "run").verify()


@linux
def test_every_file_and_folder_is_on_the_disk_before_the_rename_and_the_rename_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[str] = []
    rename = os.rename

    def note(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        seen.append("parent" if path == tmp_path else "folder" if path.is_dir() else path.suffix)

    def note_rename(*given: Any) -> None:
        seen.append("rename")
        rename(*given)

    monkeypatch.setattr(os, "fsync", note)
    monkeypatch.setattr(os, "rename", note_rename)
    write(tmp_path / "run", captured(), {})
    assert seen == [".safetensors"] * 3 + [".json", "folder", "rename", "parent"]


def test_too_little_space_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: type("Usage", (), {"free": 1000}))
    with pytest.raises(StoreError, match="needs 9,216 bytes and 1,000 are free"):
        write(tmp_path / "run", captured(), {})
    assert os.listdir(tmp_path) == []


# Runs writers in forks and kills each: at every call that touches the disk, then at random times. Prints what each left.
KILLER = """
import json, os, random, signal, sys, time, warnings
warnings.simplefilter("ignore")
from pathlib import Path
import torch
torch.set_num_threads(1)
from headscope.probe import store

os.fsync = lambda descriptor: None
place, overwrite = Path(sys.argv[1]), sys.argv[2] == "overwrite"
target = place / "run"
shards = {f"s{i}": {"x": torch.arange(50_000.0) + i} for i in range(3)}

def state():
    try:
        found = store.Store.open(target)
        found.verify()
        return str(found.manifest["n"])
    except store.StoreError as error:
        return "absent" if not target.exists() else f"BROKEN: {error}"

def kill_at(step):
    count = 0
    def killing(real):
        def call(*given, **named):
            nonlocal count
            if count == step:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1
            return real(*given, **named)
        return call
    store.save_file = killing(store.save_file)
    for name in ("fsync", "rename", "mkdir", "rmdir", "unlink"):
        setattr(os, name, killing(getattr(os, name)))
    store._exchange = killing(store._exchange)

def fork(step, wait):
    pid = os.fork()
    if pid == 0:
        if step is not None:
            kill_at(step)
        store.write(target, shards, {"n": 2}, overwrite=overwrite)
        os._exit(0)
    if wait is not None:
        time.sleep(wait)
        os.kill(pid, signal.SIGKILL)
    return os.waitpid(pid, 0)[1]

def reset():
    store.write(target, {"old": {"x": torch.ones(3)}}, {"n": 1}, overwrite=True)
    left = sorted(os.listdir(place))
    if not overwrite:
        store.shutil.rmtree(target)
    return left

results = []
random.seed(0)
for trial in range(60):
    results.append(["swept", reset()])
    status = fork(trial, None)
    results.append([os.WIFSIGNALED(status), state()])
    if not os.WIFSIGNALED(status):
        break
for _ in range(12):
    results.append(["swept", reset()])
    fork(None, random.uniform(0, 0.012))
    results.append([True, state()])
results.append(["swept", reset()])
print(json.dumps(results))
"""


@linux
@pytest.mark.parametrize("mode", ["fresh", "overwrite"])
def test_a_writer_killed_at_any_call_leaves_the_target_whole_or_as_it_was(mode: str, tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLER, str(tmp_path), mode], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    results = json.loads(done.stdout)
    before = "1" if mode == "overwrite" else "absent"
    outcomes = [result for result in results if result[0] != "swept"]
    assert {outcome for _, outcome in outcomes} == {before, "2"}
    assert [False, "2"] in outcomes  # the steps ran out: every one of them was killed once
    assert len(outcomes) > 20
    assert all(left == ["run"] for kind, left in results if kind == "swept")


@linux
def test_the_next_write_removes_orphans_but_not_the_folder_of_a_writer_at_work(tmp_path: Path) -> None:
    orphan = tmp_path / ".headscope-0123456789abcdef.tmp"
    orphan.mkdir()
    (orphan / "part.safetensors").write_bytes(b"x")
    (tmp_path / ".headscope-0123456789abcdee.lock").touch()
    other = tmp_path / ".someone-else.tmp"
    other.mkdir()
    with module._temporary_folder(tmp_path) as working:
        write(tmp_path / "run", {}, {})
        assert working.is_dir()
        assert sorted(os.listdir(tmp_path)) == sorted([working.name, working.with_suffix(".lock").name, other.name, "run"])
    assert sorted(os.listdir(tmp_path)) == [other.name, "run"]


def test_a_flipped_bit_in_any_shard_is_found_by_read_and_by_verify(run: Path) -> None:
    for path in files(run):
        for position in (3, 40, path.stat().st_size - 1):
            flip(path, position)
            store = Store.open(run)
            with pytest.raises(StoreError, match="the sha256 is not the one written"):
                store.verify()
            shard = next(name for name, entry in store._entries.items() if entry.file == path.name)
            with pytest.raises(StoreError, match=f"{path.name}: the sha256"):
                store.read(shard, "q")
            flip(path, position)
    Store.open(run).verify()


def test_a_flipped_bit_in_any_third_byte_of_the_manifest_is_found_at_opening(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    write(folder, {"a": {"x": torch.ones(2)}}, {"n": 1, "text": "é"})
    for position in range(0, (folder / MANIFEST).stat().st_size, 3):
        flip(folder / MANIFEST, position)
        with pytest.raises(StoreError):
            Store.open(folder)
        flip(folder / MANIFEST, position)
    Store.open(folder)


@pytest.mark.parametrize("length", [0, 1, 100, -1])
def test_a_truncated_file_is_found_at_opening(length: int, run: Path) -> None:
    for path in [*files(run), run / MANIFEST]:
        content = path.read_bytes()
        path.write_bytes(content[:length])
        with pytest.raises(StoreError, match=path.name):
            Store.open(run)
        path.write_bytes(content)
    Store.open(run).verify()


def test_a_missing_file_or_folder_is_named(run: Path) -> None:
    with pytest.raises(StoreError, match=r"nowhere: no such capture"):
        Store.open(run.parent / "nowhere")
    gone = files(run)[0]
    content = gone.read_bytes()
    store = Store.open(run)
    gone.unlink()
    with pytest.raises(StoreError, match=f"{gone.name}: missing"):
        Store.open(run)
    with pytest.raises(StoreError, match=f"{gone.name}: missing"):
        store.verify()
    gone.write_bytes(content)
    (run / MANIFEST).unlink()
    with pytest.raises(StoreError, match=r"manifest.json: missing"):
        Store.open(run)


def test_damage_after_the_first_read_is_still_found(run: Path) -> None:
    store = Store.open(run)
    store.read("layers.0#0", "q")
    path = run / module._file_name("layers.0#0")
    flip(path, path.stat().st_size - 1)
    os.utime(path, ns=(1, 1))
    with pytest.raises(StoreError, match="sha256"):
        store.read("layers.0#0", "k")


def test_a_shard_is_hashed_once_for_many_reads_and_never_for_slices(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[str] = []
    real = module._sha256
    monkeypatch.setattr(module, "_sha256", lambda path: hashed.append(path.name) or real(path))  # type: ignore[func-returns-value]
    store = Store.open(run)
    store.read_slice("layers.1#0", "q", (0, 2))
    assert hashed == []
    for name in ("q", "k", "q"):
        store.read("layers.1#0", name)
    assert hashed == [module._file_name("layers.1#0")]


def test_one_head_is_readable_beside_a_damaged_one(run: Path) -> None:
    want = captured()["layers.2#0"]
    path = run / module._file_name("layers.2#0")
    flip(path, path.stat().st_size - 1)  # lies in the last head of the last batch entry of one of the two
    store = Store.open(run)
    for name in ("q", "k"):
        assert torch.equal(store.read_slice("layers.2#0", name, (slice(None), 0)), want[name][:, 0])


def test_a_capture_replaced_since_it_was_opened_is_not_read_as_the_old_one(run: Path) -> None:
    store = Store.open(run)
    write(run, {name: {key: x + 1 for key, x in named.items()} for name, named in captured().items()}, {}, overwrite=True)
    with pytest.raises(StoreError, match="replaced by another capture since it was opened"):
        store.read_slice("layers.0#0", "q", (0,))
    with pytest.raises(StoreError, match="replaced"):
        store.read("layers.0#0", "q")


@pytest.mark.parametrize("link", ["symbolic", "hard"])
@pytest.mark.parametrize("which", ["shard", "manifest"])
def test_links_inside_the_folder_are_refused(link: str, which: str, run: Path, tmp_path: Path) -> None:
    path = files(run)[0] if which == "shard" else run / MANIFEST
    outside = tmp_path / "outside"
    path.rename(outside)
    if link == "symbolic":
        path.symlink_to(outside)
    else:
        os.link(outside, path)
    with pytest.raises(StoreError, match="a link or not a plain file"):
        Store.open(run)


@pytest.mark.parametrize(
    "file", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "a\0b", "", ".", 3, None, "0" * 32 + ".safetensors"]
)
def test_a_manifest_cannot_point_a_shard_anywhere_else(file: object, run: Path) -> None:
    rewrite_manifest(run, lambda document: document["shards"]["layers.0#0"].update(file=file))
    with pytest.raises(StoreError, match="which is not its name"):
        Store.open(run)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.update(shards=[]),
        lambda d: d.update(manifest=3),
        lambda d: d.update(extra=1),
        lambda d: d.pop("manifest"),
        lambda d: d["shards"].update({"layers.0#0": None}),
        lambda d: d["shards"]["layers.0#0"].pop("size"),
        lambda d: d["shards"]["layers.0#0"].update(size=True),
        lambda d: d["shards"]["layers.0#0"].update(size=10**30),
        lambda d: d["shards"]["layers.0#0"].update(sha256=4),
        lambda d: d["shards"]["layers.0#0"].update(tensors=[["q"]]),
        lambda d: d["shards"]["layers.0#0"]["tensors"]["q"].update(dtype="object"),
        lambda d: d["shards"]["layers.0#0"]["tensors"]["q"].update(dtype=[]),
        lambda d: d["shards"]["layers.0#0"]["tensors"]["q"].update(shape=[2, -1]),
        lambda d: d["shards"]["layers.0#0"]["tensors"]["q"].update(shape="2468"),
        lambda d: d["shards"].update({"\ud800": d["shards"]["layers.0#0"]}),
    ],
)
def test_a_malformed_manifest_with_a_right_checksum_is_refused_with_our_error(change: Callable[[dict[str, Any]], None], run: Path) -> None:
    rewrite_manifest(run, change)
    with pytest.raises(StoreError, match=r"manifest\.json|bytes where"):
        Store.open(run)


@pytest.mark.parametrize("update", [{"shape": [2, 4, 6, 9]}, {"dtype": "int64"}])
def test_a_manifest_that_contradicts_a_file_is_found(update: dict[str, Any], run: Path) -> None:
    rewrite_manifest(run, lambda document: document["shards"]["layers.0#0"]["tensors"]["q"].update(update))
    store = Store.open(run)
    for use in (store.verify, lambda: store.read("layers.0#0", "q"), lambda: store.read_slice("layers.0#0", "q", (0,))):
        with pytest.raises(StoreError, match="where the manifest says"):
            use()


def test_another_version_of_the_format_is_named(run: Path) -> None:
    rewrite_manifest(run, lambda document: document.update(format="headscope-capture/2"))
    with pytest.raises(StoreError, match=f"'headscope-capture/2' and this version reads '{FORMAT}'"):
        Store.open(run)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff\xfe", b"[" * 200_000, b'{"format": NaN}', b"1" * 5000])
def test_a_manifest_that_is_not_ours_is_refused_with_our_error(content: bytes, run: Path) -> None:
    (run / MANIFEST).write_bytes(content)
    with pytest.raises(StoreError):
        Store.open(run)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(st.data())
def test_no_mutation_of_a_shard_that_keeps_its_size_crashes_a_read(data: st.DataObject) -> None:
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        write(folder, {"a": {"x": torch.arange(6.0), "y": torch.ones(2, 2)}}, {})
        path = files(folder)[0]
        content = bytearray(path.read_bytes())
        for position, byte in data.draw(st.lists(st.tuples(st.integers(0, len(content) - 1), st.integers(0, 255)), min_size=1, max_size=6)):
            content[position] = byte
        changed = bytes(content) != path.read_bytes()
        path.write_bytes(content)
        store = Store.open(folder)
        try:
            part = store.read_slice("a", "x", (slice(1, 3),))
            assert (part.dtype, part.shape) == (torch.float32, (2,))
        except StoreError:
            pass  # a header that no longer fits
        if changed:
            with pytest.raises(StoreError):
                store.read("a", "x")


def test_names_and_indices_that_are_not_there_are_refused_with_what_there_is(run: Path) -> None:
    store = Store.open(run)
    with pytest.raises(SelectionError, match=r"no shard 'x' in .*: there are 'layers.0#0', 'layers.1#0', 'layers.2#0'"):
        store.read("x", "q")
    with pytest.raises(SelectionError, match="no tensor 'v' in shard 'layers.0#0': there are 'q', 'k'"):
        store.read_slice("layers.0#0", "v", (0,))
    with pytest.raises(SelectionError, match=r"no index 4 on axis 1 of 'q', which is \[2, 4, 6, 8\]; give -4 to 3"):
        store.read_slice("layers.0#0", "q", (0, 4))
    with pytest.raises(SelectionError, match="5 indices"):
        store.read_slice("layers.0#0", "q", (0, 0, 0, 0, 0))
    with pytest.raises(SelectionError, match="a step of -1 on axis 0"):
        store.read_slice("layers.0#0", "q", (slice(None, None, -1),))
