"""Where a chain takes its weights from: a checkpoint read lazily, or a model already in memory."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsellm.chain.fit import check_depth, check_dtypes
from sparsellm.chain.names import checkpoint_names, refuse_converted, tower_names
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

    Attributes:
        key_of: the name in the checkpoint of each weight of the model.
        unused: tensors of the checkpoint that the model does not take.

    Raises:
        ModelError: weights are missing from the checkpoint, or have another shape or a dtype that is no weight's; the
            first is named. Or transformers makes weights out of several tensors. Or the checkpoint has many weights
            that neither the model nor the architecture of its config takes.
    """

    def __init__(
        self, reader: CheckpointReader, model: PreTrainedModel, tied: dict[str, str], blocks: tuple[str, int]
    ) -> None:
        self.reader = reader
        values = model.state_dict(keep_vars=True)
        names = checkpoint_names(model, reader, values)
        towers = tuple(f"{tower}." for tower in tower_names(model))  # they are copied, and never loaded
        refuse_converted(
            {name: keys for name, keys in names.converted.items() if not name.startswith(towers)}, model, reader
        )
        self.key_of = names.key_of
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
            if reader.shape(key) != tuple(values[name].shape):
                raise ModelError(
                    f"weight {key} has shape {reader.shape(key)} in {reader.directory}, "
                    f"but its config asks for {tuple(values[name].shape)}"
                )
        check_dtypes(values, self.key_of, reader)

    def dtype(self, name: str) -> torch.dtype:
        return self.reader.dtype(self.key_of[name])

    def get(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """One weight on the device; in ``dtype``, unless it holds integers."""
        return self.reader.get(self.key_of[name], device, dtype)

    def as_stored(self, name: str) -> Tensor:
        """One weight on the CPU, in the dtype of the checkpoint."""
        return self.reader.get(self.key_of[name])
