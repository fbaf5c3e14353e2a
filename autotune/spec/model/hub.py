"""A model's config.json by its Hub id: from the Hub's cache on this machine, or downloaded.

The cache is read by its layout, so a cached model needs no package and no network:
``models--ORG--NAME/refs/main`` names a revision, ``snapshots/REVISION/config.json`` is the file
(huggingface_hub, "Manage huggingface_hub cache-system").
"""

from __future__ import annotations

import os
import re
import socket
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import getproxies

from autotune.errors import AutotuneError

# `validate_repo_id` of huggingface_hub, with the organisation that a model's id has today.
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_OFFLINE = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")


def is_hub_id(name: str) -> bool:
    """Say whether `name` has the form ORG/NAME."""
    return _HUB_ID.fullmatch(name) is not None


def cache_folder() -> Path:
    """Return the Hub's cache, where the environment variables of huggingface_hub put it."""
    if given := os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE"):
        return Path(given).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    home = os.environ.get("HF_HOME") or f"{base}/huggingface"
    return Path(home).expanduser() / "hub"


def find_config(hub_id: str) -> Path:
    """Return the path of the config.json of a Hub id's default revision.

    Raises:
        AutotuneError: it is not cached and cannot be downloaded.
    """
    return _cached(hub_id) or _download(hub_id)


def _cached(hub_id: str) -> Path | None:
    repository = cache_folder() / f"models--{hub_id.replace('/', '--')}"
    try:
        revision = (repository / "refs" / "main").read_text(encoding="utf-8").strip()
    except OSError:
        return None
    config = repository / "snapshots" / revision / "config.json"
    return config if config.is_file() else None


def _download(hub_id: str) -> Path:
    where = f"{hub_id} is neither a folder here nor in the catalogue nor in {cache_folder()}"
    if any(os.environ.get(name, "").upper() in ("1", "ON", "YES", "TRUE") for name in _OFFLINE):
        raise AutotuneError(
            f"{where}, and {' or '.join(_OFFLINE)} forbids a download. Give a local folder, or "
            "download it where there is a network."
        )
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import (
            EntryNotFoundError,
            GatedRepoError,
            HfHubHTTPError,
            LocalEntryNotFoundError,
            RepositoryNotFoundError,
        )
    except ImportError as error:
        raise AutotuneError(
            f"{where}, and downloading needs huggingface_hub: pip install huggingface_hub (or "
            "'autotune-llm[train]'). Or give a local folder with a config.json."
        ) from error
    unreachable = (
        f"{where}, and the Hub cannot be reached. Check the network, or give a local folder with a "
        "config.json."
    )
    if not _resolves():
        raise AutotuneError(unreachable)
    try:
        return Path(hf_hub_download(hub_id, "config.json", cache_dir=cache_folder()))
    except GatedRepoError as error:
        raise AutotuneError(
            f"{hub_id} is gated: accept its terms at https://huggingface.co/{hub_id} and log in "
            "(`hf auth login` or HF_TOKEN), or give a local folder."
        ) from error
    except RepositoryNotFoundError as error:
        raise AutotuneError(
            f"The Hub has no model {hub_id}, or it is private and you are not logged in (`hf auth "
            "login` or HF_TOKEN). Check the id, or give a local folder."
        ) from error
    except LocalEntryNotFoundError as error:  # also an EntryNotFoundError: no connection
        raise AutotuneError(unreachable) from error
    except EntryNotFoundError as error:
        raise AutotuneError(
            f"The repository {hub_id} has no config.json: it holds no transformers model."
        ) from error
    except (HfHubHTTPError, OSError, ValueError) as error:
        first = (str(error).splitlines() or [type(error).__name__])[0]
        raise AutotuneError(
            f"{where}, and its config.json cannot be downloaded: {first} Give a local folder."
        ) from error


def _resolves() -> bool:
    """Say whether the Hub's name resolves: without a network its client would retry for 30 s."""
    host = urlsplit(os.environ.get("HF_ENDPOINT") or "https://huggingface.co").hostname
    if getproxies():  # the proxy resolves names
        return True
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        return False
    return True
