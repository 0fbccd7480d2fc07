"""Ask the model the held-out questions, many at once."""

from typing import Any

from pipeline.progress import progress
from pipeline.rows import rendered

QUESTIONS_AT_ONCE = 32


def answers(
    model: Any, tokenizer: Any, questions: list[dict[str, Any]], longest_tokens: int, doing: str = "questions"
) -> list[str]:
    """The model's greedy answers, each up to the end of its turn or `longest_tokens`; asked in order of length."""
    import torch

    prompts = [rendered(tokenizer, row["messages"], prompt=True, tools=row.get("tools")) for row in questions]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    found: dict[int, str] = {}
    was_training = model.training
    model.eval()
    with torch.inference_mode(), progress(doing, len(prompts)) as tell:
        for first in range(0, len(order), QUESTIONS_AT_ONCE):
            tell(first)
            group = order[first : first + QUESTIONS_AT_ONCE]
            batch = tokenizer(
                [prompts[index] for index in group],
                add_special_tokens=False,
                padding=True,
                padding_side="left",
                return_tensors="pt",
            ).to(model.device)
            made = model.generate(**batch, max_new_tokens=longest_tokens, do_sample=False)
            said = tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            found |= dict(zip(group, said, strict=True))
    model.train(was_training)
    return [found[index].strip() for index in range(len(prompts))]
