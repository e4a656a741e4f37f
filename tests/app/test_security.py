"""The security table of the workbench, row by row, against a running server."""

from __future__ import annotations

import json
import socket
import time
from typing import Any

import pytest
from fastapi.routing import APIWebSocketRoute
from starlette.routing import Mount

from headscope.app import server as server_module
from headscope.app.security import BODY_CAP, authorities, content_security_policy
from headscope.app.server import listen, serve
from headscope.kernels.errors import InputError
from tests.app.conftest import Live

SOCKET_PATH = "/_dash-ws-callback"
FILLED = {
    "run": "0" * 24,
    "row": "0",
    "head": "0",
    "query": "0",
    "scale": "sqrt",
    "package_name": "dash",
    "fingerprinted_path": "x.js",
    "path": "anything",
}


def routes(live: Live) -> list[tuple[str, str]]:
    """(method, path) of every route that the application has, with something in the place of each parameter."""
    found = []
    for route in live.workbench.server.routes:
        if isinstance(route, APIWebSocketRoute):
            continue
        path = str(getattr(route, "path", ""))
        path = path + "/headscope.css" if isinstance(route, Mount) else path
        for name, value in FILLED.items():
            path = path.replace(f"{{{name}}}", value).replace(f"{{{name}:path}}", value)
        assert "{" not in path, f"the walk does not know how to fill {path}"
        path = path if path.startswith("/") else f"/{path}"
        found += [(method, path) for method in sorted(getattr(route, "methods", None) or {"GET"}) if method != "HEAD"]
    return found


def handshake(live: Live, **changed: str | None) -> int:
    """The status of a websocket handshake, as a browser would make it but for what is changed."""
    own = {
        "Host": f"127.0.0.1:{live.port}",
        "Origin": f"http://127.0.0.1:{live.port}",
        "Cookie": live.cookie,
        "Upgrade": "websocket",
        "Connection": "Upgrade",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    }
    headers = {**own, **changed}
    lines = [f"GET {SOCKET_PATH} HTTP/1.1", *(f"{name}: {value}" for name, value in headers.items() if value is not None)]
    with socket.create_connection(("127.0.0.1", live.port), timeout=10) as connection:
        connection.sendall(("\r\n".join(lines) + "\r\n\r\n").encode())
        return int(connection.recv(64).split()[1])


def test_the_walk_sees_our_routes_and_dashs(live: Live) -> None:
    paths = {path for _, path in routes(live)}
    assert {"/", "/alive", "/_dash-layout", "/_dash-update-component", "/assets/headscope.css"} <= paths
    assert len(paths) >= 12


def test_every_route_refuses_a_foreign_host(live: Live) -> None:
    foreign = ["evil.example", f"evil.example:{live.port}", "127.0.0.1", f"127.0.0.1:{live.port + 1}", f"127.0.0.1.evil:{live.port}", ""]
    for method, path in routes(live):
        for host in foreign if path == "/heads" else foreign[:2]:
            assert live.ask(path, method, host=host or " ").status == 421, (method, path, host)


def test_every_route_refuses_a_foreign_origin(live: Live) -> None:
    for method, path in routes(live):
        for origin in ("http://evil.example", "null", f"http://127.0.0.1:{live.port + 1}", f"https://127.0.0.1:{live.port}"):
            reply = live.ask(
                path, method, headers={"Origin": origin, "Content-Type": "application/json"}, body=b"{}" if method == "POST" else None
            )
            assert reply.status == 403, (method, path, origin)


def test_every_route_refuses_another_site_by_fetch_metadata(live: Live) -> None:
    for method, path in routes(live):
        for site in ("cross-site", "same-site"):
            assert live.ask(path, method, headers={"Sec-Fetch-Site": site, "Origin": f"http://127.0.0.1:{live.port}"}).status == 403


def test_every_route_wants_the_cookie(live: Live) -> None:
    wrong = f"{live.workbench.app.cookie.decode()}=wrong"
    for method, path in routes(live):
        own = {"Origin": f"http://127.0.0.1:{live.port}", "Content-Type": "application/json"}
        body = b"{}" if method == "POST" else None
        assert live.ask(path, method, known=False, headers=own, body=body).status == 401, (method, path)
        assert live.ask(path, method, known=False, headers={**own, "Cookie": wrong}, body=body).status == 401
        assert live.ask(path, method, known=False, headers={**own, "Cookie": "\xe9=\xe9"}, body=body).status == 401


