"""Convert to GGUF and quantize:  python -m convert.gguf RECIPE [--check]

llama.cpp's own converter writes the unquantized file, its own quantizer each of the recipe's types, weighed by how much
each weight matters on the training text. A type that was asked for is the type that is written, or the command fails;
tensors whose shape forces another type are counted. With `--check` the converter is tried on the base's settings alone.
"""

import logging
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from convert.evaluator import Header, read_header
from convert.llamacpp import convert
from convert.quantizer import IMATRIX, Matrix, file_type, imatrix, quantize, training_tokens, write_imatrix
from pipeline import Made, Recipe, Run, UserError, command
from pipeline.command import boundary, recipe_of_arguments
from pipeline.files import fresh_folder, put_in_place, remove
from pipeline.gguf_head import read_head
from pipeline.recipe import WITHOUT_IMATRIX
from pipeline.stages import stage
from setup.install import find_converter

log = logging.getLogger("truetune")
F16_LARGEST = 65504.0
CONTEXT = ".context_length"


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


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.argv.remove("--check")
        with boundary():
            recipe = recipe_of_arguments(stage("gguf").module, stage("gguf").does)
            trial(recipe, Run.of(recipe))
    else:
        command("gguf", gguf)
