"""Where a chain takes its weights from: a checkpoint read lazily, or a model already in memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsellm.chain.experts import Part
from sparsellm.chain.fit import check_depth, check_dtypes
from sparsellm.chain.names import checkpoint_names, expert_parts, refuse_converted, tower_names
from sparsellm.errors import ModelError
from sparsellm.storage.reader import CheckpointReader


class CheckpointWeights:
    """Weights of a checkpoint on disk, under the names of the model built from its config.

    Which tensor is which weight is told by :mod:`sparsellm.chain.names`.

    Args:
        reader: of the checkpoint.
        model: built from its config.
        tied: for every name of a parameter that has several, the first of them.
        blocks: the name of the list of blocks in the model, and its length.
        stacked: the ``state_dict()`` of the model with its experts as it stacks them.
        experts: for each weight of a separated expert, its part of one of these.

    Attributes:
        key_of: the name in the checkpoint of each weight of the model.
        parts: for each weight that is a part of a tensor of the checkpoint, that part.
        unused: tensors of the checkpoint that the model does not take.

    Raises:
        ModelError: weights are missing from the checkpoint, or have another shape or a dtype that is no weight's; the
            first is named. Or transformers makes weights out of several tensors. Or the checkpoint has many weights
            that neither the model nor the architecture of its config takes.
    """

    def __init__(
        self,
        reader: CheckpointReader,
        model: PreTrainedModel,
        tied: dict[str, str],
        blocks: tuple[str, int],
        stacked: Mapping[str, Tensor],
        experts: Mapping[str, Part],
    ) -> None:
        self.reader = reader
        values = model.state_dict(keep_vars=True)
        names = checkpoint_names(model, reader, stacked)
        towers = tuple(f"{tower}." for tower in tower_names(model))  # they are copied, and never loaded
        parts = expert_parts(experts, names, stacked, reader.shape)
        done = {experts[name].source for name in parts}
        apart = {name: k for name, k in names.converted.items() if not name.startswith(towers) and name not in done}
        refuse_converted(apart, model, reader)
        self.key_of = {**names.key_of, **{name: part.source for name, part in parts.items()}}
        self.key_of = {name: self.key_of[name] for name in values if name in self.key_of}
        self.parts = {name: part for name, part in parts.items() if not part.is_whole}
        missing = [name for name in values if name not in self.key_of and not name.startswith(towers)]
        for name in list(missing):
            canonical = tied.get(name, name)
            same = [canonical, *(other for other, first in tied.items() if first == canonical)]
            found = next((other for other in same if other in self.key_of), None)
            if found is not None:
                self.key_of[name] = self.key_of[found]
                missing.remove(name)
        self.unused = check_depth(model, reader, blocks, names, complete=not missing)
        if missing:
            raise ModelError(
                f"weight {missing[0]} is not in {reader.directory}; the checkpoint is incomplete: download it again"
            )
        for name, key in self.key_of.items():
            if self._shape(name) != tuple(values[name].shape):
                raise ModelError(
                    f"weight {key} has shape {reader.shape(key)} in {reader.directory}, "
                    f"but its config asks for {self._wanted(name, values[name], stacked, experts)}"
                )
        check_dtypes(values, self.key_of, reader)

    def dtype(self, name: str) -> torch.dtype:
        return self.reader.dtype(self.key_of[name])

    def _shape(self, name: str) -> tuple[int, ...] | None:
        """The shape that a weight has in the checkpoint; None if it would be a part that its tensor does not have."""
        shape = self.reader.shape(self.key_of[name])
        if name not in self.parts:
            return shape
        try:
            return tuple(self.parts[name].of(torch.empty(shape, device="meta")).shape)
        except (IndexError, RuntimeError):
            return None

    def _wanted(
        self, name: str, value: Tensor, stacked: Mapping[str, Tensor], experts: Mapping[str, Part]
    ) -> tuple[int, ...]:
        """The shape that the tensor of a weight should have."""
        return tuple(stacked[experts[name].source].shape if name in self.parts else value.shape)
