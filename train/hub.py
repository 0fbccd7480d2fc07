"""The Hugging Face Hub: whether it answers at all, and what of a base is fetched from it."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline import Recipe, UserError

REACHED_SECONDS = 10

log = logging.getLogger("truetune")


def without_waiting(info: Callable[..., Any], name: str, revision: str | None) -> None:
    """Ask once for a repository by `info` of HfApi; without an answer no library tries again for half a minute."""
    import datasets
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError

    try:
        info(huggingface_hub.HfApi(), name, revision=revision, timeout=REACHED_SECONDS)
    except (HfHubHTTPError, ValueError):
        return  # it answered, or no repository can have that name; what is wrong is told when the files are asked for
    except Exception as error:  # of whichever HTTP library it uses
        log.info("the Hugging Face Hub is out of reach (%s), looking into the cache", type(error).__name__)
        huggingface_hub.constants.HF_HUB_OFFLINE = datasets.config.HF_HUB_OFFLINE = True


def fetched(base: str, fetch: Callable[[], str]) -> Path:
    """Where `fetch`, a download of huggingface_hub's, put what it brings of a base.

    Raises:
        UserError: there is no such model or file, or the Hub is out of reach and the cache lacks it.
    """
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return Path(fetch())
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"base {base!r} cannot be fetched from the Hugging Face Hub ({reason}): check the name and the network, "
            f"for gated models set HF_TOKEN, or use base_model: {Recipe.base_model}"
        ) from None
