"""The run folder: receipts that are whole and last, inputs that are proved, one writer, and reruns of what changed."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline import Made, Recipe, Run, UserError, command, load
from pipeline.files import fingerprint, put_in_place, write_whole
from pipeline.resolve import resolve
from pipeline.run import Receipt
from pipeline.stages import STAGES

REPOSITORY = Path(__file__).parents[2]
RUN = Run("mine")


@pytest.fixture(autouse=True)
def _apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("talks.jsonl").write_text("{}\n")
    Path("mine.yaml").write_text("data: {train: talks.jsonl}\n")
    monkeypatch.setattr(sys, "argv", ["stage", "mine.yaml"])


@pytest.fixture(autouse=True)
def _sigterm():
    """The boundary sets a handler; the tests' own process keeps its."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def data(recipe: Recipe, run: Run) -> Made:
    """A stage that writes one file and reads one from outside."""
    write_whole(run.path("data", "train.jsonl"), "made\n")
    return Made([run.path("data")], {"rows": 1}, {"talks.jsonl": fingerprint(Path("talks.jsonl"))}, ("pyyaml",))


def base(recipe: Recipe, run: Run) -> Made:
    write_whole(run.path("base", "config.json"), "{}")
    return Made([run.path("base")])


def train(recipe: Recipe, run: Run) -> Made:
    write_whole(run.path("adapter", "weights"), "1")
    return Made([run.path("adapter")])


def stop(recipe: Recipe, run: Run) -> Made:
    raise AssertionError("the stage must not run")


def fail(recipe: Recipe, run: Run) -> Made:
    data(recipe, run)
    raise UserError("no luck: try again")


def is_current(**changed: Any) -> bool:
    """Whether `data` needs no run, for a recipe with changed keys."""
    return RUN.state("data", replace(load("mine.yaml"), **changed), by_content=True).changed is None


def train_is_current() -> bool:
    return RUN.state("train", load("mine.yaml"), by_content=True).changed is None


def make_all() -> None:
    command("data", data)
    command("base", base)
    command("train", train)


def test_a_receipt_has_these_keys_in_this_order() -> None:
    command("data", data)
    receipt = json.loads(RUN.receipt_path("data").read_text())
    keys = "stage recipe inputs outputs versions metrics started_at seconds peak_rss_bytes machine"
    assert list(receipt) == keys.split()


def test_a_receipt_tells_what_was_read_made_and_measured() -> None:
    command("data", data)
    receipt = json.loads(RUN.receipt_path("data").read_text())
    assert receipt["inputs"] == {"talks.jsonl": fingerprint(Path("talks.jsonl"))}
    assert receipt["outputs"] == {"runs/mine/data/train.jsonl": fingerprint(Path("runs/mine/data/train.jsonl"))}
    assert receipt["recipe"] == json.loads(json.dumps(load("mine.yaml"), default=vars))
    assert (receipt["stage"], receipt["metrics"]) == ("data", {"rows": 1})
    assert set(receipt["versions"]) == {"python", "pyyaml"}
    assert receipt["started_at"].endswith("+00:00")
    assert receipt["peak_rss_bytes"] > 1_000_000


def test_the_outputs_of_the_stages_before_are_inputs() -> None:
    make_all()
    before = RUN.receipt("data").outputs | RUN.receipt("base").outputs
    assert RUN.receipt("train").inputs == before


def test_a_fingerprint_is_the_sha256() -> None:
    Path("x").write_bytes(b"abc")
    assert fingerprint(Path("x")) == {
        "sha256": "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad",
        "bytes": 3,
    }


def test_a_stage_that_fails_leaves_no_receipt() -> None:
    with pytest.raises(SystemExit):
        command("data", fail)
    assert RUN.path("data", "train.jsonl").exists()
    assert not RUN.receipt_path("data").exists()


def test_a_stage_that_fails_keeps_the_receipt_of_its_last_success() -> None:
    command("data", data)
    before = RUN.receipt_path("data").read_bytes()
    Path("talks.jsonl").write_text("[]\n")
    with pytest.raises(SystemExit):
        command("data", fail)
    assert RUN.receipt_path("data").read_bytes() == before


