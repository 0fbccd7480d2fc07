"""Every knob of a recipe: its name, type, default and meaning on one line."""

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Literal

from pipeline.methods import METHODS

# Every type that llama.cpp's quantizer writes, with its bits a weight: Llama-3.1-8B's where llama.cpp publishes them
# (tools/quantize/README), else the type's own.
QUANTIZATIONS = {
    "F32": 32.0, "F16": 16.0, "BF16": 16.0, "Q8_0": 8.5, "Q6_K": 6.56, "Q5_1": 6.0, "Q5_K_M": 5.7, "Q5_K_S": 5.57,
    "Q5_0": 5.5, "Q4_1": 5.0, "Q4_K_M": 4.89, "IQ4_NL": 4.68, "Q4_K_S": 4.67, "Q4_0": 4.5, "IQ4_XS": 4.46,
    "Q3_K_L": 4.3, "MXFP4_MOE": 4.25, "Q3_K_M": 4.0, "IQ3_M": 3.76, "IQ3_S": 3.66, "Q3_K_S": 3.64, "IQ3_XS": 3.5,
    "IQ3_XXS": 3.25, "Q2_K": 3.16, "Q2_K_S": 2.97, "IQ2_M": 2.93, "IQ2_S": 2.74, "IQ2_XS": 2.59, "IQ2_XXS": 2.38,
    "Q2_0": 2.25, "IQ1_M": 2.15, "TQ2_0": 2.06, "IQ1_S": 2.0, "TQ1_0": 1.69, "Q1_0": 1.125,
}  # fmt: skip
# An importance matrix weighs the rounding of every type but these, and llama.cpp writes the second ones with one only.
WITHOUT_IMATRIX = frozenset(("F32", "F16", "BF16", "Q8_0", "MXFP4_MOE", "TQ2_0", "TQ1_0", "Q2_0", "Q1_0"))
NEEDS_IMATRIX = frozenset(("IQ3_XS", "IQ3_XXS", "Q2_K_S", "IQ2_M", "IQ2_S", "IQ2_XS", "IQ2_XXS", "IQ1_M", "IQ1_S"))

PERSONAL = ("email", "phone", "key", "card", "iban")  # kinds of personal data that can be masked
# What the libraries that tell languages and phone numbers know, and train/planning/prediction.py of GPUs.
LANGUAGES = (
    "af als am an ar arz as ast av az azb ba bar bcl be bg bh bn bo bpy br bs bxr ca ce ceb ckb co cs cv cy da de diq "
    "dsb dty dv el eml en eo es et eu fa fi fr frr fy ga gd gl gom gu gv he hi hif hr hsb ht hu hy ia id ie ilo io is "
    "it ja jv ka kk km kn ko krc ku kv ky la lb lez li lmo lo lrc lt lv mai mg mhr min mk ml mn mr ms mt mwl my myv "
    "mzn nah nap nds ne new nl nn no oc or os pa pam pfl pl pms pnb ps pt qu rm ro ru rue sa sah sc scn sco sd sh si "
    "sk sl so sq sr su sv sw ta te tg th tk tl tr tt tyv uk ur uz vec vep vi vls vo wa war wuu xmf yi yo zh"
)
REGIONS = (
    "AC AD AE AF AG AI AL AM AO AR AS AT AU AW AX AZ BA BB BD BE BF BG BH BI BJ BL BM BN BO BQ BR BS BT BW BY BZ CA "
    "CC CD CF CG CH CI CK CL CM CN CO CR CU CV CW CX CY CZ DE DJ DK DM DO DZ EC EE EG EH ER ES ET FI FJ FK FM FO FR "
    "GA GB GD GE GF GG GH GI GL GM GN GP GQ GR GT GU GW GY HK HN HR HT HU ID IE IL IM IN IO IQ IR IS IT JE JM JO JP "
    "KE KG KH KI KM KN KP KR KW KY KZ LA LB LC LI LK LR LS LT LU LV LY MA MC MD ME MF MG MH MK ML MM MN MO MP MQ MR "
    "MS MT MU MV MW MX MY MZ NA NC NE NF NG NI NL NO NP NR NU NZ OM PA PE PF PG PH PK PL PM PR PS PT PW PY QA RE RO "
    "RS RU RW SA SB SC SD SE SG SH SI SJ SK SL SM SN SO SR SS ST SV SX SY SZ TA TC TD TG TH TJ TK TL TM TN TO TR TT "
    "TV TW TZ UA UG US UY UZ VA VC VE VG VI VN VU WF WS XK YE YT ZA ZM ZW"
)
GPUS = (
    "rtx-4060 rtx-3060 rtx-4070 rtx-5070 t4 rtx-4080 rtx-5080 rtx-3090 rtx-4090 l4 a10g rtx-5090 v100-32gb a100-40gb "
    "a6000 rtx-6000-ada l40 l40s a100-80gb rtx-pro-6000 h100-pcie h100-80gb h200 mi300x b200"
)


