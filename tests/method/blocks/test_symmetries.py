"""Channels permuted or rotated: the model is the same, N:M loses less, and what cannot be proved is left alone."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import sparsellm
from sparsellm import Recipe
from sparsellm.method.blocks import BlockTask
from sparsellm.method.blocks.channels import Channels, find_channels
from sparsellm.method.blocks.permutation import permute_block, spread
from sparsellm.method.blocks.rotation import (
    DAMPING,
    best_rotation,
    cayley,
    rotate_channels,
)
from sparsellm.method.gram import Gram
from sparsellm.model import Feed, LinearView, open_chain
from sparsellm.patterns import NM, Pattern
from sparsellm.progress import PhaseClock
from tests.method.sweep.helpers import ids_of
from tests.models import tiny_gpt2, tiny_llama, tiny_opt
from tests.models.families import family, gemma4_text
from tests.shares import Share

TWO_OF_FOUR = NM(2, 4)
IDS = ids_of(6, 40, seed=3)


@contextmanager
def loaded(
    model: PreTrainedModel,
    pattern: Pattern = TWO_OF_FOUR,
    dense: tuple[str, ...] = (),
    index: int = 0,
) -> Iterator[BlockTask]:
    """Block ``index`` of a model, with a pattern for all linears but those whose names end with one of ``dense``."""
    chain = open_chain(model, device=torch.device("cpu"))
    stream = Feed(chain, IDS, 80).stream()
    for earlier in range(index):
        with chain.block(earlier):
            stream.advance(earlier)
    with chain.block(index):
        linears = [
            linear
            for linear in chain.linears(index)
            if not linear.name.endswith(dense or ("?",))
        ]
        patterns = dict.fromkeys([linear.name for linear in linears], pattern)
        yield BlockTask(
            index, linears, patterns, stream, lambda step: None, PhaseClock()
        )


def grams_of(task: BlockTask, linears: list[LinearView]) -> dict[str, Gram]:
    """The Gram matrices of the inputs of linears, by name."""
    return {
        linear.name: gram
        for group, gram in task.statistics(linears)
        for linear in group
    }


def rotate(task: BlockTask, channels: list[Channels]) -> None:
    linears = [linear for group in channels for linear in group.linears]
    rotate_channels(channels, grams_of(task, linears), task.patterns)


def permuted(
    model: PreTrainedModel, **how: Any
) -> tuple[BlockTask, list[Channels], set[str]]:
    """Rotates and permutes the block that is :func:`loaded`; the model must compute the same. Last: what changed."""
    before, logits = copy.deepcopy(model.state_dict()), model(IDS).logits
    with loaded(model, **how) as task:
        channels = find_channels(task)
        rotate(task, [group for group in channels if group.rotates])
        permute_block(task, channels, None)
    torch.testing.assert_close(model(IDS).logits, logits, rtol=1e-4, atol=1e-4)
    return (
        task,
        channels,
        {
            name
            for name, value in model.state_dict().items()
            if not torch.equal(value, before[name])
        },
    )


def roles(channels: list[Channels]) -> dict[str, list[str]]:
    """The last name of each reader, with those of its sources."""
    return {
        group.reader.name.rpartition(".")[2]: [
            linear.name.rpartition(".")[2] for linear, _ in group.sources
        ]
        for group in channels
    }


EXPECTED = {
    **{
        name: {"o_proj": ["v_proj"], "down_proj": ["gate_proj", "up_proj"]}
        for name in ("Llama", "Gemma", "Qwen3")
    },
    "OPT": {"out_proj": ["v_proj"], "fc2": ["fc1"]},
    "Phi": {
        "dense": ["v_proj"],
        "fc2": ["fc1"],
    },  # attention and feed-forward unit side by side
    "Phi3": {
        "o_proj": ["qkv_proj"],
        "down_proj": ["gate_up_proj"],
    },  # q, k, v in one linear; gate and up in one
    "GPTNeoX": {
        "dense": ["query_key_value"],
        "dense_4h_to_h": ["dense_h_to_4h"],
    },  # q, k, v of each head in turn
    "Falcon": {
        "dense": ["query_key_value"],
        "dense_4h_to_h": ["dense_h_to_4h"],
    },  # one key and value for all heads
}


@pytest.mark.parametrize("name", EXPECTED)
def test_the_model_is_the_same_and_its_channels_are_known(name: str) -> None:
    task, channels, changed = permuted(family(name))
    assert roles(channels) == EXPECTED[name]
    # values; a feed-forward unit is not linear
    assert [entry.rotates for entry in channels] == [
        True,
        False,
    ]
    assert not task.notes
    for group in channels:
        assert {
            linear.weight_name
            for linear in (group.reader, *(source for source, _ in group.sources))
        } <= changed


def test_weights_stored_transposed() -> None:
    _, channels, _ = permuted(tiny_gpt2(), index=1)
    assert [tuple(group.inputs.shape) for group in channels] == [
        (1, 4, 12),
        (1, 1, 112),
    ]


def test_heads_that_share_their_values_are_permuted_alike() -> None:
    _, channels, _ = permuted(tiny_llama())
    # two queries for each of two heads of 8
    assert tuple(channels[0].inputs.shape) == (
        2,
        2,
        8,
    )
    assert channels[0].inputs[:, 0].tolist() == [[*range(8)], [*range(8, 16)]]


def test_values_that_are_gated_are_left_alone() -> None:
    task, channels, changed = permuted(family("Qwen3_5"))
    assert roles(channels) == {"down_proj": ["gate_proj", "up_proj"]}
    [(name, notes)] = task.notes.items()
    assert name.endswith("o_proj")
    assert notes == (
        "its inputs were not permuted for 2:4: no order of channels that was tried leaves the output of the block as "
        "it is",
    )
    assert not any(".self_attn." in name for name in changed)


def test_values_that_later_blocks_read_are_left_alone() -> None:
    """Blocks 2 and 3 have no keys and values of their own: they take those of blocks 0 and 1."""
    types = ["sliding_attention", "full_attention"] * 2
    task, channels, _ = permuted(
        gemma4_text(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=types)
    )
    assert roles(channels) == {"down_proj": ["gate_proj", "up_proj"]}
    assert any(name.endswith("o_proj") for name in task.notes)


class Between(nn.Module):
    """Scales each channel between up and down: their order then matters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(1 + torch.arange(width) / width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x) * self.scale


