"""The quantizer by which ``AutoModelForCausalLM.from_pretrained`` loads packed checkpoints.

transformers reads the dense tensors. The packed ones are read here, checked, and put into the modules that replace the
linears, so that no release of transformers converts them to the model's dtype.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D
from transformers.quantizers.auto import (
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from sparsepack.checkpoint import (
    FORMAT_VERSION,
    QUANT_METHOD,
    WAY_IN,
    PackedTensors,
    open_packed,
    packed_entries,
)
from sparsepack.errors import FormatError
from sparsepack.module import (
    PACKED_BUFFERS,
    PackedEmbedding,
    PackedLinear,
    row_scale,
    to_dense,
)

_PACKED_KEY = rf"\.({'|'.join(PACKED_BUFFERS)})$"


@register_quantization_config(QUANT_METHOD)
class PackedConfig(QuantizationConfigMixin):
    """``quantization_config`` of a packed checkpoint; see ``docs/format.md``."""

    def __init__(
        self,
        linears: dict[str, object] | None = None,
        format_version: int | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = QUANT_METHOD  # type: ignore[assignment]  # an enumeration of transformers' own methods
        self.format_version = format_version
        self.linears = linears


@register_quantizer(QUANT_METHOD)
class PackedQuantizer(HfQuantizer):
    """Replaces the linears with packed weights by ``sparsepack.module.PackedLinear``.

    Loading raises a FormatError if files are damaged, do not fit ``config.json``, or are not those of the model."""

    # a dense checkpoint is packed by `sparsellm pack`, not while loading
    requires_calibration = True
    is_trainable = False

    quantization_config: PackedConfig

    def __init__(self, quantization_config: PackedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self._entries = packed_entries(quantization_config.to_dict())
        self._tensors: PackedTensors | None = None
        # the linear in the model, by its name in the checkpoint
        self._modules: dict[str, str] = {}
        # bytes of packed weights, by the names of their placeholders
        self._sizes: dict[str, int] = {}

    def update_attn_implementation(self, config: Any) -> Any:
        """Called before transformers looks for weight files: takes out of the config what it tells other programs."""
        for name in WAY_IN.keys() & vars(config).keys():
            delattr(config, name)
        return config

    update_tp_plan = update_attn_implementation  # what transformers 5.15 calls there

    def param_element_size(self, model: Any, param_name: str, param: Any) -> float:
        """Bytes of an element of a parameter, by which transformers divides a model among GPUs. The one element of a
        placeholder counts as its packed weight."""
        return self._sizes.get(param_name) or float(
            super().param_element_size(model, param_name, param)
        )

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> Any:
        files = [Path(file) for file in checkpoint_files or ()]
        if not files or any(file.suffix != ".safetensors" for file in files):
            raise FormatError(
                "a packed model has safetensors files; there are none here"
            )
        self._tensors = open_packed(files)
        if self._tensors.entries != self._entries:
            raise FormatError(
                f"the given config describes other packed weights than {files[0].parent / 'config.json'}"
            )
        self._modules = _module_names(model, list(self._entries))
        self._sizes = {
            f"{self._modules[name]}.weight": size
            for name, size in self._tensors.nbytes.items()
        }
        for name, entry in self._entries.items():
            linear = _find(model, self._modules[name])
            if isinstance(linear, PackedLinear):
                raise FormatError(
                    f"config.json describes packed weight {name} twice; pack the model again"
                )
            transposed = isinstance(linear, Conv1D)
            out, columns = linear.weight.shape
            if transposed:
                columns, out = linear.weight.shape
            if entry.shape != (out, columns) or entry.transposed != transposed:
                raise FormatError(
                    f"packed weight {name} has shape {entry.shape}, where the model has {(int(out), int(columns))}; "
                    "config.json does not belong to these weights: pack the model again"
                )
            kind = {"dtype": linear.weight.dtype, "device": linear.weight.device}
            embeds = row_scale(linear) is not None
            if embeds:
                packed: PackedLinear = PackedEmbedding(linear)
            else:
                packed = PackedLinear(columns, out, linear.bias is not None, **kind)
            packed.transposed = transposed
            model.set_submodule(self._modules[name], packed.requires_grad_(False))
        _share_embedding(model)
        # transformers must ignore the tensors that are loaded below.
        model._keys_to_ignore_on_load_unexpected = {
            *(model._keys_to_ignore_on_load_unexpected or ()),
            _PACKED_KEY,
        }
        return model

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        assert self._tensors is not None
        linears: dict[str, object] = {}
        prefix = f"{model.base_model_prefix}."
        for name, entry in self._entries.items():
            module = _find(model, module_name := self._modules[name])
            assert isinstance(module, PackedLinear)
            if module.weight.is_meta:
                raise FormatError(
                    f"{name} is to be offloaded to disk; a packed model must fit into memory"
                )
            module.set_packed(self._tensors.packed(name), name)
            # What save_pretrained writes: the modules hold bitmasks for codes, and int4 for int3. It gives modules the
            # names of the checkpoint again, but leaves the prefix of the base model as it is.
            written = name
            if module_name.removeprefix(prefix) == name.removeprefix(prefix):
                written = module_name
            linears[written] = entry.of(
                module.packed, entry.torch_dtype, transposed=entry.transposed
            ).to_dict()
        # pickle would look a method up by its name
        model.num_parameters = partial(_num_parameters, model)
        if isinstance(model.get_input_embeddings(), PackedEmbedding):
            model.resize_token_embeddings = _refuse_resize
        self._tensors = None
        self.quantization_config.format_version = FORMAT_VERSION
        self.quantization_config.linears = linears
        return model

    def dequantize(self, model: Any, dtype: Any = None) -> Any:
        # Here, since transformers passes the dtype of the config on if none is given.
        if dtype is not None:
            model = model.to(dtype)
        return super().dequantize(model)

    def _dequantize(self, model: Any, dtype: Any = None) -> Any:
        vars(model).pop("resize_token_embeddings", None)
        return to_dense(model)

    def is_serializable(self, safe_serialization: Any = None) -> bool:
        return True


def _module_names(model: Any, names: list[str]) -> dict[str, str]:
    """The module of the model for each name of a linear in a checkpoint, by transformers' own rules."""
    # Here, as this module may be imported while transformers is.
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import (
        WeightConverter,
        WeightRenaming,
        rename_source_key,
    )

    rules = get_model_conversion_mapping(
        model, getattr(model, "_checkpoint_conversion_mapping", None) or None
    )
    renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
    converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
    weights = model.state_dict(keep_vars=True)
    prefix = model.base_model_prefix
    modules = {}
    for name in names:
        key = f"{name}.weight"
        target, _ = rename_source_key(key, renamings, converters, prefix, weights)
        # a rule for other releases may have misled
        others = (
            key,
            key.removeprefix(f"{prefix}."),
            f"{prefix}.{key}",
        )
        modules[name] = next(
            (other for other in (target, *others) if other in weights), target
        ).removesuffix(".weight")
    return modules


