"""The shape of every stage's command: arguments, recipe, work, receipt; and the one place that prints `error:`."""

import errno
import importlib.metadata
import io
import logging
import os
import platform
import resource
import signal
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pipeline.error import Stopped, UserError
from pipeline.files import files_below, fingerprint
from pipeline.load import as_dict, load
from pipeline.machine import machine, resident_bytes
from pipeline.progress import AboveBars
from pipeline.recipe import Recipe
from pipeline.run import Fingerprints, Receipt, Run
from pipeline.stages import Stage, stage

USAGE = """usage: python -m {module} RECIPE [key=value ...]

{does}.

RECIPE is a shipped recipe's name or the path of a YAML file; key=value overrides one of its keys.
"""

PROBLEMS_SHOWN, PROBLEM_CHARACTERS = 20, 2000
# What libraries would tell their makers. Every process that a command starts inherits it; a user's own setting wins.
SILENT = {
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, transformers, and TRL: a ping from each trainer
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets, evaluate
    "GRADIO_ANALYTICS_ENABLED": "False",
    "WANDB_ERROR_REPORTING": "false",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "VLLM_NO_USAGE_STATS": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "ANONYMIZED_TELEMETRY": "false",  # chroma, below Open WebUI
    "SCARF_NO_ANALYTICS": "true",  # unstructured, below Open WebUI
    "DO_NOT_TRACK": "1",  # who else heeds donottrack.sh
    "TRL_EXPERIMENTAL_SILENCE": "1",  # that ORPO's trainer may change: a test of ours watches it
}
FULL = (errno.ENOSPC, errno.EDQUOT)
FORBIDDEN = (errno.EROFS, errno.EACCES)

log = logging.getLogger("truetune")


@dataclass(frozen=True)
class Made:
    """What a stage hands over for its receipt: `outputs` are files or folders, `inputs` what came from outside."""

    outputs: list[Path]
    metrics: dict[str, Any] = field(default_factory=dict)
    inputs: Fingerprints = field(default_factory=dict)
    packages: tuple[str, ...] = ()


def command(name: str, make: Callable[[Recipe, Run], Made]) -> None:
    """Run the stage unless its receipt shows that nothing changed; exits 1 with one line on a user's error."""
    with boundary():
        this = stage(name)
        up_to_date(this, recipe_of_arguments(this.module, this.does), make)


def up_to_date(this: Stage, recipe: Recipe, make: Callable[[Recipe, Run], Made]) -> Receipt:
    """The stage's receipt, made now unless the one that is there still holds."""
    run = Run.of(recipe)
    with run.lock():
        return up_to_date_within(run, this, recipe, make)


def up_to_date_within(run: Run, this: Stage, recipe: Recipe, make: Callable[[Recipe, Run], Made]) -> Receipt:
    """The same for who holds the run folder's lock."""
    if not run.state(this.name, recipe, by_content=True).changed:
        log.info("%s: up to date", this.name)
        run.receipt_path(this.name).touch()
        return run.receipt(this.name)
    return _run_stage(this, recipe, run, make)


def _run_stage(this: Stage, recipe: Recipe, run: Run, make: Callable[[Recipe, Run], Made]) -> Receipt:
    inputs: Fingerprints = {}
    for before in this.after:
        inputs |= run.verified(before)
    log.info("%s: %s", this.name, this.does)
    started_at, start = datetime.now(UTC), time.monotonic()
    made = make(recipe, run)
    receipt = Receipt(
        stage=this.name,
        recipe=_plain(as_dict(recipe)),
        inputs=inputs | made.inputs,
        outputs={str(file): fingerprint(file) for output in made.outputs for file in files_below(output)},
        versions=versions(made.packages),
        metrics=made.metrics,
        started_at=started_at.isoformat(timespec="seconds"),
        seconds=round(time.monotonic() - start, 3),
        peak_rss_bytes=peak_rss_bytes(),
        machine=machine(),
    )
    run.write_receipt(receipt)
    log.info("%s: done in %.0f s, receipt %s", this.name, receipt.seconds, run.receipt_path(this.name))
    return receipt


def recipe_of_arguments(module: str, does: str, complete: bool = False) -> Recipe:
    """The recipe that the command line names (`load`); `--help` prints the usage and exits."""
    arguments = sys.argv[1:]
    usage = USAGE.format(module=module, does=does)
    if "-h" in arguments or "--help" in arguments:
        print(usage, end="")
        sys.exit(0)
    if not arguments or "=" in arguments[0] or arguments[0].startswith("-"):
        raise UserError(f"no recipe given: {usage.splitlines()[0]}")
    return load(arguments[0], arguments[1:] or None, complete)


@contextmanager
def boundary() -> Iterator[None]:
    """Print a UserError as `error:` lines and exit 1; a bug keeps its traceback. SIGTERM unwinds like Ctrl-C."""
    for name, value in SILENT.items():
        os.environ.setdefault(name, value)
    for bars in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
        os.environ.setdefault(bars, "1")  # the libraries' bars; the stages show their own
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[AboveBars()])
    for chatty in ("httpx", "httpx2", "huggingface_hub", "absl", "filelock", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    if isinstance(sys.stdout, io.TextIOWrapper):  # a terminal that is not Unicode's shows the codes of what it lacks
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        for problem in error.problems[:PROBLEMS_SHOWN]:
            print(f"error: {_one_line(problem)}", file=sys.stderr)
        if left := len(error.problems[PROBLEMS_SHOWN:]):
            print(f"error: and {left:,} more of the kind", file=sys.stderr)
        sys.exit(1)
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        sys.exit(stopped.code)
    except KeyboardInterrupt:
        print("stopped: the same command resumes from here", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except MemoryError:
        print("error: out of memory: lower train.max_length or choose a smaller base, then run again", file=sys.stderr)
        sys.exit(1)
    except Exception as error:
        if isinstance(error, OSError) and error.errno in FORBIDDEN:
            print(f"error: {error.filename}: {error.strerror}: let this user read and write there", file=sys.stderr)
            sys.exit(1)
        # safetensors tells a full disk by an exception of its own, with the system's words in it.
        if getattr(error, "errno", None) not in FULL and not any(os.strerror(code) in str(error) for code in FULL):
            raise
        place = getattr(error, "filename", None) or os.getcwd()
        print(f"error: the disk is full ({place}): free some space and run again", file=sys.stderr)
        sys.exit(1)


def _one_line(problem: str) -> str:
    """What may come from outside, such as a key or a library's words, cut in its middle."""
    text = " ".join(problem.split("\n"))
    half = PROBLEM_CHARACTERS // 2
    return text if len(text) <= PROBLEM_CHARACTERS else f"{text[:half]} ... {text[-half:]}"


def versions(packages: tuple[str, ...]) -> dict[str, str]:
    """Versions of Python and of the packages that did the work."""
    return {"python": platform.python_version()} | {name: importlib.metadata.version(name) for name in packages}


def peak_rss_bytes() -> int:
    """Largest resident memory of this process or of any child of it, in bytes."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return max(resident_bytes()[1], children)


def _plain(value: Any) -> Any:
    """JSON's view of a value, so that a fresh recipe compares equal with one read from a receipt."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else value
