"""The quantisation method ``sparsellm`` of vLLM: linears and embeddings whose weights stay packed.

vLLM fills the parameters that ``create_weights`` registers, one tensor of the checkpoint after another. They are
empty here, since numbers of values are not known before; their loaders give the tensors to a
``sparsepack_vllm.shards.Shards``. When all are loaded, they become a ``sparsepack.module.PackedLinear`` for
each form that the parts of the layer have. The classes are in a module, so that vLLM's processes can pickle them.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    UnquantizedLinearMethod,
)
from vllm.model_executor.layers.quantization import register_quantization_config
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
from vllm.model_executor.layers.vocab_parallel_embedding import (
    ParallelLMHead,
    VocabParallelEmbedding,
)

from sparsepack.checkpoint import (
    QUANT_METHOD,
    PackedEntry,
    check_files,
    packed_entries,
)
from sparsepack.errors import FormatError
from sparsepack.files import read_object, weight_files
from sparsepack.layout import PackedWeight
from sparsepack.module import PackedLinear, gather
from sparsepack.pieces import rows_of, with_rows
from sparsepack_vllm.shards import TENSORS, Shards, Share, linears_of


@register_quantization_config(QUANT_METHOD)
class PackedConfig(QuantizationConfig):  # type: ignore[misc]
    """``quantization_config`` of a packed checkpoint; a FormatError says that its version or content is not known."""

    def __init__(self, entries: dict[str, PackedEntry]) -> None:
        super().__init__()
        self.entries = entries
        self.tied = False  # whether the output head is the embedding
        self.met: set[str] = set()  # the linears of which layers were made

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        """The config of the object in ``config.json``."""
        return cls(packed_entries(config))

    def maybe_update_config(
        self, model_name: str, hf_config: Any = None, revision: str | None = None
    ) -> None:
        """Compares the files of a directory with their checksums, and asks the model's config for a tied head."""
        text_config = getattr(hf_config, "get_text_config", lambda: hf_config)()
        self.tied = bool(getattr(text_config, "tie_word_embeddings", False))
        directory = Path(model_name)
        if directory.is_dir():
            config = read_object(directory / "config.json")
            files = weight_files(directory)[0]
            check_files(directory, files, config["quantization_config"])

    def apply_vllm_mapper(self, hf_to_vllm_mapper: Any) -> None:
        """Gives the linears the names that the model's modules have in vLLM."""
        self.entries = hf_to_vllm_mapper.apply_dict(self.entries)

    def get_checkpoint_weight_mapper(self) -> Any:
        """What vLLM asks for when all layers are made: no renaming.

        A FormatError names a packed linear that the model of vLLM wants dense."""
        for name in self.entries:
            if name not in self.met:
                raise FormatError(
                    f"{name} is packed, and the model of vLLM takes it only dense: pack it with `--head keep` if "
                    "it is the embedding or the head, else load the model with transformers"
                )
        return super().get_checkpoint_weight_mapper()

    def _shards(self, names: list[str]) -> Shards:
        self.met.update(names)
        return Shards(names, self.entries)

    def get_quant_method(self, layer: Any, prefix: str) -> Any:
        """What computes with a layer: ours for packed linears and embeddings; vLLM's for all others, experts too."""
        if isinstance(layer, LinearBase):
            names = linears_of(prefix, self.packed_modules_mapping, self.entries)
            if names:
                return PackedLinearMethod(self._shards(names))
            return UnquantizedLinearMethod()
        if isinstance(layer, VocabParallelEmbedding):
            return self._of_embedding(layer, prefix)
        return None

    def _of_embedding(self, layer: Any, prefix: str) -> Any:
        """What computes with an embedding or an output head.

        Models give an embedding no name, so it is recognised by its shape; a tied head has no weight of its own."""
        if prefix in self.entries:
            return PackedEmbeddingMethod(self._shards([prefix]))
        shape = (layer.org_vocab_size, layer.embedding_dim)
        embeddings = [
            name
            for name, entry in self.entries.items()
            if entry.shape == shape and name.rpartition(".")[2] != "lm_head"
        ]
        if isinstance(layer, ParallelLMHead):
            return TiedHeadMethod() if embeddings and self.tied else None
        if len(embeddings) > 1:
            raise FormatError(
                f"{embeddings[0]} and {embeddings[1]} both have the shape {shape} of the embedding, which has no name "
                "in vLLM; load the model with transformers"
            )
        if embeddings:
            return PackedEmbeddingMethod(self._shards(embeddings))
        return None

    def get_name(self) -> str:
        """The name of the method in ``config.json``."""
        return QUANT_METHOD

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """The dtypes that a model may compute in."""
        return [torch.bfloat16, torch.float16, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        """The oldest GPU: that of the Triton kernels."""
        return 70

    @staticmethod
    def get_config_filenames() -> list[str]:
        """None but ``config.json``."""
        return []


class PackedLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Loads and multiplies by the packed weights of one layer."""

    def __init__(self, shards: Shards) -> None:
        self.shards: Shards | None = shards

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **_: Any,
    ) -> None:
        """Registers an empty parameter for each tensor that a checkpoint may have; vLLM calls its loader."""
        assert self.shards is not None
        repeats = [1] * len(output_partition_sizes)
        if hasattr(layer, "num_kv_head_replicas"):  # q has no repeated heads
            repeats[1:] = [layer.num_kv_head_replicas] * len(repeats[1:])
        self.share = Share(
            shape=(output_size, input_size),
            rows=tuple(output_partition_sizes),
            columns=input_size_per_partition,
            rank=getattr(layer, "tp_rank", 0),
            repeats=tuple(repeats),
        )
        self.dtype = params_dtype
        for name in TENSORS:
            empty = torch.empty(0, dtype=self.shards.dtype_of(name))
            parameter = nn.Parameter(empty, requires_grad=False)
            parameter.weight_loader = partial(_load, self.shards, name)  # type: ignore[attr-defined]
            layer.register_parameter(name, parameter)

    def process_weights_after_loading(self, layer: Any) -> None:
        """Checks what was loaded, joins it, and drops the parameters but for the placeholder."""
        if self.shards is None:  # vLLM may ask twice
            return
        parts = []
        for packed in self._weights(layer, self.shards):
            out, columns = packed.shape
            device = layer.weight.device
            part = PackedLinear(columns, out, False, dtype=self.dtype, device=device)
            part.set_packed(packed, self.shards.names[0])
            gather(part)
            parts.append(part)
        for name in TENSORS:
            delattr(layer, name)
        placeholder = torch.zeros(1, dtype=self.dtype, device=device)
        layer.weight = nn.Parameter(placeholder, requires_grad=False)
        layer.parts = nn.ModuleList(parts)
        self.shards = None

    def _weights(self, layer: Any, shards: Shards) -> list[PackedWeight]:
        """What this rank multiplies by, one below the other."""
        return shards.of_rank(self.share)

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x Wᵀ + b`` for ``x (..., in)``."""
        products = [part(x) for part in layer.parts]
        y: Tensor = products[0]
        if len(products) > 1:
            y = torch.cat(products, dim=-1)
        if bias is not None:
            y = y + bias
        return y


def _load(
    shards: Shards, name: str, parameter: Any, tensor: Tensor, part: Any = None
) -> None:
    """The ``weight_loader`` of a parameter, which stays empty."""
    shards.add(name, tensor, part)


class PackedEmbeddingMethod(PackedLinearMethod):
    """An embedding or an output head, or both in one: rows of the vocabulary, padded to what vLLM expects."""

    def _weights(self, layer: Any, shards: Shards) -> list[PackedWeight]:
        (packed,) = shards.weights()
        (name,) = shards.names
        shape = (layer.org_vocab_size, layer.embedding_dim)
        if packed.shape != shape:
            raise FormatError(
                f"packed weight {name} has shape {packed.shape}, where the model has {shape}; config.json and the "
                "weight files do not belong together"
            )
        indices: Any = layer.shard_indices
        begin = indices.org_vocab_start_index
        piece = rows_of(packed, begin, indices.org_vocab_end_index)
        return [with_rows(piece, self.share.rows[0])]

    def embedding(self, layer: Any, ids: Tensor) -> Tensor:
        """The rows of token ids, ``(..., columns)`` in the dtype of the model."""
        packed = layer.parts[0].packed
        values = nn.functional.embedding(ids, packed.values.view(packed.shape))
        rows = values.float() * packed.scales[ids].unsqueeze(-1)
        embedded: Tensor = rows.to(self.dtype)
        return embedded

    def tie_weights(self, layer: Any, embed_tokens: nn.Module) -> nn.Module:
        """The output head of a model that says it is tied: the embedding, as in transformers."""
        return embed_tokens


class TiedHeadMethod(LinearMethodBase):  # type: ignore[misc]
    """An output head without a weight of its own, until the model makes it the embedding."""

    def create_weights(self, layer: Any, *_: Any, **__: Any) -> None:
        """Registers nothing."""

    def tie_weights(self, layer: Any, embed_tokens: nn.Module) -> nn.Module:
        """The embedding, which multiplies as well."""
        return embed_tokens

    def apply(self, layer: Any, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Refuses: the model did not tie its head."""
        raise FormatError(
            "the output head has no weight: config.json says that it is the embedding, and this model of vLLM does not "
            "make it so; load the model with transformers"
        )
