"""The quantizer by which ``AutoModelForCausalLM.from_pretrained`` loads packed checkpoints.

transformers reads the dense tensors. The packed ones are read here, checked, and put into the modules that replace the
linears, so that no release of transformers converts them to the model's dtype.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING, register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsellm.errors import ModelError, StorageError
from sparsepack.checkpoint import FORMAT_VERSION, QUANT_METHOD, PackedReader, packed_entries
from sparsepack.module import PACKED_BUFFERS, PackedEmbedding, PackedLinear, row_scale, to_dense

_PACKED_KEY = re.compile(rf"\.({'|'.join(PACKED_BUFFERS)})$")


class PackedConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed checkpoint; see ``docs/format.md``."""

    def __init__(self, linears: dict[str, Any] | None = None, format_version: int | None = None, **_: Any) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # an enumeration of transformers' own methods
        self.format_version = format_version
        self.linears = linears


class PackedQuantizer(HfQuantizer):
    """Replaces the linears with packed weights by :class:`~sparsepack.module.PackedLinear`.

    Raises (while loading):
        StorageError: the files are damaged, or do not fit ``config.json``.
        ModelError: a packed linear does not exist in the model, or is another kind of module there.
    """

    requires_calibration = True  # a dense checkpoint is packed by `sparsellm pack`, not while loading

    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._entries = packed_entries(quantization_config.to_dict())
        self._reader: PackedReader | None = None
        self._modules: dict[str, str] = {}  # the linear in the model, by its name in the checkpoint

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        from sparsellm.chain.names import checkpoint_names  # this module may be imported while transformers is

        directory = _directory(model, checkpoint_files)
        self._reader = PackedReader(directory)
        if self._reader.entries != self._entries:
            raise ModelError(f"the given config describes other packed weights than {directory / 'config.json'}")
        names = checkpoint_names(model, self._reader, model.state_dict(keep_vars=True))
        self._modules = {name: names.name_of[f"{name}.weight"].removesuffix(".weight") for name in self._entries}
        for name, entry in self._entries.items():
            parent, leaf, linear = _find(model, self._modules[name])
            out, columns = linear.weight.shape[::-1] if isinstance(linear, Conv1D) else linear.weight.shape
            embedding = row_scale(linear) is not None
            if entry.shape != (out, columns) or entry.transposed != isinstance(linear, Conv1D):
                raise ModelError(
                    f"packed weight {name} has shape {entry.shape}, where the model has {(int(out), int(columns))}; "
                    "config.json does not belong to these weights: pack the model again"
                )
            packed = PackedEmbedding(linear) if embedding else _packed_linear(linear, out, columns)
            packed.requires_grad_(False)
            setattr(parent, leaf, packed)
        # transformers must ignore the tensors that are loaded below: 5.x reads this attribute of the model (a list at
        # first, a set in later releases), 4.x calls update_unexpected_keys.
        ignored = getattr(model, "_keys_to_ignore_on_load_unexpected", None)
        ignored = [] if ignored is None else ignored
        model._keys_to_ignore_on_load_unexpected = type(ignored)([*ignored, _PACKED_KEY.pattern])
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self._reader is not None
        for name in self._entries:
            _, _, module = _find(model, self._modules[name])
            assert isinstance(module, PackedLinear)
            if module.weight.is_meta:
                raise ModelError(f"{name} is to be offloaded to disk; a packed model must fit into memory")
            module.set_packed(self._reader.packed(name), name)
        _share_embedding(model)
        self._reader = None
        linears = {name: entry.to_dict() for name, entry in self._entries.items()}
        for (
            written
        ) in linears.values():  # the modules hold bitmasks for codes and int4 for int3; save_pretrained writes those
            if written.pop("pattern", None) is not None:
                written["layout"] = "bitmask"
            if written["value_type"] == "int3":
                written["value_type"] = "int4"
        self.quantization_config.format_version = FORMAT_VERSION
        self.quantization_config.linears = linears
        return model

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        return to_dense(model)

    def update_unexpected_keys(self, model: Any, unexpected_keys: list[str], prefix: str) -> list[str]:
        return [key for key in unexpected_keys if not _PACKED_KEY.search(key)]

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return False


def register() -> None:
    """Registers ``quant_method: sparsellm`` with transformers; does nothing the second time."""
    if QUANT_METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(QUANT_METHOD)(PackedConfig)
        register_quantizer(QUANT_METHOD)(PackedQuantizer)


def _share_embedding(model: Any) -> None:
    """Gives a head that is tied to a packed embedding a module of its own for the same tensors."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if isinstance(embedding, PackedEmbedding) and isinstance(head, nn.Linear):
        if not getattr(model.config.get_text_config(), "tie_word_embeddings", False):
            return
        packed = PackedLinear(embedding.embedding_dim, embedding.num_embeddings, head.bias is not None)
        packed.weight, packed.bias = embedding.weight, head.bias
        packed.set_packed(embedding.packed)
        packed._non_persistent_buffers_set.update(PACKED_BUFFERS)  # saved once, as the embedding's
        model.set_output_embeddings(packed)


def _packed_linear(linear: Any, out: int, columns: int) -> PackedLinear:
    weight = linear.weight
    return PackedLinear(columns, out, linear.bias is not None, dtype=weight.dtype, device=weight.device)


def _find(model: nn.Module, name: str) -> tuple[nn.Module, str, Any]:
    """The parent module, attribute name and module of a linear."""
    parent_name, _, leaf = name.rpartition(".")
    try:
        parent = model.get_submodule(parent_name)
        module = parent.get_submodule(leaf)
    except AttributeError:
        module = None
    if isinstance(module, (nn.Linear, Conv1D, PackedLinear)) or row_scale(module) is not None:
        return parent, leaf, module
    raise ModelError(f"packed weight {name} is no linear of {type(model).__name__}; config.json is not this model's")


def _directory(model: Any, checkpoint_files: list[str] | None) -> Path:
    """The directory of the checkpoint: transformers 5 passes its files, transformers 4 has its name in the config."""
    if checkpoint_files:
        return Path(checkpoint_files[0]).parent
    name = str(getattr(model.config, "_name_or_path", ""))
    if Path(name).is_dir():
        return Path(name)
    raise StorageError(f"no directory of packed weights at {name!r}; download the model, then give its directory")
