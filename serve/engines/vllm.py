"""The engine for GPUs: vLLM around the merged weights, or around the base with the adapter on it.

It runs in an environment of its own: `.venv-vllm` with an NVIDIA GPU, `.venv-vllm-cpu` without.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline.error import UserError
from pipeline.machine import cores, fast_precision, gpus
from pipeline.recipe import Recipe
from pipeline.reference import read_probes
from pipeline.run import Fingerprints, Run
from serve.asking.endpoint import ERRORS, HOST, ask, is_healthy, make_key, url_of
from serve.running.backend import Backend, Endpoint, Service
from setup.install import ROOT, SetupError, environment

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # those that `--max-lora-rank` takes (vllm/config/lora.py)
BLOCK_TOKENS = 128  # the CPU build gives its cache out in blocks of so many
LEAST_EFFECT_NATS = 0.05  # rounding and batching move a token's log probability by less, training by far more
PROBES, PROBE_TOKENS = 4, 8
BASE = "-base"  # the base alone answers beside the adapter under the name with this end
END_SECONDS = 10  # for its processes, once the last answer is given
READY_SECONDS = 1800  # many GPUs load and compile for many minutes
SERVER = ("-m", "vllm.entrypoints.cli.main", "serve")
CPU_SERVER = ("-m", "vllm.entrypoints.openai.api_server", "--model")  # `vllm serve` of the CPU build does not start
# Nothing is fetched, no part listens to the network, nothing runs that is not vLLM's own.
QUIET = {
    "HF_HUB_OFFLINE": "1",
    "TRANSFORMERS_OFFLINE": "1",
    "VLLM_HOST_IP": HOST,
    "VLLM_SERVER_DEV_MODE": "0",
    "VLLM_ALLOW_RUNTIME_LORA_UPDATING": "0",
    "VLLM_PLUGINS": "",
    "PYTHONSAFEPATH": "1",
    "PYTHONPATH": str(ROOT),  # for serve/gateway/auth.py
}


@dataclass(frozen=True)
class Machine:
    """What the arguments depend on besides the recipe."""

    gpus: int
    precision: str
    cores: int


@dataclass(frozen=True)
class Model:
    """The folders that are served: `weights` is a plain Hugging Face folder, `adapter` the one that goes on top."""

    weights: Path
    adapter: Path | None = None

    @property
    def template(self) -> Path:
        return self.weights / "chat_template.jinja"


def backend(recipe: Recipe, run: Run) -> Backend:
    """vLLM as one service, its weights proved to be what their stages wrote.

    Raises:
        UserError: the weights are not there or were changed, or the recipe asks for what this machine has not.
    """
    port, machine = recipe.serve.port, machine_for(recipe)
    if problems := impossible(recipe, machine):
        raise UserError(*problems)
    model, inputs, key = model_of(recipe, run), verified(recipe, run), make_key()
    refuse_long_context(recipe.serve.context, model.weights)
    service = Service(
        name="engine",
        argv=(str(python()), *arguments(recipe, model, machine, port)),
        log_file=run.path("serve.log"),
        port=port,
        loading=f"loading {model.weights} into vLLM",
        is_ready=lambda: is_healthy(port, timeout=4),
        problem=lambda: problem(recipe, run, port, key),
        environment={
            **QUIET,
            **settings(machine),
            "VLLM_API_KEY": key,
            "TRUETUNE_ORIGINS": " ".join(recipe.serve.origins),
        },
        ready_seconds=READY_SECONDS,
        check=lambda: refuse_replaced(recipe, run, inputs),
        grace_seconds=recipe.serve.vllm.grace + END_SECONDS,
    )
    return Backend(Endpoint(f"{url_of(port)}/v1", recipe.name, key), (service,), inputs)


def machine_for(recipe: Recipe) -> Machine:
    """This machine, as far as the recipe lets it be used."""
    wanted = recipe.serve.vllm.precision
    return Machine(gpus(), fast_precision() if wanted == "auto" else wanted, recipe.serve.threads or cores())


def python() -> Path:
    """The Python of vLLM's environment, which is made on first use.

    Raises:
        UserError: it cannot be made.
    """
    try:
        return environment("vllm" if gpus() else "vllm-cpu")
    except SetupError as error:
        raise UserError(str(error)) from None


def impossible(recipe: Recipe, machine: Machine) -> list[str]:
    """What the recipe asks for and this machine cannot do."""
    knobs = recipe.serve.vllm
    found, needed = [], knobs.tensor * knobs.pipeline * knobs.data
    if needed > max(machine.gpus, 1):
        sizes = f"serve.vllm: tensor {knobs.tensor} x pipeline {knobs.pipeline} x data {knobs.data}"
        more = f"see 'make cluster RECIPE={recipe.given}'"
        found.append(f"{sizes} needs {needed} GPUs, here are {machine.gpus}: lower them, or {more}")
    if knobs.quantization == "fp8" and not machine.gpus:
        found.append("serve.vllm.quantization: fp8 needs an NVIDIA GPU, here is none: set it to none")
    if knobs.adapter and recipe.train.lora.rank > RANKS[-1]:
        found.append(f"train.lora.rank: vLLM takes adapters up to {RANKS[-1]}: set serve.vllm.adapter to false")
    return found


def model_of(recipe: Recipe, run: Run) -> Model:
    """The folders that the recipe serves.

    Raises:
        UserError: an adapter with trained tokens, which vLLM does not apply.
    """
    if recipe.serve.vllm.adapter and (added := run.receipt("base").metrics.get("added_tokens")):
        raise UserError(
            f"serve.vllm.adapter: vLLM applies no adapter with new tokens ({', '.join(added)}): set it to false"
        )
    return Model(run.path("base"), run.path("trained")) if recipe.serve.vllm.adapter else Model(run.path("merged"))


def verified(recipe: Recipe, run: Run) -> Fingerprints:
    """Fingerprints of the served files, proved to be what their stages wrote."""
    if not recipe.serve.vllm.adapter:
        return run.verified("merge")
    return run.verified("base") | run.verified("train", only=str(run.path("trained")))


def refuse_replaced(recipe: Recipe, run: Run, known: Fingerprints) -> None:
    """After a crash only the files that were proved may be loaded again."""
    if verified(recipe, run) != known:
        again = f"run 'make serve RECIPE={recipe.given}' again"
        raise UserError(f"{model_of(recipe, run).weights} was replaced while it was served: {again}")


def refuse_long_context(context: int, weights: Path) -> None:
    """vLLM would refuse it too, after a minute and in many lines."""
    trained = text_config(weights).get("max_position_embeddings")
    if trained is not None and context > trained:
        raise UserError(f"serve.context: {context} is more than the {trained} tokens that {weights} knows: lower it")


def arguments(recipe: Recipe, model: Model, machine: Machine, port: int) -> tuple[str, ...]:
    """What vLLM's Python is given; no secret is among them, since anyone may read the process list."""
    return (
        *(SERVER if machine.gpus else CPU_SERVER),
        str(model.weights),
        *("--host", HOST, "--port", str(port)),
        *model_arguments(recipe, model, machine),
    )