def knob(
    default: Any,
    doc: str,
    low: float | None = None,
    high: float | None = None,
    choices: Iterable[str] | None = None,
) -> Any:
    """A dataclass field with its meaning, its inclusive bounds and, for lists, what each item may be."""
    return field(default=default, metadata={"doc": doc, "low": low, "high": high, "choices": list(choices or ())})


@dataclass(frozen=True)
class Clean:
    unicode: bool = knob(True, "Write characters composed (NFC), drop control characters but tab and line ends")
    encoding: bool = knob(True, "Fix text that was decoded in a wrong encoding, such as `Ã©` for `é`; never in code")
    empty_turns: bool = knob(True, "End a conversation before its first empty turn, reject it if no answer is left")
    min_answer_characters: int = knob(0, "Fewest characters that the answers of a conversation have together", 0)
    max_characters: int = knob(0, "Most characters of a conversation; 0 sets no limit", 0)
    min_turns: int = knob(0, "Fewest turns of a conversation, without the system prompt", 0)
    max_turns: int = knob(0, "Most turns of a conversation; 0 sets no limit", 0)
    repetition: bool = knob(False, "Reject answers that repeat themselves, by Gopher's bounds; JSON and verse do, too")
    languages: tuple[str, ...] = knob(
        (), "Reject rows that are not in one of these, by ISO 639 codes like `en`", choices=LANGUAGES.split()
    )
    duplicates: bool = knob(True, "Keep the first of equal rows")
    near_duplicates: bool = knob(False, "Keep the first of rows that `similarity` calls alike")
    similarity: float = knob(
        0.8, "From this Jaccard similarity on, rows are near duplicates; they share a side", 0.5, 1
    )
    contamination: bool = knob(True, "Reject rows that have a held-out question in them, or nearly so")
    personal: tuple[str, ...] = knob(
        (), "What is masked, as in `[EMAIL]`, out of: email, phone, key, card, iban", choices=PERSONAL
    )
    phone_region: str = knob(
        "US", "Country of phone numbers without a country code, in capitals", choices=REGIONS.split()
    )


@dataclass(frozen=True)
class Columns:
    prompt: str | None = knob(None, "Column of the question")
    answer: str | None = knob(None, "Column of its answer")
    context: str | None = knob(None, "Column of what belongs to the question, which follows it after an empty line")
    system: str | None = knob(None, "Column of the system prompt")
    reasoning: str | None = knob(None, "Column of the answer's thoughts")
    messages: str | None = knob(None, "Column of a list of turns")
    tools: str | None = knob(None, "Column of the tools")
    text: str | None = knob(None, "Column of plain text")
    chosen: str | None = knob(None, "Column of the better answer")
    rejected: str | None = knob(None, "Column of the worse answer")
    label: str | None = knob(None, "Column that tells whether an answer is good")


@dataclass(frozen=True)
class Data:
    train: tuple[str, ...] = knob((), "Files, folders, globs or Hub ids of conversations, of any of the known formats")
    weights: tuple[float, ...] = knob(
        (), "How often each row of each of `train` is taken: 2 twice, 0.5 half of them", 0
    )
    columns: Columns = Columns()
    validation: float = knob(0.1, "Share of the conversations held back to measure the loss on", 0, 0.5)
    validation_rows: int = knob(2000, "Most conversations that are held back, however many there are", 1)
    heldout: str | None = knob(None, "JSONL file of questions with key facts that score the model before and after")
    clean: Clean = Clean()


@dataclass(frozen=True)
class Lora:
    rank: int = knob(16, "Rank of the two matrices that are added to each layer", 1)
    alpha: float = knob(32.0, "The adapter is scaled by alpha / rank", 1e-3)
    dropout: float = knob(0.0, "Share of the adapter's inputs dropped in training", 0, 0.9)
    targets: tuple[str, ...] = knob(("all-linear",), "Layers that get an adapter, by PEFT's names")


