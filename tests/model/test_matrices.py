"""Every matrix of the blocks is counted; what would stay dense without the user's word is refused before the work."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import ModelError
from sparsellm.model import open_chain
from sparsellm.model.matrices import all_matrices, is_excluded, refuse_silent_dense
from sparsellm.model.structure import find_blocks
from sparsellm.run.counts import shortfall
from tests.method.sweep.helpers import CPU, ids_of, same_bits
from tests.models import VOCABULARY, save_tiny, tiny_llama, tiny_opt
from tests.models.families import family, gemma4_text
from tests.models.unusual import GEMMA3N, Stacks, built, with_mixture

IDS = ids_of(4, 16, seed=5)
MAGNITUDE = Recipe(method="magnitude", sparsity=0.5)


def by_hand(model: PreTrainedModel, blocks: list[nn.Module]) -> tuple[int, int]:
    """Zeros and weights over all parameters of the blocks with two or more dimensions, stacks of biases left out."""
    params = [
        p
        for block in blocks
        for key, p in block.named_parameters()
        if p.dim() > 1 and not key.endswith("bias")
    ]
    return sum(int((p == 0).sum()) for p in params), sum(p.numel() for p in params)


def test_stacks_of_an_unknown_kind_are_refused_before_the_work(tmp_path: Path) -> None:
    model = with_mixture(Stacks, 4)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ModelError) as caught:
        sparsellm.prune(model, MAGNITUDE, calibration=IDS, out=tmp_path / "out")
    line = str(caught.value)
    assert "model.layers.0.mlp.up (" in line
    assert "with 43.5%" in line  # as a share of its block
    assert "allow_dense=[" in line
    assert "\n" not in line
    assert same_bits(model.state_dict(), before)
    assert not any(tmp_path.iterdir())


def test_the_way_out_that_the_refusal_names_is_one() -> None:
    chain = open_chain(with_mixture(Stacks, 4), device=CPU)
    with pytest.raises(ModelError) as caught:
        refuse_silent_dense(chain, [])
    allowed = json.loads(
        str(caught.value)
        .partition("allow_dense=")[2]
        .partition(" (")[0]
        .replace("'", '"')
    )
    refuse_silent_dense(chain, allowed)
    with pytest.raises(ModelError):
        refuse_silent_dense(chain, allowed[1:])


def test_with_exclude_every_matrix_is_still_counted() -> None:
    mixture = gemma4_text(
        num_experts=4, top_k_experts=2, moe_intermediate_size=40, enable_moe_block=True
    )
    result = sparsellm.prune(
        mixture, MAGNITUDE.updated(exclude=["*.experts.*"]), calibration=IDS
    )
    zeros, weights = by_hand(mixture, find_blocks(mixture)[1])
    assert (result.matrices.zeros, result.matrices.weights) == (zeros, weights)
    report = result.to_dict()
    assert report["sparsity_reached"] == result.sparsity == zeros / weights < 0.49
    assert (
        report["sparsity_pruned"]
        == result.sparsity_pruned
        == result.zeros / result.weights
        == 0.5
    )
    assert report["matrices"] == {"zeros": zeros, "weights": weights}
    named = [
        matrix for matrix in report["dense"] if "experts.3.down_proj" in matrix["name"]
    ]
    assert [matrix["reason"] for matrix in named] == ["excluded"] * 2
    assert named[0]["shape"][0] == 32
    assert {matrix["reason"] for matrix in report["dense"]} <= {
        "excluded",
        "gate",
        "small",
    }
    (warning,) = result.warnings
    assert f"sparsity {zeros / weights:.2%} was reached" in warning
    assert "50.00% was requested" in warning
    assert "experts.*.down_proj (" in warning


def test_zeros_of_dense_matrices_are_counted_after_a_sweep(tmp_path: Path) -> None:
    """The sweep writes its blocks to another place than the walk: the last ones written count."""
    model = tiny_llama()
    model.model.layers[1].mlp.down_proj.weight.data[:, :8] = 0
    source = save_tiny(model, None, tmp_path / "model")
    recipe = Recipe(sparsity=0.6, exclude=["*.down_proj"], effort=1)
    result = sparsellm.prune(source, recipe, calibration=IDS, out=tmp_path / "out")
    assert [matrix.zeros for matrix in result.dense] == [0, 32 * 8, 0]
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert (result.matrices.zeros, result.matrices.weights) == by_hand(
        written, list(written.model.layers)
    )


@pytest.mark.parametrize(("name", "sparsity"), [("Llama", 0.333), ("Mixtral", 0.0)])
def test_rounding_is_no_shortfall(name: str, sparsity: float) -> None:
    """0.333 of no matrix is a whole number of zeros; where nothing is to be pruned, nothing is missing."""
    result = sparsellm.prune(
        family(name), Recipe(method="magnitude", sparsity=sparsity), calibration=IDS
    )
    assert result.sparsity == pytest.approx(sparsity, abs=1e-3)
    assert result.warnings == []
    exact = [
        linear.model_copy(update={"asked": linear.sparsity})
        for linear in result.linears
    ]
    assert shortfall(exact, [], sparsity + 0.1)[0].endswith(
        "requested; the steps of the pattern are that coarse"
    )


class Router(nn.Module):
    """A gate and linears: one matrix that no linear owns, biases, and a vector with dimensions of length one."""

    def __init__(self, experts: int) -> None:
        super().__init__()
        self.gate = nn.Parameter(torch.randn(experts, 32))
        self.stack_bias = nn.Parameter(torch.randn(4, 32))
        self.mix = nn.Parameter(torch.randn(1, 1, 32))
        self.norm = nn.Parameter(torch.randn(32))
        self.map = nn.Linear(32, 32)
        self.single = nn.Linear(32, 1)

    def forward(self, hidden: Tensor) -> Tensor:
        scale = self.single(hidden) + (hidden @ self.gate.T).mean(-1, keepdim=True)
        return self.map(hidden * self.mix + self.stack_bias.sum(0) * self.norm) * scale


def test_biases_do_not_count_and_small_matrices_are_named() -> None:
    result = sparsellm.prune(with_mixture(Router, 2), MAGNITUDE, calibration=IDS)
    # q, o, map; k, v; single; gate
    assert result.matrices.weights == 3 * (3 * 32 * 32 + 2 * 16 * 32 + 32 + 2 * 32)
    assert [(matrix.name, matrix.reason) for matrix in result.dense] == [
        (f"model.layers.{index}.mlp.{name}", reason)
        for index in range(3)
        for name, reason in (("gate", "small"), ("single.weight", "gate"))
    ]
    assert "3 of mlp.gate (1.53% of the weights, small)" in result.warnings[0]


def test_the_limit_is_two_percent_of_a_block() -> None:
    refuse_silent_dense(open_chain(with_mixture(Router, 2), device=CPU), [])
    with pytest.raises(ModelError, match=r"mlp\.gate \(3×32\) with 2\.3%"):
        refuse_silent_dense(open_chain(with_mixture(Router, 3), device=CPU), [])


def test_a_parameter_in_two_blocks_counts_once() -> None:
    model, shared = tiny_llama(), nn.Parameter(torch.randn(2, 32))
    for layer in model.model.layers[:2]:
        layer.table = shared
    for layer in model.model.layers[1:]:
        layer.words = model.model.embed_tokens.weight
    chain = open_chain(model, device=CPU)
    dense = [matrix for matrix in all_matrices(chain) if matrix.linear is None]
    assert [(m.name, m.shared) for m in dense] == [
        ("model.layers.0.table", False),
        ("model.layers.1.words", True),
    ]
    with pytest.raises(ModelError, match=r"layers\.1\.words \(300×32\)"):
        refuse_silent_dense(chain, [])


@pytest.mark.parametrize("pattern", ["*.gtae", "*.down_proj"])
def test_an_allow_dense_that_matches_nothing_is_reported(pattern: str) -> None:
    result = sparsellm.prune(
        with_mixture(Router, 2),
        MAGNITUDE.updated(allow_dense=[pattern]),
        calibration=IDS,
    )
    assert [
        w
        for w in result.warnings
        if repr(pattern) in w and "names are like 'model.layers.0.mlp.gate'" in w
    ]


NAMING = (
    "*.down_proj",
    "*.down_proj.weight",
    "*.mlp",
    "model.layers.3",
    "model.layers.?.mlp.*",
)
OTHER = ("*.up_proj", "down_proj", "layers.3", "*.DOWN_proj")


@pytest.mark.parametrize(
    ("pattern", "excluded"),
    [*((p, True) for p in NAMING), *((p, False) for p in OTHER)],
)
def test_exclude_names_parameters_and_the_modules_that_hold_them(
    pattern: str, excluded: bool
) -> None:
    assert is_excluded("model.layers.3.mlp.down_proj.weight", [pattern]) == excluded


def test_a_linear_never_called_is_pruned_by_magnitude_and_named() -> None:
    """Mamba reads the weight of ``dt_proj`` and does not call it."""
    model = built(
        "mamba",
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_hidden_layers=2,
        state_size=8,
    )
    result = sparsellm.prune(
        model,
        Recipe(method="sparsegpt", exclude=["*.A_log", "*.conv1d"]),
        calibration=IDS,
    )
    assert result.sparsity_pruned == 0.5
    assert (
        int((model.backbone.layers[1].mixer.dt_proj.weight == 0).sum()) == 64 * 2 // 2
    )
    (told,) = [
        warning
        for warning in result.warnings
        if "no calibration token reached" in warning
    ]
    assert "2 of 8 linears" in told
    assert "backbone.layers.1.mixer.dt_proj" in told


def test_many_linears_outside_the_blocks_are_named() -> None:
    (warning,) = sparsellm.prune(
        tiny_opt(word_embed_proj_dim=24), MAGNITUDE, calibration=IDS
    ).warnings
    assert (
        "model.decoder.project_out, model.decoder.project_in, as many weights as 5.8% of the blocks"
        in warning
    )
    assert (
        sparsellm.prune(
            tiny_opt(word_embed_proj_dim=8), MAGNITUDE, calibration=IDS
        ).warnings
        == []
    )


@pytest.mark.parametrize(
    "settings",
    [
        {"allocation": "uniform", "effort": 0, "options": {"output_metric": 0.0}},
        {"method": "sparsellm-paper"},
        {"method": "sparsegpt", "allocation": "threshold"},
    ],
)
def test_other_hidden_states_are_refused_before_the_work(
    settings: dict[str, Any], tmp_path: Path
) -> None:
    """Gemma 3n carries several states for each token."""
    model, recipe = built("gemma3n_text", **GEMMA3N), Recipe(sparsity=0.5, **settings)
    with pytest.raises(
        ModelError, match=r"take hidden states of shape \(.*method sparsegpt"
    ):
        sparsellm.prune(model, recipe, calibration=IDS, out=tmp_path / "out")
    assert not any(tmp_path.iterdir())


def test_methods_that_look_at_linears_alone_prune_such_models() -> None:
    model = built("gemma3n_text", **GEMMA3N)
    assert (
        sparsellm.prune(
            model, Recipe(method="sparsegpt", sparsity=0.5), calibration=IDS
        ).sparsity_pruned
        >= 0.5
    )


def test_keys_that_later_blocks_read_go_with_local_methods_alone() -> None:
    """Gemma 4 gives all its blocks one mapping of keys and values."""
    types = ["sliding_attention", "full_attention"] * 2
    model = gemma4_text(num_hidden_layers=4, num_kv_shared_layers=2, layer_types=types)
    with pytest.raises(ModelError, match="read keys and values of earlier ones"):
        sparsellm.prune(model, Recipe(sparsity=0.5), calibration=IDS)
    assert sparsellm.prune(
        model, Recipe(method="wanda", sparsity=0.5, only=["*.3.*"]), calibration=IDS
    ).linears


@pytest.mark.parametrize("method", ["magnitude", "sparsellm"])
def test_a_forward_that_fails_is_one_line_before_the_work(
    method: str, tmp_path: Path
) -> None:
    """Rotary angles of another width than the heads: transformers builds such a model, and cannot run it."""
    model = built(
        "codegen",
        vocab_size=VOCABULARY,
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        rotary_dim=64,
    )
    with pytest.raises(
        ModelError,
        match=r"forward of CodeGenForCausalLM fails .*RuntimeError.*config\.json",
    ):
        sparsellm.prune(
            model,
            Recipe(method=method, sparsity=0.5),
            calibration=IDS,
            out=tmp_path / "out",
        )
    assert not any(tmp_path.iterdir())


def test_allow_dense_accepts_what_no_linear_owns() -> None:
    result = sparsellm.prune(
        with_mixture(Router, 8),
        MAGNITUDE.updated(allow_dense=["*.mlp"]),
        calibration=IDS,
    )
    assert result.sparsity_pruned == 0.5
    # q, k, v, o, and one of the mixture's three; the others are gates
    assert len(result.linears) == 3 * 5
    assert {matrix.reason for matrix in result.dense} == {"allowed dense"}
    (warning,) = result.warnings
    assert "allowed dense" in warning
    assert "50.00% was requested" in warning


def test_a_shared_expert_as_wide_as_experts_are_many_is_no_router() -> None:
    chain = open_chain(
        family("Qwen2Moe", shared_expert_intermediate_size=4), device=CPU
    )
    assert {name.partition(".mlp.")[2] for name in chain.gates} == {
        "gate.weight",
        "shared_expert_gate.weight",
    }
