"""The base model in transformers: the one place that loads it, in the type and on the device that fit the purpose."""

from typing import Any

from pipeline.error import UserError
from pipeline.recipe import Recipe
from pipeline.run import Run


def load_base(recipe: Recipe, run: Run) -> tuple[Any, Any]:
    """(tokenizer, model) of the run's base folder, in the type that the tuner trains on.

    Raises:
        UserError: QLoRA without an NVIDIA GPU.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    from pipeline.machine import fast_precision

    options: dict[str, Any] = {"dtype": torch.float32}
    if torch.cuda.is_available():
        options |= {"device_map": {"": torch.cuda.current_device()}}
        if fast_precision() == "bfloat16" and recipe.train.precision != "float32":
            options["dtype"] = torch.bfloat16
    if recipe.train.tuner == "qlora":
        if not torch.cuda.is_available():
            raise UserError(
                "train.tuner=qlora needs an NVIDIA GPU, here is none: use train.tuner=lora or a smaller base"
            )
        options["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=options["dtype"],
        )
    tokenizer = AutoTokenizer.from_pretrained(run.path("base"))
    return tokenizer, AutoModelForCausalLM.from_pretrained(run.path("base"), **options)
