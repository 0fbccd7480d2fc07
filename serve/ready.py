"""Say before minutes of training, not after, what `make serve` would stumble over:  python -m serve.ready RECIPE"""

from pipeline.command import boundary, recipe_of_arguments
from pipeline.run import Run
from serve import openwebui
from serve.api import refuse_taken_ports
from serve.asking.endpoint import with_environment
from serve.engines import vllm
from serve.running.session import refuse_second

if __name__ == "__main__":
    with boundary():
        recipe = with_environment(recipe_of_arguments("serve.ready", "Check the ports and make the environment"))
        refuse_second(Run(recipe.name))
        refuse_taken_ports(recipe)
        if recipe.serve.ui == "openwebui":
            openwebui.python()
        if recipe.serve.engine == "vllm":
            vllm.python()
