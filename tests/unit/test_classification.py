"""Files in GLUE's columns: each task's own shape, labels by name or by number, and every problem with its line."""

import json
from pathlib import Path

import pytest

from pipeline import UserError
from train.scoring.classification import labelled, path_of

SHAPES = {
    "SST-2": ("sst.tsv=negative|positive", "sentence\tlabel\na fine film\t1\na \"bad\" one\t0\n", [1, 0]),
    "CoLA": ("cola.tsv=wrong|right", "gj04\t1\t\tOur friends won.\ngj04\t0\t*\tFriends our won.\n", [1, 0]),
    "MRPC": ("mrpc.tsv=no|yes", "Quality\t#1 ID\t#2 ID\t#1 String\t#2 String\n1\t7\t8\tA b.\tA, b.\n0\t7\t9\tA\tB\n",
             [1, 0]),
    "QQP": ("qqp.tsv=no|yes", "id\tqid1\tqid2\tquestion1\tquestion2\tis_duplicate\n3\t1\t2\tWho?\tWho is it?\t1\n"
            "4\t1\t2\tWho?\tWhat?\t0\n", [1, 0]),
    "QNLI": ("qnli.tsv", "index\tquestion\tsentence\tlabel\n0\tWhen?\tIn 1945.\tentailment\n"
             "1\tWhen?\tHe ran.\tnot_entailment\n",
             [0, 1]),
    "RTE": ("rte.jsonl", '{"sentence1": "A", "sentence2": "B", "label": "not_entailment"}\n'
            '{"sentence1": "A", "sentence2": "A", "label": "entailment"}\n', [1, 0]),
    "MNLI": ("mnli.jsonl=entailment|neutral|contradiction",
             '{"premise": "A", "hypothesis": "B", "label": 2, "idx": 0}\n'
             '{"premise": "A", "hypothesis": "B", "label": 0, "idx": 1}\n', [2, 0]),
    "SNLI": ("snli.tsv", "sentence1\tsentence2\tgold_label\nA\tB\tneutral\nA\tC\tcontradiction\n", [1, 0]),
    "pandas": ("gap.csv=no|yes", "text,label\na,1.0\nb,0.0\n", [1, 0]),
    "CSV": ("mine.csv", 'text,label\n"a, b",spam\n"c\nd",ham\n', [1, 0]),
}  # fmt: skip


def written(entry: str, text: str, folder: Path) -> str:
    name, equals, labels = entry.partition("=")
    (folder / name).write_text(text, encoding="utf-8")
    return f"{folder / name}{equals}{labels}"


@pytest.mark.parametrize("task", SHAPES)
def test_each_tasks_own_columns_are_read(task: str, tmp_path: Path) -> None:
    entry, text, wanted = SHAPES[task]
    (found,) = labelled((written(entry, text, tmp_path),))
    assert found.wanted == wanted and len(found.prompts) == len(wanted)
    assert path_of(entry) == found.name


def test_the_prompt_has_both_texts_and_the_labels_as_words(tmp_path: Path) -> None:
    (found,) = labelled((written(*SHAPES["QNLI"][:2], tmp_path),))
    assert found.prompts[0] == (
        "Question: When?\nSentence: In 1945.\n\n"
        "Which label fits: entailment or not entailment? Answer with the label alone."
    )


FAULTS = [
    ("a.tsv", "sentence\tlabel\nx\t1\ny\t0\n", "label has the numbers 0, 1: name them in order, as"),
    ("a.tsv=no|yes", "sentence\tlabel\nx\t2\n", "a.tsv:2: label '2' is none of no, yes"),
    ("a.csv", "text,label\na,1.0\nb,0.0\n", "label has the numbers 0, 1: name them in order, as"),
    ("a.csv", "text,label\n" + "".join(f"a,word {n}\n" for n in range(201)), "has 201 labels in label, and at most"),
    ("a.jsonl=no|yes", '{"sentence": "x", "label": -1}\n', "a.jsonl:1: label -1, as in GLUE's test files"),
    ("stsb.tsv", "sentence1\tsentence2\tscore\na\tb\t3.25\n", "a regression"),
    ("stsb.jsonl", '{"sentence1": "a", "sentence2": "b", "label": 3.8}\n', "a regression"),
    ("a.tsv", "sentence\tlabel\nx\tgood\ny\n", "a.tsv:3: has 1 columns of 2"),
    ("a.tsv", "sentence\tlabel\n\tgood\nb\tbad\n", "a.tsv:2: 'sentence' is missing or empty"),
    ("a.tsv", "sentence\tlabel\nx\tgood\n", "the one label 'good'"),
    ("a.tsv", "sentence\tindex\nx\t1\n", "no column of labels"),
    ("a.tsv", "words\tlabel\nx\tgood\n", "no column of text among"),
    ("a.tsv", "sentence\tlabel\n", "has no rows"),
    ("a.tsv", "", "has no rows"),
    ("a.jsonl", '{"sentence": "x"\n', "a.jsonl:1: not JSON"),
    ("a.jsonl", '[1]\n', "a.jsonl:1: is no object"),
    ("a.csv", 'sentence,label\n"x,good\n', "not CSV"),
    ("a.xml", "<a/>", "ends with .jsonl, .csv, .tsv"),
]  # fmt: skip


@pytest.mark.parametrize(("entry", "text", "told"), FAULTS)
def test_a_damaged_file_is_told_with_its_place(entry: str, text: str, told: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as error:
        labelled((written(entry, text, tmp_path),))
    assert any(told in problem for problem in error.value.problems), error.value.problems


def test_only_a_line_feed_ends_a_line(tmp_path: Path) -> None:
    text = "sentence\tlabel\r\none\u2028two\x85three\tgood\r\nb\tbad\r\n"
    (found,) = labelled((written("a.tsv", text, tmp_path),))
    assert "Sentence: one\u2028two\x85three\n" in found.prompts[0] and found.labels == ("bad", "good")
    (found,) = labelled((written("b.csv", 'text,label\n"c\nd",ham\ne,spam\n', tmp_path),))
    assert "Text: c\nd\n" in found.prompts[0]


def test_all_problems_of_all_files_are_told_at_once(tmp_path: Path) -> None:
    rows = "".join(json.dumps({"sentence": "", "label": "x"}) + "\n" for _ in range(3))
    with pytest.raises(UserError) as error:
        labelled((written("a.jsonl", rows, tmp_path), str(tmp_path / "gone.tsv"), written("b.tsv", "", tmp_path)))
    problems = error.value.problems
    assert sum("a.jsonl:" in problem for problem in problems) == 3
    assert any("gone.tsv: no such file" in problem for problem in problems)
    assert any("b.tsv: has no rows" in problem for problem in problems)


def test_text_that_is_not_utf8_is_told(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_bytes(b"sentence,label\n\xff,x\n")
    with pytest.raises(UserError, match="UTF-8"):
        labelled((str(tmp_path / "a.csv"),))
