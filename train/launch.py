"""How many processes train, by which strategy, and their start and end: torchrun's launcher and nothing of our own.

The command is the parent: it holds the run folder's lock and starts itself with a task, once a GPU. Where one process
dies all end, within seconds; a signal reaches each of them, and they stop after the same step with one checkpoint.
Several hosts run the same command with NODE_RANK and MASTER_ADDR, on a run folder that they share. What the processes
tell one another, a single one knows itself.
"""

import json
import logging
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipeline import Recipe, Run, UserError
from pipeline.error import Stopped
from pipeline.files import fresh_folder, write_whole
from pipeline.machine import cores

PORT = 29500  # torchrun's own, on which hosts meet
STOP_SECONDS = 5  # for the others, when one process died: what waits for it in a collective ends by SIGKILL
TASK = "task.json"
SENT_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
SHARED = ("fsdp", "zero3")  # strategies by which no process has all weights

log = logging.getLogger("truetune")


@dataclass(frozen=True)
class Launch:
    """Processes on each host, hosts, and which of them this is; `address` is the first one's."""

    processes: int
    nodes: int = 1
    node: int = 0
    address: str = "127.0.0.1"
    port: int = PORT

    @property
    def world(self) -> int:
        return self.processes * self.nodes


def launch(recipe: Recipe, gpus: int, environment: Mapping[str, str] = os.environ) -> Launch:
    """What the recipe's `launch` means on a host with so many GPUs; NPROC says it for this host alone.

    Raises:
        UserError: with every problem: more processes than GPUs, a strategy without one, a host that is not told apart.
    """
    asked, problems = recipe.launch, []
    given = {name: environment.get(name, "") for name in ("NPROC", "NODE_RANK", "MASTER_PORT")}
    problems += [f"{name}={text}: give a whole number" for name, text in given.items() if text and not text.isdecimal()]
    named, node, port = (int(text) if text.isdecimal() else 0 for text in given.values())
    processes = named or (max(1, gpus) if asked.gpus == "all" else asked.gpus)
    if gpus and processes > gpus:
        problems.append(f"{processes} processes, here are {gpus} GPUs: set launch.gpus=all, or NPROC to at most {gpus}")
    if not gpus and not named and processes > 1:
        problems.append(f"launch.gpus={processes}, here is none: set it to all, or NPROC={processes} for the processor")
    if asked.strategy.startswith("zero") and not gpus:
        problems.append(f"launch.strategy={asked.strategy} needs NVIDIA GPUs, here is none: set launch.strategy=fsdp")
    if recipe.train.tuner == "qlora" and asked.strategy in SHARED and processes * asked.nodes > 1:
        problems.append(f"launch.strategy={asked.strategy} does not share the 4 bits of qlora: set ddp or zero2")
    address = environment.get("MASTER_ADDR", "")
    if asked.nodes > 1 and not (given["NODE_RANK"] and address):
        hosts = "NODE_RANK=0 (then 1, ...) and MASTER_ADDR, the first host's address"
        problems.append(f"launch.nodes={asked.nodes}: run the same command on each host, with {hosts}")
    if node >= asked.nodes:
        problems.append(f"NODE_RANK={node}: with launch.nodes={asked.nodes} the last host is {asked.nodes - 1}")
    if problems:
        raise UserError(*problems)
    return Launch(processes, asked.nodes, node, address, port or PORT) if asked.nodes > 1 else Launch(processes)


def arguments(launched: Launch, name: str, task: Path) -> list[str]:
    """torchrun's."""
    words = [f"--nproc-per-node={launched.processes}", f"--shutdown-timeout={STOP_SECONDS}", "--max-restarts=0"]
    # Signals are sent on by `_forwarding`, which lets a checkpoint take its time; torchrun would kill after a while.
    words += ["--signals-to-handle=SIGQUIT", f"--rdzv-id={name}"]
    if launched.nodes == 1:
        words += ["--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"]
    else:
        words += [f"--nnodes={launched.nodes}", f"--node-rank={launched.node}"]
        words += [f"--master-addr={launched.address}", f"--master-port={launched.port}"]
    return [*words, "-m", "train.run", str(task)]


