"""The chain against the model's own forward: capture equals hooks, running block by block equals running whole."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from operator import attrgetter
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import ModelError, StorageError
from sparsellm.model import Chain, Feed, open_chain
from sparsellm.model.capture import InputGroups, watch
from tests.model.outputs import hooked
from tests.models import families, save_tiny, tiny_gpt2, tiny_llama, tiny_opt, windows

CPU = torch.device("cpu")
IDS = windows(3, 20, seed=7)
FAMILIES = {
    "llama": tiny_llama,
    "opt": tiny_opt,
    "gpt2": tiny_gpt2,
    "gemma2": partial(families.family, "Gemma2"),
}


def run_by_blocks(chain: Chain) -> tuple[list[torch.Tensor], torch.Tensor]:
    """The hidden states after each block, and the logits."""
    stream, hidden = Feed(chain, IDS, 60).stream(), []
    for index in range(len(chain)):
        with chain.block(index):
            stream.advance(index)
        hidden.append(torch.cat(list(stream.hidden)))
    with chain.outer():
        return hidden, chain.finish(hidden[-1], IDS)


@pytest.mark.parametrize("lazily", [False, True])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_chain_run_block_by_block_equals_the_whole_model(
    name: str, lazily: bool, tmp_path: Path
) -> None:
    model = FAMILIES[name]()
    chain = open_chain(
        save_tiny(model, None, tmp_path) if lazily else model, device=CPU
    )
    expected = hooked(
        model, list(Chain(model, None, device=CPU, dtype=None).blocks), IDS
    )
    with torch.no_grad():
        logits = model(IDS, use_cache=False).logits
    hidden, by_blocks = run_by_blocks(chain)
    assert all(map(torch.equal, hidden, expected))
    assert torch.equal(by_blocks, logits)


def test_linears_are_grouped_by_input_in_the_order_they_run() -> None:
    expected = {
        tiny_llama: [
            ["q_proj", "k_proj", "v_proj"],
            ["o_proj"],
            ["gate_proj", "up_proj"],
            ["down_proj"],
        ],
        tiny_opt: [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
        tiny_gpt2: [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
    }
    for family, kinds in expected.items():
        chain = open_chain(family(), device=CPU)
        stream, groups = Feed(chain, IDS, 60).stream(), InputGroups()
        with watch(chain.linears(0), lambda linear, x, y, g=groups: g.add(linear, x)):
            list(stream.run(0))
        names = [
            sorted(linear.name.rpartition(".")[2] for linear in group)
            for group in groups.groups
        ]
        assert names == [sorted(group) for group in kinds]


def test_only_one_block_is_in_memory(tmp_path: Path) -> None:
    chain = open_chain(save_tiny(tiny_llama(), None, tmp_path), device=CPU)
    assert all(parameter.is_meta for parameter in chain.model.parameters())
    with chain.block(1):
        loaded = {
            name
            for name, parameter in chain.model.named_parameters()
            if not parameter.is_meta
        }
    assert loaded
    assert all(name.startswith("model.layers.1.") for name in loaded)
    assert all(parameter.is_meta for parameter in chain.model.parameters())


def test_a_checkpoint_of_the_bare_base_model_is_read(tmp_path: Path) -> None:
    model = tiny_gpt2()
    # the hub's gpt2 looks like this: no 'transformer.' in the names
    model.transformer.save_pretrained(tmp_path)
    model.config.save_pretrained(tmp_path)
    assert torch.equal(
        run_by_blocks(open_chain(tmp_path, device=CPU))[1],
        model(IDS, use_cache=False).logits,
    )


def test_half_precision_is_computed_in_the_asked_dtype(tmp_path: Path) -> None:
    chain = open_chain(
        save_tiny(tiny_llama().to(torch.bfloat16), None, tmp_path),
        device=CPU,
        dtype=torch.float32,
    )
    with chain.block(0) as block:
        assert block.self_attn.q_proj.weight.dtype is torch.float32
        assert next(iter(chain.block_tensors(0).values())).dtype is torch.bfloat16


def test_blocks_compute_in_a_dtype_that_holds_every_linear(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All but the gates, which are not pruned and are written as they were."""
    monkeypatch.setattr("sparsellm.model.weights.bf16_is_native", lambda device: True)
    model = families.family("Qwen2Moe").to(torch.bfloat16)
    for wide, dtype in {
        "mlp.shared_expert_gate": torch.bfloat16,
        "self_attn.o_proj": torch.float32,
    }.items():
        model.model.layers[1].get_submodule(wide).float()
        assert (
            open_chain(save_tiny(model, None, tmp_path / wide), device=CPU).dtype
            is dtype
        )


