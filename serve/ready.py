"""Say that the port is taken before minutes of training, not after:  python -m serve.ready RECIPE"""

from recipe import Run
from recipe.command import boundary, recipe_of_arguments
from serve.api import refuse_taken_port
from serve.endpoint import port_of_environment

if __name__ == "__main__":
    with boundary():
        recipe = recipe_of_arguments("serve.ready", "Check that the port of the server is free")
        refuse_taken_port(Run(recipe.name), port_of_environment(recipe.serve.port))