# TRL's losses over a better and a worse answer; the paper of each stands in TRL's documentation of DPO.
PAIR_LOSSES = ("sigmoid", "hinge", "ipo", "exo_pair", "nca_pair", "robust", "bco_pair", "sppo_hard", "aot",
               "aot_unpaired", "apo_zero", "apo_down", "discopop", "sft", "sigmoid_norm")  # fmt: skip
SFT_ALONE = ("neftune", "label_smoothing", "order")  # keys that no other method reads


@dataclass(frozen=True)
class Dpo:
    beta: float = knob(0.1, "How much leaving the start costs: higher stays closer", 1e-6)
    loss_type: tuple[str, ...] = knob(
        ("sigmoid",), "TRL's loss, or several that are added, as `[sigmoid, sft]`", choices=PAIR_LOSSES
    )
    loss_weights: tuple[float, ...] = knob((), "A weight for each of `loss_type`; 1 if not given", 0)
    label_smoothing: float = knob(
        0.0, "Share of pairs that are the wrong way round, of `robust`, `aot` and `exo_pair`", 0, 0.49
    )
    precompute: bool = knob(
        False, "Compute the start's log-probabilities once, before training: with `full` no second copy is held"
    )


@dataclass(frozen=True)
class Kto:
    beta: float = knob(0.1, "How much leaving the start costs: higher stays closer", 1e-6)
    loss_type: Literal["kto", "apo_zero_unpaired"] = knob("kto", "TRL's loss; the second does without neighbours")
    good_weight: float = knob(1.0, "How much a good answer counts; good x their number / (bad x theirs): 1 to 1.33", 0)
    bad_weight: float = knob(1.0, "How much a bad answer counts", 0)


@dataclass(frozen=True)
class Orpo:
    beta: float = knob(0.1, "How much the odds ratio counts beside the likelihood of the better answer", 0)


