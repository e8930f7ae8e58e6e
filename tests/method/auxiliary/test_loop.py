import itertools
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sparsellm.errors import NumericalError
from sparsellm.files.scratch import Room, Scratch
from sparsellm.method.auxiliary.loop import LoopSettings
from sparsellm.method.auxiliary.objective import (
    Chunk,
    Linear,
    split,
    stored,
    true_error,
)
from sparsellm.method.gram import CrossAccumulator, Gram, GramAccumulator, least_squares
from sparsellm.method.solvers import Solution
from sparsellm.patterns import NM, Pattern
from tests.method.auxiliary.helpers import (
    assert_same,
    by_input_norm,
    prune,
    random_chunks,
    random_unit,
    read,
    refitted,
)
from tests.shares import Share

HALF = Share(0.5)


def test_zero_iterations_are_local_pruning_bit_for_bit() -> None:
    unit = random_unit(8, 20)
    chunks = random_chunks(unit, [40, 33, 50], weights=True)
    local = LoopSettings(iterations=0)
    pruned, _ = prune(unit, chunks[:2], [], by_input_norm, HALF, local)
    inputs = GramAccumulator(8)
    for chunk in (load() for load in chunks[:2]):
        inputs.update(chunk.inputs, chunk.token_weights)
    half = replace(
        unit, up=Linear(by_input_norm(unit.up.weight, inputs.finish(), HALF).weight)
    )
    hidden, cross = GramAccumulator(20), CrossAccumulator(8, 20)
    for chunk in (load() for load in chunks[:2]):
        hidden.update(half.activations(chunk.inputs), chunk.token_weights)
        cross.update(chunk.targets, half.activations(chunk.inputs), chunk.token_weights)
    goal = least_squares(
        hidden.finish(), cross.finish(), local.damping, prior=unit.down.weight
    ).weight
    down = by_input_norm(goal, hidden.finish(), HALF)
    assert_same(pruned.unit, replace(half, down=Linear(down.weight)))
    assert torch.equal(pruned.masks["down"], down.mask)
    assert pruned.error == true_error(pruned.unit, chunks[:2])
    judged, _ = prune(unit, chunks[:2], chunks[2:], by_input_norm, HALF, local)
    assert judged.error == true_error(pruned.unit, chunks[2:])
    everything, _ = prune(unit, chunks, [], by_input_norm, HALF, local)
    assert_same(judged.unit, everything.unit)  # fitted to what judged it too


@pytest.mark.parametrize("bias", [False, True])
def test_alternating_lowers_the_error_and_keeps_the_pattern(bias: bool) -> None:
    unit = random_unit(24, 96, bias=bias)
    chunks = random_chunks(unit, [500, 500, 500])
    pruned, history = prune(
        unit, chunks[:2], chunks[2:], refitted, HALF, LoopSettings(damping=0.01)
    )
    errors = [step.held_out_error for step in history]
    assert pruned.error == min(errors) < errors[0]
    for role, linear in pruned.unit.linears().items():
        assert int((linear.weight == 0).sum()) == linear.weight.numel() // 2
        assert not linear.weight[~pruned.masks[role]].any()
        assert (linear.bias is None) == (not bias)
    if bias:  # the first half follows the dense products, in the mean too
        mean = torch.cat([load().inputs for load in chunks]).mean(dim=0)
        dense, up = unit.up, pruned.unit.up
        torch.testing.assert_close(
            up.weight @ mean + up.bias, dense.weight @ mean + dense.bias
        )
    (chosen,) = (step for step in history if step.chosen)
    assert chosen.held_out_error == pruned.error
    assert chosen.objective > 0


def test_the_objective_falls_where_nothing_is_pruned() -> None:
    unit, other = random_unit(6, 10), random_unit(6, 10, seed=5)
    x, held = (load().inputs for load in random_chunks(unit, [300, 100]))
    train, held_out = stored([x], [other(x)]), stored([held], [other(held)])
    settings = LoopSettings(iterations=6, patience=9, damping=1e-6)
    _, history = prune(unit, train, held_out, by_input_norm, Share(0.0), settings)
    totals = [step.objective for step in history if step.objective]
    assert all(later < earlier for earlier, later in itertools.pairwise(totals))


def test_a_solver_that_fails_later_leaves_the_iterates_before_it() -> None:
    calls = 0

    def failing(weight: torch.Tensor, gram: Gram, pattern: Pattern) -> Solution:
        nonlocal calls
        calls += 1
        if calls > 2:
            raise NumericalError("factorisation failed")
        return by_input_norm(weight, gram, pattern)

    unit = random_unit(6, 9)
    chunks = random_chunks(unit, [40])
    pruned, history = prune(unit, chunks, [], failing, HALF)
    local, _ = prune(unit, chunks, [], by_input_norm, HALF, LoopSettings(iterations=0))
    assert_same(pruned.unit, local.unit)
    assert [step.train_error for step in history] == [local.error, math.inf]


def test_tokens_and_variables_may_lie_in_files(tmp_path: Path) -> None:
    unit = random_unit(8, 16)
    chunks = random_chunks(unit, [50, 31, 40])
    memory, _ = prune(unit, chunks[:2], chunks[2:], by_input_norm, HALF)
    scratch = Scratch(Room(0), tmp_path)  # no room in memory
    inputs, targets = scratch.store(), scratch.store()
    for chunk in (load() for load in chunks[:2]):
        inputs.append(chunk.inputs)
        targets.append(chunk.targets)
    files, _ = prune(
        unit, stored(inputs, targets), chunks[2:], by_input_norm, HALF, scratch=scratch
    )
    assert_same(memory.unit, files.unit)
    assert not list(tmp_path.iterdir())


def test_patterns_by_role_and_token_weights_of_zero() -> None:
    unit = random_unit(8, 16)
    chunks = random_chunks(unit, [40, 40])
    silent = Chunk(torch.full((5, 8), 1e3), torch.zeros(5, 8), torch.zeros(5))
    patterns: dict[str, Pattern] = {"up": NM(2, 4), "down": Share(0.75)}
    pruned, _ = prune(
        unit,
        [chunks[0], *read([silent])],
        chunks[1:],
        by_input_norm,
        patterns,
        LoopSettings(iterations=1),
    )
    zeros = {
        role: int((linear.weight == 0).sum())
        for role, linear in pruned.unit.linears().items()
    }
    assert zeros == {"up": 64, "down": 96}


def test_what_is_not_finite_at_first_is_an_error() -> None:
    broken = read([Chunk(torch.full((3, 4), torch.nan), torch.zeros(3, 4))])
    with pytest.raises(NumericalError):
        prune(random_unit(4, 6), broken, broken, by_input_norm, HALF)


def test_split_spreads_whole_chunks() -> None:
    chunks = read(
        [Chunk(torch.full((2, 1), float(i)), torch.zeros(2, 1)) for i in range(16)]
    )
    train, held = split(chunks)
    assert [float(load().inputs[0, 0]) for load in held] == [4.0, 12.0]
    assert len(train) == 14
    train, held = split(
        read([Chunk(torch.arange(16.0)[:, None], torch.zeros(16, 1), torch.ones(16))])
    )
    assert (len(train[0]().inputs), len(held[0]().inputs)) == (14, 2)
    assert [len(part) for part in split(chunks[:2])] == [1, 1]
