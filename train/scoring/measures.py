"""Measures of an answer against its reference, as statistics of each row that add up over rows.

Exact match and F1 as SQuAD computes them (Rajpurkar et al., 2016), BLEU and chrF by sacrebleu (Post, 2018), ROUGE by
Google's scorer (Lin, 2004), macro F1 and Matthews' correlation as GLUE has them (Wang et al., 2018).
"""

import re
import string
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from pipeline.scores import mean

ARTICLES = re.compile(r"\b(a|an|the)\b")
# A letter of a script that writes no spaces is a word; of the others, letters and digits in a row.
WORDS = re.compile(
    r"[\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff]|[^\W_\u0e00-\u0eff\u3040-\u30ff\u3400-\u9fff]+"
)

ROUGE = "rouge-score's F1, mean of the rows; words of any script, in lower case, not stemmed"


@dataclass(frozen=True)
class TextMeasure:
    """`statistics` takes answers and references to one list of numbers a row, `score` their sums to the measure."""

    name: str
    statistics: Callable[[list[str], list[str]], list[list[float]]]
    score: Callable[[Any], Any] = mean
    unit: str = "share"
    note: str = ""


def text_measures() -> list[TextMeasure]:
    """What an answer is measured by, against one reference."""
    from sacrebleu.metrics import BLEU, CHRF

    def each(measure: Callable[[str, str], float]) -> Callable[[list[str], list[str]], list[list[float]]]:
        return lambda answers, references: [
            [measure(answer, reference), 1.0] for answer, reference in zip(answers, references, strict=True)
        ]

    squad = "one reference, SQuAD's normalization: lower case, without punctuation and the articles a, an, the"
    made = [
        TextMeasure(
            "exact match", each(lambda answer, wanted: float(normalized(answer) == normalized(wanted))), note=squad
        ),
        TextMeasure("token F1", each(token_f1), note=squad),
    ]
    for name, metric in (("BLEU", BLEU()), ("chrF", CHRF())):
        made.append(_of_sacrebleu(name, metric))
    for name, kind in (("ROUGE-1", "rouge1"), ("ROUGE-2", "rouge2"), ("ROUGE-L", "rougeL")):
        made.append(TextMeasure(name, each(_rouge(kind)), note=ROUGE))
    return made


def normalized(text: str) -> str:
    """Lower case, without punctuation and articles, one space between words: SQuAD's evaluate-v1.1.py."""
    bare = "".join(letter for letter in text.lower() if letter not in string.punctuation)
    return " ".join(ARTICLES.sub(" ", bare).split())


def token_f1(answer: str, wanted: str) -> float:
    """Harmonic mean of precision and recall of the normalized words; of two empty texts 1, as SQuAD 2.0 has it."""
    mine, other = normalized(answer).split(), normalized(wanted).split()
    if not mine or not other:
        return float(mine == other)
    same = sum((Counter(mine) & Counter(other)).values())
    return 2 * same / (len(mine) + len(other))


def words(text: str) -> list[str]:
    """Words of any script, in lower case; rouge-score's own tokenizer drops all but a to z and digits."""
    return WORDS.findall(text.lower())


def confusion(wanted: list[int], found: list[int], classes: int) -> list[list[float]]:
    """Of each row, its cell of the (classes x classes) confusion matrix, wanted by found, flat."""
    cells = [[0.0] * classes**2 for _ in wanted]
    for row, mine, other in zip(cells, wanted, found, strict=True):
        row[mine * classes + other] = 1.0
    return cells


def macro_f1(sums: Any) -> Any:
    """Mean F1 of the classes that occur, from flat confusion matrices (..., classes * classes)."""
    import numpy as np

    matrix = _square(sums)
    right = np.diagonal(matrix, axis1=-2, axis2=-1)
    occurring = matrix.sum(-1) + matrix.sum(-2)
    f1 = np.divide(2 * right, occurring, out=np.zeros_like(right), where=occurring > 0)
    return f1.sum(-1) / np.maximum((occurring > 0).sum(-1), 1)


def matthews(sums: Any) -> Any:
    """Matthews' correlation for any number of classes (Gorodkin, 2004); 0 where it is not defined."""
    import numpy as np

    matrix = _square(sums)
    total, right = matrix.sum((-2, -1)), np.trace(matrix, axis1=-2, axis2=-1)
    wanted, found = matrix.sum(-1), matrix.sum(-2)
    above = right * total - (wanted * found).sum(-1)
    below = np.sqrt((total**2 - (found**2).sum(-1)) * (total**2 - (wanted**2).sum(-1)))
    return np.divide(above, below, out=np.zeros_like(above), where=below > 0)


def _square(sums: Any) -> Any:
    import numpy as np

    sums = np.asarray(sums, dtype=np.float64)
    classes = round(sums.shape[-1] ** 0.5)
    return sums.reshape(*sums.shape[:-1], classes, classes)


def _of_sacrebleu(name: str, metric: Any) -> TextMeasure:
    """Corpus-level, by sacrebleu's own statistics of each sentence, which its own significance tests resample too."""
    import numpy as np

    def statistics(answers: list[str], references: list[str]) -> list[list[float]]:
        return [list(map(float, row)) for row in metric._extract_corpus_statistics(answers, [references])]

    def score(sums: Any) -> Any:
        return np.array(
            [metric._compute_score_from_stats(row.astype(int).tolist()).score for row in np.atleast_2d(sums)]
        )

    metric.corpus_score(["a"], [["a"]])  # the signature is complete once a number of references is known
    return TextMeasure(name, statistics, score, "points", f"sacrebleu {metric.get_signature()}")


def _rouge(kind: str) -> Callable[[str, str], float]:
    from types import SimpleNamespace

    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], tokenizer=SimpleNamespace(tokenize=words))
    return lambda answer, wanted: float(scorer.score(wanted, answer)[kind].fmeasure)
