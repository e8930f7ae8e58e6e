import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsellm.decomposition import (
    Chunk,
    FeedForward,
    LazyChunks,
    Linear,
    Result,
    Settings,
    true_error,
)
from sparsellm.decomposition.objective import default_coefficients
from sparsellm.errors import DataError, NumericalError
from sparsellm.patterns import NM, Pattern
from sparsellm.solvers import Solution
from sparsellm.statistics import CrossAccumulator, Gram, GramAccumulator, least_squares
from sparsellm.storage.scratch import Scratch
from tests.decomposition.helpers import by_input_norm, prune_feed_forward, random_chunks, random_unit, refitted
from tests.shares import Share

HALF = Share(0.5)


def _same(one: FeedForward, other: FeedForward) -> bool:
    pairs = zip(one.linears().values(), other.linears().values(), strict=True)
    return all(torch.equal(a.weight, b.weight) and (a.bias is None or torch.equal(a.bias, b.bias)) for a, b in pairs)


def test_zero_iterations_are_local_pruning_bit_for_bit() -> None:
    unit = random_unit(8, 20, gated=False)
    chunks = random_chunks(unit, [40, 33, 50], weights=True)
    result = prune_feed_forward(unit, chunks[:2], [], by_input_norm, HALF, Settings(iterations=0))

    inputs = GramAccumulator(8, "cpu")
    for chunk in chunks[:2]:
        inputs.update(chunk.inputs, chunk.token_weights)
    up = by_input_norm(unit.up.weight, inputs.finish(), HALF)
    half = replace(unit, up=Linear(up.weight))
    hidden, cross = GramAccumulator(20, "cpu"), CrossAccumulator(8, 20, "cpu")
    for chunk in chunks[:2]:
        hidden.update(half.activations(chunk.inputs), chunk.token_weights)
        cross.update(chunk.targets, half.activations(chunk.inputs), chunk.token_weights)
    wanted = least_squares(hidden.finish(), cross.finish(), Settings().damping, prior=unit.down.weight).weight
    down = by_input_norm(wanted, hidden.finish(), HALF)
    assert _same(result.unit, replace(half, down=Linear(down.weight)))
    assert torch.equal(result.masks["down"], down.mask)
    assert result.chosen == 0
    assert result.error == pytest.approx(true_error(result.unit, chunks[:2]), rel=1e-3)
    judged = prune_feed_forward(unit, chunks[:2], chunks[2:], by_input_norm, HALF, Settings(iterations=0))
    assert judged.error == pytest.approx(true_error(result.unit, chunks[2:]))
    everything = prune_feed_forward(unit, chunks, [], by_input_norm, HALF, Settings(iterations=0))
    torch.testing.assert_close(judged.unit.down.weight, everything.unit.down.weight)  # fitted to what judged it too


@pytest.mark.parametrize("bias", [False, True])
def test_alternating_lowers_the_error_and_keeps_the_pattern(bias: bool) -> None:
    unit = random_unit(24, 96, gated=False, bias=bias)
    chunks = random_chunks(unit, [500, 500, 500])
    result = prune_feed_forward(unit, chunks[:2], chunks[2:], refitted, HALF, Settings(damping=0.01))
    assert result.error < result.history[0].error
    assert result.error == min(record.error for record in result.history)
    for role, linear in result.unit.linears().items():
        assert int((linear.weight == 0).sum()) == linear.weight.numel() // 2
        assert not linear.weight[~result.masks[role]].any()
        assert (linear.bias is None) == (not bias)
    record = result.history[result.chosen]
    assert record.objective is not None
    assert record.objective > 0


def test_the_objective_falls_from_iteration_to_iteration_where_nothing_is_pruned() -> None:
    unit = random_unit(6, 10, gated=False)
    other = random_unit(6, 10, gated=False, seed=5)
    chunks = [Chunk(chunk.inputs, other(chunk.inputs)) for chunk in random_chunks(unit, [300, 100])]
    settings = Settings(iterations=6, patience=9, damping=1e-6)
    result = prune_feed_forward(unit, chunks[:1], chunks[1:], by_input_norm, Share(0.0), settings)
    totals = [record.objective for record in result.history if record.objective]
    assert all(later < earlier for earlier, later in itertools.pairwise(totals))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("outlier", [1000.0, 1e5])
def test_divergence_ends_no_worse_than_local(gated: bool, outlier: float) -> None:
    unit = random_unit(10, 24, gated=gated, bias=not gated)
    chunks = random_chunks(unit, [60, 60, 60], outlier=outlier)
    settings = Settings.of_the_paper(6, 1.0, "gradient" if outlier > 1e4 else "pseudo-inverse", safeguard=True)
    result = prune_feed_forward(unit, chunks[:2], [], by_input_norm, HALF, settings)
    assert result.error <= result.history[0].error
    assert true_error(result.unit, chunks[:2]) == pytest.approx(result.error, rel=1e-2)
    for linear in result.unit.linears().values():
        assert torch.isfinite(linear.weight).all()


def test_a_solver_that_fails_later_leaves_the_iterates_before_it() -> None:
    calls = 0

    def failing(weight: torch.Tensor, gram: Gram, pattern: Pattern) -> Solution:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise NumericalError("factorisation failed")
        return by_input_norm(weight, gram, pattern)

    unit = random_unit(6, 9, gated=False)
    chunks = random_chunks(unit, [40, 40])
    result = prune_feed_forward(unit, chunks[:1], [], failing, HALF)
    local = prune_feed_forward(unit, chunks[:1], [], by_input_norm, HALF, Settings(iterations=0))
    assert _same(result.unit, local.unit)
    assert result.history[-1].notes == ("factorisation failed",)
    assert math.isinf(result.history[-1].error)


