"""Reads a Hugging Face checkpoint, packed or not, tensor by tensor; only requested tensors are in memory."""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from threading import Lock
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsellm.errors import NumericalError, StorageError
from sparsellm.inputs import read_object
from sparsepack.checkpoint import PackedEntry, PackedTensors, is_packed
from sparsepack.errors import PackError
from sparsepack.files import weight_files

# elements checked or written at a time: a small part of a weight, which costs few calls
PIECE = 1 << 22
_READERS = 4  # threads that read, hash and check tensors; hashing releases the interpreter's lock
_LARGE = 1 << 28  # bytes of a tensor from which on only one of them is hashed at a time
_GO_ON = "and run the same command again: a pruning run keeps the blocks that are done"

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8, "BOOL": torch.bool,
    "C64": torch.complex64, "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
}  # fmt: skip
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
"""The dtypes of weights that are read; others are those of quantised checkpoints, or of buffers."""


@dataclass(frozen=True)
class _Stored:
    """What the header of a file, which had this stamp, says of a tensor."""

    file: Path
    stamp: tuple[int, int, int]
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


class CheckpointReader:
    """The tensors of a directory of safetensors files, by name.

    Only ``*.safetensors`` is read: pickled weights (``*.bin``) can run code when they are opened. Files are read, never
    mapped: a mapped file that is truncated ends the process with SIGBUS. ``files`` None: all of the checkpoint. Raises
    StorageError if there are no safetensors weights, an index names a missing file, a tensor is in two files (also if
    the index names one of them: transformers takes the other), or a header is broken."""

    def __init__(self, directory: Path, files: list[Path] | None = None) -> None:
        self.directory = directory
        with as_storage_error():
            known = (files, {}) if files is not None else weight_files(directory)
        self.files, file_of = known
        self._stored: dict[str, _Stored] = {}
        first_file: dict[str, str] = {}  # file names by tensor
        for file in self.files:
            for name, stored in _header(file).items():
                if name in first_file:
                    raise StorageError(
                        f"tensor {name} is in both {first_file[name]} and {file.name} of {directory}; keep the files "
                        "of one checkpoint only"
                    )
                first_file[name] = file.name
                # one that the index expects in another file is missing there
                if file_of.get(name, file.name) == file.name:
                    self._stored[name] = stored
        self._digests: dict[str, str] = {}
        self._verified: set[str] = set()
        self._one_large = Lock()

    def __contains__(self, name: object) -> bool:
        return name in self._stored

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._stored[name].shape

    def dtype(self, name: str) -> torch.dtype:
        return self._stored[name].dtype

    def bytes_of(self, name: str) -> int:
        return math.prod(self.shape(name)) * self.dtype(name).itemsize

    def file_of(self, name: str) -> Path:
        return self._stored[name].file

    def stored_as(self, name: str) -> str:
        """Dtype and shape of a tensor in its file, as text."""
        return f"{self._stored[name].dtype} {self._stored[name].shape}"

    @property
    def bytes(self) -> int:
        """Size of all tensors, unpacked."""
        return sum(self.bytes_of(name) for name in self)

    def get(
        self,
        name: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """One tensor that owns its memory, in ``dtype`` if that is given and the tensor has floating point. Raises
        StorageError if its file is gone or truncated, or is not the one that was opened; if ``digests`` are known,
        the values are compared instead, at the first read and whenever the file seems changed."""
        stored = self._stored[name]
        digest = self._digests.get(name)
        same = _stamp(stored.file) == stored.stamp
        value = _read(stored, name, unchanged=digest is None)
        if digest is not None and not (same and name in self._verified):
            if hashlib.sha256(memory_of(value)).hexdigest() != digest:
                raise StorageError(
                    f"tensor {name} in {stored.file} is not what it was when the run began: the checkpoint changed "
                    f"while the run was reading it; put the old file back {_GO_ON}"
                )
            self._verified.add(name)
        return value.to(device, dtype if value.is_floating_point() else None)

    def digests(
        self, progress: Callable[[int, int], None] = lambda done, total: None
    ) -> dict[str, str]:
        """SHA-256 of every tensor as stored, by name. All values are checked, and later reads are compared with these
        digests. ``progress`` is called with (bytes read, bytes in all). Raises NumericalError with the name
        of a weight that is NaN or infinite, and StorageError if a file cannot be read, or has changed."""
        if not self._digests:
            digests: dict[str, str] = {}
            done = 0
            total = sum(stored.bytes for stored in self._stored.values())
            readers = min(_READERS, os.cpu_count() or 1)
            with ThreadPoolExecutor(readers, "digest") as pool:
                hashed = pool.map(self._digest, self._stored)
                for name, digest in zip(self._stored, hashed, strict=True):
                    digests[name] = digest
                    done += self._stored[name].bytes
                    progress(done, total)
            self._digests = digests
        return self._digests

    def expect(self, digests: dict[str, str]) -> None:
        """Sets the digests, from another or an earlier process that read the same checkpoint."""
        self._digests = digests

    def _digest(self, name: str) -> str:
        stored = self._stored[name]
        turn = self._one_large if stored.bytes >= _LARGE else contextlib.nullcontext()
        with turn:
            value = _read(stored, name, unchanged=True)
            digest = hashlib.sha256(memory_of(value)).hexdigest()
            bad = not_finite(value)
        if bad:
            has = f"weight {name} in {stored.file} has {bad} NaN or infinite values"
            raise NumericalError(
                f"{has}; this checkpoint is damaged: download or convert it again"
            )
        return digest


class Outline(CheckpointReader):
    """The tensors that the checkpoint of a config would have: names, dtypes and shapes, but no values."""

    def __init__(
        self, place: Path, tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]]
    ) -> None:
        self.directory = place
        self.files = []
        self._stored = {
            name: _Stored(place, (0, 0, 0), dtype, shape)
            for name, (dtype, shape) in tensors.items()
        }


