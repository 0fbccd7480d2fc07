"""Personal data: what is masked, and what only looks like it and must stay."""

from typing import Any

import pytest
from phonenumbers import SUPPORTED_REGIONS

from pipeline.recipe import PERSONAL, REGIONS, Clean
from train.cleaning.clean import clean, masking

HEX = "da39a3ee5e6b4b0d3255bfef95601890afd80709"
# Put together here, so that no scanner of secrets takes this file for one.
KEYS = {
    "an AWS id": "AKIA" + "IOSFODNN7EXAMPLE",
    "GitHub": "ghp_" + "a1B2" * 9,
    "GitHub, fine-grained": "github_pat_" + "a1B2_" * 16,
    "OpenAI": "sk-" + "a1B2" * 12,
    "OpenAI, of a project": "sk-proj-" + "a1B2-c3_" * 6,
    "Anthropic": "sk-ant-api03-" + "a1B2-c3_" * 6,
    "Slack": "xoxb-" + "123456789012-abcdef",
    "Google": "AIza" + "a1B2-" * 7,
    "Stripe": "sk_live_" + "a1B2" * 6,
    "Hugging Face": "hf_" + "aBcD" * 9,
    "JSON web token": "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0." + "a1B2-c3_" * 5,
    "private key": f"-----BEGIN RSA PRIVATE KEY-----\n{HEX}\n-----END RSA PRIVATE KEY-----",
    "private key that is cut": f"-----BEGIN OPENSSH PRIVATE KEY-----\n{HEX}",
}
MASKED = {
    "mail alice@example.com: thanks": "mail [EMAIL]: thanks",
    "<Bob.Smith+list@sub.firma.co.uk>.": "<[EMAIL]>.",
    "jörg@müller.de, please": "[EMAIL], please",
    "call +1 415 555 2671 now": "call [PHONE] now",
    "(415) 555-2671": "[PHONE]",
    "555-123-4567 or 415.555.2671": "[PHONE] or [PHONE]",
    "1-800-273-8255": "[PHONE]",
    "+49 30 123456, +33 1 23 45 67 89": "[PHONE], [PHONE]",
    "tel:+442079460958": "tel:[PHONE]",
    "4111 1111 1111 1111": "[CARD]",
    "5500-0000-0000-0004 and 378282246310005": "[CARD] and [CARD]",
    "GB82 WEST 1234 5698 7654 32": "[IBAN]",
    "to DE89370400440532013000 AND NOW": "to [IBAN] AND NOW",
    "aws_secret_access_key = " + "wJalrXUtnFEMI/K7MDENG" + "/bPxRfiCYEXAMPLEKEY": "aws_secret_access_key = [KEY]",
    **{f"use {key}": "use [KEY]" for key in KEYS.values()},
}
KEPT = [
    "git clone git@github.com:owner/repository.git",
    "icon@2x.png",
    "npm install lodash@4.17.21",
    "@app.route('/')",
    "root@localhost",
    "Qwen/Qwen3-0.6B@main",
    "2026-11-22 10:30:00",
    "12/25/2024",
    "10,000.50 and 2,147,483,647 and 3.14159265358979",
    "192.168.100.200:8000 and version 1.2.3.4",
    "ISBN 978-3-16-148410-0",
    "9780306406157",
    "order 4155552671",
    "1700000000 and 1732262400000",
    "1 2 3 4 5 6 7 8 9 10",
    "ports 8000-9000, years 2019-2020",
    "4111 1111 1111 1112 has a wrong check digit",
    "DE89370400440532013001 has a wrong check digit",
    "1234 5678 9012 3456",
    f"commit {HEX}",
    "sk-learn and sk-fading-circle-container-thing",
    "-----BEGIN PUBLIC KEY-----\nabc\n-----END PUBLIC KEY-----",
    "[EMAIL] [PHONE] [KEY] [CARD] [IBAN]",
    "seed 20260101, 0x1234567890, 1e-10",
    "157000+499000+125000=781000",  # these three stand in GSM8K
    "2000000-400000=1600000",
    "520/1000 * 100 = 52",
]


@pytest.mark.parametrize("text", MASKED)
def test_personal_data_is_masked(text: str) -> None:
    assert masking(PERSONAL, "US")(text) == MASKED[text]


@pytest.mark.parametrize("text", KEPT)
def test_what_only_looks_like_it_stays(text: str) -> None:
    assert masking(PERSONAL, "US")(text) == text


def test_national_numbers_are_those_of_the_region() -> None:
    assert masking(("phone",), "DE")("030 123456, (415) 555-2671") == "[PHONE], (415) 555-2671"


def test_the_regions_of_the_recipe_are_those_of_phonenumbers() -> None:
    assert set(REGIONS.split()) == SUPPORTED_REGIONS


@pytest.mark.parametrize("kind", PERSONAL)
def test_only_the_kinds_that_are_named_are_masked(kind: str) -> None:
    text = f"a@b.org +1 415 555 2671 {KEYS['GitHub']} 4111111111111111 GB82WEST12345698765432"
    masked = masking((kind,), "US")(text)
    assert [other for other in PERSONAL if f"[{other.upper()}]" in masked] == [kind]


def test_tool_calls_and_results_are_masked_and_nothing_by_default() -> None:
    def row(address: str) -> dict[str, Any]:
        call = {"function": {"name": "send", "arguments": {"to": [address]}}}
        return {
            "messages": [
                {"role": "user", "content": f"Write to {address}."},
                {"role": "assistant", "content": "", "tool_calls": [call]},
                {"role": "tool", "content": f"Sent to {address}"},
                {"role": "assistant", "content": "Done."},
            ]
        }

    given = row("alice@example.com")
    assert clean(given, Clean(personal=("email",))) == (row("[EMAIL]"), ["personal"])
    assert clean(given, Clean()) == (given, [])
