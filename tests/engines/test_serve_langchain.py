"""LangChain's client against the served endpoint, as a user's program would use it, in an environment of its own."""

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from gguf_fixture import NAME, REPOSITORY, WORDS, Server

pytest_plugins = ["serve_fixtures"]
pytestmark = pytest.mark.slow

PROGRAM = """
import json, os
from langchain_openai import ChatOpenAI
model = ChatOpenAI(model=os.environ["MODEL"], base_url=os.environ["URL"], max_tokens=5, temperature=0, max_retries=0)
whole = model.invoke([("system", "Answer in words."), ("user", "apple")])
pieces = [piece.content for piece in model.stream("apple")]
batch = [answer.content for answer in model.batch(["apple", "bread", "cloud"] * 4)]
usage = whole.usage_metadata["output_tokens"]
print(json.dumps({"whole": whole.content, "usage": usage, "pieces": pieces, "batch": batch}))
"""


@pytest.fixture(scope="module")
def python() -> Path:
    """The Python of `.cache/langchain`, with the group `langchain` of pyproject.toml."""
    folder = REPOSITORY / ".cache/langchain"
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pins = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["dependency-groups"]["langchain"]
    pip = [folder / "bin/python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--retries", "1"]
    done = subprocess.run([*pip, *pins], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"langchain-openai cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return folder / "bin/python"


def test_langchain_invokes_streams_and_batches(server: Server, python: Path) -> None:
    settings = {"MODEL": NAME, "URL": f"{server.url}/v1", "OPENAI_API_KEY": server.key, "LANGSMITH_TRACING": "false"}
    done = subprocess.run([python, "-c", PROGRAM], env=settings, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["usage"] == 5
    assert set(said["whole"].split()) <= set(WORDS)
    assert len([piece for piece in said["pieces"] if piece]) == 5
    first, *others = said["batch"][::3]
    assert first == "".join(said["pieces"])
    assert others == [first] * 3
    assert len(said["batch"]) == 12
