"""Sizes of forms against packed weights, hulls and choices against all possibilities, errors against tokens."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

from sparsellm.errors import RecipeError
from sparsellm.method.allocation.forms import (
    Form,
    Table,
    best_forms,
    between,
    bytes_of_threshold,
    errors_of,
    form_bytes,
    hull,
    joined,
)
from sparsellm.method.gram import Gram
from sparsellm.patterns import Unstructured
from sparsepack import layout
from sparsepack.grid import codes_of, on_grid
from sparsepack.grids import GRIDS


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("values", ["int8", "int4", "int3"])
@pytest.mark.parametrize("sparsity", [0.0, 0.1, 0.3, 0.5, 0.8])
@pytest.mark.parametrize("shape", [(24, 96), (16, 200)])
def test_bytes_are_those_of_a_packed_weight(
    values: str, sparsity: float, shape: tuple[int, int]
) -> None:
    zeros = round(sparsity * math.prod(shape))
    scores = random(*shape).abs()
    pattern = Unstructured(zeros, math.prod(shape))
    weight = random(*shape) * pattern.mask(scores, scope="row")
    exponents = torch.ones(shape[1], dtype=torch.int8)
    weight = on_grid(weight, values, torch.float32, exponents)
    packed = layout.pack(weight, values, exponents=exponents)
    assert packed is not None
    assert form_bytes(Form(values, sparsity), shape) == packed.nbytes


@pytest.mark.parametrize("name", ["q4_0", "q8_0", "w4a16", "w8a16"])
def test_bytes_on_a_grid_are_those_of_numbers_and_scales(name: str) -> None:
    weight = on_grid(random(24, 256), name, torch.float32)
    codes, scales = codes_of(weight, GRIDS[name], "q")
    expected = codes.numel() * GRIDS[name].bits / 8 + 2 * scales.numel()
    assert form_bytes(Form(name, 0.5), (24, 256)) == expected


def test_bytes_of_threshold_are_masks_and_values_of_one_width() -> None:
    weights = {"q": 1000, "up": 3000}
    found = bytes_of_threshold(weights, {"q": 0.2, "up": 0.4}, 1500)
    # 500 bytes of masks, and 1000 for 800 + 1800 kept values
    width = 1000 / 2600
    assert found == pytest.approx({"q": 125 + 800 * width, "up": 375 + 1800 * width})
    # a size that masks alone would take
    few = bytes_of_threshold(weights, {"q": 0.2, "up": 0.4}, 260)
    assert few == pytest.approx({"q": 80, "up": 180})


@pytest.mark.parametrize("seed", range(20))
def test_the_hull_has_the_points_that_no_mixture_of_two_beats(seed: int) -> None:
    sizes, errors = random(2, 12, seed=seed).abs().tolist()

    def is_beaten(place: int) -> bool:
        """Whether another point, or a mixture of two, is as small and has as little error."""
        others = [other for other in range(12) if other != place]
        if any(
            sizes[other] <= sizes[place] and errors[other] <= errors[place]
            for other in others
        ):
            return True
        for low, high in itertools.permutations(others, 2):
            if sizes[low] < sizes[place] < sizes[high]:
                share = (sizes[place] - sizes[low]) / (sizes[high] - sizes[low])
                if (1 - share) * errors[low] + share * errors[high] <= errors[place]:
                    return True
        return False

    expected = [place for place in range(12) if not is_beaten(place)]
    assert hull(sizes, errors) == sorted(expected, key=lambda place: sizes[place])


def test_a_hull_leaves_out_equals() -> None:
    assert hull([1, 1, 2, 3], [5, 5, 5, 0]) == [0, 3]
    assert hull([2, 1, 3], [1, 2, 0]) == [1, 2]  # on one line


def random_tables(seed: int, units: int = 4, forms: int = 5) -> dict[str, Table]:
    sizes = (100 * random(units, forms, seed=seed).abs() + 10).int().tolist()
    losses = random(units, forms, seed=seed + 1000).abs().tolist()
    named = [Form("int4", place / 10) for place in range(forms)]
    return {
        f"unit {number}": Table(named, sizes[number], losses[number])
        for number in range(units)
    }


def every_choice(tables: dict[str, Table]) -> list[tuple[int, float]]:
    """The bytes and the loss of every choice of forms."""
    places = [range(len(table.forms)) for table in tables.values()]
    return [
        (
            sum(t.bytes[at] for t, at in zip(tables.values(), choice, strict=True)),
            sum(t.losses[at] for t, at in zip(tables.values(), choice, strict=True)),
        )
        for choice in itertools.product(*places)
    ]


@pytest.mark.parametrize("seed", range(12))
@pytest.mark.parametrize("budget", [0, 60, 1000])
def test_a_choice_fits_and_spends_what_it_can(seed: int, budget: int) -> None:
    tables = random_tables(seed)
    every = every_choice(tables)
    least = min(size for size, _ in every)
    step = max(max(table.bytes) - min(table.bytes) for table in tables.values())
    total = least + 120
    budgets = dict.fromkeys(tables, budget)
    chosen = best_forms(budgets, tables, total)
    spent = sum(tables[name].bytes[place] for name, place in chosen.items())
    loss = sum(tables[name].losses[place] for name, place in chosen.items())
    assert spent <= total
    # no single change that fits is better
    for name, place in chosen.items():
        table = tables[name]
        for size, other in zip(table.bytes, table.losses, strict=True):
            fits = (
                size > table.bytes[place] and spent - table.bytes[place] + size <= total
            )
            assert not (fits and other < table.losses[place])
    # along hulls, greed from the smallest or the largest forms comes within one step of the best
    if budget != 60:
        best = min(lost for size, lost in every if size <= max(least, total - step))
        assert loss <= best + 1e-9


def test_budgets_decide_where_the_total_allows_them() -> None:
    forms = [Form("int3"), Form("int4"), Form("int8")]
    table = Table(forms, [30, 40, 80], [9.0, 4.0, 1.0])
    tables = {"q": table, "k": Table(forms, [30, 40, 80], [90.0, 40.0, 10.0])}
    # k gains more a byte, but has not the bytes
    assert best_forms({"q": 81, "k": 39}, tables, 110) == {"q": 2, "k": 0}
    # what is left goes to k
    assert best_forms({"q": 79, "k": 39}, tables, 80) == {"q": 1, "k": 1}
    # too much together: q gives first
    assert best_forms({"q": 80, "k": 80}, tables, 120) == {"q": 1, "k": 2}


def test_an_impossible_size_names_the_least() -> None:
    tables = random_tables(3)
    least = min(size for size, _ in every_choice(tables))
    with pytest.raises(RecipeError, match=f"at least {least:,} are possible"):
        best_forms(dict.fromkeys(tables, 100), tables, least - 1)
    chosen = best_forms(dict.fromkeys(tables, 100), tables, least)
    assert sum(tables[name].bytes[at] for name, at in chosen.items()) == least


def test_linears_of_one_form_add_up() -> None:
    forms = [Form("q4_0"), Form("q8_0")]
    both = joined([Table(forms, [4, 8], [1.0, 0.5]), Table(forms, [2, 4], [3.0, 0.25])])
    assert (both.bytes, both.losses) == ([6, 12], [4.0, 0.75])
    # only what all have
    more = Table([Form("w4a16"), *reversed(forms)], [5, 9, 3], [0.0, 0.5, 2.0])
    of_three = joined([more, Table(forms[:1], [2], [1.0])])
    assert (of_three.forms, of_three.bytes, of_three.losses) == (forms[:1], [5], [3.0])


def tokens(features: int) -> Tensor:
    """Correlated inputs of uneven size, fp64 ``(tokens, features)``."""
    mixed = random(4 * features, features) @ (
        torch.eye(features) + random(features, features, seed=1) / features**0.5
    )
    inputs: Tensor = mixed * random(features, seed=2).exp()
    return inputs.double()


FORMS = [
    Form("int8"), Form("int4"), Form("int4", 0.3), Form("int4", 0.7), Form("int3"), Form("q4_0"),
]  # fmt: skip


def test_errors_fall_with_bits_and_rise_with_zeros() -> None:
    x = tokens(64)
    gram = Gram((x.T @ x / len(x)).float(), len(x))
    weight = random(48, 64, seed=5)
    int8, int4, some, many, int3, q4_0 = errors_of(weight, gram, FORMS, torch.float32)
    assert 0 < int8 < int4 < some < many
    assert int4 < int3 < many
    # compensation beats rounding to nearest, measured on the tokens themselves
    nearest = on_grid(weight, "q4_0", torch.float32)
    lost = (x @ (nearest - weight).T.double()).square().sum()
    assert q4_0 < lost / (x @ weight.T.double()).square().sum()


def test_errors_are_measured_on_evenly_spaced_rows() -> None:
    x = tokens(64)
    gram = Gram((x.T @ x / len(x)).float(), len(x))
    few = random(8, 64, seed=5)
    weight = random(24, 64, seed=6)
    weight[::3] = few
    assert errors_of(weight, gram, FORMS, torch.float32, rows=8) == errors_of(
        few, gram, FORMS, torch.float32
    )


def test_a_weight_on_a_grid_and_one_of_zeros_lose_nothing() -> None:
    gram = Gram(torch.eye(64), 64)
    stored = on_grid(random(16, 64), "q4_0", torch.float32)
    assert errors_of(stored, gram, [Form("q4_0")], torch.float32) == [0.0]
    assert errors_of(torch.zeros(16, 64), gram, FORMS, torch.float32) == [0.0] * 6


def test_sparsities_between_are_interpolated() -> None:
    forms = [Form("int4"), Form("int4", 0.4), Form("int3")]
    every, errors = between(forms, [0.01, 0.09, 0.05], step=0.1)
    known = dict(zip(every, errors, strict=True))
    assert known[Form("int4", 0.2)] == pytest.approx(0.03)
    assert known[Form("int4", 0.1)] == pytest.approx(0.01 * 3**0.5)
    assert len(every) == 6
    assert {form: known[form] for form in forms} == dict(
        zip(forms, [0.01, 0.09, 0.05], strict=True)
    )
