"""Reading a Hugging Face checkpoint tensor by tensor; nothing is held that was not asked for."""

from __future__ import annotations

import builtins
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsellm.errors import NumericalError, StorageError

_PIECE = 1 << 22  # elements looked at at a time


class CheckpointReader:
    """The tensors of a directory of safetensors files, by name.

    Only ``*.safetensors`` is read: pickled weights (``*.bin``) can run code when they are opened.

    Args:
        directory: of the checkpoint.
        files: read these alone; None for all that belong to the checkpoint.

    Raises:
        StorageError: the directory has no safetensors weights, an index names a missing file, or a header is broken.
    """

    def __init__(self, directory: Path, files: list[Path] | None = None) -> None:
        self.directory = directory
        self.files = files if files is not None else _weight_files(directory)
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._dtypes: dict[str, torch.dtype] = {}
        for file in self.files:
            try:
                with safe_open(file, framework="pt") as handle:
                    for name in handle.keys():  # noqa: SIM118 - safe_open is not iterable
                        part = handle.get_slice(name)
                        self._file_of[name] = file
                        self._shapes[name] = tuple(part.get_shape())
                        self._dtypes[name] = DTYPES.get(part.get_dtype(), torch.float32)
            except (SafetensorError, OSError) as error:
                raise StorageError(f"{file} is not a readable safetensors file ({error}); download it again") from None

    def __contains__(self, name: object) -> bool:
        return name in self._file_of

    def __iter__(self) -> Iterator[str]:
        return iter(self._file_of)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        return self._dtypes[name]

    def bytes_of(self, name: str) -> int:
        """Size of one tensor."""
        return math.prod(self._shapes[name]) * self._dtypes[name].itemsize

    def file_of(self, name: str) -> Path:
        return self._file_of[name]

    @property
    def bytes(self) -> int:
        """Size of the weight files on disk."""
        return sum(file.stat().st_size for file in self.files)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The named tensors as stored; see :meth:`get`."""
        return {name: self.get(name) for name in names}

    def get(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """One tensor, on ``device``, in ``dtype`` if that is given and the tensor has floating point.

        It owns its memory: a view would keep the file's pages mapped, and they would count as this process's memory
        for as long as the view lives. The file is opened anew for each tensor, so that no more than one is mapped.
        """
        wanted = dtype if dtype is not None and self._dtypes[name].is_floating_point else self._dtypes[name]
        with safe_open(self._file_of[name], framework="pt") as handle:
            return _tensor(handle, name).to(device, wanted, copy=True)

    def sample(self, name: str) -> builtins.bytes:
        """The first and the last row of a tensor as stored: enough to tell whether training has touched it."""
        shape = self._shapes[name]
        with safe_open(self._file_of[name], framework="pt") as handle:
            if not shape:
                return raw_bytes(handle.get_tensor(name))
            part, rows = handle.get_slice(name), 1 if len(shape) > 1 else 1024
            return raw_bytes(part[:rows]) + raw_bytes(part[max(shape[0] - rows, 0) : shape[0]])

    def check_finite(self) -> None:
        """Reads every floating tensor once.

        Raises:
            NumericalError: a weight is NaN or infinite; it is named.
        """
        for name, dtype in self._dtypes.items():
            if dtype.is_floating_point and dtype.itemsize > 1:
                with safe_open(self._file_of[name], framework="pt") as handle:
                    pieces = handle.get_tensor(name).reshape(-1).split(_PIECE)
                    bad = sum(map(_not_finite, pieces))
                    del pieces  # unmaps the file
                if bad:
                    raise NumericalError(
                        f"weight {name} in {self._file_of[name]} has {bad} NaN or infinite values; "
                        "this checkpoint is damaged: download or convert it again"
                    )


def _not_finite(piece: Tensor) -> int:
    """How many values are NaN or infinite. The extremes tell whether any is, fifty times as fast as torch.isfinite."""
    if piece.numel() == 0 or all(math.isfinite(float(extreme)) for extreme in torch.aminmax(piece)):  # NaN is passed on
        return 0
    return int((~torch.isfinite(piece)).sum())


def _tensor(handle: Any, name: str) -> Tensor:
    value = handle.get_tensor(name)
    assert isinstance(value, Tensor)
    return value


def raw_bytes(tensor: Tensor) -> bytes:
    """The numbers of a tensor as they lie in memory."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def _weight_files(directory: Path) -> list[Path]:
    index = directory / "model.safetensors.index.json"
    single = directory / "model.safetensors"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError):
            raise StorageError(f"{index} is not a valid index of shards; download it again") from None
        files = [directory / name for name in names]
        for name, file in zip(names, files, strict=True):
            if Path(name).name != name or not file.is_file():
                raise StorageError(f"{index} names the shard {name!r}, which is not in {directory}; download it again")
        return files
    if single.is_file():
        return [single]
    others = sorted(directory.glob("*.safetensors"))
    if others:
        return others
    if any(directory.glob("*.bin")):
        raise StorageError(
            f"{directory} has only pickled weights (*.bin), which can run code when opened; "
            "convert them with model.save_pretrained(..., safe_serialization=True)"
        )
    raise StorageError(f"{directory} has no *.safetensors weights; give a directory saved by save_pretrained")


DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
}
