"""Tiny models as GGUF files, as llama.cpp's own converter would write them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedModel

from tests.models import tiny_llama, tiny_tokenizer

Kind = gguf.GGMLQuantizationType
CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
NAMES = {f"self_attn.{name}_proj": f"attn_{name}" for name in "qkv"}
NAMES |= {f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
NAMES |= {"self_attn.o_proj": "attn_output", "mlp.gate": "ffn_gate_inp"}
NAMES |= {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
OUTSIDE = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
}


def in_gguf(model: PreTrainedModel) -> dict[str, np.ndarray]:
    """The weights of a model in fp32, by their names in GGUF."""
    config, weights = model.config, dict[str, np.ndarray]()
    # whose rows and experts lie in another order
    if config.model_type not in (
        "llama",
        "mixtral",
    ):
        arch = next(
            code
            for code, name in gguf.MODEL_ARCH_NAMES.items()
            if config.model_type in (name, f"{name}_text")
        )
        names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
        named = {
            names.get_name(key, (".weight", ".bias")): x.numpy()
            for key, x in model.float().state_dict().items()
        }
        # a tied head has none
        return {name: weight for name, weight in named.items() if name}
    for key, parameter in model.float().state_dict().items():
        stem, _, kind = key.rpartition(".")
        weight = parameter.numpy()
        block, _, part = stem.removeprefix("model.layers.").partition(".")
        if stem in OUTSIDE:
            weights[f"{OUTSIDE[stem]}.{kind}"] = weight
        elif kind == "gate_up_proj":
            gate, up = np.split(weight, 2, axis=1)
            weights |= {
                f"blk.{block}.ffn_gate_exps.weight": gate,
                f"blk.{block}.ffn_up_exps.weight": up,
            }
        elif kind == "down_proj":
            weights[f"blk.{block}.ffn_down_exps.weight"] = weight
        else:
            heads = {
                "q_proj": config.num_attention_heads,
                "k_proj": config.num_key_value_heads,
            }.get(stem[-6:])
            if heads:  # rows in llama.cpp's order: it rotates neighbouring pairs, Hugging Face the two halves of a head
                weight = (
                    weight.reshape(heads, 2, len(weight) // heads // 2, -1)
                    .swapaxes(1, 2)
                    .reshape(weight.shape)
                )
            weights[f"blk.{block}.{NAMES[part]}.{kind}"] = weight
    return weights


def write_gguf(
    model: PreTrainedModel,
    path: Path,
    kind: Kind = Kind.BF16,
    arch: str = "llama",
    **other: Any,
) -> Path:
    """Writes a model and returns its path; matrices in ``kind``, norms and biases in F32. ``other`` has
    the way in which text is split, the last token, what is called with the writer, and whether there are weights."""
    config, tokenizer = model.config, tiny_tokenizer()
    writer = gguf.GGUFWriter(str(path), arch)
    writer.add_name("Tiny")
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(getattr(config, "rms_norm_eps", 1e-5))
    writer.add_rope_freq_base(config.rope_parameters.get("rope_theta", 1e4))
    if hasattr(config, "num_local_experts"):
        writer.add_expert_count(config.num_local_experts)
        writer.add_expert_used_count(config.num_experts_per_tok)
    vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(other.get("split", "default"))
    tokens, merges = (
        sorted(vocabulary["vocab"], key=vocabulary["vocab"].get),
        vocabulary["merges"],
    )
    if "last" in other:  # the last merge made the last token
        tokens[-1], merges = other["last"], merges[:-1]
    writer.add_token_list(tokens)
    writer.add_token_types(
        [gguf.TokenType.CONTROL] * 2 + [gguf.TokenType.NORMAL] * (len(tokenizer) - 2)
    )
    writer.add_token_merges([" ".join(pair) for pair in merges])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_chat_template(CHAT)
    other.get("more", lambda writer: None)(writer)
    written = in_gguf(model) if other.get("weights", True) else {}
    for name, weight in written.items():
        matrix = weight.ndim > 1
        writer.add_tensor(
            name,
            gguf.quantize(weight, kind) if matrix else weight,
            raw_dtype=kind if matrix else None,
        )
    finish(writer)
    return path


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def quantized_llama(kind: gguf.GGMLQuantizationType) -> LlamaForCausalLM:
    """A Llama whose weights are values that ``kind`` can hold; widths are multiples of its block of 32."""
    model = tiny_llama(intermediate_size=96)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.copy_(
                    torch.from_numpy(
                        gguf.dequantize(gguf.quantize(parameter.numpy(), kind), kind)
                    )
                )
    return model
