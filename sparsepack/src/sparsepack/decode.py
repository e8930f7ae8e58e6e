"""Decodes one token at a time with a model, packed or dense, in one call of the extension for each.

The cache of keys and values has a fixed size, and no Python runs between layers.

Only decoders of the Llama kind (Llama, Mistral without a window, Qwen2) are known to the extension, and only with
transformers' own modules, unchanged. Everything else is decoded by transformers. Sums, norms and attention are fp32,
whatever the dtype of the model.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sparsepack import native
from sparsepack.codes import FLOAT_TYPES
from sparsepack.layout import PackedWeight
from sparsepack.masks import to_bits
from sparsepack.module import PackedLinear, kernel_name

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
    """Decodes one sequence with a model for which :func:`decodes` is true.

    Args:
        model: is read, and must stay as it is while this object lives.
        capacity: tokens of the prompt and of the continuation.
    """

    def __init__(self, model: PreTrainedModel, capacity: int) -> None:
        config = model.config
        inside = model.model
        self._model = model
        self._capacity = capacity
        self._kept: list[Tensor] = []  # tensors whose addresses are in the plan
        size = _head_size(config)
        heads = config.num_attention_heads
        kv_heads = config.num_key_value_heads
        hidden = config.hidden_size
        inner = max(
            config.intermediate_size,
            *(layer.mlp.gate_proj.out_features for layer in inside.layers),
        )
        positions = torch.arange(capacity).unsqueeze(0)
        angles = inside.rotary_emb(
            torch.zeros(1, 1, hidden, dtype=torch.float32), positions
        )
        # The extension writes fp32, whatever torch's default. Pages that nothing is written to take no memory.
        self._cache = torch.empty(
            len(inside.layers), 2, kv_heads, capacity, size, dtype=torch.float32
        )
        work = torch.empty(
            3 * hidden + 2 * heads * size + 2 * inner + heads * capacity,
            dtype=torch.float32,
        )
        self.logits = torch.empty(config.vocab_size, dtype=torch.float32)
        settings = torch.tensor(
            [config.rms_norm_eps, inside.layers[0].self_attn.scaling],
            dtype=torch.float32,
        )
        plan = [len(inside.layers), hidden, heads, kv_heads, size, inner, capacity]
        plan += [self._address(tensor[0]) for tensor in angles]
        plan += [self._address(settings), self._address(work), self.logits.data_ptr()]
        plan.append(self._address(inside.norm.weight))
        embedding = self._linear(inside.embed_tokens)
        # a caller may have taken rows off the embedding
        self._tokens = min(embedding[1], config.vocab_size)
        plan += embedding + self._linear(model.lm_head)
        for index, layer in enumerate(inside.layers):
            plan += [
                self._address(layer.input_layernorm.weight),
                self._address(layer.post_attention_layernorm.weight),
            ]
            plan += [self._cache[index, 0].data_ptr(), self._cache[index, 1].data_ptr()]
            for name in (*_LINEARS, *_FEED_FORWARD):
                plan += self._linear(layer.get_submodule(name))
        self._plan = torch.tensor(plan, dtype=torch.int64)

    @torch.no_grad()
    def read(self, ids: Tensor) -> Tensor:
        """Reads a prompt ``(1, tokens)`` by the model's own forward; the logits ``(vocabulary,)`` after it, fp32."""
        tokens = ids.shape[1]
        output: Any = self._model(input_ids=ids, use_cache=True, logits_to_keep=1)
        cache = getattr(output, cache_keyword(self._model))
        for index, (keys, values) in enumerate(self._cache):
            keys[:, :tokens] = cache.layers[index].keys[0]
            values[:, :tokens] = cache.layers[index].values[0]
        return self.logits.copy_(output.logits[0, -1])

    def step(self, token: int, position: int) -> Tensor:
        """The logits ``(vocabulary,)`` after ``token``, fp32; they are overwritten by the next step.

        Raises:
            IndexError: token or position is out of range.
        """
        if not 0 <= position < self._capacity or not 0 <= token < self._tokens:
            raise IndexError(
                f"token {token} of {self._tokens} at position {position} of {self._capacity}"
            )
        native.decode(self._plan, token, position)
        return self.logits

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


def dense_weight(weight: Tensor) -> PackedWeight:
    """A dense weight ``(out, in)`` of fp32, bf16 or fp16 in the layout of the kernels, without a copy."""
    weight = weight.detach().contiguous()
    rows, columns = weight.shape
    kind = next(name for name, dtype in FLOAT_TYPES.items() if dtype == weight.dtype)
    mask = to_bits(torch.ones(1, columns, dtype=torch.bool))
    return PackedWeight(
        (rows, columns),
        "dense",
        mask=mask,
        values=weight.view(-1),
        offsets=torch.arange(rows + 1) * columns,
        scales=None,
        value_type=kind,
    )
