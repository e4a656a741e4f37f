"""The door of the server: every request and every websocket passes here before anything else sees it.

What it refuses, and why:
    Host not ours                   421   a foreign page that points its own name at 127.0.0.1 (DNS rebinding)
    other method than GET HEAD POST 405
    foreign, null or (on POST, websocket) absent Origin, or Sec-Fetch-Site of another site
                                    403   a foreign page that sends requests here with the user's cookie
    no cookie of this launch        401   any other program or user of the machine
    POST that is not JSON           415   what a foreign page can send without asking first
    body above the cap              413
A websocket that fails any of them is closed before it is accepted, which the client sees as 403.

The launch token comes once, in the address that the terminal prints; it is exchanged for a cookie and taken out of the
address. The cookie is a second secret, HttpOnly and SameSite=Strict, named after the port because cookies ignore ports.
"""

from __future__ import annotations

import hmac
import secrets
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any
from urllib.parse import parse_qsl, urlencode

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[Scope, Receive, Send], Awaitable[None]]
Headers = list[tuple[bytes, bytes]]

BODY_CAP = 8 * 1024 * 1024
TOKEN = "token"
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")

UNAUTHORISED = "No access. Open the address that `headscope app` printed in the terminal; it carries this launch's token.\n"


class TooLarge(Exception):
    """The body grew beyond the cap while it was read."""


