"""Exports of chat windows and OpenAssistant's trees: the thread that each becomes."""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from data_fixtures import found_in

from train.reading.formats import format_of
from train.reading.row import Rejection

USER, ASSISTANT = {"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}
SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [USER, ASSISTANT]
PICTURE = {"content_type": "image_asset_pointer", "asset_pointer": "file-service://file-7"}


def node(name: str, parent: str | None, role: str, content: Any, **more: Any) -> dict[str, Any]:
    """A node of ChatGPT's `mapping`."""
    told = content if isinstance(content, dict) else {"content_type": "text", "parts": [content]}
    message = {"author": {"role": role}, "content": told, "recipient": "all", "metadata": {}} | more
    return {name: {"id": name, "parent": parent, "children": [], "message": message}}


CHATGPT = {
    "title": "t",
    "current_node": "f",
    "mapping": {"r": {"id": "r", "parent": None, "children": ["a"], "message": None}}
    | node("a", "r", "system", "", metadata={"is_visually_hidden_from_conversation": True})
    | node("b", "a", "user", {"content_type": "multimodal_text", "parts": ["ping"]})
    | node("other", "b", "assistant", "another branch")
    | node("c", "b", "assistant", {"content_type": "code", "text": "search('ping')"}, recipient="browser")
    | node("d", "c", "tool", "found")
    | node("e", "d", "assistant", {"content_type": "thoughts", "thoughts": [{"content": "hm"}]})
    | node("f", "e", "assistant", "pong"),
}
OPEN_WEBUI = {
    "id": "1",
    "title": "t",
    "chat": {
        "params": {"system": "Be brief."},
        "history": {
            "currentId": "b",
            "messages": {
                "a": {"id": "a", "parentId": None, "childrenIds": ["x", "b"], "role": "user", "content": "ping"},
                "x": {"id": "x", "parentId": "a", "childrenIds": [], "role": "assistant", "content": "other"},
                "b": {
                    "id": "b",
                    "parentId": "a",
                    "childrenIds": [],
                    "role": "assistant",
                    "content": '<details type="reasoning">\n<summary>Thought</summary>\n> hm\n</details>\npong',
                },
            },
        },
    },
}
CLAUDE = {
    "uuid": "1",
    "name": "t",
    "chat_messages": [
        {"sender": "human", "text": "ping", "content": [{"type": "text", "text": "ping"}], "attachments": []},
        {"sender": "assistant", "text": "hm pong", "content": [{"type": "thinking"}, {"type": "text", "text": "pong"}]},
    ],
}
OASST_TREE = {
    "message_tree_id": "1",
    "prompt": {
        "role": "prompter",
        "text": "ping",
        "replies": [
            {"role": "assistant", "text": "pang", "rank": 1, "replies": []},
            {"role": "assistant", "text": "pong", "rank": 0, "replies": [{"role": "prompter", "text": "so?"}]},
        ],
    },
}
SHAPES: dict[str, tuple[str, Any, dict[str, Any]]] = {
    "oasst1 trees": ("OpenAssistant trees", OASST_TREE, {"messages": TALK}),
    "ChatGPT's conversations.json": ("ChatGPT export", CHATGPT, {"messages": TALK}),
    "Open WebUI's chats": ("Open WebUI export", OPEN_WEBUI, {"messages": [SYSTEM, *TALK]}),
    "Open WebUI's older chats": ("Open WebUI export", {"chat": {"messages": TALK}}, {"messages": TALK}),
    "Claude's conversations.json": ("Claude export", CLAUDE, {"messages": TALK}),
}


@pytest.mark.parametrize("name", SHAPES)
def test_an_export_is_recognized_and_read(name: str) -> None:
    format, record, value = SHAPES[name]
    assert format_of(record).name == format
    assert format_of(record).value(record, Counter()) == value


def test_a_picture_leaves_the_conversation_out() -> None:
    shown = {"mapping": node("f", None, "user", {"content_type": "multimodal_text", "parts": [PICTURE]})}
    with pytest.raises(Rejection) as raised:
        format_of(shown).value(shown, Counter())
    assert raised.value.reason == "shows an image: only text is learned"


def test_messages_of_openassistant_become_the_best_thread_of_each_tree(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)

    def message(name: str, parent: str | None, text: str, rank: int | None = None) -> dict[str, Any]:
        role = "assistant" if text.startswith("p") and parent else "prompter"
        return {"message_id": name, "parent_id": parent, "text": text, "role": role, "rank": rank, "lang": "en"}

    tree = [message("1", None, "ping"), message("2", "1", "pang", 1), message("3", "1", "pong", 0)]
    detected, found = found_in("oasst.jsonl", *tree, message("9", None, "Anyone?"), message("10", "3", "so?"))
    assert detected.format.name == "OpenAssistant messages"
    assert [(row.value, row.place) for row in found.rows] == [({"messages": TALK}, "oasst.jsonl:1")]
    assert [(lost.place, lost.rejection.reason) for lost in found.rejected] == [
        ("oasst.jsonl:5", "answers a message that does not stand before it"),
        ("oasst.jsonl:4", "no turn of role 'assistant': there is nothing to learn from it"),
    ]
    assert found.problems == []
