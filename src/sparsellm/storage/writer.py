"""Writing a checkpoint shard by shard, so that a block is on disk before the next one is read."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from sparsellm.errors import StorageError

# vLLM and transformers refuse a checkpoint whose config names a scheme that they do not know.
FOREIGN_CONFIG_KEYS = ("sparsity_config", "quantization_config", "compression_config")

# What stands beside the weights and belongs to the model. Python files are left behind: loading must run no code.
_COMPANIONS = ("*.json", "*.txt", "*.model", "*.jinja", "*.tiktoken", "LICENSE*", "NOTICE*")
_NOT_COMPANIONS = ("*.index.json", "pruning.json", "packed.json", "adapter_*")


class CheckpointWriter:
    """A directory that appears under its final name only when it is complete.

    Shards go to ``<out>.partial``; :meth:`finish` renames it. So a directory under the final name is a finished one.

    Args:
        out: the final directory.
        shards: how many shards will be written.
        overwrite: replace ``out`` if it exists and is not empty; the old one is kept until the new one is complete.
        need_bytes: room that the checkpoint will take.

    Raises:
        StorageError: ``out`` is not empty, cannot be written, or the disk is too full.
    """

    def __init__(self, out: Path, *, shards: int, overwrite: bool = False, need_bytes: int = 0) -> None:
        self.out = out.absolute()
        self.partial = self.out.with_name(self.out.name + ".partial")
        self._shards = shards
        self._weight_map: dict[str, str] = {}
        self._total_size = 0
        check_out(self.out, overwrite=overwrite, need_bytes=need_bytes)
        with _explained(self.partial):
            shutil.rmtree(self.partial, ignore_errors=True)
            self.partial.mkdir(parents=True)

    def write_shard(self, index: int, tensors: dict[str, Tensor]) -> None:
        """Writes shard ``index`` (from 0) and waits until it is on the disk.

        Raises:
            StorageError: the disk is full or the directory cannot be written.
        """
        name = f"model-{index + 1:05d}-of-{self._shards:05d}.safetensors"
        with _explained(self.partial):
            temporary = self.partial / f"{name}.tmp"
            # -0.0 + 0.0 is +0.0: the sign of a zero would cost packed formats and confuse bitwise comparison.
            ready = {key: (value + 0.0 if value.is_floating_point() else value) for key, value in tensors.items()}
            save_file({k: v.detach().to("cpu").contiguous() for k, v in ready.items()}, temporary, {"format": "pt"})
            _sync(temporary)
            os.replace(temporary, self.partial / name)
            _sync(self.partial)
        for key, value in tensors.items():
            self._weight_map[key] = name
            self._total_size += value.numel() * value.element_size()

    def write_json(self, name: str, content: Any) -> None:
        self.write_text(name, json.dumps(content, indent=2, ensure_ascii=False) + "\n")

    def write_text(self, name: str, content: str) -> None:
        with _explained(self.partial):
            (self.partial / name).write_text(content, encoding="utf-8")

    def copy_companions(self, source: Path) -> None:
        """Config, tokenizer, generation config and chat template of ``source``; see :data:`FOREIGN_CONFIG_KEYS`."""
        with _explained(self.partial):
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
        self.write_json(
            "model.safetensors.index.json",
            {"metadata": {"total_size": self._total_size}, "weight_map": dict(sorted(self._weight_map.items()))},
        )
        with _explained(self.out):
            for file in self.partial.iterdir():
                _sync(file)
            old = self.out.with_name(self.out.name + ".old")
            if self.out.exists():
                shutil.rmtree(old, ignore_errors=True)
                os.replace(self.out, old)
            os.replace(self.partial, self.out)
            _sync(self.out.parent)
            shutil.rmtree(old, ignore_errors=True)
        return self.out


def check_out(out: Path, *, overwrite: bool, need_bytes: int) -> None:
    """Refuses an output directory that cannot take the checkpoint, before any work is done.

    Raises:
        StorageError: the directory is not empty, cannot be written, or has too little room.
    """
    if out.exists() and not out.is_dir():
        raise StorageError(f"{out} is a file; name a directory")
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
    if free < need_bytes:
        raise StorageError(
            f"{out} needs {need_bytes / 1e9:.2f} GB and its disk has {free / 1e9:.2f} GB free; "
            "make room or name another directory"
        )


def _replaceable(out: Path) -> bool:
    """Overwriting deletes a directory: only one that looks like a checkpoint may go, never somebody's home."""
    return (out / "config.json").is_file()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _explained(path: Path) -> Any:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise StorageError(f"the disk of {path} is full; make room and run again") from error
        raise StorageError(f"cannot write {path}: {error.strerror or error}; name another directory") from error
    except Exception as error:  # safetensors reports a full disk as its own error type
        if "No space left" in str(error):
            raise StorageError(f"the disk of {path} is full; make room and run again") from error
        raise


def count_zeros(weight: Tensor) -> int:
    return int(weight.numel() - torch.count_nonzero(weight))
