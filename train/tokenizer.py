"""A base's tokenizer, made to say what training and serving both need: template, its tokens, end of turn, padding."""

import json
import logging
import re
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline import UserError
from pipeline.files import read_object, write_whole
from pipeline.machine import at_most_more
from pipeline.model import stored
from pipeline.rows import GENERATION_TAG, rendered
from train.template import settled, variables

NOW = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
DEFAULT = Path(__file__).parent / "chatml.jinja"
# A special token as templates write them: ChatML's, Llama's, Gemma's.
MARK = re.compile(r"<\|[\w:.-]+\|>|<[a-z]+(?:_[a-z]+)+>")
MARKED = "Qsystemword"
TEMPLATE_BYTES = 1 << 30
MOST_RENDERED = 100_000  # the longest opening known, of tools for a dozen purposes, has ten thousand
PROBE = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]


log = logging.getLogger("truetune")


@dataclass(frozen=True)
class Prepared:
    """What a base's tokenizer was given: the token that ends the assistant's turn, and tokens that are new to it.

    `system` is the prompt that its template writes where a conversation brings none.
    """

    end_of_turn: str
    added: dict[str, int]
    system: str


def prepare_tokenizer(
    folder: Path, template_file: str | None, system: str | None = None, arguments: dict[str, Any] | None = None
) -> Prepared:
    """Make the tokenizer of a model folder say what training and serving both need.

    A base without a chat template is given ChatML. Tokens that a given template needs and the vocabulary lacks are
    added, with rows in the embeddings, which training then trains too.

    The template loses its `{% generation %}` tags, which break GGUF loaders (llama-cpp-python#2225), and keeps the date
    of this day where it asks the clock, as Llama 3.1's does: another would be served than was trained. eos becomes the
    token that ends the assistant's turn; pad becomes another token than eos (trl#1623).

    Raises:
        UserError: a template that does not end the assistant's turn with a special token.
    """
    from transformers import AutoTokenizer, GenerationConfig

    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # the tokenizers library raises nothing narrower
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"the base has no tokenizer that transformers reads ({reason}): use another base") from None
    given = Path(template_file) if template_file else None if tokenizer.chat_template else DEFAULT
    if given:
        try:
            tokenizer.chat_template = given.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"chat_template: {template_file} cannot be read ({error}): give a Jinja file") from None
    if given == DEFAULT:
        log.info("base: it has no chat template, so it is given ChatML: the key 'chat_template' names another")
    tokenizer.chat_template = GENERATION_TAG.sub("", one_template(tokenizer.chat_template))
    variables(tokenizer.chat_template, str(given or "the base's chat template"))
    tokenizer.chat_template = NOW.sub(lambda call: repr(datetime.now().strftime(call[2])), tokenizer.chat_template)
    tokenizer.chat_template = settled(tokenizer.chat_template, system, arguments)
    before = tokenizer.eos_token_id
    with at_most_more(TEMPLATE_BYTES):
        added = _add_tokens(tokenizer) if given else {}
        tokenizer.eos_token = end_of_turn(tokenizer)
    tokenizer.pad_token = _pad_token(tokenizer)
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(folder)
    config = read_object(folder / "config.json")
    if added:
        log.info("base: %s are new to its vocabulary: their embeddings are trained too", ", ".join(added))
    if lacking := {token: id for token, id in _without_rows(tokenizer, folder).items() if token not in added}:
        log.warning("base: its embedding has no row for %s: it gets one, which is trained too", ", ".join(lacking))
        added |= lacking
    if added:
        add_rows(folder, list(added.values()))
        config = read_object(folder / "config.json")

    there = (folder / "generation_config.json").is_file()
    generation = GenerationConfig.from_pretrained(folder) if there else GenerationConfig()
    known = generation.eos_token_id
    stops = [tokenizer.eos_token_id, before, *(known if isinstance(known, list) else [known])]
    generation.eos_token_id = list(dict.fromkeys(stop for stop in stops if isinstance(stop, int)))
    generation.pad_token_id = tokenizer.pad_token_id
    generation.save_pretrained(folder)

    config |= {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    write_whole(folder / "config.json", json.dumps(config, indent=2) + "\n")
    return Prepared(str(tokenizer.eos_token), added, _system(tokenizer, system))


def _system(tokenizer: Any, given: str | None) -> str:
    """The system prompt of a conversation that brings none: the recipe's, or the template's own, which is told.

    Raises:
        UserError: the template does not show the recipe's.
    """
    question = PROBE[:1]
    without = rendered(tokenizer, question, prompt=True)
    if given:
        if given.strip() not in without:
            raise UserError("system: the chat template shows no system prompt: leave the key out, or name a template")
        return given.strip()
    try:
        opening, _, rest = rendered(tokenizer, [{"role": "system", "content": MARKED}, *question]).partition(MARKED)
    except UserError:
        return ""
    after = rest.partition(str(question[0]["content"]))[0]
    own, _, asked = without.removeprefix(opening).partition(after) if after else ("", "", "")
    if not without.startswith(opening) or not asked.startswith(str(question[0]["content"])) or not own.strip():
        return ""
    log.info("base: its template writes a system prompt where there is none: %r: the key 'system' sets another", own)
    return own


def _without_rows(tokenizer: Any, folder: Path) -> dict[str, int]:
    """The tokens beyond the rows of the embedding, which authors add and forget to make room for.

    Raises:
        UserError: they are not added ones, so the tokenizer is another model's.
    """
    from transformers import AutoConfig

    rows = AutoConfig.from_pretrained(folder).get_text_config().vocab_size
    lacking = {token: id for token, id in tokenizer.get_vocab().items() if id >= rows}
    if not lacking.keys() <= tokenizer.get_added_vocab().keys():
        raise UserError(
            f"the tokenizer has {len(tokenizer):,} tokens, the embedding {rows:,} rows: they are of different models, "
            "fetch both of the same"
        )
    return lacking


def _add_tokens(tokenizer: Any) -> dict[str, int]:
    """Add what the template writes like special tokens, if the end of the turn is not one yet; their ids."""
    from tokenizers import AddedToken

    try:
        end_of_turn(tokenizer)
        return {}
    except UserError:
        marks = dict.fromkeys(MARK.findall(rendered(tokenizer, PROBE)))
        missing = [mark for mark in marks if mark not in tokenizer.get_vocab()]
        tokenizer.add_tokens(
            [AddedToken(mark, normalized=False, special=True) for mark in missing], special_tokens=True
        )
        return {mark: tokenizer.convert_tokens_to_ids(mark) for mark in missing}


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
    whole, prompt = rendered(tokenizer, PROBE), rendered(tokenizer, PROBE[:1], prompt=True)
    if max(len(whole), len(prompt)) > MOST_RENDERED:
        raise UserError(
            f"the chat template writes {len(whole):,} characters for two words: use another, or another base"
        )
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


def add_rows(folder: Path, added: list[int]) -> None:
    """Rewrite a model folder's weights with a row for each added id, in tied embeddings once.

    A new row is the mean of the old ones, so that the base's own answers hardly change before it is trained
    (https://nlp.stanford.edu/~johnhew/vocab-expansion.html). A base may have had rows to spare: they are overwritten.
    """
    import torch

    model = stored(folder)
    rows = max(model.get_input_embeddings().weight.shape[0], max(added) + 1)
    model.resize_token_embeddings(rows, mean_resizing=False)
    with torch.no_grad():
        for embeddings in (model.get_input_embeddings(), model.get_output_embeddings()):
            embeddings.weight[added] = embeddings.weight[: min(added)].float().mean(0).to(embeddings.weight.dtype)
    for file in folder.glob("*.safetensors*"):
        file.unlink()  # it may be the user's own file under another name
    model.save_pretrained(folder)
