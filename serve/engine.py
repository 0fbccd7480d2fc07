"""The engine: llama.cpp's own HTTP server around one GGUF:  python -m serve.engine SETTINGS

Started by `serve.api` and in a container. It is a process of its own so that a crash in native code, or the
system's taking its memory, ends the engine alone; its supervisor starts it again.
"""

import json
import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recipe.machine import cores
from serve.endpoint import HOST, url_of
from serve.key import read_key


@dataclass(frozen=True)
class Settings:
    """What the engine serves, and how; anyone may see it in the process list, so it names the key's file only."""

    model: str
    name: str
    port: int
    key_file: str
    context: int
    slots: int
    threads: int
    temperature: float
    ui: bool = False
    host: str = HOST  # a container's engine listens on its network, which no one outside reaches


def engine(settings: Settings) -> None:
    """Serve until a signal."""
    from xllamacpp import Server

    try:
        server = Server(parameters(settings))
    except RuntimeError:  # llama.cpp has logged the reason
        sys.exit(1)
    sys.stdout.write(f"serving {settings.name} on {server.listening_address}\n")
    sys.stdout.flush()
    signal.pause()  # SIGTERM ends it at once: the server's own end waits for answers that nobody reads any more


def parameters(settings: Settings) -> Any:
    """llama.cpp's parameters: everything that it leaves open to others or lets grow is closed or bounded."""
    from xllamacpp import CommonParams

    params = CommonParams()
    params.model.path = settings.model
    params.model_alias = {settings.name}
    params.use_jinja = True
    params.offline = True
    params.hostnames = [settings.host]
    params.port = settings.port
    params.api_keys = [read_key(Path(settings.key_file))]
    params.cors_origins = url_of(settings.port)  # the default, '*', lets any web page ask
    params.cors_origins_explicit = True
    params.cors_credentials = False
    params.ui = settings.ui
    params.endpoint_metrics = True
    params.endpoint_slots = False  # it shows what others ask
    params.endpoint_props = False
    params.n_parallel = settings.slots
    params.n_ctx = settings.context * settings.slots  # divided by the slots, as the cache is not unified
    params.kv_unified = False
    params.ctx_shift = False  # a conversation that is too long is refused, not cut in silence
    params.cache_ram_mib = 512
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings.threads or cores()
    params.sampling.temp = settings.temperature
    params.verbosity = 2  # errors and warnings: nothing that grows with every request
    return params


if __name__ == "__main__":
    engine(Settings(**json.loads(sys.argv[1])))
