"""Whether two checkpoints are of one model: the same function by their configs, and weights of the same shapes."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from sparsellm.errors import shown
from sparsellm.storage.reader import CheckpointReader

# Keys of a config that describe files, not the function of the model.
_STORAGE = (
    "_name_or_path",
    "architectures",  # a model that was built in memory has none until it is saved
    "dtype",
    "quantization_config",
    "torch_dtype",
    "transformers_version",
    "use_cache",
)


def config_difference(config: PretrainedConfig, other: PretrainedConfig) -> str | None:
    """The first value of ``config.json`` that another model has different, as a clause; None if there is none."""
    own, its = _function(config), _function(other)
    for key in sorted(own.keys() | its.keys()):
        if own.get(key) != its.get(key):
            return f"{key} in config.json is {shown(own.get(key))}, not {shown(its.get(key))}"
    return None


def shape_difference(weights: CheckpointReader, others: CheckpointReader, *, whole: bool = True) -> str | None:
    """The first weight of ``others`` that ``weights`` has in another shape or, if it should be ``whole``, lacks, as a
    clause; None if there is none."""
    for name in others:
        if name not in weights:
            if whole:
                return f"weight {name} is missing"
        elif weights.shape(name) != others.shape(name):
            return f"weight {name} has shape {weights.shape(name)}, not {others.shape(name)}"
    return None


def _function(config: PretrainedConfig) -> dict[str, Any]:
    """What a config says of the function of the model."""
    return {key: value for key, value in config.to_dict().items() if key not in _STORAGE}
