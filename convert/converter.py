"""llama.cpp's converter, told what a tokenizer declares:  python convert/converter.py SCRIPT PRE MODEL ARGUMENTS...

Run by path by `convert.llamacpp`, as the converter is. A BPE tokenizer that the converter knows by its hash stays as
it is; any other gets the pre-tokenizer PRE, which `convert.llamacpp` read from its declaration. The vocabulary of a
SentencePiece tokenizer is written from tokenizer.json, which training used, not from files beside it. What the
converter leaves to llama.cpp's defaults, which depend on the family, is written as tokenizer and template have it.
"""

import base64
import json
import re
import runpy
import sys
from collections import Counter
from pathlib import Path
from typing import Any

QUESTION = [{"role": "user", "content": "ping"}]
SPACE = "▁"  # how SentencePiece writes one
BYTE = re.compile("<0x[0-9A-F]{2}>")
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTES = range(1, 7)  # llama.h, llama_token_type


def main(script: Path, pre: str, model: Path) -> None:
    """Run the converter with its own folder on the path instead of ours, whose names are not its."""
    sys.path[0] = str(Path(__file__).parent.parent)
    from pipeline.rows import rendered

    sys.path[0] = str(script.parent)
    from conversion.base import ModelBase, TextModel, gguf  # type: ignore[import-not-found]
    from conversion.phi import Phi3MiniModel  # type: ignore[import-not-found]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    declared = json.loads((model / "tokenizer.json").read_text(encoding="utf-8"))
    prompt = rendered(tokenizer, QUESTION, prompt=True)
    known, add_to_gguf = TextModel.get_vocab_base_pre, gguf.SpecialVocab.add_to_gguf
    settings_of, prepared = ModelBase.load_hparams, ModelBase.prepare_metadata

    def settings(*arguments: Any, **options: Any) -> dict[str, Any]:
        found: dict[str, Any] = settings_of(*arguments, **options)
        share = (found.get("rope_parameters") or {}).get("partial_rotary_factor", 1.0)
        return {"rotary_pct": share} | found  # its name for GPT-NeoX and Cohere 2 before transformers 5

    def name(of: Any, tokenizer: Any) -> str:
        try:
            return str(known(of, tokenizer))
        except NotImplementedError:
            if not pre:
                raise
            return pre

    def say_so(special: Any, writer: Any, *arguments: Any, **options: Any) -> None:
        writes_bos = bool(tokenizer.bos_token) and prompt.startswith(tokenizer.bos_token)
        special.add_special_token["bos"] = writes_bos and special.add_special_token.get("bos", False)
        add_to_gguf(special, writer, *arguments, **options)
        if is_sentencepiece(declared):
            writer.add_add_space_prefix(space_prefix(declared, prompt))
        if declared["model"]["type"] == "Unigram":
            writer.add_tokenizer_model("t5")
            writer.add_remove_extra_whitespaces(False)
            if table := re.search(r'"precompiled_charsmap": "([^"]+)"', json.dumps(declared["normalizer"])):
                writer.add_precompiled_charsmap(base64.b64decode(table[1]))

    def prepare(of: Any, *arguments: Any, **options: Any) -> None:
        prepared(of, *arguments, **options)
        if not any("general.file_type" in values for values in of.gguf_writer.kv_data):  # GPT-NeoX's and MPT's
            of.gguf_writer.add_file_type(of.ftype)

    ModelBase.load_hparams, ModelBase.prepare_metadata = staticmethod(settings), prepare
    TextModel.get_vocab_base_pre = name
    gguf.SpecialVocab.add_to_gguf = say_so
    TextModel.no_mtp = True  # transformers leaves out the layers that predict further tokens, as Qwen3.5's
    if is_sentencepiece(declared):
        TextModel._create_vocab_sentencepiece = lambda of: vocabulary(declared, of.hparams["vocab_size"])
        TextModel._set_vocab_gpt2 = Phi3MiniModel.set_vocab = TextModel._set_vocab_sentencepiece
    else:
        Phi3MiniModel.set_vocab = TextModel._set_vocab_gpt2  # it looks for a tokenizer's class that newer files lack
    if any(token["rstrip"] for token in declared["added_tokens"]):
        # llama.cpp drops the space after a special token only where the name says so (src/llama-vocab.cpp, "phi-3").
        sys.argv += ["--model-name", "phi-3"]
    runpy.run_path(str(script), run_name="__main__")


def is_sentencepiece(declared: dict[str, Any]) -> bool:
    """Whether the tokenizer writes spaces as SentencePiece does."""
    return SPACE in json.dumps([declared["normalizer"], declared["pre_tokenizer"]], ensure_ascii=False)


def space_prefix(declared: dict[str, Any], prompt: str) -> bool:
    """Whether a space is put before what follows a special token, or before a prompt that starts with none.

    transformers may do the second without the first ("first"), llama.cpp does both or neither.
    """
    steps = json.dumps([declared["normalizer"], declared["pre_tokenizer"]])
    starts_special = prompt.startswith(tuple(token["content"] for token in declared["added_tokens"]))
    return '"Prepend"' in steps or '"always"' in steps or ('"first"' in steps and not starts_special)


def vocabulary(declared: dict[str, Any], size: int) -> tuple[list[bytes], list[float], list[int]]:
    """(tokens, scores, types) for llama.cpp, which joins the pair of best score; transformers takes merges in order.

    `size` is that of the embedding, which may have rows to spare.
    """
    model = declared["model"]
    tokens = [f"[PAD{index}]" for index in range(size)]
    scores, types = [-1e4] * size, [UNUSED] * size
    if model["type"] == "Unigram":
        entries = [(text, index, score) for index, (text, score) in enumerate(model["vocab"])]
        unknown = model["unk_id"]
    else:
        merges = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        order = {"".join(pair): -float(rank) for rank, pair in reversed(list(enumerate(merges)))}
        entries = [(text, index, order.get(text, -1e6)) for text, index in model["vocab"].items()]
        unknown = model["vocab"].get(model["unk_token"] or "<unk>")
    for text, index, score in entries:
        kind = UNKNOWN if index == unknown else BYTES if BYTE.fullmatch(text) else NORMAL
        tokens[index], scores[index], types[index] = text, score, kind
    for token in declared["added_tokens"]:
        index, special = token["id"], token["special"]
        if index != unknown:
            tokens[index], scores[index] = token["content"] if special else token["content"].replace(SPACE, " "), -1e3
            types[index] = CONTROL if special else USER_DEFINED
    if twice := sorted({token for token, count in Counter(tokens).items() if count > 1}):
        raise ValueError(f"the tokenizer has tokens that llama.cpp cannot tell apart: {twice}")
    return [token.encode() for token in tokens], scores, types


if __name__ == "__main__":
    script, pre, model = sys.argv[1:4]
    del sys.argv[1:3]  # what is left is the converter's own
    main(Path(script), pre, Path(model))
