"""`make data` and its tokens on many rows, beside `datasets`:  python -m bench.data [ROWS]

Generates conversations (several turns, many scripts, exact and near duplicates, broken encodings, empty turns), runs
the stage with its default steps and tokenizes what is left, each in a process of its own, and adds up the resident
memory of all processes of each five times a second. The peer does the least of it that it can, in the same run, with as
many processes, on the first rows: `load_dataset("json")`, Unicode composed by `map`, empty answers left out by
`filter`, then the template and the tokens by `map`; it finds no duplicates and labels nothing. Seconds of the
processors are told too, for a machine that is not idle. Everything is removed at the end. The last line is one JSON
document.
"""

import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import psutil

from pipeline import Run, load
from pipeline.command import boundary
from pipeline.machine import cores
from pipeline.rows import rendered

ROWS, PEER_ROWS = 100_000, 100_000
SECONDS_BETWEEN_LOOKS = 0.2
WORDS = """
the model a of data row and in time when answer stands question to is that for token every which line we you can will
time some water house light small number river with stone green early river north never again why größer Straße être
garçon niño mañana данные модель вопрос ответ 学习 模型 数据 答案 سؤال جواب προσέξτε שאלה 質問 🙂 🚀
""".split()  # noqa: SIM905


def main() -> None:
    rows = int(sys.argv[1]) if len(sys.argv) > 1 else ROWS
    folder = Path(tempfile.mkdtemp(prefix="bench-data-", dir="runs" if Path("runs").is_dir() else None))
    try:
        start = time.monotonic()
        file = folder / "talks.jsonl"
        generate(file, rows)
        print(f"{rows:,} rows, {file.stat().st_size / 1e9:.2f} GB, written in {time.monotonic() - start:.0f} s")
        name = folder.name
        recipe = folder / f"{name}.yaml"
        recipe.write_text(json.dumps({"base": "random", "data": {"train": str(file)}}))
        found: dict[str, Any] = {"rows": rows, "bytes": file.stat().st_size, "cores": cores()}
        found["data"] = measured("data", [sys.executable, "-m", "train.data", str(recipe)], rows)
        receipt = Run(name).receipt("data").metrics
        found["kept"], found["rejected"] = receipt["train"] + receipt["validation"], receipt["rejected"]
        measured("base", [sys.executable, "-m", "train.base", str(recipe)], rows)
        found["tokens"] = measured(
            "tokens", [sys.executable, "-m", "bench.data", "--tokens", str(recipe)], found["kept"]
        )
        first, few = folder / "first.jsonl", min(rows, PEER_ROWS)
        with file.open("rb") as every, first.open("wb") as some:
            some.writelines(islice(every, few))
        found["peer"] = measured(
            "peer", [sys.executable, "-m", "bench.data", "--peer", str(first), str(Run(name).path("base"))], few
        )
        for unit in ("seconds", "cpu_seconds"):
            ours = (found["data"][unit] + found["tokens"][unit]) / rows
            found[f"ratio_{unit}"] = round(found["peer"][unit] / few / ours, 2)
        print(
            f"the peer takes {found['ratio_seconds']} times as long a row ({found['ratio_cpu_seconds']} of processors)"
        )
        print(json.dumps(found))
    finally:
        shutil.rmtree(folder)
        shutil.rmtree(Run(folder.name).folder, ignore_errors=True)


def generate(file: Path, rows: int) -> None:
    """Conversations of the same mix whatever their number; one in twenty repeats one of the last thousand."""
    dice = random.Random(0)
    recent: list[dict[str, Any]] = []
    with file.open("w", encoding="utf-8") as out:
        for number in range(rows):
            kind = dice.random()
            if recent and kind < 0.03:
                row = dice.choice(recent)
            elif recent and kind < 0.05:
                row = nearly(dice, dice.choice(recent))
            else:
                row = talk(dice, number)
                recent.append(row)
            del recent[:-1000]
            out.write(json.dumps(row, ensure_ascii=False) + "\n")


