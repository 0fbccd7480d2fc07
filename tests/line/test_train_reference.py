"""The reference: what the trained model itself says, whatever else was asked together with it."""

from typing import Any

import pytest

from pipeline.reference import CONTINUATION_TOKENS, read_reference
from pipeline.rows import rows
from train import probes as stage
from train.probes import OWN_PROBES, TOOL, probe_cases

TALKS = [[{"role": "user", "content": f"Say {n}"}, {"role": "assistant", "content": "Yes."}] for n in range(20)]
WITH_TOOLS = (
    "{% if tools %}{{ tools | tojson }}\n{% endif %}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_SYSTEM = "{% for m in messages if m.role != 'system' %}{{ m.content }}<|im_end|>{% endfor %}"
CASES = {"multi-turn", "plain", "system", "empty-system", "unicode", "emoji", "chinese", "code", "spaces",
         "special-token", "long"}  # fmt: skip


def test_there_are_enough_probes_of_every_kind(tokenizer: Any) -> None:
    cases = probe_cases(tokenizer, [{"messages": talk} for talk in TALKS])
    assert CASES <= set(cases) and len(cases) >= 24
    assert sum(name.startswith("own-") for name in cases) == OWN_PROBES


def test_tools_are_probed_where_the_template_has_them(tokenizer: Any) -> None:
    assert not any(case.tools for case in probe_cases(tokenizer, []).values())
    tokenizer.chat_template = WITH_TOOLS
    cases = probe_cases(tokenizer, [])
    assert [name for name, case in cases.items() if case.tools] == ["tools", "tool-answer"]
    assert cases["tools"].tools[0]["function"]["name"] == TOOL


def test_a_system_prompt_that_the_template_drops_in_silence_is_not_probed(tokenizer: Any) -> None:
    tokenizer.chat_template = NO_SYSTEM
    cases = probe_cases(tokenizer, [{"messages": [{"role": "system", "content": "Be short."}, *TALKS[0]]}])
    assert "plain" in cases and not any(case.messages[0]["role"] == "system" for case in cases.values())


@pytest.fixture(scope="module")
def asked() -> Any:
    """A model whose answers differ from question to question."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=49152, max_position_embeddings=256, initializer_range=0.2, **sizes)
    return LlamaForCausalLM(config).eval()


def test_answers_are_the_most_likely_tokens_of_one_pass_each(asked: Any, tokenizer: Any) -> None:
    cases = probe_cases(tokenizer, [{"messages": talk} for talk in TALKS])
    probes, logits = stage.ask(asked, tokenizer, cases)
    assert {probe.name for probe in probes} == set(cases) - {"long"}, "it has more tokens than the model has positions"
    for probe, found in zip(probes, logits, strict=True):
        assert probe.stopped or len(probe.continuation) == CONTINUATION_TOKENS
        assert found.argmax(-1).tolist() == probe.continuation[: probe.scored]


def test_what_padding_tips_is_asked_again_alone(asked: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    cases = {name: case for name, case in probe_cases(tokenizer, []).items() if name in ("plain", "system", "unicode")}
    wanted, _ = stage.ask(asked, tokenizer, cases)
    honest = stage.greedy

    def tipped(model: Any, tokenizer: Any, prompts: list[list[int]], *more: Any) -> list[list[int]]:
        first, *others = honest(model, tokenizer, prompts, *more)
        return [[7, *first[1:]], *others] if len(prompts) > 1 else [first]

    monkeypatch.setattr(stage, "greedy", tipped)
    assert stage.ask(asked, tokenizer, cases)[0] == wanted


def test_the_stage_writes_what_the_format_says(trained: Any) -> None:
    trained.make("reference")
    reference = read_reference(trained.run.path("reference"))
    assert len(reference.probes) >= 24
    assert reference.logits.shape == (sum(probe.scored for probe in reference.probes), 49152)
    heldback = list(rows(trained.run.path("data"), "validation"))
    assert len(reference.answers) == len(heldback)
    own = [probe for probe in reference.probes if probe.name.startswith("own-")]
    assert own[0].messages == heldback[0]["messages"][:-1]
