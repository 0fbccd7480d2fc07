"""Where the model of a name lies: an adapter with its base, weights or a GGUF, in what a tool of training left behind.

TRL, LLaMA-Factory and Axolotl write it into their output folder, above a `checkpoint-N` of each save; Axolotl merges
into `merged/` there, ms-swift makes `output/<model>/v0-<date>/checkpoint-N` and merges into `checkpoint-N-merged`
beside it, Unsloth converts into `<name>_gguf/`, or `unsloth.Q4_K_M.gguf` beside the weights that it was made from.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import UserError
from pipeline.files import read_object
from pipeline.gguf_head import read_head
from train.hub import without_waiting

ADAPTER, ADAPTER_WEIGHTS, CONFIG = "adapter_config.json", "adapter_model.safetensors", "config.json"
FETCHED = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]
NOT_FETCHED = ["consolidated*", "original/*", "checkpoint-*"]  # the same weights in other namings, and older ones
HUB_ID = re.compile(r"[\w-][\w.-]*/[\w.-]+(@[\w./-]+)?")
DEPTH = 3  # of folders that are searched below the one that is named
NO_MODELS = re.compile(r"mmproj.*|imatrix.*|.*-(?!00001-of)\d{5}-of-\d{5}\.gguf")  # projectors, later parts


@dataclass(frozen=True)
class Located:
    """`model` is a folder or a GGUF file; of an adapter, `base` is the folder of its base."""

    model: Path
    base: Path | None = None


def locate(name: str, base: str = "") -> Located:
    """What a person means by a path or a Hub id; `base` is where an adapter's base is, if not where its config says.

    Raises:
        UserError: it is not there, may be one of several, is damaged, pickled or quantized, or its base is not there.
    """
    model = found(name, "is no file, no folder and no Hub id (owner/name): correct the path")
    if model.suffix == ".gguf":
        read_head(model, until="general.architecture")
        return Located(model)
    if not (model / ADAPTER).is_file():
        refuse_quantized(model)
        return Located(model)
    if not (model / ADAPTER_WEIGHTS).is_file():
        raise UserError(f"{model} has no {ADAPTER_WEIGHTS}: pickled adapters are not read, save it as safetensors")
    stated = str(read_object(model / ADAPTER).get("base_model_name_or_path") or "")
    if not (base or stated):
        raise UserError(f"{model} does not name its base: name it with BASE=..., a folder or owner/name")
    beside = [model / stated, model.parent / stated] if not base else []
    there = next((each for each in beside if stated and not Path(stated).is_dir() and each.is_dir()), None)
    weights = found(str(there or base or stated), f"is to be the base of {model}, and is not there: set BASE to it")
    if not (weights / CONFIG).is_file():
        raise UserError(f"{weights} is to be the base of {model}, and holds no weights of a model: set BASE to it")
    refuse_quantized(weights)
    return Located(model, weights)


def refuse_quantized(weights: Path) -> None:
    """
    Raises:
        UserError: transformers would load these with a library of their quantization.
    """
    if read_object(weights / CONFIG).get("quantization_config"):
        raise UserError(f"{weights} has quantized weights: name the same model without quantization (BASE=... of an "
                        "adapter)")  # fmt: skip


def found(name: str, missing: str) -> Path:
    """A GGUF file, the folder that a folder stands for, or what the Hub or its cache has of that id."""
    path = Path(name).expanduser()
    if path.is_dir():
        return model_in(path)
    if path.is_file() and path.suffix == ".gguf":
        return path
    if path.is_file():
        raise UserError(f"{name} is neither a folder nor a .gguf file: name the folder that it is in")
    if HUB_ID.fullmatch(name):
        return from_hub(name)
    raise UserError(f"{name} {missing}")


def from_hub(name: str) -> Path:
    """A copy in the Hub's cache, brought there now if the Hub answers."""
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repository, _, revision = name.partition("@")
    without_waiting(HfApi.model_info, repository, revision or None)
    try:
        folder = snapshot_download(
            repository, revision=revision or None, allow_patterns=FETCHED, ignore_patterns=NOT_FETCHED
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        said = str(error).strip().splitlines()[0]
        raise UserError(
            f"{name} is no folder here, and the Hugging Face Hub gives no model of that name ({said}): correct the "
            "name or the path, see to the network, and set HF_TOKEN for a gated one"
        ) from None
    return model_in(Path(folder))


def model_in(folder: Path) -> Path:
    """What a folder stands for: what lies in it, else its last checkpoint, else the only model below it.

    Of several an adapter is meant, which the others were made from, if it is the only one.

    Raises:
        UserError: there is none, or there are several, which are listed.
    """
    models = below(folder)
    adapters = [model for model in models if (model / ADAPTER).is_file()]
    if len(models) == 1 or len(adapters) == 1:
        return (adapters or models)[0]
    if not models:
        raise UserError(f"{folder} holds no model: it has no {ADAPTER}, no {CONFIG} with safetensors and no .gguf")
    raise UserError(f"{folder} holds several models: name one of {', '.join(map(str, models))}")


def below(folder: Path, depth: int = DEPTH) -> list[Path]:
    """The models that a folder may stand for, sorted."""
    files = {file.name for file in folder.iterdir()}
    ggufs = sorted(folder / name for name in files if name.endswith(".gguf") and not NO_MODELS.fullmatch(name))
    has_weights = any(name.endswith(".safetensors") or name.startswith("pytorch_model") for name in files)
    if ADAPTER in files or (CONFIG in files and has_weights):
        return [folder]
    steps: dict[int, str] = {int(each[1]): each[0] for each in map(checkpoint, files) if each}
    if steps and (last := below(folder / steps[max(steps)], depth - 1)):
        return last
    inner = (
        [each for each in sorted(folder.iterdir()) if each.is_dir() and not each.name.startswith(".")] if depth else []
    )
    return ggufs + [model for each in inner for model in below(each, depth - 1)]


checkpoint: Callable[[str], Any] = re.compile(r"checkpoint-(\d+)").fullmatch
