"""Open WebUI in front of an endpoint: its process, its settings, and what it must show before anyone signs in."""

import json
import logging
from pathlib import Path
from typing import Any

from pipeline.error import UserError
from pipeline.proof import Comparison
from pipeline.reference import CONTINUATION_TOKENS, read_reference
from pipeline.run import Run
from serve.asking.endpoint import ERRORS, HOST, ask, make_key, read_key, url_of
from serve.running.backend import Endpoint, Service
from serve.running.session import find
from setup.install import SetupError, environment

EMAIL = "admin@localhost"
PASSWORD_FILE = Path(".secrets/openwebui-password")
SECRET_FILE = Path(".secrets/openwebui-secret")  # signs the sessions: another one would sign everybody out
# Its console script has the environment's path in its first line, which systems cut where it is long.
START = "from open_webui import app; app()"
PROBES = 4
READY_SECONDS = 900  # a first start on a busy machine makes its database and compiles 200 packages

# Each of these would add words to the prompt that the model was not trained on, or ask it more than its user did.
CAPABILITIES = ("builtin_tools", "vision", "web_search", "image_generation", "code_interpreter")

log = logging.getLogger("truetune")


def python() -> Path:
    """The Python of Open WebUI's own environment, made on first use.

    Raises:
        UserError: it cannot be made; says why, and what works without it.
    """
    try:
        return environment("openwebui")
    except SetupError as error:
        raise UserError(f"{error}; 'UI=builtin make serve' and 'UI=none make serve' go without Open WebUI") from None


def openwebui(run: Run, endpoint: Endpoint, port: int) -> Service:
    """The chat window as a service."""
    return Service(
        name="chat window",
        argv=(str(python()), "-c", START, "serve", "--host", HOST, "--port", str(port)),
        environment=settings(endpoint, port, run.path("openwebui").absolute()),
        inherits=False,  # Open WebUI obeys some 300 variables, DATABASE_URL and OPENAI_API_KEYS among them
        log_file=run.path("webui.log"),
        port=port,
        loading="waiting for Open WebUI",
        is_ready=lambda: is_ready(port),
        problem=lambda: problem_of_model(port, endpoint.model),
        ready_seconds=READY_SECONDS,
    )


def settings(endpoint: Endpoint, port: int, data: Path) -> dict[str, str]:
    """Open WebUI's environment: offline, closed to others, and silent towards the model (its env.py and config.py)."""
    data.mkdir(parents=True, exist_ok=True, mode=0o700)
    off = (
        # asks the model more than its user did
        "ENABLE_TITLE_GENERATION", "ENABLE_TAGS_GENERATION", "ENABLE_FOLLOW_UP_GENERATION",
        "ENABLE_AUTOCOMPLETE_GENERATION", "ENABLE_SEARCH_QUERY_GENERATION", "ENABLE_RETRIEVAL_QUERY_GENERATION",
        "ENABLE_MEMORIES", "ENABLE_AUTOMATIONS", "ENABLE_CALENDAR", "ENABLE_CONTEXT_COMPACTION",
        # runs code that a user or a model wrote
        "ENABLE_PLUGINS", "ENABLE_PIP_INSTALL_FRONTMATTER_REQUIREMENTS", "ENABLE_CODE_EXECUTION",
        "ENABLE_CODE_INTERPRETER", "RAG_EMBEDDING_MODEL_TRUST_REMOTE_CODE", "RAG_RERANKING_MODEL_TRUST_REMOTE_CODE",
        # leaves the machine, or lets others in
        "ENABLE_COMMUNITY_SHARING", "ENABLE_VERSION_UPDATE_CHECK", "ENABLE_DIRECT_CONNECTIONS", "ANONYMIZED_TELEMETRY",
        "ENABLE_WEB_SEARCH", "ENABLE_OLLAMA_API", "ENABLE_SIGNUP", "ENABLE_ADMIN_EXPORT", "ENABLE_API_KEYS",
        # what the database says must not win over these variables, and there is one model only
        "ENABLE_PERSISTENT_CONFIG", "ENABLE_EVALUATION_ARENA_MODELS",
    )  # fmt: skip
    on = (
        "OFFLINE_MODE", "HF_HUB_OFFLINE", "DO_NOT_TRACK", "SCARF_NO_ANALYTICS", "WEBUI_AUTH",
        "ENABLE_PASSWORD_VALIDATION",
        "BYPASS_MODEL_ACCESS_CONTROL",  # every user sees the model, which otherwise is the administrator's alone
        "BYPASS_EMBEDDING_AND_RETRIEVAL",  # documents go into the prompt whole: no embedding model is at hand
    )  # fmt: skip
    return {
        **dict.fromkeys(off, "false"),
        **dict.fromkeys(on, "true"),
        "ENV": "prod",
        "DATA_DIR": str(data),
        "STATIC_DIR": str(data / "static"),
        "WEBUI_SECRET_KEY": make_key(SECRET_FILE),
        "WEBUI_ADMIN_EMAIL": EMAIL,
        "WEBUI_ADMIN_PASSWORD": make_key(PASSWORD_FILE),
        "JWT_EXPIRES_IN": "24h",
        "WEBUI_URL": url_of(port),
        "CORS_ALLOW_ORIGIN": f"{url_of(port)};http://localhost:{port}",
        "FORWARDED_ALLOW_IPS": HOST,
        "OPENAI_API_BASE_URL": endpoint.url,
        "OPENAI_API_KEY": endpoint.key,
        "DEFAULT_MODELS": endpoint.model,
        "DEFAULT_MODEL_METADATA": json.dumps({"capabilities": dict.fromkeys(CAPABILITIES, False) | {"usage": True}}),
        "DEFAULT_INTERFACE_SETTINGS": json.dumps({"showChangelog": False, "showUpdateToast": False}),
        "DEFAULT_PROMPT_SUGGESTIONS": "[]",  # its own are about what the model was not trained for
        "RAG_EMBEDDING_ENGINE": "openai",  # the other one looks for a model on the Hub
        "PYTHONUNBUFFERED": "1",
    }


