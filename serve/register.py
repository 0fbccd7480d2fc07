"""Register the model with Ollama and prove it there:  python -m serve.register RECIPE [--check]

With `--check` it only looks whether Ollama still holds the very model that was registered.
"""

import sys

from pipeline.command import boundary, recipe_of_arguments
from pipeline.run import Receipt, Run
from pipeline.stages import stage
from serve.engines.ollama.registration import check, ensure, register

__all__ = ["register"]  # what the stage does

SUMMARY = """
{name} ({type}) is registered with Ollama {version} at {url}

  model     {latest}, the same as {tag}
  template  {template}; equal to training's on {probes} probes
  answers   {agreement:.0%} of the greedy answers are the trained model's{stops}
  file      {modelfile}

Try it where Ollama is: ollama run {name}
"""


def show(name: str, receipt: Receipt, run: Run) -> None:
    """What was made, in a few lines."""
    found = receipt.metrics
    measures = found["measures"]
    text = SUMMARY.format(
        name=name,
        **{key: found[key] for key in ("type", "version", "url", "tag", "latest", "template")},
        probes=measures["probes"] + measures["too_long"],
        agreement=measures["greedy_agreement"],
        stops=", and it stops where it should" if measures["stops"] else "",
        modelfile=run.path("Modelfile"),
    )
    sys.stdout.write(text)


if __name__ == "__main__":
    with boundary():
        this, checks = stage("register"), "--check" in sys.argv
        sys.argv = [argument for argument in sys.argv if argument != "--check"]
        recipe = recipe_of_arguments(this.module, this.does)
        run = Run.of(recipe)
        if checks:
            check(run)
        else:
            run.receipt("gguf")
            with run.lock():
                show(recipe.name, ensure(recipe, run), run)
