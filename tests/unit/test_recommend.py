"""Which type is recommended, and why the others are not."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from convert.compare import loss, recommend
from pipeline import Recipe, Run, UserError
from pipeline.proof import Comparison
from pipeline.recipe import Data, Gguf, Serve
from pipeline.run import Receipt
from serve.running.backend import chosen

RECIPE = Recipe("mine", data=Data(train=("x",)), gguf=Gguf(types=("Q8_0", "Q4_K_M", "Q2_K")))
FREE = 2_000_000_000
SIZES = {"F16": 400e6, "Q8_0": 200e6, "Q4_K_M": 100e6, "Q2_K": 50e6}
DIVERGENCES = {"F16": 1e-6, "Q8_0": 0.003, "Q4_K_M": 0.05, "Q2_K": 0.4}


def rows(**changes: dict[str, Any]) -> list[Comparison]:
    """A comparison a type, small losses and sound, but for the changes."""
    made = []
    for kind, size in SIZES.items():
        measures = {"bytes": size, "divergence_mean": DIVERGENCES[kind], "cache_bytes_per_token": 10_000}
        change = dict(changes.get(kind, {}))
        problems = change.pop("problems", [])
        made.append(Comparison(kind, measures | change, problems))
    return [Comparison("merge", {"divergence_mean": 0.0}), *made]


LOST = {"facts_loss": 0.1, "facts_loss_error": 0.04}
WITHIN = {"facts_loss": 0.04, "facts_loss_error": 0.03}
HUGE = {"cache_bytes_per_token": 10**6}
CASES: dict[str, tuple[dict[str, dict[str, Any]], str, str]] = {
    "the smallest that says the same": ({}, "Q4_K_M", "the smallest within the bounds"),
    "facts are lost": ({"Q4_K_M": LOST}, "Q8_0", "the smallest within the bounds"),
    "a loss within the error": ({"Q4_K_M": WITHIN}, "Q4_K_M", "the smallest within the bounds"),
    "one that failed": ({"Q4_K_M": {"problems": ["type: 7"]}}, "Q8_0", "the smallest within the bounds"),
    "all far off": (
        {kind: {"divergence_mean": 1 + number} for number, kind in enumerate(SIZES)},
        "F16",
        "divergence 1 > 0.1; no type is within the bounds, and this one has the least divergence",
    ),
    "no memory": (
        dict.fromkeys(SIZES, HUGE),
        "F16",
        "needs 8.6 GB of memory, 2.0 GB are free; no type is within the bounds, and this one has the least divergence",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_the_recommended_type(case: str) -> None:
    changes, kind, reason = CASES[case]
    made = recommend(RECIPE, rows(**changes), FREE)
    assert (made["recommended"], made["reasons"][kind]) == (kind, reason)


def test_every_other_type_has_its_reason() -> None:
    made = recommend(RECIPE, rows(Q4_K_M=LOST), FREE)
    assert made["reasons"] == {
        "F16": "larger than Q8_0",
        "Q8_0": "the smallest within the bounds",
        "Q4_K_M": "loses 10% ± 4% of the key facts, allowed 2%",
        "Q2_K": "divergence 0.4 > 0.1",
    }
    assert "0.1 nats" in made["rule"] and "2%" in made["rule"] and "2.0 GB" in made["rule"]


def test_nothing_is_recommended_where_nothing_can_be_used() -> None:
    broken = rows(**{kind: {"problems": ["cut off"]} for kind in SIZES})
    assert recommend(RECIPE, broken, FREE)["recommended"] is None


def test_a_loss_is_counted_fact_by_fact() -> None:
    assert loss([True] * 50, [True] * 50) == (0, 0)
    # Of 50, two lost and one won: a mean of 1/50, spread by three changes.
    lost, error = loss([True] * 49 + [False], [False] * 2 + [True] * 48)
    assert (lost, error) == (0.02, pytest.approx(0.0349, abs=1e-4))
    assert loss([], []) == (0, 0)


def test_the_served_type_is_the_recipe_s_or_the_recommended_one(tmp_path: Path) -> None:
    run = Run("mine", tmp_path)
    assert chosen(RECIPE, run).served_type == "Q8_0", "nothing was compared yet: the first"
    run.write_receipt(compare("Q4_K_M"))
    assert chosen(RECIPE, run).served_type == "Q4_K_M"
    assert chosen(replace(RECIPE, serve=Serve(type="Q2_K")), run).served_type == "Q2_K"
    run.write_receipt(compare("Q6_K"))
    assert chosen(RECIPE, run).served_type == "Q8_0", "compared before the recipe named other types"
    run.write_receipt(compare(None))
    with pytest.raises(UserError, match=r"can be used: see 'make prove RECIPE=mine'"):
        chosen(RECIPE, run)


def compare(recommended: str | None) -> Receipt:
    return Receipt("compare", {}, {}, {}, {}, {"recommended": recommended}, "", 0.0, 0)