@dataclass(frozen=True)
class Train:
    method: str = knob(
        "sft",
        "What is learned: `sft`, the assistant's words; `dpo` or `orpo`, the better of two answers; `kto`, good ones",
        choices=METHODS,
    )
    tuner: Literal["full", "lora", "qlora", "dora", "rslora"] = knob(
        "lora", "`full` trains all weights; the others an adapter, `qlora` on a base in 4 bits"
    )
    lora: Lora = Lora()
    dpo: Dpo = Dpo()
    kto: Kto = Kto()
    orpo: Orpo = Orpo()
    epochs: float = knob(3.0, "Passes over the training conversations", 0.01)
    learning_rate: float = knob(1e-3, "Peak learning rate", 1e-9)
    lr_scheduler: Literal["cosine", "linear", "constant"] = knob("cosine", "How the learning rate falls after warm-up")
    warmup_ratio: float = knob(0.05, "Share of the steps in which the learning rate rises", 0, 1)
    max_length: int = knob(1024, "Longest conversation, the rest is cut and counted; most tokens of a packed row", 16)
    packing: Literal["auto", "on", "off"] = knob(
        "auto", "`on`: several conversations a row; `off`: one, padded; `auto`: on, if the base keeps them apart"
    )
    on_template_error: Literal["error", "skip"] = knob("error", "What a row does that the template refuses or cuts")
    supervise: Literal["all", "last"] = knob("all", "`last`: of each conversation only the last answer is learned")
    order: Literal["random", "short_first", "easy_first"] = knob(
        "random", "A curriculum: short conversations, or those with a low loss under the base, first in every epoch"
    )
    neftune: float = knob(0.0, "Noise on the embeddings in training (NEFTune); 5 is usual, 0 adds none", 0)
    label_smoothing: float = knob(0.0, "Share of each target that is spread over the vocabulary", 0, 0.9)
    batch_size: int = knob(1, "Rows a step on each device: packed ones, or conversations where `packing` is off", 1)
    gradient_accumulation: int = knob(1, "Steps whose gradients are added up before the weights move", 1)
    evals_per_epoch: int = knob(1, "Validation losses and checkpoints an epoch", 1)
    early_stopping_patience: int = knob(
        2, "Stop after so many validations without a lower loss; 0 never stops early", 0
    )
    tracker: Literal["tensorboard", "wandb", "mlflow", "none"] = knob(
        "tensorboard",
        "Where curves are logged; `wandb`, `mlflow`: also there, local unless you are logged in",
    )
    stop_on_divergence: bool = knob(True, "Stop when the loss is no number or stays far above what it was")
    checkpoint_minutes: float = knob(15.0, "Most minutes between checkpoints; each validation makes one too", 0.001)
    gradient_checkpointing: bool = knob(False, "Recompute activations in the backward pass: less memory, slower")
    precision: Literal["auto", "float32", "bfloat16"] = knob("auto", "`auto` is what the processor does fast")
    deterministic: bool = knob(False, "The same weights bit by bit on a GPU too, slower; without one they always are")
    max_new_tokens: int = knob(48, "Longest answer when the held-out questions are asked", 1)

    def needs_copy(self, tuner: str) -> bool:
        """Whether a second, frozen model is held, with which the one that is trained by this tuner is compared."""
        return tuner == "full" and METHODS[self.method].asked > 0 and not self.precomputes

    @property
    def precomputes(self) -> bool:
        """Whether that model is asked once, before training."""
        return self.method == "dpo" and self.dpo.precompute

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong between the method's keys and the others, as (key, problem)."""
        found = []
        if self.method == "sft":
            return []
        for key in SFT_ALONE:
            if getattr(self, key) != type(self).__dataclass_fields__[key].default:
                found.append((f"train.{key}", f"train.method={self.method} does not read it: take it out"))
        if self.packing == "on":
            found.append(("train.packing", f"train.method={self.method} packs no rows: set it to auto or off"))
        if self.lora.dropout:
            why = f"train.method={self.method} compares two models, which dropout would blur"
            found.append(("train.lora.dropout", f"{why}: set it to 0"))
        if self.method == "dpo":
            found += self._problems_of_losses()
        if self.method == "kto" and self.kto.loss_type == "kto" and self.batch_size == 1:
            found.append(("train.batch_size", "kto compares the answers of a batch: set it to 2 or more, say 8"))
        return found

    def _problems_of_losses(self) -> list[tuple[str, str]]:
        found = []
        losses, weights, smoothing = self.dpo.loss_type, self.dpo.loss_weights, self.dpo.label_smoothing
        if not losses:
            found.append(("train.dpo.loss_type", "is empty: name one, as sigmoid"))
        if weights and len(weights) != len(losses):
            given = f"{len(weights)} of them for {len(losses)} losses"
            found.append(("train.dpo.loss_weights", f"{given}: give one to each"))
        if "exo_pair" in losses and not smoothing:
            found.append(("train.dpo.loss_type", "exo_pair needs train.dpo.label_smoothing: set it to 1e-3"))
        if self.batch_size == 1 and (sorting := [loss for loss in losses if loss.startswith("aot")]):
            found.append(("train.batch_size", f"{sorting[0]} compares the pairs of a batch: set it to 2 or more"))
        return found


@dataclass(frozen=True)
class Launch:
    gpus: int | Literal["all"] = knob("all", "Processes on each host, one a GPU; `NPROC=` overrides it on one host", 1)
    nodes: int = knob(1, "Hosts that run the same command, with NODE_RANK and MASTER_ADDR", 1)
    strategy: Literal["ddp", "fsdp", "zero2", "zero3"] = knob(
        "ddp", "What each GPU holds: all of the model, or its share by FSDP2 or by DeepSpeed's ZeRO"
    )


@dataclass(frozen=True)
class Merge:
    precision: Literal["float32", "bfloat16"] = knob("float32", "Type of the merged weights")


@dataclass(frozen=True)
class Gguf:
    types: tuple[str, ...] = knob(
        ("Q8_0",),
        "Quantizations to write, by llama.cpp's names; `[]` makes no GGUF, for vLLM alone",
        choices=QUANTIZATIONS,
    )
    full: Literal["F16", "BF16", "F32"] = knob("F16", "Type of the unquantized GGUF that they are made from")
    imatrix_tokens: int = knob(4096, "Training tokens that the importance matrix is computed from; 0 makes none", 0)
    recommended_max_kl: float = knob(
        0.1, "Most mean KL divergence of the type that is served, nats; a limit of taste", 0
    )
    recommended_loss: float = knob(0.02, "Most key facts that it may lose, as a share, beyond the standard error", 0, 1)

    @property
    def written(self) -> tuple[str, ...]:
        """Every type that is made, the unquantized one first; none where `types` names none."""
        return tuple(dict.fromkeys((self.full, *self.types))) if self.types else ()


