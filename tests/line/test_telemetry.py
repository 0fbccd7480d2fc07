"""Nothing gets out: no library tells its makers what is trained, on a machine that could reach them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Workplace

from pipeline.command import SILENT

OFFLINE = re.compile("OFFLINE|^CI$|TELEMETRY|ENDPOINT|proxy", re.IGNORECASE)
REPOSITORY = Path(__file__).parents[2]
# In every Python process below it, in C or in Python: each look-up of a name, each connection and datagram.
RECORDER = """
import os, sys

def record(event, arguments):
    if event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.connect", "socket.sendto"):
        address = arguments[1] if event in ("socket.connect", "socket.sendto") else arguments
        host = address[0] if isinstance(address, tuple) else ""  # text is the path of a socket of this machine
        host = host.decode() if isinstance(host, bytes) else str(host or "")
        if host and host not in ("localhost", "::1") and not host.startswith("127."):
            with open(os.environ["LEFT"], "a") as file:
                file.write(f"{sys.argv[0]} {event} {host}\\n")

sys.addaudithook(record)
"""


def left(folder: Path, *words: str, **more: str) -> tuple[list[str], str]:
    """Attempts of a Python to leave the machine, which is not told to stay offline, and what it wrote."""
    recorder = folder / "recorder"
    recorder.mkdir(exist_ok=True)
    (recorder / "sitecustomize.py").write_text(RECORDER)
    log = folder / "left.txt"
    log.write_text("")
    reach = {name: value for name, value in os.environ.items() if name not in SILENT and not OFFLINE.search(name)}
    environment = reach | {"PYTHONPATH": f"{recorder}:{REPOSITORY}", "LEFT": str(log)} | more
    done = subprocess.run([sys.executable, *words], env=environment, cwd=folder, capture_output=True, text=True)
    return log.read_text().splitlines(), done.stdout + done.stderr


@pytest.mark.slow
def test_training_does_not_leave_the_machine(based: Workplace) -> None:
    attempts, output = left(based.folder, "-m", "train.run", "line.yaml")
    assert based.run.receipt_path("train").is_file(), output
    assert not attempts


@pytest.mark.parametrize(
    "ping",
    [
        pytest.param(
            "from huggingface_hub.utils import send_telemetry as send; send('a', library_name='b'); time.sleep(1)",
            id="huggingface_hub",
        ),
        pytest.param(
            "from gradio import analytics as a; a.analytics_enabled() and a._do_normal_analytics_request('a', {})",
            marks=pytest.mark.slow,  # to import it
            id="gradio",
        ),
        pytest.param("from datasets.load import increase_load_count as send; send('glue')", id="datasets"),
    ],
)
def test_what_a_library_tells_without_our_settings_is_seen_and_with_them_untold(ping: str, tmp_path: Path) -> None:
    assert left(tmp_path, "-c", f"import time; {ping}")[0]
    assert not left(tmp_path, "-c", f"import time; from pipeline.command import boundary\nwith boundary(): {ping}")[0]
