"""Writes a checkpoint shard by shard, so that a block is on disk before the next one is read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sparsellm import interrupts
from sparsellm.inputs.json_input import read_object
from sparsellm.storage.contents import LISTED, is_known, unusual_files
from sparsellm.storage.destination import check_destination, check_replaceable, check_room, partial_of
from sparsellm.storage.files import explained, locked, replace_atomically, write_all
from sparsellm.storage.publish import publish
from sparsellm.storage.reader import CheckpointReader
from sparsellm.storage.resume import COMPANIONS, FOLDER, PRUNE, SWEEP, RunState, discard
from sparsellm.storage.shard import TensorSource, write_shard

# Keys of compression schemes: vLLM and transformers refuse a config with a scheme that they do not support.
FOREIGN_CONFIG_KEYS = ("sparsity_config", "quantization_config", "compression_config")

# Files beside the weights that belong to the model. Python files are not copied: loading must run no code.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_NOT_COMPANIONS = ("*.index.json", "pruning.json", "packed.json", "results.json", "adapter_*", LISTED)


class CheckpointWriter:
    """A directory that appears under its final name only when it is complete.

    Shards go to ``<out>.partial``; :meth:`finish` renames it. So a directory under the final name is complete, and an
    unfinished one has records of its finished shards; see :class:`sparsellm.storage.resume.RunState`.

    Args:
        out: the final directory.
        shards: the number of shards.
        identity: everything that the result depends on; an unfinished run is only resumed with an equal one.
        kind: of the run. Only ``prune`` is resumed; runs of other kinds start again.
        overwrite: replace ``out`` if it exists and is not empty; the old one is kept until the new one is complete.
        restart: remove the files of an unfinished run of any kind.
        need_bytes: disk space of the whole checkpoint.
        follows: the writer of the first stage, if this is the second of the same run. The second stage needs all
            finished shards of the first, and always starts again. The first stage's shards are removed when the
            result has its final name.

    Raises:
        StorageError: ``out`` is not empty, cannot be written, or the disk is too full; or ``<out>.partial`` belongs to
            a run that differs.
    """

    def __init__(
        self,
        out: Path,
        *,
        shards: int,
        identity: dict[str, Any],
        kind: str = PRUNE,
        overwrite: bool = False,
        restart: bool = False,
        need_bytes: int = 0,
        follows: CheckpointWriter | None = None,
    ) -> None:
        second = follows is not None
        if follows is None:
            self.out = check_destination(out, overwrite=overwrite, restart=restart, kind=kind, need_bytes=need_bytes)
        else:  # the first stage has checked the directory and holds the lock
            self.out, kind, restart = follows.out, SWEEP, follows._restart
            check_room(self.out, need_bytes, partial_of(self.out, second=True))
        self._restart: bool = restart
        self._follows, self._overwrite = follows, overwrite
        self.partial = partial_of(self.out, second=second)
        self._names = shard_names(shards)
        self.state = RunState(self.partial, identity, kind=kind, restart=restart, resumable=kind == PRUNE)
        later = partial_of(self.out, second=True)
        if restart and not second and (later / FOLDER).is_dir():
            with locked(later / FOLDER):
                discard(later)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.state.close()

    def finished(self, index: int) -> dict[str, Any] | None:
        """The facts of shard ``index`` if an earlier process finished it and its checksum still matches; else None."""
        return self.state.finished(self._names[index])

    def path(self, index: int) -> Path:
        """The file of shard ``index``."""
        return self.partial / self._names[index]

    def write_shard(
        self, index: int, tensors: Mapping[str, TensorSource], facts: Mapping[str, Any] | None = None
    ) -> None:
        """Writes shard ``index`` (from 0), waits until it is on the disk, then marks it as finished.

        Args:
            index: of the shard.
            tensors: by name.
            facts: JSON values that :meth:`finished` will return.

        Raises:
            StorageError: the disk is full or the directory cannot be written.
        """
        digest = replace_atomically(self.path(index), lambda file: write_shard(file, tensors))
        self.state.record(self._names[index], {**(facts or {}), "sha256": digest})

    def discard(self) -> None:
        """Removes everything that was written; the later stage has copies."""
        self.state.discard()

    def write_json(self, name: str, content: Any) -> None:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        # A name that is no UTF-8, as one in the command line may be, stands there as JSON escapes it.
        self.write_text(name, text.encode("utf-8", "backslashreplace").decode("utf-8"))

    def write_text(self, name: str, content: str) -> None:
        replace_atomically(self.partial / name, lambda file: write_all(file, content.encode("utf-8")))

    def copy_companions(self, source: Path) -> list[str]:
        """Copies config, tokenizer, generation config and chat template of ``source``, a checkpoint directory.

        A link that leads out of the model's directory is not copied. In a snapshot of the hub, links lead to the blobs
        of the same repository, which belong to the model. The config is always read and written again; see
        :data:`FOREIGN_CONFIG_KEYS`.

        Returns:
            The names of the files that were not copied.

        Raises:
            StorageError: one cannot be read or written, or the config is no JSON object.
        """
        files = sorted({file for pattern in _COMPANIONS for file in source.glob(pattern)})
        files = [file for file in files if file.is_file() and not any(file.match(other) for other in _NOT_COMPANIONS)]
        taken = [file for file in files if file.name != "config.json" and belongs_to(source, file)]
        # Recorded first, so that a process that resumes after a kill does not take them for foreign files.
        self.state.keep(COMPANIONS, {"files": [file.name for file in taken if not is_known(file.name)]})
        for file in taken:
            self._copy(file)
        self._write_config(source / "config.json")
        return [file.name for file in files if file.name != "config.json" and file not in taken]

    def clean_config(self) -> None:
        """Removes :data:`FOREIGN_CONFIG_KEYS` from the written config."""
        self._write_config(self.partial / "config.json")

    def finish(self) -> Path:
        """Writes the index and renames the directory to its final name.

        Raises:
            StorageError: the disk is full, or files were added to ``out`` in the meantime.
        """
        sizes: dict[str, int] = {}
        weight_map: dict[str, str] = {}
        for name in self._names:
            reader = CheckpointReader(self.partial, [self.partial / name])
            for key in reader:
                weight_map[key] = name
                sizes[key] = reader.bytes_of(key)
        self.write_json(
            "model.safetensors.index.json",
            {"metadata": {"total_size": sum(sizes.values())}, "weight_map": dict(sorted(weight_map.items()))},
        )
        with explained(self.partial):
            unusual = unusual_files(self.partial)
        if unusual:
            self.write_json(LISTED, {"files": unusual})
        check_replaceable(self.out, overwrite=self._overwrite)  # it may have changed since the run began
        with interrupts.held():
            publish(self.partial, self.out)
            if self._follows is not None:
                self._follows.discard()
            self.state.discard()
        return self.out

    def _write_config(self, path: Path) -> None:
        config = read_object(path)
        for key in FOREIGN_CONFIG_KEYS:
            config.pop(key, None)
        self.write_json("config.json", config)

    def _copy(self, file: Path) -> None:
        def write(target: BinaryIO) -> None:
            with file.open("rb") as opened:
                shutil.copyfileobj(opened, target, 1 << 20)

        replace_atomically(self.partial / file.name, write)


def shard_names(shards: int) -> list[str]:
    """The file names of so many shards, in order."""
    return [f"model-{index + 1:05d}-of-{shards:05d}.safetensors" for index in range(shards)]


def belongs_to(model: Path, file: Path) -> bool:
    """Whether a file resolves to a path inside the model's directory, or among the blobs of its hub snapshot."""
    home, target = Path(os.path.realpath(model)), Path(os.path.realpath(file))
    folders = [home]
    if home.parent.name == "snapshots":
        folders.append(home.parent.parent / "blobs")
    return any(target.is_relative_to(folder) for folder in folders)


def count_zeros(weight: Tensor) -> int:
    return int(weight.numel() - torch.count_nonzero(weight))
