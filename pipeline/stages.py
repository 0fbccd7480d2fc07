"""The line from data to chat: which stage follows which, and which keys of the recipe each one reads."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Stage:
    """A step that reads the outputs of the stages `after` which it comes, and `keys` or sections of the recipe."""

    name: str
    module: str
    does: str
    after: tuple[str, ...]
    keys: tuple[str, ...]


STAGES = (
    Stage("data", "train.data", "Read, check and split the conversations", (), ("data", "train.method", "seed")),
    Stage(
        "base",
        "train.base",
        "Bring the base model into one plain folder",
        (),
        ("base_model", "chat_template", "chat_template_arguments", "system", "seed"),
    ),
    Stage(
        "train",
        "train.run",
        "Train the base by the recipe's method and tuner",
        ("data", "base"),
        ("train", "launch", "seed"),
    ),
    Stage("reference", "train.reference", "Let the trained model answer the probes", ("data", "base", "train"), ()),
    Stage(
        "eval",
        "train.evaluate",
        "Measure what training changed, the base beside the trained model",
        ("data", "base", "train"),
        ("eval", "seed"),
    ),
    Stage(
        "merge",
        "convert.merge",
        "Make one set of full-precision weights of what was trained",
        ("base", "train"),
        ("merge",),
    ),
    Stage("gguf", "convert.gguf", "Convert to GGUF and quantize", ("data", "merge"), ("gguf",)),
    Stage(
        "compare",
        "convert.compare",
        "Compare merged weights and GGUF files with the trained model",
        ("data", "base", "reference", "merge", "gguf"),
        ("prove", "gguf"),
    ),
    Stage(
        "prove",
        "serve.prove",
        "Prove that what is served is the model that was trained",
        ("reference", "gguf", "compare"),
        ("serve.type", "serve.engine", "serve.context", "serve.temperature", "serve.vllm"),
    ),
    Stage(
        "register",
        "serve.register",
        "Register the model with Ollama and prove it there",
        ("reference", "gguf", "compare"),
        (),
    ),
    Stage(
        "serve",
        "serve.api",
        "Serve in a chat window and over an OpenAI-compatible API",
        ("gguf", "compare"),
        ("serve",),
    ),
)


def stage(name: str) -> Stage:
    """The stage of that name."""
    return next(stage for stage in STAGES if stage.name == name)


def value_at(recipe: Mapping[str, Any], key: str) -> Any:
    """What a resolved recipe says of a dotted key; None where it is not known, as in a receipt of an older version."""
    value: Any = recipe
    for name in key.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def mermaid() -> str:
    """The line as a Mermaid flowchart, for docs/architecture.md."""
    nodes = [f'    {s.name}["<b>{s.name}</b><br>{s.does}"]' for s in STAGES]
    edges = [f"    {before} --> {s.name}" for s in STAGES for before in s.after]
    return "\n".join(["flowchart LR", *nodes, *edges, "    serve --> chat([chat])"])