@pytest.mark.parametrize(
    ("name", "wide"),
    [("DeepseekV3", "gate.e_score_correction_bias"), ("Glm4Moe", "gate.weight")],
)
def test_what_is_only_rounded_to_compute_is_written_as_it_was(
    tmp_path: Path, name: str, wide: str
) -> None:
    dense = save_tiny(families.family(name), None, tmp_path)
    chain, values = (
        open_chain(dense, device=CPU, dtype=torch.bfloat16),
        load_file(dense / "model.safetensors"),
    )
    with chain.block(1) as block, torch.no_grad():
        # as transformers keeps it
        assert attrgetter(wide)(block.mlp).dtype is torch.float32
        block.self_attn.o_proj.weight.zero_()
        written = {
            name: source.read() for name, source in chain.block_tensors(1).items()
        }
    assert not written.pop("model.layers.1.self_attn.o_proj.weight").any()
    assert all(
        torch.equal(value, values[name])
        for name, value in written.items()
        if ".experts." not in name
    )


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    save_tiny(tiny_llama(), None, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    with pytest.raises(StorageError, match="pickled"):
        open_chain(tmp_path, device=CPU)


def test_a_weight_shared_by_blocks_is_pruned_once() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    chain = open_chain(model, device=CPU)
    assert any(linear.name.endswith("0.mlp.up_proj") for linear in chain.linears(0))
    assert not any(linear.name.endswith("mlp.up_proj") for linear in chain.linears(1))


def rearranged(arrange: Callable[[nn.ModuleList], list[Any]]) -> PreTrainedModel:
    """A Llama whose forward goes through what ``arrange`` makes of its blocks."""

    class Layers(nn.ModuleList):
        def __getitem__(self, index: Any) -> Any:
            return (
                arrange(self)
                if isinstance(index, slice)
                else super().__getitem__(index)
            )

    model = tiny_llama()
    model.model.layers = Layers(model.model.layers)
    return model


@pytest.mark.parametrize(
    ("arrange", "told"),
    [
        (lambda layers: [*layers, *layers], r"calls model\.layers\.0 more than once"),
        (
            lambda layers: [layers[1], layers[0], layers[2]],
            r"calls model\.layers\.1 before model\.layers\.0",
        ),
        (lambda layers: [layers[0], layers[1]], r"does not call model\.layers\.2"),
        (
            lambda layers: [
                layers[0],
                lambda hidden, **_: hidden * 2,
                layers[1],
                layers[2],
            ],
            r"changes the hidden states between model\.layers\.0 and model\.layers\.1",
        ),
    ],
)
def test_what_is_no_plain_chain_is_refused_before_the_work(
    arrange: Any, told: str, tmp_path: Path
) -> None:
    """Statistics of its blocks would be those of other hidden states than the model computes."""
    with pytest.raises(ModelError, match=told):
        sparsellm.prune(
            rearranged(arrange),
            Recipe(method="wanda"),
            calibration=IDS,
            out=tmp_path / "out",
        )
    assert not any(tmp_path.iterdir())


def test_choices_that_another_block_hands_on_are_refused() -> None:
    """While arguments are captured, all blocks get what block 0 returns besides hidden states."""
    model = families.sparse_attention(
        "GlmMoeDsa", num_hidden_layers=3, indexer_types=["full", "full", "shared"]
    )
    with pytest.raises(
        ModelError, match=r"layers\.2 reads what the block before it returns"
    ):
        sparsellm.prune(model, Recipe(method="wanda"), calibration=IDS)
    with pytest.raises(
        ModelError, match=r"layers\.2 reads what the block before it returns"
    ):
        sparsellm.evaluate(model, IDS)


class Returned(NamedTuple):
    hidden: torch.Tensor
    extra: None


class Named(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any) -> Returned:
        return Returned(self.block(*args, **kwargs), None)


def test_a_block_that_returns_a_named_tuple_is_replaced_by_one() -> None:
    """The model reads it by name, as Reformer's does."""
    model = rearranged(
        lambda layers: [
            lambda *args, b=block, **kwargs: b(*args, **kwargs).hidden
            for block in layers
        ]
    )
    model.model.layers = type(model.model.layers)(
        Named(block) for block in model.model.layers
    )
    assert Feed(open_chain(model, device=CPU), IDS, 60).stream().hidden[0].shape == (
        3,
        20,
        32,
    )
