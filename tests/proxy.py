"""Something between a client and a server that changes what is asked, as a preset, a plugin or another server would."""

import http.client
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Change = Callable[[dict[str, Any]], dict[str, Any] | None]


@contextmanager
def proxied(port: int, change: Change) -> Iterator[int]:
    """The port of a proxy to a local server; `change` is given each question of a chat."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            if self.path == "/v1/chat/completions":
                asked = json.loads(body)
                body = json.dumps(change(asked) or asked).encode()
            connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
            connection.request(
                "POST",
                self.path,
                body,
                {"Content-Type": "application/json"}
                | {name: value for name, value in self.headers.items() if name == "Authorization"},
            )
            response = connection.getresponse()
            content = response.read()
            connection.close()
            self.send_response(response.status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
