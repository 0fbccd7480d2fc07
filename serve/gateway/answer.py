"""The engine's answers as OpenAI's API has them: all choices in one, the tokens of all; errors with their cause."""

import json
import re
from typing import Any

from serve.gateway.request import Refusal

# llama.cpp says 500 to whatever it cannot parse; these are its own failures.
FAULTS = re.compile(r"bad_alloc|[Cc]ompute|batch|decode|got exception|unknown error|failed to process|Unable to|memory")
EXTRAS = ("n_prompt_tokens", "n_ctx")


def refusal(status: int, made: object) -> Refusal:
    """An error of the engine: a 5xx only where the request is not to blame."""
    error = made.get("error", made) if isinstance(made, dict) else made
    error = error if isinstance(error, dict) else {"message": str(error)}
    message = str(error.get("message") or error)
    if status in (500, 501) and not FAULTS.search(message):
        status = 400
    details: dict[str, Any] = {name: error[name] for name in EXTRAS if name in error}
    if error.get("type") == "exceed_context_size_error":
        details |= {"type": error["type"], "param": "messages", "code": "context_length_exceeded"}
    return Refusal(status, message, **details)


def joined(answers: list[dict[str, Any]], prompts: int) -> dict[str, Any]:
    """One answer with the choices of all, each prompt's tokens counted once: `answers` has them for each in turn."""
    choices = [answer["choices"][0] | {"index": index} for index, answer in enumerate(answers)]
    for choice in choices:
        legacy_logprobs(choice)
    return answers[0] | {"choices": choices, "usage": total([answer["usage"] for answer in answers], prompts)}


def total(usages: list[dict[str, Any]], prompts: int) -> dict[str, Any]:
    """The tokens of all answers."""
    first = usages[:: max(1, len(usages) // prompts)]
    prompt = sum(usage["prompt_tokens"] for usage in first)
    completion = sum(usage["completion_tokens"] for usage in usages)
    return usages[0] | {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def legacy_logprobs(choice: dict[str, Any], offset: int = 0) -> None:
    """A completion's log probabilities in lists, as its API has them; llama.cpp gives those of a chat."""
    given = choice.get("logprobs")
    if "text" not in choice or not isinstance(given, dict) or "content" not in given:
        return
    tokens = given["content"]
    offsets = [offset]
    for token in tokens[:-1]:
        offsets.append(offsets[-1] + len(token["token"]))
    choice["logprobs"] = {
        "tokens": [token["token"] for token in tokens],
        "token_logprobs": [token["logprob"] for token in tokens],
        "top_logprobs": [{top["token"]: top["logprob"] for top in token["top_logprobs"]} for token in tokens],
        "text_offset": offsets[: len(tokens)],
    }


def event(chunk: dict[str, Any]) -> bytes:
    """A chunk as a server-sent event."""
    return b"data: " + json.dumps(chunk, ensure_ascii=False).encode() + b"\n\n"
