"""Values on the packed grid: against brute force, never worse than nearest, and packed without loss."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparsellm.method.gram import Gram
from sparsellm.method.solvers import SOLVERS, descent, group_scales, rounding
from sparsellm.method.solvers.group_scales import FACTORS, best_factors
from sparsellm.method.solvers.prepared import prepared
from sparsellm.method.solvers.rounding import (
    DAMPING,
    SHRINKAGE,
    rounded,
    to_nearest,
    uncompensated,
)
from sparsellm.method.solvers.weight_grid import WeightGrid
from sparsellm.patterns import NM, Pattern
from sparsepack.codes import (
    EXPONENTS,
    GAPPED,
    PLAIN,
    Levels,
    exponents_of_text,
    text_of_exponents,
)
from sparsepack.grid import INTEGERS, Groups, codes_of, on_grid
from sparsepack.grids import GRIDS
from sparsepack.layout import form_of, pack, unpack
from tests.method.solvers.problems import gram_of, loss, losses, weight_of
from tests.shares import Share

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
PATTERNS = [Share(0.5), Share(0.9), Share(0.0), NM(2, 4)]


def pruned(out: int, inputs: int, pattern: Pattern, seed: int = 0) -> Tensor:
    weight = weight_of(out, inputs, seed)
    return weight * pattern.mask(weight.abs())


@pytest.fixture(params=["compiled", "torch"])
def loop(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both loops over the inputs of a panel; other tests run the one that a user gets here."""
    if request.param == "torch":
        for module in (rounding, descent):
            monkeypatch.setattr(module, "panel_kernel", lambda _: None)


@pytest.fixture
def descent_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """One descent from the nearest numbers, with the first scales."""
    monkeypatch.setattr(descent, "ROUNDS", 1)
    monkeypatch.setattr(descent.Descent, "_fit_scales", lambda self: None)
    monkeypatch.setattr(
        rounding, "_one_after_another", lambda grid, target, gram: (grid.nearest, ())
    )


def repacked(
    weight: Tensor, values: str, dtype: torch.dtype, exponents: Tensor | None = None
) -> Tensor:
    """What packing gives back, which is the nearest one if the weight was not rounded first."""
    packed = pack(weight.to(dtype), values, exponents=exponents)
    assert packed is not None
    return unpack(packed, dtype).float()


