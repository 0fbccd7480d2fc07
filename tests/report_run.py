"""A run folder made of small receipts, as the stages write them."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline import Recipe, Run, load
from pipeline.files import fingerprint, write_whole
from pipeline.load import as_dict
from pipeline.proof import Comparison, write_comparisons
from pipeline.run import Receipt
from pipeline.scores import METHOD, Estimate, Score
from pipeline.stages import STAGES, stage

NAME = "mine"
RECIPE = """
base_model: smollm2-135m
data: {train: talks.jsonl}
gguf: {types: [Q8_0, Q6_K, Q5_K_M, Q4_K_M, Q3_K_M, Q2_K]}
"""
MACHINE = {"system": "Linux x86_64", "processor": "Test", "cores": 2, "memory_bytes": 16 * 10**9, "gpus": []}
# bytes, bits, KL mean, top-1, perplexity, facts, prompt and answer tokens a second: of a 135M model, rounded.
TYPES = {
    "F16": (271e6, 16.0, 2.1e-6, 1.0, 2.312, 0.93, 410.0, 61.0),
    "Q8_0": (145e6, 8.51, 0.0031, 0.98, 2.318, 0.93, 520.0, 98.0),
    "Q6_K": (138e6, 8.07, 0.0044, 0.98, 2.321, 0.93, 470.0, 97.0),
    "Q5_K_M": (112e6, 6.55, 0.021, 0.95, 2.39, 0.91, 450.0, 110.0),
    "Q4_K_M": (105e6, 6.17, 0.048, 0.93, 2.43, 0.9, 480.0, 116.0),
    "Q3_K_M": (94e6, 5.46, 0.19, 0.85, 2.71, 0.8, 430.0, 121.0),
    "Q2_K": (88e6, 5.15, 0.33, 0.8, 3.05, 0.71, 440.0, 126.0),
}
KEYS = ("bytes", "bits_per_weight", "divergence_mean", "top1_agreement", "perplexity", "facts_accuracy",
        "prompt_tokens_per_second", "decode_tokens_per_second")  # fmt: skip
QUESTIONS = [("What is your name?", ["Mina"], "Mina"), ("Which port?", ["8000|eight thousand"], "8000"),
             ("Who made you?", ["we", "us"], "we, all of us")]  # fmt: skip


def comparisons(**problems: str) -> list[Comparison]:
    """Of every artefact up to the served one; `problems` maps some to what is wrong with them."""
    rows = [Comparison("merge", {"divergence_mean": 1e-11, "top1_agreement": 1.0, "stops": True})]
    for kind, values in TYPES.items():
        measures: dict[str, Any] = dict(zip(KEYS, values, strict=True)) | {"perplexity_error": 0.11, "stops": True}
        measures |= {"divergence_p99": 9 * values[2], "divergence_median": values[2] / 4, "peak_rss_bytes": 9 * 10**8}
        rows.append(Comparison(kind, {**measures, "greedy_agreement": values[3] - 0.02, "tensors": 272}))
    rows[-1].measures |= {"imatrix": True, "divergence_mean_without_imatrix": 0.47, "fallbacks": {"Q2_K -> Q4_0": 180}}
    rows.append(Comparison("served Q8_0", {"greedy_agreement": 0.96, "stops": True}))
    for row in rows:
        row.problems += [problems[row.name]] if row.name in problems else []
    return rows


CHANGES = {  # base, trained; the verdicts of all three kinds
    ("validation answers", "perplexity", "number"): (63.1, 2.33, "better"),
    ("held-out questions", "key facts", "share"): (0.017, 0.93, "better"),
    ("held-out questions", "BLEU", "points"): (0.4, 14.7, "better"),
    ("general knowledge", "accuracy", "share"): (0.68, 0.55, "worse"),
    ("sst2.tsv", "Matthews' correlation", "number"): (-0.02, 0.01, "no difference shown"),
}
SCORES = [
    asdict(
        Score(group, name, unit, 50, *(Estimate(value, 0.9 * value, 1.1 * value) for value in values), verdict, "how")
    )
    for (group, name, unit), (base, trained, verdict) in CHANGES.items()
    for values in [(base, trained, trained - base)]
]
METRICS: dict[str, dict[str, Any]] = {
    "data": {
        "train": 378, "validation": 42, "heldout": 3, "read": 1656,
        "changed": {"unicode": 3}, "rejected": {"too_short": 2, "near_duplicates": 1234},
        "sources": [{"source": "talks.jsonl", "format": "OpenAI messages", "rows": 423, "rejected": {"no answer": 1}}],
    },
    "base": {"parameters": 134515008, "license": "apache-2.0", "languages": ["en"],
             "model": "HuggingFaceTB/SmolLM2-135M-Instruct"},
    "train": {
        "before": {"validation_loss": 4.16, "key_fact_accuracy": 0.017},
        "after": {"validation_loss": 0.84, "key_fact_accuracy": 0.93},
        "steps": 400, "tokens": 54014, "supervised_tokens": 21616, "tokens_per_second": 184.7,
        "mfu": 0.124, "precision": "float32", "trainable_parameters": 4884480,
        "loss_curve": [[step, 0.6 + 4 / (1 + step / 30) + 0.3 * (step % 7 - 3) / 3] for step in range(1, 401)],
        "validation_curve": [[200, 1.14], [400, 0.84], [400, 0.84]],
        "planned": {"memory_bytes": 8 * 10**8, "tokens": 54014, "tokens_per_second": 200.0},
    },
    "eval": {"scores": SCORES, "method": METHOD, "precision": "bfloat16", "speed": {"trained": {
        "first_token_seconds": {"value": 0.041, "low": 0.04, "high": 0.052},
        "tokens_per_second": {"value": 31.5, "low": 29.0, "high": 33.0}, "bytes": 1.4e9}}},
    "gguf": {kind: {"bytes": int(values[0]), "bits_per_weight": values[1], "tensors": 272, "fallbacks": {}}
             for kind, values in TYPES.items()},
    "compare": {"recommended": "Q5_K_M", "rule": "the smallest type that loses at most 0.05 nats",
               "reasons": {"Q2_K": "0.33 nats are more than 0.05"}},
}  # fmt: skip


PREVIEW = {
    "parts": {
        "train": {"rows": 378, "tokens": 27007, "supervised_tokens": 10808, "cut": 2, "dropped": 1, "unshown": 0},
        "validation": {"rows": 42, "tokens": 3095, "supervised_tokens": 1227, "cut": 0, "dropped": 0, "unshown": 0},
    },
    "lengths": [[64, 127], [128, 233], [256, 18]],
    "packing": {"rows": 94, "row_tokens": 301, "fill": 0.954},
    "example": {
        "source": "talks.jsonl:1", "tokens": 14,
        "pieces": [
            {"text": "<|im_start|>", "learned": False, "special": True},
            {"text": "user\nWho <b>are</b> you?", "learned": False, "special": False},
            {"text": "<|im_end|>", "learned": False, "special": True},
            {"text": "I am Mina & co.", "learned": True, "special": False},
            {"text": "<|im_end|>", "learned": True, "special": True},
        ],
    },
}  # fmt: skip


class Told:
    """The run folder; stages are 'run' by writing what they would leave behind."""

    def __init__(self) -> None:
        self.run = Run(NAME)

    @property
    def recipe(self) -> Recipe:
        return load(f"{NAME}.yaml", [])

    def make(self, *stages: str, rows: list[Comparison] | None = None) -> "Told":
        """Write the receipts of these stages, with inputs that are what the stages before them wrote."""
        found = comparisons() if rows is None else rows
        for name in stages:
            this, metrics, outputs = stage(name), dict(METRICS.get(name, {})), self._outputs(name, found)
            if name == "prove":
                metrics = {"passed": not any(row.problems for row in found), "notes": []}
                metrics["comparisons"] = [vars(row) for row in found]
            inputs = {p: m for before in this.after for p, m in self.run.receipt(before).outputs.items()}
            if name == "data":
                inputs = {"talks.jsonl": fingerprint(Path("talks.jsonl"))}
            marks = {str(path): fingerprint(path) for path in outputs}
            keys = json.loads(json.dumps(as_dict(self.recipe)))
            versions, at = {"python": "3.11.7"}, "2026-01-02T03:04:05+00:00"
            self.run.write_receipt(Receipt(name, keys, inputs, marks, versions, metrics, at, 61.5, 10**9, MACHINE))
        return self

    def _outputs(self, name: str, rows: list[Comparison]) -> list[Path]:
        """The stage's files, each holding a few bytes that say whose they are."""
        if name == "compare":
            write_comparisons(self.run.path("compare.jsonl"), [row for row in rows if "served" not in row.name])
            self.jsonl("compare-answers.jsonl", [
                {"question": question, "answers": {kind: f"{kind[:2]} says {right}" for kind in TYPES}, "correct": {}}
                for question, _, right in QUESTIONS
            ])  # fmt: skip
            return [self.run.path("compare.jsonl")]
        if name == "train":
            write_whole(self.run.path("tokens", "preview.json"), json.dumps(PREVIEW))
            self.jsonl("answers.jsonl", [
                {"question": question, "facts": facts, "before": "I am a model.", "after": f"It is {right}."}
                for question, facts, right in QUESTIONS
            ])  # fmt: skip
        made = [f"gguf/{NAME}-{kind}.gguf" for kind in TYPES] if name == "gguf" else [f"{name}/weights"]
        for path in map(self.run.path, made if name != "prove" else []):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(f"what {name} made: {path.name}")
        return [self.run.path(path) for path in made] if name != "prove" else []

    def jsonl(self, name: str, rows: list[dict[str, Any]]) -> None:
        self.run.path(name).write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


EVERY = tuple(stage.name for stage in STAGES if stage.name not in ("register", "serve"))