def variables(recipe: Recipe, launched: Launch, gpus: int) -> dict[str, str]:
    """What the processes' environment has beyond the command's own, where the user did not set it."""
    found = {"OMP_NUM_THREADS": str(max(1, cores() // launched.processes))}
    if launched.nodes == 1:
        loopback = "lo0" if sys.platform == "darwin" else "lo"
        found |= {"NCCL_SOCKET_IFNAME": loopback} if gpus else {"GLOO_SOCKET_IFNAME": loopback}
    if recipe.launch.strategy == "fsdp":  # by these the first process alone reads the weights, the others get theirs
        found |= {"ACCELERATE_USE_FSDP": "true", "FSDP_CPU_RAM_EFFICIENT_LOADING": "true"}
    return found


def plugin(recipe: Recipe) -> dict[str, Any]:
    """transformers' TrainingArguments by which Accelerate makes its plugin; none for DDP, which it takes by itself."""
    strategy = recipe.launch.strategy
    if strategy == "ddp":
        return {"ddp_find_unused_parameters": False}
    if strategy == "fsdp":
        config = {
            "version": 2,
            "auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "cpu_ram_efficient_loading": True,
            "state_dict_type": "FULL_STATE_DICT",  # a checkpoint that any number of processes can resume from
        }
        return {"fsdp": True, "fsdp_config": config}
    return {"deepspeed": deepspeed(int(strategy[-1]))}


def deepspeed(stage: int) -> dict[str, Any]:
    """DeepSpeed's configuration; Accelerate fills in what is `auto` from the other settings."""
    zero: dict[str, Any] = {"stage": stage, "overlap_comm": True, "contiguous_gradients": True}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    filled = ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping")
    return {"zero_optimization": zero, "bf16": {"enabled": "auto"}, **dict.fromkeys(filled, "auto")}


def run(recipe: Recipe, place: Run, launched: Launch, gpus: int, task: dict[str, Any] | None = None) -> dict[str, Any]:
    """Train in these processes; what the first one found. The first host gives the `task`, of which the others read.

    Raises:
        UserError: what one of them told, or which one died.
        Stopped: by a signal, after a checkpoint.
    """
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch
    from torch.distributed.run import config_from_args, parse_args

    folder = place.path("launch")
    if task:
        write_whole(fresh_folder(folder) / TASK, json.dumps({"arguments": sys.argv[1:], **task}))
    for name, value in variables(recipe, launched, gpus).items():
        os.environ.setdefault(name, value)
    for chatty in ("multiprocessing.api", "agent.server.api"):
        logging.getLogger(f"torch.distributed.elastic.{chatty}").setLevel(logging.CRITICAL)  # `_outcome` tells it
    log.info("train: %d processes, %s", launched.world, recipe.launch.strategy)
    config, entrypoint, words = config_from_args(parse_args(arguments(launched, recipe.name, folder / TASK)))
    failures: dict[int, Any] = {}
    with _forwarding() as sent:
        try:
            elastic_launch(config, entrypoint)(*words)
        except ChildFailedError as error:
            failures = error.failures
    results = {int(file.stem): json.loads(file.read_text()) for file in folder.glob("[0-9]*.json")}
    return _outcome(results, failures, launched, bool(sent), recipe.given)


def _outcome(
    results: dict[int, dict[str, Any]], failures: dict[int, Any], launched: Launch, interrupted: bool, given: str
) -> dict[str, Any]:
    """The first process' result, or the exception that says best what went wrong."""
    told = [results[rank] for rank in sorted(results)]
    for result in told:
        if "stopped" in result:
            raise Stopped(result["message"], signal.Signals(result["stopped"]))
    for result in told:
        if "problems" in result:
            raise UserError(*result["problems"])
    if interrupted:
        raise KeyboardInterrupt
    again = f"the others were ended, 'make train RECIPE={given}' resumes from the last checkpoint"
    for rank, failure in failures.items():
        if failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            by = signal.Signals(-failure.exitcode).name
            raise UserError(f"process {rank} of {launched.world} was killed by {by}: {again}")
    for rank, result in sorted(results.items(), key=lambda item: item[1].get("time", 0)):
        if "traceback" in result:
            sys.stderr.write(result["traceback"])
            raise UserError(f"process {rank} of {launched.world} failed as shown above: {again}")
    if failures or (launched.node == 0 and "metrics" not in results.get(0, {})):
        raise UserError(f"process {next(iter(failures), 0)} of {launched.world} ended without a word: {again}")
    return dict(results.get(0, {}).get("metrics", {}))


@contextmanager
def _forwarding() -> Iterator[list[int]]:
    """Send Ctrl-C, SIGTERM and a closed terminal's signal on to the processes; the second one ends them at once."""
    import psutil

    sent: list[int] = []

    def send_on(number: int, frame: Any) -> None:
        sent.append(number)
        if len(sent) > 1:
            raise KeyboardInterrupt
        for child in psutil.Process().children():
            if "train.run" in child.cmdline():
                child.send_signal(number)

    # `nohup` ignores SIGHUP, and so does what it starts.
    heeded = [number for number in SENT_ON if signal.getsignal(number) != signal.SIG_IGN]
    before = {number: signal.signal(number, send_on) for number in heeded}
    try:
        yield sent
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def is_launched() -> bool:
    """Whether torchrun started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """0 for the one that writes."""
    return int(os.environ["RANK"]) if is_launched() else 0


def everyones(*numbers: float) -> list[list[float]]:
    """Of each number, the list of what it is in every process."""
    if not is_launched():
        return [[number] for number in numbers]
    import torch
    from accelerate import PartialState
    from torch import distributed

    own = torch.tensor(numbers, dtype=torch.float64, device=PartialState().device)
    each = [torch.empty_like(own) for _ in range(distributed.get_world_size())]
    distributed.all_gather(each, own)
    found: list[list[float]] = torch.stack(each, dim=1).tolist()
    return found


def of_first(found: Any) -> Any:
    """What the first process found, in every process."""
    if not is_launched():
        return found
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([found])[0]


def gathered(batches: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The batches of all processes; of several, on the processor."""
    if not is_launched():
        return batches
    from accelerate.utils import gather_object, send_to_device

    found: list[dict[str, Any]] = gather_object(send_to_device(batches, "cpu"))
    return found
