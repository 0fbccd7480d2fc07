"""Everything that one GGUF is asked, in a process of its own:  python -m convert.measure TASK

Started by `convert.compare` only. A crash of native code, as a damaged file may cause, ends this process alone, and its
peak memory is the file's.
"""

import json
import logging
import statistics
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

from convert.comparison import (
    UNREADABLE,
    Found,
    Task,
    asked_of,
    check_stops,
    check_template,
    compare_text,
    continued,
    measure,
    reason,
    shown_by,
)
from convert.evaluator import Evaluator, Header, greedy_answers, read_header
from convert.quantizer import file_type
from pipeline.files import write_whole
from pipeline.machine import resident_bytes
from pipeline.proof import Bounds, Comparison, compare_tokens
from pipeline.recipe import QUANTIZATIONS
from pipeline.reference import CONTINUATION_TOKENS, Reference, read_reference
from pipeline.scores import key_fact_accuracy

log = logging.getLogger("truetune")
LEAST_BITS = 0.75  # of what the type has in Llama 3 8B; a fallback takes more, a larger model a little less
PROMPT_TOKENS, DECODED_TOKENS, REPEATS = 128, 16, 3
CACHE_TOKENS = 2048  # room for PASS_SEQUENCES questions of usual length at once


def ask_file(task: Task) -> Found:
    """Type, template, token ids, speed, memory, logits, perplexity, key facts, and where it stops."""
    from tokenizers import Tokenizer

    start, path, found = time.monotonic(), Path(task.path), Found(Comparison(task.kind))
    comparison, reference = found.comparison, read_reference(Path(task.reference))
    tokenizer = Tokenizer.from_file(str(Path(task.tokenizer, "tokenizer.json")))
    show = shown_by(tokenizer)
    try:
        header = read_header(path)
        check_type(comparison, task.kind, header)
        check_template(comparison, header.chat_template or "")
        compare_text(comparison, "chat template", "file", header.chat_template or "", task.template)
        check_stops(comparison, reference, [header.eos_token_id])
        comparison.measures |= {
            "bytes": path.stat().st_size,
            "bits_per_weight": round(8 * header.tensor_bytes / header.parameters, 3),
            "tensors": header.tensors,
            "imatrix": header.imatrix,
        }
        # An answer of its own may be longer than the reference's.
        longest = max(len(ids) for ids, _ in asked_of(reference)) + CONTINUATION_TOKENS
        before, _ = resident_bytes()
        with Evaluator(path, longest, threads=task.threads, cache_tokens=CACHE_TOKENS) as evaluator:
            if task.only_divergence:
                measure(
                    comparison,
                    replace(reference, answers=[]),
                    evaluator.logits,
                    evaluator.ends,
                    Bounds(*task.bounds),
                    show,
                )
                return found
            comparison.measures |= speeds(evaluator, reference)
            comparison.measures["peak_rss_bytes"] = resident_bytes()[1] - before
            for probe in reference.probes:
                if not compare_tokens(comparison, probe, evaluator.tokens(probe.prompt), show):
                    break
            begun = measure(comparison, reference, evaluator.logits, evaluator.ends, Bounds(*task.bounds), show)

            def greedy(prompts: list[list[int]], most: int) -> list[list[int]]:
                return greedy_answers(evaluator, prompts, most, f"prove: {task.kind}")

            if begun:
                found.own = continued(begun, reference, evaluator.logits, greedy)
            if task.questions:
                prompts = [evaluator.tokens(question["prompt"]) for question in task.questions]
                made = greedy_answers(evaluator, prompts, task.answer_tokens, f"prove: {task.kind}")
                found.answers = [tokenizer.decode(ids).strip() for ids in made]
                score = key_fact_accuracy(found.answers, task.questions)
                comparison.measures |= {"facts_accuracy": round(score, 4), "facts_of": len(task.questions)}
    except UNREADABLE as error:
        comparison.problems.append(f"{path} cannot be used: {reason(error)}")
    comparison.measures["seconds"] = round(time.monotonic() - start, 2)
    return found


def speeds(evaluator: Evaluator, reference: Reference) -> dict[str, float]:
    """Tokens a second of one conversation, medians of a few repeats, and the bytes that a server's cache takes."""
    longest = max((ids for ids, _ in asked_of(reference)), key=len)
    # Beyond the positions that the model knows a table of them has no rows, and llama.cpp ends.
    room = min(evaluator.pass_tokens, evaluator.known_tokens) - DECODED_TOKENS
    ids = (longest * (1 + PROMPT_TOKENS // len(longest)))[: min(PROMPT_TOKENS, room)]
    prompt, decode = [], []
    for repeat in range(REPEATS + 1):  # the first one reads the file from the disk
        evaluator.forget()
        start = time.perf_counter()
        evaluator.decode((token, at, 0, at == len(ids) - 1) for at, token in enumerate(ids))
        middle = time.perf_counter()
        for at in range(DECODED_TOKENS):
            evaluator.decode([(ids[at], len(ids) + at, 0, True)])
        if repeat:
            prompt.append(len(ids) / (middle - start))
            decode.append(DECODED_TOKENS / (time.perf_counter() - middle))
    return {
        "prompt_tokens_per_second": round(statistics.median(prompt), 1),
        "decode_tokens_per_second": round(statistics.median(decode), 1),
        "cache_bytes_per_token": evaluator.cache_bytes() // (len(ids) + DECODED_TOKENS) // 2,  # served in 16 bits
    }


def check_type(comparison: Comparison, kind: str, header: Header) -> None:
    """Add a problem if the file says that it is of another type, or holds clearly fewer bits than its type has."""
    bits = 8 * header.tensor_bytes / header.parameters
    if header.file_type != file_type(kind):
        comparison.problems.append(f"type: llama.cpp's number {header.file_type}, that of {kind} is {file_type(kind)}")
    elif bits < LEAST_BITS * QUANTIZATIONS[kind]:
        comparison.problems.append(f"type: {bits:.2f} bits a weight, {kind} has {QUANTIZATIONS[kind]:g}")


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    given, made = map(Path, sys.argv[1:])
    write_whole(made, json.dumps(asdict(ask_file(Task(**json.loads(given.read_text(encoding="utf-8")))))))
