"""Tells the files that sparsellm or ``save_pretrained`` wrote from others; only the former are ever replaced."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sparsellm.errors import StorageError
from sparsellm.inputs import read_object

LISTED = ".sparsellm-files.json"  # names of files that were copied from the model and that is_known() does not cover

_WEIGHTS = re.compile(r"model([-.][\w-]+)?\.safetensors|pytorch_model([-.][\w-]+)?\.bin")
_KNOWN = re.compile(
    rf"{_WEIGHTS.pattern}|(model|pytorch_model)([-.][\w-]+)?\.(safetensors|bin)\.index\.json|"
    r"(LICENSE|LICENCE|NOTICE|COPYING|USE_POLICY)[\w.-]*|[\w-]+\.tiktoken|chat_template[\w-]*\.jinja"
)
_NAMES = {
    *("config.json", "generation_config.json", "pruning.json", "packed.json", "results.json", "recipe.yaml"),
    *("report.html", "README.md", LISTED),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
}
_TEMPLATES = "additional_chat_templates"  # the only folder that save_pretrained makes


def is_known(name: str) -> bool:
    """Whether sparsellm or ``save_pretrained`` writes files of this name."""
    return name in _NAMES or _KNOWN.fullmatch(name) is not None


def foreign_entries(directory: Path) -> list[str]:
    """Names in a directory that neither sparsellm nor ``save_pretrained`` wrote: other files, folders, and all links.

    Raises:
        OSError: the directory cannot be read.
    """
    listed = _listed(directory)
    names = []
    for entry in os.scandir(directory):
        if entry.is_file(follow_symlinks=False):
            ours = entry.name in listed or is_known(entry.name)
        else:
            ours = entry.name == _TEMPLATES and entry.is_dir(follow_symlinks=False) and _only_templates(entry.path)
        if not ours:
            names.append(entry.name)
    return sorted(names)


def checkpoint_files(directory: Path) -> tuple[list[str], list[str]]:
    """The files that belong to a checkpoint, relative to its directory, and the names of everything else there.

    Hidden files are state and no part of the checkpoint; links are never part of it.

    Raises:
        OSError: the directory cannot be read.
    """
    other = {*foreign_entries(directory), *(name for name in os.listdir(directory) if name[0] == ".")}
    files = [
        path.relative_to(directory).as_posix()
        for path in directory.rglob("*")
        if path.relative_to(directory).parts[0] not in other and path.is_file()
    ]
    return sorted(files), sorted(other)


def unusual_files(directory: Path) -> list[str]:
    """Files in a directory for which :func:`is_known` is false; they are listed in :data:`LISTED`."""
    entries = (entry for entry in os.scandir(directory) if entry.is_file(follow_symlinks=False))
    return sorted(entry.name for entry in entries if not is_known(entry.name))


def has_weights(directory: Path) -> bool:
    """Whether a directory has a config and weights, like a checkpoint."""
    return (directory / "config.json").is_file() and any(_WEIGHTS.fullmatch(name) for name in os.listdir(directory))


def some(names: list[str]) -> str:
    """The first five of a list of names, and the number of the others, as text."""
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _only_templates(folder: str) -> bool:
    return all(entry.name.endswith(".jinja") and entry.is_file(follow_symlinks=False) for entry in os.scandir(folder))


def _listed(directory: Path) -> list[str]:
    """The names in the checkpoint's own list of copied files; empty if the list is absent or damaged."""
    path = directory / LISTED
    try:
        names = read_object(path).get("files") if not path.is_symlink() else None
    except StorageError:
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
