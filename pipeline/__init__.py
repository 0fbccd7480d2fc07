"""The contract that the stages share: recipes, the run folder, receipts and the one error boundary."""

from pipeline.command import Made, command
from pipeline.error import UserError
from pipeline.load import load
from pipeline.recipe import Recipe
from pipeline.run import Run

__all__ = ["Made", "Recipe", "Run", "UserError", "command", "load"]
