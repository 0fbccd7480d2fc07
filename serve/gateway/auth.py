"""The API key before an engine: only its health is told without the key, and a refusal says when to come back.

vLLM's own key guards `/v1` alone: `/invocations` would answer a chat, `/tokenize` and `/metrics` tell what is asked.
Runs in vLLM's environment too: standard library and Starlette only. Source: vLLM's docs/usage/security.md.
"""

import os
import secrets
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from typing import Any

OPEN = ("/health",)
REFUSAL = (
    b'{"error": {"message": "The key is missing or wrong", "type": "authentication_error", "param": null, '
    b'"code": "invalid_api_key"}}'
)
RETRY_SECONDS = b"2"


class ApiKeyAuth:
    """ASGI middleware; the key is compared in constant time, and pages of `origins` alone may ask from a browser.

    vLLM makes it without arguments: then the variables `VLLM_API_KEY` and `TRUETUNE_ORIGINS` say both.
    """

    def __init__(
        self, app: Callable[..., Awaitable[None]], key: str = "", origins: Sequence[str] | None = None
    ) -> None:
        self.app = app
        self.wanted = f"Bearer {key or os.environ['VLLM_API_KEY']}".encode()
        self.checked: Callable[..., Awaitable[None]] = self.check
        if origins := os.environ.get("TRUETUNE_ORIGINS", "").split() if origins is None else origins:
            from starlette.middleware.cors import CORSMiddleware

            # A browser asks without the key whether it may ask with it.
            self.checked = CORSMiddleware(self.check, origins, ("GET", "POST"), ("*",), expose_headers=("retry-after",))

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        await self.checked(scope, receive, send)

    async def check(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        """Let in whoever has the key."""

        async def sending(message: dict[str, Any]) -> None:
            if message.get("status") == 503:  # the queue is full, which vLLM says without a time
                message["headers"] = [*message.get("headers", ()), (b"retry-after", RETRY_SECONDS)]
            await send(message)

        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "lifespan" or scope["path"] in OPEN or secrets.compare_digest(given, self.wanted):
            await self.app(scope, receive, sending)
        elif scope["type"] == "http":
            headers = [(b"content-type", b"application/json"), (b"www-authenticate", b"Bearer")]
            await send({"type": "http.response.start", "status": 401, "headers": headers})
            await send({"type": "http.response.body", "body": REFUSAL})
        else:
            await send({"type": "websocket.close", "code": 1008})
