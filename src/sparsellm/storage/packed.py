"""Packed checkpoints on disk: what ``docs/format.md`` describes, read and checked.

A packed checkpoint is a directory of safetensors files like any other, but a packed linear ``X`` has
``X.weight_mask``, ``X.weight_values``, ``X.weight_offsets`` and, for integers, ``X.weight_scales``; ``X.weight`` is a
placeholder. What they are stands in ``quantization_config`` of ``config.json``; the files' SHA-256 in ``packed.json``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsellm.cache import sha256
from sparsellm.errors import StorageError
from sparsellm.runtime.packed import PackedWeight, unpack, validate
from sparsellm.storage.reader import CheckpointReader

QUANT_METHOD = "sparsellm"
FORMAT_VERSION = 1
MANIFEST = "packed.json"
FIELDS = ("mask", "values", "offsets", "scales")
_PACK_AGAIN = "the checkpoint is damaged or not ours: pack the model again"


@dataclass(frozen=True)
class PackedEntry:
    """What ``config.json`` says about one packed linear.

    Attributes:
        shape: ``(out, in)``.
        layout, value_type, pattern: as of :class:`~sparsellm.runtime.packed.PackedWeight`.
        dtype: what the dense weight was stored in, and is again once it is unpacked.
        transposed: the dense weight stands as ``(in, out)``, as GPT-2's does.
    """

    shape: tuple[int, int]
    layout: str
    value_type: str
    dtype: torch.dtype
    pattern: tuple[int, int] | None = None
    transposed: bool = False

    def to_dict(self) -> dict[str, Any]:
        found: dict[str, Any] = {
            "shape": list(self.shape),
            "layout": self.layout,
            "value_type": self.value_type,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        if self.pattern is not None:
            found["pattern"] = list(self.pattern)
        if self.transposed:
            found["transposed"] = True
        return found

    @classmethod
    def from_dict(cls, name: str, content: Any) -> PackedEntry:
        """Raises StorageError where the content is not what :meth:`to_dict` writes."""
        try:
            shape, pattern = tuple(content["shape"]), content.get("pattern")
            numbers = [*shape, *(pattern or ())]
            if len(shape) != 2 or not all(type(number) is int and 0 < number < 2**31 for number in numbers):
                raise ValueError
            dtype = getattr(torch, content["dtype"])
            if not isinstance(dtype, torch.dtype):
                raise ValueError
            pair = None if pattern is None else (pattern[0], pattern[1])
            layout, value_type = str(content["layout"]), str(content["value_type"])
            return cls((shape[0], shape[1]), layout, value_type, dtype, pair, content.get("transposed", False) is True)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError):
            raise StorageError(
                f"config.json: quantization_config describes {name!r} as {content!r:.200}; {_PACK_AGAIN}"
            ) from None


def is_packed(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a packed checkpoint."""
    method = config.get("quantization_config")
    return isinstance(method, dict) and method.get("quant_method") == QUANT_METHOD


def packed_entries(quantization_config: dict[str, Any]) -> dict[str, PackedEntry]:
    """The packed linears of a ``quantization_config``, by the names of their modules.

    Raises:
        StorageError: it is of another version, or malformed.
    """
    version, linears = quantization_config.get("format_version"), quantization_config.get("linears")
    if version != FORMAT_VERSION:
        raise StorageError(
            f"the packed checkpoint has format version {version!r} and this sparsellm reads {FORMAT_VERSION}; "
            "update sparsellm, or pack the model again"
        )
    if not isinstance(linears, dict):
        raise StorageError(f"config.json: quantization_config has no table of linears; {_PACK_AGAIN}")
    return {str(name): PackedEntry.from_dict(str(name), content) for name, content in linears.items()}


