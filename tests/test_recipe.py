"""The recipe: typed, described, YAML in and out, and unknown keys refused with the nearest known name."""

from __future__ import annotations

import pydoc
from pathlib import Path
from typing import Any, get_args

import numpy
import pytest

from sparsellm import Recipe
from sparsellm.errors import RecipeError
from sparsellm.patterns import NM, Unstructured
from sparsellm.recipe import help_of
from sparsellm.run.choice import Choice
from sparsepack.codes import FLOAT_TYPES
from sparsepack.grids import GRIDS


def test_yaml_round_trip_keeps_every_field_and_describes_it() -> None:
    recipe = Recipe(
        method="wanda",
        pattern="4:8",
        options={"damping": 0.1},
        exclude=["*.down_proj"],
        seq_len=64,
    )
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    text = Recipe().to_yaml()
    assert all(
        f"# {help_of(name)}" in text and help_of(name) != "None"
        for name in Recipe.model_fields
    )


@pytest.mark.parametrize(
    ("text", "bos"), [("yes", "yes"), ("no", "no"), ("'no'", "no"), ("auto", "auto")]
)
def test_bos_is_written_without_quotes(text: str, bos: str) -> None:
    """YAML reads yes and no as booleans."""
    recipe = Recipe.from_yaml(f"bos: {text}")
    assert recipe.bos == bos
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe().with_settings([f"bos={text}"]) == recipe


def test_a_pattern_sets_the_sparsity_that_it_implies() -> None:
    assert Recipe(pattern="1:4").sparsity == 0.75
    assert Recipe(pattern="1:4").pattern_of(8) == NM(1, 4)
    assert Recipe(sparsity=0.3).pattern_of(9) == Unstructured(3, 9)
    assert Recipe(sparsity=0.3).pattern_of(9, zeros=5) == Unstructured(5, 9)
    assert Recipe(pattern="2:4").updated(sparsity=0.9).pattern is None
    assert Recipe(sparsity=0.9).updated(pattern="2:4").sparsity == 0.5


def test_of_several_lengths_of_a_sweep_the_changed_one_counts() -> None:
    assert Recipe(passes=2).updated(effort=0) == Recipe(effort=0)
    assert Recipe(sweep_tokens=9000).with_settings([], effort=1) == Recipe(effort=1)
    assert Recipe(effort=3).updated(sweep_tokens=9000) == Recipe(sweep_tokens=9000)
    assert Recipe(passes=2).updated(seed=1).passes == 2
    assert Recipe(sweep_tokens=9000).updated(passes=4) == Recipe(
        sweep_tokens=9000, passes=4
    )
    assert Recipe(effort=3).with_settings(["sweep_tokens=null"]).effort == 3


def test_a_grid_sets_the_values_that_it_implies() -> None:
    assert get_args(Recipe.model_fields["grid"].annotation) == ("own", *GRIDS)
    assert [Recipe(grid=name).values for name in ("q4_0", "w8a8", "w3a16")] == [
        "int4",
        "int8",
        "int3",
    ]
    # numbers of 6 bits have no packed form
    assert Recipe(grid="q6_k").values == "int8"
    recipe = Recipe(grid="q4_0")
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe == recipe.updated(seed=0)
    changed = [
        recipe.updated(grid="q8_0"),
        recipe.updated(grid="own"),
        recipe.updated(values="int8"),
    ]
    assert [(new.grid, new.values) for new in changed] == [
        ("q8_0", "int8"),
        ("own", "keep"),
        ("own", "int8"),
    ]


def test_a_grid_alone_makes_no_zeros() -> None:
    grid = Recipe(grid="q4_0")
    assert [
        recipe.sparsity
        for recipe in (grid, Recipe(seed=1).updated(seed=2, grid="w4a16"))
    ] == [0, 0]
    assert [
        Recipe(grid="q4_0", **given).sparsity
        for given in ({"sparsity": 0.3}, {"pattern": "2:4"})
    ] == [0.3, 0.5]
    assert [grid.updated(grid="own").sparsity, grid.updated(sparsity=0.5).sparsity] == [
        0.5,
        0.5,
    ]