def test_no_route_fails_inside_for_a_known_page(live: Live) -> None:
    for method, path in routes(live):
        if method == "GET" and "_dash-component-suites" not in path:  # Dash answers 500 for a script that it does not have
            assert live.ask(path).status in (200, 303, 404), path


def test_every_answer_carries_the_policy(live: Live) -> None:
    for method, path in routes(live):
        for known in (True, False):
            headers = live.ask(path, method, known=known).headers
            assert "default-src 'none'" in headers["content-security-policy"]
            assert "unsafe-eval" not in headers["content-security-policy"]
            assert headers["x-content-type-options"] == "nosniff"
            assert headers["referrer-policy"] == "no-referrer"
            assert "access-control-allow-origin" not in headers
            assert "server" not in headers


def test_the_policy_names_the_inline_scripts_of_the_page(live: Live) -> None:
    page = live.ask("/heads")
    scripts = page.body.count(b"<script>") + page.body.count(b"<script id=")
    policy = page.headers["content-security-policy"].split(";")[1]
    assert page.status == 200
    assert policy.count("'sha256-") >= 2
    assert scripts >= 2
    assert "'unsafe-inline'" not in policy


def test_the_websocket_wants_host_origin_and_cookie(live: Live) -> None:
    assert handshake(live) == 101
    assert handshake(live, Cookie=None) == 403
    assert handshake(live, Origin=None) == 403
    assert handshake(live, Origin="null") == 403
    assert handshake(live, Origin="http://evil.example") == 403
    assert handshake(live, Host="evil.example", Origin="http://evil.example") == 403
    assert handshake(live, **{"Sec-Fetch-Site": "cross-site"}) == 403


def test_the_token_becomes_a_cookie_and_leaves_the_address(live: Live) -> None:
    reply = live.ask(f"/?token={live.workbench.token}", known=False)
    assert reply.status == 303
    assert reply.headers["location"] == "/heads"
    assert reply.headers["set-cookie"].endswith("Path=/; HttpOnly; SameSite=Strict")
    assert live.workbench.token not in reply.headers["set-cookie"]
    kept = live.ask(f"/heads?a=1&token={live.workbench.token}&b=2", known=False)
    assert kept.headers["location"] == "/heads?a=1&b=2"


def test_a_link_from_elsewhere_may_bring_the_token_but_nothing_else(live: Live) -> None:
    navigation = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    assert live.ask(f"/?token={live.workbench.token}", known=False, headers=navigation).status == 303
    assert live.ask("/heads", headers=navigation).status == 403
    assert live.ask(f"/?token={live.workbench.token}", known=False, headers={**navigation, "Sec-Fetch-Mode": "no-cors"}).status == 403


@pytest.mark.parametrize("query", ["token=", "token=wrong", "token=%C3%A9", "token=%ff", "token={0}&token={0}", "token={0}x"])
def test_a_wrong_token_is_refused(live: Live, query: str) -> None:
    reply = live.ask("/?" + query.format(live.workbench.token), known=False)
    assert reply.status == 401
    assert "set-cookie" not in reply.headers


@pytest.mark.parametrize("path", ["//evil.example", "/\\evil.example", "/%5Cevil.example", "/%2F/evil.example", "/a%0d%0ax:y"])
def test_the_token_never_leads_to_another_host(live: Live, path: str) -> None:
    reply = live.ask(f"{path}?token={live.workbench.token}", known=False)
    location = reply.headers.get("location", "/")
    assert location.startswith("/")
    assert not location.startswith(("//", "/\\"))
    assert "x" not in reply.headers


def test_a_body_above_the_cap_is_refused_before_it_is_read(live: Live) -> None:
    started = time.perf_counter()
    reply = live.post("/_dash-update-component", b"", Content_Length=str(BODY_CAP + 1))
    assert reply.status == 413
    assert time.perf_counter() - started < 1


