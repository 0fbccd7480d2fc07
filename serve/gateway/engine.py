"""The engine: llama.cpp's HTTP server around one GGUF, behind its gateway:  python -m serve.gateway.engine SETTINGS

Started by `serve.api` and in a container. It is a process of its own so that a crash in native code, or the
system's taking its memory, ends the engine alone; its supervisor starts it again. llama.cpp listens on a Unix socket
in a folder of its owner's, so that there is no way around the gateway.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

from pipeline.files import own_folder
from pipeline.machine import cores
from serve.asking.endpoint import read_key, url_of
from serve.engines.llamacpp import Settings, has_window, longest_token
from serve.gateway.gateway import Bounds, Gateway, listen


def engine(settings: Settings) -> int:
    """Serve until a signal; the exit code."""
    longest, key = longest_token(Path(settings.model)), read_key(Path(settings.key_file))
    bounds = Bounds(settings.slots, settings.queue, settings.context, longest)
    with own_folder("truetune-engine") as folder:
        socket = folder / "engine.sock"
        _server = load(settings, socket)
        gateway = Gateway(socket, key, bounds, tuple(settings.origins), page=settings.ui)
        return listen(gateway, settings.name, settings.host, settings.port)


def load(settings: Settings, socket: Path) -> Any:
    """llama.cpp's server with the model loaded; it answers for as long as this object is there."""
    from xllamacpp import Server

    try:
        return Server(parameters(settings, socket))
    except RuntimeError:  # llama.cpp has logged the reason
        sys.exit(1)


def parameters(settings: Settings, socket: Path) -> Any:
    """llama.cpp's parameters: everything that it leaves open to others or lets grow is closed or bounded."""
    from xllamacpp import CommonParams, ggml_type

    params = CommonParams()
    params.model.path = settings.model
    if settings.repeatable:  # each of these has another kernel for many tokens than for one
        params.cache_type_k = ggml_type.GGML_TYPE_BF16  # attention, where keys and values are of one type
        params.no_extra_bufts = True  # weights in another order
        os.environ["GGML_CPU_TILED_MM"] = "0"  # K-quants in tiles; read at the first product
    params.model_alias = {settings.name}
    params.use_jinja = True
    params.offline = True
    params.hostnames = [str(socket)]
    params.api_keys = [read_key(Path(settings.key_file))]
    params.cors_origins = url_of(settings.port)  # the default, '*', lets any web page ask
    params.cors_origins_explicit = True
    params.cors_credentials = False
    params.ui = settings.ui
    params.endpoint_metrics = True
    params.endpoint_slots = False  # it shows what others ask
    params.endpoint_props = False
    params.n_parallel = settings.slots
    params.n_threads_http = 2 * settings.slots + 4  # for answers, idle connections, and who asks whether it is well
    params.n_ctx = settings.context * settings.slots  # divided by the slots, as the cache is not unified
    params.kv_unified = False
    params.ctx_shift = False  # a conversation that is too long is refused, not cut in silence
    params.cache_ram_mib = 512
    if settings.repeatable and has_window(Path(settings.model)):  # its ring is summed in the order of its filling
        params.swa_full, params.n_ctx_checkpoints, params.cache_ram_mib = True, 0, 0
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = settings.threads or cores()
    params.sampling.temp = settings.temperature
    params.verbosity = 2  # errors and warnings: nothing that grows with every request
    return params


if __name__ == "__main__":
    code = engine(Settings(**json.loads(sys.argv[1])))
    os._exit(code)  # llama.cpp's own end waits for answers that nobody reads any more
