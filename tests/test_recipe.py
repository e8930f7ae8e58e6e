"""The recipe: typed, described, YAML in and out, and unknown keys refused with the nearest known name."""

from __future__ import annotations

from pathlib import Path

import pytest

from sparsellm import Recipe
from sparsellm.errors import RecipeError
from sparsellm.patterns import NM, Unstructured


def test_yaml_round_trip_keeps_every_field() -> None:
    recipe = Recipe(method="wanda", pattern="4:8", options={"damping": 0.1}, exclude=["*.down_proj"], seq_len=64)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe


def test_every_field_is_described_and_the_description_stands_in_the_yaml() -> None:
    text = Recipe().to_yaml()
    for field in Recipe.model_fields.values():
        assert field.description
        assert f"# {field.description}" in text


def test_a_pattern_sets_the_sparsity_that_it_implies() -> None:
    assert Recipe(pattern="1:4").sparsity == 0.75
    assert Recipe(pattern="1:4").weight_pattern() == NM(1, 4)
    assert Recipe(sparsity=0.3).weight_pattern() == Unstructured(0.3)
    assert Recipe(pattern="2:4").updated(sparsity=0.9).pattern is None
    assert Recipe(sparsity=0.9).updated(pattern="2:4").sparsity == 0.5


def test_settings_reach_fields_and_options() -> None:
    recipe = Recipe().with_settings(["options.damping=0.5", "seed=3", "exclude=['*.v_proj']", "options.iterations=2"])
    assert recipe.options == {"damping": 0.5, "iterations": 2}
    assert recipe.seed == 3
    assert recipe.exclude == ["*.v_proj"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("sparsty: 0.5", "'sparsity'"),
        ("sparsity: 1.0", "from 0 up to, not including, 1"),
        ("sparsity: -0.1", "from 0 up to"),
        ("sparsity: lots", "sparsity"),
        ("pattern: '2:3:4'", "2:3:4"),
        ("pattern: '4:2'", "4:2"),
        ("{pattern: '2:4', sparsity: 0.7}", "means sparsity 0.5"),
        ("samples: 0", "samples"),
        ("dtype: int8", "dtype"),
        ("- 1", "mapping"),
        ("a: [", "not valid YAML"),
    ],
)
def test_a_bad_recipe_is_refused_in_one_line(text: str, said: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bad_settings_and_files(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="key=value"):
        Recipe().with_settings(["seed"])
    with pytest.raises(RecipeError, match=r"nothing\.yaml"):
        Recipe.from_yaml(tmp_path / "nothing.yaml")
