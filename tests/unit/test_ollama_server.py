"""Where Ollama is, as its official client reads it, and what a person is told of its refusals."""

import pytest
from ollama._client import _parse_host

from pipeline import UserError
from serve.engines.ollama.registration import Modelfile
from serve.engines.ollama.server import is_loopback, refusal, server_url

HOSTS = """
1.2.3.4 | :56789 | 1.2.3.4:56789 | http://1.2.3.4 | https://1.2.3.4 | https://1.2.3.4:56789 | example.com | localhost
example.com:56789 | http://example.com | https://example.com:56789/path/ | example.com/ | example.com:56789/path
[0001:002:003:0004::1] | [::1]:11500 | http://[::1] | https://[0001:002:003:0004::1]:56789/path | http://h:1
"""


@pytest.mark.parametrize("host", ["", *HOSTS.replace("\n", "|").strip("| ").split("|")])
def test_the_address_is_read_as_by_the_official_client(host: str) -> None:
    assert server_url(host) == _parse_host(host.strip())


@pytest.mark.parametrize(
    ("host", "url"),
    [
        ("0.0.0.0", "http://127.0.0.1:11434"),
        ("http://0.0.0.0:8", "http://127.0.0.1:8"),
        ("[::]:8", "http://[::1]:8"),
        (" 1.2.3.4 ", "http://1.2.3.4:11434"),
    ],
)
def test_an_address_to_listen_on_is_this_machine(host: str, url: str) -> None:
    assert server_url(host) == url


@pytest.mark.parametrize("host", ["host:port", "ftp://host", "host:99999", "[::1", "a b", "user@host"])
def test_what_is_no_address_is_refused(host: str) -> None:
    with pytest.raises(UserError, match=r"OLLAMA_HOST=.* is no address"):
        server_url(host)


@pytest.mark.parametrize(
    ("url", "local"), [("http://127.0.0.1:1", True), ("http://[::1]:1", True), ("http://gpu-box:1", False)]
)
def test_no_proxy_stands_before_this_machine(url: str, local: bool) -> None:
    assert is_loopback(url) == local


@pytest.mark.parametrize(
    ("status", "text", "line"),
    [
        (500, "write /x: no space left on device", "the disk of u is full (write /x: no space left on device): free"),
        (400, 'digest mismatch, expected "a"', "u received other bytes than were sent (digest mismatch"),
        (503, "server busy", "u is busy (server busy): wait"),
        (403, "no", "u refuses to sing (no): set OLLAMA_API_KEY"),
        (-1, "two\nlines", "u cannot sing: two lines: see its log"),
    ],
)
def test_a_refusal_is_one_line_that_says_what_mends_it(status: int, text: str, line: str) -> None:
    assert refusal("u", "sing", status, text).startswith(line)


def test_the_tag_is_of_everything_that_makes_the_model(tmp_path) -> None:
    def tag(**changed: object) -> str:
        told = {"sha256": "a", "template": None, "parameters": {"num_ctx": 1}, "licence": None} | changed
        return Modelfile("name", tmp_path / "x.gguf", **told).tag  # type: ignore[arg-type]

    tags = {tag(), tag(sha256="b"), tag(template="t"), tag(parameters={"num_ctx": 2}), tag(licence="mit")}
    assert len(tags) == 5 and tag() in tags
