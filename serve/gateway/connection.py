"""How the gateway listens: on its port until a signal, and to nobody who sends half a request and waits."""

import asyncio
import signal
import sys
import threading
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_SECONDS = 10
IDLE_SECONDS = 75


class Connection(H11Protocol):
    """Each head has `HEAD_SECONDS`, for which uvicorn would wait for ever, and so has what follows an early answer.

    Until it answers, a body's time is the application's matter.
    """

    deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def on_response_complete(self) -> None:
        is_half_sent = self.conn.their_state is h11.SEND_BODY  # answered before its body was there: 401, 408, 413
        super().on_response_complete()
        if is_half_sent:
            self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.deadline:
            self.deadline.cancel()
        super().connection_lost(exc)

    def _watch(self) -> None:
        is_waiting = self.cycle is None or self.cycle.response_complete
        if self.deadline and not is_waiting:
            self.deadline.cancel()
            self.deadline = None
        elif is_waiting and not self.deadline:
            self.deadline = self.loop.call_later(HEAD_SECONDS, self._close)

    def _close(self) -> None:
        if not self.transport.is_closing():
            self.transport.close()


def listen(application: Any, name: str, host: str, port: int) -> int:
    """Serve `name` until a signal; the exit code, 1 where it cannot listen."""
    config = uvicorn.Config(
        application,
        host=host,
        port=port,
        http=Connection,
        lifespan="off",
        ws="none",
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_keep_alive=IDLE_SECONDS,
    )
    serving = threading.Thread(target=uvicorn.Server(config).run, daemon=True)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        serving.start()
        sys.stdout.write(f"serving {name} on {host}:{port}\n")
        sys.stdout.flush()
        serving.join()
    except KeyboardInterrupt:
        return 0
    return 1
