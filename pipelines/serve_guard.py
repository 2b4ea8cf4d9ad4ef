"""Who may ask the server, and what its pages may do: hosts, token, requests from other sites, security headers."""

from __future__ import annotations

import hmac
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qsl, urlencode

Scope = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

COOKIE = "videoclip_token"
# Nothing from elsewhere, nothing inline: a line of subtitles that were a script could not run even if it got out.
HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; "
    "media-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
}


class Guard:
    """Lets a request through only if it is addressed to this machine (or knows the token) and no other site sent it.

    A browser on this machine can be made to send requests by any page it visits: those say so in `Sec-Fetch-Site` or
    `Origin`, or ask for a host whose name another site has pointed here.
    """

    def __init__(self, app: App, loopback: bool, token: str) -> None:
        self.app = app
        self.loopback = loopback
        self.token = token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        refused = self._refusal(scope, headers)
        if refused:
            await _answer(send, *refused)
            return

        async def with_headers(message: MutableMapping[str, Any]) -> None:
            if message["type"] == "http.response.start":
                extra = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
                message["headers"] = [*message.get("headers", []), *extra]
            await send(message)

        await self.app(scope, receive, with_headers)

    def _refusal(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, dict[str, str]] | None:
        """Status, text and headers of the answer to a request that is not let through."""
        if scope["method"] not in ("GET", "HEAD"):
            return 405, "this server only reads", {"allow": "GET, HEAD"}
        host = headers.get("host", "")
        if self.loopback and _name(host) not in ("localhost", "127.0.0.1", "[::1]"):
            return 403, "asked for another host than this machine", {}
        navigates = scope["path"] == "/" and headers.get("sec-fetch-mode", "navigate") == "navigate"
        if headers.get("sec-fetch-site", "none") not in ("none", "same-origin") and not navigates:
            return 403, "asked by another site", {}
        if "origin" in headers and headers["origin"].partition("://")[2] != host:
            return 403, "asked by another site", {}
        return self._ask_token(scope, headers) if self.token else None

    def _ask_token(self, scope: Scope, headers: dict[str, str]) -> tuple[int, str, dict[str, str]] | None:
        pairs = parse_qsl(scope["query_string"].decode("latin-1"), keep_blank_values=True)
        given = dict(pairs).get("token", "")
        if scope["path"] == "/" and _same(given, self.token):
            rest = urlencode([pair for pair in pairs if pair[0] != "token"])
            cookie = f"{COOKIE}={self.token}; HttpOnly; SameSite=Strict; Path=/"
            return 303, "", {"location": f"/?{rest}" if rest else "/", "set-cookie": cookie}
        bearer = headers.get("authorization", "").removeprefix("Bearer ")
        cookies = dict(part.strip().partition("=")[::2] for part in headers.get("cookie", "").split(";"))
        if _same(bearer, self.token) or _same(cookies.get(COOKIE, ""), self.token):
            return None
        return 401, "this archive asks for its token: open /?token=...", {"www-authenticate": "Bearer"}


def _same(given: str, token: str) -> bool:
    return hmac.compare_digest(given.encode(), token.encode())


def _name(host: str) -> str:
    """A host without its port."""
    return host[: host.index("]") + 1] if host.startswith("[") and "]" in host else host.partition(":")[0]


async def _answer(send: Send, status: int, text: str, headers: dict[str, str]) -> None:
    body = text.encode()
    every = {"content-type": "text/plain; charset=utf-8", "content-length": str(len(body)), **HEADERS, **headers}
    pairs = [(name.encode(), value.encode("latin-1")) for name, value in every.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})