def talk(dice: random.Random, number: int) -> dict[str, Any]:
    turns = [{"role": "system", "content": said(dice, 8)}] if dice.random() < 0.2 else []
    for _ in range(dice.choice((1, 1, 1, 2, 3))):
        turns += [{"role": "user", "content": f"{said(dice, 15)} {number}?"}]
        turns += [{"role": "assistant", "content": said(dice, dice.choice((10, 40, 120)))}]
    if dice.random() < 0.01:
        turns[-1]["content"] = turns[-1]["content"].encode().decode("cp1252", "ignore")
    if dice.random() < 0.005:
        turns[-1]["content"] = ""
    return {"messages": turns}


def nearly(dice: random.Random, row: dict[str, Any]) -> dict[str, Any]:
    """The row with one more word."""
    messages = [dict(message) for message in row["messages"]]
    messages[-1]["content"] += " " + dice.choice(WORDS)
    return {"messages": messages}


def said(dice: random.Random, words: int) -> str:
    return " ".join(dice.choices(WORDS, k=dice.randint(max(1, words // 2), words)))


def measured(name: str, command: list[str], rows: int) -> dict[str, float]:
    """Seconds, rows a second, and the most resident memory of the process and all below it, added up."""
    start, peak, before = time.monotonic(), 0, os.times()
    with subprocess.Popen(command, stdout=subprocess.DEVNULL) as process:
        try:
            while process.poll() is None:
                peak = max(peak, resident(psutil.Process(process.pid)))
                time.sleep(SECONDS_BETWEEN_LOOKS)
        finally:
            process.terminate()
    if process.returncode:
        raise SystemExit(f"{' '.join(command)} ended with {process.returncode}")
    seconds = time.monotonic() - start
    after = os.times()
    cpu = after.children_user + after.children_system - before.children_user - before.children_system
    print(
        f"{name:<7} {seconds:8.1f} s {cpu:8.1f} s of processors {rows / seconds:9,.0f} rows/s "
        f"{peak / 2**30:6.2f} GiB at most"
    )
    told = {"seconds": seconds, "cpu_seconds": cpu, "rows_per_second": rows / seconds}
    return {unit: round(value, 1) for unit, value in told.items()} | {"peak_bytes": peak}


def resident(process: psutil.Process) -> int:
    total = 0
    for one in (process, *_below(process)):
        try:
            total += one.memory_info().rss
        except psutil.NoSuchProcess:
            continue
    return total


def _below(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def tokens(recipe: str) -> None:
    from train.tokens import tokenized

    loaded = load(recipe)
    tokenized(loaded, Run(loaded.name))


def peer(file: str, base: str) -> None:
    """What a script with `datasets` does."""
    import unicodedata

    from datasets import load_dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)

    def composed(row: dict[str, Any]) -> dict[str, Any]:
        return {
            "messages": [m | {"content": unicodedata.normalize("NFC", m["content"])} for m in row["messages"]],
        }

    def answered(row: dict[str, Any]) -> bool:
        return all(message["content"].strip() for message in row["messages"])

    def ids(row: dict[str, Any]) -> dict[str, Any]:
        text = rendered(tokenizer, row["messages"])
        return {"input_ids": tokenizer(text, add_special_tokens=False)["input_ids"]}

    with tempfile.TemporaryDirectory(prefix="bench-data-", dir=Path(file).parent) as cache:
        rows = load_dataset("json", data_files=file, split="train", cache_dir=cache, num_proc=None)
        rows = rows.map(composed, num_proc=cores()).filter(answered, num_proc=cores())
        rows.map(ids, num_proc=cores(), remove_columns=["messages"])


if __name__ == "__main__":
    with boundary():
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # processes share the cores already
        if sys.argv[1:2] == ["--tokens"]:
            tokens(sys.argv[2])
        elif sys.argv[1:2] == ["--peer"]:
            peer(*sys.argv[2:])
        else:
            main()
