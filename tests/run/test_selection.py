"""Which linears are pruned and how sparse each is: ``only``, ``exclude`` and ``sparsity_of``, with exact totals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import ModelError, RecipeError
from sparsellm.method.allocation import ALLOCATIONS, Allocation, LinearSize, Survey
from sparsellm.method.allocation.allocator import divide_zeros
from sparsellm.model import open_chain
from sparsellm.model.matrices import refuse_silent_dense
from tests.killing import stop_after_one
from tests.method.allocation.helpers import IDS
from tests.models import tiny_llama, tiny_opt, tiny_tokenizer
from tests.models.unusual import Stacks, with_mixture

OF = {"*.down_proj": 0.75, "model.layers.0.*": 0.25, "*.v_proj": 0}


def test_linears_at_sparsity_0_keep_every_bit() -> None:
    """Also a writer of which no linear before it was pruned, and the biases."""
    model, of = tiny_opt(), {"*.fc1": 0, "*.fc2": 0, "*.q_proj": 0}
    before = {name: value.clone() for name, value in model.state_dict().items()}
    sparsellm.prune(
        model, Recipe(sparsity=0.3, sparsity_of=of, effort=0), calibration=IDS
    )
    after = model.state_dict()
    moved = {
        name.rpartition("layers.")[2][2:]
        for name, value in before.items()
        if not torch.equal(value, after[name])
    }
    others = {f"self_attn.{name}" for name in ("k_proj", "v_proj", "out_proj")}
    assert {name.rpartition(".")[0] for name in moved} == others


def test_only_what_is_named_is_pruned_the_rest_counts_as_dense() -> None:
    model = tiny_llama()
    recipe = Recipe(
        method="magnitude",
        sparsity=0.5,
        only=["*.mlp", "*.layers.1.*"],
        exclude=["*.up_proj"],
    )
    result = sparsellm.prune(model, recipe, calibration=IDS)
    names = {linear.name for linear in result.linears}
    assert names == {
        *(
            f"model.layers.{index}.mlp.{name}_proj"
            for index in range(3)
            for name in ("gate", "down")
        ),
        *(f"model.layers.1.self_attn.{name}_proj" for name in "qkvo"),
    }
    for name, module in model.model.layers.named_modules(prefix="model.layers"):
        if isinstance(module, torch.nn.Linear):
            assert (
                int((module.weight == 0).sum())
                == (0.5 if name in names else 0.0) * module.weight.numel()
            )
    assert result.sparsity_pruned == 0.5
    assert {(matrix.name, matrix.reason) for matrix in result.dense} >= {
        ("model.layers.1.mlp.up_proj", "excluded"),
        ("model.layers.0.self_attn.q_proj", "excluded"),
    }
    assert result.matrices.weights == sum(
        p.numel() for p in model.model.layers.parameters() if p.ndim == 2
    )


def test_patterns_that_match_nothing_are_refused() -> None:
    for field, patterns in {
        "only": ["*.mpl.*", "*.mlp.*"],
        "sparsity_of": {"*.q_proj": 0.1, "*.up_proj": 0.5},
        "exclude": ["*.down_porj", "*.down_proj"],
    }.items():
        with pytest.raises(
            RecipeError, match="matches no matrix of the blocks; names are like"
        ) as refused:
            sparsellm.prune(
                tiny_llama(),
                {"method": "magnitude", "only": ["*.mlp"], field: patterns},
                calibration=IDS,
            )
        assert str(refused.value).startswith(f"{field} {next(iter(patterns))!r} ")
    with pytest.raises(
        RecipeError, match=r"only \['x'\] with exclude \['y'\] leaves nothing to prune"
    ):
        sparsellm.prune(
            tiny_llama(),
            Recipe(sparsity=0.5, only=["x"], exclude=["y"]),
            calibration=IDS,
        )
    with pytest.raises(
        RecipeError, match="pattern 2:4 fixes the sparsity of every linear"
    ):
        sparsellm.prune(
            tiny_llama(),
            {"sparsity_of": {"*.q": 0.1}, "pattern": "2:4"},
            calibration=IDS,
        )


def test_unknown_stacks_are_refused_only_where_selected() -> None:
    chain = open_chain(with_mixture(Stacks, 4), device=torch.device("cpu"))
    refuse_silent_dense(chain, [], ["*.self_attn"])
    with pytest.raises(ModelError, match=r"mlp\.up"):
        refuse_silent_dense(chain, [], ["*.mlp"])


@pytest.mark.parametrize("name", ["uniform", "threshold"])
def test_fixed_linears_have_their_count_and_the_total_is_exact(name: str) -> None:
    model = tiny_llama()
    recipe = Recipe(
        method="magnitude",
        sparsity=0.6,
        allocation=name,
        sparsity_of=OF,
        exclude=["*.k_proj"],
    )
    result = sparsellm.prune(model, recipe, calibration=IDS)
    zeros = {
        linear.name.removeprefix("model.layers."): linear.zeros
        for linear in result.linears
    }
    assert all(
        int((model.get_submodule(linear.name).weight == 0).sum()) == linear.zeros
        for linear in result.linears
    )
    assert {zeros[f"{block}.mlp.down_proj"] for block in (1, 2)} == {
        round(0.75 * 80 * 32)
    }
    # the later pattern counts
    assert zeros["0.mlp.down_proj"] == zeros["0.mlp.up_proj"] == 640
    assert [zeros[f"{block}.self_attn.v_proj"] for block in range(3)] == [0, 0, 0]
    assert result.zeros == round(0.6 * result.weights)
    free = [
        zeros[f"{block}.{kind}_proj"]
        for block in (1, 2)
        for kind in ("mlp.up", "mlp.gate")
    ]
    assert (max(free) - min(free) <= 1) == (name == "uniform")
    assert min(free) > 0.6 * 80 * 32  # they make up for the denser ones


@pytest.mark.usefixtures("forgotten_plugins")
@pytest.mark.parametrize("of", [{}, {"*.q_proj": 0.1}])
def test_an_allocation_that_misses_the_total_is_corrected(of: dict[str, float]) -> None:
    @ALLOCATIONS.register("rough", paper="none")
    def rough(survey: Survey) -> Allocation:
        # a tenth less
        zeros = {
            linear.name: int(0.9 * survey.sparsity * linear.weights)
            for linear in survey.linears
        }
        return Allocation(zeros, {"name": "another", (0, 1): 2})  # type: ignore[dict-item]

    recipe = Recipe(
        method="magnitude", sparsity=0.6, allocation="rough", sparsity_of=of
    )
    result = sparsellm.prune(tiny_llama(), recipe, calibration=IDS)
    assert result.zeros == round(0.6 * result.weights)
    assert result.allocation == {"name": "rough", "(0, 1)": 2}


def test_the_order_of_patterns_is_part_of_the_identity(
    llama: Path, tmp_path: Path
) -> None:
    recipe = Recipe(
        method="magnitude", sparsity=0.6, sparsity_of=OF, only=["*.mlp", "*.v_proj"]
    )
    with pytest.raises(KeyboardInterrupt):
        sparsellm.prune(
            llama,
            recipe,
            calibration=IDS,
            out=tmp_path / "cut",
            progress=stop_after_one("prune"),
        )
    turned = recipe.updated(sparsity_of=dict(reversed(OF.items())))
    with pytest.raises(sparsellm.SparseLLMError, match="sparsity_of"):
        sparsellm.prune(llama, turned, calibration=IDS, out=tmp_path / "cut")
    resumed = sparsellm.prune(llama, recipe, calibration=IDS, out=tmp_path / "cut")
    assert resumed.zeros == round(0.6 * resumed.weights)
    assert Recipe.from_yaml(tmp_path / "cut" / "recipe.yaml").sparsity_of == OF


@pytest.mark.parametrize(
    ("sparsity", "of", "possible"),
    [
        (0.1, {"b": 0.9}, "0.45 to 0.945 are possible"),
        (0.95, {"b": 0.9}, "0.45 to 0.945 are possible"),
        (0.7, {"a": 0.5, "b": 0.6}, "only 0.55 is possible"),
        (0.0, {"b": 0.5}, "0.25 to 0.745 are possible"),
    ],
)
def test_impossible_totals_are_refused_with_possible_ones(
    sparsity: float, of: dict[str, float], possible: str
) -> None:
    sizes = [
        LinearSize(name, 0, (20, 50), round(1000 * of[name]) if name in of else None)
        for name in "ab"
    ]
    with pytest.raises(
        RecipeError, match=f"sparsity {sparsity:g} cannot be reached.*{possible}"
    ):
        divide_zeros(sizes, sparsity)


def test_it_is_refused_before_the_calibration_text_is_read(tmp_path: Path) -> None:
    (tmp_path / "broken.jsonl").write_text("{")
    recipe = Recipe(
        sparsity=0.1,
        sparsity_of={"*.mlp": 0.9},
        calibration=str(tmp_path / "broken.jsonl"),
    )
    with pytest.raises(RecipeError, match="cannot be reached"):
        sparsellm.prune(tiny_llama(), recipe, tokenizer=tiny_tokenizer())


LINEAR = st.tuples(st.integers(1, 300), st.none() | st.integers(0, 300))


@given(st.lists(LINEAR, min_size=1, max_size=12), st.floats(0, 0.999))
@settings(deadline=None)
def test_every_division_is_exact_or_refused(
    linears: list[tuple[int, int | None]], sparsity: float
) -> None:
    sizes = [
        LinearSize(str(i), 0, (7, width), fixed and min(fixed, width))
        for i, (width, fixed) in enumerate(linears)
    ]
    try:
        zeros = divide_zeros(sizes, sparsity).allocation().zeros
    except RecipeError:
        return
    total = round(sparsity * sum(size.weights for size in sizes))
    assert abs(sum(zeros.values()) - total) <= (
        0 if any(size.fixed is None for size in sizes) else len(sizes)
    )
    for size in sizes:
        assert 0 <= zeros[size.name] <= size.weights
        assert size.fixed is None or zeros[size.name] == size.fixed