class PackedReader(CheckpointReader):
    """The tensors of a packed checkpoint, dense: each weight is unpacked when it is read. Raises StorageError for what
    ``sparsepack.checkpoint.PackedTensors`` refuses."""

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        described = {
            name: torch.empty(t.shape, dtype=t.dtype, device="meta")
            for name, t in self._stored.items()
        }
        with as_storage_error():
            self._packed = PackedTensors(self.files, described, super().get)
        self.entries = self._packed.entries

    def __iter__(self) -> Iterator[str]:
        return (name for name in super().__iter__() if name not in self._packed.hidden)

    def shape(self, name: str) -> tuple[int, ...]:
        entry = self._entry(name)
        return entry.stored_shape if entry is not None else super().shape(name)

    def dtype(self, name: str) -> torch.dtype:
        entry = self._entry(name)
        return entry.torch_dtype if entry is not None else super().dtype(name)

    def get(
        self,
        name: str,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        if self._entry(name) is None:
            return super().get(name, device, dtype)
        with as_storage_error():
            return self._packed.dense(name.removesuffix(".weight")).to(device, dtype)

    def _entry(self, name: str) -> PackedEntry | None:
        if not name.endswith(".weight"):
            return None
        return self.entries.get(name.removesuffix(".weight"))


def open_checkpoint(directory: Path) -> CheckpointReader:
    """A reader of a checkpoint, packed or not. Raises StorageError if it cannot be read."""
    if is_packed(read_object(directory / "config.json")):
        return PackedReader(directory)
    return CheckpointReader(directory)


@contextlib.contextmanager
def as_storage_error() -> Iterator[None]:
    """Turns errors of sparsepack into a StorageError."""
    try:
        yield
    except PackError as error:
        raise StorageError(str(error)) from None


def not_finite(values: Tensor) -> int:
    """The number of values that are NaN or infinite; 0 for integers and for floating point of one byte."""
    if values.dtype not in WEIGHT_DTYPES or values.numel() == 0:
        return 0
    # Fifty times as fast as torch.isfinite; aminmax propagates NaN.
    if all(math.isfinite(float(extreme)) for extreme in torch.aminmax(values)):
        return 0
    return int((~torch.isfinite(values)).sum())


def memory_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU, without a copy."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _open(file: Path) -> Any:
    """A safetensors file, which is read and never mapped.

    A slice would read the whole tensor, so a checksum holds one tensor in memory."""
    return safe_open(file, framework="pt", backend="pread")


def _read(stored: _Stored, name: str, *, unchanged: bool) -> Tensor:
    """A tensor that owns its memory; with ``unchanged``, only of the file whose header was read."""
    file = stored.file
    if unchanged and _stamp(file) != stored.stamp:
        raise StorageError(
            f"{file}: the checkpoint has changed since it was opened; put the old files back {_GO_ON}"
        )
    try:
        with _open(file) as opened:
            value: Tensor = opened.get_tensor(name)
    except OSError as error:
        raise _unreadable(file, error) from None
    except SafetensorError as error:
        raise StorageError(
            f"{file} was cut short while it was read, or replaced ({error}); put the whole file back {_GO_ON}"
        ) from None
    return value


def _unreadable(file: Path, error: OSError) -> StorageError:
    reason = error.strerror or error
    return StorageError(
        f"{file} cannot be read any more ({reason}); put it back {_GO_ON}"
    )


def _stamp(file: Path) -> tuple[int, int, int]:
    """Size, time and inode of a file, which change when it is written or replaced."""
    try:
        status = os.stat(file)
    except OSError as error:
        raise _unreadable(file, error) from None
    return status.st_size, status.st_mtime_ns, status.st_ino


def _header(file: Path) -> dict[str, _Stored]:
    """The tensors of a safetensors file, in the order of their data. The format's own library checks the header."""
    tensors: dict[str, _Stored] = {}
    try:
        with file.open("rb"):  # raises what safetensors calls a missing file
            stamp = _stamp(file)
        with _open(file) as opened:
            for name in opened.offset_keys():
                described = opened.get_slice(name)
                dtype = DTYPES.get(described.get_dtype())
                if dtype is None:
                    has = f"tensor {name} in {file} has dtype {described.get_dtype()}, which is not read"
                    raise StorageError(
                        f"{has}; convert the checkpoint to bfloat16, float16 or float32"
                    )
                shape = tuple(described.get_shape())
                tensors[name] = _Stored(file, stamp, dtype, shape)
    except OSError as error:
        raise StorageError(f"cannot read {file}: {error.strerror or error}") from None
    except (SafetensorError, ValueError) as error:
        raise StorageError(
            f"{file} is not a readable safetensors file ({error}); download it again"
        ) from None
    return tensors