def test_channels_with_weights_of_their_own_are_left_alone() -> None:
    model = tiny_opt()
    model.model.decoder.layers[0].activation_fn = Between(112)
    task, channels, changed = permuted(model)
    assert roles(channels) == {"out_proj": ["v_proj"]}
    assert [name.rpartition(".")[2] for name in task.notes] == ["fc2"]
    assert not any(".fc" in name for name in changed)


def test_what_stays_dense_keeps_every_bit() -> None:
    task, channels, changed = permuted(tiny_llama(), dense=("up_proj",))
    assert roles(channels) == {"o_proj": ["v_proj"]}
    why = "its inputs were not permuted for 2:4: the linears before it stay dense"
    assert task.notes["model.layers.0.mlp.down_proj"] == (why,)
    assert not any(".mlp." in name for name in changed)


def test_a_head_that_m_does_not_divide_is_left_alone() -> None:
    # heads of 12, a unit of 112
    task, channels, _ = permuted(tiny_gpt2(), pattern=NM(8, 16))
    assert roles(channels) == {"c_proj": ["c_fc"]}
    assert (
        "8:16: M divides no group of channels"
        in task.notes["transformer.h.0.attn.c_proj"][0]
    )


def test_only_n_of_m_is_permuted() -> None:
    _, channels, changed = permuted(tiny_llama(), pattern=Share(0.5))
    assert not channels
    assert not changed


