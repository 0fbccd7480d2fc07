"""The measures of an answer against the libraries' and papers' own values, and the intervals around them."""

import io
import re

import numpy as np
import pytest

from pipeline.scores import (
    LEAST_ROWS,
    Estimate,
    Score,
    as_rows,
    compare,
    newcombe,
    squared_and_added,
    table,
    wilson,
)
from pipeline.units import change, share
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


def test_the_interval_of_paired_proportions_is_that_of_the_published_example() -> None:
    # Fagerland, Lydersen and Laake (2014), Statistics in Medicine 33, Bentur's 21 children: 1, 1, 7 and 12.
    cells = ((True, True, 1), (True, False, 1), (False, True, 7), (False, False, 12))
    before, after = (np.array([pair[side] for *pair, count in cells for _ in range(count)]) for side in (0, 1))
    found = newcombe(before, after)
    assert [round(value, 3) for value in (found.value, found.low, found.high)] == [0.286, 0.026, 0.507]


def test_rows_that_agree_make_the_interval_of_the_difference_narrower() -> None:
    before, after = np.array([True] * 45 + [False] * 55), np.array([True] * 40 + [False] * 55 + [True] * 5)
    found, apart = newcombe(before, after), squared_and_added(wilson(45, 100), wilson(45, 100))
    assert found.value == 0.0 and found.high == pytest.approx(-found.low)
    # 10 of 100 rows changed: Wald's is 1.96 * sqrt(10) / 100; Newcombe's is a little wider.
    assert 0.062 < found.high < 0.075 < 0.13 < apart.high


def rows(*hits: float) -> list[list[float]]:
    return [[hit, 1.0] for hit in hits]


VERDICTS = [
    (rows(*[0] * 20), rows(*[1] * 20), False, "better"),
    (rows(*[1] * 20), rows(*[0] * 20), False, "worse"),
    (rows(*[5.0, 5.1] * 10), rows(*[2.0] * 20), True, "better"),
    (rows(*[2.0] * 20), rows(*[5.0, 5.1] * 10), True, "worse"),
    (rows(*[5.0] * 20), rows(*[2.0] * 20), True, "no interval known"),
    (rows(*[5.0] * 20), rows(*[5.0] * 20), True, "no difference shown"),
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


FEW = [
    (rows(0.0), Estimate(0.0, 0.0, 0.7935)),  # one row, wrong: Wilson's, 1.96**2 / (1 + 1.96**2)
    (rows(1.0), Estimate(1.0, 0.2065, 1.0)),
    (rows(*[0.0] * 20), Estimate(0.0, 0.0, 0.1611)),
    ([[0.0, 2.0]] * 10, Estimate(0.0, 0.0, 0.2775)),  # facts, two a question: never surer than ten rows are
    ([[2.0, 2.0]] * 10, Estimate(1.0, 0.7225, 1.0)),
    (rows(0.2, 0.4), Estimate(pytest.approx(0.3), None, None)),  # a bootstrap of two rows says nothing
    (rows(*[0.5] * 20), Estimate(0.5, None, None)),  # nor does one of rows that are all alike
]


@pytest.mark.parametrize(("given", "wanted"), FEW)
def test_few_rows_or_equal_ones_have_an_honest_interval_or_none(given: list[list[float]], wanted: Estimate) -> None:
    found = compare("g", "n", None, given).trained
    ends = tuple(None if end is None else round(end, 4) for end in (found.low, found.high))
    assert (found.value, *ends) == (wanted.value, wanted.low, wanted.high)


def test_what_all_rows_agree_on_leaves_the_difference_uncertain() -> None:
    facts = [[1.0, 2.0], [2.0, 2.0], [0.0, 1.0], [1.0, 1.0]] * 5
    score = compare("g", "n", [[0.0, 2.0], [0.0, 2.0], [0.0, 1.0], [0.0, 1.0]] * 5, facts)
    assert score.difference and score.difference.value == pytest.approx(2 / 3)
    assert score.difference.low < score.trained.low < score.difference.value, "the base's own interval counts too"
    same = compare("g", "n", rows(*[0.0] * 20), rows(*[0.0] * 20)).difference
    assert (round(same.low, 4), round(same.high, 4)) == (-0.1611, 0.1611)


def test_the_interval_of_a_mean_is_near_that_of_the_normal_distribution() -> None:
    found = np.random.default_rng(1).normal(10.0, 2.0, 400)
    score = compare("g", "n", rows(*found), rows(*found + 1 + np.tile([-1e-3, 1e-3], 200)))
    wide = 1.96 * found.std() / 20
    assert score.base.low == pytest.approx(found.mean() - wide, abs=0.03)  # the bootstrap's own noise
    assert score.base.high == pytest.approx(found.mean() + wide, abs=0.03)
    ends = (score.difference.low, score.difference.high)
    assert ends == pytest.approx((1.0, 1.0), abs=1e-3), "pairs differ by one, nearly"


def test_the_same_seed_gives_the_same_interval_and_a_receipt_keeps_it() -> None:
    found = np.random.default_rng(2).normal(0.0, 1.0, (2, 50))
    again = [compare("g", "n", rows(*found[0]), rows(*found[1]), seed=3) for _ in range(2)]
    assert again[0] == again[1] == Score.of(as_rows(again)[0])
    assert again[0] != compare("g", "n", rows(*found[0]), rows(*found[1]), seed=4)


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_the_table_fits_the_terminal_with_every_interval(width: int) -> None:
    from rich.console import Console

    found = np.random.default_rng(5).random((2, 30))
    score = compare("held-out questions", "token F1", rows(*found[0]), rows(*found[1]))
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(table([("held-out questions", [score])], console))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= width
    words = re.findall(r"[\d.]+%?", text)
    for estimate in (score.base, score.trained):
        assert {share(value) for value in (estimate.value, estimate.low, estimate.high)} <= set(words)
    assert score.verdict.split()[0] in text


@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        (0.559, "share", "+55.9"),
        (-0.0471, "share", "\N{MINUS SIGN}4.7"),
        (0.0, "share", "0.0"),
        (13.87, "points", "+13.9"),
        (-60.8, "number", "\N{MINUS SIGN}60.8"),
    ],
)
def test_a_change_has_a_sign_and_shares_change_by_points_of_a_hundred(value: float, unit: str, shown: str) -> None:
    assert change(value, unit) == shown
