"""`make register`: what Ollama serves is the trained model, whatever its template; faults are one line each.

Runs against the double; `make test-ollama` runs all but the faults against the real Ollama at OLLAMA_HOST.
"""

import json
from pathlib import Path

import pytest
from ollama_double import OllamaDouble
from ollama_run import CHATML, NAME, STRIPPING, Registering

from pipeline import UserError
from pipeline.run import Receipt
from serve.asking.endpoint import free_port
from serve.engines.ollama import server as ollama_server
from serve.engines.ollama.registration import backend, check, ensure, row

pytest_plugins = ["ollama_fixtures"]

FAR = "{% for m in messages %}{{ m.role|upper }}> {{ m.content|trim }}\n{% endfor %}ASSISTANT>"
ROLE_CASES = (
    "{% for m in messages %}{% if m.role == 'system' %}[{{ m.content }}]{% elif m.role == 'user' %}Q{ {{ m.content }} }"
    "{% else %}A: {{ m.content }};{% endif %}{% endfor %}{% if add_generation_prompt %}A: {% endif %}"
)
WITH_BOS = "{{ bos_token }}" + CHATML


@pytest.mark.parametrize("template", [CHATML, WITH_BOS, ROLE_CASES, FAR], ids=["chatml", "bos", "cases", "native"])
def test_what_is_registered_renders_every_prompt_as_trained(registering: Registering, template: str) -> None:
    registering.write(template)
    receipt = ensure(registering.recipe, registering.run)
    for probe in registering.probes:  # llama.cpp adds the BOS itself
        assert registering.rendered(probe.messages) == probe.prompt.removeprefix("<s>")
    measures = {"probes": 7, "too_long": 1, "own_agreement": 1.0, "greedy_agreement": 1.0, "greedy_share": 1.0}
    measures["stops"] = True
    assert receipt.metrics["measures"] == measures


def test_the_moving_tag_is_the_versioned_one(registering: Registering) -> None:
    registering.write()
    tag = ensure(registering.recipe, registering.run).metrics["tag"].partition(":")[2]
    tags = registering.tags()
    assert set(tags) == {tag, "latest"}
    assert len(set(tags.values())) == 1 and len(tag) == 12


def test_a_second_time_does_nothing(registering: Registering, caplog: pytest.LogCaptureFixture) -> None:
    registering.write()
    first = ensure(registering.recipe, registering.run)
    caplog.set_level("INFO", "truetune")
    assert ensure(registering.recipe, registering.run) == first
    assert caplog.messages == ["register: up to date"]


def test_another_parameter_is_another_tag_without_another_upload(
    registering: Registering, caplog: pytest.LogCaptureFixture
) -> None:
    registering.write()
    before = ensure(registering.recipe, registering.run).metrics
    registering.write(temperature=0.9)
    caplog.set_level("INFO", "truetune")
    after = ensure(registering.recipe, registering.run).metrics
    assert "has " + registering.run.path("gguf", f"{NAME}-Q8_0.gguf").name in caplog.text
    tags = registering.tags()
    assert after["tag"] != before["tag"] and len(tags) == 3
    assert tags["latest"] == after["digest"] != before["digest"]


def test_a_template_that_is_replaced_and_cannot_be_compiled_is_never_served(registering: Registering) -> None:
    """Against a server with OLLAMA_GO_TEMPLATE=0, it is rendered natively and so registered."""
    registering.write(STRIPPING)
    try:
        ensure(registering.recipe, registering.run)
    except UserError as error:
        assert "start Ollama with OLLAMA_GO_TEMPLATE=0" in str(error)
        assert registering.tags() == {}
    else:
        assert all(registering.rendered(probe.messages) == probe.prompt for probe in registering.probes)


def test_a_failed_proof_leaves_the_moving_tag_where_it_was(registering: Registering) -> None:
    registering.write()
    before = ensure(registering.recipe, registering.run).metrics
    registering.write(temperature=0.9)
    path = registering.run.path("reference", "probes.jsonl")
    path.write_text(path.read_text().replace("You say words.", "You say nothing."))
    registering.sign("reference")
    with pytest.raises(
        UserError, match=r"not the model that was trained and was removed again: chat template: probe 'p"
    ):
        ensure(registering.recipe, registering.run)
    assert registering.tags() == {before["tag"].partition(":")[2]: before["digest"], "latest": before["digest"]}


