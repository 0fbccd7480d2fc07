"""llama.cpp's own converter of the pinned version, and the name by which it knows how a tokenizer splits text.

The converter knows published tokenizers by a hash of their output, which no newly trained one can match. Here what
tokenizer.json declares is compared, character by character, with what llama.cpp's source names as its own
(src/llama-vocab.cpp, llm_tokenizer_bpe, "original regex from tokenizer.json"); it is never guessed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from pipeline import UserError
from setup.install import CACHE, ROOT, find_converter

UNRECOGNIZED = "BPE pre-tokenizer was not recognized"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # what ByteLevel itself splits by
CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
LATER = r" ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
START = r"[^\r\n\p{L}\p{N}]?"
CASED = r"|\p{N}{digits}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES

# Patterns, and whether whole words of the vocabulary skip the merges (`ignore_merges`) -> llama.cpp's name.
NAMES: dict[tuple[tuple[str, ...], bool], str] = {
    ((GPT2,), False): "gpt-2",
    ((r"\p{N}", GPT2), False): "smollm",
    ((CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|" + LATER,), False): "qwen2",
    (
        (CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|" + SPACES,),
        False,
    ): "qwen35",
    ((CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + LATER,), True): "llama-bpe",
    ((CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|" + LATER,), False): "smaug-bpe",
    (
        (f"{START}{UPPER}*{LOWER}+|{START}{UPPER}+{LOWER}*" + CASED.replace("{digits}", ""),),
        True,
    ): "tekken",
    (
        (
            f"{START}{UPPER}*{LOWER}+{CONTRACTIONS}?|{START}{UPPER}+{LOWER}*{CONTRACTIONS}?"
            + CASED.replace("{digits}", "{1,3}"),
        ),
        False,
    ): "gpt-4o",
}


def convert(model: Path, output: Path, kind: str, settings_only: bool = False) -> None:
    """Convert a Hugging Face folder to a GGUF of type F16, BF16 or F32, or no more of it than its settings.

    Raises:
        UserError: the converter is not there, or refuses the model; its last words and its log are named.
    """
    if (script := find_converter()) is None:
        raise UserError(f"llama.cpp's converter is not in {ROOT / CACHE}: run 'make setup'")
    pre, unknown = _declared_pre_tokenizer(model)
    wrapped = [sys.executable, str(Path(__file__).with_name("converter.py")), str(script), pre]
    arguments = [*wrapped, str(model), "--outtype", kind.lower(), "--outfile", str(output)]
    arguments += ["--vocab-only"] if settings_only else []
    # The script finds its own gguf package beside it; a PYTHONPATH of ours would give it our packages.
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    logged = output.with_suffix(".log")
    with logged.open("w", encoding="utf-8") as file:
        process = subprocess.Popen(arguments, stdout=file, stderr=subprocess.STDOUT, env=environment)
        try:
            status = process.wait()
        except BaseException:
            process.kill()
            process.wait()
            raise
    if status != 0:
        words = [line for line in logged.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
        if unknown and words and UNRECOGNIZED in words[-1]:
            raise unknown
        raise UserError(f"llama.cpp cannot convert {model} ({words[-1] if words else f'exit {status}'}): see {logged}")
    logged.unlink()


def _declared_pre_tokenizer(model: Path) -> tuple[str, UserError | None]:
    """llama.cpp's name of it, or why there is none, which matters only where the converter knows none either."""
    if not (model / "tokenizer.json").is_file():
        return "", None
    try:
        return pre_tokenizer(model), None
    except UserError as error:
        return "", error


def pre_tokenizer(model: Path) -> str:
    """llama.cpp's name of the way in which the model folder's tokenizer splits text.

    Raises:
        UserError: llama.cpp has no such way, or the tokenizer does what llama.cpp cannot.
    """
    declared = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    steps = declared.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    patterns = tuple(pattern for step in steps for pattern in _patterns(step))
    ignores = bool(declared["model"].get("ignore_merges"))
    name = NAMES.get((patterns, ignores))
    if name is None:
        raise UserError(
            f"llama.cpp has no pre-tokenizer that splits by {list(patterns)} with ignore_merges={ignores}, "
            f"as {model / 'tokenizer.json'} does: train the tokenizer with a known one, such as GPT-2's ByteLevel"
        )
    return name


def _patterns(step: dict[str, Any]) -> list[str]:
    """The regular expressions by which one step splits; text that is in no table for what cannot be expressed."""
    kind = step.get("type")
    if kind == "ByteLevel" and not step.get("add_prefix_space"):
        return [GPT2] if step.get("use_regex", True) else []
    if kind == "Digits" and step.get("individual_digits"):
        return [r"\p{N}"]
    if kind == "Split" and step.get("behavior") == "Isolated" and not step.get("invert"):
        return [step["pattern"].get("Regex", "")]
    return [json.dumps(step)]
