"""Writes a checkpoint shard by shard, so that a block is on disk before the next one is read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from sparsellm.inputs import read_object
from sparsellm.storage.contents import LISTED, is_known, unusual_files
from sparsellm.storage.directory import WorkingDirectory
from sparsellm.storage.files import explained, replace_atomically, write_bytes
from sparsellm.storage.reader import CheckpointReader
from sparsellm.storage.shard import TensorSource, write_shard
from sparsellm.storage.state import BLOCKS

# Keys of compression schemes: vLLM and transformers refuse a config with a scheme that they do not support.
FOREIGN_CONFIG_KEYS = ("sparsity_config", "quantization_config", "compression_config")

# Files next to the weights that belong to the model. Python files are not copied: loading must run no code.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_NOT_COMPANIONS = ("*.index.json", "pruning.json", "packed.json", "results.json", "adapter_*", LISTED)


class CheckpointWriter:
    """A checkpoint in the making: the files in one folder of a working directory.

    Args:
        work: the working directory.
        shards: the number of shards.
        folder: ``BLOCKS``, or ``SWEPT`` for the checkpoint that replaces that one after a sweep.
    """

    def __init__(self, work: WorkingDirectory, shards: int, folder: str = BLOCKS) -> None:
        self.work = work
        self.folder = work.folder(folder)
        self.shards = [self.folder / name for name in shard_names(shards)]

    def write_shard(self, index: int, tensors: Mapping[str, TensorSource]) -> str:
        """Writes a shard, waits until it is on the disk, and returns the file's SHA-256.

        Raises:
            StorageError: the disk is full or the directory cannot be written.
        """
        return replace_atomically(self.shards[index], partial(write_shard, tensors=tensors))

    def write_json(self, name: str, content: Any) -> None:
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, content: str) -> None:
        # A name that is not UTF-8, such as one in the command line, is written as JSON escapes it.
        write_bytes(self.folder / name, content.encode("utf-8", "backslashreplace"))

    def copy_companions(self, source: Path) -> list[str]:
        """Copies config, tokenizer, generation config and chat template of ``source``, a checkpoint directory.

        A link that leads out of the model's directory is not copied. In a snapshot of the hub, links lead to the blobs
        of the same repository, which belong to the model.

        Returns:
            The names of the files that were not copied.

        Raises:
            StorageError: one cannot be read or written, or the config is not a JSON object.
        """
        files = sorted({file for pattern in _COMPANIONS for file in source.glob(pattern)} - {source / "config.json"})
        files = [file for file in files if file.is_file() and not any(file.match(other) for other in _NOT_COMPANIONS)]
        taken = [file for file in files if belongs_to(source, file)]
        # Listed first, so that a process that resumes after a kill does not take them for foreign files.
        self._list([file.name for file in taken if not is_known(file.name)])
        for file in taken:
            replace_atomically(self.folder / file.name, partial(_copy, file))
        self._write_config(source / "config.json")
        return [file.name for file in files if file not in taken]

    def clean_config(self) -> None:
        """Removes :data:`FOREIGN_CONFIG_KEYS` from the written config."""
        self._write_config(self.folder / "config.json")

    def finish(self) -> Path:
        """Writes the index, and gives the checkpoint its final name.

        Raises:
            StorageError: the disk is full, or files were added to the final directory in the meantime.
        """
        reader = CheckpointReader(self.folder, self.shards)
        weight_map = {key: reader.file_of(key).name for key in sorted(reader)}
        index = {"metadata": {"total_size": reader.bytes}, "weight_map": weight_map}
        self.write_json("model.safetensors.index.json", index)
        with explained(self.folder):
            self._list(unusual_files(self.folder))
        self.work.publish(self.folder)
        return self.work.out

    def _list(self, names: list[str]) -> None:
        if names:
            self.write_json(LISTED, {"files": names})

    def _write_config(self, path: Path) -> None:
        config = read_object(path)
        self.write_json("config.json", {key: value for key, value in config.items() if key not in FOREIGN_CONFIG_KEYS})


def _copy(file: Path, target: BinaryIO) -> None:
    with file.open("rb") as opened:
        shutil.copyfileobj(opened, target, 1 << 20)


def shard_names(shards: int) -> list[str]:
    """The file names of a checkpoint's shards, in order."""
    return [f"model-{index + 1:05d}-of-{shards:05d}.safetensors" for index in range(shards)]


def belongs_to(model: Path, file: Path) -> bool:
    """Whether a file resolves to a path inside the model's directory, or among the blobs of its hub snapshot."""
    home, target = Path(os.path.realpath(model)), Path(os.path.realpath(file))
    blobs = home.parent.parent / "blobs" if home.parent.name == "snapshots" else home
    return target.is_relative_to(home) or target.is_relative_to(blobs)


def count_zeros(weight: Tensor) -> int:
    return int(weight.numel() - torch.count_nonzero(weight))