def test_another_model_under_the_same_template_is_refused(registering: Registering) -> None:
    registering.write()
    path = registering.run.path("reference", "probes.jsonl")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for probe in rows:
        probe["ids"].append(3)
    path.write_text("".join(json.dumps(probe) + "\n" for probe in rows))
    registering.sign("reference")
    with pytest.raises(UserError, match="token ids: probe 'plain' has 118 when chatting, trained with 119"):
        ensure(registering.recipe, registering.run)
    assert registering.tags() == {}


def test_tools_that_ollama_writes_otherwise_are_told(
    registering: Registering, caplog: pytest.LogCaptureFixture
) -> None:
    registering.write()
    path = registering.run.path("reference", "probes.jsonl")
    probe = json.loads(path.read_text().splitlines()[0])
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    probe |= {"name": "tools", "tools": [tool], "prompt": "f"}
    path.write_text(path.read_text() + json.dumps(probe) + "\n")
    registering.sign("reference")
    assert ensure(registering.recipe, registering.run).metrics["measures"]["probes"] == 7
    assert "with tools, Ollama does not render what training did" in caplog.text


def test_the_licence_is_the_base_s(registering: Registering) -> None:
    registering.write()
    base = Receipt("base", {}, {}, {}, {}, {"license": "apache-2.0"}, "2026-01-01T00:00:00+00:00", 0.0, 0)
    registering.run.write_receipt(base)
    ensure(registering.recipe, registering.run)
    shown = registering.http.post("/api/show", json={"model": f"{NAME}:latest"}).json()
    assert shown["license"] == "apache-2.0"


def test_a_model_of_someone_else_keeps_its_name(registering: Registering) -> None:
    registering.write()
    tag = ensure(registering.recipe, registering.run).metrics["tag"]
    registering.http.request("DELETE", "/api/delete", json={"model": tag})
    before = registering.tags()
    with pytest.raises(UserError, match=f"has a model {NAME}:latest that 'make register' did not make"):
        ensure(registering.recipe, registering.run)
    assert registering.tags() == before != {}


def test_a_modelfile_is_left_for_people(registering: Registering) -> None:
    registering.write()
    ensure(registering.recipe, registering.run)
    written = registering.run.path("Modelfile").read_text()
    assert f"\nFROM ./gguf/{NAME}-Q8_0.gguf\n" in written
    assert (
        'PARAMETER num_ctx 512\nPARAMETER temperature 0.2\nPARAMETER repeat_penalty 1.0\nPARAMETER stop "</s>"'
        in written
    )
    assert 'TEMPLATE """{{ range $i, $message := .Messages }}' in written


def test_the_window_gets_the_endpoint_of_the_proved_model(registering: Registering) -> None:
    registering.write()
    found = backend(registering.recipe, registering.run)
    assert (found.endpoint.model, found.services) == (f"{NAME}:latest", ())
    assert found.endpoint.url == f"{registering.url}/v1" and found.endpoint.key


def test_make_prove_asks_the_server_again(registering: Registering) -> None:
    registering.write()
    assert row(registering.recipe, registering.run) is None
    ensure(registering.recipe, registering.run)
    comparison = row(registering.recipe, registering.run)
    assert comparison is not None and comparison.problems == []
    registering.http.request("DELETE", "/api/delete", json={"model": f"{NAME}:latest"})
    comparison = row(registering.recipe, registering.run)
    assert comparison is not None and f"no longer has {NAME}:latest" in comparison.problems[0]


def test_make_verify_sees_another_model_under_the_name(registering: Registering) -> None:
    registering.write()
    ensure(registering.recipe, registering.run)
    check(registering.run)
    registering.http.request("DELETE", "/api/delete", json={"model": f"{NAME}:latest"})
    with pytest.raises(UserError, match=f"no longer has {NAME}:latest: run 'make register"):
        check(registering.run)


def test_a_server_without_go_templates_serves_what_cannot_be_compiled(
    double: OllamaDouble, registering: Registering
) -> None:
    double.go_template = False
    registering.write(STRIPPING)
    ensure(registering.recipe, registering.run)
    assert len(registering.tags()) == 2


def test_an_old_server_gets_go_templates_only(double: OllamaDouble, registering: Registering) -> None:
    double.version = "0.20.0"
    registering.write(CHATML)
    ensure(registering.recipe, registering.run)
    registering.write(FAR)
    with pytest.raises(UserError, match=r"Ollama 0.20.0 does not render the model's own template: use 0.30 or newer"):
        ensure(registering.recipe, registering.run)


