"""Writing a checkpoint shard by shard, so that a block is on disk before the next one is read."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsellm.errors import StorageError
from sparsellm.storage.files import explained, replace_atomically, sync
from sparsellm.storage.reader import CheckpointReader
from sparsellm.storage.resume import FOLDER, RUN, RunState, left_by, unfinished
from sparsellm.storage.shard import TensorSource, write_shard

# vLLM and transformers refuse a checkpoint whose config names a scheme that they do not know.
FOREIGN_CONFIG_KEYS = ("sparsity_config", "quantization_config", "compression_config")

# What stands beside the weights and belongs to the model. Python files are left behind: loading must run no code.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_NOT_COMPANIONS = ("*.index.json", "pruning.json", "packed.json", "adapter_*")

_REPLACED = "replaced"
_SECOND = ".swept"  # in the name of the directory of a second stage


class CheckpointWriter:
    """A directory that appears under its final name only when it is complete.

    Shards go to ``<out>.partial``; :meth:`finish` renames it. So a directory under the final name is a finished one,
    and an unfinished one says which of its shards are done; see :class:`sparsellm.storage.resume.RunState`.

    Args:
        out: the final directory.
        shards: how many shards will be written.
        identity: all that the result depends on, so that a run that was cut short goes on only with the same.
        overwrite: replace ``out`` if it exists and is not empty; the old one is kept until the new one is complete.
        restart: forget what an unfinished run has left.
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
        overwrite: bool = False,
        restart: bool = False,
        need_bytes: int = 0,
        follows: CheckpointWriter | None = None,
    ) -> None:
        self.out = out.absolute()
        self._follows = follows
        second = follows is not None
        self.partial = partial_of(self.out, second=second)
        self._names = shard_names(shards)
        check_out(self.out, overwrite=overwrite, need_bytes=need_bytes, second=second)
        self.state = RunState(self.partial, identity, restart=restart or second)
        later = partial_of(self.out, second=True)
        if restart and not second and unfinished(later):
            shutil.rmtree(later, ignore_errors=True)

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
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, content: str) -> None:
        with explained(self.partial):
            (self.partial / name).write_text(content, encoding="utf-8")

    def copy_companions(self, source: Path) -> None:
        """Config, tokenizer, generation config and chat template of ``source``; see :data:`FOREIGN_CONFIG_KEYS`."""
        with explained(self.partial):
            for pattern in _COMPANIONS:
                for file in source.glob(pattern):
                    if file.is_file() and not any(file.match(other) for other in _NOT_COMPANIONS):
                        shutil.copyfile(file, self.partial / file.name)
        self.clean_config()

    def clean_config(self) -> None:
        path = self.partial / "config.json"
        config = json.loads(path.read_text(encoding="utf-8"))
        for key in FOREIGN_CONFIG_KEYS:
            config.pop(key, None)
        self.write_json("config.json", config)

    def finish(self) -> Path:
        """Writes the index and gives the directory its final name."""
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
        with explained(self.out):
            for file in self.partial.iterdir():
                if file.is_file():
                    sync(file)
            sync(self.partial)
            if self.out.exists():
                # Kept beside the state, so that one and the same step ends the run and puts the old one away.
                shutil.rmtree(self.state.folder / _REPLACED, ignore_errors=True)
                os.replace(self.out, self.state.folder / _REPLACED)
            os.replace(self.partial, self.out)
            sync(self.out.parent)
            self.state.close()
            if self._follows is not None:
                self._follows.discard()
            shutil.rmtree(self.out / FOLDER, ignore_errors=True)
        return self.out


def partial_of(out: Path, *, second: bool = False) -> Path:
    """Where a checkpoint, or the second stage of it, is written until it is complete."""
    return out.absolute().with_name(f"{out.absolute().name}{_SECOND if second else ''}.partial")


def shard_names(shards: int) -> list[str]:
    """The file names of so many shards, in order."""
    return [f"model-{index + 1:05d}-of-{shards:05d}.safetensors" for index in range(shards)]


def check_out(out: Path, *, overwrite: bool, need_bytes: int, second: bool = False) -> None:
    """Refuses an output directory that cannot take the checkpoint, before any work is done.

    Args:
        out: the directory.
        overwrite: a checkpoint in it may be replaced.
        need_bytes: room for the whole; what an unfinished run has written already is taken off.
        second: of the second stage of a run.

    Raises:
        StorageError: the directory is not empty, cannot be written, or has too little room.
    """
    if out.exists() and not out.is_dir():
        raise StorageError(f"{out} is a file; name a directory")
    if (out / FOLDER / RUN).is_file():  # the last process was killed when it had given the directory its name
        if left_by(partial_of(out), out):
            shutil.rmtree(partial_of(out), ignore_errors=True)
        shutil.rmtree(out / FOLDER, ignore_errors=True)
    if out.is_dir() and any(out.iterdir()):
        if not overwrite:
            raise StorageError(f"{out} exists and is not empty; name another directory or give --overwrite")
        if not _replaceable(out):
            raise StorageError(f"{out} holds something other than a checkpoint; --overwrite replaces checkpoints only")
    parent = out.absolute().parent
    existing = next(folder for folder in (parent, *parent.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise StorageError(f"cannot write to {out}: {existing} is not a writable directory; name another directory")
    free = shutil.disk_usage(existing).free
    there = partial_of(out, second=second).glob("*.safetensors")
    need_bytes -= sum(shard.stat().st_size for shard in there)
    if free < need_bytes:
        raise StorageError(
            f"{out} needs {need_bytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
            "make room or name another directory"
        )


def _replaceable(out: Path) -> bool:
    """Overwriting deletes a directory: only one that looks like a checkpoint may go, never somebody's home."""
    return (out / "config.json").is_file()


def count_zeros(weight: Tensor) -> int:
    return int(weight.numel() - torch.count_nonzero(weight))
