"""Storage for data that grows with the calibration tokens: on the GPU and in memory up to budgets, then in files."""

from __future__ import annotations

import io
import math
import tempfile
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsellm import machine
from sparsellm.files.files import explained, write_all
from sparsellm.files.reader import memory_of

SMALL = 1 << 20  # bytes of pinned memory that are not divided further


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


class Scratch:
    """Storage for batches of tensors: on the device where they are read, if that is not the CPU, as far as
    ``on_device`` has room, then in memory as far as ``memory`` has, both shared by all stores; the rest is on disk.

    Files have no name, so the system frees them when the process ends, even if killed. They are read and written, not
    mapped: a full disk is then an error instead of a signal, and cached pages do not count as this process's memory.
    If ``memory`` is None, it has no limit. If ``directory`` is None, files lie in the system's directory for temporary
    files. If ``on_device`` is None, the device has no room.

    Attributes:
        on_disk: the most bytes that were in files at any time.
    """

    def __init__(
        self,
        memory: Room | None = None,
        directory: Path | None = None,
        on_device: Room | None = None,
    ) -> None:
        self.directory = directory or Path(tempfile.gettempdir())
        self.memory = memory or Room()
        self.on_device = on_device or Room(0)
        self.pins = True  # until the system refuses to pin memory
        self.on_disk = 0
        self._in_files = 0

    def store(self, device: torch.device | str = "cpu") -> TensorStore:
        """An empty list of tensors, which are moved to ``device`` when they are read."""
        return TensorStore(self, torch.device(device))

    def count_file(self, size: int) -> None:
        """Notes that files grew by ``size`` bytes, or shrank by as many if it is negative."""
        self._in_files += size
        self.on_disk = max(self.on_disk, self._in_files)


@dataclass(frozen=True)
class _Slot:
    """The place of a tensor in the file."""

    offset: int
    shape: torch.Size
    dtype: torch.dtype


class _Pinned:
    """A tensor in pinned memory, next to a GPU that computes.

    All copies run on one ``stream``, one after the other, so what is read has been written; the stream of the
    computation waits for those that it reads. Tensors of the device keep their memory until their copies have ended."""

    def __init__(
        self, value: Tensor, parts: list[Tensor], stream: torch.cuda.Stream
    ) -> None:
        self.nbytes = value.nbytes
        self._parts = parts
        self._stream = stream
        self._coming: tuple[Tensor, torch.cuda.Event] | None = None
        self.write(value)

    def write(self, value: Tensor) -> None:
        """Copies a tensor from the device, of the same number of bytes; it must not change afterwards."""
        self.shape = value.shape
        self.dtype = value.dtype
        self._coming = None
        self._copy(value.contiguous(), to_host=True)

    def expect(self, device: torch.device) -> None:
        """Begins to copy the tensor to the device."""
        if self._coming is None:
            value = torch.empty(self.shape, dtype=self.dtype, device=device)
            self._copy(value, to_host=False)
            self._coming = value, self._stream.record_event()

    def read(self, device: torch.device) -> Tensor:
        """A copy on the device."""
        self.expect(device)
        assert self._coming is not None
        (value, arrived) = self._coming
        self._coming = None
        torch.cuda.current_stream(device).wait_event(arrived)
        return value

    def _copy(self, value: Tensor, *, to_host: bool) -> None:
        # The computation writes the value, or has just used its memory.
        self._stream.wait_stream(torch.cuda.current_stream(value.device))
        with torch.cuda.stream(self._stream):
            pieces = (
                value.reshape(-1)
                .view(torch.uint8)
                .split([len(part) for part in self._parts])
            )
            for part, piece in zip(self._parts, pieces, strict=True):
                target, source = (part, piece) if to_host else (piece, part)
                target.copy_(source, non_blocking=True)
        value.record_stream(self._stream)


def powers(size: int) -> list[int]:
    """Powers of two that add up to ``size``, and what is left below ``SMALL``: torch pins no others."""
    large = [
        1 << bit
        for bit in reversed(range(size.bit_length()))
        if size >> bit & 1 and 1 << bit >= SMALL
    ]
    return [*large, size - sum(large)] if size > sum(large) else large