def model_arguments(recipe: Recipe, model: Model, machine: Machine) -> tuple[str, ...]:
    """Those that are the same wherever the server listens and however many machines it takes."""
    serve, knobs = recipe.serve, recipe.serve.vllm
    words = [
        *("--served-model-name", f"{recipe.name}{BASE}" if model.adapter else recipe.name),
        *("--chat-template", str(model.template), "--chat-template-content-format", "string"),
        *("--dtype", machine.precision),
        *("--max-model-len", str(serve.context), "--max-num-seqs", str(serve.slots)),
        *("--max-num-queued-reqs", str(serve.queue), "--shutdown-timeout", str(knobs.grace)),
        # vLLM's neutral sampling and our temperature: what the base's author advised is not what was trained.
        *("--generation-config", "vllm"),
        *("--override-generation-config", json.dumps({"temperature": serve.temperature})),
        *("--seed", str(recipe.seed)),
        *("--middleware", "serve.gateway.auth.ApiKeyAuth", "--allowed-origins", "[]"),
        *("--disable-fastapi-docs", "--disable-access-log-for-endpoints", "/health,/metrics"),
    ]
    if model.adapter:
        rank = next(allowed for allowed in RANKS if allowed >= recipe.train.lora.rank)
        words += ["--enable-lora", "--max-loras", "1", "--max-lora-rank", str(rank)]
        words += ["--lora-modules", f"{recipe.name}={model.adapter}"]
    sizes = {"--tensor-parallel-size": knobs.tensor, "--pipeline-parallel-size": knobs.pipeline}
    for flag, size in (sizes | {"--data-parallel-size": knobs.data}).items():
        words += [flag, str(size)] if size > 1 else []
    if knobs.quantization != "none":
        words += ["--quantization", knobs.quantization]
    if machine.gpus:
        words += ["--gpu-memory-utilization", str(knobs.memory)]
    else:  # compiling takes longer than it saves, and a share of the whole memory would be taken at once
        cache = cache_bytes(text_config(model.weights), serve.context, serve.slots, machine.precision)
        words += ["--enforce-eager", "--kv-cache-memory-bytes", str(cache)]
    return tuple(words)


