"""Decodes a token of each of up to sixteen sequences with a model, packed or dense, in one call of the extension.

A sequence has a cache of keys and values of its own, of a fixed size, and no Python runs between layers. The bits of a
sequence are those that it has alone.

Only decoders of the Llama kind (Llama, Mistral without a window, Qwen2) are known to the extension, and only with
transformers' own modules, unchanged. Everything else is decoded by transformers. Sums, norms and attention are fp32,
whatever the dtype of the model. Keys and values are kept in bf16 for a model in bf16, as transformers keeps them, else
in fp32.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsepack import native
from sparsepack.codes import FLOAT_TYPES, TYPE_OF
from sparsepack.layout import PackedWeight, dense_offsets
from sparsepack.masks import to_bits
from sparsepack.module import PackedLinear, kernel_name

PIECE = 256  # tokens of a prompt that are read at once, while other sequences wait
FAMILIES = ("Llama", "Mistral", "Qwen2")
# angles that do not change with the length of the text
_ROPES = (
    "default",
    "linear",
    "llama3",
    "yarn",
)
_LINEARS = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
)
_FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")


def cache_keyword(model: nn.Module) -> str:
    """The name of the key-value cache in a model's forward and its output, which differs between releases."""
    parameters = inspect.signature(model.forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def decodes(model: Any) -> bool:
    """Whether the extension can decode a model: one that it knows, packed or dense, on a CPU with kernels."""
    family = type(model).__name__.removesuffix("ForCausalLM")
    if family not in FAMILIES or not type(model).__module__.startswith(
        "transformers.models."
    ):
        return False
    modules = list(model.modules())
    config = model.config
    if (
        kernel_name() == "torch"
        or torch.get_default_device().type != "cpu"
        or not all(map(_readable, modules))
    ):
        return False
    rope = (
        getattr(config, "rope_parameters", None)
        or getattr(config, "rope_scaling", None)
        or {}
    )
    window = getattr(config, "sliding_window", None) is not None and getattr(
        config, "use_sliding_window", True
    )
    if (
        config.hidden_act != "silu"
        or rope.get("rope_type", "default") not in _ROPES
        or window
    ):
        return False
    parts = (
        "ForCausalLM",
        "Model",
        "DecoderLayer",
        "Attention",
        "MLP",
        "RMSNorm",
        "RotaryEmbedding",
    )
    known = {
        *(f"{family}{part}" for part in parts),
        "ModuleList",
        "Linear",
        "Embedding",
        "SiLU",
        "SiLUActivation",
    }
    unchanged = all(
        (type(module).__name__ in known or isinstance(module, PackedLinear))
        and type(module).__module__.startswith(
            ("torch.nn.", "transformers.", "sparsepack.")
        )
        and not (
            module._forward_hooks
            or module._forward_pre_hooks
            or "forward" in vars(module)
        )
        for module in modules
    )
    # The extension computes keys and values of a token in the room of gate and up.
    room = config.intermediate_size >= config.num_key_value_heads * _head_size(config)
    return unchanged and room and model.lm_head.out_features == config.vocab_size


def _readable(module: nn.Module) -> bool:
    """Whether the kernels can read the weight of a module, if it has one: plain numbers on the CPU, or packed ones."""
    weight = getattr(module, "weight", None)
    if weight is None:
        return True
    # Quantised weights of other libraries are tensors of their own classes, with the dtype of what they stand for.
    if (
        type(weight) not in (Tensor, nn.Parameter)
        or not weight.is_cpu
        or weight.layout != torch.strided
    ):
        return False
    return isinstance(module, PackedLinear) or weight.dtype in FLOAT_TYPES.values()


def _head_size(config: Any) -> int:
    return int(
        getattr(config, "head_dim", None)
        or config.hidden_size // config.num_attention_heads
    )


class Decoder:
    """Decodes sequences with a model for which ``decodes`` is true.

    Args:
        model: is read, and must stay as it is while this object lives.
        positions: the most tokens of a sequence, prompt and continuation.
        sequences: the most that are decoded in one step, 1 to 16.
    """

    def __init__(
        self, model: PreTrainedModel, positions: int, *, sequences: int = 1
    ) -> None:
        config = model.config
        inside = model.model
        self.model = model
        self.positions = positions
        self._kept: list[Tensor] = []  # tensors whose addresses are in the plan
        size = _head_size(config)
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads
        hidden = config.hidden_size
        inner = max(
            config.intermediate_size,
            *(layer.mlp.gate_proj.out_features for layer in inside.layers),
        )
        angles = inside.rotary_emb(
            torch.zeros(1, 1, hidden, dtype=torch.float32),
            torch.arange(positions).unsqueeze(0),
        )
        self.cached = (len(inside.layers), 2, kv_heads, size)  # numbers a position
        # The extension writes fp32, whatever torch's default. Pages that nothing is written to take no memory.
        row = 3 * hidden + 2 * heads * size + 2 * inner + heads * positions
        work = torch.empty(sequences * row, dtype=torch.float32)
        self._logits = torch.empty(sequences, config.vocab_size, dtype=torch.float32)
        settings = torch.tensor(
            [config.rms_norm_eps, inside.layers[0].self_attn.scaling],
            dtype=torch.float32,
        )
        self.cache_dtype = torch.float32
        if model.dtype == torch.bfloat16:
            self.cache_dtype = torch.bfloat16
        plan = [len(inside.layers), hidden, heads, kv_heads, size, inner, positions]
        plan.append(int(self.cache_dtype == torch.bfloat16))
        plan += [self._address(tensor[0]) for tensor in angles]
        plan += [self._address(settings), self._address(work), self._logits.data_ptr()]
        plan.append(self._address(inside.norm.weight))
        embedding = self._linear(inside.embed_tokens)
        # a caller may have taken rows off the embedding
        self._tokens = min(embedding[1], config.vocab_size)
        plan += embedding + self._linear(model.lm_head)
        for layer in inside.layers:
            plan += [
                self._address(layer.input_layernorm.weight),
                self._address(layer.post_attention_layernorm.weight),
            ]
            for name in (*_LINEARS, *_FEED_FORWARD):
                plan += self._linear(layer.get_submodule(name))
        self._plan = torch.tensor(plan, dtype=torch.int64)

    def step(self, tokens: Sequence[int], caches: Sequence[Cache]) -> Tensor:
        """The logits ``(sequences, vocabulary)`` after a token of each sequence, which its cache then holds, in fp32;
        they are overwritten by the next step.

        Raises:
            IndexError: a token is unknown, a cache is full, or there are too many sequences.
        """
        if not 0 < len(caches) <= len(self._logits):
            raise IndexError(f"{len(caches)} sequences of {len(self._logits)}")
        steps = []
        for token, cache in zip(tokens, caches, strict=True):
            if not 0 <= token < self._tokens or cache.length >= cache.capacity:
                raise IndexError(
                    f"token {token} of {self._tokens} at position {cache.length} of {cache.capacity}"
                )
            steps += [token, cache.length, cache.capacity, cache.numbers.data_ptr()]
        numbers = torch.tensor(steps, dtype=torch.int64).view(len(caches), -1)
        native.decode(self._plan, numbers)
        for cache in caches:
            cache.length += 1
        return self._logits[: len(caches)]

    def _address(self, tensor: Tensor) -> int:
        """Address of an fp32 copy that this object keeps alive."""
        self._kept.append(tensor.detach().float().contiguous())
        return self._kept[-1].data_ptr()

    def _linear(self, module: Any) -> list[int]:
        """The numbers of a linear in the plan; its tensors are kept alive."""
        if isinstance(module, PackedLinear):
            packed = module.packed
            rounded = module.rounded and packed.scales is not None
        else:
            packed = dense_weight(module.weight)
            rounded = False
        self._kept += packed.tensors.values()
        bias = getattr(module, "bias", None)
        return [
            *native.addresses(packed),
            int(rounded),
            0 if bias is None else self._address(bias),
        ]


class Cache:
    """The keys and values of one sequence.

    Attributes:
        capacity: the most tokens, at most the decoder's positions.
        length: the tokens that it holds.
        numbers: ``(layers, 2, heads, capacity, size)``; what is not written to takes no memory.
    """

    def __init__(self, decoder: Decoder, capacity: int) -> None:
        if capacity > decoder.positions:
            raise IndexError(f"{capacity} tokens of {decoder.positions}")
        layers, pair, heads, size = decoder.cached
        self._model = decoder.model
        self.capacity = capacity
        self.length = 0
        self.numbers = torch.empty(
            (layers, pair, heads, capacity, size), dtype=decoder.cache_dtype
        )

    def read(self, ids: Tensor) -> Iterator[Tensor]:
        """Reads a prompt ``(1, tokens)`` by the model's own forward, ``PIECE`` tokens at a time. After each piece
        come the logits ``(vocabulary,)``."""
        keyword = cache_keyword(self._model)
        held: dict[str, Any] = {}
        for piece in ids.split(PIECE, dim=1):
            with torch.no_grad():
                output: Any = self._model(
                    input_ids=piece, use_cache=True, logits_to_keep=1, **held
                )
            held[keyword] = getattr(output, keyword)
            first = self.length
            last = first + piece.shape[1]
            for index, (keys, values) in enumerate(self.numbers):
                layer = held[keyword].layers[index]
                keys[:, first:last] = layer.keys[0, :, first:]
                values[:, first:last] = layer.values[0, :, first:]
            self.length = last
            yield output.logits[0, -1].float()


def dense_weight(weight: Tensor) -> PackedWeight:
    """A dense weight ``(out, in)`` of fp32, bf16 or fp16 in the layout of the kernels, without a copy."""
    weight = weight.detach().contiguous()
    rows, columns = weight.shape
    value_type = TYPE_OF[weight.dtype]
    return PackedWeight(
        (rows, columns),
        "dense",
        mask=to_bits(torch.ones(1, columns, dtype=torch.bool)),
        values=weight.view(-1),
        offsets=dense_offsets((rows, columns), value_type),
        scales=None,
        value_type=value_type,
    )
