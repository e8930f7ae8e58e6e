"""Packing a pruned checkpoint into the sparse format, and unpacking it again; see ``docs/format.md``."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsellm.arguments import CHECKPOINT, checked_arguments
from sparsellm.chain import Chain, open_chain
from sparsellm.chain.open import checkpoint_directory
from sparsellm.errors import RecipeError, SparseLLMError, StorageError
from sparsellm.progress import Progress, ProgressCallback, ignore
from sparsellm.runtime.packed import pack as pack_weight
from sparsellm.runtime.packed import resolve_value_type
from sparsellm.storage.packed import (
    MANIFEST,
    PackedEntry,
    PackedReader,
    is_packed,
    manifest,
    quantization_config,
    read_config,
)
from sparsellm.storage.shard import TensorSource
from sparsellm.storage.writer import CheckpointWriter, check_out

_RUN = {"run": "pack"}  # quick enough to begin anew where it was cut short
_REPORTS = ("pruning.json", "recipe.yaml")  # how the weights came to be zero stays true when they are packed


@dataclass
class PackResult:
    """What packing (or unpacking) did.

    Attributes:
        path: the finished checkpoint.
        linears: what each linear of the blocks became; None for one that is smaller dense.
        dense_bytes: of the linears' weights as they were stored.
        packed_bytes: of the same weights now.
        weights: how many there are.
        checkpoint_bytes: all weight files now.
    """

    path: Path
    linears: dict[str, PackedEntry | None] = field(default_factory=dict)
    dense_bytes: int = 0
    packed_bytes: int = 0
    weights: int = 0
    checkpoint_bytes: int = 0

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain JSON values; what ``--json`` prints."""
        return {
            "path": str(self.path),
            "weights": self.weights,
            "dense_bytes": self.dense_bytes,
            "packed_bytes": self.packed_bytes,
            "bits_per_weight": 8 * self.packed_bytes / self.weights,
            "of_bf16": self.packed_bytes / (2 * self.weights),
            "checkpoint_bytes": self.checkpoint_bytes,
            "linears": {name: entry.to_dict() if entry else "dense" for name, entry in self.linears.items()},
        }


@checked_arguments(model=CHECKPOINT)
def pack(
    model: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    values: str = "keep",
    overwrite: bool = False,
    progress: ProgressCallback = ignore,
) -> PackResult:
    """Writes a checkpoint with every linear of the blocks in its smallest form: dense, bitmask or N:M.

    With floating values this loses nothing (``bf16`` and ``fp16`` round once where the checkpoint is finer); ``int8``
    and ``int4`` quantise the kept values. Embedding, norms, head and biases are stored as they came.

    Args:
        model: a directory (or ``demo``, a ``.gguf`` file, a hub id) of a dense checkpoint with zeros.
        out: the directory of the packed checkpoint.
        values: ``keep`` for the type each weight is stored in, or ``bf16``, ``fp16``, ``fp32``, ``int8``, ``int4``.
        overwrite: replace the checkpoint in ``out``.
        progress: is told how far the run is.

    Raises:
        RecipeError: the value type is unknown, or the checkpoint is packed already.
        ModelError, StorageError: the checkpoint cannot be read, or ``out`` cannot be written.
        NumericalError: a weight does not fit into the value type.
    """
    resolve_value_type(values, torch.float32)
    out = Path(out)
    check_out(out, overwrite=overwrite, need_bytes=0)
    directory = checkpoint_directory(str(model))
    _not_itself(directory, out)
    if is_packed(read_config(directory)):
        raise RecipeError(f"{directory} is packed already; unpack it first to pack it another way")
    chain = open_chain(directory, device=torch.device("cpu"))
    assert chain.weights is not None
    # Whatever the values become, no linear takes more room than it does dense.
    size = chain.weights.reader.bytes
    with CheckpointWriter(
        out, shards=len(chain) + 1, identity=_RUN, restart=True, overwrite=overwrite, need_bytes=size
    ) as writer:
        writer.write_shard(len(chain), chain.outer_tensors())
        result = PackResult(writer.out)
        for index in range(len(chain)):
            progress(Progress("pack", index, len(chain), chain.block_names[index]))
            writer.write_shard(index, _sources(_packed_block(chain, index, values, result)))
        progress(Progress("pack", len(chain), len(chain)))
        entries = {name: entry for name, entry in result.linears.items() if entry is not None}

        def describe(config: dict[str, Any]) -> None:
            if entries:
                config["quantization_config"] = quantization_config(entries)

        return _finish(writer, directory, result, describe)


