"""The licence that a backbone's authors state on its model card."""

from __future__ import annotations

from pathlib import Path

import yaml
from huggingface_hub import hf_hub_download, metadata_load

CARD = "README.md"
PATIENCE = 5.0  # seconds for an answer of the Hub; a licence is not worth a longer wait


def license_in(folder: Path) -> str | None:
    """The licence named by the card in ``folder``: its name, or where the authors wrote one of their own, that one's name
    or link. None where there is no card, or none is stated."""
    try:
        stated = metadata_load(folder / CARD) or {}
    except (OSError, ValueError, yaml.YAMLError):  # no card, or one that the Hub would not read either
        return None
    if stated.get("license") == "other":
        return stated.get("license_name") or stated.get("license_link") or "other"
    found = stated.get("license")
    return ", ".join(map(str, found)) if isinstance(found, list) else found


def license_on_hub(repository: str, revision: str | None) -> str | None:
    """The same of a repository on the Hub, whose card is fetched unless it is in the cache."""
    try:
        card = hf_hub_download(repository, CARD, revision=revision, etag_timeout=PATIENCE)
    except (OSError, ValueError):  # the client's errors for no such file, no network, offline mode
        return None
    return license_in(Path(card).parent)
