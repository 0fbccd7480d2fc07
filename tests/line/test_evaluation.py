"""`make eval` on the tiny model: what it measures, that it repeats itself, and that forgetting shows."""

import contextlib
import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import REPOSITORY, Workplace

from pipeline import Run, load
from pipeline.scores import Score, compare, show
from train.evaluate import KNOWLEDGE, Pair, choices_of, of_answers, question_of, right_answers, round_once
from train.scoring.likelihood import TOKENS_AT_ONCE, Choices, batches, choice_losses, likelihoods
from train.template import examples

TEXTS = {"exact match", "token F1", "BLEU", "chrF", "ROUGE-1", "ROUGE-2", "ROUGE-L"}
SOME = "eval: {max_samples: 6, max_new_tokens: 4}\n"


def scores(place: Workplace) -> dict[str, Score]:
    found = [Score.of(row) for row in place.receipt("eval")["metrics"]["scores"]]
    return {f"{score.group}: {score.name}": score for score in found}


def change(path: str, edit: Callable[[str], str]) -> None:
    Path(path).write_text(edit(Path(path).read_text()))


def test_it_measures_both_models_and_the_same_again(trained: Workplace, capsys: pytest.CaptureFixture[str]) -> None:
    change("line.yaml", lambda text: text + SOME)
    trained.make("eval")
    found = scores(trained)
    held = {"held-out questions: key facts"}  # the question has no reference answer
    assert set(found) == held | {"validation answers: perplexity", "validation answers: token accuracy",
                                 "general knowledge: accuracy"}  # fmt: skip
    told = trained.receipt("train")["metrics"]
    for name, when in (("base", "before"), ("trained", "after")):
        perplexity = getattr(found["validation answers: perplexity"], name).value
        # As training measured it; bfloat16 rounds rows otherwise in another order.
        assert math.log(perplexity) == pytest.approx(told[when]["validation_loss"], rel=5e-3)
        assert getattr(found["held-out questions: key facts"], name).value == told[when]["key_fact_accuracy"]
    assert found["validation answers: perplexity"].trained.value < found["validation answers: perplexity"].base.value

    first = trained.receipt("eval")["metrics"]
    trained.run.receipt_path("eval").unlink()
    trained.make("eval")
    assert trained.receipt("eval")["metrics"]["scores"] == first["scores"]

    capsys.readouterr()
    show(first)
    printed = capsys.readouterr().out
    assert "general knowledge" in printed and "no difference shown" in printed and "too few rows" in printed


def test_without_held_out_questions_the_validation_is_asked(trained: Workplace) -> None:
    change("line.yaml", lambda text: text + SOME)
    trained.run.path("data", "heldout.jsonl").write_text("")
    found = of_answers(Pair(trained.recipe, trained.run), trained.recipe, trained.run)
    assert {score.name for score in found} == TEXTS
    assert {score.group for score in found} == {"validation questions"}


def test_the_questions_of_general_knowledge_are_many_and_clear() -> None:
    rows = [json.loads(line) for line in KNOWLEDGE.read_text(encoding="utf-8").splitlines()]
    assert len(rows) >= 100 and len({row["question"] for row in rows}) == len(rows)
    assert len({row["field"] for row in rows}) >= 12
    assert [row for row in rows if len({row["answer"], *row["others"]}) != 4] == []