@checked_arguments()
def unpack(
    directory: str | os.PathLike[str],
    *,
    out: str | os.PathLike[str],
    overwrite: bool = False,
    progress: ProgressCallback = ignore,
) -> PackResult:
    """Writes a packed checkpoint as an ordinary dense one: floating values exactly as they were packed.

    Raises:
        StorageError: the checkpoint is damaged, or ``out`` cannot be written.
        RecipeError: the checkpoint is not packed.
    """
    out, source = Path(out), checkpoint_directory(str(directory))
    check_out(out, overwrite=overwrite, need_bytes=0)
    _not_itself(source, out)
    config = read_config(source)
    if not is_packed(config):
        raise RecipeError(f"{source} is not packed; there is nothing to unpack")
    reader = PackedReader(source, config["quantization_config"])
    shards: dict[str, list[str]] = {}
    for name in reader:
        shards.setdefault(reader.file_of(name).name, []).append(name)
    with CheckpointWriter(
        out, shards=len(shards), identity=_RUN, restart=True, overwrite=overwrite, need_bytes=reader.bytes
    ) as writer:
        for index, names in enumerate(shards.values()):
            progress(Progress("unpack", index, len(shards)))
            writer.write_shard(index, _sources(reader.read(names)))
        progress(Progress("unpack", len(shards), len(shards)))
        result = PackResult(writer.out, dict.fromkeys(reader.entries))
        for entry in reader.entries.values():
            count = entry.shape[0] * entry.shape[1]
            result.weights += count
            result.dense_bytes += count * entry.dtype.itemsize
        result.packed_bytes = result.dense_bytes
        return _finish(writer, source, result, lambda config: None)


def _sources(tensors: dict[str, Tensor]) -> dict[str, TensorSource]:
    return {name: TensorSource.of(tensor) for name, tensor in tensors.items()}


def _packed_block(chain: Chain, index: int, values: str, result: PackResult) -> dict[str, Tensor]:
    """The tensors of a block as they will be written; what they are is entered into ``result``."""
    assert chain.weights is not None
    chain_linears = {chain.weights.key_of[linear.weight_name]: linear for linear in chain.linears(index)}
    tensors = chain.stored_block(index)
    for key, linear in chain_linears.items():
        stored = tensors.pop(key)
        weight = stored.t().contiguous() if linear.transposed else stored
        name = key.removesuffix(".weight")
        try:
            packed = pack_weight(weight, values)
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
            packed.shape, packed.layout, packed.value_type, stored.dtype, packed.pattern, linear.transposed
        )
        result.packed_bytes += packed.nbytes
        tensors[key] = torch.zeros(1, dtype=stored.dtype)  # a shape that no loader takes for the weight
        tensors.update({f"{key}_{field}": tensor for field, tensor in packed.tensors.items()})
    return tensors


def _finish(
    writer: CheckpointWriter, source: Path, result: PackResult, describe: Callable[[dict[str, Any]], None]
) -> PackResult:
    """Config, tokenizer, reports and checksums, and the final name."""
    writer.copy_companions(source)
    for name in _REPORTS:
        if (source / name).is_file():
            writer.write_text(name, (source / name).read_text(encoding="utf-8"))
    config = json.loads((writer.partial / "config.json").read_text(encoding="utf-8"))
    describe(config)
    writer.write_json("config.json", config)
    if is_packed(config):
        writer.write_json(MANIFEST, manifest(writer.partial))
    result.checkpoint_bytes = sum(file.stat().st_size for file in writer.partial.glob("*.safetensors"))
    result.path = writer.finish()
    return result


def _not_itself(source: Path, out: Path) -> None:
    if source.absolute() == out.absolute():
        raise StorageError(f"--out {out} is the model itself; name another directory")