@pytest.mark.parametrize("pattern", [Share(0.7), NM(2, 4)])
def test_runs_repeat_bit_for_bit(pattern: Pattern) -> None:
    unit = random_unit(8, 16, gated=False)
    chunks = random_chunks(unit, [50, 50])

    def run() -> Result:
        return prune_feed_forward(unit, chunks[:1], chunks[1:], by_input_norm, pattern, Settings(iterations=3))

    one, other = run(), run()
    assert _same(one.unit, other.unit)
    assert [r.error for r in one.history] == [r.error for r in other.history]


def test_inputs_are_left_alone() -> None:
    unit = random_unit(6, 12, gated=False, bias=True)
    chunks = random_chunks(unit, [30, 30], weights=True)
    before = [linear.weight.clone() for linear in unit.linears().values()]
    held = [(chunk.inputs.clone(), chunk.targets.clone()) for chunk in chunks]
    prune_feed_forward(unit, chunks[:1], chunks[1:], by_input_norm, HALF)
    assert all(torch.equal(a, b.weight) for a, b in zip(before, unit.linears().values(), strict=True))
    assert all(torch.equal(a, c.inputs) and torch.equal(b, c.targets) for (a, b), c in zip(held, chunks, strict=True))


def test_one_chunk_or_many_is_the_same_but_for_rounding() -> None:
    unit = random_unit(8, 16, gated=False, bias=True)
    (whole,) = random_chunks(unit, [120], weights=True)
    held = random_chunks(unit, [60], seed=7)
    assert whole.token_weights is not None
    many = [
        Chunk(*parts)
        for parts in zip(whole.inputs.split(17), whole.targets.split(17), whole.token_weights.split(17), strict=True)
    ]
    settings = Settings(iterations=2, coefficients=default_coefficients(unit, whole.inputs, whole.targets))
    one = prune_feed_forward(unit, [whole], held, by_input_norm, HALF, settings)
    other = prune_feed_forward(unit, many, held, by_input_norm, HALF, settings)
    for a, b in zip(one.history, other.history, strict=True):
        assert a.error == pytest.approx(b.error, rel=2e-2)  # a rounding may move a mask entry
    assert one.history[0].error == pytest.approx(other.history[0].error, rel=1e-4)


def test_tokens_and_variables_may_lie_in_files(tmp_path: Path) -> None:
    unit = random_unit(8, 16, gated=False)
    chunks = random_chunks(unit, [50, 31, 40])
    memory = prune_feed_forward(unit, chunks[:2], chunks[2:], by_input_norm, HALF)
    scratch = Scratch(0, tmp_path)  # no room in memory
    inputs, targets = scratch.store(), scratch.store()
    for chunk in chunks[:2]:
        inputs.append(chunk.inputs)
        targets.append(chunk.targets)
    stored = LazyChunks.stored(inputs, targets)
    files = prune_feed_forward(unit, stored, chunks[2:], by_input_norm, HALF, scratch=scratch)
    assert inputs.bytes_on_disk == sum(chunk.inputs.nbytes for chunk in chunks[:2])
    assert _same(memory.unit, files.unit)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("tokens", "d", "f"), [(1, 4, 8), (3, 8, 4), (2, 1, 5), (7, 6, 6)])
def test_few_tokens_and_odd_shapes(tokens: int, d: int, f: int) -> None:
    unit = random_unit(d, f, gated=False, bias=True)
    chunks = random_chunks(unit, [tokens, tokens])
    result = prune_feed_forward(unit, chunks[:1], chunks[1:], by_input_norm, HALF)
    assert result.error <= result.history[0].error
    assert prune_feed_forward(unit, chunks, [], by_input_norm, HALF).error >= -1e-6


def test_patterns_by_role_and_token_weights_of_zero() -> None:
    unit = random_unit(8, 16, gated=False)
    chunks = random_chunks(unit, [40, 40])
    silent = Chunk(torch.full((5, 8), 1e3), torch.zeros(5, 8), torch.zeros(5))
    patterns: dict[str, Pattern] = {"up": NM(2, 4), "down": Share(0.75)}
    result = prune_feed_forward(unit, [chunks[0], silent], chunks[1:], by_input_norm, patterns, Settings(iterations=1))
    zeros = {role: int((linear.weight == 0).sum()) for role, linear in result.unit.linears().items()}
    assert zeros == {"up": 64, "down": 96}


def test_errors_name_what_is_wrong() -> None:
    unit = random_unit(4, 6, gated=False)
    with pytest.raises(DataError, match="no training tokens"):
        prune_feed_forward(unit, [], [], by_input_norm, HALF)
    broken = Chunk(torch.full((3, 4), torch.nan), torch.zeros(3, 4))
    with pytest.raises(NumericalError):
        prune_feed_forward(unit, [broken], [broken], by_input_norm, HALF)


def test_split_spreads_whole_chunks() -> None:
    chunks = [Chunk(torch.full((2, 1), float(i)), torch.zeros(2, 1)) for i in range(16)]
    train, held = LazyChunks.of(chunks).split()
    assert [float(held[i].inputs[0, 0]) for i in range(len(held))] == [4.0, 12.0]
    assert len(train) == 14
    train, held = LazyChunks.of([Chunk(torch.arange(16.0)[:, None], torch.zeros(16, 1), torch.ones(16))]).split()
    assert (len(train[0].inputs), len(held[0].inputs)) == (14, 2)
    assert [len(part) for part in LazyChunks.of(chunks[:2]).split()] == [1, 1]
