"""Models by the names that users type: what a wrong name is answered, and how messages name a model in the cache.

Imports no torch, so that a wrong path is refused at once."""

from __future__ import annotations

import difflib
import os
import re
from itertools import islice
from pathlib import Path

from sparsellm.errors import ModelError, one_line, shown

GIVE = "give a checkpoint directory, a hub id, a .gguf file, or 'demo'"
_MAY_BE_ON_HUB = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_MOST_ENTRIES = 1000  # entries of a directory, among which a similar name is looked for
# Directories of the cache, and the names by which the user asked for them
_typed: dict[str, str] = {}
# Ends of the names of errors that the hub's client, requests and httpx raise without a connection
_UNREACHABLE = re.compile(
    r"(Connect|Connection|Proxy|SSL|Timeout|Retry|Network|Protocol)(Error|Timeout)?$"
)


def is_gguf(model: str | os.PathLike[str]) -> bool:
    """Whether a model has the name of a GGUF file."""
    return os.fspath(model).lower().endswith(".gguf")


def check_name(model: str, argument: str = "model") -> None:
    """Raises ModelError for a name that is neither there nor a hub id; ``argument`` is what the message calls it."""
    try:
        path = Path(model).expanduser()
        there = os.path.lexists(path)
    except (RuntimeError, ValueError):
        return  # an unknown user after the ~, a NUL character: whoever opens it says so
    if model == "demo" or there:
        return
    if is_gguf(path):
        raise ModelError(
            f"{argument} {model}: there is no such file; {_similar(path) or 'give the path of a .gguf file'}"
        )
    if _MAY_BE_ON_HUB.fullmatch(model) is None:
        raise not_found(model, argument)


def not_found(model: str, argument: str, reason: str = "") -> ModelError:
    """The error for a model that is not a directory here, with the ``reason`` for which it is not on the hub either."""
    hint = _similar(Path(model)) or GIVE
    address = re.match(r"https?://huggingface\.co/([^/]+/[^/?#]+)", model)
    if address is not None:
        hint = f"write the id alone: {address[1]}"
    also = f", and {reason}" if reason else ""
    return ModelError(
        f"{argument} {shown(model)} not found: there is no such directory{also}; {hint}"
    )


def hub_reason(error: Exception) -> str:
    """A clause that says why something is not fetched from the hub, for an error of the hub's client."""
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    if isinstance(error, HFValidationError):
        return "it is not a valid hub id (owner/name)"
    if isinstance(error, GatedRepoError):
        return (
            "its owner grants access on the hub, to who has logged in (`hf auth login`)"
        )
    if isinstance(error, RepositoryNotFoundError):
        return "the hub has none of that name, or it is private (`hf auth login`)"
    unreachable = isinstance(error, LocalEntryNotFoundError | OfflineModeIsEnabled)
    for kind in type(error).__mro__:
        unreachable = unreachable or bool(_UNREACHABLE.search(kind.__name__))
    if unreachable and constants.HF_HUB_OFFLINE:
        return "the hub is not asked, because HF_HUB_OFFLINE is set"
    if unreachable:
        return "the hub cannot be reached"
    return f"the hub's client says: {one_line(error)[:120]}"


def remember(place: Path, typed: str) -> Path:
    """The directory of a model in a cache, after its path is noted under the name that the user typed."""
    _typed[str(place)] = typed
    return place


def as_typed(text: str) -> str:
    """A message in which directories of the cache have the names that the user typed."""
    for place, typed in _typed.items():
        text = text.replace(place, typed)
    return text


def _similar(path: Path) -> str:
    """A hint with a model whose name is like that of a path; empty if there is none next to it."""
    known = {}
    try:
        with os.scandir(path.expanduser().parent) as entries:
            for entry in islice(entries, _MOST_ENTRIES):
                is_model = is_gguf(entry.name)
                if is_model or os.path.isfile(os.path.join(entry.path, "config.json")):
                    known[entry.name] = str(path.with_name(entry.name))
    except (OSError, RuntimeError, ValueError):
        pass  # no such directory either
    if path.name == str(path):
        known["demo"] = "demo"
    close = difflib.get_close_matches(path.name, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {known[close[0]]!r}?"
    return ""
