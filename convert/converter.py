"""llama.cpp's converter for tokenizers that it does not know:  python convert/converter.py SCRIPT PRE ARGUMENTS...

Run by path by `convert.llamacpp`, as the converter is. A tokenizer that the converter knows by its hash stays as it
is; any other gets the pre-tokenizer PRE, which `convert.pretokenizer` read from its declaration.
"""

import runpy
import sys
from pathlib import Path
from typing import Any


def main(script: Path, pre: str) -> None:
    """Run the converter with its own folder on the path instead of ours, whose names are not its."""
    sys.path[0] = str(script.parent)
    from conversion.base import TextModel, gguf  # type: ignore[import-not-found]

    known = TextModel.get_vocab_base_pre
    add_to_gguf = gguf.SpecialVocab.add_to_gguf

    def say_so(vocabulary: Any, *arguments: Any, **options: Any) -> None:
        vocabulary.add_special_token.setdefault("bos", False)  # llama.cpp's default depends on the pre-tokenizer
        add_to_gguf(vocabulary, *arguments, **options)

    def name(model: Any, tokenizer: Any) -> str:
        try:
            return str(known(model, tokenizer))
        except NotImplementedError:
            if not pre:
                raise
            gguf.SpecialVocab.add_to_gguf = say_so
            return pre

    TextModel.get_vocab_base_pre = name
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    script, pre = sys.argv[1:3]
    del sys.argv[1:3]  # what is left is the converter's own
    main(Path(script), pre)
