"""The contract that the stages share: recipes, the run folder, receipts and the one error boundary."""

from recipe.command import Made, command
from recipe.error import UserError
from recipe.load import load
from recipe.run import Run
from recipe.schema import Recipe

__all__ = ["Made", "Recipe", "Run", "UserError", "command", "load"]