@dataclass(frozen=True)
class Prove:
    merged_max_kl: float = knob(1e-6, "Mean KL divergence of float32 weights, nats; honest 1e-11, 8 bits 1e-4", 0)
    full_max_kl: float = knob(1e-4, "The same of a GGUF in F16 or F32; rounding to F16 gives 1e-7 to 3e-6", 0)
    bfloat16_max_kl: float = knob(5e-3, "The same of bfloat16, merged or GGUF, which rounds 8 times coarser", 0)
    full_min_agreement: float = knob(0.97, "Share of equal most likely tokens; near ties may flip by rounding", 0, 1)
    served_max_kl: float = knob(1e-2, "The same of a server from its file; honest 1e-5, with keys in bfloat16 2e-3", 0)
    quantized_max_kl: float = knob(1.0, "The same to 4.5 bits a weight; each bit more allows e times less", 0)
    quantized_min_agreement: float = knob(0.6, "Agreement of a quantization; another model's is below 0.5", 0, 1)


@dataclass(frozen=True)
class Evaluation:
    max_samples: int = knob(200, "Most rows of each kind that `make eval` measures, drawn with the seed", 1)
    max_new_tokens: int = knob(48, "Longest answer when the questions are asked", 1)
    classification: tuple[str, ...] = knob(
        (), "JSONL, CSV or TSV files as GLUE's; `file=first|second` names the labels 0, 1, ..."
    )
    tasks: tuple[str, ...] = knob((), "Tasks of lm-evaluation-harness, by name or as YAML files")
    through: Literal["weights", "served"] = knob(
        "weights", "What these tasks are asked of: `served` is `make serve`'s API"
    )


@dataclass(frozen=True)
class Vllm:
    adapter: bool = knob(False, "Serve the base with the adapter on it instead of the merged weights")
    precision: Literal["auto", "float32", "bfloat16"] = knob("auto", "`auto` is what the GPU or processor does fast")
    quantization: Literal["none", "fp8"] = knob("none", "`fp8` halves the weights while loading; needs an NVIDIA GPU")
    memory: float = knob(0.9, "Share of each GPU's memory that is taken, for weights and conversations", 0.05, 1)
    tensor: int = knob(1, "GPUs that share each layer", 1)
    pipeline: int = knob(1, "Groups of GPUs, or hosts, that each hold some of the layers", 1)
    data: int = knob(1, "Copies of the model in one server, each on GPUs of its own", 1)
    grace: int = knob(10, "Seconds that answers under way get to finish when the server stops", 0)


@dataclass(frozen=True)
class Serve:
    type: str | None = knob(None, "Which of `gguf.types` is served; the recommended one if not given")
    engine: Literal["llamacpp", "ollama", "vllm"] = knob("llamacpp", "What answers; `ENGINE=` overrides it")
    ui: Literal["openwebui", "builtin", "none"] = knob("openwebui", "The chat window; `UI=` overrides it")
    ui_port: int = knob(3000, "Port of the chat window on 127.0.0.1; `UI_PORT=` overrides it", 1, 65535)
    playground_port: int = knob(7860, "Port of the playground on 127.0.0.1; `PLAYGROUND_PORT=` overrides it", 1, 65535)
    port: int = knob(8000, "Port on 127.0.0.1; `PORT=` in the environment overrides it", 1, 65535)
    context: int = knob(2048, "Tokens that one conversation may have", 64)
    slots: int = knob(4, "Conversations answered at the same time", 1)
    queue: int = knob(64, "Requests that may wait for a slot; more are refused with 503", 0)
    threads: int = knob(0, "Processor threads of the engine; 0 takes every core", 0)
    temperature: float = knob(0.2, "Sampling temperature when the client names none", 0, 2)
    repeatable: bool | None = knob(
        None, "Greedy answers that no cache and no other question changes; prompts take longer; by default for Q8_0"
    )
    origins: tuple[str, ...] = knob((), "Web pages that may ask from a browser, as `http://localhost:5173`")
    vllm: Vllm = Vllm()


@dataclass(frozen=True)
class Plan:
    gpu: str | None = knob(
        None,
        "A GPU to plan for, as `a100-80gb` (train/planning/prediction.py); else this machine",
        choices=GPUS.split(),
    )
    efficiency: float = knob(0.0, "Share of the device's peak that training reaches; 0 takes what is known", 0, 1)
    price: float = knob(0.0, "USD that one device costs an hour; 0 takes the table's range", 0)
    tokens: int = knob(0, "Tokens of one epoch; 0 counts those of the data's files", 0)


