"""A model in transformers: the one place that loads base or trained model, takes logits and answers greedily.

Training loads the base in what its tuner trains on. A model that is asked is in float32; on a GPU in the precision of
the merge, since its memory may hold no more, and on the processor where the GPU has no room.
"""

import json
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from pipeline.error import UserError, reason
from pipeline.files import write_whole
from pipeline.methods import METHODS
from pipeline.progress import progress
from pipeline.recipe import Recipe
from pipeline.rows import rendered
from pipeline.run import Run

HEADS = {"causal": "AutoModelForCausalLM"}
KIND = "kind.json"
# GPU memory by the weights' bytes on disk: 16-bit files double in float32, a short sequence needs a little more.
ROOM = {"float32": 2.2, "bfloat16": 1.2}
PROMPTS_AT_ONCE = 32  # a step of so many costs little more than of one
MOST_PADDING = 2  # times the shortest prompt of a group, so that a long one is not computed for all


@dataclass(frozen=True)
class Trained:
    """What lies in `trained/`, as its `kind.json` says: an `adapter` for the base or the whole `weights`."""

    kind: str
    tuner: str
    mergeable: bool

    def write(self, folder: Path) -> None:
        write_whole(folder / KIND, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def read(cls, folder: Path) -> "Trained":
        """
        Raises:
            UserError: there is nothing, or it is damaged.
        """
        try:
            return cls(**json.loads((folder / KIND).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise UserError(f"{folder / KIND} cannot be read ({error}): run 'make train' for it again") from None


def auto_model(head: str) -> Any:
    """transformers' class that loads a model of this head (pipeline.methods)."""
    import transformers

    return getattr(transformers, HEADS[head])


def on_meta(config: Any, dtype: str = "float32", head: str = "causal") -> Any:
    """The model of a config, on the meta device, where tensors have no data.

    Raises:
        UserError: transformers cannot build it from this config.
    """
    import torch

    try:
        with torch.device("meta"):
            return auto_model(head).from_config(config, dtype=getattr(torch, dtype), trust_remote_code=False)
    except Exception as error:  # of the model's own code
        raise UserError(
            f"a {config.model_type} cannot be built from its config ({reason(error)}): fix its config.json or use "
            "another base"
        ) from None


def unread(folder: Path, head: str = "causal") -> dict[str, Any]:
    """What of a folder's weights does not become its model's: `mismatched_keys`, `missing_keys`, `unexpected_keys`."""
    import torch

    _, found = auto_model(head).from_pretrained(
        folder, device_map="meta", dtype=torch.float32, output_loading_info=True, ignore_mismatched_sizes=True
    )
    return dict(found)


def stored(path: Path, head: str = "causal") -> Any:
    """The model of a folder in the precision of its files, or of a GGUF file in float32: to be written again."""
    import torch

    if path.suffix != ".gguf":
        return auto_model(head).from_pretrained(path, dtype="auto")
    model = auto_model(head).from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    model.hf_quantizer = None  # the weights are plain float32 from here on
    del model.config.quantization_config
    return model


def load_base(recipe: Recipe, run: Run, frozen: bool, four_bits: bool, shared: bool = False) -> Any:
    """The run's base to train on: float32, on a GPU bfloat16 where that is fast and the base stays `frozen`.

    Args:
        shared: several GPUs will each take a part, so that none gets the whole.
        four_bits: NF4 with scales that are quantized too, as QLoRA has it (arXiv 2305.14314).

    Raises:
        UserError: bitsandbytes cannot quantize here, with its reason.
    """
    import torch

    from pipeline.machine import fast_precision

    fast = torch.bfloat16 if fast_precision() == "bfloat16" and recipe.train.precision != "float32" else torch.float32
    auto = auto_model(METHODS[recipe.train.method].head)
    options: dict[str, Any] = {"dtype": torch.float32}
    if torch.cuda.is_available():
        options["dtype"] = fast if frozen else torch.float32
    if torch.cuda.is_available() and not shared:
        options["device_map"] = {"": torch.cuda.current_device()}
    if not four_bits:
        return auto.from_pretrained(run.path("base"), **options)
    from transformers import BitsAndBytesConfig

    try:
        options["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=fast,
        )
        return auto.from_pretrained(run.path("base"), **options)
    except (ImportError, RuntimeError, ValueError, NotImplementedError, AttributeError) as error:
        raise UserError(
            f"train.tuner=qlora: bitsandbytes cannot quantize the base here ({reason(error)}): use train.tuner=lora"
        ) from None


def precision_to_ask(recipe: Recipe) -> str:
    """Of a model that is compared: a GPU may hold the rounded weights only, a processor computes in float32."""
    import torch

    return recipe.merge.precision if torch.cuda.is_available() else "float32"


def load(folder: Path, precision: str, head: str = "causal") -> Any:
    """The model of a Hugging Face folder, in `float32` or `bfloat16`, ready to be asked."""
    import torch

    weights_bytes = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    fits = torch.cuda.is_available() and torch.cuda.mem_get_info()[0] > ROOM[precision] * weights_bytes
    place = {"device_map": {"": torch.cuda.current_device()}} if fits else {}
    return auto_model(head).from_pretrained(folder, dtype=getattr(torch, precision), **place).eval()


def load_trained(run: Run, precision: str, base: Any = None, head: str = "causal") -> Any:
    """The run's trained model, not merged: its adapter on the `base`, which is loaded if not given, or its weights."""
    folder = run.path("trained")
    if Trained.read(folder).kind == "weights":
        return load(folder, precision, head)
    return with_adapter(load(run.path("base"), precision, head) if base is None else base, folder)


def load_adapter(folder: Path, base: Path, tokens: int, precision: str) -> Any:
    """An adapter on its base, whose embedding has room for so many `tokens`, of which training may have added some."""
    model = load(base, precision)
    if tokens > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(tokens)
    return with_adapter(model, folder)


def with_adapter(base: Any, folder: Path) -> Any:
    """The base with an adapter in it, which `disable_adapter` of what is returned switches off."""
    from peft import PeftModel

    return PeftModel.from_pretrained(base, folder).eval()


def copy_settings(source: Path, target: Path) -> None:
    """The tokenizer, its chat template, the stop tokens and the licence, byte for byte; a model wrote its own config.

    The base's card speaks of the base only.
    """
    for file in source.iterdir():
        weights = file.name.endswith((".safetensors", ".safetensors.index.json"))
        if not weights and file.name not in ("config.json", "README.md", KIND):
            shutil.copy(file, target / file.name)


def logits(model: Any, ids: list[int], first: int = 0) -> Any:
    """(tokens from `first` on, vocabulary) float32 logits of what follows each; those before are never computed."""
    import torch

    with torch.inference_mode():
        asked = torch.tensor([ids], device=model.device)
        return model(asked, logits_to_keep=len(ids) - first).logits[0].float().cpu()


def ends_of(model: Any) -> list[int]:
    """The tokens that end an answer, by the model's generation config."""
    known = model.generation_config.eos_token_id
    return known if isinstance(known, list) else [] if known is None else [known]


def greedy(
    model: Any,
    tokenizer: Any,
    prompts: list[list[int]],
    max_new_tokens: int,
    stops: list[int] | None = None,
    doing: str = "answers",
) -> list[list[int]]:
    """The most likely continuation of each prompt's ids, up to and with the first stop token.

    Prompts of like length are asked together, padded on the left. What the base's author advises to sample with is not
    applied. `stops` are those of the model's generation config if not given.
    """
    import torch

    ends = stops or ends_of(model)
    groups: list[list[int]] = []
    for index in sorted(range(len(prompts)), key=lambda index: len(prompts[index])):
        last = groups[-1] if groups else []
        if not last or len(last) == PROMPTS_AT_ONCE or len(prompts[index]) > MOST_PADDING * len(prompts[last[0]]):
            groups.append([])
        groups[-1].append(index)
    found: dict[int, list[int]] = {}
    was_training = model.training
    model.eval()
    with torch.inference_mode(), progress(doing, len(prompts)) as tell:
        for group in groups:
            tell(len(found))
            rows = {"input_ids": [prompts[index] for index in group]}
            batch = tokenizer.pad(rows, padding_side="left", return_tensors="pt").to(model.device)
            made = model.generate(
                **batch,
                max_new_tokens=max_new_tokens,
                do_sample=False,
                repetition_penalty=1.0,
                eos_token_id=ends or None,
            )[:, batch["input_ids"].shape[1] :].tolist()
            for index, row in zip(group, made, strict=True):
                end = next((at + 1 for at, token in enumerate(row) if token in ends), len(row))
                found[index] = row[:end]
    model.train(was_training)
    return [found[index] for index in range(len(prompts))]


def answers(
    model: Any, tokenizer: Any, questions: list[dict[str, Any]], longest_tokens: int, doing: str = "questions"
) -> list[str]:
    """The model's greedy answers, each up to the end of its turn or `longest_tokens`."""
    prompts = [rendered(tokenizer, row["messages"], prompt=True, tools=row.get("tools")) for row in questions]
    ids = [tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    found = greedy(model, tokenizer, ids, longest_tokens, doing=doing)
    return [tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in found]
