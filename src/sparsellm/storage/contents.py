"""Tells the files that sparsellm or ``save_pretrained`` wrote from others; only the former are ever replaced."""

from __future__ import annotations

import os
import re
from pathlib import Path

from sparsellm.storage.files import TORN

_WEIGHTS = re.compile(r"model([-.][\w-]+)?\.safetensors|pytorch_model([-.][\w-]+)?\.bin")
# What the tokenizers of transformers read, and what else belongs to a model.
_COMPANIONS = re.compile(
    r"(generation|tokenizer|(pre|video_pre)?processor)_config\.json|(tokenizer|vocab|added_tokens|emoji)\.json|"
    r"special_tokens_map\.json|(vocab|merges|dict)\.txt|(tokenizer|spiece|spm|sentencepiece(\.bpe)?)\.model|"
    r"bpe\.codes|[\w-]+\.tiktoken|chat_template[\w-]*\.(jinja|json)|"
    r"(LICENSE|LICENCE|NOTICE|COPYING|USE_POLICY)[\w.-]*"
)
_OURS = re.compile(
    rf"({_WEIGHTS.pattern})(\.index\.json)?|{_COMPANIONS.pattern}|{TORN.pattern}|"
    r"(config|pruning|packed|results)\.json|recipe\.yaml|report\.html|README\.md"
)
_TEMPLATES = "additional_chat_templates"  # the only folder that save_pretrained makes


def is_companion(name: str) -> bool:
    """Whether a file of this name belongs to a model next to its config and weights, such as those of a tokenizer."""
    return _COMPANIONS.fullmatch(name) is not None


def foreign_entries(directory: Path) -> list[str]:
    """Names in a directory that neither sparsellm nor ``save_pretrained`` wrote: other files, folders, and all links.
    Raises OSError if the directory cannot be read."""
    names = []
    for entry in os.scandir(directory):
        if entry.is_file(follow_symlinks=False):
            ours = _OURS.fullmatch(entry.name) is not None
        else:
            ours = entry.name == _TEMPLATES and entry.is_dir(follow_symlinks=False)
            ours = ours and all(
                x.name.endswith(".jinja") and x.is_file(follow_symlinks=False) for x in os.scandir(entry)
            )
        if not ours:
            names.append(entry.name)
    return sorted(names)


def checkpoint_files(directory: Path) -> tuple[list[str], list[str]]:
    """The files that belong to a checkpoint, relative to its directory, and the names of everything else there. Raises
    OSError if the directory cannot be read."""
    other = [*foreign_entries(directory), *(path.name for path in directory.iterdir() if TORN.fullmatch(path.name))]
    paths = [path.relative_to(directory) for path in directory.rglob("*") if path.is_file()]
    return sorted(path.as_posix() for path in paths if path.parts[0] not in other), other


def has_weights(directory: Path) -> bool:
    """Whether a directory has a config and weights, like a checkpoint."""
    return (directory / "config.json").is_file() and any(_WEIGHTS.fullmatch(name) for name in os.listdir(directory))
