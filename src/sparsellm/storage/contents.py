"""Tells the files that sparsellm or ``save_pretrained`` wrote from others; only the former are ever replaced."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

from sparsellm.errors import StorageError
from sparsellm.inputs.json_input import read_object

STATE = ".sparsellm-run"  # the folder of a run's state
LISTED = ".sparsellm-files.json"  # names of files that were copied from the model and that is_known() does not cover

_WEIGHTS = re.compile(r"model([-.][\w-]+)?\.safetensors|pytorch_model([-.][\w-]+)?\.bin")
_PATTERNS = (
    _WEIGHTS,
    re.compile(r"(model|pytorch_model)([-.][\w-]+)?\.(safetensors|bin)\.index\.json"),
    re.compile(r"(LICENSE|LICENCE|NOTICE|COPYING|USE_POLICY)[\w.-]*"),
    re.compile(r"[\w-]+\.tiktoken"),
    re.compile(r"chat_template[\w-]*\.jinja"),
)
_NAMES = {
    *(
        "config.json",
        "generation_config.json",
        "pruning.json",
        "packed.json",
        "results.json",
        "recipe.yaml",
        "README.md",
        LISTED,
    ),
    *("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "chat_template.json"),
    *("vocab.json", "vocab.txt", "merges.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model"),
    *("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json"),
}
_TEMPLATES = "additional_chat_templates"  # the only folder that save_pretrained makes


def is_known(name: str) -> bool:
    """Whether sparsellm or ``save_pretrained`` writes files of this name."""
    return name in _NAMES or any(pattern.fullmatch(name) for pattern in _PATTERNS)


def foreign_entries(directory: Path, known: Iterable[str] = ()) -> list[str]:
    """Names in a directory that neither sparsellm nor ``save_pretrained`` wrote: other files, folders, and all links.

    Args:
        directory: of a checkpoint.
        known: further names of files that do not count as foreign.

    Raises:
        OSError: it cannot be read.
    """
    ours = {*known, *_listed(directory)}
    names = []
    for entry in os.scandir(directory):
        if entry.is_file(follow_symlinks=False):
            foreign = entry.name not in ours and not is_known(entry.name)
        elif entry.is_dir(follow_symlinks=False):
            foreign = entry.name != STATE and not (entry.name == _TEMPLATES and _only_templates(Path(entry.path)))
        else:
            foreign = True
        if foreign:
            names.append(entry.name)
    return sorted(names)


def unusual_files(directory: Path) -> list[str]:
    """Files in a directory for which :func:`is_known` is false; they are listed in :data:`LISTED`."""
    return sorted(
        entry.name
        for entry in os.scandir(directory)
        if entry.is_file(follow_symlinks=False) and not is_known(entry.name)
    )


def has_weights(directory: Path) -> bool:
    """Whether a directory has a config and weights, like a checkpoint."""
    return (directory / "config.json").is_file() and any(_WEIGHTS.fullmatch(name) for name in os.listdir(directory))


def _only_templates(folder: Path) -> bool:
    return all(entry.name.endswith(".jinja") and entry.is_file(follow_symlinks=False) for entry in os.scandir(folder))


def _listed(directory: Path) -> list[str]:
    """The names in the checkpoint's own list of copied files; empty if the list is absent or damaged."""
    path = directory / LISTED
    if path.is_symlink() or not path.is_file():
        return []
    try:
        names = read_object(path).get("files")
    except StorageError:
        return []
    return [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