@pytest.mark.parametrize("moment", ["os.fsync", "pathlib.Path.replace"])
def test_a_write_that_is_killed_leaves_the_old_file(moment: str) -> None:
    Path("file").write_text("old")
    module, _, name = moment.rpartition(".")
    code = (
        "import os, pathlib, signal; from pipeline.files import write_whole\n"
        f"{module}.{name} = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_whole(pathlib.Path('file'), 'new')"
    )
    done = subprocess.run([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(REPOSITORY)})
    assert (done.returncode, Path("file").read_text()) == (-signal.SIGKILL, "old")


def test_a_write_that_fails_leaves_the_old_file_and_no_other() -> None:
    Path("file").write_text("old")
    before = sorted(Path().iterdir())
    with pytest.raises(UnicodeEncodeError):
        write_whole(Path("file"), "new \ud800")
    assert (Path("file").read_text(), sorted(Path().iterdir())) == ("old", before)


def test_a_folder_is_replaced_whole() -> None:
    for name in ("old", "new"):
        Path(name).mkdir()
        Path(name, name).write_text(name)
    put_in_place(Path("new"), Path("old"))
    assert [str(path) for path in Path("old").iterdir()] == ["old/new"]
    assert not Path("new").exists() and not Path(".old.old").exists()


@pytest.mark.parametrize("name", [stage.name for stage in STAGES])
def test_a_missing_receipt_names_the_make_target(name: str) -> None:
    with pytest.raises(UserError) as raised:
        RUN.receipt(name)
    assert str(raised.value) == f"runs/mine/{name}.json is missing: run 'make {name} RECIPE=mine' first"


def test_a_stage_does_not_start_without_the_one_before(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command("train", stop)
    assert capsys.readouterr().err == "error: runs/mine/data.json is missing: run 'make data RECIPE=mine.yaml' first\n"


TAMPERED = {
    "gone": (lambda path: path.unlink(), "{}, which 'data' wrote, is gone"),
    "longer": (lambda path: path.write_text("made\nmore\n"), "{} is not what 'data' wrote, its sha256 differs"),
    "as long": (lambda path: path.write_text("fake\n"), "{} is not what 'data' wrote, its sha256 differs"),
}


@pytest.mark.parametrize("how", TAMPERED)
def test_an_input_that_is_not_what_was_written_stops(how: str, capsys: pytest.CaptureFixture[str]) -> None:
    command("data", data)
    command("base", base)
    change, said = TAMPERED[how]
    path = RUN.path("data", "train.jsonl")
    change(path)
    with pytest.raises(SystemExit) as raised:
        command("train", stop)
    fix = "delete runs/mine/data.json and run 'make data RECIPE=mine.yaml'"
    assert (raised.value.code, capsys.readouterr().err) == (1, f"error: {said.format(path)}: {fix}\n")


def test_only_the_outputs_asked_for_are_proved() -> None:
    command("data", data)
    RUN.path("data", "train.jsonl").write_text("fake\n")
    assert RUN.verified("data", only="heldout") == {}


DAMAGED = {
    "half": '{"stage": "data", "recipe": {',
    "empty": "",
    "of another shape": '{"stage": "data"}',
    "no object": "[1]",
    "with a key too many": json.dumps(dict.fromkeys([*Receipt.__dataclass_fields__, "more"])),
}


@pytest.mark.parametrize("how", DAMAGED)
def test_a_damaged_receipt_is_told(how: str) -> None:
    write_whole(RUN.receipt_path("data"), DAMAGED[how])
    with pytest.raises(UserError) as raised:
        RUN.receipt("data")
    assert str(raised.value).startswith("runs/mine/data.json is damaged (")
    assert str(raised.value).endswith("): delete it and run 'make data RECIPE=mine'")
    assert len(raised.value.problems) == 1


def test_a_second_writer_is_refused_and_the_first_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    with RUN.lock(), pytest.raises(SystemExit) as raised:
        command("data", stop)
    assert raised.value.code == 1
    assert capsys.readouterr().err == "error: runs/mine is in use by another make: wait for it or stop it\n"
    command("data", data)


def test_the_lock_of_a_killed_writer_is_free() -> None:
    code = "import time; from pipeline import Run\nwith Run('mine').lock(): print('held', flush=True); time.sleep(60)"
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY)}
    with subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError), RUN.lock():
            pass
        holder.kill()
    command("data", data)


