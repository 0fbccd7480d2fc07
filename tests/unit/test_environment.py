"""The environment: its pins agree, its lock is whole, and its failures say what fixes them."""

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path

import pytest

from setup import environment, install
from setup.install import Environment, SetupError

LOCK = Path("requirements.lock").read_text(encoding="utf-8")
PROJECT = tomllib.loads(Path("pyproject.toml").read_text(encoding="utf-8"))
# Entry by entry: `name==version ; marker \` and the indented hashes below it.
ENTRIES = re.findall(r"^([a-z0-9][a-z0-9._-]*)==(\S+)(.*(?:\n {4}--hash=.*)*)", LOCK, re.M)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A folder with the files that the set-up reads, and no environment."""
    (tmp_path / "setup").mkdir()
    for name in ("pyproject.toml", "requirements.lock", "setup/environment.py", "setup/install.py", "setup/doctor.py"):
        (tmp_path / name).write_bytes(Path(name).read_bytes())
    return tmp_path


def pinned(name: str) -> str:
    groups = [PROJECT["project"]["dependencies"], *PROJECT["dependency-groups"].values()]
    return next(line.split("==")[1] for group in groups for line in group if line.startswith(f"{name}=="))


def test_the_pins_of_the_set_up_are_those_of_the_project() -> None:
    assert install.TORCH == pinned("torch")
    assert install.LLAMA_CPP_PYTHON == pinned("llama-cpp-python")


def test_every_locked_package_has_a_hash() -> None:
    assert len(ENTRIES) > 50
    assert [name for name, _, rest in ENTRIES if "--hash=sha256:" not in rest] == []


def test_the_lock_has_what_the_project_names_at_its_version() -> None:
    separate = {"torch", "llama-cpp-python"}
    wanted = PROJECT["project"]["dependencies"] + PROJECT["dependency-groups"]["dev"]
    bare = [re.sub(r"\[.*\]", "", line.lower()) for line in wanted]  # without extras, which are entries of their own
    named = {tuple(line.split("==")) for line in bare if line.split("==")[0] not in separate}
    assert named <= {(name, version) for name, version, _ in ENTRIES}


def test_the_lock_has_no_torch_no_cuda_and_names_no_index() -> None:
    unwanted = re.compile(r"torch|triton|nvidia|cuda|cupti|llm$|llama")
    assert [name for name, _, _ in ENTRIES if unwanted.match(name)] == []
    assert not re.search(r"://|win32|emscripten|never", LOCK)


def test_no_compiler_is_one_clear_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr(environment, "run", lambda *_, **__: False)
    with pytest.raises(SetupError, match=r"no C\+\+ compiler.*apt install build-essential.*xcode-select"):
        environment.install_llama_cpp_python(tmp_path / "source.txt")


def test_a_named_compiler_that_is_not_there_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    assert install.find_compiler() is None


@pytest.mark.parametrize(
    ("output", "told"),
    [
        ("what went wrong", r"a step: see .*setup\.log\n  what went wrong"),
        ("[Errno 28] No space left on device", "a step: the disk is full: free some space and run again"),
        ("Could not find a version (from versions: none)", "a step: no package index answers: connect to the network"),
    ],
)
def test_a_failed_step_says_why(tmp_path: Path, output: str, told: str) -> None:
    (log := tmp_path / "setup.log").touch()
    failing = [sys.executable, "-c", f"print({output!r}); raise SystemExit(1)"]
    with pytest.raises(SetupError, match=told):
        install.run(log, "a step", failing)
    assert not install.run(log, "a step", failing, may_fail=True)


@pytest.mark.parametrize(
    ("seconds", "output", "told"),
    [
        (120, "  [12/80] Building ggml.cpp.o\n  [20/80] Building C object\n", ": 25 %, 20 of 80 files, 6 min left"),
        (4, "Collecting numpy==2\nCollecting pandas==3\n", ": 2 packages, 0.5 a second: Collecting pandas==3"),
        (2, "Downloading scipy (33.0MiB)\n", ": 0 of 33 MB"),
        (
            10,
            "Downloading scipy (33.0MiB)\nDownloading uv (17.0MiB)\n Downloaded uv\n Downloaded small\n",
            ": 17 of 50 MB, 1.7 MB a second, 19 s left",
        ),
        (5, "", ""),
    ],
)
def test_progress_tells_how_far_and_how_long(seconds: int, output: str, told: str) -> None:
    assert install.progress(output, seconds) == told


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Requirements of one package with its hash, which only the index that pip is told of has."""
    (folder := tmp_path / "index/probe").mkdir(parents=True)
    with zipfile.ZipFile(wheel := folder / "probe-1.0-py3-none-any.whl", "w") as archive:
        archive.writestr("probe.py", "")
        archive.writestr("probe-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: probe\nVersion: 1.0\n")
        archive.writestr("probe-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("probe-1.0.dist-info/RECORD", "")
    (folder / "index.html").write_text(f'<a href="{wheel.name}">{wheel.name}</a>')
    monkeypatch.setenv("PIP_INDEX_URL", (tmp_path / "index").as_uri())
    (requirements := tmp_path / "one.txt").write_text(
        f"probe==1.0 \\\n    --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"
    )
    return requirements


def test_locked_packages_come_from_pips_index_by_uv_and_by_pip_without_it(
    index: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = Environment(tmp_path / ".venv", tmp_path / "setup.log")
    place.log.touch()
    install.make_venv(place, "cpu")
    (installer,) = [place.folder / f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"]
    for uv, name in ((install.ROOT, "uv"), (tmp_path / "nothing", "pip")):
        monkeypatch.setattr(install, "ROOT", uv)
        install.install_locked(place, index)
        assert (installer / "probe-1.0.dist-info/INSTALLER").read_text().strip() == name
        shutil.rmtree(installer / "probe-1.0.dist-info")
    monkeypatch.undo()
    index.write_text(index.read_text()[:-5] + "beef\n")
    with pytest.raises(SetupError, match="by pip: see"):
        install.install_locked(place, index)


def test_uv_looks_where_pip_is_told_to_look(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (settings := tmp_path / "pip.conf").write_text(
        "[global]\nindex-url = https://general/simple\nextra-index-url =\n    https://one/\n    https://two/\n"
        "[install]\nindex-url = https://installs/simple\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(settings))
    monkeypatch.setenv("PIP_CERT", "/own.pem")
    found = install.indexes(Environment(Path(sys.prefix), tmp_path / "setup.log"))
    assert (found["UV_DEFAULT_INDEX"], found["SSL_CERT_FILE"]) == ("https://installs/simple", "/own.pem")
    assert "UV_INDEX" not in found  # it would take a wheel for another Python, where indexes share them out


def test_what_is_compiled_with_other_flags_is_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Environment, "asked", lambda *_: "/cache")
    plain = environment.kept()
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_CUDA=ON")
    assert plain[1].startswith("/cache/truetune-") and plain != environment.kept()


def test_an_unknown_device_is_refused(checkout: Path) -> None:
    done = run_script("setup.environment", checkout, TRUETUNE_DEVICE="tpu")
    assert (done.returncode, done.stderr) == (1, "error: TRUETUNE_DEVICE=tpu: choose one of: cpu, cuda\n")
    assert not (checkout / ".venv").exists()


def test_a_matching_stamp_changes_nothing_and_is_renewed(checkout: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(checkout)
    (checkout / install.CONVERTER).mkdir(parents=True)
    (checkout / ".venv/bin").mkdir(parents=True)
    (checkout / ".venv/bin/python").symlink_to(sys.executable)
    stamp = checkout / ".venv/.complete"
    stamp.write_text(install.digest("cpu"))
    os.utime(stamp, (0, 0))
    done = run_script("setup.environment", checkout, TRUETUNE_DEVICE="cpu")
    assert (done.returncode, done.stderr) == (0, "")
    assert stamp.stat().st_mtime > 0
    assert install.digest("cpu") != install.digest("cuda")


def test_the_doctor_works_before_set_up(checkout: Path) -> None:
    done = run_script("setup.doctor", checkout)
    assert done.stderr == ""
    assert re.search(r"^environment +not made yet: 'make setup'$", done.stdout, re.M)
    assert re.search(r"^make serve ", done.stdout, re.M)


@pytest.mark.parametrize("ours", [True, False])
def test_the_doctor_knows_our_own_server(checkout: Path, ours: bool) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        told = {"pid": os.getpid() if ours else 2**22 + 1, "url": f"http://127.0.0.1:{port}/v1"}  # no such process
        (checkout / "runs/mine").mkdir(parents=True)
        (checkout / "runs/mine/session.json").write_text(json.dumps(told))
        done = run_script("setup.doctor", checkout, PORT=str(port), OLLAMA_HOST=f"127.0.0.1:{port}")
    assert re.search(rf"^port {port} +{'.make serve. has it, for mine' if ours else 'in use'}$", done.stdout, re.M)
    assert ("which another program has" in done.stdout) is not ours
    assert re.search(rf"^Ollama +answers on 127.0.0.1:{port}$", done.stdout, re.M)
    assert re.search(r"^vLLM +installed on first use$", done.stdout, re.M)


def run_script(module: str, folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module],
        cwd=folder,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
    )


def test_an_installer_that_outlives_its_parent_keeps_others_out(tmp_path: Path) -> None:
    begun = tmp_path / "begun"
    code = f"""
from pathlib import Path
from setup.install import Environment, alone, run
place = Environment(Path({str(tmp_path)!r}), Path({str(tmp_path / "setup.log")!r}))
place.log.touch()
with alone(place):
    run(place.log, "a step", ["sh", "-c", "echo $$ > {begun}.pid; mv {begun}.pid {begun}; exec sleep 60"])
"""
    parent = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.DEVNULL)
    try:
        while not begun.exists():
            assert parent.poll() is None
            time.sleep(0.01)
        parent.kill()
        parent.wait()
        with (tmp_path / "setup.lock").open("w") as lock:
            with pytest.raises(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.kill(int(begun.read_text()), signal.SIGKILL)
            fcntl.flock(lock, fcntl.LOCK_EX)
    finally:
        parent.kill()
