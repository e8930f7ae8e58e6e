"""Writes a GGUF file from a template: all is copied but the linears that are on a grid, which become its blocks."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import gguf
import numpy as np
import torch
from torch import Tensor

from sparsellm.errors import ModelError, RecipeError, StorageError, shown
from sparsellm.exports.blocks import block_type, to_blocks
from sparsellm.exports.linears import OnGrid
from sparsellm.exports.template import EXACT, Change, Template, orders_of, rows_of
from sparsellm.progress import Progress, ProgressCallback
from sparsellm.storage.directory import check_room
from sparsellm.storage.files import replace_atomically
from sparsellm.storage.reader import CheckpointReader
from sparsellm.version import __version__

_HEAD = ("token_embd.weight", "output.weight")
# Keys that describe the template's file, and not the model. The writer adds the architecture itself.
_DROPPED = ("GGUF.", "split.", "quantize.", gguf.Keys.General.ARCHITECTURE)


def check_file(out: str | os.PathLike[str], *, overwrite: bool) -> Path:
    """The path of a GGUF file to be written, without links. A StorageError says why it cannot be, or that there is a
    file, which only ``overwrite`` replaces, if it is a GGUF file."""
    place = Path(os.path.realpath(os.path.expanduser(os.fspath(out))))
    said = f"--out {shown(os.fspath(out))}"
    if place.suffix != ".gguf" or place.is_dir():
        raise StorageError(f"{said} is not the name of a .gguf file; name one, such as model.gguf")
    if not place.parent.is_dir():
        raise StorageError(f"{said}: {place.parent} is not a directory; create it, or name another file")
    if place.exists():
        with place.open("rb") as file:
            ours = file.read(4) == b"GGUF"
        if not (overwrite and ours):
            advice = "give --overwrite to replace it" if ours else "it is not a GGUF file and is not replaced"
            raise StorageError(f"{said} exists; {advice}, or name another file")
    return place


def write_gguf(
    model: OnGrid,
    dense: CheckpointReader,
    template: Template,
    place: Path,
    *,
    head: str | None,
    progress: ProgressCallback,
) -> int:
    """Writes a GGUF file, complete or not at all, and returns its size.

    Args:
        model: the checkpoint on a grid that GGUF has.
        dense: the dense model, by which the order of the template's rows is found.
        template: all but the linears comes from it.
        place: the file.
        head: the type of embedding and head, such as ``Q8_0``; None for the template's.

    Raises:
        ModelError: checkpoint, dense model and template do not belong together.
        StorageError: a weight is not on the grid, or the file cannot be written.
    """
    if place == Path(os.path.realpath(template.path)):
        raise StorageError(f"--out {place} is the template; name another file")
    made = _File(model, dense, template, head)
    check_room(place, sum(made.bytes_of(tensor) for tensor in template.reader.tensors))
    replace_atomically(place, partial(_write, made, progress))
    return place.stat().st_size


def _write(made: _File, progress: ProgressCallback, file: BinaryIO) -> None:
    template = made.template
    writer = gguf.GGUFWriter(file.name, template.arch)
    writer.data_alignment = template.reader.alignment
    for name, value in made.values().items():
        writer.add_key_value(name, *value)
    tensors = template.reader.tensors
    for tensor in tensors:
        shape = tuple(reversed(tensor.shape.tolist()))
        # Any dtype but uint8, with which the shape would be taken for one in bytes
        writer.add_tensor_info(tensor.name, shape, np.dtype(np.float32), made.bytes_of(tensor), made.type_of(tensor))
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for index, tensor in enumerate(tensors):
            progress(Progress("export", index, len(tensors), tensor.name))
            writer.write_tensor_data(made.data(tensor))
    finally:
        writer.close()
    progress(Progress("export", len(tensors), len(tensors)))


class _File:
    """The keys and tensors of the file; arguments and errors as in :func:`write_gguf`."""

    def __init__(self, model: OnGrid, dense: CheckpointReader, template: Template, head: str | None) -> None:
        self.model, self.dense, self.template = model, dense, template
        self.block = gguf.GGMLQuantizationType[block_type(model.grid) or ""]
        self.head = None if head is None else gguf.GGMLQuantizationType[head]
        named = template.keys_of(list(model.reader))
        self.tensors = {tensor.name: tensor for tensor in template.reader.tensors}
        self.keys = {name: keys for name, keys in named.items() if name in self.tensors}
        self.changes: dict[str, Change] = {}
        config = model.chain.config.get_text_config()
        names = ("num_attention_heads", "num_key_value_heads", "num_kv_heads")
        self.heads = [count for name in names if isinstance(count := getattr(config, name, None), int)] or [1]
        self._check(set(model.reader) - {key for keys in self.keys.values() for key in keys})

    def _check(self, left_out: set[str]) -> None:
        """Refuses another dense model, and tensors that the file would lose."""
        reader = self.model.reader
        for key in reader:
            if key not in self.dense or self.dense.shape(key) != reader.shape(key):
                raise ModelError(
                    f"{reader.directory} was not pruned from {self.dense.directory}, which has no {key} of shape "
                    f"{reader.shape(key)}; name the dense model with --model"
                )
        for key in sorted(left_out):
            if key in self.model.linears or not torch.equal(reader.get(key), self.dense.get(key)):
                raise self._other(f"has no tensor for {key}")
        for keys in self.keys.values():
            if len({key in self.model.linears for key in keys}) > 1:
                name = next(key for key in keys if key not in self.model.linears)
                raise ModelError(f"{name} is dense, and GGUF stacks it with experts that are not; prune it too")

    def values(self) -> dict[str, tuple[object, ...]]:
        """Each key of the file: its value, its type, and for an array the type of its elements."""
        named = {}
        for name, field in self.template.reader.fields.items():
            if not name.startswith(_DROPPED) and (len(field.types) > 1 or field.types[0] != gguf.GGUFValueType.ARRAY):
                named[name] = _value(field)
        general, text, number = gguf.Keys.General, gguf.GGUFValueType.STRING, gguf.GGUFValueType.UINT32
        run = self.model.run
        if (name := self.template.value(general.NAME)) is not None:
            zeros = f", {run.sparsity_pruned:.0%} zeros" if run.zeros else ""
            named[general.NAME] = (f"{name} {self.model.grid.name}{zeros}", text)
        named[general.QUANTIZED_BY] = (f"sparsellm {__version__}", text)
        named[general.QUANTIZATION_VERSION] = (gguf.GGML_QUANT_VERSION, number)
        named[general.FILE_TYPE] = (int(gguf.LlamaFileType[f"MOSTLY_{self.block.name}"]), number)
        return named

    def type_of(self, tensor: gguf.ReaderTensor) -> gguf.GGMLQuantizationType:
        """The type in which a tensor of the template is written."""
        keys = self.keys.get(tensor.name, ())
        if keys and keys[0] in self.model.linears:
            return self.block
        return self.head if self.head is not None and tensor.name in _HEAD else tensor.tensor_type

    def bytes_of(self, tensor: gguf.ReaderTensor) -> int:
        """The size in which a tensor of the template is written."""
        size, stored = gguf.GGML_QUANT_SIZES[self.type_of(tensor)]
        if tensor.shape[0] % size:
            raise RecipeError(f"rows of {tensor.shape[0]} in {tensor.name} are not blocks of {size}; leave --head out")
        return tensor.n_elements // size * stored

    def data(self, tensor: gguf.ReaderTensor) -> np.ndarray:
        """The contents of a tensor of the template as they are written."""
        if tensor.name not in self.keys:
            return tensor.data
        keys, kind, change = self.keys[tensor.name], self.type_of(tensor), self._change(tensor)
        if keys[0] in self.model.linears:
            codes, scales = (torch.cat(parts) for parts in zip(*map(self.model.codes, keys), strict=True))
            return to_blocks(codes[change.order], scales[change.order], self.model.grid.bits)
        values, dense = self._rows(self.model.reader, tensor), self._rows(self.dense, tensor)
        same = torch.equal(values.float(), dense.float())
        if not same and not tensor.name.startswith("blk."):  # a run changes blocks alone
            raise ModelError(
                f"{self.model.reader.directory} was not pruned from {self.dense.directory}: {keys[0]} differs; name "
                "the dense model with --model"
            )
        if same and kind == tensor.tensor_type:
            return tensor.data
        if kind.name not in EXACT and tensor.name not in _HEAD:
            raise ModelError(
                f"--like {self.template.path} has {tensor.name} in {kind.name}, and the run changed it; give a GGUF in "
                "BF16, F16 or F32"
            )
        return gguf.quantize((values[change.order].float() + change.shift).numpy(), kind)

    def _change(self, tensor: gguf.ReaderTensor) -> Change:
        """The change that makes a tensor of the template out of the dense model's."""
        if tensor.name not in self.changes:
            rows, weight = rows_of(tensor), self.tensors.get(f"{tensor.name.removesuffix('.bias')}.weight")
            orders: Sequence[Tensor] = [torch.arange(rows)]
            if tensor.name.endswith(".bias") and weight is not None and weight.name in self.keys:
                orders = [self._change(weight).order]  # a bias that is 0 would fit in any order
            elif tensor.name.startswith("blk.") and len(tensor.shape) == 2:
                orders = orders_of(rows, self.heads[0], sorted({*self.heads}))
            dense = self._rows(self.dense, tensor)
            fits = dense.numel() == tensor.n_elements and all(len(order) == rows for order in orders)
            change = self.template.change(tensor, dense, orders) if fits else None
            if change is None:
                key = self.keys[tensor.name][0]
                raise self._other(f"has {tensor.name} other than {key}, in every known order of rows")
            self.changes[tensor.name] = change
        return self.changes[tensor.name]

    def _rows(self, reader: CheckpointReader, tensor: gguf.ReaderTensor) -> Tensor:
        """The tensors of a checkpoint that one of the template has, as rows ``(rows, columns)``."""
        tensors = [
            reader.get(key).t() if key in self.model.transposed else reader.get(key) for key in self.keys[tensor.name]
        ]
        flat = torch.cat([each.reshape(-1) for each in tensors])
        return flat.view(rows_of(tensor), -1) if flat.numel() == tensor.n_elements else flat.view(-1, 1)

    def _other(self, what: str) -> ModelError:
        advice = f"give the GGUF that was made of {self.dense.directory}, or name its model with --model"
        return ModelError(f"--like {self.template.path} is of another model: it {what}; {advice}")


def _value(field: gguf.ReaderField) -> tuple[object, ...]:
    """The value of a key with its types, as the writer takes them; text as bytes, since some tokens are not UTF-8."""
    kind, inner = field.types[0], field.types[-1]
    if inner == gguf.GGUFValueType.STRING:
        texts = [field.parts[place].tobytes() for place in field.data]
        return (texts, kind, inner) if kind == gguf.GGUFValueType.ARRAY else (texts[0], kind)
    return (field.contents(), kind, inner) if kind == gguf.GGUFValueType.ARRAY else (field.contents(), kind)