def test_a_body_that_grows_above_the_cap_is_refused(live: Live) -> None:
    piece = b" " * (1 << 20)
    chunk = f"{len(piece):x}\r\n".encode() + piece + b"\r\n"
    body = chunk * (BODY_CAP // len(piece) + 2) + b"0\r\n\r\n"
    assert live.post("/_dash-update-component", body, Transfer_Encoding="chunked").status == 413


@pytest.mark.parametrize("kind", ["text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x", ""])
def test_only_json_is_taken(live: Live, kind: str) -> None:
    assert live.post("/_dash-update-component", b"{}", Content_Type=kind).status == 415


@pytest.mark.parametrize("method", ["PUT", "DELETE", "PATCH", "OPTIONS", "TRACE"])
def test_other_methods_are_refused(live: Live, method: str) -> None:
    own = {"Origin": f"http://127.0.0.1:{live.port}"}
    assert live.ask("/heads", method, headers=own).status == 405


@pytest.mark.parametrize("path", ["/docs", "/redoc", "/openapi.json", "/_mcp"])
def test_documentation_and_tool_endpoints_are_off(live: Live, path: str) -> None:
    reply = live.ask(path)
    assert b"swagger" not in reply.body.lower()
    assert b'"openapi"' not in reply.body.lower()
    assert reply.status == 404 or b"react-entry-point" in reply.body  # Dash's own page for unknown addresses


@pytest.mark.parametrize(
    "path",
    [
        "/assets/../server.py",
        "/assets/%2e%2e/server.py",
        "/assets/..%2fserver.py",
        "/assets//etc/passwd",
        "/assets/%00",
        "/assets/%2e%2e%5cserver.py",
    ],
)
def test_assets_do_not_lead_out_of_their_folder(live: Live, path: str) -> None:
    reply = live.ask(path)
    assert b"import" not in reply.body or b"react-entry-point" in reply.body
    assert reply.status in (200, 404)


@pytest.mark.parametrize(
    "path",
    [
        "/numbers/{run}/0/8/0",
        "/numbers/{run}/6/0/0",
        "/numbers/{run}/0/0/99999",
        "/numbers/" + "f" * 24 + "/0/0/0",
        "/pictures/1/{run}/0/9-sqrt.png",
    ],
)
def test_what_does_not_exist_is_404_with_a_reason(live: Live, path: str) -> None:
    reply = live.ask(path.format(run=live.ask_first_run()))
    assert reply.status == 404
    assert reply.body.startswith((b"no ", b"run "))


def test_a_wrong_colour_scale_is_bad_input(live: Live) -> None:
    reply = live.ask(f"/pictures/1/{live.ask_first_run()}/0/0-rainbow.png")
    assert (reply.status, reply.body) == (400, b"no colour scale 'rainbow': there are linear, sqrt, log")


@pytest.mark.parametrize("row", ["-1", "1e3", "9" * 5000, "%20", "²"])
def test_a_place_that_is_no_number_is_refused(live: Live, row: str) -> None:
    from urllib.parse import quote

    assert live.ask(f"/numbers/{live.ask_first_run()}/{quote(row, safe='%')}/0/0").status in (404, 422)


def act(live: Live, page: object, command: object) -> dict[str, Any]:
    """One command over HTTP, as Dash sends it."""
    outputs = [("run", "data"), ("strip", "children"), ("edits", "children"), ("outcome", "children"), ("problem", "children")]
    body = {
        "output": ".." + "...".join(f"{name}.{prop}" for name, prop in outputs) + "..",
        "outputs": [{"id": name, "property": prop} for name, prop in outputs],
        "inputs": [{"id": "command", "property": "data", "value": command}],
        "state": [{"id": "page", "property": "data", "value": page}],
        "changedPropIds": ["command.data"],
    }
    reply = live.post("/_dash-update-component", json.dumps(body).encode())
    assert reply.status == 200, reply.body
    found: dict[str, Any] = json.loads(reply.body)["response"]
    return found


@pytest.mark.parametrize(
    ("command", "reason"),
    [
        (None, "a command is an object"),
        ({"action": "explode"}, "no action 'explode'"),
        ({"action": "scale", "row": 6}, "no site 6"),
        ({"action": "scale", "head": 8}, "no head 8"),
        ({"action": "scale", "head": -1}, "whole number"),
        ({"action": "scale", "row": True}, "whole number"),
        ({"action": "scale", "value": 2.5}, "from 0 to 2"),
        ({"action": "scale", "value": "0"}, "from 0 to 2"),
        ({"action": "scale", "value": True}, "from 0 to 2"),
        ({"action": "text", "text": ""}, "empty"),
        ({"action": "text", "text": "word " * 100}, "context window"),
        ({"action": "text", "text": "x" * 70_000}, "65,536"),
        ({"action": "text", "text": ["x"]}, "not a string"),
        ({"action": "undo", "path": "/etc/passwd"}, "no field 'path'"),
    ],
)
def test_a_forged_command_changes_nothing_and_says_why(live: Live, command: object, reason: str) -> None:
    page, session = live.workbench.desk.sessions.open("hello")
    found = act(live, page, command)
    assert reason in json.dumps(found["problem"])
    assert set(found["run"]["data"]) == {"answered"}
    assert (session.text, session.recipe) == ("hello", ())


@pytest.mark.parametrize("page", [None, "", "x" * 22, 7, ["a"], {"a": 1}])
def test_a_forged_page_id_is_refused(live: Live, page: object) -> None:
    found = act(live, page, {"number": 1, "action": "undo"})
    assert "no longer known" in json.dumps(found["problem"])


def test_two_pages_never_see_each_others_edits(live: Live) -> None:
    pages = [live.workbench.desk.sessions.open("hello")[0] for _ in range(2)]
    first = act(live, pages[0], {"number": 1, "action": "scale", "row": 2, "head": 3, "value": 0})
    second = act(live, pages[1], {"number": 1, "action": "show"})
    assert first["run"]["data"]["recipe"] == [{"row": 2, "head": 3, "value": 0.0}]
    assert second["run"]["data"]["recipe"] == []


def test_an_error_inside_is_told_without_its_details(
    live: Live, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("secret detail")

    page, session = live.workbench.desk.sessions.open("hello")
    monkeypatch.setattr(live.workbench.engine, "run", fail)
    found = act(live, page, {"number": 1, "action": "scale", "value": 0})
    assert "Internal error (RuntimeError)" in json.dumps(found["problem"])
    assert "secret detail" not in json.dumps(found)
    assert session.recipe == ()


def test_an_undo_that_fails_leaves_the_undo_list_whole(live: Live, monkeypatch: pytest.MonkeyPatch) -> None:
    page, session = live.workbench.desk.sessions.open("hello")
    act(live, page, {"number": 1, "action": "scale", "row": 1, "head": 1, "value": 0})
    recipe = session.recipe
    with monkeypatch.context() as patch:
        patch.setattr(live.workbench.engine, "run", lambda *arguments: 1 / 0)
        act(live, page, {"number": 2, "action": "undo"})
    assert session.recipe == recipe
    act(live, page, {"number": 3, "action": "undo"})
    assert session.recipe == ()


def test_the_host_variable_does_not_open_the_door(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOST", "0.0.0.0")
    monkeypatch.setenv("DASH_DEBUG", "true")
    with listen(0) as listener:
        assert listener.getsockname()[0] == "127.0.0.1"


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "192.168.1.1", "evil.example"])
def test_other_addresses_are_refused_before_anything_is_loaded(host: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "build", None)
    with pytest.raises(InputError, match="binds 127.0.0.1 only"):
        serve("embedded:lm", host=host, port=0, threads=1)


def test_a_taken_port_is_said() -> None:
    with listen(0) as listener:
        listener.listen()
        port = int(listener.getsockname()[1])
        with pytest.raises(InputError, match="give another with --port"):
            listen(port)


def test_the_policy_allows_nothing_by_default() -> None:
    policy = content_security_policy(["'sha256-abc'"], authorities(("127.0.0.1",), 8050))
    assert policy.startswith("default-src 'none'; script-src 'self' 'sha256-abc';")
    assert "connect-src 'self' ws://127.0.0.1:8050" in policy
    assert authorities(("localhost",), 80) == ["localhost:80", "localhost"]
