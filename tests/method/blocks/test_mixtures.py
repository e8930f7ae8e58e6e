"""Experts are pruned from the tokens routed to them, weighted by the router, and where these are few, from all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers import core_model_loading as loading

import sparsellm
from sparsellm import Recipe, parallel
from sparsellm.errors import NumericalError
from sparsellm.method.blocks import routed
from sparsellm.model import Feed, open_chain
from sparsellm.model.experts import Part, separate_experts
from sparsellm.model.names import Conversion, _part_before
from sparsellm.tuning.full import ZeroKeeper
from tests.models.families import family, mixtral, sparse_attention

IDS = torch.randint(4, 300, (6, 24), generator=torch.Generator().manual_seed(3))
RECIPE = Recipe(method="wanda", samples=6, seq_len=24, sparsity=0.5)


@torch.no_grad()
def by_hand(model: PreTrainedModel, number: int) -> tuple[Tensor, Tensor, Tensor]:
    """The inputs of all tokens of the first mixture, which of them are routed to an expert, and with which weights."""
    seen: dict[str, Any] = {}
    mixture = model.model.layers[0].mlp
    handles = [
        mixture.register_forward_hook(
            lambda module, args, output: seen.update(inputs=args[0])
        ),
        mixture.gate.register_forward_hook(
            lambda module, args, output: seen.update(routes=output)
        ),
    ]
    model(IDS, use_cache=False)
    for handle in handles:
        handle.remove()
    _, weights, experts = seen["routes"]
    tokens, places = torch.where(experts == number)
    return seen["inputs"].reshape(-1, 32), tokens, weights[tokens, places]


def inner(model: PreTrainedModel, number: int, x: Tensor) -> Tensor:
    gate, up = nn.functional.linear(
        x, model.model.layers[0].mlp.experts.gate_up_proj[number]
    ).chunk(2, dim=-1)
    return nn.functional.silu(gate) * up


@pytest.mark.parametrize("weighted", [False, True])
def test_statistics_weight_routed_tokens_by_the_squared_route(weighted: bool) -> None:
    model = mixtral()
    chain = open_chain(model, device=torch.device("cpu"))
    stream = Feed(chain, IDS, 48).stream()
    device = torch.device("cpu")
    own_weights = (
        torch.rand(6, 24, generator=torch.Generator().manual_seed(0))
        if weighted
        else torch.ones(6, 24)
    )
    (mixture,) = chain.mixtures(0)
    with stream.store() as store:
        tokens = routed._record(
            stream, 0, mixture, store, list(own_weights.split(2)) if weighted else None
        )
        for number in range(4):
            x, chosen, weights = by_hand(model, number)
            factors = weights.square() * own_weights.flatten()[chosen]
            of_expert = routed.ExpertTokens(tokens, mixture.expert(number), number, [])
            assert tokens.count(number) == len(chosen) > 0
            moments = routed._moments(of_expert.routed(), 32, device)
            assert torch.allclose(
                moments.matrix,
                (x[chosen].T * factors) @ x[chosen] / factors.sum(),
                atol=1e-5,
            )
            moments = routed._moments(
                of_expert.routed(),
                80,
                device,
                of_expert.expert,
                of_expert.expert.frozen(),
            )
            h = inner(model, number, x[chosen])
            assert torch.allclose(
                moments.matrix, (h.T * factors) @ h / factors.sum(), atol=1e-6
            )
            targets = h @ model.model.layers[0].mlp.experts.down_proj[number].T
            assert moments.cross is not None
            assert torch.allclose(
                moments.cross, (targets.T * factors) @ h / factors.sum(), atol=1e-6
            )
        every = routed._moments(
            zip(tokens.store, tokens.weights, strict=True), 32, device
        )
        own_weights = own_weights.flatten()
        assert torch.allclose(
            every.matrix, (x.T * own_weights) @ x / own_weights.sum(), atol=1e-5
        )
        assert torch.allclose(
            torch.cat([rows for rows, _ in tokens.sample(20)]), x[::7], atol=1e-5
        )


@pytest.mark.parametrize("window", [256, 1000, 2048])
def test_samples_of_tokens_have_every_place_of_a_window_alike(window: int) -> None:
    times = torch.zeros(window)
    for places in parallel.spread([window] * 128, about=4 * window):
        times[places] += 1
    assert 3 <= times.min() <= times.max() <= 4
    assert [*parallel.spread([5, 3], about=100)] == [slice(0, None, 1)] * 2


@pytest.mark.parametrize("tokens", [0, 1, 40, 1_000_000])
def test_shrinkage_is_the_closed_form(tokens: int) -> None:
    generator = torch.Generator().manual_seed(1)
    expert, every = (torch.randn(8, 8, generator=generator) for _ in range(2))
    cross, other = (torch.randn(3, 8, generator=generator) for _ in range(2))
    shrunk = routed._Moments(expert, tokens, cross).shrunk_to(
        routed._Moments(every, 99, other)
    )
    share = routed.PRIOR * 8 / (routed.PRIOR * 8 + tokens)
    assert torch.allclose(
        shrunk.matrix, (1 - share) * expert + share * every, atol=1e-6
    )
    assert shrunk.cross is not None
    assert torch.allclose(shrunk.cross, (1 - share) * cross + share * other, atol=1e-6)
    assert tokens or torch.equal(shrunk.matrix, every)


def test_an_expert_without_tokens_is_pruned_by_all_tokens(tmp_path: Path) -> None:
    model = mixtral(num_local_experts=5, num_experts=5)
    with torch.no_grad():
        # five logits a, −a, b, −b and 0: the last is never among the largest two
        for layer in model.model.layers:
            gate = layer.mlp.gate.weight
            gate[1], gate[3], gate[4] = -gate[0], -gate[2], 0
    x, chosen, _ = by_hand(model, 4)
    assert not len(chosen)
    dense = model.model.layers[0].mlp.experts.gate_up_proj[4, :80].detach().clone()
    mean_square = x.square().mean(0)
    result = sparsellm.prune(model, RECIPE, calibration=IDS, out=tmp_path / "p")
    pruned = model.model.layers[0].mlp.experts.gate_up_proj[4, :80]
    # attention changes the inputs of a mixture only in later blocks
    scores = dense.abs() * mean_square.sqrt()
    kept = scores.argsort(dim=1, descending=True)[:, :16]
    assert torch.equal(
        pruned != 0, torch.zeros_like(dense, dtype=torch.bool).scatter_(1, kept, True)
    )
    of_expert = [linear for linear in result.linears if ".experts.4." in linear.name]
    assert [linear.tokens for linear in of_expert] == [0] * 6
    assert all(
        routed.NOT_ROUTED in linear.notes and linear.sparsity == 0.5
        for linear in of_expert
    )
    (told,) = [warning for warning in result.warnings if "routed" in warning]
    assert "2 of 10 experts" in told
    assert "model.layers.0.mlp.experts.4 (0)" in told
    assert not any(
        "no calibration token reached" in warning for warning in result.warnings
    )


def test_tokens_of_experts_are_counted_and_few_are_warned_of() -> None:
    result = sparsellm.prune(
        mixtral(), RECIPE.updated(min_tokens_per_expert=10_000), calibration=IDS
    )
    counts = {linear.name: linear.tokens for linear in result.linears}
    assert (
        sum(counts[f"model.layers.1.mlp.experts.{n}.up_proj"] or 0 for n in range(4))
        == 2 * IDS.numel()
    )
    assert counts["model.layers.1.self_attn.q_proj"] is None
    (told,) = [
        warning
        for warning in result.warnings
        if "were routed to 8 of 8 experts" in warning
    ]
    least = min((tokens, name) for name, tokens in counts.items() if tokens is not None)
    assert f"{least[1].rpartition('.')[0]} ({least[0]}), " in told
    assert not [
        w
        for w in sparsellm.prune(mixtral(), RECIPE, calibration=IDS).warnings
        if "routed" in w
    ]


def test_an_expert_whose_moments_overflow_is_named() -> None:
    model = family("Qwen3Moe")
    model.model.layers[0].mlp.experts.gate_up_proj.data[1] *= 1e10
    with pytest.raises(
        NumericalError, match=r"layers\.0\.mlp\.experts\.1\.down_proj: "
    ):
        sparsellm.prune(
            model, Recipe(method="sparsegpt", samples=6, seq_len=24), calibration=IDS
        )


def test_a_twin_shares_weights_and_leaves_the_model_alone() -> None:
    model = mixtral()
    before = {
        name: id(value) for name, value in model.state_dict(keep_vars=True).items()
    }
    twin, parts = separate_experts(model)
    assert twin is not model
    assert {
        name: id(value) for name, value in model.state_dict(keep_vars=True).items()
    } == before
    assert len(parts) == 2 * 4 * 3
    for name, part in parts.items():
        assert torch.equal(
            twin.get_parameter(name), part.of(model.get_parameter(part.source))
        )
    twin.get_parameter("model.layers.1.mlp.experts.2.up_proj.weight").data.fill_(7.0)
    assert (model.model.layers[1].mlp.experts.gate_up_proj[2, 80:] == 7).all()
    assert (model.model.layers[1].mlp.experts.gate_up_proj[2, :80] != 7).all()


def test_a_mixture_under_a_hook_of_accelerate_is_refused() -> None:
    model = mixtral()
    layer = model.model.layers[0].mlp
    layer.forward = layer.forward
    with pytest.raises(
        sparsellm.SparseLLMError, match="load the model without device_map"
    ):
        open_chain(model, device=torch.device("cpu"))


EXPERTS, INNER, WIDTH = 4, 3, 5
GATE, UP = Part("s", (1, slice(0, INNER))), Part("s", (1, slice(INNER, 2 * INNER)))
ACROSS = Part("s", (1, slice(None), slice(INNER, 2 * INNER)), True)
DOWN = Part("s", (2,))


@pytest.mark.parametrize(
    ("kinds", "shape", "steps", "parts"),
    [
        (2, (INNER, WIDTH), ["MergeModulelist(0)", "Concatenate(1)"], [GATE, UP]),
        (1, (WIDTH, INNER), ["MergeModulelist(0)"], [DOWN, Part("s", (2,), True)]),
        (2, (EXPERTS, INNER, WIDTH), ["Concatenate(1)"], [GATE, UP]),
        (1, (EXPERTS, 2 * INNER, WIDTH), ["Interleave(1)"], [GATE, UP]),
        (1, (EXPERTS, WIDTH, 2 * INNER), ["Transpose(1, 2)"], [GATE, UP]),
        (
            1,
            (EXPERTS, 2 * INNER, WIDTH),
            ["Transpose(1, 2)"],
            [ACROSS, Part("s", (3,), True)],
        ),
        (
            1,
            (EXPERTS, 2 * INNER, WIDTH),
            ["Transpose(1, 2, check_dims=True)"],
            [GATE, DOWN],
        ),
    ],
)
def test_a_part_is_found_before_the_conversion(
    kinds: int, shape: Any, steps: list[str], parts: list[Part]
) -> None:
    """Against transformers' own operations on tensors of random numbers."""
    operations = [eval(step, vars(loading)) for step in steps]
    sources = [
        [f"{kind}.{number}" for number in range(EXPERTS if len(shape) == 2 else 1)]
        for kind in range(kinds)
    ]
    tensors = {name: torch.randn(shape) for names in sources for name in names}
    values = {
        str(kind): [tensors[name] for name in names]
        for kind, names in enumerate(sources)
    }
    given: Any = {
        "source_patterns": list(values),
        "target_patterns": ["s"],
        "full_layer_name": "s",
        "config": None,
    }
    converted: Any = dict(values)

    class Model:
        def get_parameter(self, name: str) -> Tensor:
            return torch.empty(shape)

    for operation in operations:
        converted = operation.convert(converted, model=Model(), **given)
    (stack,) = converted.values()
    stack = stack[0] if isinstance(stack, list) else stack
    for part in parts:
        before = _part_before(
            part,
            Conversion(sources, operations),
            tuple(stack.shape),
            dict.fromkeys(tensors, shape),
        )
        assert before is not None
        assert torch.equal(before.of(tensors[before.source]), part.of(stack))


