"""Storage for data that grows with the calibration tokens: in memory up to a budget, then in unnamed files."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsellm.storage.files import explained, write_all
from sparsellm.storage.reader import memory_of


class Room:
    """A number of bytes of memory, of which users reserve parts; None for no limit."""

    def __init__(self, memory: int | None = None) -> None:
        self._left = math.inf if memory is None else memory

    def take(self, size: int) -> bool:
        """Reserves ``size`` bytes; returns False if there is no room for them."""
        fits = size <= self._left
        self._left -= size if fits else 0
        return fits

    def give_back(self, size: int) -> None:
        self._left += size


class Scratch(Room):
    """Storage for batches of tensors: up to ``memory`` bytes in memory, shared by all stores, the rest on disk.

    Files have no name, so the system frees them when the process ends, even if killed. They are read and written, not
    mapped: a full disk is then an error instead of a signal, and cached pages do not count as this process's memory.
    ``spare`` is a second budget, in bytes, for tensors that only save time. A budget of None has no limit; a
    ``directory`` of None is the system's temporary one.
    """

    def __init__(self, memory: int | None = None, directory: Path | None = None, spare: int | None = None) -> None:
        super().__init__(memory)
        self.directory = directory or Path(tempfile.gettempdir())
        self.spare = Room(spare)

    def store(self, device: torch.device | str = "cpu") -> TensorStore:
        """An empty list of tensors, which are moved to ``device`` when they are read."""
        return TensorStore(self, torch.device(device))


@dataclass(frozen=True)
class _Slot:
    """The place of a tensor in the file."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype

    @property
    def bytes(self) -> int:
        return self.shape.numel() * self.dtype.itemsize


class TensorStore(Sequence[Tensor]):
    """A list of tensors, each in memory (on the CPU), or in a file if :class:`Scratch` has no room.

    An item is read as a tensor on the store's device, without gradients; to change it, assign it. Closing the store, or
    the end of its ``with`` block, frees its room.
    """

    def __init__(self, scratch: Scratch, device: torch.device) -> None:
        self._scratch, self._device = scratch, device
        self._items: list[Tensor | _Slot] = []
        self._file: io.FileIO | None = None
        self._end = 0  # end of the file

    def append(self, value: Tensor) -> None:
        """Adds a tensor at the end. Raises StorageError if the disk is full."""
        self._items.append(self._keep(value, None))

    def __setitem__(self, index: int, value: Tensor) -> None:
        old = self._items[index]
        if isinstance(old, Tensor):
            self._scratch.give_back(old.nbytes)
        self._items[index] = self._keep(value, old if isinstance(old, _Slot) else None)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # no slices
        item = self._items[index]
        if isinstance(item, Tensor):
            return item.to(self._device)
        assert self._file is not None
        value = torch.empty(item.shape, dtype=item.dtype)
        self._file.seek(item.offset)
        rest = memory_of(value)
        while rest:  # one call reads 2 GiB at most
            rest = rest[self._file.readinto(rest) :]
        return value.to(self._device)

    def __len__(self) -> int:
        return len(self._items)

    @property
    def bytes_on_disk(self) -> int:
        """Bytes of the tensors in the file."""
        return sum(item.bytes for item in self._items if isinstance(item, _Slot))

    def close(self) -> None:
        """Drops all tensors and frees their room."""
        self._scratch.give_back(sum(item.nbytes for item in self._items if isinstance(item, Tensor)))
        self._items.clear()
        if self._file is not None:
            self._file.close()
            self._file, self._end = None, 0

    def __enter__(self) -> TensorStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _keep(self, value: Tensor, slot: _Slot | None) -> Tensor | _Slot:
        """Stores a tensor: in its slot if it fits, else in memory if there is room, else at the end of the file."""
        value = value.detach()
        fits = slot is not None and slot.bytes == value.nbytes
        if not fits and self._scratch.take(value.nbytes):
            value = value.to("cpu")
            # A view would keep its base tensor in memory.
            return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
        offset = slot.offset if slot is not None and fits else self._end
        with explained(self._scratch.directory):
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self._scratch.directory, buffering=0)  # noqa: SIM115
            self._file.seek(offset)
            write_all(self._file, memory_of(value.to("cpu").contiguous()))
        self._end = max(self._end, offset + value.nbytes)
        return _Slot(offset, value.shape, value.dtype)
