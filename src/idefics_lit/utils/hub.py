"""Without a network, use what was downloaded from the Hub before."""

import sys
from functools import cache
from pathlib import Path

from huggingface_hub import constants, get_session

CONNECTION_SECONDS = 5


def prepare_hub(name: str) -> None:
    """Turn on the offline mode of the Hub's libraries if a name isn't a local path and the Hub can't be reached.

    They would repeat each request for each file, which takes minutes, before they look into their cache.

    Args:
        name: a Hub id or a local path.
    """
    if not Path(name).exists() and not constants.is_offline_mode() and not _is_reachable():
        constants.HF_HUB_OFFLINE = True
        if "datasets" in sys.modules:  # has read the constant
            sys.modules["datasets"].config.HF_HUB_OFFLINE = True


@cache
def _is_reachable() -> bool:
    try:
        get_session().head(constants.ENDPOINT, timeout=CONNECTION_SECONDS)
    except Exception:  # of the client that this version of the Hub's library uses
        return False
    return True
