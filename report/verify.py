"""Recompute every hash from the receipts:  python -m report.verify RECIPE

Follows the line from the data to what is served, and names the first link that does not hold: a file that is not what
its stage wrote, that no stage wrote, or that a stage read otherwise than it stands there now; a proof that is not the
one that was found; a server that still holds a file which has been replaced.
"""

import json
from pathlib import Path

from pipeline.command import boundary, log, recipe_of_arguments
from pipeline.error import UserError
from pipeline.files import files_below, fingerprint
from pipeline.run import Fingerprints, Receipt, Run
from pipeline.stages import STAGES


def verify(run: Run) -> list[tuple[str, int]]:
    """(stage, files checked) of every finished stage.

    Raises:
        UserError: names the first link that does not hold.
    """
    found = {stage: receipt for stage in STAGES if (receipt := run.find_receipt(stage.name))}
    written = {path for receipt in found.values() for path in receipt.outputs}
    checked = []
    hashes: Fingerprints = {}  # each file is read once
    for stage, receipt in found.items():
        fix = f"run 'make {stage.name} RECIPE={run.given}' again, or restore the file"
        upstream: Fingerprints = {}
        for before in stage.after:
            upstream |= run.receipt(before).outputs
        for path, known in receipt.inputs.items():
            if path in upstream and upstream[path] != known:
                raise UserError(f"{stage.name}: it was made from another {path} than the one that stands there: {fix}")
        if stage.name != "serve" and (unread := sorted(upstream.keys() - receipt.inputs.keys())):
            raise UserError(f"{stage.name}: it was made without {unread[0]}, which stands there now: {fix}")
        files = receipt.inputs | receipt.outputs
        for path, known in files.items():
            if path not in hashes and Path(path).is_file():
                hashes[path] = fingerprint(Path(path))
            if path in receipt.outputs and path not in hashes:
                raise UserError(f"{stage.name}: {path} is gone: {fix}")
            if path in hashes and hashes[path] != known:
                if path in receipt.outputs:  # Make believes the receipt and would not write it again
                    what, fix = "is not what the stage wrote", f"{run.remake(stage.name)}, or restore the file"
                else:
                    what = "has changed since the stage read it"
                raise UserError(f"{stage.name}: {path} {what}, its sha256 differs: {fix}")
        for folder in {Path(path).parent for path in receipt.outputs} - {run.folder}:
            for file in files_below(folder):
                if str(file) not in written:
                    raise UserError(f"{stage.name}: {file} was written by no stage: take it away, then verify again")
        if stage.name == "prove":
            check_proof(run, receipt)
        if stage.name == "serve":
            check_process(receipt)
        checked.append((stage.name, sum(path in hashes for path in files)))
    return checked


def check_proof(run: Run, receipt: Receipt) -> None:
    """Raise UserError if the verdict is not that of its comparisons, or those are not what 'compare' found."""
    comparisons = receipt.metrics["comparisons"]
    with run.path("compare.jsonl").open(encoding="utf-8") as file:
        compare = [json.loads(line) for line in file]
    passed = not any(row["problems"] for row in comparisons)
    if comparisons[: len(compare)] != compare or receipt.metrics["passed"] != passed:
        raise UserError(
            f"prove: {run.receipt_path('prove')} does not say what was compared: delete it and run "
            f"'make prove RECIPE={run.given}'"
        )


def check_process(receipt: Receipt) -> None:
    """Raise UserError if a server that is up holds in memory an older file than the one that stands there (Linux)."""
    import psutil

    try:
        server = psutil.Process(receipt.metrics["pid"])
        processes = [server, *server.children(recursive=True)]
        maps = "".join(Path(f"/proc/{process.pid}/maps").read_text(encoding="utf-8") for process in processes)
    except (psutil.Error, OSError):
        return
    for path in receipt.inputs:
        if not Path(path).is_file():
            continue
        standing, node = str(Path(path).resolve()), str(Path(path).stat().st_ino)
        for line in maps.splitlines():
            _, _, _, _, held, *rest = line.split(maxsplit=5)  # address, rights, offset, device, inode, path
            if "".join(rest).removesuffix(" (deleted)") == standing and held != node:
                raise UserError(
                    f"serve: process {server.pid} serves the {path} that stood there when it started, which has been "
                    "replaced: stop it and run 'make serve' again"
                )


if __name__ == "__main__":
    with boundary():
        run = Run.of(recipe_of_arguments("report.verify", "Recompute every hash from the receipts"))
        run.receipt("train")
        for name, files in verify(run):
            log.info("%s: %d files are what the receipt says", name, files)
