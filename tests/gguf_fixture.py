"""A tiny true GGUF (two random layers, a made-up vocabulary) in a run folder, and a server of it as a process."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from pipeline.files import fingerprint
from pipeline.run import Receipt, Run
from serve.asking.endpoint import ask

REPOSITORY = Path(__file__).parent.parent
NAME = "small"
CONTEXT, TRAINED, SLOTS = 256, 512, 2
ORIGIN = "http://localhost:5173"
WORDS = ["apple", "bread", "cloud", "delta", "eagle", "flame", "grape", "house"]
TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


def write_gguf(
    path: Path, template: str = TEMPLATE, ends: bool = False, words: list[str] = WORDS, kind: str = "F32"
) -> None:
    """A Llama that answers with these words until its context is full, or `ends` some answers by itself.

    Its matrices are of that `kind`, one of ggml's.
    """
    random, width, hidden = np.random.default_rng(0), 32, 64
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), *(f"▁{word}" for word in words)]
    last = slice(len(tokens) - len(words), len(tokens))
    of = gguf.TokenType
    kinds = [of.UNKNOWN, of.CONTROL, of.CONTROL, *[of.BYTE] * 256, *[of.NORMAL] * len(words)]

    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(NAME)
    writer.add_context_length(TRAINED)
    writer.add_embedding_length(width)
    writer.add_block_count(2)
    writer.add_feed_forward_length(hidden)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([0.0] * len(tokens))
    writer.add_token_types(kinds)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_chat_template(template)
    writer.add_add_space_prefix(words is WORDS)

    def add(name: str, *shape: int) -> None:
        weights = np.ones(shape) if len(shape) == 1 else random.normal(0, 0.5, shape)
        if name == "output":  # a word or its opposite always beats the zero of every other token
            half = random.normal(0, 2, (len(words) // 2, width))
            weights[:] = 0
            weights[last] = np.concatenate([half, -half])
            weights[2] = np.roll(half[0], 1) if ends else 0
        type_of = gguf.GGMLQuantizationType["F32" if len(shape) == 1 else kind]
        data = gguf.quants.quantize(weights.astype(np.float32), type_of)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=type_of)

    for name in ("token_embd", "output"):
        add(name, len(tokens), width)
    add("output_norm", width)
    for block in ("blk.0", "blk.1"):
        for name in ("attn_q", "attn_k", "attn_v", "attn_output"):
            add(f"{block}.{name}", width, width)
        add(f"{block}.ffn_gate", hidden, width)
        add(f"{block}.ffn_up", hidden, width)
        add(f"{block}.ffn_down", width, hidden)
        add(f"{block}.attn_norm", width)
        add(f"{block}.ffn_norm", width)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_run(folder: Path, content: bytes, **more: Any) -> Path:
    """A recipe and a run in `folder` whose `gguf` receipt matches `content`; the path of that GGUF."""
    serve = {"context": CONTEXT, "slots": SLOTS, "threads": 1, "origins": [ORIGIN]} | more
    recipe = {"data": {"train": "none.jsonl"}, "serve": serve}
    (folder / f"{NAME}.yaml").write_text(json.dumps(recipe))  # JSON is YAML
    path = folder / "runs" / NAME / "gguf" / f"{NAME}-Q8_0.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(content)
    name = str(path.relative_to(folder))
    receipt = Receipt("gguf", {}, {}, {name: fingerprint(path)}, {}, {}, "2026-01-01T00:00:00+00:00", 0.0, 0)
    Run(NAME, folder / "runs").write_receipt(receipt)
    return path


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Server:
    """`python -m serve.api` in a folder of its own; what it writes goes to files, as a pipe could fill."""

    def __init__(
        self, folder: Path, port: int | None = None, code: str = "", name: str = NAME, **variables: str
    ) -> None:
        self.folder = folder
        self.name = name
        self.port = port or free_port()
        self.out, self.err = folder / "stdout", folder / "stderr"
        command = ["-c", code] if code else ["-m", "serve.api"]
        with self.out.open("wb") as out, self.err.open("wb") as err:
            self.process = subprocess.Popen(
                [sys.executable, *command, f"{name}.yaml"],
                cwd=folder,
                env=environment(**{"PORT": str(self.port), "UI": "none"} | variables),
                stdout=out,
                stderr=err,
            )

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def key(self) -> str:
        return (self.folder / ".secrets" / "api-key").read_text().strip()

    @property
    def log(self) -> str:
        return (self.folder / "runs" / self.name / "serve.log").read_text()

    def wait_for(self, text: str, seconds: float = 30) -> str:
        """What it wrote, once that contains `text`."""
        end = time.monotonic() + seconds
        while text not in (written := self.out.read_text() + self.err.read_text()):
            assert self.process.poll() is None, f"the server ended: {written}"
            assert time.monotonic() < end, f"no {text!r} in {seconds} s: {written}"
            time.sleep(0.05)
        return written

    def engine(self) -> int | None:
        """The process of the engine."""
        return next((pid for pid, command in self.children().items() if "serve.gateway.engine" in command), None)

    def children(self) -> dict[int, str]:
        """Process and command of each that the supervisor started."""
        found = {}
        for status in Path("/proc").glob("[0-9]*/stat"):
            try:
                pid, _, rest = status.read_text().partition(" ")
                if int(rest.rpartition(") ")[2].split()[1]) == self.process.pid:
                    found[int(pid)] = (status.parent / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        return found

    def end(self, wish: signal.Signals = signal.SIGTERM) -> int:
        """Send a signal and wait; the exit code."""
        if self.process.poll() is None:
            self.process.send_signal(wish)
        return self.process.wait(15)


@dataclass
class Window:
    """A tiny model served with Open WebUI in front of it."""

    server: Server
    port: int

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def password(self) -> str:
        return (self.server.folder / ".secrets/openwebui-password").read_text().strip()

    def token(self, email: str = "admin@localhost", password: str = "") -> str:
        """Sign in as a browser does."""
        status, answer = self.ask("/api/v1/auths/signin", body={"email": email, "password": password or self.password})
        assert status == 200, answer
        return str(answer["token"])

    def ask(self, path: str, token: str = "", body: dict[str, object] | None = None) -> tuple[int, Any]:
        """Status and JSON of one request to Open WebUI."""
        return ask(self.port, path, token, body, timeout=60)


def environment(**more: str) -> dict[str, str]:
    """This environment with the repository importable from any folder, and no proxy that could answer instead."""
    return {**os.environ, "PYTHONPATH": str(REPOSITORY), "HTTP_PROXY": "http://127.0.0.1:9", "NO_PROXY": "", **more}


def is_running(pid: int) -> bool:
    """Whether the process exists and is not a zombie."""
    try:
        return not re.search(r"\) [ZX] ", Path(f"/proc/{pid}/stat").read_text())
    except OSError:
        return False


def gone(pid: int, seconds: float) -> bool:
    """Whether the process is gone within so many seconds."""
    end = time.monotonic() + seconds
    while is_running(pid) and time.monotonic() < end:
        time.sleep(0.02)
    return not is_running(pid)
