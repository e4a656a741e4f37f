from __future__ import annotations

import http.client
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import uvicorn

from headscope.app.engine import Engine
from headscope.app.server import Workbench, build, configuration, listen
from tests.app.tiny import save_tiny


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes


@dataclass(frozen=True)
class Live:
    """A running workbench on the tiny model, and ways to knock at its door."""

    workbench: Workbench
    folder: Path

    @property
    def port(self) -> int:
        return self.workbench.port

    @property
    def cookie(self) -> str:
        return f"{self.workbench.app.cookie.decode()}={self.workbench.app.secret.decode()}"

    def ask_first_run(self) -> str:
        return self.workbench.desk.first.run.key

    def ask(
        self,
        path: str,
        method: str = "GET",
        *,
        host: str | None = None,
        known: bool = True,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> Reply:
        """One request; `known` sends the session cookie."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
        sent = {"Host": host or f"127.0.0.1:{self.port}", **({"Cookie": self.cookie} if known else {}), **(headers or {})}
        if body is not None and "Content-Length" not in sent and "Transfer-Encoding" not in sent:
            sent["Content-Length"] = str(len(body))
        for name, value in sent.items():
            connection.putheader(name, value)
        connection.endheaders()
        try:
            if body is not None:
                connection.send(body)
        except (BrokenPipeError, ConnectionResetError):
            pass  # the server has answered already
        reply = connection.getresponse()
        found = Reply(reply.status, {name.lower(): value for name, value in reply.getheaders()}, reply.read())
        connection.close()
        return found

    def post(self, path: str, body: bytes = b"{}", **headers: str) -> Reply:
        """A well-formed POST from our own page."""
        own = {"Origin": f"http://127.0.0.1:{self.port}", "Content-Type": "application/json"}
        return self.ask(path, "POST", headers={**own, **{name.replace("_", "-"): value for name, value in headers.items()}}, body=body)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def engine(tiny: Path) -> Engine:
    engine = Engine(str(tiny))
    engine.open("The quick brown fox. The quick")
    return engine


@pytest.fixture(scope="session")
def live(tiny: Path) -> Iterator[Live]:
    listener: socket.socket = listen(0)
    workbench = build(lambda: Engine(str(tiny)), port=int(listener.getsockname()[1]))
    server = uvicorn.Server(configuration(workbench))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    yield Live(workbench, tiny)
    server.should_exit = True
    thread.join(timeout=10)
    workbench.close()
    listener.close()