@pytest.fixture(scope="module")
def speaker() -> Any:
    """A model whose likelihoods differ from token to token."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=49152, max_position_embeddings=256, initializer_range=0.2, **sizes)
    return LlamaForCausalLM(config).eval()


def plain_loss(model: Any, ids: list[int], first: int) -> float:
    """The negative log-likelihood of the tokens from `first` on, of one row alone."""
    import torch

    with torch.inference_mode():
        chances = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return -sum(float(chances[at - 1, ids[at]]) for at in range(first, len(ids)))


def test_choices_have_the_likelihood_of_a_pass_of_their_own(speaker: Any, tokenizer: Any) -> None:
    asked = [
        Choices("What is the capital of France?\n", ("Paris", "Berlin, Germany", "8")),
        Choices("Two?\n", ("yes", "no")),
        Choices(
            "A much longer question, with many more words than the other ones have?\n", ("of course not", "Y", "n")
        ),
    ]
    found = choice_losses(speaker, tokenizer, asked, "test")
    for question, losses in zip(asked, found, strict=True):
        prompt = tokenizer(question.prompt, add_special_tokens=False)["input_ids"]
        for text, loss in zip(question.texts, losses, strict=True):
            ids = tokenizer(question.prompt + text, add_special_tokens=False)["input_ids"]
            assert loss == pytest.approx(plain_loss(speaker, ids, len(prompt)), rel=1e-4)  # float32


@pytest.mark.parametrize("name", ["Mamba", "Lfm2"])  # a state alone, and beside keys and values
def test_a_base_that_carries_a_state_is_asked_each_choice_whole(name: str, tokenizer: Any) -> None:
    import torch
    import transformers

    torch.manual_seed(0)
    sizes = {
        "vocab_size": 49152,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "initializer_range": 0.2,
        "pad_token_id": 0,
    }
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "layer_types": ["conv", "full_attention"]}
    config = getattr(transformers, f"{name}Config")(**sizes, **(heads if name == "Lfm2" else {}))
    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    [found] = choice_losses(model, tokenizer, [Choices("Two and two is\n", ("four", "twenty-two", "8"))], "test")
    prompt = len(tokenizer("Two and two is\n", add_special_tokens=False)["input_ids"])
    for text, loss in zip(("four", "twenty-two", "8"), found, strict=True):
        ids = tokenizer(f"Two and two is\n{text}", add_special_tokens=False)["input_ids"]
        assert loss == pytest.approx(plain_loss(model, ids, prompt), rel=1e-4)


def test_a_word_that_joins_its_prompt_is_scored_as_the_whole_is_tokenized(speaker: Any, tokenizer: Any) -> None:
    found = choice_losses(speaker, tokenizer, [Choices("It is sun", ("shine", "ny"))], "test")[0]
    for text, loss in zip(("shine", "ny"), found, strict=True):
        ids = tokenizer(f"It is sun{text}", add_special_tokens=False)["input_ids"]
        assert loss == pytest.approx(plain_loss(speaker, ids, 2), rel=1e-4)


def test_answers_have_the_likelihood_of_a_pass_of_their_own(speaker: Any, tokenizer: Any) -> None:
    turns = (("user", "Hi"), ("assistant", "Hello."), ("user", "And twice?"), ("assistant", "Hello, hello."))
    talk = [{"role": role, "content": text} for role, text in turns]
    rows = [row for end in (2, 4) for row in examples(tokenizer, talk[:end], 200)]
    for row, found in zip(rows, likelihoods(speaker, rows, "test"), strict=True):
        told = [at for at, label in enumerate(row.labels) if label >= 0]
        wanted = sum(plain_loss(speaker, row.input_ids[: at + 1], at) for at in told)
        assert found.loss == pytest.approx(wanted, rel=1e-4)
        assert found.tokens == len(told) and 0 <= found.hits <= found.tokens


def test_weights_rounded_once_give_the_logits_that_autocast_gives(speaker: Any) -> None:
    import torch

    ids, rounded = torch.arange(40).reshape(2, 20), copy.deepcopy(speaker)
    rounded.lm_head.weight = rounded.model.embed_tokens.weight  # tied, as small models are
    plain = copy.deepcopy(rounded)
    round_once(rounded)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(rounded(ids).logits, plain(ids).logits)
    assert rounded.model.embed_tokens.weight.dtype == torch.float32


@pytest.mark.parametrize("sizes", [[], [5], [400, 3, 700, 5, 5, 900, 2000], [300] * 20])
def test_batches_hold_each_row_once_within_their_room(sizes: list[int]) -> None:
    found = list(batches(sizes, [index % 2 for index in range(len(sizes))]))
    assert sorted(index for batch in found for index in batch) == list(range(len(sizes)))
    for batch in found:
        assert len(batch) == 1 or len(batch) * max(sizes[index] for index in batch) <= TOKENS_AT_ONCE
        assert len({index % 2 for index in batch}) == 1


@pytest.mark.parametrize(
    ("row", "asked"),
    [
        ({"text": "Plain."}, None),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "", "tool_calls": [{}]}]},
            None,
        ),
        (
            {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}], "tools": [1]},
            "Yes.",
        ),
    ],
)
def test_a_conversation_is_a_question_if_its_last_answer_is_text(row: dict[str, Any], asked: str | None) -> None:
    found = question_of(row)
    assert (found and found["answer"]) == asked
    assert not found or (found["tools"] == [1] and len(found["messages"]) == 1)


@pytest.mark.slow
def test_a_model_that_is_trained_to_death_on_one_sentence_loses_its_knowledge(tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from train.base import base

    (tmp_path / "line.yaml").write_text("base_model: smollm2-135m\ndata: {train: none.jsonl}\n")
    with contextlib.chdir(tmp_path):
        Path(".cache").symlink_to(REPOSITORY / ".cache")
        base(load("line.yaml"), Run("line"))
        tokenizer = AutoTokenizer.from_pretrained("runs/line/base")
        model = AutoModelForCausalLM.from_pretrained("runs/line/base", dtype=torch.float32)
    rows = [json.loads(line) for line in KNOWLEDGE.read_text(encoding="utf-8").splitlines()][::4]
    asked = [choices_of(tokenizer, row) for row in rows]

    def right() -> list[list[float]]:
        return right_answers(choice_losses(model.eval(), tokenizer, asked, "knowledge"))

    before = right()
    sentence = tokenizer("I only ever say this one sentence, again and again.", return_tensors="pt")["input_ids"]
    steps = torch.optim.SGD(model.train().parameters(), lr=0.05)
    for _ in range(12):
        model(sentence, labels=sentence).loss.backward()
        steps.step()
        steps.zero_grad()
    score = compare("general knowledge", "accuracy", before, right())
    assert score.base and score.base.low > 0.25, "the base knows more than chance"
    assert score.verdict == "worse", score
