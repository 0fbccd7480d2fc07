"""A tiny model that is really trained, and the run in which it is proved, whose files a test may alter."""

import json
import signal
import warnings
from importlib import import_module
from pathlib import Path

from bench.families import CORPUS, TEMPLATE, teach, trained_tokenizer
from pipeline import Recipe, Run, load
from pipeline.command import up_to_date
from pipeline.files import fingerprint
from pipeline.proof import Comparison, read_comparisons
from pipeline.stages import stage

REPOSITORY = Path(__file__).parent.parent
NAME = "healthy"
RECIPE = """
base_model: small
data: {train: talks.jsonl, validation: 0}
train: {epochs: 60, learning_rate: 4e-3, max_length: 512, lora: {rank: 8, alpha: 16}}
gguf: {types: [Q8_0]}
serve: {type: Q8_0, context: 2048, slots: 2, threads: 1}
"""


def write_base(folder: Path) -> None:
    """A Llama of two layers that has learned to answer, other answers than the recipe will teach it."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = trained_tokenizer(CORPUS)
    tokenizer.chat_template = TEMPLATE
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    model = LlamaForCausalLM(config)
    teach(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


class Proved:
    """A workplace whose stages run in this process, and whose files a test may alter."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @property
    def recipe(self) -> Recipe:
        return load(f"{NAME}.yaml", [])

    @property
    def run(self) -> Run:
        return Run(NAME)

    def make(self, *names: str) -> None:
        """Run the stages, up to date or not."""

        wishes = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        try:
            warnings.simplefilter("ignore")  # pytest restores the filters after each test
            for name in names:
                self.run.receipt_path(name).unlink(missing_ok=True)
                module = import_module(stage(name).module)
                up_to_date(stage(name), self.recipe, getattr(module, FUNCTIONS[name]))
        finally:
            signal.signal(signal.SIGINT, wishes[0])
            signal.signal(signal.SIGTERM, wishes[1])

    def sign(self, name: str) -> None:
        """Let a stage's receipt vouch for what its files are now, so that only the comparison can see the fault."""
        path = self.run.receipt_path(name)
        receipt = json.loads(path.read_text())
        receipt["outputs"] = {file: fingerprint(Path(file)) for file in receipt["outputs"] if Path(file).exists()}
        path.write_text(json.dumps(receipt))

    def accept(self, name: str, upstream: str) -> None:
        """Let a stage's receipt be of the changed outputs before it, as if it had been made from them."""
        path = self.run.receipt_path(name)
        receipt = json.loads(path.read_text())
        receipt["inputs"] |= self.run.receipt(upstream).outputs
        path.write_text(json.dumps(receipt))

    def question(self, text: str, fact: str) -> None:
        """Hold a question out, as `data.heldout` would have."""
        row = {"messages": [{"role": "user", "content": text}], "facts": [fact]}
        self.run.path("data", "heldout.jsonl").write_text(json.dumps(row) + "\n")
        self.sign("data")

    def change(self, context: int) -> None:
        """Give the recipe another `serve.context`."""
        path = self.folder / f"{NAME}.yaml"
        path.write_text(path.read_text().replace("context: 2048", f"context: {context}"))

    def keep_probes(self, names: set[str]) -> None:
        """Drop the other probes from the reference, whose logits the server does not need."""
        path = self.run.path("reference", "probes.jsonl")
        lines = path.read_text(encoding="utf-8").split("\n")
        path.write_text("".join(f"{line}\n" for line in lines if line and json.loads(line)["name"] in names))
        self.sign("reference")
        self.accept("compare", "reference")

    def comparisons(self) -> dict[str, Comparison]:
        """What `convert.compare` says, by artefact."""
        self.make("compare")
        return {row.name: row for row in read_comparisons(self.run.path("compare.jsonl"))}

    def served(self) -> Comparison:
        """What `serve.prove` says of the endpoint."""
        self.make("prove")
        return Comparison(**self.run.receipt("prove").metrics["comparisons"][-1])

    def gguf(self, kind: str) -> Path:
        return self.run.path("gguf", f"{NAME}-{kind}.gguf")


FUNCTIONS = {"data": "data", "base": "base", "train": "run", "reference": "reference", "merge": "merge", "gguf": "gguf",
             "compare": "compare", "prove": "prove"}  # fmt: skip
