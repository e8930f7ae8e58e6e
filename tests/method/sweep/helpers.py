"""Tiny pruned models, and the divergence of whole models by plain transformers and autograd."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from sparsellm.files.scratch import Scratch
from sparsellm.method.sweep.sweep_task import Residence, SweepTask
from sparsellm.method.sweep.whole_model import sweep
from sparsellm.model import Chain, open_chain, streams
from sparsellm.model.streams import Feed
from sparsellm.model.structure import find_blocks
from sparsellm.records import SweepPass
from tests.models import VOCABULARY, tiny_gpt2, tiny_llama
from tests.models.families import LLAMA, _model, opt_350m

Family = Callable[..., Any]
CPU = torch.device("cpu")


def tiny_qwen2() -> PreTrainedModel:
    """Biases on q, k, v alone, a tied head, two blocks."""
    return _model(
        "Qwen2Config", "Qwen2ForCausalLM", {**LLAMA, "tie_word_embeddings": True}
    )


def tiny_mistral() -> PreTrainedModel:
    """A sliding window shorter than the text: its blocks are called with a mask that has a row for each window."""
    return _model("MistralConfig", "MistralForCausalLM", {**LLAMA, "sliding_window": 8})


def eager_llama() -> PreTrainedModel:
    """Attention that is always given a mask."""
    return tiny_llama(num_hidden_layers=2, attn_implementation="eager")


def tiny_zamba() -> PreTrainedModel:
    """Blocks 1 and 3 of four run through one shared transformer."""
    mamba = {
        "n_mamba_heads": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "attention_hidden_size": 64,
    }
    layers = {
        "num_hidden_layers": 4,
        "layers_block_type": ["mamba", "hybrid"] * 2,
        "num_key_value_heads": 4,
    }
    return _model(
        "ZambaConfig",
        "ZambaForCausalLM",
        {**LLAMA, **mamba, **layers, "attention_head_dim": 16},
    )


def sharing_llama() -> PreTrainedModel:
    """As Zamba: blocks share linears and a norm, one of them in two places of one block."""
    model = tiny_llama()
    first, second, third = model.model.layers
    third.self_attn.q_proj.weight = first.self_attn.q_proj.weight
    third.mlp.up_proj.weight = second.mlp.up_proj.weight = first.mlp.up_proj.weight
    third.mlp.gate_proj.weight = second.mlp.gate_proj.weight
    second.post_attention_layernorm.weight = second.input_layernorm.weight = (
        first.input_layernorm.weight
    )
    return model


FAMILIES = [
    tiny_llama,
    tiny_gpt2,
    tiny_qwen2,
    opt_350m,
    tiny_mistral,
    eager_llama,
    sharing_llama,
]


def ids_of(count: int, seq: int = 24, seed: int = 0) -> Tensor:
    return torch.randint(
        VOCABULARY, (count, seq), generator=torch.Generator().manual_seed(seed)
    )


def linear_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """The weights of all linears in the blocks."""
    name, blocks = find_blocks(model)
    return {
        f"{name}.{inner}.weight": module.weight  # type: ignore[misc]
        for inner, module in blocks.named_modules()
        if isinstance(module, (nn.Linear, Conv1D))
    }


def block_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    name, _ = find_blocks(model)
    return {
        inner: value
        for inner, value in model.named_parameters()
        if inner.startswith(f"{name}.")
    }


@torch.no_grad()
def halved(model: PreTrainedModel, two_of_four: bool = False) -> PreTrainedModel:
    """Half of the weights of every linear at zero, the smallest, of all or of every four."""
    for weight in linear_weights(model).values():
        groups = weight.view(-1, 4) if two_of_four else weight.view(1, -1)
        groups.scatter_(1, groups.abs().argsort(1)[:, : groups.shape[1] // 2], 0.0)
    return model


def dense_end(model: PreTrainedModel, ids: Tensor, batch_tokens: int) -> list[Tensor]:
    """The output of the last block, in the batches of the walk."""
    chain = open_chain(model, device=CPU)
    stream = Feed(chain, ids, batch_tokens).stream(pieces=streams.PIECE_TOKENS)
    for index in range(len(chain)):
        stream.advance(index)
    return list(stream.hidden)


def divergence(dense: PreTrainedModel, pruned: PreTrainedModel, ids: Tensor) -> Tensor:
    """A scalar, with gradients: mean over all tokens of ``Σ p (log p − log q)``."""
    with torch.no_grad():
        p = torch.log_softmax(dense(ids, use_cache=False).logits.float(), -1)
    return (
        (
            p.exp()
            * (p - torch.log_softmax(pruned(ids, use_cache=False).logits.float(), -1))
        )
        .sum(-1)
        .mean()
    )


def same_bits(one: dict[str, Any], other: dict[str, Any]) -> bool:
    return one.keys() == other.keys() and all(
        torch.equal(value, other[name]) for name, value in one.items()
    )


TOKENS = 96  # in a batch: four windows of 24
Swept = tuple[list[SweepPass], dict[str, Tensor]]


def swept(
    chain: Chain,
    dense: PreTrainedModel,
    ids: Tensor,
    passes: int,
    rate: float | None,
    scratch: Scratch | None = None,
    way: Residence | None = None,
    seed: int = 3,
) -> Swept:
    """The history, and every block as it is written."""
    written: dict[str, Tensor] = {}

    def write(index: int) -> None:
        for name, source in chain.block_tensors(index).items():
            written[name] = source.read().to(source.dtype, copy=True)

    feed = Feed(chain, ids, TOKENS, scratch or Scratch())
    task = SweepTask(
        feed,
        dense_end(dense, ids, TOKENS),
        passes,
        seed,
        write,
        learning_rate=rate,
        resident=way,
    )
    return sweep(task), written


def swept_by(
    way: Residence | None,
    model: PreTrainedModel | Path,
    dense: PreTrainedModel,
    passes: int = 2,
    rate: float = 0.002,
) -> Swept:
    """:func:`swept` over eight windows, in fp32."""
    return swept(
        open_chain(model, device=CPU, dtype=torch.float32),
        dense,
        ids_of(8),
        passes,
        rate,
        way=way,
    )
