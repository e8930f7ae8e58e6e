"""Packs and unpacks the checkpoint of a directory; :mod:`sparsepack` has the format."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from sparsellm.arguments import Checkpoint, Out, checked
from sparsellm.errors import NumericalError, RecipeError, StorageError, shown
from sparsellm.files.directory import (
    WorkingDirectory,
    check_destination,
    checkpoints_among,
)
from sparsellm.files.reader import PackedReader
from sparsellm.files.resolve import checkpoint_directory
from sparsellm.files.writer import CheckpointWriter, TensorSource, written
from sparsellm.inputs import read_object
from sparsellm.model import Chain, open_chain
from sparsellm.model.experts import ExpertLinear
from sparsellm.progress import Progress, ProgressCallback, ignore
from sparsellm.recipe import Recipe
from sparsellm.records import KEEP, MIXED, PRUNING, PUT_BACK, Pruning, read_pruning
from sparsellm.report.card import CARD, card_text
from sparsepack import PackError, layout
from sparsepack.bench import weight_file_bytes
from sparsepack.checkpoint import (
    MANIFEST,
    WAY_IN,
    PackedEntry,
    is_packed,
    manifest,
    quantization_config,
)
from sparsepack.codes import GROUPED, exponents_of_text
from sparsepack.grid import INTEGERS
from sparsepack.grids import GRIDS
from sparsepack.module import row_scale
from sparsepack.validation import PACK_AGAIN

Values = Literal["keep", "bf16", "fp16", "fp32", "int8", "int4", "int3", "mixed"]
# The two kinds of runs.
PACK = "pack"
UNPACK = "unpack"


@dataclass(frozen=True)
class Stored:
    """How ``pack`` stores a linear: the type of its values, the columns that share a scale if that is known, and the
    exponents of columns, int8 ``(in,)``."""

    values: str
    group: int | None = None
    exponents: Tensor | None = None


@dataclass
class PackResult:
    """The result of packing or unpacking into ``path``."""

    path: Path
    # None: it is smaller dense
    linears: dict[str, PackedEntry | None] = field(default_factory=dict, repr=False)
    dense_bytes: int = 0  # the size of the weights of these linears
    packed_bytes: int = 0
    weights: int = 0
    checkpoint_bytes: int = 0  # all weight files of the new checkpoint
    # embedding and output head; empty if they were copied
    head: dict[str, PackedEntry] = field(default_factory=dict)
    expert_weights: int = (
        0  # weights of experts, which stay dense and are not counted above
    )
    # linears whose values were not on their integer grid
    rounded: list[str] = field(default_factory=list, repr=False)

    def to_dict(self) -> dict[str, object]:
        """All attributes as plain JSON values, as ``--json`` prints them."""
        return {
            **vars(self),
            "path": str(self.path),
            "bits_per_weight": 8 * self.packed_bytes / self.weights,
            "of_bf16": self.packed_bytes / (2 * self.weights),
            "head": {name: entry.to_dict() for name, entry in self.head.items()},
            "linears": {
                name: entry.to_dict() if entry else "dense"
                for name, entry in self.linears.items()
            },
        }


def check_packable(recipe: Recipe) -> None:
    """Raises RecipeError if what a recipe makes has no packed form."""
    if recipe.grid != "own" and recipe.values == "int8":
        raise RecipeError(
            f"grid {recipe.grid} has no packed form in int8; export the result, and do not pack it"
        )


@checked
def pack(
    model: Checkpoint,
    *,
    out: Out,
    values: Values = "keep",
    head: Literal["keep", "int8"] = "keep",
    overwrite: bool = False,
    restart: bool = False,
    allow_copy: bool = False,
    progress: ProgressCallback = ignore,
) -> PackResult:
    """Writes a packed checkpoint: linears of the blocks, except experts, in the smallest form (dense, bitmask or N:M).

    Floating values are exact (``bf16`` and ``fp16`` round once if the checkpoint is finer); integers quantise the kept
    values. All else is copied. If it fails, no files are left.

    Args:
        model: a directory (or ``demo``, a ``.gguf`` file, a hub id) of a dense checkpoint with zeros.
        out, overwrite, progress: as in :func:`sparsellm.prune`.
        values: type of the kept values; ``keep`` for the type in which each weight is stored, ``mixed`` for that to
            which the run rounded each linear.
        head: ``int8`` stores embedding and output head as rows of int8; ``keep`` copies them.
        restart: remove the files that an unfinished run of another kind left for ``out``. Packing is never resumed.
        allow_copy: write a dense copy if no linear is smaller packed.

    Raises:
        RecipeError: a setting is unknown, the checkpoint is packed already, no linear of it is smaller packed, or its
            embedding has no int8 form.
        ModelError, StorageError: the checkpoint cannot be read, or ``out`` cannot be written.
        NumericalError: a weight does not fit into the value type.
    """
    source, place = _places(model, out, PACK, overwrite=overwrite)
    chain = open_chain(source, device=torch.device("cpu"))
    result = PackResult(place)
    recorded = _rounding(chain, source, values)
    assert chain.reader is not None
    # with any value type, no linear takes more space than its dense weight
    need = chain.reader.bytes
    work = WorkingDirectory(
        place, {"kind": PACK}, overwrite=overwrite, restart=restart, need_bytes=need
    )
    with _written(work, len(chain) + 1, source, result) as writer:
        outer: Mapping[str, TensorSource | Tensor] = chain.outer_tensors()
        if head == "int8":
            outer = _outside_blocks(chain, result)
        writer.write_shard(len(chain), outer)
        for index in range(len(chain)):
            progress(Progress("pack", index, len(chain), chain.block_names[index]))
            writer.write_shard(
                index,
                _packed_block(
                    chain, index, values=values, recorded=recorded, result=result
                ),
            )
        progress(Progress("pack", len(chain), len(chain)))
        if not (allow_copy or result.head or any(result.linears.values())):
            why = "no linear in its blocks is smaller packed than dense"
            raise RecipeError(
                f"{source} has nothing to pack: {why}; prune it first, or give --values int8 or int4"
            )
    return result


@checked
def unpack(
    directory: Checkpoint,
    *,
    out: Out,
    overwrite: bool = False,
    restart: bool = False,
    progress: ProgressCallback = ignore,
) -> PackResult:
    """Writes the dense checkpoint of a packed one; floating values are exact. Arguments, errors: see :func:`pack`."""
    source, place = _places(directory, out, UNPACK, overwrite=overwrite)
    reader = _checked_reader(source)
    shards: dict[str, list[str]] = {}
    for name in reader:
        shards.setdefault(reader.file_of(name).name, []).append(name)
    weights = sum(math.prod(entry.shape) for entry in reader.entries.values())
    size = sum(reader.bytes_of(f"{name}.weight") for name in reader.entries)
    result = PackResult(place, dict.fromkeys(reader.entries), size, size, weights)
    work = WorkingDirectory(
        place,
        {"kind": UNPACK},
        overwrite=overwrite,
        restart=restart,
        need_bytes=reader.bytes,
    )
    with _written(work, len(shards), source, result) as writer:
        for index, names in enumerate(shards.values()):
            progress(Progress("unpack", index, len(shards)))
            writer.write_shard(index, {name: reader.get(name) for name in names})
        progress(Progress("unpack", len(shards), len(shards)))
    return result


def _places(
    model: Checkpoint, out: Out, kind: str, *, overwrite: bool
) -> tuple[Path, Path]:
    """The directories of the model and of the new checkpoint, checked."""
    # before the model is downloaded
    check_destination(out, overwrite=overwrite, sources=checkpoints_among(model))
    source = checkpoint_directory(str(model))
    packed = is_packed(read_object(source / "config.json"))
    if packed and kind == PACK:
        raise RecipeError(
            f"{source} is packed already; unpack it first to pack it another way"
        )
    if not packed and kind == UNPACK:
        raise RecipeError(f"{source} is not packed; there is nothing to unpack")
    return source, check_destination(out, overwrite=overwrite, sources=[source])


@contextmanager
def _written(
    work: WorkingDirectory, shards: int, source: Path, result: PackResult
) -> Iterator[CheckpointWriter]:
    """As :func:`~sparsellm.files.writer.written`; companions, a card and the packed format's own files follow."""
    with written(work, shards) as writer:
        yield writer
        # these two hold for the packed model too
        writer.copy_companions(source, PRUNING, "recipe.yaml")
        entries = {
            name: entry for name, entry in result.linears.items() if entry is not None
        } | result.head
        if entries:
            config = read_object(writer.folder / "config.json")
            writer.write_json(
                "config.json",
                {
                    **config,
                    **WAY_IN,
                    "quantization_config": quantization_config(entries),
                },
            )
            writer.write_json(MANIFEST, manifest(writer.folder))
        text = ""
        with suppress(StorageError):  # a missing or damaged record gives no card
            text = card_text(read_pruning(source), packed=entries.values())
        if text:
            writer.write_text(CARD, text)
        result.checkpoint_bytes = weight_file_bytes(writer.folder)
    result.path = work.out


