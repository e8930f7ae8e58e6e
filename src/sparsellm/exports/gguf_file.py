"""Writes a GGUF file from a template: all is copied but the linears that are on a grid, which become its blocks."""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
from collections.abc import Callable, Collection
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import torch
from gguf.gguf_writer import GGUFValue
from torch import Tensor

from sparsellm.errors import ModelError, RecipeError, StorageError, shown
from sparsellm.exports.blocks import block_type, quantised, to_blocks
from sparsellm.exports.linears import OnGrid
from sparsellm.exports.template import SCRIPT, Template, row_order, values_of
from sparsellm.files.directory import check_room, resolved
from sparsellm.files.files import (
    TEMPORARY,
    TORN,
    create_atomically,
    lock_while_open,
    replace_atomically,
)
from sparsellm.files.reader import CheckpointReader
from sparsellm.progress import Progress, ProgressCallback
from sparsellm.records import Export
from sparsellm.version import __version__
from sparsepack.files import read_bytes
from sparsepack.grids import GRIDS, Grid, grid_for

_HEAD = ("token_embd.weight", "output.weight")
# Keys that describe the template's file, and not the model. The writer adds the architecture itself.
_DROPPED = ("GGUF.", "split.", "quantize.", gguf.Keys.General.ARCHITECTURE)
# Names of file types that differ from those of their blocks
_FILE_TYPES = {"Q3_K": "Q3_K_S", "Q4_K": "Q4_K_S"}
_EXACT = ("F32", "F16", "BF16")
# What converters add to the weights of a norm
_SHIFTS = (0.0, 1.0)
CONVERTER_ADVICE = f"give llama.cpp's {SCRIPT} with --converter"
_INFO_BYTES = 128  # name, shape and place of a tensor, and the room up to the next


def check_file(out: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The path of a GGUF file to be written, without links. A StorageError says why it cannot be, or that there is a
    file, which only ``overwrite`` replaces, if it is a GGUF file."""
    place = resolved(out)
    said = f"--out {shown(os.fspath(out))}"
    if place.suffix != ".gguf" or place.is_dir():
        raise StorageError(
            f"{said} is not the name of a .gguf file; name one, such as model.gguf"
        )
    if not place.parent.is_dir():
        raise StorageError(
            f"{said}: {place.parent} is not a directory; create it, or name another file"
        )
    if place.exists():
        ours = read_bytes(place, 4, StorageError)[:4] == b"GGUF"
        if not (overwrite and ours):
            advice = "it is not a GGUF file and is not replaced"
            if ours:
                advice = "give --overwrite to replace it"
            raise StorageError(f"{said} exists; {advice}, or name another file")
    return place


def other_bytes(
    template: Template, reader: CheckpointReader, linears: Collection[str], head: str
) -> int:
    """Bytes of a GGUF file of a checkpoint without ``linears``, which are tensors of the ``reader``: its keys, and all
    other tensors of the template, with embedding and head as ``head``, or in the template's type if that is smaller."""
    keys = template.keys_of(list(reader))
    total = int(template.reader.data_offset)
    for tensor in template.reader.tensors:
        total += template.reader.alignment
        of_tensor = keys.get(tensor.name, [])
        if any(key in linears for key in of_tensor):
            continue
        if tensor.name in _HEAD and of_tensor:
            kind = _head_type(tensor, head)
            total += _bytes_as(kind.name, int(tensor.n_elements))
        else:
            total += int(tensor.n_bytes)
    return total


def _head_type(tensor: gguf.ReaderTensor, head: str) -> gguf.GGMLQuantizationType:
    """The type in which an embedding or a head of the template is written, if ``head`` is asked for.

    The template's own stays where it takes no more bytes: its values are there without loss, and no type adds to
    them."""
    if head == "keep":
        return tensor.tensor_type
    kept = tensor.tensor_type
    # the blocks of every type divide these many weights
    if _bytes_as(kept.name, gguf.QK_K) <= _bytes_as(head, gguf.QK_K):
        return kept
    return gguf.GGMLQuantizationType[head.upper()]


def expected_bytes(
    metadata: int,
    reader: CheckpointReader,
    linears: Collection[str],
    heads: Collection[str],
    head: str,
) -> int:
    """As ``other_bytes``, of a file that llama.cpp's converter will make: it keeps matrices, and has vectors in
    F32. ``metadata`` are the bytes of the keys; ``heads`` are the tensors of embedding and head."""
    total = metadata
    for key in reader:
        total += _INFO_BYTES
        if key in linears:
            continue
        shape = reader.shape(key)
        if key in heads:
            total += _bytes_as(head, math.prod(shape))
        elif len(shape) > 1:
            total += reader.bytes_of(key)
        else:
            total += 4 * math.prod(shape)
    return total


def _bytes_as(kind: str, weights: int) -> int:
    """Bytes of weights in a type of GGUF."""
    size, stored = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind.upper()]]
    return weights // size * stored


