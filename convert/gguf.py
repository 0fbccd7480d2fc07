"""Convert to GGUF and quantize:  python -m convert.gguf RECIPE [--check]

llama.cpp's own converter writes the unquantized file, its own quantizer each of the recipe's types, weighed by how much
each weight matters on the training text. A type that was asked for is the type that is written, or the command fails;
tensors whose shape forces another type are counted. With `--check` the converter is tried on the base's settings alone.

The converter knows published tokenizers by a hash of their output, which no newly trained one can match. Here what
tokenizer.json declares is compared, character by character, with what llama.cpp's source names as its own
(src/llama-vocab.cpp, llm_tokenizer_bpe, "original regex from tokenizer.json"); it is never guessed.
"""

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from convert.evaluator import Header, read_header
from convert.quantizer import IMATRIX, Matrix, file_type, imatrix, quantize, training_tokens, write_imatrix
from pipeline import Made, Recipe, Run, UserError, command
from pipeline.command import boundary, recipe_of_arguments
from pipeline.files import fresh_folder, put_in_place, remove
from pipeline.gguf_head import read_head
from pipeline.recipe import WITHOUT_IMATRIX
from pipeline.stages import stage
from setup.install import CACHE, ROOT, find_converter

log = logging.getLogger("truetune")
F16_LARGEST = 65504.0
CONTEXT = ".context_length"
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


def gguf(recipe: Recipe, run: Run) -> Made:
    """Write `gguf/<recipe>-<TYPE>.gguf` for the full type and each quantization; nothing where the recipe names none.

    Raises:
        UserError: the model cannot be converted, or a file is not of the type asked for.
    """
    if not recipe.gguf.types:
        log.info("gguf: gguf.types is empty, so none is made: 'make serve ENGINE=vllm' serves the merged weights")
        remove(run.path("gguf"))
        return Made(outputs=[])
    check_range(recipe.gguf.full, run.receipt("merge").metrics["largest_weight"])
    folder = fresh_folder(run.path(".gguf.tmp"))
    full = folder / f"{run.name}-{recipe.gguf.full}.gguf"
    start = time.monotonic()
    log.info("gguf: %s", recipe.gguf.full)
    convert(run.path("merged"), full, recipe.gguf.full)
    metrics: dict[str, Any] = {recipe.gguf.full: report(full, recipe.gguf.full, {}, start)}
    matrix = weigh(recipe, run, full, folder)
    for kind in recipe.gguf.written[1:]:
        log.info("gguf: %s", kind)
        start = time.monotonic()
        quantized = folder / f"{run.name}-{kind}.gguf"
        fallbacks = dict(quantize(full, quantized, kind, None if kind in WITHOUT_IMATRIX else matrix).fallbacks)
        metrics[kind] = report(quantized, kind, fallbacks, start)
        tell_fallbacks(kind, metrics[kind])
    put_in_place(folder, run.path("gguf"))
    return Made(
        outputs=[run.path("gguf")], metrics=metrics, packages=("llama-cpp-python", "gguf", "torch", "transformers")
    )


def weigh(recipe: Recipe, run: Run, full: Path, folder: Path) -> Matrix | None:
    """The importance matrix on the training text, also written as a file; None if no type profits from one."""
    knobs = recipe.gguf
    if not knobs.imatrix_tokens or WITHOUT_IMATRIX.issuperset(knobs.types):
        return None
    log.info("gguf: importance matrix")
    longest = recipe.train.max_length
    matrix = imatrix(full, training_tokens(run.path("merged"), run.path("data"), knobs.imatrix_tokens, longest))
    write_imatrix(folder / IMATRIX, matrix)
    return matrix


def report(path: Path, kind: str, fallbacks: dict[str, int], start: float) -> dict[str, Any]:
    """What was written, from the file's own header.

    Raises:
        UserError: the header says another type.
    """
    header: Header = read_header(path)
    if header.file_type != file_type(kind):
        raise UserError(f"{path} is of llama.cpp's type {header.file_type}, asked for was {kind}: choose another type")
    return {
        "bytes": path.stat().st_size,
        "bits_per_weight": round(8 * header.tensor_bytes / header.parameters, 3),
        "tensors": header.tensors,
        "tensor_types": header.tensor_types,
        "fallback_tensors": sum(fallbacks.values()),
        "fallbacks": fallbacks,
        "imatrix": header.imatrix,
        "seconds": round(time.monotonic() - start, 2),
    }


def check_range(full: str, largest_weight: float) -> None:
    """Raise UserError if a weight would become infinite in F16."""
    if full == "F16" and not largest_weight <= F16_LARGEST:
        raise UserError(f"a weight of {largest_weight:g} does not fit F16 (up to {F16_LARGEST:g}): set gguf.full=BF16")


def tell_fallbacks(kind: str, made: dict[str, Any]) -> None:
    """Say which tensors are not of the type that its name promises."""
    if made["fallback_tensors"]:
        ways = ", ".join(f"{count} x {way}" for way, count in made["fallbacks"].items())
        log.warning(
            "gguf: %s: %d of %d tensors fell back, their rows being no multiple of the type's block: %s",
            *(kind, made["fallback_tensors"], made["tensors"], ways),
        )


def trial(recipe: Recipe, run: Run) -> None:
    """Convert the settings of the run's base, before minutes of training; nothing is kept.

    It is the converter itself, which writes all but the weights: an architecture, a tokenizer or a context that
    llama.cpp does not have is told now.

    Raises:
        UserError: llama.cpp cannot, or knows fewer tokens than `serve.context`.
    """
    if not recipe.gguf.types or find_converter() is None:
        return
    log.info("train: llama.cpp's converter is tried on the base's settings")
    with tempfile.TemporaryDirectory(dir=run.folder, prefix=".trial.") as folder:
        settings = Path(folder, "settings.gguf")
        try:
            convert(run.path("base"), settings, recipe.gguf.full, settings_only=True)
        except UserError as error:
            said = str(error).partition("): see ")[0]  # its log goes with the folder
            raise UserError(f"{said}{')' if '(' in said else ''}: use another base, or set gguf.types=[]") from None
        values = read_head(settings, until=CONTEXT).values
    known = next((value for key, value in values.items() if key.endswith(CONTEXT)), None)
    if known is not None and recipe.serve.engine != "vllm" and recipe.serve.context > known:
        raise UserError(
            f"serve.context: {recipe.serve.context} is more than the {known} tokens that llama.cpp knows of base "
            f"{recipe.base_model!r}: set serve.context={known}"
        )


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


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.argv.remove("--check")
        with boundary():
            recipe = recipe_of_arguments(stage("gguf").module, stage("gguf").does)
            trial(recipe, Run.of(recipe))
    else:
        command("gguf", gguf)