@pytest.mark.parametrize("name", ["iq4_nl", "iq4_xs", "q3_k"])
@pytest.mark.parametrize(
    "given", [{"sparsity": 0.3}, {"pattern": "2:4"}, {"sparsity_of": {"*up*": 0.2}}]
)
def test_a_grid_without_zero_takes_no_zeros(name: str, given: dict[str, Any]) -> None:
    """Narrow rows of q3_k are stored as iq4_nl, which has no 0."""
    with pytest.raises(RecipeError, match=f"grid {name} does not have the number 0"):
        Recipe(grid=name, **given)
    assert Recipe(grid=name, sparsity=0.0).sparsity == 0
    assert Recipe(grid="q6_k", **given)


def test_settings_reach_fields_and_options() -> None:
    recipe = Recipe().with_settings(
        [
            "options.damping=0.5",
            "seed=3",
            "exclude=['*.v_proj']",
            "options.iterations=2",
        ]
    )
    assert recipe.options == {"damping": 0.5, "iterations": 2}
    assert recipe.seed == 3
    assert recipe.exclude == ["*.v_proj"]
    assert Recipe().with_settings(["seed=3"], seed=2, samples=5) == Recipe(
        seed=3, samples=5
    )
    for setting, given in (
        ("sparsity=0.6", {"pattern": "2:4"}),
        ("values=int8", {"grid": "q4_0"}),
    ):
        with pytest.raises(RecipeError, match="give one"):
            Recipe().with_settings([setting], **given)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("sparsty: 0.5", "'sparsity'"),
        ("sparsity: 1.0", "sparsity is 1.0: it should be less than 1"),
        ("pattern: '2:3:4'", "2:3:4"),
        ("{pattern: '2:4', sparsity: 0.7}", "means sparsity 0.5"),
        (
            "{grid: q4_0, values: int8}",
            "grid q4_0 means values int4, not int8; give one",
        ),
        ("grid: q5_1", "grid is 'q5_1'"),
        ("experts: 2.9", "experts 2.9 is neither a share below 1 nor a whole number"),
        ("- 1", "mapping"),
        ("sparsity: '0.5'", "sparsity is '0.5'"),
        ("samples: 1e10", "samples is 10000000000"),
        ("{samples: 1e9, seq_len: 16}", "more than 2147483648 calibration tokens"),
        (f"pattern: '{'9' * 5000}:4'", "n:m"),
        ("options: {a: .inf}", "options.a is inf"),
        ("self: 1", "unknown recipe field 'self'"),
        (["options=3", "options.x=1"], "options is 3"),
        (["seed"], "write key=value"),
        ([".x=1"], "no key"),
        (["seed.x=1"], "unknown recipe field 'seed.x'"),
    ],
)
def test_a_bad_recipe_or_setting_is_refused_in_one_line(
    given: str | list[str], said: str
) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.from_yaml(given) if isinstance(given, str) else Recipe().with_settings(
            given
        )
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


@pytest.mark.parametrize("field", ["options", "allocation_options", "sparsity_of"])
@pytest.mark.parametrize("depth", [31, 5000])
@pytest.mark.parametrize("kind", [dict, list])
def test_a_nested_recipe_is_refused_in_one_line(
    kind: type, depth: int, field: str
) -> None:
    value: Any = 1
    for _ in range(depth - 1):
        value = {"a": value} if kind is dict else [value]
    if field != "sparsity_of" and depth < 32:
        recipe = Recipe(**{field: {"a": value}})
        assert Recipe.from_yaml(recipe.to_yaml()) == recipe
        return
    for refused in (
        lambda: Recipe(**{field: {"a": value}}),
        lambda: Recipe.of({field: value}),
        lambda: Recipe.from_yaml(f"{field}: " + "[" * depth + "]" * depth),
        lambda: Recipe.from_yaml(
            '{"' + field + '": ' + '{"a": ' * depth + "1" + "}" * (depth + 1)
        ),
    ):
        with pytest.raises(
            RecipeError, match=rf"^(recipe field {field}|the recipe)"
        ) as caught:
            refused()
        assert str(caught.value).isprintable()
        assert len(str(caught.value)) < 500


def test_a_value_that_repeats_itself_is_refused() -> None:
    doubled: list[Any] = [1]
    for _ in range(25):
        doubled = [doubled, doubled]
    endless: list[Any] = []
    endless.append(endless)
    for value in (doubled, endless):
        with pytest.raises(RecipeError, match=r"more than 100000 parts|nested deeper"):
            Recipe(options={"a": value})


