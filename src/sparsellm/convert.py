"""Packs and unpacks the checkpoint of a directory; ``sparsepack`` has the format."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal, get_args

import torch
from torch import Tensor, nn

from sparsellm.arguments import Checkpoint, Out, checked
from sparsellm.errors import NumericalError, RecipeError, StorageError, shown
from sparsellm.files.contents import check_weights
from sparsellm.files.directory import (
    WorkingDirectory,
    check_destination,
    checkpoints_among,
)
from sparsellm.files.reader import PackedReader
from sparsellm.files.resolve import checkpoint_directory
from sparsellm.files.writer import CheckpointWriter, TensorSource, joined, written
from sparsellm.inputs import read_object
from sparsellm.model import Chain, open_chain
from sparsellm.model.experts import ExpertLinear
from sparsellm.model.heads import heads_of
from sparsellm.model.structure import LinearView
from sparsellm.progress import Progress, ProgressCallback, ignore
from sparsellm.recipe import Recipe
from sparsellm.records import (
    PRUNING,
    PUT_BACK,
    LinearResult,
    read_pruning,
)
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
from sparsepack.errors import Note
from sparsepack.grid import INTEGERS
from sparsepack.grids import GRIDS
from sparsepack.module import row_scale
from sparsepack.validation import PACK_AGAIN

Values = Literal["keep", "bf16", "fp16", "fp32", "int8", "int6", "int5", "int4", "int3"]
Head = Literal["keep", "int8"]
# The two kinds of runs.
PACK = "pack"
UNPACK = "unpack"


@dataclass
class PackResult:
    """The result of packing or unpacking into ``path``."""

    path: Path
    # the linears of the blocks by name, experts left out; None for one that is
    # smaller dense, and was copied
    linears: dict[str, PackedEntry | None] = field(default_factory=dict, repr=False)
    # bytes of these linears before and after, and the number of their weights
    dense_bytes: int = 0
    packed_bytes: int = 0
    weights: int = 0
    checkpoint_bytes: int = 0  # all weight files of the new checkpoint
    # embedding and output head by name; empty if they were copied
    head: dict[str, PackedEntry] = field(default_factory=dict)
    # the number of weights of experts, which were copied
    expert_weights: int = 0
    # linears whose values were not on the grid of integers before
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


@dataclass(frozen=True)
class PackedForm:
    """How the values of one linear are packed."""

    values: str
    # what a run that rounded them recorded: the exponent of each column, and the
    # columns that share a scale on the grid of another program
    exponents: Tensor | None = None
    group: int | None = None


def check_packable(recipe: Recipe, head: str | None = None) -> None:
    """Raises RecipeError if what a recipe makes has no packed form, or ``head`` is none of ``pack``."""
    if head not in (None, *get_args(Head)):
        raise RecipeError(f"--head is {shown(head)}; it should be keep or int8")
    if recipe.grid != "own" and recipe.values == "int8":
        raise RecipeError(
            f"grid {recipe.grid} has no packed form in int8; export the result, and do not pack it"
        )
    if recipe.program not in (None, "sparsellm"):
        raise RecipeError(
            f"program {recipe.program} has forms that the packed format has not; export the result, and do not pack it"
        )


@checked
def pack(  # noqa: PLR0913 - the Python door
    model: Checkpoint,
    *,
    out: Out,
    values: Values | None = None,
    head: Head | None = None,
    round_again: bool = False,
    overwrite: bool = False,
    restart: bool = False,
    allow_copy: bool = False,
    progress: ProgressCallback = ignore,
) -> PackResult:
    """Writes a packed checkpoint: linears of the blocks, except experts, in the smallest form (dense, bitmask or N:M).

    Floating values are exact (``bf16`` and ``fp16`` round once if the checkpoint is finer). Integers that a run rounded
    to are exact too; other values are rounded to the nearest ones. All else is copied. If it fails, no files are left.

    Args:
        model: a directory (or ``demo``, a ``.gguf`` file, a hub id) of a dense checkpoint with zeros.
        out, overwrite, progress: as in ``sparsellm.prune``.
        values: type of the kept values; ``keep`` for the type in which each weight is stored. None takes the type to
            which the run rounded each linear, by ``pruning.json``, and ``keep`` where it rounded none.
        head: ``int8`` stores embedding and output head as rows of int8; ``keep`` copies them. None means ``int8`` where
            linears are stored as integers and the embedding has such a form, else ``keep``.
        round_again: allow another type than the one to which the run rounded, which loses quality.
        restart: remove the files that an unfinished run of another kind left for ``out``. Packing is never resumed.
        allow_copy: write a dense copy if no linear is smaller packed.

    Raises:
        RecipeError: a setting is unknown, the checkpoint is packed already, its values would be rounded a second time,
            no linear of it is smaller packed, or its embedding has no int8 form.
        ModelError, StorageError: the checkpoint cannot be read, or has other weights than those that were pruned, or
            ``out`` cannot be written.
        NumericalError: a weight does not fit into the value type.
    """
    source, place = _places(model, out, PACK, overwrite=overwrite)
    chain = open_chain(source, device=torch.device("cpu"))
    result = PackResult(place)
    forms = _forms(chain, source, values, round_again=round_again)
    rounds = any(form.values in INTEGERS for form in forms.values())
    if head is None:
        head = _usual_head(chain, rounds=rounds)
    assert chain.reader is not None
    # with any value type, no linear takes more space than its dense weight
    need = chain.reader.bytes
    work = WorkingDirectory(
        place, {"kind": PACK}, overwrite=overwrite, restart=restart, need_bytes=need
    )
    # packed, no part is larger than it is now
    shards = joined(chain.stored_bytes())
    with _written(work, len(shards), source, result) as writer:
        outer: Mapping[str, TensorSource | Tensor] = chain.outer_tensors()
        if head == "int8":
            outer = _outside_blocks(chain, result)
        for shard, parts in enumerate(shards):
            tensors: dict[str, TensorSource | Tensor] = {}
            for index in parts:
                if index == len(chain):
                    tensors |= outer
                    continue
                progress(Progress("pack", index, len(chain), chain.block_names[index]))
                tensors |= _packed_block(chain, index, forms, result)
            writer.write_shard(shard, tensors)
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
    """Writes the dense checkpoint of a packed one, with the values that the packed model computes with. Arguments and
    errors as in ``pack``."""
    source, place = _places(directory, out, UNPACK, overwrite=overwrite)
    reader = _checked_reader(source)
    names = list(reader)
    shards = joined([reader.bytes_of(name) for name in names])
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
    done = 0

    def read(name: str) -> Tensor:
        nonlocal done
        progress(Progress("unpack", done, len(names)))
        done += 1
        return reader.get(name)

    with _written(work, len(shards), source, result) as writer:
        for shard, numbers in enumerate(shards):
            tensors = {
                name: TensorSource(
                    reader.dtype(name), reader.shape(name), partial(read, name)
                )
                for name in (names[number] for number in numbers)
            }
            writer.write_shard(shard, tensors)
        progress(Progress("unpack", len(names), len(names)))
    return result


def _places(
    model: Checkpoint, out: Out, kind: str, *, overwrite: bool
) -> tuple[Path, Path]:
    """The directories of the model and of the new checkpoint, checked: the former is packed only for ``UNPACK``."""
    # a first time before the model is downloaded
    check_destination(out, overwrite=overwrite, sources=checkpoints_among(model))
    source = checkpoint_directory(str(model))
    # its records are copied
    check_weights(source)
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
    """The writer of a checkpoint's shards. After them it gets the companions of ``source``, a card, and the files of
    the packed format, and then its name, which is put into ``result``. After an error no file is left."""
    with written(work, shards) as writer:
        yield writer
        # what the run did and was told holds for the packed model too
        writer.copy_companions(source, PRUNING, "recipe.yaml")
        packed = {name: entry for name, entry in result.linears.items() if entry}
        entries = packed | result.head
        if entries:
            config = read_object(writer.folder / "config.json")
            config |= WAY_IN
            config["quantization_config"] = quantization_config(entries)
            writer.write_json("config.json", config)
            writer.write_json(MANIFEST, manifest(writer.folder))
        run = None
        with suppress(StorageError):  # a missing or damaged record gives no card
            run = read_pruning(source)
        if run is not None:
            writer.write_text(CARD, card_text(run, packed=entries.values()))
        result.checkpoint_bytes = weight_file_bytes(writer.folder)
    result.path = work.out


def _checked_reader(source: Path) -> PackedReader:
    """The reader of a packed checkpoint. A StorageError if ``quantization_config`` says of a weight that it is stored
    ``(in, out)``, and the model's is not, or the reverse; the shape of a square one would not show it."""
    chain = open_chain(source, device=torch.device("cpu"))
    assert isinstance(chain.reader, PackedReader)
    for index in range(len(chain)):
        for linear in chain.linears(index):
            name = chain.key_of[linear.weight_name].removesuffix(".weight")
            entry = chain.reader.entries.get(name)
            if entry is not None and entry.transposed != linear.transposed:
                kind = type(linear.module).__name__
                raise StorageError(
                    f"config.json: quantization_config describes {name!r} with transposed = {entry.transposed}, which "
                    f"the model's {kind} is not; {PACK_AGAIN}"
                )
    return chain.reader


