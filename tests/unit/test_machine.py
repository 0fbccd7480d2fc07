"""What this machine gives: free memory is what the tightest limit leaves, not what the machine has."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import machine

VERSION_1 = ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
GROUPS = {
    "version 2, in a container": ("0::/", "", "memory.max", "memory.current", "inactive_file"),
    "version 2, a scope": ("0::/user/run.scope", "user/run.scope", "memory.max", "memory.current", "inactive_file"),
    "version 2, the slice above": ("0::/user/run.scope", "user", "memory.max", "memory.current", "inactive_file"),
    "version 1": ("4:memory:/docker/1", "memory/docker/1", *VERSION_1),
    "version 1, in a container": ("4:cpu,memory:/docker/1", "memory", *VERSION_1),
}


@pytest.mark.parametrize("where", GROUPS)
def test_a_control_group_s_limit_holds_and_files_that_were_read_are_no_use_of_it(where: str, tmp_path: Path) -> None:
    line, folder, limit, used, files = GROUPS[where]
    own, group = tmp_path / "cgroup", tmp_path / "mounted" / folder
    own.write_text(f"1:name=systemd:/\n{line}\n")
    assert machine._group_bytes(own, tmp_path / "mounted") == sys.maxsize
    group.mkdir(parents=True)
    (group / limit).write_text("1000\n")
    (group / used).write_text("900\n")
    (group / "memory.stat").write_text(f"anon 250\nfile 650\n{files} 600\n")
    assert machine._group_bytes(own, tmp_path / "mounted") == 700


def test_a_limit_of_addresses_holds() -> None:
    code = "from pipeline.machine import free_bytes; print(free_bytes())"
    limited = subprocess.run(
        [sys.executable, "-c", code],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_AS, (300_000_000, 300_000_000)),
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert 0 < int(limited.stdout) < 300_000_000


@pytest.mark.skipif(sys.platform != "linux", reason="other systems' libraries bring other OpenMPs, or none")
@pytest.mark.parametrize(
    ("given", "wanted"), [({}, "1000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, "0")]
)
@pytest.mark.parametrize("library", ["torch", "xllamacpp", "llama_cpp"])
def test_openmp_s_threads_soon_sleep_at_barriers_unless_the_user_wants_otherwise(
    library: str, given: dict[str, str], wanted: str
) -> None:
    inherited = {key: value for key, value in os.environ.items() if key not in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")}
    done = subprocess.run(
        [sys.executable, "-c", f"import pipeline, {library}"],
        env=inherited | {"OMP_DISPLAY_ENV": "verbose"} | given,
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert f"GOMP_SPINCOUNT = '{wanted}'" in done.stderr
