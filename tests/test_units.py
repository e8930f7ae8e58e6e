"""Feed-forward units are found in models that were never named to the code."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from sparsellm.chain import open_chain
from sparsellm.chain.streams import Stream
from sparsellm.chain.units import FeedForwardUnit, find_feed_forward, find_value_output
from tests.models import VOCABULARY, tiny_gpt2, tiny_llama, tiny_opt


def units_of(model: PreTrainedModel) -> list[FeedForwardUnit]:
    ids = torch.randint(VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(1))
    chain = open_chain(model, device=torch.device("cpu"))
    stream = Stream(chain, ids, batch_tokens=20)
    return find_feed_forward(chain.linears(0), lambda: stream.run_batch(0, 0))


@pytest.mark.parametrize(
    ("family", "changes", "names", "activation"),
    [
        (tiny_llama, {}, ("up_proj", "gate_proj", "down_proj"), "silu"),
        (tiny_llama, {"hidden_act": "gelu_pytorch_tanh"}, ("up_proj", "gate_proj", "down_proj"), "gelu_tanh"),
        (tiny_opt, {}, ("fc1", None, "fc2"), "relu"),
        (tiny_gpt2, {}, ("c_fc", None, "c_proj"), "gelu_tanh"),
        (tiny_opt, {"activation_function": "gelu"}, ("fc1", None, "fc2"), "gelu"),
    ],
)
def test_the_unit_and_its_activation_are_found(family: Any, changes: Any, names: Any, activation: str) -> None:
    (unit,) = units_of(family(**changes))
    found = tuple(x.name.rpartition(".")[2] if x is not None else None for x in (unit.up, unit.gate, unit.down))
    assert found == names
    assert unit.activation.name == activation


@pytest.mark.parametrize(
    ("family", "writers"),
    [
        (tiny_llama, {"o_proj": "v_proj", "down_proj": None}),
        (tiny_opt, {"out_proj": "v_proj", "fc2": None}),
        (tiny_gpt2, {"attn.c_proj": None, "mlp.c_proj": None}),  # queries, keys and values are one linear there
    ],
    ids=["llama", "opt", "gpt2"],
)
def test_values_are_known_by_mixing_tokens_linearly(family: Any, writers: dict[str, str | None]) -> None:
    ids = torch.randint(VOCABULARY, (1, 20), generator=torch.Generator().manual_seed(1))
    chain = open_chain(family(), device=torch.device("cpu"))
    stream = Stream(chain, ids, batch_tokens=20)
    linears = chain.linears(0)
    for name, value in writers.items():
        output = next(linear for linear in linears if linear.name.endswith(name))
        pair = find_value_output([x for x in linears if x is not output], output, lambda: stream.run_batch(0, 0))
        assert (pair.value.name.rpartition(".")[2] if pair is not None else None) == value
