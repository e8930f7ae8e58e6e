"""Reads a packed checkpoint as a dense one: each weight is unpacked when it is read."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sparsellm.errors import StorageError
from sparsellm.inputs.json_input import read_object
from sparsellm.storage.reader import CheckpointReader
from sparsepack.checkpoint import PackedTensors, is_packed
from sparsepack.errors import PackError


class PackedReader(CheckpointReader):
    """The tensors of a packed checkpoint, dense.

    Raises:
        StorageError: as :class:`~sparsepack.checkpoint.PackedTensors`.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        stored = {
            name: torch.empty(self.shape(name), dtype=self.dtype(name), device="meta") for name in super().__iter__()
        }
        with as_storage_error():
            self._packed = PackedTensors(directory, self.files, stored, super().get)
        self.entries = self._packed.entries
        for name, entry in self.entries.items():
            self._shapes[f"{name}.weight"] = entry.stored_shape
            self._dtypes[f"{name}.weight"] = entry.torch_dtype

    def __iter__(self) -> Iterator[str]:
        return (name for name in super().__iter__() if name not in self._packed.hidden)

    @property
    def bytes(self) -> int:
        """Size of the unpacked weights."""
        return sum(math.prod(self._shapes[name]) * self._dtypes[name].itemsize for name in self)

    def get(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or module not in self.entries:
            return super().get(name, device, dtype)
        with as_storage_error():
            return self._packed.dense(module).to(device, dtype)


def open_checkpoint(directory: Path) -> CheckpointReader:
    """A reader of a checkpoint, packed or not.

    Raises:
        StorageError: it cannot be read.
    """
    return PackedReader(directory) if is_packed(read_object(directory / "config.json")) else CheckpointReader(directory)


@contextmanager
def as_storage_error() -> Iterator[None]:
    """Turns errors of sparsepack into a StorageError."""
    try:
        yield
    except PackError as error:
        raise StorageError(str(error)) from None
