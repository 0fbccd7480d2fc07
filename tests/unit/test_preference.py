"""The measures of preferences: margins, and chosen answers that became less likely."""

import math

import pytest

from train.scoring.preference import less_likely, scores_of_judgements, scores_of_odds, scores_of_pairs

BEFORE = [{"chosen": [-10.0 - row, 5.0], "rejected": [-20.0, 5.0]} for row in range(8)]


def after(chosen: float, rejected: float) -> list[dict[str, list[float]]]:
    """Both log-probabilities changed by so much, a little differently in each row."""
    return [
        {
            "chosen": [row["chosen"][0] + chosen * (1 + number / 10), 5.0],
            "rejected": [row["rejected"][0] + rejected, 5.0],
            "divergence": [0.5, 10.0],
        }
        for number, row in enumerate(BEFORE)
    ]


def test_the_margin_is_the_difference_of_what_both_gained() -> None:
    found = {score.name: score for score in scores_of_pairs(BEFORE, after(2.0, -3.0), 0.5, 0)}
    assert found["reward margin"].trained.value == pytest.approx(0.5 * (2.0 * 1.35 + 3.0))
    assert found["reward margin"].verdict == "better"
    assert found["reward accuracy"].trained.value == 1.0
    difference = found["log-probability, rejected"].difference
    assert difference and difference.value == pytest.approx(-3.0)
    assert found["KL to the start"].trained.value == pytest.approx(0.05)


@pytest.mark.parametrize(("chosen", "told"), [(1.0, False), (-1.0, True)])
def test_chosen_answers_that_became_less_likely_are_told(chosen: float, told: bool) -> None:
    found = scores_of_pairs(BEFORE, after(chosen, -9.0), 0.1, 0)
    assert found[0].verdict == "better", "the margin grows in either case"
    assert bool(less_likely(found)) is told


def test_good_answers_are_measured_apart_from_bad_ones() -> None:
    before = [{"good" if row % 2 else "bad": [-10.0, 5.0]} for row in range(16)]
    later = [
        {side: [value[0] + (3.0 if side == "good" else -2.0), 5.0] for side, value in row.items()} for row in before
    ]
    found = {score.name: score for score in scores_of_judgements(before, later, 0.1, 0)}
    assert found["reward, good"].trained.value == pytest.approx(0.3) and found["reward, good"].rows == 8
    assert found["reward, bad"].trained.value == pytest.approx(-0.2) and found["reward, bad"].verdict != "worse"
    assert "KL to the start" not in found, "no start was asked"


def test_the_odds_are_those_of_the_mean_probability_of_a_token() -> None:
    row = {"chosen": [5 * math.log(0.75), 5.0], "rejected": [2 * math.log(0.5), 2.0]}
    found = scores_of_odds([row] * 8, [row] * 8, 0)
    assert found[0].trained.value == pytest.approx(math.log(0.75 / 0.25) - math.log(1.0))