def settings(machine: Machine) -> dict[str, str]:
    """The environment's part of the arguments: by itself the CPU build takes one core of each pair."""
    return {} if machine.gpus else {"VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(machine.cores)}


def text_config(folder: Path) -> dict[str, Any]:
    """The language model's part of `config.json`."""
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    return config.get("text_config", config)


def cache_bytes(config: dict[str, Any], context: int, slots: int, precision: str) -> int:
    """Keys and values of all slots at their full context, in bytes, with one block to spare."""
    heads = config["num_attention_heads"]
    width = config.get("head_dim") or config["hidden_size"] // heads
    each = 2 * config["num_hidden_layers"] * (config.get("num_key_value_heads") or heads) * width
    blocks = slots * -(-context // BLOCK_TOKENS) + 1
    return blocks * BLOCK_TOKENS * each * (2 if precision == "bfloat16" else 4)


def problem(recipe: Recipe, run: Run, port: int, key: str) -> str:
    """What is wrong with the server: another model, another context, no answer, an adapter without effect."""
    try:
        status, listed = ask(port, "/v1/models", key)
        models = {model["id"]: model for model in listed["data"]} if status == 200 else {}
        if recipe.name not in models:
            return f"serves {', '.join(models) or listed}, not {recipe.name!r}"
        context = next(model["max_model_len"] for model in models.values() if model.get("max_model_len"))
        if context != recipe.serve.context:
            return f"gives a conversation {context} tokens, not the {recipe.serve.context} of serve.context"
        question = {"model": recipe.name, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        status, answer = ask(port, "/v1/chat/completions", key, question, timeout=READY_SECONDS)
        if status != 200:
            return f"does not answer a question: {answer}"
        if recipe.serve.vllm.adapter and adapter_effect(recipe, run, port, key) < LEAST_EFFECT_NATS:
            return f"answers with {recipe.name} as with the base alone: vLLM has not applied the adapter"
    except (*ERRORS, LookupError) as error:
        return f"does not answer a question: {error!r}"
    return ""


def adapter_effect(recipe: Recipe, run: Run, port: int, key: str) -> float:
    """The largest difference, in nats, that the adapter makes to the log probability of an answer's token.

    vLLM has served the base under an adapter's name (vllm#55193), which looks healthy to every other check.
    """
    effect = 0.0
    for probe in [probe for probe in read_probes(run.path("reference")) if probe.continuation][:PROBES]:
        prompt = probe.ids + probe.continuation[:PROBE_TOKENS]
        if len(prompt) >= recipe.serve.context:
            continue
        both = [token_logprobs(name, prompt, len(probe.ids), port, key) for name in (recipe.name, recipe.name + BASE)]
        effect = max(effect, *(abs(mine - other) for mine, other in zip(*both, strict=True)))
    return effect


def token_logprobs(model: str, prompt: list[int], first: int, port: int, key: str) -> list[float]:
    """Log probabilities of the prompt's tokens from position `first` on."""
    body = {"model": model, "prompt": prompt, "max_tokens": 1, "prompt_logprobs": 0, "temperature": 0}
    status, answer = ask(port, "/v1/completions", key, body, timeout=READY_SECONDS)
    if status != 200:
        raise LookupError(answer)
    rows = answer["choices"][0]["prompt_logprobs"]
    return [rows[at][str(prompt[at])]["logprob"] for at in range(first, len(prompt))]