def content_security_policy(script_hashes: Sequence[str], authorities: Sequence[str]) -> str:
    """The policy sent with every response: nothing but our own files, no inline script beyond Dash's own few.

    Args:
        script_hashes: `'sha256-…'` of each inline script, as `dash.Dash.csp_hashes()` gives them.
        authorities: `host:port` under which we are reached; the websocket needs them by name in older browsers.
    """
    sockets = " ".join(f"ws://{authority}" for authority in authorities)
    return "; ".join(
        (
            "default-src 'none'",
            " ".join(("script-src 'self'", *script_hashes)),
            "style-src 'self' 'unsafe-inline'",
            "img-src 'self' data: blob:",
            "font-src 'self' data:",
            f"connect-src 'self' {sockets}",
            "worker-src 'self' blob:",
            "frame-ancestors 'none'",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


class Guard:
    """An ASGI application around another one; see the module docstring for what it refuses.

    Args:
        app: what to protect.
        port: the port we listen on; part of the Host header and of the cookie's name.
        token: the launch token, at least 128 bits.
        policy: the Content-Security-Policy.
        hosts: names under which we may be addressed.
        home: where a request with a good token is sent on to.
    """

    def __init__(
        self, app: Application, *, port: int, token: str, policy: str, hosts: Sequence[str] = LOOPBACK, home: str = "/heads"
    ) -> None:
        self.app = app
        self.token = token.encode()
        self.secret = secrets.token_urlsafe(32).encode()
        self.cookie = f"headscope-{port}".encode()
        self.authorities = frozenset(authority.encode() for authority in authorities(hosts, port))
        self.origins = frozenset(b"http://" + authority for authority in self.authorities)
        self.home = home
        self.headers: Headers = [
            (b"content-security-policy", policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"x-frame-options", b"DENY"),
            (b"referrer-policy", b"no-referrer"),
            (b"cross-origin-opener-policy", b"same-origin"),
            (b"cross-origin-resource-policy", b"same-origin"),
            (b"permissions-policy", b"camera=(), geolocation=(), microphone=()"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
        elif scope["type"] == "websocket":
            await self._websocket(scope, receive, send)
        else:
            await self._http(scope, receive, send)

    async def _websocket(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = scope["headers"]
        if self._foreign(headers, needs_origin=True) or not self._has_cookie(headers):
            await receive()  # the connect event
            await send({"type": "websocket.close", "code": 4003})
            return
        await self.app(scope, receive, send)

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers, method = scope["headers"], scope["method"]
        query = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        offered = [value for name, value in query if name == TOKEN]
        foreign = self._foreign(headers, needs_origin=method == "POST", arriving=bool(offered) and method == "GET")
        if foreign is not None:
            await self._answer(send, *foreign)
        elif method not in ("GET", "HEAD", "POST"):
            await self._answer(send, 405, "Method not allowed.\n", [(b"allow", b"GET, HEAD, POST")])
        elif method == "GET" and offered:
            await self._admit(scope, query, offered, send)
        elif not self._has_cookie(headers):
            await self._answer(send, 401, UNAUTHORISED)
        elif method == "POST" and _one(headers, b"content-type").split(b";")[0].strip().lower() != b"application/json":
            await self._answer(send, 415, "Only application/json is taken.\n")
        elif _declared_length(headers) > BODY_CAP:
            await self._answer(send, 413, f"The body is larger than {BODY_CAP} bytes.\n", [(b"connection", b"close")])
        else:
            await self._pass_on(scope, receive, send)

    async def _pass_on(self, scope: Scope, receive: Receive, send: Send) -> None:
        taken = 0
        started = False

        async def counted() -> Message:
            nonlocal taken
            message = await receive()
            taken += len(message.get("body", b""))
            if taken > BODY_CAP:
                raise TooLarge
            return message

        async def marked(message: Message) -> None:
            nonlocal started
            if message["type"] == "http.response.start":
                started = True
                if taken > BODY_CAP:  # the application turned our exception into an answer of its own
                    message = {**message, "status": 413}
                message = {**message, "headers": self._with_ours(list(message.get("headers", [])))}
            await send(message)

        try:
            await self.app(scope, counted, marked)
        except TooLarge:
            if not started:
                await self._answer(send, 413, f"The body is larger than {BODY_CAP} bytes.\n", [(b"connection", b"close")])

    async def _admit(self, scope: Scope, query: list[tuple[str, str]], offered: list[str], send: Send) -> None:
        if len(offered) != 1 or not hmac.compare_digest(offered[0].encode("utf-8", "surrogateescape"), self.token):
            await self._answer(send, 401, UNAUTHORISED)
            return
        rest = urlencode([(name, value) for name, value in query if name != TOKEN])
        path = scope["path"] if scope["path"] not in ("", "/") else self.home
        if not path.startswith("/") or path.startswith(("//", "/\\")):  # would lead to another host
            path = self.home
        location = _quoted(path) + (f"?{rest}" if rest else "")
        cookie = self.cookie + b"=" + self.secret + b"; Path=/; HttpOnly; SameSite=Strict"
        await self._answer(send, 303, "", [(b"location", location.encode()), (b"set-cookie", cookie)])

    def _foreign(self, headers: Headers, *, needs_origin: bool, arriving: bool = False) -> tuple[int, str] | None:
        """Why this request does not come from our own page, or None; `arriving`: it brings a token from elsewhere."""
        if _one(headers, b"host").lower() not in self.authorities:
            return 421, "This server answers to its own address only.\n"
        origin = _one(headers, b"origin")
        if (origin or needs_origin) and origin not in self.origins:
            return 403, "Requests from other pages are refused.\n"
        site = _one(headers, b"sec-fetch-site")
        navigated = arriving and _one(headers, b"sec-fetch-mode") == b"navigate"
        if site not in (b"", b"same-origin", b"none") and not navigated:
            return 403, "Requests from other pages are refused.\n"
        return None

    def _has_cookie(self, headers: Headers) -> bool:
        for name, value in headers:
            if name == b"cookie":
                for part in value.split(b";"):
                    key, _, content = part.strip().partition(b"=")
                    if key == self.cookie and hmac.compare_digest(content, self.secret):
                        return True
        return False

    def _with_ours(self, headers: Headers) -> Headers:
        named = {name.lower() for name, _ in headers}
        kept = [(name, value) for name, value in headers if name.lower() not in {ours for ours, _ in self.headers}]
        unless_said = [] if b"cache-control" in named else [(b"cache-control", b"no-cache, private")]
        return kept + self.headers + unless_said

    async def _answer(self, send: Send, status: int, text: str, extra: Headers | None = None) -> None:
        body = text.encode()
        headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
        headers = self._with_ours([*headers, (b"cache-control", b"no-store"), *(extra or [])])
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def authorities(hosts: Sequence[str], port: int) -> list[str]:
    """`host:port` for each host, as browsers write it: port 80 is left out as well as said."""
    return [f"{host}:{port}" for host in hosts] + (list(hosts) if port == 80 else [])


def _one(headers: Headers, wanted: bytes) -> bytes:
    """The header's value; empty where it is absent, and unmatched by anything where it is sent twice."""
    values = [value for name, value in headers if name == wanted]
    return values[0] if len(values) == 1 else b"," if values else b""


def _declared_length(headers: Headers) -> int:
    value = _one(headers, b"content-length")
    return int(value) if value.isdigit() else 0 if not value else BODY_CAP + 1


def _quoted(path: str) -> str:
    from urllib.parse import quote

    return quote(path, safe="/-._~")