def test_a_rotation_lowers_what_pruning_costs() -> None:
    """The cost is summed weight by weight: in each group of four, the two least ``w² / [(G + λI)⁻¹]_jj``."""

    def cost(linear: LinearView, gram: Gram) -> float:
        matrix = gram.matrix.double()
        damped = matrix + DAMPING * matrix.diagonal().mean() * torch.eye(len(matrix))
        weight = linear.weight().double()
        errors = weight.square() / damped.inverse().diagonal()
        return float(
            errors.reshape(-1, 4).sort(dim=1).values[:, :2].sum()
            / ((weight @ matrix) * weight).sum()
        )

    with loaded(tiny_opt()) as task:
        values = next(group for group in find_channels(task) if group.rotates)

        def total() -> float:
            grams = grams_of(task, values.linears)
            return sum(cost(linear, grams[linear.name]) for linear in values.linears)

        before = total()
        rotate(task, [values])
        assert total() < 0.8 * before


def test_cayleys_map_is_orthogonal() -> None:
    matrices = cayley(
        torch.randn(3, 16, 16, generator=torch.Generator().manual_seed(0))
    )
    torch.testing.assert_close(
        matrices @ matrices.mT, torch.eye(16).expand(3, 16, 16), atol=1e-5, rtol=0
    )
    torch.testing.assert_close(torch.linalg.det(matrices), torch.ones(3))


def test_values_fused_with_queries_and_keys_are_rotated_alike() -> None:
    with loaded(tiny_gpt2()) as task:
        values = next(group for group in find_channels(task) if group.rotates)
        ((fused, rows),) = values.sources
        alone = nn.Linear(fused.in_features, rows.numel(), bias=False)
        alone.weight.data = fused.weight()[rows.flatten()]
        view = LinearView("v", alone, torch.float32)
        grams = grams_of(task, [values.reader, fused])
        separate = replace(
            values, sources=((view, torch.arange(rows.numel()).view(rows.shape)),)
        )
        patterns = dict.fromkeys((*grams, "v"), TWO_OF_FOUR)
        grams["v"] = grams[fused.name]
        torch.testing.assert_close(
            *(best_rotation(group, grams, patterns) for group in (values, separate))
        )


@pytest.mark.parametrize("pattern", [NM(1, 4), NM(2, 4), NM(4, 8), NM(3, 4)], ids=str)
def test_large_weights_do_not_share_a_group(pattern: NM) -> None:
    """Every input is large or small in all rows, the large ones side by side: an order keeps all of them."""
    inputs = 12 * pattern.m
    scores = torch.full((5, inputs), 0.01)
    scores[:, : 12 * pattern.n] = 1.0
    order = spread(scores, pattern)
    assert sorted(order.tolist()) == list(range(inputs))
    assert (
        float((scores[:, order] * pattern.mask(scores[:, order])).sum())
        == 5 * 12 * pattern.n
    )


def test_exchanges_see_rows_and_never_keep_less(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Where all inputs weigh alike over all rows, only the rows tell which of them disturb each other."""
    scores = torch.rand(40, 64, generator=torch.Generator().manual_seed(0)).pow(4)
    scores = torch.cat([scores, scores.flip(0)])  # pairs of rows
    pattern = NM(2, 4)

    def kept(order: Tensor) -> float:
        return float((scores[:, order] * pattern.mask(scores[:, order])).sum())

    natural = kept(torch.arange(64))
    assert kept(spread(scores, pattern)) > 1.02 * natural
    # parts of unequal size
    monkeypatch.setattr("sparsellm.method.blocks.permutation.GROUPS", 5)
    parts = spread(scores, pattern)
    assert sorted(parts.tolist()) == list(range(64))
    assert kept(parts) > natural
    best = spread(scores, pattern)
    assert kept(best[spread(scores[:, best], pattern)]) >= kept(best)


def test_the_order_lowers_the_error(family: Callable[..., PreTrainedModel]) -> None:
    def error(symmetries: str) -> float:
        recipe = Recipe(
            pattern="2:4", effort=0, options={"refit": False, "symmetries": symmetries}
        )
        result = sparsellm.prune(family(), recipe, calibration=ids_of(24, 48, seed=3))
        names = ("o_proj", "out_proj", "c_proj", "fc2", "down_proj")
        return sum(
            linear.error for linear in result.linears if linear.name.endswith(names)
        )

    assert error("permute") < 0.97 * error("none")
