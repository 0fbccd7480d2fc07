"""How many key facts the answers to the held-out questions contain."""

from typing import Any


def has_fact(answer: str, fact: str) -> bool:
    """Whether the answer contains the fact, or one of its alternatives `this|that`, whatever the case."""
    return any(alternative.strip().casefold() in answer.casefold() for alternative in fact.split("|"))


def key_fact_accuracy(found: list[str], questions: list[dict[str, Any]]) -> float:
    """Share of all key facts that the answers contain."""
    hits = [hit for answer, question in zip(found, questions, strict=True) for hit in facts_in(answer, question)]
    return sum(hits) / len(hits) if hits else 0.0


def facts_in(answer: str, question: dict[str, Any]) -> list[bool]:
    """For each key fact of the question whether the answer has it."""
    return [has_fact(answer, fact) for fact in question["facts"]]
