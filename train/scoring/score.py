"""Ask the model the held-out questions, many at once."""

from typing import Any

from pipeline.model import greedy
from pipeline.rows import rendered


def answers(
    model: Any, tokenizer: Any, questions: list[dict[str, Any]], longest_tokens: int, doing: str = "questions"
) -> list[str]:
    """The model's greedy answers, each up to the end of its turn or `longest_tokens`."""
    prompts = [rendered(tokenizer, row["messages"], prompt=True, tools=row.get("tools")) for row in questions]
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    found = greedy(model, tokenizer, ids, longest_tokens, doing=doing)
    return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in found]
