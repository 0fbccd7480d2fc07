"""The contract that the stages share: recipes, the run folder, receipts and the one error boundary."""

import os

from pipeline.command import Made, command
from pipeline.error import UserError
from pipeline.load import load
from pipeline.recipe import Recipe
from pipeline.run import Run

# Read when torch or llama.cpp is loaded, by every process of ours: OpenMP's threads sleep at barriers. Those that spin
# keep the thread they wait for off its core as soon as anything else computes.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

__all__ = ["Made", "Recipe", "Run", "UserError", "command", "load"]