class PackedReader(CheckpointReader):
    """A packed checkpoint, whose weights look dense to whoever reads them: each is unpacked when it is asked for.

    Raises:
        StorageError: the files are not those that were written (SHA-256), or do not fit ``config.json``.
    """

    def __init__(self, directory: Path, quantization_config: dict[str, Any]) -> None:
        super().__init__(directory)
        check_files(directory)
        self.entries = packed_entries(quantization_config)
        for name, entry in self.entries.items():
            fields = FIELDS if f"{name}.weight_scales" in self._file_of else FIELDS[:3]
            missing = [field for field in fields if f"{name}.weight_{field}" not in self._file_of]
            if missing or f"{name}.weight" not in self._file_of:
                raise StorageError(
                    f"packed weight {name} has no {(missing or ['placeholder'])[0]} in {directory}; {_PACK_AGAIN}"
                )
            self._shapes[f"{name}.weight"] = entry.shape[::-1] if entry.transposed else entry.shape
            self._dtypes[f"{name}.weight"] = entry.dtype
        self._parts = {
            f"{name}.weight_{field}" for name in self.entries for field in FIELDS if f"{name}.weight_{field}" in self
        }
        for name in super().__iter__():
            if name.endswith(".weight_mask") and name not in self._parts:
                raise StorageError(f"{name} in {directory} is not described in config.json; {_PACK_AGAIN}")

    def __iter__(self) -> Iterator[str]:
        return (name for name in super().__iter__() if name not in self._parts)

    @property
    def bytes(self) -> int:
        """Size of the weights once unpacked."""
        return sum(math.prod(self._shapes[name]) * self._dtypes[name].itemsize for name in self)

    def get(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or module not in self.entries:
            return super().get(name, device, dtype)
        entry = self.entries[module]
        dense = unpack(self.packed(module), entry.dtype)
        return (dense.t().contiguous() if entry.transposed else dense).to(device, dtype)

    def packed(self, name: str) -> PackedWeight:
        """The packed weight of a linear, checked.

        Raises:
            StorageError: it is inconsistent.
        """
        entry = self.entries[name]
        keys = {field: f"{name}.weight_{field}" for field in FIELDS if f"{name}.weight_{field}" in self._parts}
        parts = {field: super(PackedReader, self).get(key) for field, key in keys.items()}
        packed = PackedWeight(
            entry.shape,
            entry.layout,
            parts["mask"],
            parts["values"],
            parts["offsets"],
            parts.get("scales"),
            entry.value_type,
            entry.pattern,
        )
        validate(packed, name)
        return packed


def open_checkpoint(directory: Path) -> CheckpointReader:
    """A reader of a checkpoint, packed or not.

    Raises:
        StorageError: it cannot be read.
    """
    config = read_config(directory)
    return PackedReader(directory, config["quantization_config"]) if is_packed(config) else CheckpointReader(directory)


def read_config(directory: Path) -> dict[str, Any]:
    """``config.json`` of a checkpoint as it stands.

    Raises:
        StorageError: there is none, or it is no JSON object.
    """
    path = directory / "config.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StorageError(f"{path} cannot be read ({error}); give a checkpoint directory") from None
    if not isinstance(content, dict):
        raise StorageError(f"{path} holds no JSON object; give a checkpoint directory")
    return content


def quantization_config(entries: dict[str, PackedEntry]) -> dict[str, Any]:
    """What ``config.json`` of a packed checkpoint says under ``quantization_config``."""
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "linears": {name: entry.to_dict() for name, entry in entries.items()},
    }


def manifest(directory: Path) -> dict[str, Any]:
    """The content of ``packed.json``: SHA-256 of every weight file of a directory."""
    return {"format_version": FORMAT_VERSION, "sha256": _hashes(sorted(directory.glob("*.safetensors")))}


def check_files(directory: Path) -> None:
    """Compares the weight files with the SHA-256 in ``packed.json``.

    A directory without one (``save_pretrained`` writes none) is left to the structural checks of its tensors.

    Raises:
        StorageError: a file is missing or has changed, or ``packed.json`` is malformed.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return
    try:
        wanted = dict(json.loads(path.read_text(encoding="utf-8"))["sha256"])
        files = [directory / name for name in wanted]
        if any(Path(name).name != name for name in wanted):
            raise ValueError
    except (ValueError, KeyError, TypeError):
        raise StorageError(f"{path} is not a list of checksums; {_PACK_AGAIN}") from None
    for file in files:
        if not file.is_file():
            raise StorageError(f"{path} lists {file.name}, which is not there; copy the directory again")
    for name, found in _hashes(files).items():
        if found != wanted[name]:
            raise StorageError(
                f"{directory / name} has SHA-256 {found[:16]}…, not {str(wanted[name])[:16]}…: the file has changed "
                "since it was packed; copy it again, or pack the model again"
            )


def _hashes(files: list[Path]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:  # hashing leaves the interpreter's lock
        return dict(zip((file.name for file in files), pool.map(sha256, files), strict=True))
