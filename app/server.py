"""The workbench's server: Dash on FastAPI, one process, one thread that owns the model, nothing reachable from outside.

`build` makes the guarded ASGI application, `serve` runs it. Pictures and exact rows go by plain addresses that browsers
may keep for ever, since a run's key is a hash of model, tokens and recipe; commands go through one Dash callback.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import socket
import sys
import traceback
import webbrowser
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass
from typing import Annotated, Any, TypeVar

import dash
import uvicorn
from dash import ClientsideFunction, Dash, Input, Output, State, no_update, set_props
from dash.development.base_component import Component
from fastapi import FastAPI, Path
from fastapi.responses import PlainTextResponse, RedirectResponse, Response

from headscope.app import pages
from headscope.app.engine import PICTURE_VERSION, Engine, Run, recipe_as_json
from headscope.app.escape import visible
from headscope.app.security import BODY_CAP, Guard, authorities, content_security_policy
from headscope.app.session import Command, Session, Sessions, read_command
from headscope.app.worker import Superseded, Ticket, Worker
from headscope.kernels.errors import HeadscopeError, InputError, SelectionError

Result = TypeVar("Result")

PATIENCE = 0.3  # seconds after which the page is told how far the model is
GREETING = "When Mary and John went to the store, John gave a drink to Mary. When Mary and John went to the park, John gave a"
Place = Annotated[str, Path(pattern=r"^[0-9]{1,6}$")]
FOR_EVER = {"cache-control": "private, max-age=31536000, immutable"}


@dataclass(eq=False)
class Workbench:
    """The guarded application and what lies behind it."""

    app: Guard
    dash: Dash
    server: FastAPI
    desk: Desk
    token: str
    port: int

    @property
    def engine(self) -> Engine:
        return self.desk.engine

    @property
    def address(self) -> str:
        """What to open: the launch token is in it."""
        return f"http://127.0.0.1:{self.port}/?token={self.token}"

    def close(self) -> None:
        self.desk.worker.close()


@dataclass(frozen=True, eq=False)
class Opening:
    """What a new page shows: the first run, the shapes of its sites, and the head (row, head) chosen in it."""

    run: Run
    shapes: list[tuple[int, int]]
    head: tuple[int, int]


class Desk:
    """Everything the page can ask for; each method runs on the server's event loop and leaves the model to the worker."""

    def __init__(self, engine: Engine, worker: Worker, first: Opening) -> None:
        self.engine = engine
        self.worker = worker
        self.first = first
        self.sessions = Sessions()

    async def do(self, work: Callable[[Ticket], Result], *, lane: str | None = None) -> Result:
        """Run a job in the worker; where it takes long, tell the page how far it is."""
        future, ticket = self.worker.submit(work, lane=lane)
        waiting = asyncio.wrap_future(future)
        while not (await asyncio.wait({waiting}, timeout=PATIENCE))[0]:
            if lane is not None:
                set_props("progress", {"children": ticket.progress})
        return waiting.result()

    def page(self, **query: str) -> Component:
        """A new page on the first run, which is there already; what stands behind `?` is not looked at."""
        name, session = self.sessions.open(GREETING)
        run = self.first.run
        state = self.state(0, session, run, run, self.first.shapes)
        return pages.workbench(name, session.text, state, run, session.recipe, self.engine.compare(run, run), self.engine.labels)

    async def act(self, data: object, page: object) -> tuple[object, ...]:
        """Carry out one command of a page: (run, strip, edits, outcome, problem) for its components."""
        number = data.get("number") if isinstance(data, dict) else None
        answered = {"answered": number}
        try:
            session = self.sessions.get(page)
            command = read_command(data, self.engine.heads)
            return await self._carry_out(command, session, str(page))
        except Superseded:
            return answered, no_update, no_update, no_update, no_update
        except HeadscopeError as error:
            return answered, no_update, no_update, no_update, pages.problem(str(error))
        except Exception as error:  # the border of the server: the page is told, the terminal gets the whole story
            traceback.print_exc()
            message = f"Internal error ({type(error).__name__}); the terminal shows the details. What was there before still holds."
            return answered, no_update, no_update, no_update, pages.problem(message)

    async def _carry_out(self, command: Command, session: Session, lane: str) -> tuple[object, ...]:
        saved = (session.text, session.recipe, session.before, session.after)
        session.apply(command)
        text, recipe = session.text, session.recipe

        def work(ticket: Ticket) -> tuple[Run, Run, list[tuple[int, int]]]:
            before = self.engine.run(text, (), ticket.report)
            return before, self.engine.run(text, recipe, ticket.report), self.engine.shapes(before)

        try:
            before, after, shapes = await self.do(work, lane=lane)
        except Superseded:
            raise  # the newer command builds on this one
        except Exception:
            if session.recipe is recipe and session.text is text:  # nothing newer has been applied meanwhile
                session.text, session.recipe, session.before, session.after = saved
            raise
        state = self.state(command.number, session, before, after, shapes)
        changed = command.action in ("text", "show")
        labels = self.engine.labels
        return (
            state,
            pages.strip(after.tokens) if changed else no_update,
            pages.edit_list(session.recipe, labels),
            pages.outcome(self.engine.compare(before, after), after),
            None,
        )

    def state(self, number: int, session: Session, before: Run, after: Run, shapes: list[tuple[int, int]]) -> dict[str, object]:
        """What the page's script needs to know: keys, shapes and the recipe; no text, no numbers of the model."""
        sites = self.engine.sites
        return {
            "answered": number,
            "before": before.key,
            "after": after.key,
            "tokens": len(after.tokens),
            "pictures": f"/pictures/{PICTURE_VERSION}",
            "start": list(self.first.head),
            "rows": [
                {"label": label, "heads": site.query_heads, "groups": site.kv_heads, "kind": site.kind, "queries": queries, "keys": keys}
                for label, site, (queries, keys) in zip(self.engine.labels, sites, shapes, strict=True)
            ],
            "recipe": recipe_as_json(session.recipe),
            "undo": bool(session.before),
            "redo": bool(session.after),
        }

    async def picture(self, key: str, name: str, draw: Callable[[Run], bytes]) -> Response:
        """A picture of a run, drawn once and kept with the run."""

        def work(ticket: Ticket) -> bytes:
            run = self.engine.find(key)
            if name not in run.pictures:
                run.pictures[name] = draw(run)
            return run.pictures[name]

        return await self._answer(work, "image/png")

    async def numbers(self, key: str, read: Callable[[Run], bytes], kind: str = "application/octet-stream") -> Response:
        """Exact numbers of a run."""
        return await self._answer(lambda ticket: read(self.engine.find(key)), kind)

    async def _answer(self, work: Callable[[Ticket], bytes], kind: str) -> Response:
        try:
            return Response(await self.do(work), media_type=kind, headers=FOR_EVER)
        except SelectionError as error:
            return PlainTextResponse(str(error), 404)
        except HeadscopeError as error:
            return PlainTextResponse(str(error), 400)


