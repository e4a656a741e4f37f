"""The hub: what is downloaded, what the cache gives without it, and how long it is waited for. The hub here is a local server."""

from __future__ import annotations

import hashlib
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from headscope.probe.hub import within

COMMIT = "a" * 40


@contextmanager
def hub(files: Path) -> Iterator[str]:
    """A hub that has one model, someone/model, with these files; its address."""

    class Handler(BaseHTTPRequestHandler):
        def answer(self) -> None:
            path = self.path.split("?")[0]
            names = [file.relative_to(files).as_posix() for file in files.rglob("*") if file.is_file()]
            tags = {name: hashlib.sha1((files / name).read_bytes()).hexdigest() for name in names}
            asked = re.fullmatch(r"/someone/model/resolve/[^/]+/(.*)", path)
            headers, body = {}, b""
            if re.fullmatch(r"/api/models/someone/model(/revision/[^/]+)?", path):
                siblings = [{"rfilename": name} for name in names]
                body = json.dumps({"id": "someone/model", "sha": COMMIT, "siblings": siblings, "tags": [], "downloads": 0}).encode()
            elif path.startswith("/api/models/someone/model/tree/"):
                listed = [{"type": "file", "path": name, "size": (files / name).stat().st_size, "oid": tags[name]} for name in names]
                body = json.dumps(listed).encode()
            elif asked and asked[1] in names:
                body = (files / asked[1]).read_bytes()
                headers = {"ETag": f'"{tags[asked[1]]}"', "X-Repo-Commit": COMMIT}
            else:
                headers = {"X-Error-Code": "RepoNotFound"}
            self.send_response(200 if body else 404)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        do_GET = do_HEAD = answer

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def ask(address: str, cache: Path, name: str = "someone/model", **environment: str) -> tuple[float, str]:
    """Load a hub id in a fresh process (the address is read at import): the seconds that load() took, and class or message."""
    code = (
        "import sys, time, huggingface_hub, transformers\n"
        "from headscope.kernels.errors import ModelError\nfrom headscope.probe.models import load\n"
        "began = time.perf_counter()\ntry:\n    result = type(load(sys.argv[1])[0]).__name__\n"
        "except ModelError as error:\n    result = str(error)\nprint(time.perf_counter() - began, result)\n"
    )
    around = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(cache), "HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1", **environment}
    command = [sys.executable, "-c", code, name]
    done = subprocess.run(command, env=around, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=100)
    seconds, _, result = done.stdout.partition(" ")
    assert result, done.stderr
    return float(seconds), result


@pytest.mark.slow
def test_a_model_is_fetched_without_code_or_pickles_and_found_again_offline(tmp_path: Path) -> None:
    files, cache = tmp_path / "files", tmp_path / "cache"
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(config).save_pretrained(files)
    (files / "onnx").mkdir()
    for name in ("evil.py", "pytorch_model.bin", "model.fp16.safetensors", "README.md", "onnx/model.json"):
        (files / name).write_bytes(b"not wanted")
    with hub(files) as address:
        assert ask(address, cache)[1].strip() == "LlamaForCausalLM"
        assert "the hub has no model 'someone/absent' for you (RepositoryNotFoundError)" in ask(address, cache, "someone/absent")[1]
    (snapshot,) = cache.glob("hub/*/snapshots/*")
    assert snapshot.name == COMMIT
    assert {file.name for file in snapshot.iterdir()} == {"config.json", "generation_config.json", "model.safetensors"}
    assert ask(address, cache)[1].strip() == "LlamaForCausalLM"  # the hub is gone
    assert ask(address, cache, HF_HUB_OFFLINE="1")[1].strip() == "LlamaForCausalLM"


@pytest.mark.slow
def test_a_hub_that_never_answers_is_given_up_within_five_seconds(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:  # accepts, and says nothing
        seconds, message = ask(f"http://127.0.0.1:{server.getsockname()[1]}", tmp_path)
    assert seconds < 5.5
    assert "no model 'someone/model': there is no folder of that name" in message
    assert "asking the hub failed" in message


@pytest.mark.slow
def test_offline_mode_is_respected(tmp_path: Path) -> None:
    seconds, message = ask("http://127.0.0.1:9", tmp_path, HF_HUB_OFFLINE="1")
    assert seconds < 2
    assert "OfflineModeIsEnabled" in message


def test_a_question_has_a_deadline_and_keeps_its_error() -> None:
    with pytest.raises(TimeoutError, match=r"no answer within 0\.05 s"):
        within(0.05, lambda: time.sleep(1))
    with pytest.raises(ZeroDivisionError):
        within(5, lambda: 1 // 0)
    assert within(5, lambda: 7) == 7
