"""Packs and unpacks whole checkpoints; ``docs/format.md`` describes the format."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from sparsellm.arguments import CHECKPOINT, checked_arguments
from sparsellm.chain import Chain, open_chain
from sparsellm.chain.experts import ExpertLinear
from sparsellm.errors import RecipeError, SparseLLMError, StorageError, nearest, shown
from sparsellm.progress import Progress, ProgressCallback, ignore
from sparsellm.records import PRUNING, PUT_BACK, read_pruning
from sparsellm.sources.resolve import checkpoint_directory
from sparsellm.storage.destination import check_destination
from sparsellm.storage.files import replace_atomically, write_all
from sparsellm.storage.resume import PACK, UNPACK
from sparsellm.storage.shard import TensorSource
from sparsellm.storage.writer import CheckpointWriter, belongs_to
from sparsepack.checkpoint import (
    MANIFEST,
    PackedEntry,
    PackedReader,
    is_packed,
    manifest,
    quantization_config,
    read_config,
)
from sparsepack.codes import exponents_of_text, resolve_value_type
from sparsepack.grid import INTEGERS
from sparsepack.layout import pack as pack_weight
from sparsepack.layout import unpack as unpack_weight
from sparsepack.module import row_scale
from sparsepack.validation import PACK_AGAIN

HEADS = ("keep", "int8")
_REPORTS = (PRUNING, "recipe.yaml")  # reports of the pruning, which are valid for the packed model too


@dataclass
class PackResult:
    """The result of packing or unpacking.

    Attributes:
        path: the finished checkpoint.
        linears: the packed form of each linear of the blocks; None for one that stays dense because that is smaller.
        dense_bytes: size of these weights, dense, in the dtypes of the checkpoint.
        packed_bytes: size of these weights in the new checkpoint.
        weights: number of these weights.
        checkpoint_bytes: size of all weight files of the new checkpoint.
        head: the packed form of embedding and output head; empty if they were copied.
        expert_weights: number of weights of experts, which stay dense and count in none of the others.
        rounded: the linears whose values were no numbers of their integer grid yet, and were rounded to nearest.
    """

    path: Path
    linears: dict[str, PackedEntry | None] = field(default_factory=dict)
    dense_bytes: int = 0
    packed_bytes: int = 0
    weights: int = 0
    checkpoint_bytes: int = 0
    head: dict[str, PackedEntry] = field(default_factory=dict)
    expert_weights: int = 0
    rounded: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """All attributes as plain JSON values, as ``--json`` prints them."""
        return {
            "path": str(self.path),
            "weights": self.weights,
            "dense_bytes": self.dense_bytes,
            "packed_bytes": self.packed_bytes,
            "bits_per_weight": 8 * self.packed_bytes / self.weights,
            "of_bf16": self.packed_bytes / (2 * self.weights),
            "checkpoint_bytes": self.checkpoint_bytes,
            "expert_weights": self.expert_weights,
            "rounded": self.rounded,
            "head": {name: entry.to_dict() for name, entry in self.head.items()},
            "linears": {name: entry.to_dict() if entry else "dense" for name, entry in self.linears.items()},
        }


@checked_arguments(model=CHECKPOINT)
def pack(
    model: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    values: str = "keep",
    head: str = "keep",
    overwrite: bool = False,
    restart: bool = False,
    progress: ProgressCallback = ignore,
) -> PackResult:
    """Writes a packed checkpoint: every linear of the blocks in its smallest form (dense, bitmask or N:M).

    Floating values are exact (``bf16`` and ``fp16`` round once if the checkpoint is finer); ``int8``, ``int4`` and
    ``int3`` quantise the kept values, and int3 takes the memory of int4. Embedding, norms, head and biases are copied.
    If it fails, no files are left.

    Args:
        model: a directory (or ``demo``, a ``.gguf`` file, a hub id) of a dense checkpoint with zeros.
        out: the directory of the packed checkpoint.
        values: ``keep`` for the type each weight is stored in, or ``bf16``, ``fp16``, ``fp32``, ``int8``,
            ``int4``, ``int3``.
        head: ``int8`` stores embedding and output head as rows of int8; ``keep`` copies them.
        overwrite: replace the checkpoint in ``out``.
        restart: remove the files that an unfinished run of another kind left for ``out``. Packing is never resumed.
        progress: called with the progress of the run.

    Raises:
        RecipeError: the value type or ``head`` is unknown, the checkpoint is packed already, or its embedding is of a
            kind that has no int8 form.
        ModelError, StorageError: the checkpoint cannot be read, or ``out`` cannot be written.
        NumericalError: a weight does not fit into the value type.
    """
    resolve_value_type(values, torch.float32)
    if head not in HEADS:
        raise RecipeError(f"head: {head!r:.100} is unknown; {nearest(head, HEADS)}")
    check_destination(out, overwrite=overwrite, restart=restart, kind=PACK)
    directory = checkpoint_directory(str(model))
    out = check_destination(out, sources=[directory], overwrite=overwrite, restart=restart, kind=PACK)
    if is_packed(read_config(directory)):
        raise RecipeError(f"{directory} is packed already; unpack it first to pack it another way")
    chain = open_chain(directory, device=torch.device("cpu"))
    exponents = _exponents(chain, directory, values)
    assert chain.reader is not None
    # With any value type, no linear takes more space than its dense weight.
    size = chain.reader.bytes
    with CheckpointWriter(
        out, shards=len(chain) + 1, identity={}, kind=PACK, restart=restart, overwrite=overwrite, need_bytes=size
    ) as writer:
        return _finish(writer, lambda: _write_packed(writer, chain, directory, (values, head, exponents), progress))


@checked_arguments()
def unpack(
    directory: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    overwrite: bool = False,
    restart: bool = False,
    progress: ProgressCallback = ignore,
) -> PackResult:
    """Writes the dense checkpoint of a packed one; floating values are exact. If it fails, no files are left.

    Args:
        directory: of the packed checkpoint.
        out, overwrite, restart, progress: as in :func:`pack`.

    Raises:
        ModelError: the weights are not those of the model that ``config.json`` describes.
        StorageError: the checkpoint is damaged, or ``out`` cannot be written.
        RecipeError: the checkpoint is not packed.
    """
    check_destination(out, overwrite=overwrite, restart=restart, kind=UNPACK)
    source = checkpoint_directory(str(directory))
    out = check_destination(out, sources=[source], overwrite=overwrite, restart=restart, kind=UNPACK)
    if not is_packed(read_config(source)):
        raise RecipeError(f"{source} is not packed; there is nothing to unpack")
    reader = _checked_reader(source)
    shards: dict[str, list[str]] = {}
    for name in reader:
        shards.setdefault(reader.file_of(name).name, []).append(name)
    with CheckpointWriter(
        out,
        shards=len(shards),
        identity={},
        kind=UNPACK,
        restart=restart,
        overwrite=overwrite,
        need_bytes=reader.bytes,
    ) as writer:
        return _finish(writer, lambda: _write_dense(writer, reader, list(shards.values()), progress))


def _write_packed(
    writer: CheckpointWriter,
    chain: Chain,
    source: Path,
    kinds: tuple[str, str, dict[str, Tensor]],
    progress: ProgressCallback,
) -> PackResult:
    """Writes all files of the packed checkpoint; ``kinds``: the types of values and head, exponents by linear."""
    values, head, exponents = kinds
    result = PackResult(writer.out)
    outer = chain.outer_tensors()
    if head == "int8":
        outer.update(_packed_head(chain, result))
    writer.write_shard(len(chain), outer)
    for index in range(len(chain)):
        progress(Progress("pack", index, len(chain), chain.block_names[index]))
        writer.write_shard(index, _sources(_packed_block(chain, index, values, exponents, result)))
    progress(Progress("pack", len(chain), len(chain)))
    _write_companions(writer, source)
    entries = {name: entry for name, entry in result.linears.items() if entry is not None} | result.head
    if entries:
        config = {**read_config(writer.partial), "quantization_config": quantization_config(entries)}
        writer.write_json("config.json", config)
        writer.write_json(MANIFEST, manifest(writer.partial))
    return result


def _write_dense(
    writer: CheckpointWriter, reader: PackedReader, shards: list[list[str]], progress: ProgressCallback
) -> PackResult:
    """Writes all files of the unpacked checkpoint, the weights divided into ``shards`` by name."""
    for index, names in enumerate(shards):
        progress(Progress("unpack", index, len(shards)))
        writer.write_shard(index, _sources(reader.read(names)))
    progress(Progress("unpack", len(shards), len(shards)))
    _write_companions(writer, reader.directory)
    result = PackResult(writer.out, dict.fromkeys(reader.entries))
    for entry in reader.entries.values():
        count = math.prod(entry.shape)
        result.weights += count
        result.dense_bytes += count * entry.dtype.itemsize
    result.packed_bytes = result.dense_bytes
    return result


def _checked_reader(source: Path) -> PackedReader:
    """A reader of a packed checkpoint whose weights fit the model that its ``config.json`` describes.

    Raises:
        ModelError: a weight is missing, or has another shape than in the model.
        StorageError: the files are damaged, or config and model disagree on whether a weight is transposed, which the
            shape of a square weight does not show.
    """
    chain = open_chain(source, device=torch.device("cpu"))
    assert chain.reader is not None
    reader = chain.reader
    assert isinstance(reader, PackedReader)
    for index in range(len(chain)):
        for linear in chain.linears(index):
            name = chain.key_of[linear.weight_name].removesuffix(".weight")
            entry = reader.entries.get(name)
            if entry is not None and entry.transposed != linear.transposed:
                raise StorageError(
                    f"config.json: quantization_config describes {name!r} with transposed = {entry.transposed}, which "
                    f"the model's {type(linear.module).__name__} is not; {PACK_AGAIN}"
                )
    return reader


def _sources(tensors: dict[str, Tensor]) -> dict[str, TensorSource]:
    return {name: TensorSource.of(tensor) for name, tensor in tensors.items()}


def _packed_head(chain: Chain, result: PackResult) -> dict[str, TensorSource]:
    """The tensors of embedding and head in int8, by name; adds their entries to ``result``.

    Raises:
        RecipeError: one of them is no linear, and no embedding whose rows are multiplied by a known factor at most.
    """
    assert chain.reader is not None
    tensors: dict[str, TensorSource] = {}
    names = {id(module): name for name, module in chain.model.named_modules()}
    for module in (chain.model.get_input_embeddings(), chain.model.get_output_embeddings()):
        key = chain.key_of.get(f"{names.get(id(module))}.weight")
        if key is None or key in tensors:  # tied: stored once
            continue
        known = type(module) is nn.Linear or row_scale(module) is not None
        if not known or not key.endswith(".weight"):
            raise RecipeError(f"head=int8: {key} is a {type(module).__name__}, which has no int8 form; use head=keep")
        weight = chain.reader.get(key)
        packed = pack_weight(weight, "int8", "dense")
        assert packed is not None
        name = key.removesuffix(".weight")
        result.head[name] = PackedEntry(packed.shape, packed.layout, packed.value_type, weight.dtype)
        tensors[key] = TensorSource.of(torch.zeros(1, dtype=weight.dtype))
        tensors.update(_sources({f"{key}_{part}": tensor for part, tensor in packed.stored.items()}))
    return tensors


def _exponents(chain: Chain, directory: Path, values: str) -> dict[str, Tensor]:
    """The exponents of columns, by linear, with which the run that wrote a checkpoint rounded values of this type.

    Raises:
        StorageError: ``pruning.json`` cannot be read, or has exponents that do not fit the model.
    """
    path = directory / PRUNING
    if values not in INTEGERS or not path.is_file():
        return {}
    pruning = read_pruning(directory)
    if pruning.values != values:
        return {}
    columns = {linear.name: linear.in_features for index in range(len(chain)) for linear in chain.linears(index)}
    found: dict[str, Tensor] = {}
    for linear in pruning.linears:
        exponents = exponents_of_text(linear.exponents)
        if exponents is not None and columns.get(linear.name) != len(exponents):
            wanted = columns.get(linear.name, "no such linear")
            said = f"{len(exponents)} exponents of {shown(linear.name)}, where the model has {wanted}"
            raise StorageError(f"{path}: {said}; {PUT_BACK}")
        if exponents is not None:
            found[linear.name] = exponents
    return found


def _packed_block(
    chain: Chain, index: int, values: str, exponents: dict[str, Tensor], result: PackResult
) -> dict[str, Tensor]:
    """The tensors of a block to be written. Adds their sizes and entries to ``result``."""
    assert chain.reader is not None
    # Experts stay dense: transformers stacks their weights while it loads, packed or not.
    every = chain.linears(index)
    linears = [linear for linear in every if not isinstance(linear.module, ExpertLinear)]
    experts = [linear for linear in every if isinstance(linear.module, ExpertLinear)]
    result.expert_weights += sum(linear.parameter.numel() for linear in experts)
    chain_linears = {chain.key_of[linear.weight_name]: linear for linear in linears}
    tensors = chain.stored_block(index)
    for key, linear in chain_linears.items():
        stored = tensors.pop(key)
        weight = stored.t().contiguous() if linear.transposed else stored
        name = key.removesuffix(".weight")
        try:
            # The format adds its tensors to names that end so; a family that names a matrix otherwise keeps it dense.
            # A weight that several modules share stays dense too: one of them would have it packed, the others none.
            apart = key.endswith(".weight") and not chain.is_shared(linear.weight_name)
            packed = pack_weight(weight, values, exponents=exponents.get(linear.name)) if apart else None
        except SparseLLMError as error:
            raise type(error)(f"{key}: {error}") from None
        dense = stored.numel() * stored.element_size()
        result.weights += stored.numel()
        result.dense_bytes += dense
        if packed is None:
            tensors[key] = stored
            result.linears[name] = None
            result.packed_bytes += dense
            continue
        result.linears[name] = PackedEntry(
            packed.shape, packed.layout, packed.written_type, stored.dtype, packed.pattern, linear.transposed
        )
        result.packed_bytes += packed.nbytes
        if values in INTEGERS and not torch.equal(unpack_weight(packed, weight.dtype), weight):
            result.rounded.append(name)
        tensors[key] = torch.zeros(1, dtype=stored.dtype)  # loaders refuse this shape for the weight
        tensors.update({f"{key}_{field}": tensor for field, tensor in packed.stored.items()})
    return tensors


def _finish(writer: CheckpointWriter, write: Callable[[], PackResult]) -> PackResult:
    """Writes all files with ``write``, then renames the directory; if ``write`` fails, its files are removed."""
    try:
        result = write()
    except BaseException:
        with contextlib.suppress(StorageError):
            writer.discard()
        raise
    result.checkpoint_bytes = sum(file.stat().st_size for file in writer.partial.glob("*.safetensors"))
    result.path = writer.finish()
    return result


def _write_companions(writer: CheckpointWriter, source: Path) -> None:
    """Writes config, tokenizer and the reports of the pruning."""
    writer.copy_companions(source)
    for name in _REPORTS:
        if (source / name).is_file() and belongs_to(source, source / name):
            try:
                content = (source / name).read_bytes()
            except OSError as error:
                raise StorageError(f"cannot read {source / name}: {error.strerror or error}") from None
            replace_atomically(writer.partial / name, partial(_write, content))


def _write(content: bytes, file: BinaryIO) -> None:
    write_all(file, content)
