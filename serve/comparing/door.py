"""The playground's door: every path is shut to whoever does not bring its token, and the page asks no other host."""

import secrets
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

# What Gradio's page needs of its own server; fonts, frames and scripts of other hosts stay out.
POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; "
    "frame-ancestors 'none'; form-action 'self'; base-uri 'self'"
)
SHUT = """<!doctype html><meta name="viewport" content="width=device-width"><title>Truetune playground</title>
<style>body {font: 16px system-ui; max-width: 26em; margin: 20vh auto; padding: 0 1em; color-scheme: light dark}</style>
<h1>Truetune playground</h1>
<p>Open the address with the token that <code>make playground</code> printed, or give the token:</p>
<form><input name="token" type="password" autocomplete="off" autofocus> <button>Enter</button></form>"""


class Door:
    """ASGI middleware: `?token=` becomes a cookie that other sites cannot send and scripts cannot read.

    Loopback alone keeps no other user of the machine out, and the page can do what its owner can: load models, write
    files. The token is no API key, since it stands in the browser's history.
    """

    def __init__(self, app: "ASGIApp", token: str, port: int) -> None:
        self.app = app
        self.token = token
        self.cookie = f"truetune-playground-{port}"  # a browser's cookies know no ports

    async def __call__(self, scope: "Scope", receive: "Receive", send: "Send") -> None:
        from starlette.requests import HTTPConnection
        from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse

        if scope["type"] == "lifespan":
            return await self.app(scope, receive, send)
        if scope["type"] == "http" and scope["path"] == "/health":
            return await JSONResponse({"status": "ok"})(scope, receive, send)
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["type"] == "http" and self._is_right(given):
            response = RedirectResponse("/", status_code=303)
            response.set_cookie(self.cookie, self.token, httponly=True, samesite="strict", max_age=30 * 24 * 3600)
            return await response(scope, receive, send)
        if scope["type"] == "http" and self._is_right(HTTPConnection(scope).cookies.get(self.cookie, "")):
            return await self.app(scope, receive, _with_policy(send))
        if scope["type"] == "http":
            return await HTMLResponse(SHUT, 401)(scope, receive, send)
        await send({"type": "websocket.close", "code": 1008})

    def _is_right(self, given: str) -> bool:
        return secrets.compare_digest(given.encode(), self.token.encode())


def _with_policy(send: "Send") -> Any:
    async def sending(message: "Message") -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [
                *message["headers"],
                (b"content-security-policy", POLICY.encode()),
                (b"referrer-policy", b"no-referrer"),
            ]
        await send(message)

    return sending