def is_ready(port: int) -> bool:
    """Whether it has started and reaches its database."""
    try:
        return ask(port, "/ready", timeout=4)[0] == 200
    except ERRORS:
        return False


def problem_of_model(port: int, model: str) -> str:
    """Whether who signs in finds the model; a password changed since is no fault."""
    try:
        token = sign_in(port)
        if not token:
            log.warning("%s no longer opens the chat window for %s: it was changed there", PASSWORD_FILE, EMAIL)
            return ""
        listed = [entry["id"] for entry in ask(port, "/api/models", token, timeout=60)[1]["data"]]
    except (*ERRORS, LookupError, TypeError) as error:
        return f"does not answer ({error!r})"
    return "" if model in listed else f"does not list the model {model!r} but {listed}"


def sign_in(port: int) -> str:
    """The administrator's session token; empty if the password is no longer the generated one."""
    credentials = {"email": EMAIL, "password": make_key(PASSWORD_FILE)}
    status, answer = ask(port, "/api/v1/auths/signin", "", credentials, timeout=60)
    return str(answer["token"]) if status == 200 else ""


def proved_windows(run: Run) -> list[dict[str, Any]]:
    """A row for the table of `make prove` if Open WebUI is up: what it asks the model and what it shows of the answer.

    Greedy answers to some probes through its own API must be the endpoint's, and their prompts as long as in training:
    a chat window that adds a word to the prompt talks to another model than the one that was trained.
    """
    session = find(run)
    if session is None or session.ui != "openwebui":
        return []
    comparison = Comparison("chat window")
    try:
        ask_window(comparison, run, port_of(session.url), port_of(session.ui_url))
    except (UserError, *ERRORS, LookupError, TypeError) as error:
        comparison.problems.append(f"the chat window fails ({error!r}): see {run.path('webui.log')}")
    return [vars(comparison)]


def ask_window(comparison: Comparison, run: Run, engine: int, window: int) -> None:
    """Ask the shortest probes at both ports, of those that a person can type: no system prompt, no empty turn."""
    receipt = run.receipt("serve").metrics
    token, key = sign_in(window), read_key()
    if not token:
        comparison.problems.append(f"{PASSWORD_FILE} no longer opens the chat window for {EMAIL}")
        return
    fitting = [
        probe
        for probe in read_reference(run.path("reference")).probes
        if len(probe.ids) + CONTINUATION_TOKENS <= receipt["context"]
        and not probe.tools
        and all(turn["role"] != "system" and (turn.get("content") or "").strip() for turn in probe.messages)
    ]
    probes = sorted(fitting, key=lambda probe: len(probe.ids))[:PROBES]
    matched = 0
    for probe in probes:
        body = {"model": receipt["model"], "messages": probe.messages, "temperature": 0, "stream": False}
        body["max_tokens"] = CONTINUATION_TOKENS
        _, direct = ask(engine, "/v1/chat/completions", key, body, timeout=600)
        _, shown = ask(window, "/api/chat/completions", token, body, timeout=600)
        if shown["model"] != receipt["model"]:
            comparison.problems.append(f"the chat window answers as {shown['model']!r}, not as {receipt['model']!r}")
        if shown["usage"]["prompt_tokens"] != len(probe.ids):
            comparison.problems.append(
                f"token ids: probe '{probe.name}' has {shown['usage']['prompt_tokens']} when asked in the chat window, "
                f"trained with {len(probe.ids)}"
            )
        matched += shown["choices"][0]["message"]["content"] == direct["choices"][0]["message"]["content"]
    comparison.measures |= {"probes": len(probes), "greedy_agreement": matched / max(len(probes), 1)}
    if matched < len(probes) / 2:  # near ties may fall otherwise, since the engine answers several at a time
        comparison.problems.append(f"answers: {matched} of {len(probes)} are the endpoint's own")


def port_of(url: str) -> int:
    """The port of one of our URLs."""
    return int(url.removeprefix(url_of(0)[:-1]).partition("/")[0])