class TensorStore(Sequence[Tensor], AbstractContextManager["TensorStore"]):
    """A list of tensors, each on the store's device, in memory, or in a file, where ``Scratch`` has room.

    An item is read as a tensor on the store's device, without gradients; to change it, assign it. Closing the store, or
    the end of its ``with`` block, frees its room."""

    def __init__(self, scratch: Scratch, device: torch.device) -> None:
        self._scratch = scratch
        self._device = device
        # copies between pinned memory and the device
        self._stream: torch.cuda.Stream | None = None
        self._items: list[Tensor | _Pinned | _Slot] = []
        self._file: io.FileIO | None = None
        self._end = 0  # end of the file

    def append(self, value: Tensor) -> None:
        """Adds a tensor at the end. Raises StorageError if the disk is full."""
        self._items.append(self._keep(value, None))

    def __setitem__(self, index: int, value: Tensor) -> None:
        old = self._items[index]
        if (
            isinstance(old, _Pinned)
            and old.nbytes == value.nbytes
            and value.device.type == "cuda"
        ):
            old.write(value.detach())
            return
        self._free(old)
        self._items[index] = self._keep(value, old if isinstance(old, _Slot) else None)

    def overwrite(self, index: int, value: Tensor) -> None:
        """Assigns an item that nothing else refers to, in its own memory if it is there: new tensors leave holes."""
        old = self._items[index]
        if isinstance(old, Tensor) and (old.device, old.dtype, old.shape) == (
            value.device,
            value.dtype,
            value.shape,
        ):
            old.copy_(value)
        else:
            self[index] = value

    def expect(self, index: int) -> None:
        """Begins to copy an item to the GPU, next to the computation, if there is one and it is in pinned memory."""
        item = self._items[index] if 0 <= index < len(self) else None
        if isinstance(item, _Pinned):
            item.expect(self._device)

    def __getitem__(self, index: int) -> Tensor:  # type: ignore[override]  # no slices
        item = self._items[index]
        if isinstance(item, Tensor):
            return item.to(self._device)
        if isinstance(item, _Pinned):
            return item.read(self._device)
        assert self._file is not None
        value = torch.empty(item.shape, dtype=item.dtype)
        self._file.seek(item.offset)
        rest = memory_of(value)
        while rest:  # one call reads 2 GiB at most
            rest = rest[self._file.readinto(rest) :]
        return value.to(self._device)

    def __len__(self) -> int:
        return len(self._items)

    def close(self) -> None:
        """Drops all tensors and frees their room."""
        for item in self._items:
            self._free(item)
        self._items.clear()
        if self._file is not None:
            self._file.close()
            self._scratch.count_file(-self._end)
            self._file = None
            self._end = 0

    def __exit__(self, *_: object) -> None:
        self.close()

    def _free(self, item: Tensor | _Pinned | _Slot) -> None:
        if not isinstance(item, _Slot):
            there = isinstance(item, Tensor) and item.device.type != "cpu"
            room = self._scratch.on_device if there else self._scratch.memory
            room.give_back(item.nbytes)

    def _pinned(self, value: Tensor) -> _Pinned | None:
        """A tensor of a GPU in pinned memory; None for another, or if the system has refused to pin memory."""
        if (
            value.device.type != "cuda"
            or self._device.type != "cuda"
            or not self._scratch.pins
        ):
            return None
        parts: list[Tensor] = []
        for size in powers(value.nbytes):
            if (part := machine.pinned(size)) is None:
                self._scratch.pins = False
                return None
            parts.append(part)
        self._stream = self._stream or torch.cuda.Stream(self._device)
        return _Pinned(value, parts, self._stream)

    def _keep(self, value: Tensor, slot: _Slot | None) -> Tensor | _Pinned | _Slot:
        """Stores a tensor: in its slot if it fits, else on the device or in memory if there is room, else on disk."""
        value = value.detach()
        if slot is None or slot.shape.numel() * slot.dtype.itemsize != value.nbytes:
            if self._device.type != "cpu" and self._scratch.on_device.take(
                value.nbytes
            ):
                return _without_base(value.to(self._device))
            if self._scratch.memory.take(value.nbytes):
                return self._pinned(value) or _without_base(value.to("cpu"))
            slot = None
        offset = self._end if slot is None else slot.offset
        with explained(self._scratch.directory):
            if self._file is None:
                self._file = tempfile.TemporaryFile(  # noqa: SIM115 - see close()
                    dir=self._scratch.directory, buffering=0
                )
            self._file.seek(offset)
            write_all(self._file, memory_of(value.to("cpu").contiguous()))
        end = max(self._end, offset + value.nbytes)
        self._scratch.count_file(end - self._end)
        self._end = end
        return _Slot(offset, value.shape, value.dtype)


def _without_base(value: Tensor) -> Tensor:
    """The tensor, or a copy of a view, which would keep its base tensor in memory."""
    return value.clone() if value.untyped_storage().nbytes() > value.nbytes else value
