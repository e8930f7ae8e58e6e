"""Tiny random models of the families that people use, as transformers saves them."""

from __future__ import annotations

from typing import Any

import transformers
from transformers import PreTrainedModel

from tests.models import POSITIONS, VOCABULARY, _seeded

LAYERS = 2
LLAMA: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 80,
    "num_hidden_layers": LAYERS,
}
LLAMA |= {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": POSITIONS,
}
LLAMA |= {
    "vocab_size": VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
_OPT: dict[str, Any] = {"word_embed_proj_dim": 32, "ffn_dim": 80, "dropout": 0.0}
_GPT2: dict[str, Any] = {
    "n_embd": 32,
    "n_layer": LAYERS,
    "n_head": 4,
    "n_positions": POSITIONS,
    "n_inner": 80,
}
_GEMMA: dict[str, Any] = {"sliding_window": 16, "query_pre_attn_scalar": 8}
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
_VISION |= {"image_size": 28, "patch_size": 14}

_MAMBA: dict[str, Any] = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8}
_MAMBA |= {"mamba_n_groups": 1, "mamba_expand": 2, "mamba_chunk_size": 8}
_ZAMBA2: dict[str, Any] = {
    "layers_block_type": ["hybrid", "hybrid"],
    "num_mem_blocks": 1,
    "adapter_rank": 4,
}
_ZAMBA2 |= {
    "attention_hidden_size": 64,
    "attention_head_dim": 16,
    "n_mamba_heads": 4,
    "mamba_headdim": 16,
}
_ZAMBA2 |= {"mamba_d_state": 8, "mamba_ngroups": 1, "chunk_size": 8}
_NEMOTRON_H: dict[str, Any] = {
    "layers_block_type": ["mamba", "attention", "mlp"],
    "n_groups": 1,
    "chunk_size": 8,
}
_NEMOTRON_H |= {"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8}
_GRANITE_HYBRID: dict[str, Any] = {**_MAMBA, "layer_types": ["mamba", "attention"]}
_GRANITE_HYBRID |= {"num_local_experts": 0, "shared_intermediate_size": 80}
LLAMA3: dict[str, Any] = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "original_max_position_embeddings": 32,
}
LLAMA3 |= {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

_TEXT: dict[
    str, dict[str, Any]
] = {  # The name of the family's classes, and what its config has that Llama's has not.
    "Llama": {"tie_word_embeddings": False},
    **{
        name: {}
        for name in (
            "Qwen2",
            "Qwen3",
            "Gemma",
            "Phi",
            "Phi3",
            "StableLm",
            "Starcoder2",
            "Olmo",
            "Olmo2",
        )
    },
    **{name: {} for name in ("Granite", "Cohere", "Glm", "Glm4")},
    **{
        name: {"sliding_window": 16}
        for name in ("Mistral", "Olmo3", "Exaone4", "Cohere2")
    },
    "Gemma2": _GEMMA,
    "OPT": _OPT,
    "GPT2": _GPT2,
    "GPTJ": {**_GPT2, "rotary_dim": 4},
    "GPTNeoX": {"tie_word_embeddings": False, "rotary_pct": 0.5},
    "Mpt": {"d_model": 32, "n_heads": 4, "n_layers": LAYERS, "max_seq_len": POSITIONS},
    "Bloom": {"n_layer": LAYERS, "n_head": 4},
    "Falcon": {"multi_query": True, "parallel_attn": True},
    "SmolLM3": {"no_rope_layers": [1, 0]},
    "Lfm2": {
        "layer_types": ["conv", "full_attention"],
        "block_auto_adjust_ff_dim": False,
    },
    "Mamba2": {
        "num_heads": 4,
        "head_dim": 16,
        "state_size": 8,
        "n_groups": 1,
        "chunk_size": 8,
    },
    "Bamba": {**_MAMBA, "attn_layer_indices": [1]},
    "FalconH1": {**_MAMBA, "mamba_d_ssm": 64},
    "GraniteMoeHybrid": _GRANITE_HYBRID,
    "NemotronH": _NEMOTRON_H,
    "Zamba2": _ZAMBA2,
}
# convolutions over the tokens, which no linear owns
STAY_DENSE = (
    "*.conv",
    "*.conv1d",
)


def llama3() -> PreTrainedModel:
    """Llama 3: scaled rotary angles, and in its small models a tied head."""
    settings = {"rope_scaling": LLAMA3, "rope_theta": 5e5, "tie_word_embeddings": True}
    return _model("LlamaConfig", "LlamaForCausalLM", {**LLAMA, **settings})


def gemma4_text(**changes: Any) -> PreTrainedModel:
    """Gemma 4: another head size in global layers, and an embedding for each layer."""
    layered = {
        "global_head_dim": 8,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
    }
    types = {
        "layer_types": ["sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "sliding_window": 16,
    }
    return _model(
        "Gemma4TextConfig",
        "Gemma4ForCausalLM",
        {**LLAMA, **layered, **types, **changes},
    )


def gemma3_text(**changes: Any) -> PreTrainedModel:
    return _model(
        "Gemma3TextConfig", "Gemma3ForCausalLM", {**LLAMA, **_GEMMA, **changes}
    )


def gemma3() -> PreTrainedModel:
    """Gemma 3 from 4B on: a directory of the text model, a projector and a vision tower, under prefixes."""
    settings = {
        "text_config": {**LLAMA, **_GEMMA},
        "vision_config": _VISION,
        "mm_tokens_per_image": 4,
    }
    return _model("Gemma3Config", "Gemma3ForConditionalGeneration", settings)


def qwen3_5() -> PreTrainedModel:
    """Qwen 3.5: opened as a language model, the vision tower is not a part of it. One layer has full attention."""
    text = {**LLAMA, **_LINEAR, "layer_types": ["full_attention", "full_attention"]}
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_heads": 2,
        "out_hidden_size": 32,
    }
    return _model(
        "Qwen3_5Config",
        "Qwen3_5ForConditionalGeneration",
        {"text_config": text, "vision_config": vision},
    )


def llama4(**changes: Any) -> PreTrainedModel:
    """Llama 4 as published: the mixture is a part, next to a vision tower."""
    text = {**LLAMA, "num_experts_per_tok": 1, "intermediate_size_mlp": 80, **changes}
    vision = {
        **_VISION,
        **dict.fromkeys(
            ("vision_output_dim", "projector_input_dim", "projector_output_dim"), 32
        ),
    }
    return _model(
        "Llama4Config",
        "Llama4ForConditionalGeneration",
        {"text_config": text, "vision_config": vision},
    )


def git() -> PreTrainedModel:
    """A config that is the text's own, with that of a vision tower inside."""
    settings = {
        "vision_config": {**_VISION, "projection_dim": 16},
        "hidden_dropout_prob": 0.0,
    }
    return _model("GitConfig", "GitForCausalLM", {**LLAMA, **settings})


def opt_350m() -> PreTrainedModel:
    """OPT 350M: norms after the blocks, and linears between the embedding and the blocks."""
    changes = {**_OPT, "word_embed_proj_dim": 16, "do_layer_norm_before": False}
    return _model("OPTConfig", "OPTForCausalLM", {**LLAMA, **changes})


_MANY: dict[str, Any] = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
}
_NARROW: dict[str, Any] = {"moe_intermediate_size": 24}
_LATENT: dict[str, Any] = {
    **_NARROW,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "num_key_value_heads": 4,
}
_LATENT |= {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
_LATENT |= {
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
_LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 2,
}
_LINEAR |= {
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_JAMBA: dict[str, Any] = {
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "mamba_d_state": 4,
    "mamba_dt_rank": 4,
}
_JAMBA |= {"expert_layer_period": 1, "expert_layer_offset": 0}
_MIXTURES: dict[
    str, dict[str, Any]
] = {  # Mixtures of experts: as _TEXT, with what Mixtral has.
    **{name: {} for name in ("Mixtral", "Olmoe", "Phimoe", "GraniteMoe")},
    "Qwen2Moe": {**_NARROW, "shared_expert_intermediate_size": 40},
    "Qwen3Moe": _NARROW,
    "Qwen3Next": {**_NARROW, **_LINEAR, "shared_expert_intermediate_size": 40},
    "DeepseekV2": {**_LATENT, "topk_method": "greedy"},
    "DeepseekV3": {**_LATENT, "head_dim": 4},
    "Glm4Moe": {**_NARROW, "n_shared_experts": 1, "first_k_dense_replace": 1},
    "GptOss": {"sliding_window": 16},
    "Llama4Text": {
        "intermediate_size_mlp": 80,
        "interleave_moe_layer_step": 1,
        "num_experts_per_tok": 1,
    },
    "Lfm2Moe": {
        **_NARROW,
        "layer_types": ["conv", "full_attention"],
        "num_dense_layers": 0,
    },
    "Jamba": _JAMBA,
}


def dbrx(num_experts: int = 4, **_: int) -> PreTrainedModel:
    """Stacks the experts in two dimensions."""
    experts = {
        "ffn_hidden_size": 40,
        "moe_num_experts": num_experts,
        "moe_top_k": 2,
        "hidden_size": 32,
    }
    sizes = {
        "vocab_size": VOCABULARY,
        "d_model": 32,
        "n_heads": 4,
        "n_layers": LAYERS,
        "max_seq_len": POSITIONS,
    }
    attention = {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0}
    return _model(
        "DbrxConfig",
        "DbrxForCausalLM",
        {**sizes, "ffn_config": experts, "attn_config": attention},
    )


def sparse_attention(name: str = "DeepseekV32", **given: Any) -> PreTrainedModel:
    """DeepSeek 3.2 and others: an indexer chooses the tokens that attention sees."""
    changes = {
        **_MANY,
        **_LATENT,
        "head_dim": 4,
        "index_topk": 8,
        "index_head_dim": 8,
        "index_n_heads": 2,
        **given,
    }
    return _model(f"{name}Config", f"{name}ForCausalLM", {**LLAMA, **changes})


def mixtral(**changes: Any) -> PreTrainedModel:
    """Published with a matrix for each expert, which transformers stacks."""
    return family("Mixtral", **changes)


def family(name: str, **given: Any) -> PreTrainedModel:
    """One of :data:`FAMILIES`, with settings of its own in place of the usual ones."""
    if name in _SPECIAL:
        return _SPECIAL[name](**given)
    changes = {
        **({**_MANY, **_MIXTURES[name]} if name in _MIXTURES else _TEXT[name]),
        **given,
    }
    own_names = {"n_embd", "d_model"} & changes.keys()  # for sizes
    settings = (
        {"vocab_size": VOCABULARY, **changes} if own_names else {**LLAMA, **changes}
    )
    if name == "Falcon":
        del settings["head_dim"]  # which it computes
    causal = {"GPT2": "GPT2LMHeadModel", "Llama4Text": "Llama4ForCausalLM"}.get(
        name, f"{name}ForCausalLM"
    )
    return _model(f"{name}Config", causal, settings)


_SPECIAL = {
    "Llama 3": llama3,
    "Gemma3Text": gemma3_text,
    "Gemma3": gemma3,
    "Gemma4Text": gemma4_text,
}
_SPECIAL |= {"Qwen3_5": qwen3_5, "OPT 350M": opt_350m, "Dbrx": dbrx}
FAMILIES = [*_TEXT, *_SPECIAL, *_MIXTURES]
_SPECIAL["Llama4"] = (
    llama4  # which transformers loads, and does not run without an image
)
MIXTURES = [*_MIXTURES, "Dbrx", "Llama4"]


def _model(config: str, causal: str, settings: dict[str, Any]) -> PreTrainedModel:
    model: PreTrainedModel = _seeded(
        getattr(transformers, causal), getattr(transformers, config)(**settings), 0
    )
    return model
