"""Check the recipe and tell Make what changed:  python -m pipeline.resolve RECIPE

Writes `runs/<recipe>/keys/<stage>.json` for each stage, only if the keys or files that the stage reads changed,
so that Make reruns just the stages that a change touches. `SET=` in the environment is kept for later commands.
"""

import json
from pathlib import Path

from pipeline.command import boundary, log, recipe_of_arguments
from pipeline.files import matching, write_whole
from pipeline.load import as_dict, environment_overrides, kept_overrides, load
from pipeline.recipe import Recipe
from pipeline.run import Run
from pipeline.stages import STAGES, value_at


def resolve(recipe: Recipe) -> None:
    """Write what each stage depends on, leaving files that need no change untouched."""
    everything, run = as_dict(recipe), Run.of(recipe)
    _write_if_changed(run.path("recipe"), f"{recipe.path}\n")
    for stage in STAGES:
        watched = {key: value_at(everything, key) for key in stage.keys}
        names = (
            (*recipe.data.train, recipe.data.heldout)
            if stage.name == "data"
            else (recipe.base_model, recipe.chat_template)
        )
        if not stage.after:
            watched["files"] = {str(file): _stamp(file) for name in names if name for file in matching(name)}
        _write_if_changed(run.path("keys", f"{stage.name}.json"), json.dumps(watched, indent=2) + "\n")


def keep_overrides(name: str, overrides: list[str]) -> None:
    """Make `SET=` stick to the run, so that `make serve` serves what `make train SET=...` trained."""
    _write_if_changed(Run(name).path("overrides"), "".join(f"{override}\n" for override in overrides))


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns]


def _write_if_changed(path: Path, text: str) -> None:
    if not path.is_file() or path.read_text(encoding="utf-8") != text:
        write_whole(path, text)


if __name__ == "__main__":
    import sys

    with boundary():
        given = environment_overrides()
        if given is None:
            recipe = recipe_of_arguments(
                "pipeline.resolve", "Check the recipe and tell Make what changed", complete=True
            )
            if kept := kept_overrides(recipe.name):
                log.info("%s: with SET=%r as before; 'SET=' drops it", recipe.name, " ".join(kept))
        else:
            recipe = load(sys.argv[1], given, complete=True)
            keep_overrides(recipe.name, given)
        resolve(recipe)
