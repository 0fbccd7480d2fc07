"""vLLM: the arguments as a table, the guard in its server; and, slow, the real server around a tiny trained model."""

import asyncio
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import Recipe, Run, UserError
from pipeline.recipe import Data, Lora, Serve, Train, Vllm
from serve.engines import vllm
from serve.engines.vllm import Machine, Model, arguments, impossible
from serve.gateway.auth import ApiKeyAuth

GPU, CPU = Machine(gpus=8, precision="bfloat16", cores=16), Machine(gpus=0, precision="float32", cores=2)
SERVE = Serve()
CONFIG = {"num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3, "hidden_size": 576}


def recipe_with(serve: Serve = SERVE, rank: int = 16) -> Recipe:
    return Recipe("mine", data=Data(train=("talks.jsonl",)), train=Train(lora=Lora(rank=rank)), serve=serve)


@pytest.fixture
def merged(tmp_path: Path) -> Model:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    return Model(tmp_path)


def argument(words: tuple[str, ...], flag: str) -> str | None:
    """What follows the flag; None without it."""
    return words[words.index(flag) + 1] if flag in words else None


def test_the_arguments_of_a_machine_without_a_gpu(merged: Model) -> None:
    assert arguments(recipe_with(), merged, CPU, 8000) == (
        *(
            "-m",
            "vllm.entrypoints.openai.api_server",
            "--model",
            str(merged.weights),
            "--host",
            "127.0.0.1",
            "--port",
            "8000",
        ),
        *("--served-model-name", "mine", "--chat-template", str(merged.weights / "chat_template.jinja")),
        *("--chat-template-content-format", "string", "--dtype", "float32"),
        *("--max-model-len", "2048", "--max-num-seqs", "4"),
        *("--max-num-queued-reqs", "64", "--shutdown-timeout", "10"),
        *("--generation-config", "vllm", "--override-generation-config", '{"temperature": 0.2}', "--seed", "0"),
        *("--middleware", "serve.gateway.auth.ApiKeyAuth", "--allowed-origins", "[]", "--disable-fastapi-docs"),
        *("--disable-access-log-for-endpoints", "/health,/metrics"),
        *("--enforce-eager", "--kv-cache-memory-bytes", str((4 * 16 + 1) * 128 * 2 * 30 * 3 * 64 * 4)),
    )


@pytest.mark.parametrize(
    ("knobs", "flag", "value"),
    [
        ({}, "--gpu-memory-utilization", "0.9"),
        ({"memory": 0.5}, "--gpu-memory-utilization", "0.5"),
        ({}, "--tensor-parallel-size", None),
        ({"tensor": 4}, "--tensor-parallel-size", "4"),
        ({"pipeline": 2}, "--pipeline-parallel-size", "2"),
        ({"data": 2}, "--data-parallel-size", "2"),
        ({}, "--quantization", None),
        ({"quantization": "fp8"}, "--quantization", "fp8"),
        ({"grace": 60}, "--shutdown-timeout", "60"),
        ({}, "--enable-lora", None),
        ({}, "--kv-cache-memory-bytes", None),
    ],
)
def test_a_knob_becomes_an_argument(merged: Model, knobs: dict[str, Any], flag: str, value: str | None) -> None:
    words = arguments(recipe_with(Serve(vllm=Vllm(**knobs))), merged, GPU, 8000)
    assert argument(words, flag) == value
    assert argument(words, "--dtype") == "bfloat16"
    assert words[:4] == ("-m", "vllm.entrypoints.cli.main", "serve", str(merged.weights))


@pytest.mark.parametrize(
    ("rank", "allowed"), [(1, "1"), (4, "8"), (8, "8"), (16, "16"), (17, "32"), (300, "320"), (512, "512")]
)
def test_an_adapter_gets_the_smallest_rank_that_holds_it(merged: Model, rank: int, allowed: str) -> None:
    model = replace(merged, adapter=Path("runs/mine/adapter"))
    words = arguments(recipe_with(Serve(vllm=Vllm(adapter=True)), rank), model, GPU, 8000)
    assert argument(words, "--max-lora-rank") == allowed
    assert argument(words, "--lora-modules") == "mine=runs/mine/adapter"
    assert argument(words, "--served-model-name") == "mine-base"
    assert "--enable-lora" in words


@pytest.mark.parametrize(
    ("knobs", "rank", "machine", "told"),
    [
        ({}, 16, CPU, []),
        ({"tensor": 4, "data": 2}, 16, GPU, []),
        ({"tensor": 4, "pipeline": 3}, 16, GPU, ["tensor 4 x pipeline 3 x data 1 needs 12 GPUs, here are 8"]),
        ({"data": 2}, 16, CPU, ["needs 2 GPUs, here are 0"]),
        ({"quantization": "fp8"}, 16, CPU, ["fp8 needs an NVIDIA GPU"]),
        ({"adapter": True}, 513, GPU, ["vLLM takes adapters up to 512"]),
        ({"tensor": 2, "quantization": "fp8"}, 16, CPU, ["needs 2 GPUs", "fp8 needs an NVIDIA GPU"]),
    ],
)
def test_what_a_machine_cannot_do_is_told_at_once(
    knobs: dict[str, Any], rank: int, machine: Machine, told: list[str]
) -> None:
    found = impossible(recipe_with(Serve(vllm=Vllm(**knobs)), rank), machine)
    assert len(found) == len(told)
    assert all(part in problem for part, problem in zip(told, found, strict=True))


@pytest.mark.parametrize(
    "config", [{"max_position_embeddings": 512}, {"text_config": {"max_position_embeddings": 512}}]
)
def test_a_context_that_the_model_does_not_know_is_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(config))
    vllm.refuse_long_context(512, tmp_path)
    with pytest.raises(UserError, match="513 is more than the 512 tokens"):
        vllm.refuse_long_context(513, tmp_path)


