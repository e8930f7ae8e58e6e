"""Allocation in a whole run: recipe, command line, what is written, and going on after a crash."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import RecipeError
from sparsellm.run.choice import Choice
from tests.method.allocation.helpers import IDS
from tests.models import tiny_llama, tiny_opt

SMALL = ("--samples", "4", "--seq-len", "24")


@pytest.mark.parametrize(
    ("name", "options", "said"),
    [
        ("treshold", {}, "'threshold'"),
        ("threshold", {"span": 7}, "span of threshold is 7"),
    ],
)
def test_mistakes_are_named(name: str, options: dict[str, Any], said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        Choice.of(Recipe(method="wanda", allocation=name, allocation_options=options))


def test_a_fixed_pattern_takes_uniform_only() -> None:
    free = Recipe(allocation="threshold")
    for refused in (
        lambda: Recipe(pattern="2:4", allocation="threshold"),
        lambda: free.updated(pattern="2:4"),
    ):
        with pytest.raises(
            RecipeError, match="pattern 2:4, which fixes the sparsity of every linear"
        ):
            refused()
    assert Recipe(pattern="2:4", allocation="uniform").sparsity == 0.5


def test_a_method_has_an_allocation_of_its_own() -> None:
    def shares(recipe: Recipe) -> tuple[str | None, list[int]]:
        result = sparsellm.prune(tiny_llama(), recipe, calibration=IDS)
        # what was not chosen is still open to the next run
        assert result.recipe.allocation == recipe.allocation
        assert Recipe.from_yaml(result.recipe.to_yaml()) == result.recipe
        return result.allocation.get("name"), [
            linear.zeros for linear in result.linears
        ]

    default = shares(Recipe(sparsity=0.6, effort=0))
    assert default == shares(Recipe(sparsity=0.6, effort=0, allocation="threshold"))
    assert default[0] == "threshold"
    alike = shares(Recipe(sparsity=0.6, effort=0, allocation="uniform"))
    assert alike[0] is None
    assert default[1] != alike[1]
    assert shares(Recipe(method="sparsegpt", sparsity=0.6)) == alike
    assert shares(Recipe(pattern="2:4", effort=0)) == shares(
        Recipe(pattern="2:4", effort=0, allocation="uniform")
    )
    assert shares(Recipe(sparsity=0.0))[0] is None
    recipe = Recipe(effort=0, allocation_options={"span": 0.0}, pattern="2:4")
    with pytest.raises(RecipeError, match="uniform has no option 'span'"):
        sparsellm.prune(tiny_llama(), recipe, calibration=IDS)


def test_the_summary_says_how_far_shares_are_apart(
    llama: Path, tmp_path: Path, run: Any
) -> None:
    _, stdout, _ = run(
        "prune",
        llama,
        "--out",
        tmp_path / "p",
        "--sparsity",
        "0.6",
        "--effort",
        "0",
        *SMALL,
    )
    assert "sparsellm 60% by threshold" in stdout
    linears = json.loads((tmp_path / "p" / "pruning.json").read_text())["linears"]
    keys = [
        linear["sparsity"] for linear in linears if linear["name"].endswith("k_proj")
    ]
    (row,) = (line for line in stdout.splitlines() if "k_proj" in line)
    assert f"{min(keys):.0%} – {max(keys):.0%}" in row
    _, stdout, _ = run(
        "prune",
        llama,
        "--out",
        tmp_path / "q",
        "--pattern",
        "2:4",
        "--effort",
        "0",
        *SMALL,
    )
    assert "sparsellm 2:4 · calibrated" in stdout
    assert "least" not in stdout


def test_nothing_to_prune_asks_nothing_of_the_model() -> None:
    model, untouched = tiny_opt(), tiny_opt()
    assert not sparsellm.prune(
        model,
        Recipe(method="wanda", sparsity=0, allocation="threshold"),
        calibration=IDS,
    ).zeros
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), untouched.parameters(), strict=True)
    )
