"""Ask the model in training the held-out questions, many at once."""

from typing import Any

QUESTIONS_AT_ONCE = 32


def answers(model: Any, tokenizer: Any, questions: list[dict[str, Any]], longest_tokens: int) -> list[str]:
    """The model's greedy answers, each up to the end of its turn or `longest_tokens`."""
    import torch

    prompts = [
        tokenizer.apply_chat_template(question["messages"], tokenize=False, add_generation_prompt=True)
        for question in questions
    ]
    found: list[str] = []
    was_training = model.training
    model.eval()
    with torch.inference_mode():
        for first in range(0, len(prompts), QUESTIONS_AT_ONCE):
            batch = tokenizer(
                prompts[first : first + QUESTIONS_AT_ONCE],
                add_special_tokens=False,
                padding=True,
                padding_side="left",
                return_tensors="pt",
            ).to(model.device)
            made = model.generate(**batch, max_new_tokens=longest_tokens, do_sample=False)
            found += tokenizer.batch_decode(made[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    model.train(was_training)
    return [answer.strip() for answer in found]
