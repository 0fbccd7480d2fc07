"""A folder of weights in transformers compared with the reference: template, token ids, logits, where it stops."""

import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from convert.comparison import (
    UNREADABLE,
    Found,
    Logits,
    check_stops,
    check_template,
    compare_text,
    continued,
    measure,
    reason,
    shown_by,
)
from convert.evaluator import Asked
from pipeline import UserError
from pipeline.model import ends_of, greedy, load, load_adapter, logits
from pipeline.proof import Bounds, Comparison, compare_tokens
from pipeline.reference import Reference
from pipeline.rows import rendered


def compare_weights(
    name: str, folder: Path, precision: str, bounds: Bounds, reference: Reference, base: Path | None = None
) -> Found:
    """The comparison, and what the weights answer to the probes by themselves, asked in `precision`.

    With a `base` the folder holds an adapter for it.
    """
    from safetensors import SafetensorError
    from transformers import AutoTokenizer

    start = time.monotonic()
    comparison = Comparison(name)
    found = Found(comparison)
    try:
        speaks = base if base and not (folder / "tokenizer_config.json").is_file() else folder
        tokenizer = AutoTokenizer.from_pretrained(speaks)
        model = load_adapter(folder, base, len(tokenizer), precision) if base else load(folder, precision)
        show = shown_by(tokenizer)
        check_template(comparison, tokenizer.chat_template or "")
        if len(tokenizer) > model.config.get_text_config().vocab_size:
            raise UserError(f"the tokenizer has {len(tokenizer)} tokens, the weights fewer")
        for probe in reference.probes:
            prompt = rendered(tokenizer, probe.messages, probe.tools, prompt=True)
            if not compare_text(comparison, "chat template", probe.name, prompt, probe.prompt):
                break
            if not compare_tokens(comparison, probe, tokenizer(prompt, add_special_tokens=False)["input_ids"], show):
                break
        stops = ends_of(model)
        check_stops(comparison, reference, stops)
        begun = measure(comparison, reference, logits_of(model), stops.__contains__, bounds, show)
        if begun:
            found.own = continued(
                begun, reference, logits_of(model), lambda prompts, most: greedy(model, tokenizer, prompts, most)
            )
    except (*UNREADABLE, SafetensorError) as error:
        comparison.problems.append(f"{folder} cannot be used: {reason(error)}")
    comparison.measures["seconds"] = round(time.monotonic() - start, 2)
    return found


def logits_of(model: Any) -> Logits:
    """The model's logits at the positions asked for."""

    def asked_for(asked: Iterable[Asked]) -> Iterator[Any]:
        for ids, positions in asked:
            found = logits(model, ids, positions[0])
            yield found[[position - positions[0] for position in positions]].numpy()

    return asked_for
