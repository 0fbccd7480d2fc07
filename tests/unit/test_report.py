"""The page shows what is known and nothing else, asks nothing of the network, and takes no text for HTML."""

import base64
import hashlib
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from report_run import EVERY, METRICS, SCORES, TYPES, Told, comparisons

from pipeline import Run, UserError
from pipeline.gguf_head import Head
from pipeline.proof import Comparison, in_words, interval, suspects
from pipeline.scores import Score
from report.chart import change_chart, loss_chart
from report.report import page, report
from report.summary import lineage

pytest_plugins = ["report_fixtures"]
REPOSITORY = Path(__file__).parents[2]
EVIL = '<script>alert(1)</script> & "quotes" <img src=x onerror=alert(1)>'
VOID = {"meta", "link", "br", "img"}


class Outline(HTMLParser):
    """Elements that are open, those that were seen, and the page's text; raises where an end tag fits no start."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> in line {self.getpos()[0]} closes nothing"

    def handle_data(self, data: str) -> None:
        self.texts.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.texts))

    def ids(self) -> list[str]:
        return [attributes["id"] or "" for _, attributes in self.seen if "id" in attributes]


def made(run: Told) -> Outline:
    return Outline(page(run.recipe, run.run))


SECTIONS = [
    (("data", "base", "train"), {"data", "training", "answers", "lineage", "costs", "recipe"}),
    (EVERY[:-2], {"files", "data", "training", "evaluation", "answers", "lineage", "costs", "recipe"}),
    (EVERY, {"proof", "files", "data", "training", "evaluation", "answers", "lineage", "costs", "recipe"}),
]


@pytest.mark.parametrize(("stages", "sections"), SECTIONS)
def test_a_section_is_there_when_something_is_known(
    told: Callable[..., Told], stages: tuple[str, ...], sections: set[str]
) -> None:
    outline = made(told(*stages))
    assert {name for name in outline.ids() if not name.endswith(("-title", "-text"))} == sections
    assert ("size-title" in outline.ids()) == (stages == EVERY)


def test_a_run_with_nothing_but_a_training_has_a_page(told: Callable[..., Told]) -> None:
    run = told("data", "base", "train")
    for name in ("data.json", "base.json", "answers.jsonl"):
        run.run.path(name).unlink()
    receipt = run.run.receipt("train")
    receipt.metrics.clear()
    run.run.write_receipt(receipt)
    assert "Not proved yet." in made(run).text


def test_without_a_training_there_is_one_line_that_says_so(told: Callable[..., Told]) -> None:
    run = told("data")
    with pytest.raises(UserError, match=r"train\.json is missing: run 'make train RECIPE=mine' first"):
        report(run.recipe, run.run)
    assert not run.run.path("report.html").exists()


@pytest.mark.parametrize("stages", [EVERY, ("data", "base", "train")])
def test_elements_nest_and_ids_are_unique(told: Callable[..., Told], stages: tuple[str, ...]) -> None:
    outline = made(told(*stages))
    assert outline.open == [] and len(set(outline.ids())) == len(outline.ids())
    named = [attributes["aria-labelledby"] for _, attributes in outline.seen if "aria-labelledby" in attributes]
    assert {part for name in named for part in (name or "").split()} <= set(outline.ids())


def test_the_page_asks_nothing_of_the_network_and_runs_nothing(told: Callable[..., Told]) -> None:
    text = page((run := told()).recipe, run.run)
    outline = Outline(text)
    assert not re.search(r"https?://|url\(|@import|//\w+\.\w", text)
    assert {tag for tag, _ in outline.seen} & {"script", "img", "iframe", "object", "embed", "form", "base"} == set()
    links = [value for _, given in outline.seen for key, value in given.items() if key in ("src", "href")]
    assert links == ["data:,"]
    assert not [key for _, given in outline.seen for key in given if key == "style" or key.startswith("on")]


def test_the_policy_allows_this_very_style_and_no_other(told: Callable[..., Told]) -> None:
    text = page((run := told()).recipe, run.run)
    style = re.findall(r"<style>(.*?)</style>", text, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style[0].encode()).digest()).decode()
    assert f"default-src 'none'; style-src 'sha256-{digest}'" in text


def test_what_a_model_says_is_text(told: Callable[..., Told]) -> None:
    run = told(rows=comparisons(Q2_K=f"answers: {EVIL}"))
    run.jsonl("answers.jsonl", [{"question": EVIL, "facts": [EVIL], "before": EVIL, "after": "no"}])
    outline = made(run)
    assert {tag for tag, _ in outline.seen} & {"script", "img"} == set()
    assert outline.text.count(EVIL) >= 4


def test_the_data_are_told_by_source_step_and_length(told: Callable[..., Told]) -> None:
    text = made(told("data", "base", "train")).text
    assert "talks.jsonlOpenAI messages4231 no answer" in text
    assert "near duplicates" in text and "1,234" in text
    assert "packed into 94 rows of 301 tokens that are 95.4% full" in text
    assert "127 of up to 64 tokens, 233 of 65 to 128 tokens, 18 of 129 to 256 tokens" in text


def test_padded_rows_are_told_with_their_reason(told: Callable[..., Told]) -> None:
    run = told("data", "base", "train")
    preview = json.loads(run.run.path("tokens", "preview.json").read_text())
    preview["packing"] |= {"packed": False, "why": "it takes <no> positions"}
    run.run.path("tokens", "preview.json").write_text(json.dumps(preview))
    text = made(run).text
    assert "in 94 rows of a conversation each, padded to the longest of a batch (at most 301 tokens)" in text
    assert "95.4% full: it takes <no> positions" in text and "packed beside others" not in text


def test_the_example_marks_what_is_learned_and_no_markup_of_the_data(told: Callable[..., Told]) -> None:
    text = page((run := told("data", "base", "train")).recipe, run.run)
    example = re.search(r'<pre class="tokens">(.*?)</pre>', text, re.DOTALL)
    assert example and example[1] == (
        '<span class="special">&lt;|im_start|&gt;</span>user\nWho &lt;b&gt;are&lt;/b&gt; you?'
        '<span class="special">&lt;|im_end|&gt;</span><mark class="learned">I am Mina &amp; co.</mark>'
        '<mark class="learned">&lt;|im_end|&gt;</mark>'
    )


def test_a_run_made_before_there_was_a_preview_tells_its_sources(told: Callable[..., Told]) -> None:
    run = told("data", "base", "train")
    run.run.path("tokens", "preview.json").unlink()
    text = made(run).text
    assert "OpenAI messages" in text and "as the model reads them" not in text


def test_key_facts_are_marked_where_they_stand(told: Callable[..., Told]) -> None:
    run = told("data", "base", "train")
    run.jsonl("answers.jsonl", [{"question": "Q?", "facts": ["A.B|C", "zwei"], "before": "axb", "after": "say a.b, c"}])
    text = page(run.recipe, run.run)
    assert re.findall(r"<mark>(.*?)</mark>", text)[1:] == ["a.b", "c"]
    assert "✗ A.B or C, zwei" in text and "✗ zwei" in text


def test_models_that_say_the_same_share_one_place(told: Callable[..., Told]) -> None:
    run = told()
    answers = dict.fromkeys(TYPES, "It is Mina.") | {"Q2_K": "Minna"}
    run.jsonl("compare-answers.jsonl", [{"question": "What is your name?", "answers": answers, "correct": {}}])
    assert "trained, F16, Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q3_K_M ✓" in made(run).text


def test_answers_of_files_that_were_replaced_are_not_shown(told: Callable[..., Told]) -> None:
    run = told()
    Path("mine.yaml").write_text(Path("mine.yaml").read_text() + "merge: {precision: bfloat16}\n")
    text = page(run.recipe, run.run)
    assert "It is <mark>Mina</mark>." in text and "says" not in re.findall(r"<dl>.*?</dl>", text, re.DOTALL)[0]


def test_a_question_in_which_the_models_differ_comes_first(told: Callable[..., Told]) -> None:
    run = told("data", "base", "train")
    same = [{"question": f"same {n}", "facts": ["x"], "before": "x", "after": "x"} for n in range(9)]
    run.jsonl("answers.jsonl", [*same, {"question": "other", "facts": ["y"], "before": "", "after": "y"}])
    shown = re.findall(r"<h3>(.*?)</h3>", page(run.recipe, run.run))
    assert (shown[0], len(shown)) == ("other", 10)


def test_every_measure_of_a_quantization_has_its_cell(told: Callable[..., Told]) -> None:
    text = page((run := told()).recipe, run.run).replace("\N{NO-BREAK SPACE}", " ")
    rows = re.findall(r'<th scope="row">Q2_K.*?</tr>', text, re.DOTALL)
    assert [re.sub(r"<.*?>", "", cell) for cell in re.findall(r"<td.*?</td>", rows[1])] == [
        "88 MB", "5.15", "180 of 272",
        "0.330", "0.0825", "2.97", "80.0%", "KL \N{MINUS SIGN}30%",
        "3.05 ± 0.11", "71.0%",
        "440", "126", "900 MB",
    ]  # fmt: skip
    assert re.search(r"Q5_K_M\s*<span class=\"tag chosen\">recommended", text)
    assert "180 \N{MULTIPLICATION SIGN} Q2_K → Q4_0" in text
    assert "<b>Q2_K</b>: 0.33 nats are more than 0.05" in text


def test_a_measure_that_nobody_took_has_no_column(told: Callable[..., Told]) -> None:
    rows = comparisons()
    for row in rows:
        row.measures.pop("peak_rss_bytes", None)
    assert (
        "peak memory" not in re.findall(r"<thead>.*?</thead>", page((run := told(rows=rows)).recipe, run.run), re.S)[1]
    )


def test_a_stale_link_of_the_lineage_says_why(told: Callable[..., Told]) -> None:
    run = told()
    Path("mine.yaml").write_text(Path("mine.yaml").read_text() + "merge: {precision: bfloat16}\n")
    text = made(run).text
    assert "✗ the recipe's merge has changed since 'merge'" in text
    assert ", of an older state of this run" in text


def test_each_chart_says_in_words_what_it_shows(told: Callable[..., Told]) -> None:
    text = page((run := told()).recipe, run.run)
    described = dict(re.findall(r'<desc id="(\w+)-text">(.*?)</desc>', text))
    assert described.keys() == {"size", "speed", "losses", "change"}
    assert "Q4_K_M: 105\N{NO-BREAK SPACE}MB, 0.0480 nats" in described["size"]
    assert "validation loss 4.16 at step 0, 1.14 at step 200, 0.840 at step 400" in described["losses"]


def test_what_changed_is_drawn_on_a_scale_of_a_hundred() -> None:
    chart = change_chart([Score.of(row) for row in SCORES])
    assert chart and {track.label: track.after for track in chart.tracks} == {
        "key facts": pytest.approx((93.0, 83.7, 102.3)),  # a share, and the fixture's ends
        "BLEU": pytest.approx((14.7, 13.23, 16.17)),  # points already
        "general knowledge": pytest.approx((55.0, 49.5, 60.5)),
    }


def test_the_losses_mark_the_best_step_and_where_training_stopped(told: Callable[..., Told]) -> None:
    receipt = told().run.receipt("train")
    receipt.metrics.update(
        loss_curve=[[step, 2.0] for step in range(1, 31)],
        validation_curve=[[10, 2.0], [20, 1.0], [30, 1.1]],
        best_step=20,
        ended="all epochs were done",
    )
    chart = loss_chart(receipt)
    assert chart and [(mark.label, mark.x, mark.y) for mark in chart.points] == [("best", 20, 1.0)]
    receipt.metrics["ended"] = "the validation loss fell no more"
    chart = loss_chart(receipt)
    assert chart and [(mark.label, mark.x) for mark in chart.points] == [("best", 20), ("stopped", 30)]
    assert chart.description.endswith("best at step 20; stopped at step 30: the validation loss fell no more.")


def test_an_interrupted_training_shows_where_it_went_on(told: Callable[..., Told]) -> None:
    run = told("data", "base", "train")
    receipt = run.run.receipt("train")
    receipt.metrics.update(ended="all epochs were done", interruptions=[{"step": 100, "why": "SIGTERM"}])
    run.run.write_receipt(receipt)
    chart = loss_chart(receipt)
    assert chart and chart.breaks == [100.0] and "interrupted at step 100: SIGTERM" in chart.description
    text = page(run.recipe, run.run)
    assert f'<line class="break" x1="{chart.x.at(100)}"' in text and "interrupted, went on" in text
    assert "had gone on after 1 interruption (step 100: SIGTERM)" in made(run).text


def test_the_plan_stands_beside_what_was_measured(told: Callable[..., Told]) -> None:
    text = page((run := told("data", "base", "train")).recipe, run.run)
    rows = re.findall(r"<tr>(.*?)</tr>", text.split("What the plan said before")[1].split("</table>")[0], re.DOTALL)
    assert [re.findall(r">([^<]+)</t[hd]>", row.replace("\N{NO-BREAK SPACE}", " ")) for row in rows[1:]] == [
        ["peak memory", "800 MB", "1.0 GB", "+25.0%"],
        ["tokens", "54,014", "54,014", "0%"],
        ["tokens a second", "200", "185", "\N{MINUS SIGN}7.7%"],
    ]


def test_the_share_of_the_devices_peak_is_told(told: Callable[..., Told]) -> None:
    assert "185 tokens a second, 12.4% of what the device could compute." in made(told()).text


def test_each_table_has_a_caption_and_scopes(told: Callable[..., Told]) -> None:
    text = page((run := told()).recipe, run.run)
    tables = re.findall(r"<table.*?</table>", text, re.DOTALL)
    assert len(tables) == 12
    assert all("<caption>" in table and not re.search(r"<th(?![^>]*scope)[ >]", table) for table in tables)


def test_writing_it_again_leaves_the_receipts_as_they_are(told: Callable[..., Told]) -> None:
    run = told()
    before = {path: path.read_bytes() for path in Run("mine").folder.glob("*.json")}
    report(run.recipe, run.run)
    first = run.run.path("report.html").read_bytes()
    report(run.recipe, run.run)
    assert run.run.path("report.html").read_bytes() == first
    assert before == {path: path.read_bytes() for path in Run("mine").folder.glob("*.json")}


def test_the_served_file_is_the_recipes_else_the_recommended_one(told: Callable[..., Told]) -> None:
    run = told()
    assert re.search(r"<dt>served file</dt><dd>112.MB<small>Q5_K_M</small>", page(run.recipe, run.run))
    Path("mine.yaml").write_text(Path("mine.yaml").read_text() + "serve: {type: Q4_K_M}\n")
    assert re.search(r"<dt>served file</dt><dd>105.MB<small>Q4_K_M</small>", page(run.recipe, run.run))


def test_the_lineage_goes_from_the_data_to_what_is_served(told: Callable[..., Told]) -> None:
    run = told()
    receipt = run.run.receipt("gguf")
    receipt.outputs["runs/mine/gguf/imatrix.gguf"] = {"sha256": "1" * 64, "bytes": 1}
    run.run.write_receipt(receipt)
    links = lineage(run.recipe, run.run)
    assert [link.name for link in links] == [
        "data", "split", "base", "trained", "reference", "merged", *TYPES, "importance matrix", "served Q8_0",
    ]  # fmt: skip
    served, quantized = links[-1], next(link for link in links if link.name == "Q8_0")
    assert served.digest == quantized.digest == receipt.outputs["runs/mine/gguf/mine-Q8_0.gguf"]["sha256"]


def test_the_command_tells_what_is_missing_and_writes_what_it_can(told: Callable[..., Told]) -> None:
    def ran() -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "report.report", "mine.yaml"]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})

    run = told("data", "base")
    assert (ran().returncode, run.run.path("README.md").exists()) == (1, False)
    assert ran().stderr == "error: runs/mine/train.json is missing: run 'make train RECIPE=mine.yaml' first\n"
    run.make("train")
    assert ran().stderr == "report: runs/mine/report.html\n"
    assert run.run.path("report.html").read_text().startswith("<!doctype html>")
    assert run.run.path("README.md").read_text().startswith("---\nlicense: apache-2.0\n")


def test_the_speed_of_the_endpoint_is_shown_as_long_as_it_serves_the_same(told: Callable[..., Told]) -> None:
    run = told(*EVERY, "serve")
    speed = {"served by llamacpp": METRICS["eval"]["speed"]["trained"] | {"bytes": 0}}
    found = {"inputs": run.run.receipt("serve").inputs, "speed": speed, "scores": []}
    run.run.path("served.json").write_text(json.dumps(found))
    assert "served by llamacpp: first token after 41 ms (40 to 52), then 31.5 tokens a second" in made(run).text
    run.run.path("served.json").write_text(json.dumps(found | {"inputs": {}}))
    assert "served by llamacpp" not in made(run).text


def test_an_artefact_is_told_in_a_sentence() -> None:
    def told(**measures: float) -> str:
        return in_words(Comparison("Q4_K_M", measures))

    assert told(probes=40, greedy_agreement=0.95, facts_loss=0.0) == (
        "Q4_K_M changes 1 answer in 20 (2 of 40); none of the key facts"
    )
    assert told(probes=40, greedy_agreement=1.0) == "Q4_K_M changes no answer (0 of 40)"
    assert told(probes=40, greedy_agreement=0.1, facts_loss=0.25) == (
        "Q4_K_M changes most answers (36 of 40), and loses 25% of the key facts"
    )
    assert told(greedy_agreement=0.5) == ""


def test_an_interval_is_as_wide_as_the_probes_differ() -> None:
    assert interval([[1.0, 1.0], [1.0]]) == (1.0, 1.0)
    low, high = interval([[0.0] * 8, [1.0] * 8] * 10)
    assert low == pytest.approx(0.28, abs=0.05) and high == pytest.approx(0.72, abs=0.05)


@pytest.mark.parametrize(
    "config, says",
    [
        ({}, ""),
        ({"sliding_window": None, "rope_parameters": {"rope_type": "default"}}, ""),
        ({"sliding_window": 4096, "use_sliding_window": False}, ""),
        ({"sliding_window": 4096}, "its config has a sliding window, which may be what is lost"),
        (
            {"text_config": {"mlp_bias": True, "rope_scaling": {"rope_type": "yarn"}}},
            "its config has biases of the layers between and a rope scaling (yarn), which may be what is lost",
        ),
    ],
)
def test_what_a_config_has_that_conversions_lose(config: dict[str, Any], says: str) -> None:
    assert suspects(config) == says


GONE, KEPT = "which the GGUF or llama.cpp does not carry", "which may be what is lost"
LAYERS = [*["sliding_attention"] * 5, "full_attention", "sliding_attention"]
GEMMA = {"model_type": "gemma3_text", "sliding_window": 64, "layer_types": LAYERS}
MIXTURE, WINDOW = {"model_type": "qwen3_moe"}, {"a.attention.sliding_window": 64}


@pytest.mark.parametrize(
    "config, values, tensors, has, lost",
    [
        ({"model_type": "mistral", "sliding_window": 64}, {}, [], "a sliding window", GONE),
        ({"model_type": "phi3", "sliding_window": 64}, WINDOW, [], "a sliding window", GONE),
        ({"model_type": "gemma2", "sliding_window": 64}, WINDOW, [], "a sliding window", KEPT),
        (GEMMA, WINDOW, [], "a sliding window", KEPT),
        (GEMMA | {"layer_types": LAYERS[1:]}, WINDOW, [], "windows on other layers than released models", GONE),
        (MIXTURE | {"norm_topk_prob": False}, {}, [], "weights of experts that are not normalized", GONE),
        ({"model_type": "olmoe", "norm_topk_prob": True}, {}, [], "weights of experts that are normalized", GONE),
        ({"rope_scaling": {"type": "linear"}}, {}, [], "a rope scaling (linear)", GONE),
        ({"rope_scaling": {"type": "linear"}}, {"a.rope.scaling.type": "linear"}, [], "a rope scaling (linear)", KEPT),
        ({"rope_parameters": {"rope_type": "llama3"}}, {}, ["rope_freqs.weight"], "a rope scaling (llama3)", KEPT),
        ({"rope_parameters": {"full_attention": {"type": "yarn"}}}, {}, [], "a rope scaling (yarn)", GONE),
        ({"attention_bias": True}, {}, ["blk.0.attn_q.weight"], "biases of attention", GONE),
        ({"attention_bias": True}, {}, ["blk.0.attn_qkv.bias"], "biases of attention", KEPT),
        ({"mlp_bias": True}, {}, ["blk.0.attn_q.bias"], "biases of the layers between", GONE),
    ],
)  # fmt: skip
def test_what_a_gguf_does_not_carry(
    config: dict[str, Any], values: dict[str, Any], tensors: list[str], has: str, lost: str
) -> None:
    assert suspects(config, Head(values, dict.fromkeys(tensors, ((), 0)))) == f"its config has {has}, {lost}"


def test_experts_that_llama_cpp_weighs_as_the_config_says_are_not_suspected() -> None:
    assert suspects(MIXTURE | {"norm_topk_prob": True}, Head({}, {})) == ""
