"""What `train.launch` writes for DeepSpeed is read by DeepSpeed's own parser, which needs no GPU."""

import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest

from pipeline import load
from train.launch import deepspeed, plugin

REPOSITORY = Path(__file__).parents[2]
PROGRAM = """
import json, sys
from deepspeed.runtime.config import DeepSpeedConfig
from transformers import TrainingArguments
from transformers.integrations.deepspeed import HfTrainerDeepSpeedConfig
filled = HfTrainerDeepSpeedConfig(json.loads(sys.argv[1]))
settings = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "max_grad_norm": 0.5, "bf16": True}
filled.trainer_config_process(TrainingArguments(use_cpu=True, **settings))
read = DeepSpeedConfig(filled.config)
print(json.dumps([read.zero_optimization_stage, read.train_batch_size, read.gradient_clipping,
                  read.bfloat16_config.enabled, read.zero_config.gather_16bit_weights_on_model_save]))
"""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """DeepSpeed, and of its lock what is not installed: beside this environment, which is to stay as it is."""

    def installed(pin: str) -> bool:
        try:
            return bool(version(pin.partition("==")[0]))
        except PackageNotFoundError:
            return False

    lock = (REPOSITORY / "setup/locks/deepspeed.txt").read_text(encoding="utf-8")
    folder = tmp_path_factory.mktemp("deepspeed")
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation", "--target", folder]
    missing = [pin for pin in re.findall(r"^([\w.-]+==\S+) \\$", lock, re.M) if not installed(pin)]
    done = subprocess.run([*pip, "--retries", "1", *missing], capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"deepspeed cannot be installed: {done.stderr.strip().splitlines()[-1]}")
    return folder


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed_reads_its_configuration(stage: int, packages: Path) -> None:
    config = deepspeed(stage)
    assert plugin(load("tiny", [f"launch.strategy=zero{stage}"])) == {"deepspeed": config}
    command, environment = (
        [sys.executable, "-c", PROGRAM, json.dumps(config)],
        os.environ | {"PYTHONPATH": str(packages)},
    )
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == [stage, 6, 0.5, True, stage == 3]
