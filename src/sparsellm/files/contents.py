"""Tells the files that sparsellm wrote into a checkpoint from all others; only the former are ever replaced.

A checkpoint lists its files with their digests in ``LIST``. What is not listed, or has changed since, is foreign.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from sparsellm.errors import StorageError, some
from sparsellm.files.files import (
    TORN,
    has_digest,
    keep_record,
    kept_record,
    locked,
    remove_torn,
    sha256,
    write_bytes,
)
from sparsepack.files import INDEX

LIST = "sparsellm-files.json"  # file → its SHA-256, and, after it was replaced, that of the file before it
# What commands write into a complete checkpoint.
LATER = ("results.json", "README.md", "report.html")

# A directory with one of them is a result, and has numbers.
_RECORDS = ("pruning.json", "packed.json")
WEIGHTS = re.compile(r"model(-\d{5}-of-\d{5})?\.safetensors")
# What the tokenizers of transformers read, and what else belongs to a model next to its config and weights.
COMPANIONS = re.compile(
    r"(generation|tokenizer|(pre|video_pre)?processor)_config\.json|(tokenizer|tekken|vocab|added_tokens|emoji)\.json|"
    r"special_tokens_map\.json|(vocab|merges|dict)\.txt|(tokenizer|tiktoken|spiece|spm|sentencepiece(\.bpe)?)\.model|"
    r"bpe\.codes|[\w-]+\.tiktoken|chat_template[\w-]*\.(jinja|json)|"
    r"additional_chat_templates/[^/]+\.jinja|"  # the only folder that save_pretrained makes
    r"(LICENSE|LICENCE|NOTICE|COPYING|USE_POLICY)([-_.][A-Z]\w*)?(\.(txt|md|rst))?"
)
_CHECKPOINT = re.compile(
    rf"{WEIGHTS.pattern}|model\.safetensors\.index\.json|{COMPANIONS.pattern}|{re.escape(LIST)}|"
    r"(config|pruning|packed|results|experts)\.json|recipe\.yaml|report\.html|README\.md"
)


def write_list(folder: Path, digests: Mapping[str, str]) -> None:
    """Lists all files of a complete checkpoint; ``digests`` has the SHA-256 of those where it is known. Raises
    StorageError if the list cannot be written, OSError if a file cannot be read."""
    files = {
        path.relative_to(folder).as_posix(): path
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    files.pop(LIST, None)
    keep_record(
        folder / LIST,
        {name: [digests.get(name) or sha256(path)] for name, path in files.items()},
    )


def listed_files(directory: Path) -> dict[str, list[str]] | None:
    """The files that sparsellm wrote into a checkpoint, with digests; None without a list, or if it is damaged."""
    path = directory / LIST
    return None if path.is_symlink() else kept_record(path, dict[str, list[str]])


def foreign_entries(directory: Path) -> list[str]:
    """Names that sparsellm did not write or that changed since, and links; OSError for what cannot be read."""
    known = listed_files(directory) or {}

    def ours(name: str, path: Path) -> bool:
        if name == LIST:
            return bool(known)
        return name in known and _digest_of(path) in known[name]

    others = _others(directory, ours)
    return [f"{name} (changed)" if name in known else name for name in others]


def is_intact(directory: Path) -> bool:
    """Whether a directory has the files in its list, with their digests, and no others."""
    listed = listed_files(directory)
    if listed is None:
        return False
    try:
        there = all((directory / name).is_file() for name in listed)
        return there and not foreign_entries(directory)
    except OSError:
        return False


def check_weights(directory: Path) -> None:
    """Raises StorageError, with the weight files that differ, if a result has other weights than those that its numbers
    are of. Whatever shows or keeps a number of a result calls this; see ``weights_difference``."""
    difference = weights_difference(directory)
    if difference is not None:
        raise StorageError(
            f"{difference}; put the old files back, or save the new model in a directory of its own"
        )


def weights_difference(directory: Path) -> str | None:
    """Which weight files of a result are not in its list, or have another digest, as a clause; None if none differ.

    A directory without the records of a result has no numbers, and nothing is compared. Names are compared before
    contents, and contents are read once in a process, as long as size and times of a file are the same."""
    if not any((directory / name).is_file() for name in _RECORDS):
        return None
    # In a snapshot of the hub all files are links.
    listed = kept_record(directory / LIST, dict[str, list[str]])
    if listed is None:
        return f"{directory} has no readable {LIST}, which shows whether its weights are those that its numbers are of"
    known = {name: listed[name] for name in listed if _is_weights(name)}
    there = {path.name: path for path in directory.iterdir() if _is_weights(path.name)}
    changed = [f"{name} (new)" for name in sorted(there.keys() - known.keys())]
    changed += [f"{name} (missing)" for name in sorted(known.keys() - there.keys())]
    if not changed:
        changed = [
            f"{name} (changed)"
            for name, path in sorted(there.items())
            if not _has_one_of(path, known[name])
        ]
    if not changed:
        return None
    return f"{directory} has other weights than those that its numbers are of: {some(changed, 3)}"


def _is_weights(name: str) -> bool:
    return name == INDEX or WEIGHTS.fullmatch(name) is not None


def _has_one_of(path: Path, digests: list[str]) -> bool:
    """Whether a file has one of these digests. A StorageError says that it cannot be read, or is a pipe or the like,
    which would be waited for."""
    if not path.is_file():
        raise StorageError(f"cannot read {path}: it is not an ordinary file")
    try:
        return _digest_of(path) in digests
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from None


def unknown_entries(directory: Path) -> list[str]:
    """Names in a directory without a list that no file of a checkpoint has; OSError if it cannot be read."""
    return _others(directory, lambda name, _: _CHECKPOINT.fullmatch(name) is not None)


def companions_of(model: Path, *more: str) -> dict[Path, str]:
    """The files that belong to a model next to its config and weights, such as its tokenizer and licence, and those
    named in ``more``; with their names in its directory, in order."""
    every = sorted([*model.iterdir(), *model.glob("additional_chat_templates/*")])
    names = {
        file: file.relative_to(model).as_posix() for file in every if file.is_file()
    }
    return {
        file: name
        for file, name in names.items()
        if COMPANIONS.fullmatch(name) or name in more
    }


def belongs_to(model: Path, file: Path) -> bool:
    """Whether a file resolves to a path inside the model's directory, or among the blobs of its hub snapshot."""
    home = Path(os.path.realpath(model))
    target = Path(os.path.realpath(file))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    return target.is_relative_to(home) or target.is_relative_to(blobs)