def write_gguf(
    contents: Contents,
    place: Path,
    record: Export,
    *,
    overwrite: bool,
    progress: ProgressCallback,
    keep: Callable[[Export], object],
) -> Export:
    """Writes a GGUF file, complete or not at all, and returns its record with its size.

    ``keep`` is called with that record before the file gets its name. Only with ``overwrite`` does it take the place of
    another GGUF file. A ModelError as by ``Contents``; a StorageError says that a weight is not on the grid, that
    the file cannot be written, or that another has its name."""
    template = contents.template
    tensors = template.reader.tensors
    _remove_torn(place.parent)
    check_room(place, sum(map(contents.bytes_of, tensors)))

    def write(file: BinaryIO) -> Export:
        held.callback(os.close, os.dup(file.fileno()))
        lock_while_open(file)
        writer = gguf.GGUFWriter(file.name, template.arch)
        writer.data_alignment = template.reader.alignment
        for name, value in contents.values().items():
            writer.add_key_value(name, value.value, value.type, value.sub_type)
        for tensor in tensors:
            shape = tuple(reversed(tensor.shape.tolist()))
            kind = contents.type_of(tensor)
            # Any dtype but uint8, with which the shape would be taken for one in bytes
            writer.add_tensor_info(
                tensor.name,
                shape,
                np.dtype(np.float32),
                contents.bytes_of(tensor),
                kind,
            )
        try:
            writer.write_header_to_file()
            writer.write_kv_data_to_file()
            writer.write_ti_data_to_file()
            for index, tensor in enumerate(tensors):
                progress(Progress("export", index, len(tensors), tensor.name))
                writer.write_tensor_data(contents.data(tensor))
        finally:
            writer.close()
        progress(Progress("export", len(tensors), len(tensors)))
        # a file may have appeared in the meantime
        check_file(place, overwrite=overwrite)
        written = record.model_copy(update={"bytes": os.path.getsize(file.name)})
        keep(written)
        return written

    with contextlib.ExitStack() as held:  # the lock, until the file has its name
        if overwrite:
            return replace_atomically(place, write)
        return create_atomically(place, write)


def _remove_torn(folder: Path) -> None:
    """Removes what killed exports left in a user's folder: ordinary files with our temporary names that no process has
    locked."""
    for path in folder.glob(f".*{TEMPORARY}"):
        with contextlib.suppress(OSError):
            if TORN.fullmatch(path.name) and path.is_file() and not path.is_symlink():
                with path.open("rb") as file:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if file.read(4) == b"GGUF":
                        path.unlink()


