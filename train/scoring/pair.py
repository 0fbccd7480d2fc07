"""The base and the trained model side by side, and how fast each answers.

An adapter is switched off and on in one model; of whole weights both are held, less than training them took.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import Any

from pipeline import Recipe, Run
from pipeline.machine import fast_precision, resident_bytes
from pipeline.model import Trained, load_trained
from pipeline.rows import rendered
from pipeline.scores import median
from train.tuners import base_to_train

SPEED_TOKENS, SPEED_REPEATS = 16, 6


class Pair:
    """Both models, in what the processor does fast."""

    def __init__(self, recipe: Recipe, run: Run) -> None:
        from transformers import AutoTokenizer

        self.tokenizer, base = AutoTokenizer.from_pretrained(run.path("base")), base_to_train(recipe, run).eval()
        trained = load_trained(run, str(base.dtype).removeprefix("torch."), base)
        self.models = {"base": base, "trained": trained}
        self.adapter = Trained.read(run.path("trained")).kind == "adapter"
        self.precision = fast_precision() if recipe.train.precision == "auto" else recipe.train.precision
        if self.precision == "bfloat16":
            for model in (trained,) if self.adapter else (base, trained):
                round_once(model)

    @contextmanager
    def speaking(self, name: str) -> Iterator[Any]:
        """The model of that name, base or trained."""
        import torch

        model = self.models["trained" if self.adapter else name]
        bare = model.disable_adapter() if self.adapter and name == "base" else nullcontext()
        with bare, torch.autocast(model.device.type, torch.bfloat16, enabled=self.precision == "bfloat16"):
            yield model

    def ask(self, what: Callable[[Any, str], Any]) -> tuple[Any, Any]:
        """What both find, base first; `what` takes the model and its name."""
        found = []
        for name in ("base", "trained"):
            with self.speaking(name) as model:
                found.append(what(model, name))
        return found[0], found[1]


def round_once(model: Any) -> None:
    """Round the layers' weights to bfloat16, as autocast would again at every step: it keeps none that are frozen."""
    import torch

    for module in model.modules():
        if type(module) is torch.nn.Linear and module.weight.dtype == torch.float32:  # not those in 4 bits
            # A new parameter, since the output layer may share the embedding's, which autocast leaves as it is.
            module.weight = torch.nn.Parameter(module.weight.to(torch.bfloat16), requires_grad=False)


class Ticks:
    """When `generate` had the prompt, and when each token: a streamer that keeps the time alone."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, _: Any) -> None:
        self.at.append(time.perf_counter())

    def end(self) -> None:
        pass


def speed(model: Any, tokenizer: Any) -> dict[str, Any]:
    """Seconds to the first token of one answer, tokens a second after it, and the memory that all this took."""
    import torch

    prompt = rendered(tokenizer, [{"role": "user", "content": "What is the capital of France?"}], prompt=True)
    batch = tokenizer(prompt, add_special_tokens=False, return_tensors="pt").to(model.device)

    def answered(tokens: int) -> list[float]:
        """The seconds from the prompt to each token."""
        ticks = Ticks()
        with torch.inference_mode():
            model.generate(**batch, max_new_tokens=tokens, min_new_tokens=tokens, do_sample=False, streamer=ticks)
        return [at - ticks.at[0] for at in ticks.at[1:]]

    answered(1)  # the first one also prepares
    times = [answered(1 + SPEED_TOKENS) for _ in range(SPEED_REPEATS)]
    held = torch.cuda.max_memory_allocated() if model.device.type == "cuda" else resident_bytes()[1]
    return {
        "first_token_seconds": asdict(median([each[0] for each in times])),
        "tokens_per_second": asdict(median([SPEED_TOKENS / (each[-1] - each[0]) for each in times])),
        "bytes": held,
    }
