"""Which of the types that were made is the one to serve, by a rule that is stated and measured."""

import math
from dataclasses import replace
from typing import Any

from pipeline.error import UserError
from pipeline.proof import Comparison
from pipeline.recipe import Recipe
from pipeline.run import Run


def recommend(recipe: Recipe, rows: list[Comparison], free_bytes: int) -> dict[str, Any]:
    """`recommended` (a type), `rule` (a sentence) and `reasons` (of each type, why it is or is not the one)."""
    knobs = recipe.gguf
    rule = (
        f"the smallest type whose mean divergence is at most {knobs.recommended_max_kl:g} nats, that loses at most "
        f"{knobs.recommended_loss:.0%} of the key facts beyond the standard error, and whose file and cache fit "
        f"{free_bytes / 1e9:.1f} GB of free memory"
    )
    files = {row.name: row for row in rows if row.name in knobs.written}
    against = {name: objections(recipe, row, free_bytes) for name, row in files.items()}
    by_size = sorted(files, key=lambda name: files[name].measures.get("bytes", math.inf))
    usable = [name for name in by_size if not files[name].problems and "divergence_mean" in files[name].measures]
    best = next((name for name in usable if not against[name]), None)
    reasons = {name: "; ".join(found) or f"larger than {best}" for name, found in against.items()}
    if best:
        reasons[best] = "the smallest within the bounds"
    elif usable:
        best = min(usable, key=lambda name: files[name].measures["divergence_mean"])
        reasons[best] += "; no type is within the bounds, and this one has the least divergence"
    return {"recommended": best, "rule": rule, "reasons": reasons}


def objections(recipe: Recipe, row: Comparison, free_bytes: int) -> list[str]:
    """Why a type is not to be served: faults, divergence, lost key facts, memory."""
    knobs, found, measures = recipe.gguf, [], row.measures
    if row.problems:
        found.append(f"failed: {row.problems[0]}")
    divergence = measures.get("divergence_mean")
    if divergence is not None and not divergence <= knobs.recommended_max_kl:
        found.append(f"divergence {divergence:.2g} > {knobs.recommended_max_kl:g}")
    lost, error = measures.get("facts_loss", 0.0), measures.get("facts_loss_error", 0.0)
    if not lost - error <= knobs.recommended_loss:
        found.append(f"loses {lost:.0%} ± {error:.0%} of the key facts, allowed {knobs.recommended_loss:.0%}")
    cache = measures.get("cache_bytes_per_token", 0) * recipe.serve.context * recipe.serve.slots
    needed = measures.get("bytes", 0) + cache
    if needed > free_bytes:
        found.append(f"needs {needed / 1e9:.1f} GB of memory, {free_bytes / 1e9:.1f} GB are free")
    return found


def loss(wanted: list[bool], found: list[bool]) -> tuple[float, float]:
    """(share of the key facts that are lost, less those that are won; its standard error), fact by fact."""
    changes = [int(before) - int(after) for before, after in zip(wanted, found, strict=True)]
    count = max(len(changes), 1)
    mean = sum(changes) / count
    spread = sum((change - mean) ** 2 for change in changes) / max(count - 1, 1)
    return round(mean, 4), round(math.sqrt(spread / count), 4)


def refuse_without_gguf(recipe: Recipe, loader: str) -> None:
    """Say what serves a model of which no GGUF is made, to who would load one.

    Raises:
        UserError: none is made.
    """
    if not recipe.gguf.types:
        raise UserError(
            f"gguf.types is empty, so {loader} has no GGUF to load: name a type, as SET='gguf.types=[Q8_0]', or let "
            "vLLM serve the merged weights, 'make serve ENGINE=vllm'"
        )


def chosen(recipe: Recipe, run: Run) -> Recipe:
    """The recipe with `serve.type` filled in by the recommendation, where it names none and the types were compared.

    Raises:
        UserError: nothing that was made can be served.
    """
    if recipe.serve.engine == "vllm":
        return recipe
    refuse_without_gguf(recipe, recipe.serve.engine)
    compare = run.find_receipt("compare")
    if recipe.serve.type or compare is None:
        return recipe
    kind = compare.metrics["recommended"]
    if kind is None:
        raise UserError(f"no GGUF of {run.folder} can be used: see 'make prove RECIPE={run.given}'")
    made = kind in recipe.gguf.written  # else the comparison is of types asked for before
    return replace(recipe, serve=replace(recipe.serve, type=kind)) if made else recipe