@contextlib.contextmanager
def changing(
    directory: str | os.PathLike[str],
) -> Iterator[Callable[[str, bytes], Path]]:
    """Gives the function that writes a small file into a directory, such as a complete checkpoint, and returns its
    path. The directory is locked meanwhile, and what killed processes were writing there is removed first.

    The file is complete or unchanged, and in the list of the checkpoint, if that has one. A link in its place is
    replaced and not followed. Raises StorageError if the directory cannot be written."""
    folder = Path(os.path.realpath(directory))

    def write(name: str, data: bytes) -> Path:
        path = folder / name
        known = listed_files(folder)
        if name in LATER and known is not None:
            digest = hashlib.sha256(data).hexdigest()
            there = [
                earlier
                for earlier in known.get(name, [])
                if earlier != digest and has_digest(path, earlier)
            ]
            # The list is first, so that no kill makes the file foreign.
            keep_record(folder / LIST, {**known, name: [digest, *there]})
        write_bytes(path, data)
        return path

    with locked(folder, wait=True):
        remove_torn(folder)
        yield write


def _others(directory: Path, ours: Callable[[str, Path], bool]) -> list[str]:
    """The names in a directory that are not ours. Ours are ordinary files for which ``ours(name, path)`` is true, those
    that a killed process was writing, and folders of both."""

    def known(path: Path, depth: int = 0) -> bool:
        if path.is_symlink():
            return False
        if path.is_dir():
            inside = list(path.iterdir()) if depth == 0 else []
            return bool(inside) and all(known(child, 1) for child in inside)
        torn = TORN.fullmatch(path.name) is not None
        return path.is_file() and (
            torn or ours(path.relative_to(directory).as_posix(), path)
        )

    return sorted(path.name for path in directory.iterdir() if not known(path))


def _digest_of(path: Path) -> str:
    """The SHA-256 of a file, as ``_digest``."""
    status = path.stat()
    return _digest(path, (status.st_size, status.st_mtime_ns, status.st_ctime_ns))


@lru_cache(maxsize=1 << 12)
def _digest(path: Path, stamp: tuple[int, ...]) -> str:
    """The SHA-256 of a file, read once in a process as long as its size and times are the same."""
    return sha256(path)
