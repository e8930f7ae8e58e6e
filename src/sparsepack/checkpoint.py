"""Reads and checks packed checkpoints on disk; ``docs/format.md`` describes the format.

A packed checkpoint is a directory of safetensors files like any other, but a packed linear ``X`` has
``X.weight_mask``, ``X.weight_values``, ``X.weight_offsets`` (unless it is dense) and, for integers, ``X.weight_scales``
and perhaps ``X.weight_exponents`` and ``X.weight_levels``; ``X.weight`` is a placeholder. ``quantization_config`` of
``config.json`` describes them. ``packed.json`` has the SHA-256 of the weight files and of that description.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, ValidationError
from torch import Tensor

from sparsellm.errors import StorageError
from sparsellm.inputs.json_input import read_object
from sparsellm.sources.cache import sha256
from sparsellm.storage.reader import CheckpointReader
from sparsepack.codes import FLOAT_TYPES, widened
from sparsepack.layout import PackedWeight, dense_offsets, unpack
from sparsepack.validation import PACK_AGAIN, validate

QUANT_METHOD = "sparsellm"
FORMAT_VERSION = 4
# Version 3 had no levels. Version 2 had offsets of dense weights and no exponents. Version 1 had no layout dense, and
# int4 a scale for each 32 values in place of columns.
READABLE = (1, 2, 3, 4)
MANIFEST = "packed.json"
FIELDS = ("mask", "values", "offsets", "scales", "exponents", "levels")

_Count = Annotated[int, Field(strict=True, gt=0, lt=2**31)]
_Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class _WrittenEntry(BaseModel):
    """The fields of one packed linear in ``config.json``."""

    model_config = ConfigDict(extra="forbid")

    shape: tuple[_Count, _Count]
    layout: Literal["bitmask", "nm", "dense"]
    value_type: Literal["bf16", "fp16", "fp32", "int8", "int4", "int3"]
    dtype: Literal["float64", "float32", "float16", "bfloat16"]
    pattern: tuple[_Count, _Count] | None = None
    transposed: StrictBool = False


class _WrittenManifest(BaseModel):
    """The fields of ``packed.json``; it had no digest of ``quantization_config`` at first."""

    format_version: Any = None
    sha256: dict[str, _Digest]
    quantization_config_sha256: _Digest | None = None


@dataclass(frozen=True)
class PackedEntry:
    """The description of one packed linear in ``config.json``.

    Attributes:
        shape: ``(out, in)``.
        layout, value_type, pattern: as of :class:`~sparsepack.layout.PackedWeight`.
        dtype: of the dense weight, before packing and after unpacking.
        transposed: the dense weight is stored as ``(in, out)``, as GPT-2's is.
    """

    shape: tuple[int, int]
    layout: str
    value_type: str
    dtype: torch.dtype
    pattern: tuple[int, int] | None = None
    transposed: bool = False

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of the dense weight in a checkpoint."""
        return (self.shape[1], self.shape[0]) if self.transposed else self.shape

    def to_dict(self) -> dict[str, Any]:
        """The entry as plain JSON values, as ``config.json`` has it."""
        content: dict[str, Any] = {
            "shape": list(self.shape),
            "layout": self.layout,
            "value_type": self.value_type,
            "dtype": str(self.dtype).removeprefix("torch."),
        }
        if self.pattern is not None:
            content["pattern"] = list(self.pattern)
        if self.transposed:
            content["transposed"] = True
        return content

    @classmethod
    def from_dict(cls, name: str, content: Any) -> PackedEntry:
        """The entry that :meth:`to_dict` wrote.

        Raises:
            StorageError: a field is missing, unknown, of another type, or not one of the values that the format has.
        """
        try:
            written = _WrittenEntry.model_validate(content)
        except ValidationError as error:
            raise StorageError(
                f"config.json: quantization_config describes {name!r} wrongly: {_first(error)}; {PACK_AGAIN}"
            ) from None
        dtype = getattr(torch, written.dtype)
        return cls(written.shape, written.layout, written.value_type, dtype, written.pattern, written.transposed)