def build(engine_of: Callable[[], Engine], *, port: int, token: str | None = None) -> Workbench:
    """The guarded application around a model.

    Args:
        engine_of: makes the engine; called in the worker's thread, which owns the model from then on.
        port: where it will listen; part of what the guard checks.
        token: the launch token; a fresh one by default.
    """
    worker = Worker()

    def open_engine(ticket: Ticket) -> tuple[Engine, Opening]:
        engine = engine_of()
        run = engine.open(GREETING)
        return engine, Opening(run, engine.shapes(run), engine.striking(run))

    try:
        engine, first = worker.submit(open_engine)[0].result()
    except BaseException:
        worker.close()
        raise
    desk = Desk(engine, worker, first)
    server = FastAPI(docs_url=None, redoc_url=None, openapi_url=None)
    _routes(server, desk)
    app = Dash(
        "headscope.app",
        server=server,  # type: ignore[arg-type]
        use_pages=True,
        pages_folder="",
        title="Headscope",
        update_title="",
        assets_folder="assets",
        index_string=pages.INDEX,
        serve_locally=True,
        include_pages_meta=False,
        websocket_callbacks=True,
        suppress_callback_exceptions=True,
        show_undo_redo=False,
        enable_mcp=False,
    )
    dash.register_page(  # type: ignore[no-untyped-call]
        "heads", path="/heads", title="Headscope", description="Attention heads, live", layout=desk.page
    )
    facts = f"{len(engine.sites)} layers · {sum(engine.heads)} heads · {engine.precision}"
    name = os.path.basename(os.path.normpath(engine.name)) if os.path.isdir(engine.name) else engine.name
    app.layout = pages.shell(dash.page_container, name, facts)
    _callbacks(app, desk)
    app.enable_dev_tools(debug=False)
    asyncio.run(_first_request(server))
    secret = token or secrets.token_urlsafe(24)
    policy = content_security_policy(app.csp_hashes(), authorities(("127.0.0.1", "localhost"), port))  # CSP knows no [::1]
    return Workbench(Guard(server, port=port, token=secret, policy=policy), app, server, desk, secret, port)