def test_numbers_and_patterns_are_read_as_people_write_them() -> None:
    recipe = Recipe.from_yaml(
        "{pattern: 2:4, samples: 1e3, options: {damping: 1e-3}, seed: 010}"
    )
    assert (recipe.pattern, recipe.samples, recipe.options, recipe.seed) == (
        "2:4",
        1000,
        {"damping": 1e-3},
        10,
    )
    assert Recipe().with_settings(["pattern=1:4"]).sparsity == 0.75
    assert Recipe(samples=numpy.int64(5), exclude=("a", "b")).exclude == ["a", "b"]
    assert Recipe(calibration=Path("a.txt")).calibration == "a.txt"
    strange = Recipe(
        calibration="1e-3",
        exclude=["2:4", "yes", "a\nb", "010", "~"],
        options={"a": "1e3", "b": 1e-7},
    )
    assert Recipe.from_yaml(strange.to_yaml()) == strange


def test_short_names_of_dtypes_are_those_of_values() -> None:
    assert [Recipe(dtype=short).dtype for short in FLOAT_TYPES] == [
        "bfloat16",
        "float16",
        "float32",
    ]


def test_settings_join_the_options_that_are_there() -> None:
    recipe = Recipe(options={"a": 1})
    assert recipe.with_settings(["options.b=2"]).options == {"a": 1, "b": 2}
    assert recipe.with_settings(["options={c: 3}", "options.b=2"]).options == {
        "c": 3,
        "b": 2,
    }
    assert recipe.with_settings(["options={c: 3}"]).options == {"c": 3}
    later = Recipe(sparsity_of={"a": 0.1, "b": 0.2}).with_settings(
        ["sparsity_of.a=0.3"]
    )
    assert list(later.sparsity_of.items()) == [("b", 0.2), ("a", 0.3)]


def test_effort_is_a_number_of_passes() -> None:
    assert [
        Choice.of(Recipe(effort=effort)).passes for effort in (None, 0, 1, 2, 3)
    ] == [1, 0, 1, 3, 8]
    assert [
        Choice.of(recipe).passes
        for recipe in (Recipe(effort=1, passes=5), Recipe(method="wanda"))
    ] == [5, 0]


def test_tokens_of_the_sweep_are_divided_into_at_most_sixteen_passes() -> None:
    def passes(tokens: Any, **fields: Any) -> tuple[int, int]:
        choice = Choice.of(Recipe(sweep_tokens=tokens, **fields))
        return choice.passes, choice.windows_of_pass(8, 1024)

    assert [passes(tokens) for tokens in (1, "16384", "64k", "256K")] == [
        (1, 1),
        (1, 16),
        (4, 16),
        (16, 16),
    ]
    # 62 is rounded up
    assert [passes("1M"), passes(1e6), passes("64k", passes=2)] == [
        (16, 62),
        (16, 62),
        (2, 32),
    ]
    refused: dict[str, Any] = {
        f"number of tokens '{w}' is unknown": {"tokens": w} for w in ("1.5k", "5G", "")
    }
    refused |= {
        "sweep_tokens is 0": {"tokens": 0},
        "effort and sweep_tokens both": {"tokens": "64k", "effort": 1},
    }
    refused |= {"passes 0 leaves out the sweep": {"tokens": "64k", "passes": 0}}
    refused |= {
        "method wanda has no sweep, so no sweep_tokens": {
            "tokens": "64k",
            "method": "wanda",
        }
    }
    for why, fields in refused.items():
        with pytest.raises(RecipeError, match=why):
            passes(**fields)


@pytest.mark.parametrize("path", ["x" * 5000, "a\0b", "nothing.yaml"])
def test_a_file_that_cannot_be_read_is_named(path: str) -> None:
    with pytest.raises(RecipeError, match="cannot read"):
        Recipe.from_yaml(Path(path))


def test_help_begins_with_the_fields_and_their_sentences() -> None:
    shown = pydoc.plain(pydoc.render_doc(Recipe))
    before, _, rest = shown.partition("Method resolution order")
    assert "Annotated" not in before
    assert "FieldInfo" not in before
    assert "Annotated" not in rest.partition("__annotations__")[2][:2000]
    lines = (line.removeprefix(" |") for line in before.splitlines())
    words = " ".join(" ".join(lines).split())
    for name, field in Recipe.model_fields.items():
        assert f" {name}: " in words
        assert " ".join(str(field.description).split()) in words
    assert "sparsity: float = 0.5" in words
    assert "effort: int | None = None" in words
