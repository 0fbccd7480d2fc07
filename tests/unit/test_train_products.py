"""The products of a training step that are our own give what the libraries' give."""

from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from train.attention import attend_apart
from train.lora import FusedLinear, Product


class Two(nn.Module):
    def __init__(self, bias: bool) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(24, 40, bias=bias), nn.Linear(40, 8, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.second(self.first(x).tanh())


def adapted(fused: bool, bias: bool = True, **settings: Any) -> Any:
    torch.manual_seed(0)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=["first", "second"], init_lora_weights=False, **settings)
    if fused:
        config._register_custom_module({nn.Linear: FusedLinear})
    return get_peft_model(Two(bias), config)


@pytest.mark.parametrize("shape", [(24,), (5, 24), (2, 3, 24)])
@pytest.mark.parametrize("bias", [True, False])
def test_fused_lora_gives_the_outputs_and_gradients_of_peft(
    shape: tuple[int, ...], bias: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    used, plain = [], Product.apply

    def counted(*given: Any) -> torch.Tensor:
        used.append(given)
        return plain(*given)

    monkeypatch.setattr(Product, "apply", counted)
    found = []
    for fused in (True, False):
        model, x = adapted(fused, bias), torch.linspace(-1, 1, 24).expand(shape).clone().requires_grad_()
        y = model(x)
        y.square().sum().backward()
        found.append([y, x.grad, *(weights.grad for weights in model.parameters() if weights.requires_grad)])
    assert len(used) == 2 and len(found[0]) == 6
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)  # float32, another order of sums


@pytest.mark.parametrize("case", ["dropout", "dora", "autocast", "disabled", "merged"])
def test_what_is_not_plain_is_left_to_peft(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = {"dropout": {"lora_dropout": 0.5}, "dora": {"use_dora": True}}.get(case, {})
    monkeypatch.setattr(Product, "apply", None)  # a call would fail
    x = torch.linspace(-1, 1, 24).expand(3, 24)
    answers = []
    for fused in (True, False):
        model = adapted(fused, **settings)
        if case == "merged":
            model.merge_adapter()
        torch.manual_seed(1)
        off = model.disable_adapter() if case == "disabled" else nullcontext()
        with torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"), off:
            answers.append(model(x))
    assert torch.equal(*answers)


def row(*lengths: int) -> dict[str, Any]:
    """One row of such conversations, as TRL's collator makes it."""
    bounds = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    positions = torch.cat([torch.arange(length) for length in lengths])[None]
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, 64, positions.shape, generator=generator)
    return {
        "use_cache": False,
        "input_ids": ids,
        "position_ids": positions,
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
    }


@pytest.mark.parametrize("window", [None, 16, 4])  # of 4 the longest conversation does not fit
def test_attention_of_each_conversation_is_that_of_the_masked_row(window: int | None) -> None:
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    config = MistralConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                           num_attention_heads=4, num_key_value_heads=2, sliding_window=window)  # fmt: skip
    model = MistralForCausalLM(config).eval()
    given = row(9, 5, 12, 1, 1, 1)
    masked = model(**given).logits
    attend_apart(model)
    torch.testing.assert_close(model(**given).logits[:, :26], masked[:, :26], rtol=0, atol=1e-5)
    alone = model(input_ids=given["input_ids"][:, 9:14], use_cache=False).logits
    torch.testing.assert_close(model(**given).logits[:, 9:14], alone, rtol=0, atol=1e-5)


def test_no_conversation_is_multiplied_with_another(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    import train.attention

    config = LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=1,
                         num_attention_heads=4, num_key_value_heads=2)  # fmt: skip
    model, lengths = LlamaForCausalLM(config), []
    attend_apart(model)
    plain = train.attention.scaled_dot_product_attention

    def seen(query: torch.Tensor, *given: Any, **named: Any) -> torch.Tensor:
        lengths.append(query.shape[2])
        return plain(query, *given, **named)

    monkeypatch.setattr(train.attention, "scaled_dot_product_attention", seen)
    model(**row(7, 3, 1, 4, 1, 1, 1))
    assert lengths == [7, 3, 1, 4, 3]  # padding, a token each, together