def serve(model: str, *, host: str, port: int, threads: int | None, device: str = "cpu", open_browser: bool = True) -> None:
    """Run the workbench until it is interrupted.

    Raises:
        InputError: an address that is not this machine's own, or a port that is taken.
    """
    if host not in ("127.0.0.1", "localhost"):
        raise InputError(
            f"the workbench binds 127.0.0.1 only, not {visible(host)!r}: it has no encryption and no users yet; "
            "to reach it from elsewhere, forward the port: ssh -L 8050:127.0.0.1:8050 this-machine"
        )
    listener = listen(port)
    actual = int(listener.getsockname()[1])
    count = threads or max(1, (os.cpu_count() or 2) - 1)
    print(f"loading {visible(model)} …", file=sys.stderr, flush=True)
    workbench = build(lambda: Engine(model, device=device, threads=count), port=actual)
    print(f"Headscope is at {workbench.address}", flush=True)
    print("Stop it with Ctrl-C.", file=sys.stderr, flush=True)
    if open_browser:
        webbrowser.open(workbench.address)
    try:
        uvicorn.Server(configuration(workbench)).run(sockets=[listener])
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
    finally:
        workbench.close()
        listener.close()


def configuration(workbench: Workbench) -> uvicorn.Config:
    """How the server listens: no log of addresses, since one of them carries the token; no trust in proxy headers."""
    return uvicorn.Config(
        workbench.app,
        log_level="warning",
        access_log=False,
        proxy_headers=False,
        server_header=False,
        ws_max_size=BODY_CAP,
        timeout_graceful_shutdown=2,
    )


async def _first_request(server: FastAPI) -> None:
    """Ask for something once: Dash sets up its pages then, with an inline script whose hash the policy must name."""
    statuses: list[int] = []

    async def receive() -> dict[str, object]:
        return {"type": "http.request", "body": b"", "more_body": False}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            statuses.append(message["status"])

    request = {"type": "http", "method": "GET", "path": "/_dash-layout", "raw_path": b"/_dash-layout", "query_string": b"", "headers": []}
    surroundings = {"scheme": "http", "http_version": "1.1", "root_path": "", "server": ("127.0.0.1", 80), "client": ("127.0.0.1", 1)}
    await server({**request, **surroundings}, receive, send)
    if statuses != [200]:
        raise RuntimeError(f"the page could not be made: Dash answered {statuses}")


def listen(port: int) -> socket.socket:
    """A socket on 127.0.0.1; port 0 takes a free one."""
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(("127.0.0.1", port))
    except OSError as error:
        listener.close()
        raise InputError(f"port {port} of 127.0.0.1 cannot be used ({error.strerror}); give another with --port") from error
    return listener


def _routes(server: FastAPI, desk: Desk) -> None:
    engine = desk.engine
    base = f"/pictures/{PICTURE_VERSION}/{{run}}"

    @server.get("/")
    async def home() -> Response:
        return RedirectResponse("/heads", 303)

    @server.get(base + "/grid-{scale}.png")
    async def grid(run: str, scale: str) -> Response:
        return await desk.picture(run, f"grid-{scale}", lambda found: engine.grid(found, scale))

    @server.get(base + "/{row}/{head}-{scale}.png")
    async def pattern(run: str, row: Place, head: Place, scale: str) -> Response:
        return await desk.picture(run, f"{row}/{head}-{scale}", lambda found: engine.pattern(found, int(row), int(head), scale))

    @server.get("/numbers/{run}/{row}/{head}/{query}")
    async def numbers(run: str, row: Place, head: Place, query: Place) -> Response:
        return await desk.numbers(run, lambda found: engine.row(found, int(row), int(head), int(query)))

    @server.get("/numbers/{run}/{row}/{head}")
    async def summary(run: str, row: Place, head: Place) -> Response:
        return await desk.numbers(run, lambda found: engine.summary(found, int(row), int(head)), "application/json")

    @server.get("/alive")
    async def alive() -> Response:
        return PlainTextResponse("alive", headers={"cache-control": "no-store"})


def _callbacks(app: Dash, desk: Desk) -> None:
    @app.callback(
        Output("run", "data"),
        Output("strip", "children"),
        Output("edits", "children"),
        Output("outcome", "children"),
        Output("problem", "children"),
        Input("command", "data"),
        State("page", "data"),
        prevent_initial_call=True,
    )
    async def act(command: object, page: object) -> tuple[object, ...]:
        return await desk.act(command, page)

    in_browser: Callable[..., None] = app.clientside_callback
    in_browser(ClientsideFunction("headscope", "show"), Output("shown", "data"), Input("run", "data"))
    for function, component, prop in (
        ("slide", "scale-slider", "value"),
        ("type", "scale-number", "value"),
        ("choose_run", "which", "value"),
        ("choose_scale", "colour-scale", "value"),
    ):
        in_browser(ClientsideFunction("headscope", function), Input(component, prop))