@dataclass(frozen=True)
class Recipe:
    """One model from data to chat, of the file at `path`; its stem is the run folder's and the served model's name."""

    path: str
    base_model: str = knob(
        "smollm2-135m", "`smollm2-135m`, `random`, a Hub id (`owner/name@revision`), a folder, a GGUF"
    )
    chat_template: str | None = knob(None, "Jinja file that replaces the base's chat template")
    chat_template_arguments: dict[str, Any] | None = knob(  # noqa: RUF009
        None, "Variables of the chat template, such as `{enable_thinking: false}`, in training and serving alike"
    )
    system: str | None = knob(None, "System prompt of a conversation that brings none, in training and serving alike")
    seed: int = knob(0, "Seed of the split, the weights and the order of the data", 0)
    data: Data = Data()
    train: Train = Train()
    launch: Launch = Launch()
    merge: Merge = Merge()
    gguf: Gguf = Gguf()
    prove: Prove = Prove()
    eval: Evaluation = Evaluation()
    serve: Serve = Serve()
    plan: Plan = Plan()

    @property
    def name(self) -> str:
        return re.sub(r"\.ya?ml$", "", self.path.rpartition("/")[2])

    @property
    def given(self) -> str:
        """What RECIPE= names it by."""
        return self.name if self.path == f"recipes/{self.name}.yaml" else self.path

    def problems(self) -> list[tuple[str, str]]:
        """What is wrong between keys, as (key, problem)."""
        found = []
        if not self.data.train:
            found.append(("data.train", "missing: name files or folders of conversations, or a dataset of the Hub"))
        if self.system is not None and not self.system.strip():
            found.append(("system", "is empty: write the system prompt, or leave the key out"))
        for name, value in (self.chat_template_arguments or {}).items():
            if not name.isidentifier() or not isinstance(value, str | int | float | bool):
                found.append(("chat_template_arguments", f"{name}: {value!r}: give a name one text, number or truth"))
        if not self.train.lora.targets:
            found.append(("train.lora.targets", "is empty: name layers of the base, or all-linear for all of them"))
        if self.serve.ui == "openwebui" and self.serve.ui_port == self.serve.port:
            found.append(("serve.ui_port", f"{self.serve.port} is serve.port too: give each a port of its own"))
        if self.data.weights and len(self.data.weights) != len(self.data.train):
            given, wanted = len(self.data.weights), len(self.data.train)
            found.append(("data.weights", f"{given} of them for {wanted} in data.train: give one to each"))
        if not self.gguf.imatrix_tokens and (needing := NEEDS_IMATRIX.intersection(self.gguf.types)):
            types = ", ".join(sorted(needing))
            found.append(("gguf.types", f"{types} needs an importance matrix: set gguf.imatrix_tokens, say to 4096"))
        found += self.train.problems()
        if self.train.method != "sft" and self.launch.strategy in ("fsdp", "zero3"):
            why = f"train.method={self.train.method} asks the whole model in each process"
            found.append(("launch.strategy", f"{why}: set ddp or zero2"))
        if self.serve.vllm.adapter and self.train.tuner in ("full", "dora"):
            why = "leaves no adapter" if self.train.tuner == "full" else "leaves one that vLLM does not apply"
            found.append(("serve.vllm.adapter", f"train.tuner={self.train.tuner} {why}: set it to false"))
        if self.serve.type is not None and self.serve.type not in self.gguf.written:
            found.append(
                ("serve.type", f"{self.serve.type!r} is not made: add it to gguf.types ({', '.join(self.gguf.types)})")
            )
        for origin in self.serve.origins:
            if not re.fullmatch(r"https?://[a-zA-Z0-9.\-\[\]:]+", origin):
                found.append(("serve.origins", f"{origin!r} is no origin: give scheme://host:port, without a path"))
        return found

    @property
    def served_type(self) -> str:
        """The quantization that llama.cpp and Ollama load, if any; `serve` fills in the one not named."""
        return self.serve.type or next(iter(self.gguf.types), "")

    @property
    def served_artefact(self) -> str:
        """What `make serve` loads: a GGUF by its type, else the merged weights or the adapter."""
        if self.serve.engine != "vllm":
            return self.served_type
        return "adapter" if self.serve.vllm.adapter else "merged weights"
