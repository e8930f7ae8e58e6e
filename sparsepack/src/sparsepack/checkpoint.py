"""Reads and checks packed checkpoints on disk; ``docs/format.md`` describes the format.

A packed linear ``X`` has the tensors ``X.weight_mask``, ``X.weight_values`` and so on; ``X.weight`` is a placeholder.
``quantization_config`` of ``config.json`` describes them. ``packed.json`` has the SHA-256 of the weight files and of
that description.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import MISSING, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsepack.arguments import check, check_choice, check_counts, refuse
from sparsepack.codes import BITS, FLOAT_TYPES, READ_AS, WRITTEN_TYPES, widened
from sparsepack.errors import FormatError, SettingError
from sparsepack.files import read_object
from sparsepack.layout import FIELDS, LAYOUTS, PackedWeight, dense_offsets, unpack
from sparsepack.masks import NM
from sparsepack.validation import (
    PACK_AGAIN,
    check_shapes,
    refused_by_name,
    validate,
)

QUANT_METHOD = "sparsellm"
FORMAT_VERSION = 5
# Version 4 had neither int6 nor int5, version 3 no levels; version 2 had offsets of dense weights and no exponents.
READABLE = (2, 3, 4, 5)
MANIFEST = "packed.json"
# In config.json. transformers refuses this name of a weight file, with its text; the quantizer takes it out before.
WAY_IN = {
    "transformers_weights": "this checkpoint is packed by sparsellm: import sparsepack before you load it, or "
    "run your command by `sparsellm exec -- COMMAND`"
}

DTYPES = ("float64", "float32", "float16", "bfloat16")  # dtypes of a dense weight


@dataclass(frozen=True)
class PackedEntry:
    """The description of one packed linear in ``config.json``.

    Attributes:
        shape: ``(out, in)``.
        layout, pattern: those of ``sparsepack.layout.PackedWeight``.
        value_type: the type in the file.
        dtype: that of the dense weight, before packing and after unpacking.
        transposed: the dense weight is stored as ``(in, out)``, as GPT-2's is."""

    shape: tuple[int, int]
    layout: str
    value_type: str
    dtype: str
    pattern: NM | None = None
    transposed: bool = False

    @classmethod
    def of(
        cls, packed: PackedWeight, dtype: torch.dtype, *, transposed: bool = False
    ) -> PackedEntry:
        """The entry of a packed weight whose dense weight has this dtype."""
        return cls(
            packed.shape,
            packed.layout,
            value_type=packed.narrower or packed.value_type,
            dtype=str(dtype).removeprefix("torch."),
            pattern=packed.pattern,
            transposed=transposed,
        )

    @classmethod
    def of_json(cls, content: Any) -> PackedEntry:
        """The entry that ``config.json`` has; a SettingError names the first value that is wrong."""
        check("it", content, dict)
        known = {field.name: field.default for field in fields(cls)}
        for name, default in known.items():
            if default is MISSING and name not in content:
                raise SettingError(f"{name} is missing")
        for name in content.keys() - known.keys():
            raise SettingError(f"{name} is unknown")
        entry = cls(**content)
        shape = _pair("shape", entry.shape)
        check_choice("layout", entry.layout, LAYOUTS)
        check_choice("value_type", entry.value_type, WRITTEN_TYPES)
        check_choice("dtype", entry.dtype, DTYPES)
        pattern = None
        if entry.pattern is not None:
            pattern = _pair("pattern", entry.pattern)
        check("transposed", entry.transposed, bool)
        return replace(entry, shape=shape, pattern=pattern)

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the dense weight."""
        return getattr(torch, self.dtype)  # type: ignore[no-any-return]

    @property
    def stored_shape(self) -> tuple[int, int]:
        """Shape of the dense weight in a checkpoint."""
        if not self.transposed:
            return self.shape
        out, columns = self.shape
        return columns, out

    def to_dict(self) -> dict[str, object]:
        """The entry as plain JSON values, as ``config.json`` has it."""
        written: dict[str, object] = {}
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, tuple):
                value = list(value)
            if value != field.default:
                written[field.name] = value
        return written


def _pair(name: str, values: Any) -> tuple[int, int]:
    """Two whole numbers above 0 from JSON; a SettingError says that they are not."""
    check_counts(name, values)
    if len(values) != 2:
        refuse(name, values, "two numbers")
    first, second = values
    return first, second


def is_packed(config: Mapping[str, Any]) -> bool:
    """Whether a ``config.json`` is that of a packed checkpoint."""
    method = config.get("quantization_config")
    return isinstance(method, dict) and method.get("quant_method") == QUANT_METHOD


def packed_entries(quantization_config: Mapping[str, Any]) -> dict[str, PackedEntry]:
    """The packed linears of a ``quantization_config``, by module; a FormatError for another version or content."""
    _check_version(quantization_config.get("format_version"))
    linears = quantization_config.get("linears")
    if not isinstance(linears, dict):
        raise FormatError(
            f"config.json: quantization_config has no table of linears; {PACK_AGAIN}"
        )
    entries = {}
    for name, content in linears.items():
        try:
            entries[name] = PackedEntry.of_json(content)
        except SettingError as error:
            mistake = f"config.json: quantization_config describes {name!r:.100} wrongly: {error}"
            raise FormatError(f"{mistake}; {PACK_AGAIN}") from None
    return entries


def quantization_config(entries: Mapping[str, PackedEntry]) -> dict[str, object]:
    """The ``quantization_config`` of a packed checkpoint with these linears."""
    linears = {name: entry.to_dict() for name, entry in entries.items()}
    return {
        "quant_method": QUANT_METHOD,
        "format_version": FORMAT_VERSION,
        "linears": linears,
    }


RESAVED = "; after save_pretrained into this directory, remove packed.json"


class PackedTensors:
    """The packed linears of a checkpoint.

    Args:
        files: the weight files of a checkpoint, all in one directory.
        described: a tensor of the dtype and shape of each stored one, by name; it may be on the meta device.
        get: reads a stored tensor.

    Attributes:
        entries: the descriptions in ``config.json``, by the names of the modules.
        nbytes: the bytes of the tensors of each packed linear.
        hidden: the names of tensors that are parts of packed linears.

    Raises:
        FormatError: files or ``quantization_config`` have changed since they were written, or do not fit each other.
    """

    def __init__(
        self,
        files: list[Path],
        described: Mapping[str, Tensor],
        get: Callable[[str], Tensor],
    ) -> None:
        directory = files[0].parent
        self._get = get
        config = read_object(directory / "config.json")
        if not is_packed(config):
            raise FormatError(
                f"{directory / 'config.json'} has no quantization_config of sparsellm; {PACK_AGAIN}"
            )
        self.entries = packed_entries(config["quantization_config"])
        listed = check_files(directory, files, config["quantization_config"])
        # for each packed linear, the names of its tensors by field
        self._parts: dict[str, dict[str, str]] = {}
        self.nbytes: dict[str, int] = {}
        for name, entry in self.entries.items():
            names = {field: f"{name}.weight_{field}" for field in FIELDS}
            parts = {
                field: described[key]
                for field, key in names.items()
                if key in described
            }
            _check_parts(name, entry, parts)
            placeholder = described.get(f"{name}.weight")
            if placeholder is None:
                raise FormatError(
                    f"packed weight {name} has no placeholder in {directory}; {PACK_AGAIN}"
                )
            # save_pretrained, which writes no packed.json, writes it in the dtype in which the model was loaded.
            other = listed and placeholder.dtype != entry.torch_dtype
            if (
                placeholder.shape != (1,)
                or not placeholder.is_floating_point()
                or other
            ):
                raise FormatError(
                    f"the placeholder {name}.weight in {directory} is {placeholder.dtype} {tuple(placeholder.shape)}, "
                    f"not {entry.torch_dtype} (1,); {PACK_AGAIN}"
                )
            self._parts[name] = {field: names[field] for field in parts}
            self.nbytes[name] = sum(part.nbytes for part in parts.values())
        self.hidden = {key for parts in self._parts.values() for key in parts.values()}
        for key in described:
            name, _, field = key.rpartition(".weight_")
            if (
                field in FIELDS
                and f"{name}.weight" in described
                and key not in self.hidden
            ):
                raise FormatError(
                    f"{key!r} in {directory} is not described in config.json; {PACK_AGAIN}"
                )

    def packed(self, name: str) -> PackedWeight:
        """The packed weight of a linear; a FormatError if it is inconsistent."""
        entry = self.entries[name]
        parts = {field: self._get(key) for field, key in self._parts[name].items()}
        return assembled(name, entry, parts)

    def dense(self, name: str) -> Tensor:
        """The dense weight of a linear as a checkpoint has it, of ``stored_shape`` and ``dtype`` of its entry; a
        FormatError if it is inconsistent, or its dtype cannot hold a finite value."""
        entry = self.entries[name]
        packed = self.packed(name)
        dtype = entry.torch_dtype
        values = FLOAT_TYPES.get(packed.value_type)  # None for integers
        dense = unpack(packed, dtype)
        if values is None or torch.finfo(values).max > torch.finfo(dtype).max:
            infinite = int((~torch.isfinite(dense)).sum())
            if values is not None:  # those that were not finite before
                infinite -= int((~torch.isfinite(packed.values)).sum())
            if infinite:
                raise FormatError(
                    f"packed weight {name} has {infinite} values that {dtype} cannot hold; {PACK_AGAIN}"
                )
        if entry.transposed:
            return dense.t().contiguous()
        return dense


def assembled(
    name: str, entry: PackedEntry, stored: Mapping[str, Tensor]
) -> PackedWeight:
    """The packed weight of a linear from its stored tensors by field; a FormatError if one is missing, or they are
    inconsistent."""
    _check_parts(name, entry, stored)
    value_type = READ_AS[entry.value_type]
    parts: dict[str, Any] = {**dict.fromkeys(FIELDS), **stored}
    if parts["offsets"] is None:
        parts["offsets"] = dense_offsets(entry.shape, value_type)
    narrower = None
    if entry.value_type != value_type:
        narrower = entry.value_type
        # the offsets say how many values there are
        values = int(parts["offsets"][-1])
        with refused_by_name(name):
            parts["values"] = widened(stored["values"], values, narrower)
    packed = PackedWeight(
        entry.shape,
        entry.layout,
        value_type=value_type,
        pattern=entry.pattern,
        narrower=narrower,
        **parts,
    )
    validate(packed, name)
    return packed


def _check_parts(name: str, entry: PackedEntry, parts: Mapping[str, Tensor]) -> None:
    """Refuses stored tensors of a packed linear that lack one or are too small for its shape, before memory for that
    shape is taken; ``sparsepack.validation.validate`` checks what they contain."""
    needed = FIELDS[:2] if entry.layout == "dense" else FIELDS[:3]
    for field in needed:
        if field not in parts:
            raise FormatError(f"packed weight {name} has no {field}; {PACK_AGAIN}")
    with refused_by_name(name):
        check_shapes(entry, parts)
        values = parts["values"]
        bits = BITS[entry.value_type] * math.prod(entry.shape)
        if entry.layout == "dense" and 8 * values.nbytes < bits:
            raise ValueError(
                f"values is {tuple(values.shape)}, too few for {entry.shape}"
            )


@contextmanager
def opened_weights(file: Path) -> Iterator[Any]:
    """A safetensors file, opened; a FormatError says that it cannot be read."""
    try:
        with file.open("rb"), safe_open(file, framework="pt") as opened:
            yield opened
    except OSError as error:  # Python's own: safetensors calls each a missing file
        raise FormatError(f"cannot read {file}: {error.strerror or error}") from None
    except SafetensorError as error:
        raise FormatError(
            f"{file} is not a readable safetensors file ({error}); copy it again"
        ) from None


def open_packed(files: list[Path]) -> PackedTensors:
    """The packed linears in the weight files of a checkpoint, all in one directory; raises as the class does."""
    mapped: dict[str, Tensor] = {}
    for file in files:
        with opened_weights(file) as opened:
            mapped |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a mapping
    # A copy, as a mapped file that is truncated later ends the process.
    return PackedTensors(files, mapped, lambda name: mapped[name].clone())


def adapter_in(directory: Path) -> str | None:
    """The reason to refuse a directory with a PEFT adapter, which only some readers would apply; None without one."""
    if not (directory / "adapter_config.json").exists():
        return None
    return f"{directory} has an adapter_config.json; merge the adapter first: merge_and_unload(), then save_pretrained"


def manifest(directory: Path) -> dict[str, object]:
    """The content of ``packed.json``: SHA-256 of the weight files of a directory and of its ``quantization_config``."""
    return {
        "format_version": FORMAT_VERSION,
        "sha256": _hashes(sorted(directory.glob("*.safetensors"))),
        "quantization_config_sha256": config_digest(
            read_object(directory / "config.json").get("quantization_config")
        ),
    }


def config_digest(quantization_config: Any) -> str:
    """SHA-256 of a ``quantization_config``, as JSON in ASCII with sorted keys and without spaces.

    The other keys of ``config.json`` are left out: tools rewrite them (``torch_dtype``, ``transformers_version``)."""
    text = json.dumps(
        quantization_config, sort_keys=True, separators=(",", ":"), ensure_ascii=True
    )
    return hashlib.sha256(text.encode("ascii")).hexdigest()


def check_files(directory: Path, files: list[Path], quantization_config: Any) -> bool:
    """Compares weight files and ``quantization_config`` with the SHA-256 in ``packed.json``; whether there is one.

    ``save_pretrained`` writes none: such a directory is checked by the structure of its tensors alone. A FormatError
    says what is missing, not listed, malformed or has changed."""
    path = directory / MANIFEST
    if not path.is_file():
        return False
    content = read_object(path)
    try:
        _check_manifest(content)
    except SettingError as error:
        raise FormatError(
            f"{path} is not a list of checksums: {error}; {PACK_AGAIN}"
        ) from None
    _check_version(content.get("format_version"))
    listed = content["sha256"]
    for name in listed:
        if Path(name).name != name:
            raise FormatError(
                f"{path} is not a list of checksums: {name!r:.100} is not a file name; {PACK_AGAIN}"
            )
        # unlike Path.is_file, False for a name that is too long
        if not os.path.isfile(directory / name):
            raise FormatError(
                f"{path} lists {name!r:.100}, which is not there; copy the directory again"
            )
    for file in files:
        if file.name not in listed:
            raise FormatError(
                f"{path} does not list {file.name}; copy the directory again, or pack the model again"
            )
    expected = content.get("quantization_config_sha256")
    digest = config_digest(quantization_config)
    if expected is not None and digest != expected:
        raise FormatError(
            f"quantization_config in {directory / 'config.json'} has SHA-256 {digest[:16]}…, not {expected[:16]}…: it "
            f"has changed since the model was packed; copy config.json again, or pack the model again{RESAVED}"
        )
    for name, digest in _hashes([directory / name for name in listed]).items():
        if digest != listed[name]:
            raise FormatError(
                f"{directory / name} has SHA-256 {digest[:16]}…, not {listed[name][:16]}…: the file has changed "
                f"since it was packed; copy it again, or pack the model again{RESAVED}"
            )
    return True


def _check_manifest(content: Mapping[str, Any]) -> None:
    """Raises a SettingError if ``packed.json`` has no digests; at first, ``quantization_config`` had none there."""
    check("sha256", content.get("sha256"), dict)
    for name, digest in content["sha256"].items():
        _check_digest(f"sha256.{name}", digest)
    if content.get("quantization_config_sha256") is not None:
        _check_digest(
            "quantization_config_sha256", content["quantization_config_sha256"]
        )


def _check_digest(name: str, digest: Any) -> None:
    check(name, digest, str)
    if not re.fullmatch("[0-9a-f]{64}", digest):
        refuse(name, digest, "64 hexadecimal digits")


def _check_version(version: Any) -> None:
    if type(version) is not int or version not in READABLE:
        raise FormatError(
            f"the packed checkpoint has format version {version!r:.40} and this sparsepack reads "
            f"{', '.join(map(str, READABLE))}; update sparsellm, or pack the model again"
        )


def _hashes(files: list[Path]) -> dict[str, str]:
    """SHA-256 of files, by their names."""

    def digest(file: Path) -> str:
        with file.open("rb") as opened:
            return hashlib.file_digest(opened, "sha256").hexdigest()

    with ThreadPoolExecutor() as pool:  # hashing releases the interpreter's lock
        return dict(
            zip((file.name for file in files), pool.map(digest, files), strict=True)
        )
