"""The smallest size with a divergence: the search, llama.cpp's mixture, and a run that is told ``auto``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pytest

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import RecipeError
from sparsellm.method.allocation import LinearSize
from sparsellm.run import smallest_size
from tests.models import tiny_llama, windows


@pytest.mark.parametrize("goal", [0.9, 0.2, 0.03, 0.006])
def test_the_fewest_bits_that_reach_a_goal_are_found(goal: float) -> None:
    """Divergence falls by a factor of four a bit, so the answer is a logarithm."""
    asked: list[Sequence[float]] = []

    def divergences_at(tried: Sequence[float]) -> list[float]:
        asked.append(tried)
        return [4 ** (2.5 - bits) for bits in tried]

    bits = smallest_size.smallest(2.5, 8.5, goal, divergences_at)
    exact = 2.5 - math.log(goal, 4)
    assert exact <= bits <= exact + 6 / 125 + 1e-9
    assert len(asked) == smallest_size.ROUNDS
    assert all([*tried] == sorted(tried) for tried in asked)


def test_the_largest_size_stays_if_no_smaller_one_reaches_the_goal() -> None:
    bits = smallest_size.smallest(2.0, 8.0, 0.1, lambda tried: [1.0] * len(tried))
    assert bits == 8.0


def test_a_bit_of_noise_cannot_lead_below_a_size_that_is_too_small() -> None:
    """The least of the sizes that reach the goal counts, whatever larger ones have."""
    bits = smallest_size.smallest(
        0.0, 5.0, 0.5, lambda tried: [0.4 if 2 <= x < 3 else 0.9 for x in tried]
    )
    assert 2.0 <= bits < 2.1


def test_llama_cpp_gives_six_bits_to_values_and_down_projections() -> None:
    """The blocks of 24 that ``use_more_bits`` names, counted by hand."""
    kinds = ("self_attn.q_proj", "self_attn.v_proj", "mlp.up_proj", "mlp.down_proj")
    sizes = [
        LinearSize(f"model.layers.{block}.{kind}", block, (256, 256))
        for block in range(24)
        for kind in kinds
    ]
    forms = smallest_size.q4_k_m(sizes)
    more = {0, 1, 2, 5, 8, 11, 14, 17, 20, 21, 22, 23}
    for size in sizes:
        special = size.name.endswith(("v_proj", "down_proj"))
        expected = "q6_k" if special and size.block in more else "q4_k"
        assert forms[size.name].values == expected


def sized(divergence: float | str, program: str) -> dict[str, Any]:
    recipe = Recipe(
        effort=0,
        batch_tokens=80,
        program=program,  # type: ignore[arg-type]
        divergence=divergence,  # type: ignore[arg-type]
    )
    model = tiny_llama(hidden_size=64, intermediate_size=160)
    result = sparsellm.prune(model, recipe, calibration=windows(12))
    assert result.bits_per_weight is not None
    report = dict(result.allocation)
    assert result.bits_per_weight <= float(str(report["bits"])) + 1e-9
    return report


@pytest.mark.parametrize("program", ["llama.cpp", "vllm", "sparsellm"])
def test_a_run_takes_the_smallest_size_that_diverges_as_little_as_q4_k_m(
    program: str,
) -> None:
    report = sized("Q4_K_M", program)
    by_name = {candidate["name"]: candidate for candidate in report["candidates"]}
    theirs = by_name["Q4_K_M"]
    assert report["chosen"] != "Q4_K_M"
    # the candidate at the size that was found; the chosen one is not worse
    assert by_name["by linear"]["divergence"] <= theirs["divergence"] * 1.001
    # rows of 64 and 160 have no blocks of 256: q5_0 and q8_0 take their places
    assert 5.5 < theirs["bits"] < 8.5
    assert report["bits"] < theirs["bits"]


def test_fewer_nats_take_more_bits() -> None:
    divergence = {}
    bits = []
    for nats in (3e-3, 3e-4):
        report = sized(nats, "sparsellm")
        by_name = {candidate["name"]: candidate for candidate in report["candidates"]}
        assert "Q4_K_M" not in by_name
        divergence[nats] = by_name["by linear"]["divergence"]
        bits.append(report["bits"])
    assert all(reached <= nats * 1.001 for nats, reached in divergence.items())
    assert bits[0] < bits[1]


def test_a_divergence_that_no_form_has_is_refused() -> None:
    with pytest.raises(
        RecipeError, match="no form of vllm has a divergence of at most 1e-12"
    ):
        sized(1e-12, "vllm")


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"divergence": 0.1}, "and program go together; give both"),
        (
            {"divergence": 0.1, "bits": 4.0, "program": "vllm"},
            "bits 4 and divergence 0.1 all decide",
        ),
        ({"divergence": "Q5_K_M", "program": "vllm"}, "give Q4_K_M, or nats"),
        ({"divergence": -0.1, "program": "vllm"}, "divergence -0.1 is unknown"),
        ({"divergence": 0.1, "program": "vllm", "grid": "w8a8"}, "divergence 0.1 cho"),
    ],
)
def test_a_divergence_that_cannot_be_meant_is_refused(
    fields: dict[str, Any], said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        Recipe(**fields)
