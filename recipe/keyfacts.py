"""Whether an answer contains the key facts that a held-out question asks for."""

from typing import Any


def has_fact(answer: str, fact: str) -> bool:
    """Whether the answer contains the fact, or one of its alternatives `this|that`, whatever the case."""
    return any(alternative.strip().casefold() in answer.casefold() for alternative in fact.split("|"))


def key_fact_accuracy(found: list[str], questions: list[dict[str, Any]]) -> float:
    """Share of all key facts that the answers contain."""
    hits = [
        has_fact(answer, fact) for answer, question in zip(found, questions, strict=True) for fact in question["facts"]
    ]
    return sum(hits) / len(hits) if hits else 0.0
