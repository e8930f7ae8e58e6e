"""Models with modules of kinds that nothing is known of, and a Gemma 3n."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.models import VOCABULARY, tiny_llama
from tests.models.families import LLAMA

GEMMA3N = {
    **LLAMA,
    "hidden_size_per_layer_input": 8,
    "vocab_size_per_layer_input": VOCABULARY,
    "laurel_rank": 4,
}
GEMMA3N |= {
    "altup_num_inputs": 2,
    "num_kv_shared_layers": 0,
    "layer_types": ["full_attention"] * 2,
}
GEMMA3N |= {"activation_sparsity_pattern": [0.0, 0.0]}


class Stacks(nn.Module):
    """A mixture of all experts with equal weights, stacked in a way that nothing is known of."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.up = nn.Parameter(0.1 * torch.randn(experts, 32, 80))
        self.down = nn.Parameter(0.1 * torch.randn(experts, 80, 32))

    def forward(self, hidden: Tensor) -> Tensor:
        return torch.einsum("bsh,ehi,eio->bso", hidden, self.up, self.down)


def with_mixture(kind: type[nn.Module], experts: int) -> PreTrainedModel:
    model = tiny_llama()
    torch.manual_seed(0)
    for layer in model.model.layers:
        layer.mlp = kind(experts)
    return model


def built(model_type: str, **settings: Any) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return AutoModelForCausalLM.from_config(
            AutoConfig.for_model(model_type, **settings)
        ).eval()