def test_heads_of_their_own_width_count_in_the_cache() -> None:
    plain = vllm.cache_bytes(CONFIG, context=128, slots=1, precision="float32")
    wide = vllm.cache_bytes(CONFIG | {"head_dim": 128}, context=128, slots=1, precision="float32")
    assert wide == 2 * plain == 4 * vllm.cache_bytes(CONFIG, context=128, slots=1, precision="bfloat16")


def test_changed_weights_are_not_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"merge\.json is missing: run 'make merge"):
        vllm.verified(recipe_with(), Run("mine"))


@pytest.fixture
def guarded(monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[bytes, bytes]]]:
    """Ask a guarded application that answers everything with a status; (status, headers) of what comes back."""
    monkeypatch.setenv("VLLM_API_KEY", "right")

    def asking(path: str, key: str | None, status: int = 200) -> tuple[int, dict[bytes, bytes]]:
        sent: list[dict[str, Any]] = []

        async def application(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": status, "headers": []})

        async def send(message: dict[str, Any]) -> None:
            sent.append(message)

        headers = [(b"authorization", key.encode())] if key else []
        asyncio.run(ApiKeyAuth(application)({"type": "http", "path": path, "headers": headers}, None, send))
        return sent[0]["status"], dict(sent[0]["headers"])

    return asking


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "//health"])
@pytest.mark.parametrize(
    ("key", "status"),
    [(None, 401), ("Bearer wrong", 401), ("right", 401), ("Bearer righté", 401), ("Bearer right", 200)],
)
def test_only_the_key_opens(guarded: Callable[..., Any], path: str, key: str | None, status: int) -> None:
    assert guarded(path, key)[0] == status


def test_health_is_open(guarded: Callable[..., Any]) -> None:
    assert guarded("/health", None)[0] == 200


def test_a_full_queue_says_when_to_come_back(guarded: Callable[..., Any]) -> None:
    assert guarded("/v1/chat/completions", "Bearer right", status=503) == (503, {b"retry-after": b"2"})
