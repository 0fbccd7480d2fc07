"""The contract that the stages share: recipes, the run folder, receipts and the one error boundary."""

import os

from pipeline.command import Made, command
from pipeline.error import UserError
from pipeline.load import load
from pipeline.recipe import Recipe
from pipeline.run import Run

# Read when torch or llama.cpp is loaded, by every process of ours: OpenMP's threads spin a moment at barriers and then
# sleep. Those that spin long keep the thread they wait for off its core as soon as anything else computes.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "1000")

__all__ = ["Made", "Recipe", "Run", "UserError", "command", "load"]
