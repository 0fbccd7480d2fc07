"""What of the Hugging Face Hub's HTTP interface `datasets` asks for, over the files of one set, on 127.0.0.1."""

import hashlib
import http.server
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager

COMMIT = "a" * 40


@contextmanager
def hub(name: str, files: dict[str, str]) -> Iterator[str]:
    """The address of a Hub that has the set `name` and nothing else."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def answer(self, status: int, body: bytes, **headers: str) -> None:
            self.send_response(status)
            for key, value in headers.items():
                self.send_header(key.replace("_", "-"), value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path.startswith((f"/api/datasets/{name}/revision/", f"/api/datasets/{name}/tree/")):
                self.answer(200, json.dumps(self.described(path)).encode(), Content_Type="application/json")
            elif path.startswith(f"/datasets/{name}/resolve/"):
                file = path.split("/resolve/")[1].partition("/")[2]
                found = {"ETag": f'"{digest(file)}"'} if file in files else {"X_Error_Code": "EntryNotFound"}
                self.answer(200 if file in files else 404, files.get(file, "").encode(), X_Repo_Commit=COMMIT, **found)
            elif path == f"/api/datasets/{name}":
                self.answer(200, json.dumps(self.described("/revision/")).encode(), Content_Type="application/json")
            else:
                self.answer(404, b"{}", X_Error_Code="RepoNotFound")

        do_HEAD = do_GET

        def described(self, path: str) -> object:
            if "/revision/" in path:
                known = {"private": False, "gated": False, "downloads": 0, "tags": []}
                return {"id": name, "sha": COMMIT, "siblings": [{"rfilename": file} for file in files]} | known
            folder = path.split("/tree/")[1].partition("/")[2]
            inside = {file: text for file, text in files.items() if file.startswith(folder)}
            return [
                {"type": "file", "path": file, "size": len(text), "oid": digest(file)} for file, text in inside.items()
            ]

    def digest(file: str) -> str:
        return hashlib.sha1(files[file].encode()).hexdigest()

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
