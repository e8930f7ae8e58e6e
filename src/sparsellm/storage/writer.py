"""Writing a checkpoint shard by shard, so that a block is on disk before the next one is read."""

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
from sparsellm.storage.files import explained, replace_atomically, write_all
from sparsellm.storage.publish import publish
from sparsellm.storage.reader import CheckpointReader
from sparsellm.storage.resume import COMPANIONS, FOLDER, PRUNE, SWEEP, RunState, discard, locked
from sparsellm.storage.shard import TensorSource, write_shard

# vLLM and transformers refuse a checkpoint whose config names a scheme that they do not know.
FOREIGN_CONFIG_KEYS = ("sparsity_config", "quantization_config", "compression_config")

# What stands beside the weights and belongs to the model. Python files are left behind: loading must run no code.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_NOT_COMPANIONS = ("*.index.json", "pruning.json", "packed.json", "adapter_*", LISTED)


class CheckpointWriter:
    """A directory that appears under its final name only when it is complete.

    Shards go to ``<out>.partial``; :meth:`finish` renames it. So a directory under the final name is a finished one,
    and an unfinished one says which of its shards are done; see :class:`sparsellm.storage.resume.RunState`.

    Args:
        out: the final directory.
        shards: how many shards will be written.
        identity: all that the result depends on, so that a run that was cut short goes on only with the same.
        kind: of the run; only ``prune`` goes on with what it left, the others begin anew.
        overwrite: replace ``out`` if it exists and is not empty; the old one is kept until the new one is complete.
        restart: forget what an unfinished run, of any kind, has left.
        need_bytes: room that the whole checkpoint will take.
        follows: the writer of the first stage, if this is the second of the same run. It starts from all finished
            shards of the first and always anew; the first's are removed when the second's have the final name.

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
        else:  # which checked it, and keeps others away
            self.out, kind, restart = follows.out, SWEEP, follows._restart
            check_room(self.out, need_bytes, partial_of(self.out, second=True))
        self._restart: bool = restart
        self._follows, self._overwrite = follows, overwrite
        self.partial = partial_of(self.out, second=second)
        self._names = shard_names(shards)
        self.state = RunState(self.partial, identity, kind=kind, restart=restart, resumable=kind == PRUNE)
        later = partial_of(self.out, second=True)
        if restart and not second and (later / FOLDER).is_dir():
            with locked(later):
                discard(later)

    def __enter__(self) -> CheckpointWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.state.close()

    def finished(self, index: int) -> dict[str, Any] | None:
        """The facts of shard ``index`` if an earlier process finished it and its checksum still holds."""
        return self.state.finished(self._names[index])

    def path(self, index: int) -> Path:
        """The file of shard ``index``."""
        return self.partial / self._names[index]

    def write_shard(
        self, index: int, tensors: Mapping[str, TensorSource], facts: Mapping[str, Any] | None = None
    ) -> None:
        """Writes shard ``index`` (from 0) and waits until it is on the disk, then marks it as finished.

        Args:
            index: which.
            tensors: by name.
            facts: JSON values that :meth:`finished` will give back.

        Raises:
            StorageError: the disk is full or the directory cannot be written.
        """
        digest = replace_atomically(self.path(index), lambda file: write_shard(file, tensors))
        self.state.record(self._names[index], {**(facts or {}), "sha256": digest})

    def discard(self) -> None:
        """Removes what was written: a later stage holds all of it."""
        self.state.discard()

    def write_json(self, name: str, content: Any) -> None:
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        # A name that is no UTF-8, as one in the command line may be, stands there as JSON escapes it.
        self.write_text(name, text.encode("utf-8", "backslashreplace").decode("utf-8"))

    def write_text(self, name: str, content: str) -> None:
        replace_atomically(self.partial / name, lambda file: write_all(file, content.encode("utf-8")))

    def copy_companions(self, source: Path) -> list[str]:
        """Copies config, tokenizer, generation config and chat template of ``source``, a checkpoint directory.

        A file that is a link out of the model is left behind; in a snapshot of the hub, links lead to the blobs of the
        same repository, and those are of the model. The config is read and written anew in any case; see
        :data:`FOREIGN_CONFIG_KEYS`.

        Returns:
            The names of the files that were left behind.

        Raises:
            StorageError: one cannot be read or written, or the config is no JSON object.
        """
        files = sorted({file for pattern in _COMPANIONS for file in source.glob(pattern)})
        files = [file for file in files if file.is_file() and not any(file.match(other) for other in _NOT_COMPANIONS)]
        taken = [file for file in files if file.name != "config.json" and belongs_to(source, file)]
        # Recorded first: a process that goes on after a kill has to know that they are no stranger's.
        self.state.keep(COMPANIONS, {"files": [file.name for file in taken if not is_known(file.name)]})
        for file in taken:
            self._copy(file)
        self._write_config(source / "config.json")
        return [file.name for file in files if file.name != "config.json" and file not in taken]

    def clean_config(self) -> None:
        """Removes :data:`FOREIGN_CONFIG_KEYS` from the config that was written."""
        self._write_config(self.partial / "config.json")

    def finish(self) -> Path:
        """Writes the index and gives the directory its final name.

        Raises:
            StorageError: the disk is full, or there is something in ``out`` now that was not there before.
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
        check_replaceable(self.out, overwrite=self._overwrite)  # much may have happened since the run began
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
    """Whether a file of a model's directory is in it, or in the blobs that a snapshot of the hub consists of."""
    home, target = Path(os.path.realpath(model)), Path(os.path.realpath(file))
    folders = [home]
    if home.parent.name == "snapshots":
        folders.append(home.parent.parent / "blobs")
    return any(target.is_relative_to(folder) for folder in folders)


def count_zeros(weight: Tensor) -> int:
    return int(weight.numel() - torch.count_nonzero(weight))