@pytest.mark.parametrize("values", INTEGERS)
@pytest.mark.parametrize("sparsity", [0.5, 0.0])
def test_weights_near_the_end_of_fp16_are_rounded_like_small_ones(
    values: str, sparsity: float
) -> None:
    """Those beyond it, as a solver may fit them, are clipped."""
    small, gram = pruned(24, 96, Share(sparsity)), gram_of(96)
    small /= small.abs().max()
    reference = loss(rounded(small, gram, values, torch.float32).weight, small, gram)
    for largest in (40000.0, 65504.0, 400000.0):
        grid = rounded(small * largest, gram, values, torch.float16)
        assert torch.equal(
            repacked(grid.weight, values, torch.float16, grid.exponents), grid.weight
        )
        assert bool(torch.isfinite(grid.weight.half()).all())
        if largest <= 65504.0:
            assert loss(grid.weight / largest, small, gram) <= 1.3 * reference
        else:
            assert (
                float(grid.weight[small.abs() * largest > 65504.0].abs().mean())
                > 40000.0
            )


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize("values", INTEGERS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_is_stored_without_loss_and_better_than_nearest(
    values: str, dtype: torch.dtype, pattern: Pattern
) -> None:
    weight, gram = pruned(24, 96, pattern), gram_of(96)
    if pattern.sparsity == 0.5:
        weight[2] = 0.0  # an empty row stays empty
    result = rounded(weight, gram, values, dtype, fixed_mask=isinstance(pattern, NM))
    stored = result.weight.to(dtype)
    assert torch.equal(stored.float(), result.weight)
    packed = pack(stored, values, exponents=result.exponents)
    assert packed is not None
    assert torch.equal(unpack(packed, dtype), stored)
    # the fewer values, the less they can make up for
    share = 0.8 if pattern.sparsity == 0.9 else 0.5
    assert loss(result.weight, weight, gram) < share * loss(
        repacked(weight, values, dtype), weight, gram
    )
    zeros, before = result.weight == 0, weight == 0
    assert bool(zeros[before].all())
    if isinstance(pattern, NM):
        assert torch.equal(zeros, before)
    # What training goes on from is another weight that rounds to this one, also after it was stored.
    unrounded = result.unrounded.to(dtype).float()
    assert torch.equal(
        on_grid(unrounded, values, dtype, result.exponents), result.weight
    )
    assert bool(zeros[unrounded == 0].all())
    if packed.layout != "dense":  # where 0 is a number like the others
        assert torch.equal(unrounded == 0, zeros)
    if values == "int4":
        assert int((unrounded != result.weight).sum()) > 0.5 * int((~zeros).sum())


@pytest.mark.parametrize(
    "levels",
    [*GAPPED.values(), *PLAIN.values()],
    ids=lambda levels: str(len(levels.numbers)),
)
def test_the_nearest_number_is_that_of_a_search(levels: Levels) -> None:
    every = torch.tensor(levels.numbers).float()
    numbers = every[every != 0]
    units = torch.cat(
        (torch.linspace(-140, 140, 28001), every, torch.tensor([math.nan]))
    )
    goal = (units.unsqueeze(1) - numbers).abs().min(dim=1).values
    result = levels.nearest(units)
    kept = (units != 0) & units.isfinite()
    assert set(result[kept].int().tolist()) <= set(numbers.int().tolist())
    assert torch.allclose((result - units).abs()[kept], goal[kept], atol=1e-4)
    assert bool((result[units == 0] == 0).all())
    if len(levels.numbers) <= 16:
        codes = levels.codes(every)
        assert codes.tolist() == list(range(codes[0], codes[0] + len(every)))
        table = torch.arange(16) - 8 if levels.table is None else levels.table
        assert torch.equal(table[codes.long()].float(), every)


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize(
    "name", ["q5_0", "iq4_nl", "iq4_xs", "q3_k", "q6_k", "q2_k", "q4_k"]
)
@pytest.mark.parametrize("dtype", DTYPES[:3])
def test_types_of_gguf_are_read_again_and_better_than_nearest(
    name: str, dtype: torch.dtype
) -> None:
    """Also from the values with which training goes on; in rows of whole blocks of 256, and in narrower ones."""
    for columns in (256, 96):
        weight, gram = weight_of(24, columns) * 0.05, gram_of(columns)
        weight[2] = 0.0
        weight[:, 5] = 0.0  # a column of zeros, which some of them do not have
        weight[3] /= 1000
        result = rounded(weight, gram, name, dtype)
        codes_of(result.weight.to(dtype), GRIDS[name], "a")
        nearest = on_grid(weight, name, dtype)
        error = loss(result.weight, weight, gram)
        assert error < 0.5 * loss(nearest, weight, gram)
        unrounded = result.unrounded.to(dtype).float()
        assert torch.equal(on_grid(unrounded, name, dtype), result.weight)
        moved = unrounded != result.weight
        assert int(moved.sum()) > 0.5 * weight.numel()
        assert not bool(result.weight[2].any())


@pytest.mark.parametrize("name", ["iq4_xs", "q3_k", "q6_k"])
def test_small_units_are_read_again(name: str) -> None:
    """Units that fp16 stores in few digits; curvature that differs much by column moves the scales of parts."""
    generator = torch.Generator().manual_seed(0)
    costs = torch.rand(512, generator=generator) ** 8 + 1e-4
    for exponent in range(-14, -7):
        drawn = torch.randn(128, 512, generator=generator)
        weight = (drawn * 2.0**exponent).bfloat16().float()
        stored = rounding.to_nearest(weight, costs, name, torch.bfloat16)
        codes_of(stored.bfloat16(), GRIDS[name], "a")


@pytest.mark.parametrize("name", ["q8_0", "q5_0", "q6_k", "w8a16", "w8a8"])
@pytest.mark.parametrize(("largest", "most"), [(1e-5, 4.0), (1e-4, 1.1)])
def test_small_weights_do_not_become_nothing(
    name: str, largest: float, most: float
) -> None:
    """Their error is that of large ones, or few times as much where fp16 has two scales for all."""
    weight, gram = weight_of(48, 256), gram_of(256)
    weight /= weight.abs().max()
    errors = []
    for size in (1.0, largest):
        result = rounded(weight * size, gram, name, torch.bfloat16).weight
        codes_of(result.bfloat16(), GRIDS[name], "a")
        errors.append(float((result / size - weight).norm()))
    assert errors[1] < most * errors[0]


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize(("name", "kept"), [("q4_0", 4), ("w3a16", 5), ("w4a16-64", 4)])
@pytest.mark.parametrize("seed", range(3))
def test_numbers_and_scale_of_a_group_are_near_the_best(
    name: str, kept: int, seed: int
) -> None:
    """On the grid of another program, against all numbers with every scale that fp16 and bf16 share, in fp64."""
    grid = GRIDS[name]
    weight, gram = torch.zeros(1, grid.group), gram_of(grid.group, seed=seed)
    weight[:, :kept] = weight_of(1, kept, seed) / 30
    codes, scales = codes_of(
        rounded(weight, gram, name, torch.bfloat16).weight.bfloat16(), grid, "a"
    )
    assert not bool(codes[:, kept:].any())
    inside = Gram(gram.matrix[:kept, :kept], gram.tokens)
    fixed = int(weight.abs().argmax())
    steps = (
        torch.linspace(0.5, 1.2, 300)
        .mul_(abs(float(weight[0, fixed])) / -grid.lowest)
        .bfloat16()
        .double()
        .unique()
    )
    others = torch.tensor(
        list(itertools.product(range(grid.lowest, grid.highest + 1), repeat=kept - 1))
    ).double()
    numbers = torch.cat(
        (
            others[:, :fixed],
            torch.full((len(others), 1), float(grid.lowest)),
            others[:, fixed:],
        ),
        dim=1,
    )
    sign = -math.copysign(1.0, float(weight[0, fixed]))
    least = min(
        float(losses(numbers * sign * step, weight[:, :kept], inside).min())
        for step in steps
    )
    error = loss((codes.double() * scales.double())[:, :kept], weight[:, :kept], inside)
    assert least - 1e-12 <= error <= 1.5 * least + 1e-12


def removing_one_input_at_a_time(
    weight: Tensor, grid: WeightGrid, matrix: Tensor
) -> Tensor:
    """Rounding one input after another, fp64, by definition: after each all later ones suit the error so far."""
    order = sorted(range(len(matrix)), key=lambda place: -float(matrix[place, place]))
    goal, result = (
        weight.double().clone(),
        torch.zeros_like(weight, dtype=torch.float64),
    )
    scales = grid.scales(grid.first)
    for number, place in enumerate(order):
        later = order[number + 1 :]
        for row in range(len(weight)):
            value = float(grid.nearest[row, place])
            if bool(grid.free[row, place]):
                scale = float(scales[row, place])
                units = torch.tensor(float(goal[row, place]) / scale)
                value = float(grid.numbers(units[None], torch.ones(1))[0]) * scale
            result[row, place] = value
            if later:
                error = result[row, place] - goal[row, place]
                goal[row, later] -= torch.linalg.solve(
                    matrix[later][:, later], matrix[later, place] * error
                )
    return result


@pytest.mark.usefixtures("loop")
@pytest.mark.parametrize("values", INTEGERS)
@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_each_input_is_made_up_for_by_all_after_it(
    values: str, sparsity: float
) -> None:
    weight, gram = pruned(6, 80, Share(sparsity)), gram_of(80)
    grid = WeightGrid(
        weight, gram, torch.ones(80), Groups.of(weight, values), torch.float32
    )
    result, notes = rounding._one_after_another(grid, weight, gram)
    damped = gram.matrix.double().clone()
    damped.diagonal().add_(rounding.DAMPING * gram.mean_diagonal)
    expected = removing_one_input_at_a_time(weight, grid, damped)
    # A value in the middle between two numbers may fall to either side in fp32, and all later ones of its row differ.
    assert (
        int(torch.isclose(result.double(), expected, atol=1e-6).all(dim=1).sum()) >= 5
    )
    assert notes == ()
    assert torch.equal(result == 0, grid.nearest == 0) or grid.groups.dense


@pytest.mark.parametrize("sparsity", [0.0, 0.5])
def test_values_are_rounded_in_the_metric_of_the_damped_matrix(
    sparsity: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, gram = pruned(24, 96, Share(sparsity)), gram_of(96)
    result = rounded(weight, gram, "int4", torch.bfloat16).weight
    damped = gram.matrix.clone()
    if not sparsity:
        damped = 0.5 * gram.matrix + 0.5 * gram.matrix.diagonal().diag()
    damped += torch.eye(96) * (0.1 * gram.mean_diagonal)
    monkeypatch.setattr(rounding, "_metric", lambda gram, dense: gram)
    assert torch.equal(
        rounded(weight, Gram(damped, gram.tokens), "int4", torch.bfloat16).weight,
        result,
    )
    assert not torch.equal(
        rounded(weight, Gram(gram.matrix, 9), "int4", torch.bfloat16).weight, result
    )


@pytest.mark.parametrize("dense", [False, True])
def test_an_error_costs_what_the_inputs_after_it_leave_of_it(dense: bool) -> None:
    gram = gram_of(24)
    matrix = gram.matrix.double()
    shrinkage = SHRINKAGE if dense else 0.0
    damped = (1 - shrinkage) * matrix + shrinkage * matrix.diagonal().diag()
    damped += DAMPING * gram.mean_diagonal * torch.eye(24, dtype=torch.float64)
    # the second damping is that of the factor
    damped += DAMPING * damped.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    order = gram.diagonal.argsort(descending=True, stable=True).tolist()
    costs = uncompensated(gram, dense=dense)
    for place, number in enumerate(order):
        later = order[place + 1 :]
        change = torch.zeros(24, dtype=torch.float64)
        change[number] = 1
        if later:
            inner = damped[later][:, later]
            change[later] = -torch.linalg.solve(inner, damped[later, number])
        assert float(costs[number]) == pytest.approx(
            float(change @ matrix @ change), rel=1e-3
        )


def test_costs_of_errors_predict_the_error_of_rounding() -> None:
    """It is somewhat less after the descent, by one share for all types."""
    gram = gram_of(256)
    weight = weight_of(64, 256)
    costs = uncompensated(gram, dense=True)
    shares = []
    for values in ("q8_0", "q5_0", "q4_0", "q3_k", "q2_k", "int3", "int4"):
        nearest = to_nearest(weight, costs, values, torch.float32)
        predicted = float(((nearest - weight).square() @ costs).sum())
        solved = rounded(weight, gram, values, torch.float32).weight
        shares.append(float(gram.energy(solved, minus=weight)) / predicted)
        assert predicted < 0.5 * float(gram.energy(nearest, minus=weight))
    assert 0.7 < min(shares) <= max(shares) < 1
    assert max(shares) < 1.15 * min(shares), shares


def test_damping_that_had_to_be_raised_is_said() -> None:
    matrix = torch.ones(32, 32) * 1e8 + torch.eye(32) * 1e-3
    matrix[0, 1] = matrix[1, 0] = (
        5e8  # not positive definite, as sums of ill-conditioned inputs may come out
    )
    result = rounded(weight_of(4, 32), Gram(matrix, 10), "int4", torch.float32)
    assert any("damping raised" in note for note in result.notes)
    assert bool(result.weight.isfinite().all())


@pytest.mark.parametrize(("columns", "size"), [(96, 32), (80, 32), (70, 70)])
def test_factors_of_groups_are_those_of_least_squares(
    columns: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group_scales, "RIDGE", 0.0)
    monkeypatch.setattr(group_scales, "SYSTEMS", 200)  # two rows at a time
    x = weight_of(300, columns, seed=1) * torch.linspace(0.5, 2.0, columns)
    goal = weight_of(5, columns)
    weight = goal * (1 + 0.2 * weight_of(5, columns, seed=2))
    weight[3, :size] = 0.0  # an empty group
    matrix, groups = x.T @ x / 300, Groups(columns, size, PLAIN["int4"])
    result = best_factors(weight, (weight - goal) @ matrix, matrix, groups)
    for row in range(5):
        parts = [
            x[:, s : s + size] @ weight[row, s : s + size]
            for s in range(0, columns, size)
        ]
        design = torch.stack(parts, dim=1).double()
        expected = torch.linalg.lstsq(
            design, (x @ goal[row]).double(), driver="gelsd"
        ).solution
        live = design.square().sum(dim=0) > 0
        assert torch.allclose(result[row].double()[live], expected[live], atol=1e-4)
        assert bool((result[row][~live] == 1).all())


def test_values_nearer_to_zero_leave_only_a_mask_that_may_change() -> None:
    weight, gram = pruned(16, 128, Share(0.5)), gram_of(128)
    weight[:, 7] = 1e-5
    for values in ("int4", "int3"):
        assert (
            int(
                rounded(weight, gram, values, torch.float32)
                .weight[:, 7]
                .count_nonzero()
            )
            == 0
        )
        assert torch.equal(
            rounded(weight, gram, values, torch.float32, fixed_mask=True).weight != 0,
            weight != 0,
        )


def test_factors_stay_near_one() -> None:
    """Where the best factor is far away, and where the system cannot be factorised."""
    groups = Groups(64, 32, PLAIN["int4"])
    weight, goal = torch.ones(1, 64), torch.full((1, 64), 9.0)
    far = best_factors(weight, (weight - goal) @ torch.eye(64), torch.eye(64), groups)
    assert torch.equal(far, torch.full((1, 2), FACTORS[1]))
    indefinite = torch.eye(64)
    indefinite[0, 63] = indefinite[63, 0] = 1e6
    assert torch.equal(
        best_factors(weight, weight @ indefinite, indefinite, groups),
        torch.ones(1, 2),
    )


@pytest.mark.usefixtures("descent_alone")
@pytest.mark.parametrize(
    ("values", "size", "every"), [("int8", 16.0, 32), ("int4", 64.0, 64)]
)
def test_exponents_lower_the_error(
    values: str, size: float, every: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    weight, sizes = pruned(48, 128, Share(0.5)), torch.ones(128)
    sizes[::every] = size
    x = weight_of(400, 128, seed=1) * sizes
    gram = Gram(x.T @ x / 400, 400)
    result = rounded(weight, gram, values, torch.float32)
    assert result.exponents is not None
    large, small = (
        set(result.exponents[::every].tolist()),
        set(result.exponents[1:every].tolist()),
    )
    assert len(large) == len(small) == 1
    assert max(large) < min(small)  # the large inputs take finer steps
    monkeypatch.setattr(rounding, "POWERS", ())
    plain = rounded(weight, gram, values, torch.float32)
    assert plain.exponents is None
    assert loss(result.weight, weight, gram) < 0.9 * loss(plain.weight, weight, gram)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(INTEGERS),
    st.sampled_from(DTYPES),
    st.sampled_from([0, 0.1, 0.5, 0.95]),
    st.integers(0, 2**32),
)
def test_with_exponents_packing_finds_the_numbers(
    values: str, dtype: torch.dtype, zeros: float, seed: int
) -> None:
    random = torch.Generator().manual_seed(seed)
    weight = torch.randn(5, 72, generator=random) * 0.05
    weight[torch.rand(5, 72, generator=random) < zeros] = 0.0
    exponents = torch.randint(
        EXPONENTS.start, EXPONENTS.stop, (72,), generator=random
    ).to(torch.int8)
    result = on_grid(weight, values, dtype, exponents)
    assert torch.equal(on_grid(result, values, dtype, exponents), result)
    assert torch.equal(repacked(result, values, dtype, exponents), result)
    assert (
        exponents.tolist() == exponents_of_text(text_of_exponents(exponents)).tolist()
    )  # type: ignore[union-attr]


@pytest.mark.parametrize("values", INTEGERS)
def test_in_a_dense_weight_zero_is_a_number_like_the_others(values: str) -> None:
    weight, gram = weight_of(64, 64), gram_of(64)
    weight[:, 5] = 0.0
    result = rounded(weight, gram, values, torch.bfloat16)
    assert form_of(result.weight, values).layout == "dense"
    assert int(result.weight[:, 5].count_nonzero()) == 0  # but a pruned one stays
    assert not bool((result.weight.signbit() & (result.weight == 0)).any())
    if values == "int4":
        zero = (result.weight == 0) & (weight != 0)
        assert int(zero.sum()) > 0.02 * weight.numel()
        # training may move it away again
        assert int((result.unrounded[zero] != 0).sum()) > 0.5 * int(zero.sum())


@pytest.mark.parametrize("values", ["int4", "int3", "q4_0", "iq4_nl"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_both_loops_end_alike(
    values: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Threads change no bit; the orders of sums do, so a value in the middle of two numbers may go to either."""
    weight, gram = pruned(150, 80, Share(0.5)), gram_of(80)
    compiled = rounded(weight, gram, values, dtype).weight
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)  # what the kernel asks
    assert torch.equal(rounded(weight, gram, values, dtype).weight, compiled)
    for module in (rounding, descent):
        monkeypatch.setattr(module, "panel_kernel", lambda _: None)
    other = rounded(weight, gram, values, dtype).weight
    assert float((compiled == other).float().mean()) > 0.97
    assert loss(compiled, weight, gram) == pytest.approx(
        loss(other, weight, gram), rel=0.01
    )


@pytest.mark.parametrize("solver", ["wanda", "sparsegpt", "admm"])
def test_rounding_aims_at_the_dense_weight_if_values_are_not_fitted(
    solver: str,
) -> None:
    """Then it makes up for what the solver left."""
    weight, gram, pattern = weight_of(64, 192), gram_of(192), Share(0.5)
    entry = SOLVERS[solver]
    solution = prepared(entry)(weight, gram, pattern, **entry.check({}))
    near = [
        loss(
            rounded(
                solution.weight, gram, "int4", torch.bfloat16, target=target
            ).weight,
            weight,
            gram,
        )
        for target in (weight, solution.weight)
    ]
    assert solution.fitted is (solver == "admm")
    assert solution.fitted or near[0] < 0.97 * near[1]
