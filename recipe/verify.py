"""Recompute every hash from the receipts:  python -m recipe.verify RECIPE

Follows the line from the data to what is served, and names the first link that does not hold: a file that is not what
its stage wrote, or a stage that read something else than what stands there now.
"""

from pathlib import Path

from recipe.command import boundary, log, recipe_of_arguments
from recipe.error import UserError
from recipe.files import fingerprint
from recipe.run import Fingerprints, Run
from recipe.stages import STAGES


def verify(run: Run) -> list[tuple[str, int]]:
    """(stage, files checked) of every finished stage.

    Raises:
        UserError: names the first link that does not hold.
    """
    checked = []
    hashes: Fingerprints = {}  # each file is read once
    for stage in STAGES:
        receipt = run.find_receipt(stage.name)
        if receipt is None:
            continue
        mend = f"run 'make {stage.name} RECIPE={run.name}' again, or restore the file"
        upstream: Fingerprints = {}
        for before in stage.after:
            upstream |= run.receipt(before).outputs
        for path, known in receipt.inputs.items():
            if path in upstream and upstream[path] != known:
                raise UserError(f"{stage.name}: it was made from another {path} than the one that stands there: {mend}")
        files = receipt.inputs | receipt.outputs
        for path, known in files.items():
            if path not in hashes and Path(path).is_file():
                hashes[path] = fingerprint(Path(path))
            if path in receipt.outputs and path not in hashes:
                raise UserError(f"{stage.name}: {path} is gone: {mend}")
            if path in hashes and hashes[path] != known:
                what = (
                    "is not what the stage wrote" if path in receipt.outputs else "has changed since the stage read it"
                )
                raise UserError(f"{stage.name}: {path} {what}, its sha256 differs: {mend}")
        checked.append((stage.name, sum(path in hashes for path in files)))
    return checked


if __name__ == "__main__":
    with boundary():
        run = Run(recipe_of_arguments("recipe.verify", "Recompute every hash from the receipts").name)
        run.receipt("train")
        for name, files in verify(run):
            log.info("%s: %d files are what the receipt says", name, files)