def is_packed(config: dict[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a packed checkpoint."""
    method = config.get("quantization_config")
    return isinstance(method, dict) and method.get("quant_method") == QUANT_METHOD


def packed_entries(quantization_config: dict[str, Any]) -> dict[str, PackedEntry]:
    """The packed linears of a ``quantization_config``, by the names of their modules.

    Raises:
        StorageError: it is of another version, or malformed.
    """
    _check_version(quantization_config.get("format_version"))
    linears = quantization_config.get("linears")
    if not isinstance(linears, dict):
        raise StorageError(f"config.json: quantization_config has no table of linears; {PACK_AGAIN}")
    for name in linears:
        if not name or not name.isprintable():  # names appear in errors of one line
            raise StorageError(
                f"config.json: quantization_config describes {name!r:.100}, which cannot be a name; {PACK_AGAIN}"
            )
    entries = {name: PackedEntry.from_dict(name, content) for name, content in linears.items()}
    for name, entry in entries.items():
        if quantization_config["format_version"] == 1 and (entry.value_type == "int4" or entry.layout == "dense"):
            raise StorageError(
                f"config.json: {name!r} is {entry.layout}, {entry.value_type} of format version 1, which is no longer "
                "read; pack the model again"
            )
    return entries


class PackedReader(CheckpointReader):
    """Reads a packed checkpoint as a dense one: each weight is unpacked when it is read.

    Raises:
        StorageError: the files or ``quantization_config`` have changed since they were written (SHA-256), the
            directory is not packed, or the tensors do not fit ``quantization_config``.
    """

    def __init__(self, directory: Path) -> None:
        super().__init__(directory)
        config = read_config(directory)
        if not is_packed(config):
            raise StorageError(f"{directory / 'config.json'} has no quantization_config of sparsellm; {PACK_AGAIN}")
        self.entries = packed_entries(config["quantization_config"])
        listed = check_files(directory, self.files, config["quantization_config"])
        self._parts: dict[str, dict[str, str]] = {}  # for each packed linear, the names of its tensors by field
        for name, entry in self.entries.items():
            self._parts[name] = self._checked_parts(name, entry, exact_dtype=listed)
            self._shapes[f"{name}.weight"] = entry.stored_shape
            self._dtypes[f"{name}.weight"] = entry.dtype
        self._hidden = {key for parts in self._parts.values() for key in parts.values()}
        for key in super().__iter__():
            name, _, field = key.rpartition(".weight_")
            if field in FIELDS and f"{name}.weight" in self and key not in self._hidden:
                raise StorageError(f"{key!r} in {directory} is not described in config.json; {PACK_AGAIN}")

    def _checked_parts(self, name: str, entry: PackedEntry, *, exact_dtype: bool) -> dict[str, str]:
        """The names of a packed linear's tensors by field.

        Args:
            name: of the module.
            entry: its description in ``config.json``.
            exact_dtype: whether the placeholder must have the dtype of the dense weight. It does when ``pack`` wrote
                it; ``save_pretrained`` writes the dtype in which the model was loaded.
        """
        parts = {field: f"{name}.weight_{field}" for field in FIELDS if f"{name}.weight_{field}" in self}
        needed = FIELDS[:2] if entry.layout == "dense" else FIELDS[:3]
        missing = [field for field in needed if field not in parts]
        if f"{name}.weight" not in self:
            missing.append("placeholder")
        if missing:
            raise StorageError(f"packed weight {name} has no {missing[0]} in {self.directory}; {PACK_AGAIN}")
        shape, dtype = self.shape(f"{name}.weight"), self.dtype(f"{name}.weight")
        if shape != (1,) or not dtype.is_floating_point or (exact_dtype and dtype != entry.dtype):
            raise StorageError(
                f"the placeholder {name}.weight in {self.directory} is {dtype} {shape}, not {entry.dtype} (1,); "
                f"{PACK_AGAIN}"
            )
        return parts

    def __iter__(self) -> Iterator[str]:
        return (name for name in super().__iter__() if name not in self._hidden)

    @property
    def bytes(self) -> int:
        """Size of the unpacked weights."""
        return sum(math.prod(self._shapes[name]) * self._dtypes[name].itemsize for name in self)

    def get(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or module not in self.entries:
            return super().get(name, device, dtype)
        entry = self.entries[module]
        dense = _dense(self.packed(module), entry.dtype, module)
        return (dense.t().contiguous() if entry.transposed else dense).to(device, dtype)

    def packed(self, name: str) -> PackedWeight:
        """The packed weight of a linear, checked.

        Raises:
            StorageError: it is inconsistent.
        """
        entry = self.entries[name]
        parts = {field: super(PackedReader, self).get(key) for field, key in self._parts[name].items()}
        narrow = entry.value_type == "int3"
        value_type = "int4" if narrow else entry.value_type
        offsets = parts["offsets"] if "offsets" in parts else dense_offsets(entry.shape, value_type)
        if narrow:
            rows = (entry.shape[0] + 1,)
            if offsets.dtype != torch.int64 or tuple(offsets.shape) != rows:
                raise StorageError(
                    f"packed weight {name}: offsets is {offsets.dtype} {tuple(offsets.shape)}, not torch.int64 {rows}; "
                    f"{PACK_AGAIN}"
                )
            try:
                parts["values"] = widened(parts["values"], int(offsets[-1]))
            except StorageError as error:
                raise StorageError(f"packed weight {name}: {error}") from None
        packed = PackedWeight(
            entry.shape,
            entry.layout,
            parts["mask"],
            parts["values"],
            offsets,
            parts.get("scales"),
            value_type,
            entry.pattern,
            parts.get("exponents"),
            parts.get("levels"),
            narrow,
        )
        validate(packed, name)
        return packed


def open_checkpoint(directory: Path) -> CheckpointReader:
    """A reader of a checkpoint, packed or not.

    Raises:
        StorageError: it cannot be read.
    """
    return PackedReader(directory) if is_packed(read_config(directory)) else CheckpointReader(directory)


def read_config(directory: Path) -> dict[str, Any]:
    """The content of ``config.json`` of a checkpoint.

    Raises:
        StorageError: there is none, or it is not a JSON object.
    """
    return read_object(directory / "config.json")


def quantization_config(entries: dict[str, PackedEntry]) -> dict[str, Any]:
    """The ``quantization_config`` of a packed checkpoint with these linears."""
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "linears": {name: entry.to_dict() for name, entry in entries.items()},
    }


def manifest(directory: Path) -> dict[str, Any]:
    """The content of ``packed.json``: SHA-256 of every weight file of a directory, and of its ``quantization_config``.

    Raises:
        StorageError: ``config.json`` cannot be read.
    """
    return {
        "format_version": FORMAT_VERSION,
        "sha256": _hashes(sorted(directory.glob("*.safetensors"))),
        "quantization_config_sha256": config_digest(read_config(directory).get("quantization_config")),
    }


def config_digest(quantization_config: Any) -> str:
    """SHA-256 of a ``quantization_config``, as JSON in ASCII with sorted keys and without spaces.

    The other keys of ``config.json`` are left out: tools rewrite them (``torch_dtype``, ``transformers_version``).
    """
    text = json.dumps(quantization_config, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def check_files(directory: Path, files: list[Path], quantization_config: Any) -> bool:
    """Compares weight files and ``quantization_config`` with the SHA-256 in ``packed.json``.

    Args:
        directory: of the checkpoint.
        files: the weight files that will be read.
        quantization_config: of ``config.json``.

    Returns:
        Whether there is a ``packed.json``. ``save_pretrained`` writes none: such a directory is checked by the
        structure of its tensors alone.

    Raises:
        StorageError: a file is missing, not listed or has changed, ``quantization_config`` has changed, or
            ``packed.json`` is malformed.
    """
    path = directory / MANIFEST
    if not path.is_file():
        return False
    try:
        listed = _WrittenManifest.model_validate(read_object(path))
    except ValidationError as error:
        raise StorageError(f"{path} is not a list of checksums: {_first(error)}; {PACK_AGAIN}") from None
    _check_version(listed.format_version)
    for name in listed.sha256:
        if Path(name).name != name:
            raise StorageError(f"{path} is not a list of checksums: {name!r:.100} is not a file name; {PACK_AGAIN}")
        if not os.path.isfile(directory / name):  # unlike Path.is_file, False for a name that is too long
            raise StorageError(f"{path} lists {name!r:.100}, which is not there; copy the directory again")
    for file in files:
        if file.name not in listed.sha256:
            raise StorageError(f"{path} does not list {file.name}; copy the directory again, or pack the model again")
    wanted = listed.quantization_config_sha256
    if wanted is not None and (digest := config_digest(quantization_config)) != wanted:
        raise StorageError(
            f"quantization_config in {directory / 'config.json'} has SHA-256 {digest[:16]}…, not {wanted[:16]}…: it "
            "has changed since the model was packed; copy config.json again, or pack the model again"
        )
    for name, digest in _hashes([directory / name for name in listed.sha256]).items():
        if digest != listed.sha256[name]:
            raise StorageError(
                f"{directory / name} has SHA-256 {digest[:16]}…, not {listed.sha256[name][:16]}…: the file has changed "
                "since it was packed; copy it again, or pack the model again"
            )
    return True


def _check_version(version: Any) -> None:
    if type(version) is not int or version not in READABLE:
        raise StorageError(
            f"the packed checkpoint has format version {version!r:.40} and this sparsellm reads "
            f"{', '.join(map(str, READABLE))}; "
            "update sparsellm, or pack the model again"
        )


def _dense(packed: PackedWeight, dtype: torch.dtype, name: str) -> Tensor:
    """The dense weight ``(out, in)`` in ``dtype``.

    Raises:
        StorageError: ``dtype`` cannot hold a finite value of the packed weight.
    """
    dense = unpack(packed, dtype)
    values = FLOAT_TYPES.get(packed.value_type)
    if values is not None and torch.finfo(values).max <= torch.finfo(dtype).max:
        return dense
    finite = int(torch.isfinite(dense).sum())
    infinite = dense.numel() - finite - (0 if values is None else int((~torch.isfinite(packed.values)).sum()))
    if infinite:
        raise StorageError(f"packed weight {name} has {infinite} values that {dtype} cannot hold; {PACK_AGAIN}")
    return dense


def _hashes(files: list[Path]) -> dict[str, str]:
    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        return dict(zip((file.name for file in files), pool.map(sha256, files), strict=True))


def _first(error: ValidationError) -> str:
    """The first mistake in pydantic's list: its place, the value, and the value that is expected."""
    mistake = error.errors(include_url=False)[0]
    where = repr(".".join(map(str, mistake["loc"])))[1:-1]  # a key may hold line breaks
    return f"{where + ' is ' if where else ''}{mistake['input']!r:.100} ({mistake['msg']})"
