"""Where a chain takes its weights from: a checkpoint read lazily, or a model already in memory."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from sparsellm.errors import ModelError
from sparsellm.packed.checkpoint import open_checkpoint


class CheckpointWeights:
    """Weights of a checkpoint on disk, under the names of the model built from its config.

    A checkpoint saved from the bare base model lacks its prefix (the hub's gpt2 says ``h.0...`` for
    ``transformer.h.0...``), so a name is looked up as it is, without the prefix, and with it.

    Raises:
        ModelError: weights are missing from the checkpoint, or have another shape; the first is named.
    """

    def __init__(self, directory: Path, model: nn.Module, tied: dict[str, str]) -> None:
        self.reader = open_checkpoint(directory)
        prefix = f"{getattr(model, 'base_model_prefix', '')}."
        self.key_of: dict[str, str] = {}
        missing = []
        state = model.state_dict(keep_vars=True)
        for name, value in state.items():
            key = next((k for k in (name, name.removeprefix(prefix), prefix + name) if k in self.reader), None)
            if key is None:
                missing.append(name)
            elif self.reader.shape(key) != tuple(value.shape):
                raise ModelError(
                    f"weight {key} has shape {self.reader.shape(key)} in {directory}, "
                    f"but its config asks for {tuple(value.shape)}"
                )
            else:
                self.key_of[name] = key
        for name in missing:
            canonical = tied.get(name)
            if canonical is None or canonical not in self.key_of:
                aliases = [other for other, first in tied.items() if first == (canonical or name)]
                found = next((alias for alias in aliases if alias in self.key_of), None)
                if found is None:
                    raise ModelError(
                        f"weight {name} is not in {directory}; the checkpoint is incomplete, or its layout is one that "
                        "transformers converts while loading: load it with transformers and pass the model to prune()"
                    )
                self.key_of[name] = self.key_of[found]
            else:
                self.key_of[name] = self.key_of[canonical]

    def dtype(self, name: str) -> torch.dtype:
        return self.reader.dtype(self.key_of[name])

    def get(self, name: str, device: torch.device, dtype: torch.dtype) -> Tensor:
        """One weight on the device; in ``dtype``, unless it holds integers."""
        return self.reader.get(self.key_of[name], device, dtype)

    def as_stored(self, name: str) -> Tensor:
        """One weight on the CPU, in the dtype of the checkpoint."""
        return self.reader.get(self.key_of[name])