class Contents:
    """The keys and tensors of a GGUF file.

    ``model`` is the checkpoint, on a grid that GGUF has. All but its linears comes from the ``template``. That was made
    from the checkpoint ``source``: the model itself, or the dense one that was pruned. ``head`` is the largest type of
    embedding and head, such as ``q8_0``, or ``keep`` for the template's. A ModelError says that the three do not belong
    together."""

    def __init__(
        self, model: OnGrid, source: CheckpointReader, template: Template, head: str
    ) -> None:
        self.model = model
        self.source = source
        self.template = template
        self.head = head
        tensors = {tensor.name for tensor in template.reader.tensors}
        named = template.keys_of(list(model.reader)).items()
        # the tensors of the checkpoint, by their name in GGUF
        self.keys = {name: keys for name, keys in named if name in tensors}
        reader = model.reader
        for key in sorted({*reader, *source}):
            if key not in reader or key not in source:
                raise self._not_pruned_from(f"has another set of tensors ({key})")
            if source.shape(key) != reader.shape(key):
                raise self._not_pruned_from(f"has {key} {list(source.shape(key))}")
        known = {key for keys in self.keys.values() for key in keys}
        # a tied head that is stored a second time is rounded like the embedding
        known |= model.run.heads.keys()
        for key in sorted({*reader} - known):
            if key in model.linears or not self._same(key):
                # which the file would lose
                raise self._other(f"has no tensor for {key}")
        for name, keys in self.keys.items():
            if len({key in model.linears for key in keys}) > 1:
                raise ModelError(
                    f"{name} has experts that were pruned next to others that were not; prune all or none"
                )

    def values(self) -> dict[str, GGUFValue]:
        """The keys of the file."""
        fields = {
            name: x
            for name, x in self.template.reader.fields.items()
            if not name.startswith(_DROPPED)
        }
        # an empty array has no type
        values = {name: _value(field) for name, field in fields.items() if field.data}
        general = gguf.Keys.General
        text = gguf.GGUFValueType.STRING
        number = gguf.GGUFValueType.UINT32
        run = self.model.run
        if (name := self.template.value(general.NAME)) is not None:
            zeros = ""
            if run.zeros:
                zeros = f", {run.sparsity_pruned:.0%} zeros"
            values[general.NAME] = GGUFValue(
                f"{name} {self.model.grid.name}{zeros}", text
            )
        values[general.QUANTIZED_BY] = GGUFValue(f"sparsellm {__version__}", text)
        values[general.QUANTIZATION_VERSION] = GGUFValue(
            gguf.GGML_QUANT_VERSION, number
        )
        kind = block_type(self.model.grid) or ""
        file_type = gguf.LlamaFileType[f"MOSTLY_{_FILE_TYPES.get(kind, kind)}"]
        values[general.FILE_TYPE] = GGUFValue(int(file_type), number)
        return values

    def type_of(self, tensor: gguf.ReaderTensor) -> gguf.GGMLQuantizationType:
        """The type in which a tensor of the template is written."""
        if self._is_linear(tensor):
            grid = grid_for(self._grid(tensor).name, int(tensor.shape[0]))
            return gguf.GGMLQuantizationType[block_type(grid) or ""]
        if tensor.name in _HEAD and tensor.name in self.keys:
            return _head_type(tensor, self.head)
        return tensor.tensor_type

    def bytes_of(self, tensor: gguf.ReaderTensor) -> int:
        """The size in which a tensor of the template is written."""
        size, stored = gguf.GGML_QUANT_SIZES[self.type_of(tensor)]
        if tensor.shape[0] % size:
            raise RecipeError(
                f"rows of {tensor.shape[0]} in {tensor.name} are not blocks of {size}; leave --head out"
            )
        return int(tensor.n_elements) // size * stored

    def data(self, tensor: gguf.ReaderTensor) -> np.ndarray:
        """The contents of a tensor of the template as they are written."""
        if tensor.name not in self.keys:
            return tensor.data
        keys = self.keys[tensor.name]
        kind = self.type_of(tensor)
        if self._is_linear(tensor):
            parts = [self.model.codes(key) for key in keys]
            codes = torch.cat([numbers for numbers, _ in parts])
            scales = torch.cat([scales for _, scales in parts])
            if tensor.name in _HEAD:
                # no converter moves these rows; some leave out the last, which stand for no token
                rows = int(tensor.shape[1])
                return to_blocks(codes[:rows], scales[:rows], self._grid(tensor))
            order = self._order(tensor, 0.0)
            if order is None:
                raise self._other(f"has {tensor.name} with other rows than {keys[0]}")
            return to_blocks(codes[order], scales[order], self._grid(tensor))
        if not all(map(self._same, keys)):
            return _stored(tensor.name, self._trained(tensor), kind)
        if kind == tensor.tensor_type:
            return tensor.data
        return _stored(tensor.name, values_of(tensor), kind)

    def _trained(self, tensor: gguf.ReaderTensor) -> Tensor:
        """Rows of the checkpoint's tensor, which is not that of the source, as the template would have them."""
        key = self.keys[tensor.name][0]
        # a run changes blocks alone
        if not tensor.name.startswith("blk."):
            raise self._not_pruned_from(f"has another {key}")
        if tensor.tensor_type.name not in _EXACT:
            raise ModelError(
                f"{self.template.path} has {tensor.name} in {tensor.tensor_type.name}, and it was trained; "
                f"{CONVERTER_ADVICE}"
            )
        for shift in _SHIFTS:
            order = self._order(tensor, shift)
            if order is not None:
                return self._rows(self.model.reader, tensor)[order].float() + shift
        raise self._other(f"has {tensor.name} with other rows than {key}")

    def _grid(self, tensor: gguf.ReaderTensor) -> Grid:
        """The grid of a tensor of linears; a ModelError if they are on several."""
        grids = {self.model.grids[key].name for key in self.keys[tensor.name]}
        if len(grids) > 1:
            names = " and ".join(sorted(grids))
            raise ModelError(
                f"{tensor.name} has experts on the grids {names}; prune all with one"
            )
        return GRIDS[grids.pop()]

    def _is_linear(self, tensor: gguf.ReaderTensor) -> bool:
        return any(key in self.model.linears for key in self.keys.get(tensor.name, ()))

    def _same(self, key: str) -> bool:
        """Whether the checkpoint's tensor is that of the source."""
        if self.source is self.model.reader:
            return True
        return torch.equal(
            self.model.reader.get(key).float(), self.source.get(key).float()
        )

    def _order(self, tensor: gguf.ReaderTensor, shift: float) -> Tensor | None:
        """The order that puts rows of the source where the template has them, less a shift; None if none does."""
        before = self._rows(self.source, tensor)
        there = (values_of(tensor) - shift).to(before.dtype)
        return row_order(there, before, self._rows(self.model.reader, tensor))

    def _rows(self, reader: CheckpointReader, tensor: gguf.ReaderTensor) -> Tensor:
        """The tensors of a checkpoint that one of the template has, as rows ``(rows, columns)``."""
        parts = []
        for key in self.keys[tensor.name]:
            part = reader.get(key)
            if key in self.model.transposed:
                part = part.t()
            if part.ndim == 1:
                part = part[:, None]
            parts.append(part.flatten(0, -2))
        return torch.cat(parts)

    def _other(self, what: str) -> ModelError:
        return ModelError(
            f"{self.template.path} was not made of {self.source.directory.name}: it {what}; {CONVERTER_ADVICE}"
        )

    def _not_pruned_from(self, what: str) -> ModelError:
        return ModelError(
            f"{self.model.reader.directory} was not pruned from {self.template.path}, which {what}; give the .gguf "
            f"file that was pruned, or {CONVERTER_ADVICE}"
        )


def _stored(name: str, values: Tensor, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """Rows of a tensor in a type of GGUF. Raises ModelError where its scales cannot hold them, as they would be
    infinite."""
    try:
        with np.errstate(over="raise"):
            return quantised(values.numpy(), kind)
    except FloatingPointError:
        largest = float(values.abs().max())
        raise ModelError(
            f"{name} has {largest:.3g}, which {kind.name} of GGUF cannot hold; check the weights of the model"
        ) from None


def _value(field: gguf.ReaderField) -> GGUFValue:
    """The value of a key as the writer takes it; text as bytes, since some tokens are not UTF-8."""
    kind = field.types[0]
    inner = field.types[-1]
    of_array = inner if kind == gguf.GGUFValueType.ARRAY else None
    if inner != gguf.GGUFValueType.STRING:
        return GGUFValue(field.contents(), kind, of_array)
    texts = [field.parts[place].tobytes() for place in field.data]
    return GGUFValue(texts if of_array else texts[0], kind, of_array)
