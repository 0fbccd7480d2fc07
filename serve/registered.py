"""Check that Ollama still holds the very model that was registered:  python -m serve.registered RECIPE"""

import logging

from pipeline import Run
from pipeline.command import boundary, recipe_of_arguments
from pipeline.error import UserError
from pipeline.run import Receipt
from serve.engines.ollama.server import OllamaServer

log = logging.getLogger("truetune")


def difference(receipt: Receipt, digests: dict[str, str]) -> str:
    """What the server lists otherwise than the receipt of the registration says, or nothing."""
    known, url = receipt.metrics["digest"], receipt.metrics["url"]
    for name in (receipt.metrics["tag"], receipt.metrics["latest"]):
        found = digests.get(name)
        if found != known:
            return f"{url} " + (f"has another {name} than was registered" if found else f"no longer has {name}")
    return ""


def registered(run: Run) -> None:
    """Compare what Ollama shows with the receipt, where the run is registered and its server answers.

    Raises:
        UserError: the server lists another model under the name.
    """
    receipt = run.find_receipt("register")
    if receipt is None:
        return
    with OllamaServer(receipt.metrics["url"]) as server:
        try:
            digests = server.digests()
        except UserError as error:
            log.warning("register: not checked, since %s", error)
            return
    if problem := difference(receipt, digests):
        raise UserError(f"register: {problem}: run 'make register RECIPE={run.name}' again")
    log.info("register: %s shows the digest of the receipt", receipt.metrics["url"])


if __name__ == "__main__":
    with boundary():
        registered(Run(recipe_of_arguments("serve.registered", "Check what was registered with Ollama").name))