def test_a_stage_whose_receipt_is_current_does_not_run_and_is_touched() -> None:
    command("data", data)
    receipt = RUN.receipt_path("data")
    content = receipt.read_bytes()
    os.utime(receipt, (0, 0))
    command("data", stop)
    assert receipt.read_bytes() == content
    assert receipt.stat().st_mtime > time.time() - 60


def test_nothing_changed_is_current() -> None:
    make_all()
    assert is_current() and train_is_current()


def test_a_changed_key_is_not_current() -> None:
    command("data", data)
    assert not is_current(seed=1)


def test_a_changed_file_from_outside_is_not_current() -> None:
    command("data", data)
    Path("talks.jsonl").write_text("[]\n")
    assert not is_current()


def test_a_touched_file_from_outside_is_current() -> None:
    command("data", data)
    os.utime("talks.jsonl", (0, 0))
    assert is_current()


def test_a_file_from_outside_that_is_gone_is_not_current() -> None:
    command("data", data)
    Path("talks.jsonl").unlink()
    assert not is_current()


@pytest.mark.parametrize("name", ["smollm2-135m", "owner/name@0123abc/model.safetensors"])
def test_the_id_of_a_model_is_no_file_that_could_be_gone(name: str) -> None:
    mark: dict[str, str | int] = {"sha256": "0" * 64, "bytes": 1}
    RUN.write_receipt(Receipt("data", {}, {name: mark}, {}, {}, {}, "", 0.0, 0))
    assert RUN.state("data", by_content=True).changed is None


def test_an_output_that_is_gone_is_not_current() -> None:
    command("data", data)
    RUN.path("data", "train.jsonl").unlink()
    assert not is_current()


def test_no_receipt_is_not_current() -> None:
    assert RUN.state("data", by_content=True).changed == "'data' has not run"


def test_another_output_of_the_stage_before_is_not_current() -> None:
    make_all()
    Path("talks.jsonl").write_text("[]\n")

    def other(recipe: Recipe, run: Run) -> Made:
        write_whole(run.path("data", "train.jsonl"), "made otherwise\n")
        return Made([run.path("data")], {}, {"talks.jsonl": fingerprint(Path("talks.jsonl"))})

    command("data", other)
    assert not train_is_current()


def test_the_same_output_made_again_by_the_stage_before_is_current() -> None:
    make_all()
    RUN.receipt_path("data").unlink()
    command("data", data)
    assert train_is_current()


def test_a_stage_before_without_receipt_is_not_current() -> None:
    make_all()
    RUN.receipt_path("base").unlink()
    assert not train_is_current()


def rewritten(*overrides: str) -> set[str]:
    """The stages whose keys resolve writes anew."""
    for path in RUN.path("keys").glob("*"):
        os.utime(path, (0, 0))
    resolve(load("mine.yaml", list(overrides)))
    return {path.stem for path in RUN.path("keys").iterdir() if path.stat().st_mtime > 0}


def test_resolve_writes_the_keys_of_every_stage_once() -> None:
    assert rewritten() == {stage.name for stage in STAGES}
    assert rewritten() == set()


CHANGES = {
    "seed=1": {"data", "base", "train", "eval"},
    "data.validation=0.2": {"data"},
    "base_model=random": {"base"},
    "train.lora.rank=8": {"train"},
    "eval.max_samples=50": {"eval"},
    "merge.precision=bfloat16": {"merge"},
    "gguf.types=[Q6_K]": {"gguf", "compare"},
    "serve.port=8001": {"serve"},
    "serve.context=512": {"prove", "serve"},
}


@pytest.mark.parametrize("override", CHANGES)
def test_resolve_writes_the_keys_of_just_the_stages_that_read_them(override: str) -> None:
    rewritten()
    assert rewritten(override) == CHANGES[override]


def test_resolve_notices_a_changed_data_file() -> None:
    rewritten()
    Path("talks.jsonl").write_text("[1]\n")
    assert rewritten() == {"data"}


def test_resolve_notices_a_changed_file_in_a_base_folder() -> None:
    Path("model").mkdir()
    Path("model/config.json").write_text("{}")
    rewritten("base_model=model")
    Path("model/config.json").write_text("[]\n")
    assert rewritten("base_model=model") == {"base"}