def test_tensors_that_are_missing_make_no_part() -> None:
    conversion = Conversion([["0", "1", "2"]], [loading.MergeModulelist(0)])
    assert _part_before(DOWN, conversion, (EXPERTS, WIDTH, INNER), {}) is None


def test_zeros_of_experts_stay_in_fine_tuning() -> None:
    model = mixtral()
    sparsellm.prune(model, RECIPE, calibration=IDS)
    stack = model.model.layers[0].mlp.experts.gate_up_proj
    zero = stack.detach() == 0
    optimiser = torch.optim.AdamW(model.parameters(), lr=0.01)
    with ZeroKeeper(model) as keeper:
        model(IDS, labels=IDS).loss.backward()
        optimiser.step()
        keeper.restore()
    assert int(zero.sum()) == zero.numel() // 2
    assert torch.equal(stack == 0, zero)


def test_an_indexer_that_chooses_tokens_stays_dense(tmp_path: Path) -> None:
    """Sparse attention of DeepSeek 3.2: what chooses is known by what it returns, whatever it is called."""
    result = sparsellm.prune(
        sparse_attention(), RECIPE, calibration=IDS, out=tmp_path / "p"
    )
    dense = {
        matrix.name: matrix.reason
        for matrix in result.dense
        if "indexer" in matrix.name
    }
    assert len(dense) == 6
    assert set(dense.values()) == {"gate"}
    assert not any("indexer" in linear.name for linear in result.linears)
    assert any("self_attn" in linear.name for linear in result.linears)


def test_a_swept_mixture_keeps_its_zeros_and_comes_nearer() -> None:
    model = mixtral()
    recipe = Recipe(samples=6, seq_len=24, sparsity=0.6, effort=1, sweep_rate=0.01)
    result = sparsellm.prune(model, recipe, calibration=IDS)
    assert result.sweeps[1].held_out < result.sweeps[0].held_out
    zeros = sum(
        int((p == 0).sum()) for name, p in model.named_parameters() if "experts" in name
    )
    assert (
        zeros
        == sum(linear.zeros for linear in result.linears if "experts" in linear.name)
        > 0
    )
