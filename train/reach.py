"""Whether the Hugging Face Hub answers: where it does not, its libraries look into their cache at once."""

import logging
from collections.abc import Callable
from typing import Any

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
