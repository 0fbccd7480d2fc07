"""The measures of an answer against the libraries' and papers' own values, and the intervals around them."""

import numpy as np
import pytest

from recipe.confidence import LEAST_ROWS, Score, as_rows, compare, wilson
from train.scoring.measures import confusion, macro_f1, matthews, normalized, text_measures, token_f1, words

ANSWERS = ["The cat sat on the mat.", "I am Truetune, the assistant.", "8000", ""]
REFERENCES = ["A cat sat on a mat", "No, I am Truetune, the assistant of this project.", "Port 8000.", "Nothing."]
MEASURES = {measure.name: measure for measure in text_measures()}


def total(name: str, answers: list[str], references: list[str]) -> float:
    measure = MEASURES[name]
    sums = np.asarray(measure.statistics(answers, references)).sum(0, keepdims=True)
    return float(np.asarray(measure.score(sums))[0])


SQUAD = [
    ("The Eiffel Tower!", "eiffel tower", 1.0, 1.0),
    ("the", "", 1.0, 1.0),
    ("Paris", "", 0.0, 0.0),
    ("in the year 1945", "1945", 0.0, 0.5),  # 1 of 3 words right, 1 of 1 found: 2 / 4
    ("a b c d", "c d e", 0.0, 4 / 6),  # without the article a: 2 of 3, 2 of 3
    ("is is is", "is", 0.0, 0.5),  # a word counts as often as both have it
]


@pytest.mark.parametrize(("answer", "wanted", "exact", "f1"), SQUAD)
def test_exact_match_and_f1_are_those_of_squad(answer: str, wanted: str, exact: float, f1: float) -> None:
    assert total("exact match", [answer], [wanted]) == exact
    assert token_f1(answer, wanted) == pytest.approx(f1)


def test_normalization_is_that_of_squad() -> None:
    assert normalized(" The  cat, an owl AND a dog's theatre. ") == "cat owl and dogs theatre"


def test_bleu_and_chrf_are_those_of_sacrebleu() -> None:
    from sacrebleu import corpus_bleu, corpus_chrf

    assert total("BLEU", ANSWERS, REFERENCES) == pytest.approx(corpus_bleu(ANSWERS, [REFERENCES]).score)
    assert total("chrF", ANSWERS, REFERENCES) == pytest.approx(corpus_chrf(ANSWERS, [REFERENCES]).score)
    assert "tok:13a" in MEASURES["BLEU"].note and "nc:6" in MEASURES["chrF"].note


@pytest.mark.parametrize(("name", "kind"), [("ROUGE-1", "rouge1"), ("ROUGE-2", "rouge2"), ("ROUGE-L", "rougeL")])
def test_rouge_of_english_is_that_of_the_scorer(name: str, kind: str) -> None:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind])
    each = [scorer.score(wanted, answer)[kind].fmeasure for wanted, answer in zip(REFERENCES, ANSWERS, strict=True)]
    assert total(name, ANSWERS, REFERENCES) == pytest.approx(sum(each) / len(each))


def test_rouge_reads_scripts_that_the_scorers_own_tokenizer_drops() -> None:
    assert words("Größe, 東京へ naïve_x!") == ["größe", "東", "京", "へ", "naïve", "x"]
    assert total("ROUGE-1", ["Привет, мир"], ["привет мир"]) == 1.0


WANTED, FOUND = [0, 0, 1, 1, 2, 2, 2, 0], [0, 1, 1, 1, 2, 0, 2, 0]


@pytest.mark.parametrize("classes", [3, 4])  # one that never occurs changes nothing
def test_macro_f1_and_matthews_are_those_of_scikit_learn(classes: int) -> None:
    from sklearn.metrics import f1_score, matthews_corrcoef

    sums = np.asarray(confusion(WANTED, FOUND, classes)).sum(0, keepdims=True)
    assert macro_f1(sums)[0] == pytest.approx(f1_score(WANTED, FOUND, average="macro"))
    assert matthews(sums)[0] == pytest.approx(matthews_corrcoef(WANTED, FOUND))


def test_matthews_of_one_answer_for_all_is_zero() -> None:
    assert matthews(np.asarray(confusion([0, 1, 1], [1, 1, 1], 2)).sum(0, keepdims=True))[0] == 0.0


def test_wilson_is_that_of_the_published_example() -> None:
    # Newcombe (1998), Statistics in Medicine 17, table I, method 3: 81 of 263 and 0 of 20.
    assert [round(value, 4) for value in (wilson(81, 263).low, wilson(81, 263).high)] == [0.2553, 0.3662]
    assert [round(value, 4) for value in (wilson(0, 20).low, wilson(0, 20).high)] == [0.0, 0.1611]


def rows(*hits: float) -> list[list[float]]:
    return [[hit, 1.0] for hit in hits]


VERDICTS = [
    (rows(*[0] * 20), rows(*[1] * 20), False, "better"),
    (rows(*[1] * 20), rows(*[0] * 20), False, "worse"),
    (rows(*[5.0] * 20), rows(*[2.0] * 20), True, "better"),
    (rows(*[2.0] * 20), rows(*[5.0] * 20), True, "worse"),
    (rows(*[0, 1] * 10), rows(*[1, 0] * 10), False, "no difference shown"),
    (rows(*[1] * 20), rows(*[1] * 20), False, "no difference shown"),
    (rows(*[0] * (LEAST_ROWS - 1)), rows(*[1] * (LEAST_ROWS - 1)), False, "too few rows"),
    (rows(*[0] * LEAST_ROWS), rows(*[1] * LEAST_ROWS), False, "better"),
]


@pytest.mark.parametrize(("base", "trained", "lower_is_better", "verdict"), VERDICTS)
def test_a_difference_is_called_when_its_interval_excludes_zero(
    base: list[list[float]], trained: list[list[float]], lower_is_better: bool, verdict: str
) -> None:
    assert compare("group", "name", base, trained, lower_is_better=lower_is_better).verdict == verdict


def test_the_interval_of_a_mean_is_near_that_of_the_normal_distribution() -> None:
    found = np.random.default_rng(1).normal(10.0, 2.0, 400)
    score = compare("g", "n", rows(*found), rows(*found + 1))
    wide = 1.96 * found.std() / 20
    assert score.base.low == pytest.approx(found.mean() - wide, abs=0.03)  # the bootstrap's own noise
    assert score.base.high == pytest.approx(found.mean() + wide, abs=0.03)
    assert score.difference.low == pytest.approx(1.0) == score.difference.high, "pairs differ by one, each of them"


def test_the_same_seed_gives_the_same_interval_and_a_receipt_keeps_it() -> None:
    found = np.random.default_rng(2).normal(0.0, 1.0, (2, 50))
    again = [compare("g", "n", rows(*found[0]), rows(*found[1]), seed=3) for _ in range(2)]
    assert again[0] == again[1] == Score.of(as_rows(again)[0])
    assert again[0] != compare("g", "n", rows(*found[0]), rows(*found[1]), seed=4)
