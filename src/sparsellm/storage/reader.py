"""Reading a Hugging Face checkpoint tensor by tensor; nothing is held that was not asked for."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsellm.errors import NumericalError, StorageError


class CheckpointReader:
    """The tensors of a directory of safetensors files, by name.

    Only ``*.safetensors`` is read: pickled weights (``*.bin``) can run code when they are opened.

    Raises:
        StorageError: the directory has no safetensors weights, an index names a missing file, or a header is broken.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.files = _weight_files(directory)
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
                        self._dtypes[name] = _DTYPES.get(part.get_dtype(), torch.float32)
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

    def file_of(self, name: str) -> Path:
        return self._file_of[name]

    @property
    def bytes(self) -> int:
        """Size of the weight files on disk."""
        return sum(file.stat().st_size for file in self.files)

    def read(self, names: list[str]) -> dict[str, Tensor]:
        """The named tensors as stored, each file opened once.

        The copies own their memory: a view would keep the file's pages mapped, and the file's size would count
        as this process's memory for as long as the view lives.
        """
        found: dict[str, Tensor] = {}
        for file in dict.fromkeys(self._file_of[name] for name in names):
            with safe_open(file, framework="pt") as handle:
                for name in names:
                    if self._file_of[name] == file:
                        found[name] = handle.get_tensor(name).clone()
        return found

    def check_finite(self) -> None:
        """Reads every floating tensor once.

        Raises:
            NumericalError: a weight is NaN or infinite; it is named.
        """
        for name, dtype in self._dtypes.items():
            if dtype.is_floating_point and dtype.itemsize > 1:
                values = self.read([name])[name]
                bad = int((~torch.isfinite(values)).sum())
                if bad:
                    raise NumericalError(
                        f"weight {name} in {self._file_of[name]} has {bad} NaN or infinite values; "
                        "this checkpoint is damaged: download or convert it again"
                    )


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


_DTYPES = {
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