def _checked_reader(source: Path) -> PackedReader:
    """A reader of a packed checkpoint whose weights fit the model of its ``config.json``, also square ones."""
    chain = open_chain(source, device=torch.device("cpu"))
    assert isinstance(chain.reader, PackedReader)
    for linear in (
        linear for index in range(len(chain)) for linear in chain.linears(index)
    ):
        name = chain.key_of[linear.weight_name].removesuffix(".weight")
        if (
            entry := chain.reader.entries.get(name)
        ) is not None and entry.transposed != linear.transposed:
            raise StorageError(
                f"config.json: quantization_config describes {name!r} with transposed = {entry.transposed}, which "
                f"the model's {type(linear.module).__name__} is not; {PACK_AGAIN}"
            )
    return chain.reader


def _stored(
    key: str, packed: layout.PackedWeight, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a packed weight, and a placeholder with a shape that loaders refuse for the weight."""
    return {key: torch.zeros(1, dtype=dtype)} | {
        f"{key}_{part}": tensor for part, tensor in packed.stored.items()
    }


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Errors of packing inside the context name the tensor ``key``."""
    try:
        yield
    except PackError as error:
        raise NumericalError(f"{key}: {error}") from None


def _outside_blocks(
    chain: Chain, result: PackResult
) -> dict[str, TensorSource | Tensor]:
    """The tensors outside the blocks, embedding and head in int8, by name; adds the entries of these to ``result``."""
    assert chain.reader is not None
    tensors: dict[str, TensorSource | Tensor] = {**chain.outer_tensors()}
    names = {id(module): name for name, module in chain.model.named_modules()}
    for module in (
        chain.model.get_input_embeddings(),
        chain.model.get_output_embeddings(),
    ):
        key = chain.key_of.get(f"{names.get(id(module))}.weight")
        # tied: stored once
        if key is None or key.removesuffix(".weight") in result.head:
            continue
        # tied, and stored twice
        if result.head and module.weight is chain.model.get_input_embeddings().weight:
            del tensors[key]
            continue
        known = type(module) is nn.Linear or row_scale(module) is not None
        if not known or not key.endswith(".weight"):
            raise RecipeError(
                f"head=int8: {key} is a {type(module).__name__}, which has no int8 form; use head=keep"
            )
        weight = chain.reader.get(key)
        with _named(key):
            packed = layout.pack(weight, "int8", "dense")
        assert packed is not None
        result.head[key.removesuffix(".weight")] = PackedEntry.of(packed, weight.dtype)
        tensors |= _stored(key, packed, weight.dtype)
    return tensors


def recorded_of(run: Pruning, values: str) -> dict[str, Stored]:
    """How the linears of a run are stored that it rounded to this type, or all that it rounded if that is ``mixed``, by
    name. Raises RecipeError if the packed format does not have their grid."""
    stored = {}
    for linear in run.linears:
        form = Stored(run.values_of(linear))
        if (grid := GRIDS.get(form.values)) is not None:
            form = Stored(grid.values, grid.group)
        if form.values not in INTEGERS or values not in (form.values, MIXED):
            continue
        if grid is not None and form.values not in GROUPED:
            raise RecipeError(
                f"{linear.name} is on the grid {grid.name}, which the packed format does not have; pack with values "
                "keep, or export it"
            )
        exponents = exponents_of_text(linear.exponents)
        stored[linear.name] = replace(form, exponents=exponents)
    return stored


def _rounding(chain: Chain, directory: Path, values: str) -> dict[str, Stored]:
    """:func:`recorded_of` of the run that wrote a checkpoint. A StorageError says that exponents do not fit the model,
    or that there is no record where one is needed."""
    path = directory / PRUNING
    if values not in (*INTEGERS, MIXED) or (values != MIXED and not path.is_file()):
        return {}
    recorded = recorded_of(read_pruning(directory), values)
    columns = {
        linear.name: linear.in_features
        for index in range(len(chain))
        for linear in chain.linears(index)
    }
    for name, form in recorded.items():
        if form.exponents is not None:
            count = len(form.exponents)
            if (expected := columns.get(name, "no such linear")) != count:
                mismatch = f"{count} exponents of {shown(name)}, where the model has {expected}"
                raise StorageError(f"{path}: {mismatch}; {PUT_BACK}")
    return recorded


def _packed_block(
    chain: Chain,
    index: int,
    values: str,
    recorded: Mapping[str, Stored],
    result: PackResult,
) -> dict[str, Tensor]:
    """The tensors of a block to be written, linears that are not ``recorded`` with ``values``. Adds their sizes and
    entries to ``result``."""
    otherwise = Stored(KEEP if values == MIXED else values)
    tensors = chain.stored_block(index)
    for linear in chain.linears(index):
        # stays dense: transformers stacks experts while it loads
        if isinstance(linear.module, ExpertLinear):
            result.expert_weights += linear.parameter.numel()
            continue
        key = chain.key_of[linear.weight_name]
        stored = tensors.pop(key)
        if linear.transposed:
            weight = stored.t().contiguous()
        else:
            weight = stored
        name = key.removesuffix(".weight")
        form = recorded.get(linear.name, otherwise)
        packed = None
        # The format adds its tensors to names that end so; a family that names a matrix otherwise keeps it dense.
        # A weight that several modules share stays dense too: one of them would have it packed, the others not.
        if key.endswith(".weight") and not chain.is_shared(linear.weight_name):
            with _named(key):
                packed = layout.pack(
                    weight, form.values, exponents=form.exponents, group=form.group
                )
        result.weights += stored.numel()
        result.dense_bytes += stored.nbytes
        result.packed_bytes += stored.nbytes if packed is None else packed.nbytes
        entry = None
        if packed is not None:
            entry = PackedEntry.of(packed, stored.dtype, transposed=linear.transposed)
        result.linears[name] = entry
        if (
            packed is not None
            and form.values in INTEGERS
            and not torch.equal(layout.unpack(packed, weight.dtype), weight)
        ):
            result.rounded.append(name)
        if packed is None:
            tensors[key] = stored
        else:
            tensors |= _stored(key, packed, stored.dtype)
    return tensors
