"""Writes a directory in the format compressed-tensors, shard by shard, as vLLM and transformers load it."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor

from sparsellm.errors import MissingExtraError, ModelError
from sparsellm.exports.linears import OnGrid
from sparsellm.files.directory import WorkingDirectory
from sparsellm.files.results import read_results
from sparsellm.files.writer import TensorSource, joined, written
from sparsellm.inputs import read_object
from sparsellm.model import Chain
from sparsellm.model.experts import ExpertLinear
from sparsellm.model.structure import iterate_linears
from sparsellm.progress import Progress, ProgressCallback
from sparsellm.records import PRUNING, Export
from sparsellm.report.card import CARD, card_text
from sparsepack.bench import weight_file_bytes
from sparsepack.grids import GRIDS, Grid

# weights of this grid are stored as int8, since integers are multiplied
_INT8_ACTIVATIONS = "w8a8"


def check_compressed(chain: Chain, names: Collection[str], instead: str) -> None:
    """Refuses a model whose linears of these names are to be in this format: one with ``Conv1D`` among them, for which
    it has no form, and one with experts that are not, which transformers cannot stack (ModelError, which tells what to
    do ``instead`` of a Conv1D); a MissingExtraError without the library."""
    try:
        from compressed_tensors.compressors.pack_quantized import helpers  # noqa: F401
    except ImportError:
        raise MissingExtraError(
            "this needs compressed-tensors: pip install compressed-tensors"
        ) from None
    views = [view for index in range(len(chain)) for view in chain.linears(index)]
    turned = [view.name for view in views if view.transposed and view.name in names]
    if turned:
        raise ModelError(
            f"{min(turned)} is a Conv1D, which compressed-tensors does not have; {instead}"
        )
    experts = {view.name for view in views if isinstance(view.module, ExpertLinear)}
    dense = sorted(experts.difference(names))
    if dense:
        raise ModelError(
            f"{dense[0]} was not pruned, and transformers loads only mixtures whose experts all were"
        )


def write_compressed(
    model: OnGrid,
    work: WorkingDirectory,
    record: Export,
    progress: ProgressCallback,
    keep: Callable[[Export], object],
) -> Export:
    """Writes the directory, and returns the record with its size. ``keep`` is called with it before the directory gets
    its name. After a failure no file is left."""
    chain = model.chain
    # in this format, no part is larger than it is now
    shards = joined(chain.stored_bytes())
    with written(work, len(shards)) as writer:
        for shard, parts in enumerate(shards):
            tensors: dict[str, TensorSource | Tensor] = {}
            for index in parts:
                if index == len(chain):
                    tensors |= chain.outer_tensors()
                    continue
                progress(
                    Progress("export", index, len(chain), chain.block_names[index])
                )
                tensors |= _block(model, index)
            writer.write_shard(shard, tensors)
        progress(Progress("export", len(chain), len(chain)))
        writer.copy_companions(model.reader.directory, PRUNING, "recipe.yaml")
        config = read_object(writer.folder / "config.json")
        writer.write_json(
            "config.json", {**config, "quantization_config": quantization_config(model)}
        )
        record = record.model_copy(update={"bytes": weight_file_bytes(writer.folder)})
        # the weights are the same
        evaluations = read_results(model.reader.directory).shown()
        writer.write_text(CARD, card_text(model.run, evaluations, exported=record))
        keep(record)
    return record


def _block(model: OnGrid, index: int) -> dict[str, Tensor]:
    """The tensors of a block as the format has them."""
    tensors: dict[str, Tensor] = {}
    for key, stored in model.chain.stored_block(index).items():
        if key in model.linears:
            tensors |= _tensors(model, key)
        else:
            tensors[key] = stored
    return tensors


def _tensors(model: OnGrid, key: str) -> dict[str, Tensor]:
    """The tensors of a linear: its numbers as they are, never divided by a scale again."""
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    codes, scales = model.codes(key)
    scales = scales.to(model.reader.dtype(key))
    if model.grids[key].name == _INT8_ACTIVATIONS:
        return {key: codes, f"{key}_scale": scales}
    words = pack_to_int32(codes, model.grids[key].bits)
    shape = torch.tensor(codes.shape)
    return {f"{key}_packed": words, f"{key}_scale": scales, f"{key}_shape": shape}


def quantization_config(model: OnGrid) -> dict[str, Any]:
    """The ``quantization_config`` of ``config.json``. It ignores every linear that is not on the grid, by its name in
    the model and by that in the checkpoint, where these differ. It has no ``sparsity_config``, which vLLM refuses."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    chain = model.chain
    groups = {}
    of_grid: dict[str, list[str]] = {}
    for key, name in model.linears.items():
        of_grid.setdefault(model.grids[key].name, []).append(name)
    for number, (grid, names) in enumerate(sorted(of_grid.items())):
        # by names only where there are several
        targets = ["Linear"] if len(of_grid) == 1 else sorted(names)
        groups[f"group_{number}"] = QuantizationScheme(
            targets=targets, **_arguments(GRIDS[grid])
        )
    formats = {_format_of(grid) for grid in of_grid}
    dense = {name.removeprefix(".") for name, _ in iterate_linears(chain.model, "")} - {
        *model.linears.values()
    }
    # routers, which vLLM has as linears
    dense |= {gate.removesuffix(".weight") for gate in chain.gates}
    # What is stored but not in this model, such as a tower for pictures, is dense, too.
    stored = [
        key
        for key in model.reader
        if key.endswith(".weight") and key not in model.linears
    ]
    keys = {
        key.removesuffix(".weight")
        for key in stored
        if len(model.reader.shape(key)) == 2
    }
    config = QuantizationConfig(
        config_groups=groups,
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status="compressed",
        ignore=sorted(dense | keys),
    )
    return dict(config.model_dump(mode="json"))


def _format_of(grid: str) -> str:
    """How the numbers of a grid are stored: as int8, or several in a word."""
    if grid == _INT8_ACTIVATIONS:
        return "int-quantized"
    return "pack-quantized"


def _arguments(grid: Grid) -> dict[str, Any]:
    """The arguments of a scheme for linears on a grid: those of weights and activations, and the format."""
    from compressed_tensors.quantization import QuantizationArgs

    groups: dict[str, Any] = {"strategy": "channel"}
    if grid.group:
        groups = {"strategy": "group", "group_size": grid.group}
    weights = QuantizationArgs(
        num_bits=grid.bits, type="int", symmetric=True, dynamic=False, **groups
    )
    inputs = None
    if grid.name == _INT8_ACTIVATIONS:
        inputs = QuantizationArgs(
            num_bits=8, type="int", symmetric=True, dynamic=True, strategy="token"
        )
    return {
        "weights": weights,
        "input_activations": inputs,
        "format": _format_of(grid.name),
    }