def _num_parameters(
    model: Any, only_trainable: bool = False, exclude_embeddings: bool = False
) -> int:
    """``num_parameters`` of a packed model: that of the dense model that was packed, zeros included, each shared weight
    once; a packed weight is not trainable. transformers counts quantised weights of bitsandbytes so, too."""
    count = int(type(model).num_parameters(model, only_trainable, exclude_embeddings))
    if only_trainable:
        return count
    for module in model.modules():
        embedding = isinstance(module, PackedEmbedding)
        count -= embedding  # its placeholder is a parameter
        shared = (
            isinstance(module, PackedLinear)
            and "weight_mask" in module._non_persistent_buffers_set
        )
        if (
            isinstance(module, PackedLinear)
            and not shared
            and not (embedding and exclude_embeddings)
        ):
            count += module.out_features * module.in_features
    return count


def _refuse_resize(*_: Any, **__: Any) -> Any:
    raise FormatError(
        "a packed embedding cannot be resized; unpack the model, resize it, and pack it again"
    )


def _share_embedding(model: Any) -> None:
    """Gives a head that is tied to a packed embedding its own module for the same tensors."""
    embedding = model.get_input_embeddings()
    head = model.get_output_embeddings()
    tied = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if tied and isinstance(embedding, PackedEmbedding) and isinstance(head, nn.Linear):
        packed = PackedLinear(
            embedding.embedding_dim, embedding.num_embeddings, head.bias is not None
        )
        packed.weight = embedding.weight
        packed.bias = head.bias
        # one dict for both, so that a move or a load changes both
        packed._buffers = embedding._buffers
        # saved once, as the embedding's
        packed._non_persistent_buffers_set.update(PACKED_BUFFERS)
        model.set_output_embeddings(packed)


def _find(model: nn.Module, name: str) -> Any:
    """The linear of this name in the model."""
    try:
        module = model.get_submodule(name)
    except AttributeError:
        module = None
    if (
        isinstance(module, (nn.Linear, Conv1D, PackedLinear))
        or row_scale(module) is not None
    ):
        return module
    raise FormatError(
        f"packed weight {name} is not a linear of {type(model).__name__}; load a causal language model, or copy "
        "config.json again"
    )