def _stored(
    key: str, packed: layout.PackedWeight, dtype: torch.dtype
) -> dict[str, Tensor]:
    """The tensors of a packed weight, by name. The weight's own name holds one zero, whose shape stops loaders that do
    not know the format."""
    tensors = {key: torch.zeros(1, dtype=dtype)}
    for part, tensor in packed.stored.items():
        tensors[f"{key}_{part}"] = tensor
    return tensors


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Raises errors of packing as a NumericalError that names the tensor ``key``."""
    try:
        yield
    except PackError as error:
        raise NumericalError(f"{key}: {error}") from None


def _has_int8(module: nn.Module, key: str) -> bool:
    known = type(module) is nn.Linear or row_scale(module) is not None
    return known and key.endswith(".weight")


def _usual_head(chain: Chain, *, rounds: bool) -> Head:
    """The type of embedding and head where none is asked for: int8 if linears are rounded to integers. A warning says
    that this embedding stays as it is, since it has no such form."""
    if not rounds:
        return "keep"
    for module, key in heads_of(chain):
        if not _has_int8(module, key):
            said = (
                f"{key} is stored as it is: a {type(module).__name__} has no int8 form"
            )
            warnings.warn(said, Note, stacklevel=2)
            return "keep"
    return "int8"


def head_bytes(chain: Chain, head: Head) -> int:
    """Bytes of embedding and output head of a checkpoint, as ``pack`` stores them."""
    assert chain.reader is not None
    embedding = chain.model.get_input_embeddings()
    total = 0
    for module, key in heads_of(chain):
        if head == "keep":
            total += chain.reader.bytes_of(key)
        elif total == 0 or module.weight is not embedding.weight:
            rows, columns = chain.reader.shape(key)
            total += layout.predicted_bytes((rows, columns), 0, "int8")
    return total


def _outside_blocks(
    chain: Chain, result: PackResult
) -> dict[str, TensorSource | Tensor]:
    """The tensors outside the blocks by name, with embedding and head in int8. Adds the entries of these two to
    ``result``."""
    assert chain.reader is not None
    tensors: dict[str, TensorSource | Tensor] = {**chain.outer_tensors()}
    embedding = chain.model.get_input_embeddings()
    for module, key in heads_of(chain):
        # a head that is tied to the embedding, and stored a second time
        if result.head and module.weight is embedding.weight:
            del tensors[key]
            continue
        if not _has_int8(module, key):
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


def _forms(
    chain: Chain, directory: Path, values: Values | None, *, round_again: bool
) -> dict[str, PackedForm]:
    """How each linear of the blocks, except experts, is packed, by name; ``values`` and ``round_again`` as in
    ``pack``. A RecipeError if the packed format has no such form, or values would be rounded a second time; a
    StorageError if what the run recorded does not fit the model."""
    path = directory / PRUNING
    views = {
        view.name: view for index in range(len(chain)) for view in chain.linears(index)
    }
    names = [
        name
        for name, view in views.items()
        if not isinstance(view.module, ExpertLinear)
    ]
    # to keep every value loses nothing, whatever a run did
    if values == "keep" or not path.is_file():
        return dict.fromkeys(names, PackedForm(values or "keep"))
    run = read_pruning(directory)
    columns = {name: view.in_features for name, view in views.items()}
    results = {linear.name: linear for linear in run.linears}
    exponents = _exponents(results, columns, path)
    forms: dict[str, PackedForm] = {}
    for name in names:
        rounded = "keep"
        if name in results:
            rounded = run.values_of(results[name])
        grid = GRIDS.get(rounded)
        recorded = rounded if grid is None else grid.values
        if recorded not in ("keep", *INTEGERS):
            raise StorageError(
                f"{path}: values of {name} are {shown(recorded)}, which is unknown; {PUT_BACK}"
            )
        asked = values or recorded
        if recorded == "keep" or (asked != recorded and round_again):
            forms[name] = PackedForm(asked)
            continue
        if asked != recorded:
            raise RecipeError(
                f"{directory} was rounded to {recorded} while it was pruned, and {asked} would round it again; "
                "leave --values out, or give --round-again to accept the loss"
            )
        if grid is None:
            forms[name] = PackedForm(recorded, exponents.get(name))
        elif recorded in GROUPED:
            forms[name] = PackedForm(recorded, group=grid.group)
        else:
            raise RecipeError(
                f"{directory} is on the grid {grid.name}, which has no packed form; pack it with values keep, or "
                "export it"
            )
    return forms


def _exponents(
    results: Mapping[str, LinearResult], columns: Mapping[str, int], path: Path
) -> dict[str, Tensor]:
    """The exponents of columns that a run recorded, by linear; ``columns`` has their number in the model."""
    exponents: dict[str, Tensor] = {}
    for name, linear in results.items():
        numbers = exponents_of_text(linear.exponents)
        if numbers is None:
            continue
        expected = columns.get(name, "no such linear")
        if expected != len(numbers):
            mismatch = f"{len(numbers)} exponents of {shown(name)}, where the model has {expected}"
            raise StorageError(f"{path}: {mismatch}; {PUT_BACK}")
        exponents[name] = numbers
    return exponents


def _packed_block(
    chain: Chain,
    index: int,
    forms: Mapping[str, PackedForm],
    result: PackResult,
) -> dict[str, Tensor]:
    """The tensors of a block as they are written. Adds the sizes and the entries of its linears to ``result``."""
    tensors = chain.stored_block(index)
    for linear in chain.linears(index):
        # stays dense: transformers stacks experts while it loads
        if isinstance(linear.module, ExpertLinear):
            result.expert_weights += linear.parameter.numel()
            continue
        key = chain.key_of[linear.weight_name]
        name = key.removesuffix(".weight")
        stored = tensors[key]
        result.weights += stored.numel()
        result.dense_bytes += stored.nbytes
        packed = _packed(chain, linear, stored, forms[linear.name])
        if packed is None:
            result.packed_bytes += stored.nbytes
            result.linears[name] = None
            continue
        result.packed_bytes += packed.nbytes
        result.linears[name] = PackedEntry.of(
            packed, stored.dtype, transposed=linear.transposed
        )
        if packed.value_type in INTEGERS:
            exact = torch.equal(
                layout.unpack(packed, stored.dtype), _rows(linear, stored)
            )
            if not exact:
                result.rounded.append(name)
        tensors |= _stored(key, packed, stored.dtype)
    return tensors


def _rows(linear: LinearView, stored: Tensor) -> Tensor:
    """The weight of a linear as ``(out, in)``, from the tensor of the checkpoint."""
    if linear.transposed:
        return stored.t().contiguous()
    return stored


def _packed(
    chain: Chain, linear: LinearView, stored: Tensor, form: PackedForm
) -> layout.PackedWeight | None:
    """The weight of a linear, packed; None if it stays dense."""
    key = chain.key_of[linear.weight_name]
    # The format adds its tensors to names that end so; a family that names a matrix otherwise keeps it dense.
    if not key.endswith(".weight"):
        return None
    # If several modules share a weight, one would have it packed, and the others would not.
    if chain.is_shared(linear.weight_name):
        return None
    with _named(key):
        return layout.pack(
            _rows(linear, stored),
            form.values,
            exponents=form.exponents,
            group=form.group,
        )
