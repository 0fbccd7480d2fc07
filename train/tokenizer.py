"""A base's tokenizer, made to say what training and serving both need: template, end of turn, padding."""

import json
import re
from datetime import datetime
from pathlib import Path
from typing import Any

from recipe import UserError
from recipe.files import write_whole
from train.template import render

GENERATION_TAG = re.compile(r"\{%-?\s*(end)?generation\s*-?%\}")
NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
PROBE = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]


def prepare_tokenizer(folder: Path, template_file: str | None) -> str:
    """Make the tokenizer of a model folder say what training and serving both need; returns the end-of-turn token.

    The template loses its `{% generation %}` tags, which break GGUF loaders (llama-cpp-python#2225), and keeps the date
    of this day where it asks the clock, as Llama 3.1's does: another would be served than was trained. eos becomes the
    token that ends the assistant's turn; pad becomes another token than eos (trl#1623).

    Raises:
        UserError: no chat template, or one that does not end the assistant's turn with a special token.
    """
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises nothing narrower
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the base has no tokenizer that transformers reads ({reason}): use another base") from None
    if template_file:
        try:
            tokenizer.chat_template = Path(template_file).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"chat_template: {template_file} cannot be read ({error}): give a Jinja file") from None
    if not tokenizer.chat_template:
        raise UserError("the base has no chat template: name a Jinja file in the recipe's key 'chat_template'")
    tokenizer.chat_template = GENERATION_TAG.sub("", one_template(tokenizer.chat_template))
    tokenizer.chat_template = NOW.sub(lambda call: repr(datetime.now().strftime(call[2])), tokenizer.chat_template)
    before = tokenizer.eos_token_id
    tokenizer.eos_token = end_of_turn(tokenizer)
    tokenizer.pad_token = _pad_token(tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)

    generation = (
        GenerationConfig.from_pretrained(folder)
        if (folder / "generation_config.json").is_file()
        else GenerationConfig()
    )
    known = generation.eos_token_id
    stops = [tokenizer.eos_token_id, before, *(known if isinstance(known, list) else [known])]
    generation.eos_token_id = list(dict.fromkeys(stop for stop in stops if stop is not None))
    generation.pad_token_id = tokenizer.pad_token_id
    generation.save_pretrained(folder)

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return str(tokenizer.eos_token)


def one_template(template: str | dict[str, str]) -> str:
    """The template, or the one that chooses between a base's `default` and its `tool_use`, as Hermes has them."""
    if isinstance(template, str):
        return template
    if "tool_use" not in template:
        return template["default"]
    return f"{{% if tools %}}{template['tool_use']}{{% else %}}{template['default']}{{% endif %}}"


def end_of_turn(tokenizer: Any) -> str:
    """The special token with which the template ends the assistant's turn.

    It is the tokenizer's eos where the template writes that after the answer's words, else the last special token:
    gpt-oss has others before the words, Cohere's has one more before the end.

    Raises:
        UserError: there is none, so the model would never learn to stop.
    """
    whole, prompt = render(tokenizer, PROBE), render(tokenizer, PROBE[:1], prompt=True)
    after = whole.rpartition(PROBE[-1]["content"])[2]
    known = {*tokenizer.get_added_vocab(), *tokenizer.all_special_tokens}
    special = [token for token in tokenizer.tokenize(after) if token in known]
    if not special:
        raise UserError(
            f"the chat template ends the assistant's turn with {whole[len(prompt) :]!r}, which has no special token: "
            "the model would never learn to stop, let the template write the tokenizer's eos token there"
        )
    return str(tokenizer.eos_token if tokenizer.eos_token in special else special[-1])


def _pad_token(tokenizer: Any) -> str:
    """A token to pad with that is not eos; no token is added, so no embedding is resized."""
    known = [tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token, *tokenizer.get_added_vocab()]
    return next((token for token in known if token and token != tokenizer.eos_token), tokenizer.eos_token)
