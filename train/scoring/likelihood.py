"""How likely the model finds given words: the answers of conversations, and each choice of a question.

Rows of like length are computed together, and logits only where they are needed.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, TypeVar

from pipeline.progress import progress
from train.packing import carries_state
from train.template import IGNORED, Example

T = TypeVar("T")
Start = Callable[[], AbstractContextManager[Any]]  # yields a model to compare with
TOKENS_AT_ONCE = 1024  # padded; of a vocabulary of 50,000 their logits take 0.2 GB


@dataclass(frozen=True)
class Likelihood:
    """Of some tokens together: their negative log-likelihood in nats, how many they are, and how many came first.

    `divergence` is the sum of KL(model || start) over them, in nats, where a start was given.
    """

    loss: float
    tokens: int
    hits: int
    divergence: float = 0.0


@dataclass(frozen=True)
class Choices:
    """A rendered prompt, and the texts of which one follows it."""

    prompt: str
    texts: tuple[str, ...]


def likelihoods(model: Any, examples: list[Example], what: str, start: Start | None = None) -> list[Likelihood]:
    """The supervised tokens of each row, teacher-forced: each is predicted from all that is before it."""
    import torch
    from torch.nn.functional import cross_entropy

    found: dict[int, Likelihood] = {}
    for batch in counted(list(batches([len(row.input_ids) for row in examples])), what):
        rows = [examples[index] for index in batch]
        longest = max(len(row.input_ids) for row in rows)
        ids = torch.tensor([row.input_ids + [0] * (longest - len(row.input_ids)) for row in rows], device=model.device)
        mask = torch.tensor([[1] * len(row.input_ids) + [0] * (longest - len(row.input_ids)) for row in rows])
        labels = torch.tensor([row.labels + [IGNORED] * (longest - len(row.labels)) for row in rows])[:, 1:]
        kept = (labels != IGNORED).any(0).nonzero().squeeze(1)
        targets = labels[:, kept].to(model.device)
        fields = {"input_ids": ids, "attention_mask": mask.to(model.device), "logits_to_keep": kept.to(model.device)}
        with torch.inference_mode():
            logits = model(**fields, use_cache=False).logits.float()
            divergences = [0.0] * len(rows)
            if start:
                with start() as other:
                    before = other(**fields, use_cache=False).logits.float()
                supervised = targets != IGNORED
                each = zip(logits, before, supervised, strict=True)
                divergences = [divergence(new[here], old[here]) for new, old, here in each]
        losses = cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none").sum(1).tolist()
        tokens = (targets != IGNORED).sum(1).tolist()
        hits = (logits.argmax(-1) == targets).sum(1).tolist()
        found |= dict(zip(batch, map(Likelihood, losses, tokens, hits, divergences), strict=True))
    return [found[index] for index in range(len(examples))]


def divergence(logits: Any, others: Any) -> float:
    """KL divergence of what (positions, vocabulary) logits say from what the others say, summed, in nats."""
    own = logits.log_softmax(-1)
    return float((own.exp() * (own - others.log_softmax(-1))).sum())


def choice_losses(model: Any, tokenizer: Any, questions: list[Choices], what: str) -> list[list[float]]:
    """For each question the negative log-likelihood of each text as what follows its prompt, in nats.

    A prompt is computed once, and its keys and values are used for each of its texts; a state is not, which cannot be
    had twice.
    """
    cut = [_cut(tokenizer, question) for question in questions]
    if carries_state(model.config):
        rows = [Example(prompt + text, [IGNORED] * len(prompt) + text) for prompt, texts in cut for text in texts]
        losses = iter([each.loss for each in likelihoods(model, rows, what)])
        return [[next(losses) for _ in texts] for _, texts in cut]
    found: dict[int, list[float]] = {}
    sizes = [len(prompt) + sum(map(len, texts)) for prompt, texts in cut]
    kinds = [len(texts) for _, texts in cut]
    for batch in counted(list(batches(sizes, kinds)), what):
        found |= dict(zip(batch, _losses(model, [cut[index] for index in batch]), strict=True))
    return [found[index] for index in range(len(questions))]


def batches(sizes: list[int], kinds: list[int] | None = None) -> Iterator[list[int]]:
    """Indexes of rows of one kind and like size, longest first, so that what does not fit is known at once."""
    kinds = kinds or [0] * len(sizes)
    batch: list[int] = []
    for index in sorted(range(len(sizes)), key=lambda index: (kinds[index], -sizes[index], index)):
        full = batch and (len(batch) + 1) * sizes[batch[0]] > TOKENS_AT_ONCE
        if batch and (full or kinds[index] != kinds[batch[0]]):
            yield batch
            batch = []
        batch.append(index)
    if batch:
        yield batch


def counted(work: list[T], what: str) -> Iterator[T]:
    """The pieces of work one by one, with how far it is."""
    with progress(what, len(work)) as tell:
        for done, piece in enumerate(work):
            tell(done)
            yield piece


def _cut(tokenizer: Any, question: Choices) -> tuple[list[int], list[list[int]]]:
    """(tokens that all texts share, tokens of each from there on), as the whole is tokenized: words may join."""
    prompt = tokenizer(question.prompt, add_special_tokens=False)["input_ids"]
    whole = [tokenizer(question.prompt + text, add_special_tokens=False)["input_ids"] for text in question.texts]
    shared = next((at for at, tokens in enumerate(zip(prompt, *whole, strict=False)) if len(set(tokens)) > 1), None)
    shared = min(map(len, [prompt, *whole])) if shared is None else shared
    shared = min(shared, min(map(len, whole)) - 1)  # each text has a token of its own to be scored
    return prompt[:shared], [ids[shared:] for ids in whole]


def _losses(model: Any, questions: list[tuple[list[int], list[list[int]]]]) -> list[list[float]]:
    import torch

    texts = [ids for _, choices in questions for ids in choices]
    each, width = len(questions[0][1]), max(map(len, texts))
    longest = max(len(prompt) for prompt, _ in questions)
    spare = [longest - len(prompt) for prompt, _ in questions]
    ids = torch.tensor([[0] * left + prompt for left, (prompt, _) in zip(spare, questions, strict=True)])
    mask = torch.tensor([[0] * left + [1] * (longest - left) for left in spare])
    places = (mask.cumsum(1) - 1).clamp(min=0)
    device = model.device
    with torch.inference_mode():
        asked = model(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            position_ids=places.to(device),
            use_cache=True,
            logits_to_keep=1,
        )
        first = asked.logits[:, -1].float().log_softmax(-1).repeat_interleave(each, 0).cpu()
        given = torch.tensor([ids + [0] * (width - len(ids)) for ids in texts])
        real = torch.tensor([[1] * len(ids) + [0] * (width - len(ids)) for ids in texts])
        scores = first.gather(1, given[:, :1])
        if width > 1:
            asked.past_key_values.batch_repeat_interleave(each)
            starts = mask.sum(1).repeat_interleave(each)[:, None]
            told = (
                model(
                    input_ids=given[:, :-1].to(device),
                    attention_mask=torch.cat([mask.repeat_interleave(each, 0), real[:, :-1]], 1).to(device),
                    position_ids=(starts + torch.arange(width - 1)).to(device),
                    past_key_values=asked.past_key_values,
                )
                .logits.float()
                .log_softmax(-1)
                .cpu()
            )
            later = told.gather(2, given[:, 1:, None])[..., 0] * real[:, 1:]
            scores = torch.cat([scores, later], 1)
    flat = (-scores.sum(1)).tolist()
    return [flat[at : at + each] for at in range(0, len(flat), each)]
