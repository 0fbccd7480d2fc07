"""Ollama's HTTP API as far as `make register` asks it, by a model that really answers; for tests without an Ollama.

Written after Ollama's source (its commit is in ollama_templates.json): server/routes.go, server/create.go,
template/template.go and manifest/. It replaces near chat templates by Ollama's own, as Ollama does.
"""

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import go_text_template
import llama_cpp

from serve.engines.ollama.template import renderer

TEMPLATES = json.loads(Path(__file__).with_name("ollama_templates.json").read_text(encoding="utf-8"))
NATIVE = (0, 30)  # from here on, Ollama renders a GGUF's own template
FULL = "write /models/blobs/sha256-1: no space left on device"


@cache
def nearest(template: str) -> str | None:
    """The name of Ollama's own template that replaces this one: fewer than 100 edits away, and the nearest."""
    found, least = None, 100
    for own in TEMPLATES["index"]:
        if abs(len(own["template"]) - len(template)) < least:
            edits = distance(template, own["template"])
            found, least = (own["name"], edits) if edits < least else (found, least)
    return found


def distance(one: str, other: str) -> int:
    """Levenshtein's: insertions, deletions and replacements."""
    row = list(range(len(other) + 1))
    for i, a in enumerate(one, 1):
        diagonal, row[0] = row[0], i
        for j, b in enumerate(other, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (a != b))
    return row[-1]


def collated(messages: list[dict[str, str]]) -> dict[str, Any]:
    """What a Go template gets: neighbours of one role are merged."""
    merged: list[dict[str, str]] = []
    for message in messages:
        if merged and merged[-1]["Role"] == message["role"]:
            merged[-1]["Content"] += "\n\n" + message["content"]
        else:
            merged.append({"Role": message["role"], "Content": message["content"]})
    system = "\n\n".join(message["content"] for message in messages if message["role"] == "system")
    return {"System": system, "Messages": merged, "Tools": None}


