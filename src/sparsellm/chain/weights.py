"""Where a chain takes its weights from: a checkpoint read lazily, or a model already in memory."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsellm.chain.fit import check_depth, check_dtypes
from sparsellm.errors import ModelError
from sparsellm.storage.reader import CheckpointReader


class CheckpointWeights:
    """Weights of a checkpoint on disk, under the names of the model built from its config.

    A checkpoint saved from the bare base model lacks its prefix (the hub's gpt2 says ``h.0...`` for
    ``transformer.h.0...``), so a name is looked up as it is, without the prefix, and with it.

    Args:
        reader: of the checkpoint.
        model: built from its config.
        tied: for every name of a parameter that has several, the first of them.
        blocks: the name of the list of blocks in the model, and its length.

    Attributes:
        unused: tensors of the checkpoint that the model does not take.

    Raises:
        ModelError: weights are missing from the checkpoint, or have another shape or a dtype that is no weight's; the
            first is named. Or the checkpoint has many weights that the model does not take.
    """

    def __init__(
        self, reader: CheckpointReader, model: PreTrainedModel, tied: dict[str, str], blocks: tuple[str, int]
    ) -> None:
        self.reader = reader
        values = model.state_dict(keep_vars=True)
        self.key_of, missing = _keys(reader, model, values)
        for name in list(missing):
            canonical = tied.get(name, name)
            same = [canonical, *(other for other, first in tied.items() if first == canonical)]
            found = next((other for other in same if other in self.key_of), None)
            if found is not None:
                self.key_of[name] = self.key_of[found]
                missing.remove(name)
        self.unused = check_depth(model, reader, blocks, self.key_of.values(), complete=not missing)
        if missing:
            raise ModelError(
                f"weight {missing[0]} is not in {reader.directory}; the checkpoint is incomplete, or its layout is one "
                "that transformers converts while loading: load it with transformers and pass the model to prune()"
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


def _keys(
    reader: CheckpointReader, model: PreTrainedModel, values: Mapping[str, Tensor]
) -> tuple[dict[str, str], list[str]]:
    """The names in the checkpoint of the model's weights, and those that are not there under a name of their own."""
    prefix = f"{getattr(model, 'base_model_prefix', '')}."
    key_of: dict[str, str] = {}
    missing = []
    for name in values:
        key = next((k for k in (name, name.removeprefix(prefix), prefix + name) if k in reader), None)
        if key is None:
            missing.append(name)
        else:
            key_of[name] = key
    return key_of, missing
