"""A checkpoint whose linears are on a grid of another program: which they are, their numbers and their scales."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sparsellm.errors import ModelError, RecipeError, StorageError, shown
from sparsellm.files.contents import check_weights
from sparsellm.files.reader import CheckpointReader, as_storage_error
from sparsellm.model import Chain, LinearView, open_chain
from sparsellm.records import PRUNING, PUT_BACK, Pruning, read_pruning
from sparsepack.grid import codes_of
from sparsepack.grids import GRIDS, Grid

# What values are on where they are on no grid of another program, by the type to which they were rounded
_FOLLOWS_ZEROS = (
    "a grid of its own (its columns have exponents, and its groups follow the zeros)"
)
_OWN = {
    "keep": "no grid (its values were not rounded)",
    "int8": "a grid of its own (its columns have exponents)",
    **dict.fromkeys(("int6", "int5", "int4"), _FOLLOWS_ZEROS),
    "int3": "a grid of its own (its levels are uneven, and its groups follow the zeros)",
}


def other_grids(values: str) -> str:
    """What a run that rounds to our own grid cannot do, and the grids of the same type that programs share."""
    grids: dict[str, list[str]] = {}
    for name, grid in GRIDS.items():
        if grid.values == values:
            grids.setdefault(grid.form, []).append(name)
    ways = [f"--grid {' or '.join(names)} ({form})" for form, names in grids.items()]
    return f"{values} is stored by `sparsellm pack` alone; to export it for another program, give {', '.join(ways)}"


@dataclass(frozen=True)
class OnGrid:
    """A checkpoint whose pruned linears are on a grid."""

    chain: Chain  # the checkpoint, read block by block
    run: Pruning  # its ``pruning.json``
    # names of pruned linears in the model, by the tensors that have their weights; those of embedding and head too,
    # if the run rounded them
    linears: dict[str, str]
    grids: dict[str, Grid]  # by the same tensors
    transposed: frozenset[str]  # tensors of linears that are stored as ``(in, out)``

    @property
    def reader(self) -> CheckpointReader:
        assert self.chain.reader is not None
        return self.chain.reader

    @property
    def grid(self) -> Grid:
        """The grid that has most of the weights."""
        weights: Counter[str] = Counter()
        for linear in self.run.linears:
            weights[self.run.values_of(linear)] += linear.weights
        return GRIDS[max(weights, key=weights.__getitem__)]

    def codes(self, key: str) -> tuple[Tensor, Tensor]:
        """Numbers and scales of a linear, as of ``sparsepack.grid.codes_of``; StorageError if off the grid."""
        stored = self.reader.get(key)
        if key in self.transposed:
            weight = stored.t().contiguous()
        else:
            weight = stored
        with as_storage_error():
            return codes_of(weight, self.grids[key], self.linears[key])


def tensor_of(chain: Chain, linear: LinearView, directory: Path) -> str:
    """The tensor in ``directory`` that is the weight of a linear. A ModelError says that it is a part of one, or that
    other modules use it too."""
    weight = linear.weight_name
    key: str = chain.key_of[weight]
    if weight in chain.parts or chain.is_shared(weight) or not key.endswith(".weight"):
        raise ModelError(
            f"{linear.name} has no tensor of its own in {directory} ({key}), so it is not exported"
        )
    return key


def open_on_grid(directory: Path, grids: Sequence[str]) -> OnGrid:
    """A checkpoint that was pruned on some of these grids. A RecipeError says that it is on another grid, or none; a
    ModelError or StorageError that it cannot be read, its weights are not those that were pruned, files contradict each
    other, or a linear is part of a tensor."""
    if not (directory / PRUNING).is_file():
        raise StorageError(
            f"{directory} has no {PRUNING}; give a checkpoint that `sparsellm prune --grid` wrote"
        )
    check_weights(directory)
    chain = open_chain(directory, device=torch.device("cpu"))
    run = read_pruning(directory)
    types = {run.values_of(linear) for linear in run.linears} or {run.values}
    if others := sorted(types - {*grids}):
        if others[0] in GRIDS:
            there = f"the grid {others[0]}"
        else:
            there = _OWN.get(others[0], "a grid of its own (unknown)")
        advice = f"prune with --grid {grids[0]} (or {', '.join(grids[1:])})"
        raise RecipeError(
            f"{directory} is on {there}, which this format does not have; {advice}"
        )
    views = {
        view.name: view for index in range(len(chain)) for view in chain.linears(index)
    }
    linears: dict[str, str] = {}
    on: dict[str, Grid] = {}
    for linear in run.linears:
        if linear.name not in views:
            raise StorageError(
                f"{directory / PRUNING}: the model has no linear {shown(linear.name)}; {PUT_BACK}"
            )
        key = tensor_of(chain, views[linear.name], directory)
        linears[key] = linear.name
        on[key] = GRIDS[run.values_of(linear)]
    assert chain.reader is not None
    for key, values in run.heads.items():
        if key not in chain.reader or values not in GRIDS:
            raise StorageError(
                f"{directory / PRUNING}: {shown(key)} is no tensor on the grid {shown(values)}; {PUT_BACK}"
            )
        linears[key] = key
        on[key] = GRIDS[values]
    transposed = frozenset(
        chain.key_of[view.weight_name] for view in views.values() if view.transposed
    )
    return OnGrid(chain, run, linears=linears, grids=on, transposed=transposed)