class OllamaDouble(ThreadingHTTPServer):
    """A server in this process. `go_template` is its OLLAMA_GO_TEMPLATE, `key` what a proxy before it would want."""

    daemon_threads = True

    def __init__(self, folder: Path, version: str = "0.33.0", go_template: bool = True) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.version, self.go_template, self.key = folder, version, go_template, ""
        self.blobs = folder / "blobs"
        self.blobs.mkdir(parents=True)
        self.manifests: dict[str, dict[str, Any] | None] = {}  # None is a corrupt one
        self.faults: list[str] = []
        self.asked: list[str] = []
        self.loaded: dict[str, llama_cpp.Llama] = {}
        self.one_at_a_time = threading.Lock()
        threading.Thread(target=self.serve_forever, args=(0.01,), daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def fault(self, name: str) -> bool:
        """Whether this goes wrong now."""
        if name in self.faults:
            self.faults.remove(name)
            return True
        return False

    def blob(self, digest: str) -> Path:
        return self.blobs / digest.replace(":", "-")

    def digest(self, name: str) -> str:
        return hashlib.sha256(json.dumps(self.manifests[name]).encode()).hexdigest()

    def model(self, name: str) -> llama_cpp.Llama:
        manifest = self.manifests[name] or {}
        key = json.dumps(manifest)
        if key not in self.loaded:
            tokens = manifest["parameters"].get("num_ctx", 4096)
            path = str(self.blob(manifest["model"]))
            self.loaded[key] = llama_cpp.Llama(path, n_ctx=tokens, n_threads=1, verbose=False)
        return self.loaded[key]

    def create(self, request: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """The lines of the answer; an error is a line, too."""
        ((_, digest),) = request["files"].items()
        yield {"status": "parsing GGUF"}
        if not self.blob(digest).exists():
            yield {"error": f"open /models/blobs/{digest}: no such file or directory"}
            return
        if self.fault("full while creating"):
            yield {"error": FULL}
            return
        yield {"status": "validating GGUF model", "total": 1, "completed": 1}
        model = llama_cpp.Llama(str(self.blob(digest)), vocab_only=True, verbose=False)
        own = nearest(model.metadata.get("tokenizer.chat_template", ""))
        manifest = {"model": digest, "template": None, "parameters": {}, "license": request.get("license")}
        if own:
            yield {"status": f"using autodetected template {own}"}
            manifest |= {"template": TEMPLATES["own"][own]["go"], "parameters": {"stop": TEMPLATES["own"][own]["stop"]}}
        manifest["template"] = request.get("template") or manifest["template"]
        manifest["parameters"] |= request.get("parameters") or {}
        yield {"status": "writing manifest"}
        if self.fault("ends without success"):
            return
        if not self.fault("is not listed"):
            self.manifests[request["model"]] = manifest
        yield {"status": "success"}

    def render(self, name: str, messages: list[dict[str, str]]) -> str:
        manifest, model = self.manifests[name] or {}, self.model(name)
        if manifest["template"] and self.go_template:
            return go_text_template.render(manifest["template"], collated(messages))
        if tuple(map(int, self.version.split(".")[:2])) < NATIVE:
            return messages[-1]["content"]  # `{{ .Prompt }}`
        bos = llama_cpp.llama_vocab_get_text(model._model.vocab, model.token_bos()).decode()
        eos = llama_cpp.llama_vocab_get_text(model._model.vocab, model.token_eos()).decode()
        prompt = renderer(model.metadata["tokenizer.chat_template"], bos, eos)(messages, True)
        return prompt.removeprefix(bos) if llama_cpp.llama_vocab_get_add_bos(model._model.vocab) else prompt

    def answer(self, name: str, prompt: str, options: dict[str, Any]) -> dict[str, Any]:
        """Greedy, until an end-of-turn token, a stop text or the number of tokens asked for."""
        model, manifest = self.model(name), self.manifests[name] or {}
        options = manifest["parameters"] | options
        asked = model.tokenize(prompt.encode(), add_bos=True, special=True)
        tokens, reason = greedy(model, asked, options["num_predict"])
        text = model._model.detokenize(tokens).decode("utf-8", "replace")
        for stop in options.get("stop", []):
            text, reason = (text.partition(stop)[0], "stop") if stop in text else (text, reason)
        message = {"role": "assistant", "content": text}
        return {"message": message, "done": True, "done_reason": reason, "prompt_eval_count": len(asked)}


def greedy(model: llama_cpp.Llama, asked: list[int], most: int) -> tuple[list[int], str]:
    """(tokens, `stop` or `length`) of the most likely answer, without the token that ends it."""
    found: list[int] = []
    reason = "length"
    for token in model.generate(asked, temp=0.0, repeat_penalty=1.0):
        if llama_cpp.llama_vocab_is_eog(model._model.vocab, token):
            reason = "stop"
            break
        found.append(token)
        if len(found) == most:
            break
    return found, reason


class Handler(BaseHTTPRequestHandler):
    """The routes of Ollama that are used, with its statuses and words."""

    protocol_version = "HTTP/1.1"
    server: OllamaDouble

    def do_GET(self) -> None:
        self.asked()
        if self.path == "/api/version":
            self.say(200, {"version": self.server.version})
        elif self.path == "/api/tags":
            names = [name for name, manifest in self.server.manifests.items() if manifest]
            self.say(200, {"models": [{"name": n, "model": n, "digest": self.server.digest(n)} for n in names]})
        elif self.path == "/v1/models":
            names = [name for name, manifest in self.server.manifests.items() if manifest]
            data = [{"id": name, "object": "model", "created": 0, "owned_by": "library"} for name in names]
            self.say(200, {"object": "list", "data": data})
        else:
            self.say(404, {"error": "not found"})

    def do_HEAD(self) -> None:
        self.asked()
        self.send_response(200 if self.server.blob(self.path.rpartition("/")[2]).exists() else 404)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_POST(self) -> None:
        self.asked()
        if self.server.key and self.headers.get("Authorization") != f"Bearer {self.server.key}":
            self.close_connection = True
            self.say(401, {"error": "unauthorized"})
            return
        if self.path.startswith("/api/blobs/"):
            self.take_blob(self.path.rpartition("/")[2])
            return
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.one_at_a_time:
            if self.path == "/api/create":
                self.stream(self.server.create(request))
            elif self.path == "/api/copy":
                self.server.manifests[request["destination"]] = self.server.manifests[request["source"]]
                self.send_response(200)
                self.send_header("Content-Length", "0")
                self.end_headers()
            elif self.path == "/v1/chat/completions":
                self.complete(request)
            else:
                self.chat(request)

    def do_DELETE(self) -> None:
        self.asked()
        name = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["model"]
        if name not in self.server.manifests:
            self.say(404, {"error": f"model '{name}' not found"})
        elif self.server.manifests[name] is None:
            self.say(500, {"error": "unexpected EOF"})
        else:
            del self.server.manifests[name]
            self.say(200, {})

    def take_blob(self, digest: str) -> None:
        left, content = int(self.headers["Content-Length"]), b""
        if self.server.fault("cut in the upload"):
            self.rfile.read(left // 2)
            self.connection.close()
            self.close_connection = True
            return
        content = self.rfile.read(left)
        if self.server.fault("full in the upload"):
            self.say(500, {"error": FULL})
            return
        if self.server.fault("damaged on the way"):
            content = content[:-1] + bytes([content[-1] ^ 1])
        found = f"sha256:{hashlib.sha256(content).hexdigest()}"
        if found != digest:
            self.say(400, {"error": f'digest mismatch, expected "{digest}", got "{found}"'})
            return
        self.server.blob(digest).write_bytes(content)
        self.say(201, {})

    def chat(self, request: dict[str, Any]) -> None:
        """`/api/generate` without a prompt loads; `/api/chat` renders or answers."""
        name = request["model"]
        if name not in self.server.manifests:
            self.say(404, {"error": f"model '{name}' not found"})
        elif self.server.manifests[name] is None:
            self.say(500, {"error": "unexpected EOF"})
        elif self.path == "/api/show":
            self.say(200, {"license": (self.server.manifests[name] or {})["license"] or ""})
        elif self.server.fault("busy"):
            self.say(503, {"error": "server busy, please try again.  maximum pending requests exceeded"})
        elif not request.get("messages"):
            self.server.model(name)
            self.say(200, {"model": name, "response": "", "done": True, "done_reason": "load"})
        else:
            prompt = self.server.render(name, request["messages"])
            if request.get("_debug_render_only"):
                self.say(200, {"model": name, "_debug_info": {"rendered_template": prompt}})
            else:
                self.say(200, {"model": name} | self.server.answer(name, prompt, request["options"]))

    def complete(self, request: dict[str, Any]) -> None:
        """OpenAI's way to ask, without log-probabilities as before 0.12.11 (openai/openai.go)."""
        name = request["model"]
        if not self.server.manifests.get(name):
            self.say(404, {"error": {"message": f"model '{name}' not found", "type": "not_found_error"}})
            return
        prompt = self.server.render(name, request["messages"])
        found = self.server.answer(name, prompt, {"num_predict": request.get("max_tokens", -1)})
        choice = {"index": 0, "message": found["message"], "finish_reason": found["done_reason"]}
        usage = {"prompt_tokens": found["prompt_eval_count"], "completion_tokens": 0}
        self.say(200, {"object": "chat.completion", "model": name, "choices": [choice], "usage": usage})

    def stream(self, lines: Iterator[dict[str, Any]]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for line in lines:
            data = json.dumps(line).encode() + b"\n"
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            if self.server.fault("dies while creating"):
                self.connection.close()
                self.close_connection = True
                return
        self.wfile.write(b"0\r\n\r\n")

    def say(self, status: int, answer: dict[str, Any]) -> None:
        data = json.dumps(answer).encode()
        if self.server.fault("is no Ollama"):
            data = b"<html>It works!</html>"
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def asked(self) -> None:
        self.server.asked.append(f"{self.command} {re.sub('sha256:.*', '', self.path)}")

    def log_message(self, format: str, *args: object) -> None:
        pass