FAULTS = {
    "cut in the upload": "was asked to take .* and broke off",
    "full in the upload": "disk of .* is full .*no space left",
    "damaged on the way": "received other bytes than were sent",
    "full while creating": "disk of .* is full .*no space left",
    "dies while creating": "was asked to create .* and broke off",
    "ends without success": "broke off .it stopped after 'writing manifest'",
    "is not listed": "does not list it",
    "is no Ollama": "gives no answer of Ollama",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_one_line_and_the_next_run_succeeds(
    double: OllamaDouble, registering: Registering, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    monkeypatch.setattr(ollama_server, "LISTED_SECONDS", 0.3)
    registering.write()
    double.faults = [fault]
    with pytest.raises(UserError, match=FAULTS[fault]) as told:
        ensure(registering.recipe, registering.run)
    assert len(told.value.problems) == 1 and "\n" not in str(told.value)
    assert not registering.run.receipt_path("register").exists()
    ensure(registering.recipe, registering.run)
    assert len(registering.tags()) == 2


@pytest.mark.parametrize(("times", "lasts"), [(2, False), (99, True)])
def test_a_busy_server_is_asked_again_a_few_times(
    double: OllamaDouble, registering: Registering, monkeypatch: pytest.MonkeyPatch, times: int, lasts: bool
) -> None:
    monkeypatch.setattr(ollama_server, "BUSY_PAUSES_SECONDS", (0, 0, 0))
    registering.write()
    double.faults = ["busy"] * times
    if lasts:
        with pytest.raises(UserError, match=r"is busy .server busy, please try again"):
            ensure(registering.recipe, registering.run)
    else:
        ensure(registering.recipe, registering.run)


def test_a_damaged_manifest_is_made_again(double: OllamaDouble, registering: Registering) -> None:
    registering.write()
    tag = ensure(registering.recipe, registering.run).metrics["tag"]
    double.manifests[tag] = double.manifests[f"{NAME}:latest"] = None
    ensure(registering.recipe, registering.run)
    assert len(registering.tags()) == 2


def test_the_file_is_sent_once_and_looked_for_first(double: OllamaDouble, registering: Registering) -> None:
    registering.write()
    ensure(registering.recipe, registering.run)
    blobs = [asked for asked in double.asked if "blobs" in asked]
    assert blobs == ["HEAD /api/blobs/", "POST /api/blobs/"]


def test_a_server_too_old_is_sent_nothing(double: OllamaDouble, registering: Registering) -> None:
    double.version = "0.17.0"
    registering.write()
    with pytest.raises(UserError, match=r"is Ollama 0.17.0, .*CVE-2026-7482.*: update it to 0.17.1 or newer"):
        ensure(registering.recipe, registering.run)
    assert double.asked == ["GET /api/version"]


def test_a_server_behind_a_key(double: OllamaDouble, registering: Registering, monkeypatch: pytest.MonkeyPatch) -> None:
    double.key = "a key"
    registering.write()
    with pytest.raises(UserError, match=r"refuses to take .*: set OLLAMA_API_KEY to its key"):
        ensure(registering.recipe, registering.run)
    monkeypatch.setenv("OLLAMA_API_KEY", "a key")
    assert backend(registering.recipe, registering.run).endpoint.key == "a key"


def test_no_server_is_one_line(registering: Registering, monkeypatch: pytest.MonkeyPatch) -> None:
    registering.write()
    monkeypatch.setenv("OLLAMA_HOST", f"127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match=r"no Ollama answers at .*: start it with 'ollama serve', or set OLLAMA_HOST"):
        ensure(registering.recipe, registering.run)


def test_what_is_sent_is_what_the_receipt_says(registering: Registering) -> None:
    registering.write()
    path = registering.run.path("gguf", f"{NAME}-Q8_0.gguf")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="is not what 'gguf' wrote, its sha256 differs"):
        ensure(registering.recipe, registering.run)
    assert registering.tags() == {}


def test_a_registered_run_is_not_checked_where_its_server_is_gone(
    double: OllamaDouble, registering: Registering, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    registering.write()
    ensure(registering.recipe, registering.run)
    path = registering.run.receipt_path("register")
    path.write_text(path.read_text().replace(registering.url, f"http://127.0.0.1:{free_port()}"))
    check(registering.run)
    assert "register: not checked, since no Ollama answers" in caplog.text
