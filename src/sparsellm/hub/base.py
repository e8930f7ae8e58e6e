"""What is known of the dense model on the hub: its id, and the license that its own card states."""

from __future__ import annotations

import re
from pathlib import Path

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_LICENSE = ("license", "license_name", "license_link")  # what a card states of the license
_MOST_CHARACTERS, _MOST_BYTES = 300, 1 << 20  # a value and a card; a hundred times the usual sizes


def base_of(model: object, directory: Path | None) -> dict[str, str]:
    """The hub id of a dense model as ``model``, and its license; empty where nothing is known.

    Args:
        model: as the user named it, or a transformers model.
        directory: its checkpoint; None for a model that was given as an object.
    """
    name = getattr(model, "name_or_path", "") if directory is None else str(model)
    known = _hub_id(str(name), directory)
    return {**({"model": known} if known else {}), **(_license(directory / "README.md") if directory else {})}


def _hub_id(name: str, directory: Path | None) -> str | None:
    """The id that a name is, or that the hub's cache says of a directory; None for a path that exists."""
    snapshot = directory is not None and directory.parent.name == "snapshots"
    if directory is not None and snapshot and directory.parents[1].name.startswith("models--"):
        name = directory.parents[1].name.removeprefix("models--").replace("--", "/")
        return name if HUB_ID.fullmatch(name) else None
    return name if HUB_ID.fullmatch(name) and not Path(name).exists() else None


def _license(card: Path) -> dict[str, str]:
    """The license in the front matter of a card; a card that cannot be read states none."""
    from huggingface_hub import metadata_load

    try:
        values = (metadata_load(card) if card.stat().st_size <= _MOST_BYTES else None) or {}
    except Exception:  # it belongs to somebody else and does not stop the run
        return {}
    stated = {key: values.get(key) for key in _LICENSE}
    return {
        key: value
        for key, value in stated.items()
        if isinstance(value, str) and 0 < len(value.strip()) <= _MOST_CHARACTERS
    }
