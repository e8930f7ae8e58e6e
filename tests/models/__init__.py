"""Tiny, untrained, deterministic models of the families that differ in ways that matter, and a tokenizer for them.

Hidden, intermediate and vocabulary sizes all differ, so that a transposed or swapped matrix cannot go unnoticed."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

VOCABULARY = 300


def windows(count: int = 8, length: int = 40, seed: int = 3) -> torch.Tensor:
    """Token ids ``(count, length)``."""
    return torch.randint(
        VOCABULARY, (count, length), generator=torch.Generator().manual_seed(seed)
    )


POSITIONS = 128
BOS, EOS = "<s>", "</s>"  # ids 0 and 1 of the tiny tokenizer
_IDS: dict[str, Any] = {"vocab_size": VOCABULARY, "bos_token_id": 0, "eos_token_id": 1}


def tiny_llama(seed: int = 0, **changes: Any) -> transformers.LlamaForCausalLM:
    """Llama: RMS norm, gated FFN, grouped-query attention, rotary positions, no biases. 3 blocks of width 32."""
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 80,
        "num_hidden_layers": 3,
        "max_position_embeddings": POSITIONS,
    }
    more = {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "tie_word_embeddings": False,
    }
    config = transformers.LlamaConfig(**{**_IDS, **sizes, **more, **changes})
    return _seeded(transformers.LlamaForCausalLM, config, seed)


def tiny_opt(seed: int = 0, **changes: Any) -> transformers.OPTForCausalLM:
    """OPT: layer norm, ReLU FFN, biases everywhere, learned positions, tied head. 2 blocks of width 48."""
    sizes = {
        "hidden_size": 48,
        "word_embed_proj_dim": 48,
        "ffn_dim": 112,
        "max_position_embeddings": POSITIONS,
    }
    more = {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "pad_token_id": 1,
        "dropout": 0.0,
    }
    return _seeded(
        transformers.OPTForCausalLM,
        transformers.OPTConfig(**{**_IDS, **sizes, **more, **changes}),
        seed,
    )


def tiny_gpt2(seed: int = 0, **changes: Any) -> transformers.GPT2LMHeadModel:
    """GPT-2: ``Conv1D`` weights stored (in, out), fused q, k, v, GELU FFN, learned positions. 2 blocks of width 48."""
    sizes = {
        "n_embd": 48,
        "n_inner": 112,
        "n_layer": 2,
        "n_head": 4,
        "n_positions": POSITIONS,
    }
    more = dict.fromkeys(("attn_pdrop", "embd_pdrop", "resid_pdrop"), 0.0)
    return _seeded(
        transformers.GPT2LMHeadModel,
        transformers.GPT2Config(**{**_IDS, **sizes, **more, **changes}),
        seed,
    )


@cache
def tiny_tokenizer(add_bos: bool = False) -> PreTrainedTokenizerFast:
    """Byte-level BPE with 300 entries, trained on Python's own documentation; adds BOS only when asked."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    settings = {
        "vocab_size": VOCABULARY,
        "special_tokens": [BOS, EOS],
        "show_progress": False,
    }
    trainer = trainers.BpeTrainer(
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), **settings
    )
    tokenizer.train_from_iterator(
        [topics[name] for name in sorted(topics)[:20]], trainer
    )
    if add_bos:
        forms = {"single": f"{BOS} $A", "pair": f"{BOS} $A {BOS} $B"}
        tokenizer.post_processor = TemplateProcessing(
            **forms, special_tokens=[(BOS, 0)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, pad_token=EOS
    )


def save_tiny(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, directory: Path
) -> Path:
    """Write an ordinary Hugging Face checkpoint (safetensors, configuration, tokenizer) and return its directory."""
    model.save_pretrained(directory)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)
    return Path(directory)


def _seeded(family: type[Any], config: PretrainedConfig, seed: int) -> Any:
    """The model in evaluation mode, fp32; weights, biases and norms are drawn so that each part shapes the logits."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = family(config).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(
                    1.0 if parameter.ndim == 1 and name.endswith("weight") else 0.0, 0.1
                )
    return model


RECIPE: dict[str, Any] = {
    "method": "sparsegpt",
    "sparsity": 0.6,
    "samples": 4,
    "seq_len": 24,
    "batch_tokens": 48,
}
