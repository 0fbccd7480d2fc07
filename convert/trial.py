"""Try llama.cpp's converter on the base's settings, before minutes of training:  python -m convert.trial RECIPE

It is the converter itself, which writes all but the weights: an architecture, a tokenizer or a context that llama.cpp
does not have is told now. Nothing is kept.
"""

import logging
import tempfile
from pathlib import Path

from convert.llamacpp import convert
from pipeline import Recipe, Run, UserError
from pipeline.command import boundary, recipe_of_arguments
from pipeline.converter import find_converter
from pipeline.gguf_head import read_head

log = logging.getLogger("truetune")
CONTEXT = ".context_length"


def trial(recipe: Recipe, run: Run) -> None:
    """Convert the settings of the run's base.

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
    with boundary():
        recipe = recipe_of_arguments("convert.trial", "Try llama.cpp's converter on the base's settings")
        trial(recipe, Run.of(recipe))
