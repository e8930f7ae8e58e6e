"""The survey of the dense model, which allocates the zeros, and the walk over the chain: read, prune and run a block.
The walk depends on no method and no model family."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from sparsellm import machine, parallel
from sparsellm.errors import RecipeError
from sparsellm.files.reader import CheckpointReader
from sparsellm.method.allocation import Allocation, LinearSize, Survey
from sparsellm.method.allocation.allocator import divide_zeros
from sparsellm.method.allocation.exact import round_to_groups
from sparsellm.method.blocks import BlockTask
from sparsellm.method.sweep.gradients import (
    LEAST_WINDOWS,
    TOKENS,
    LossGradients,
    loss_gradients,
)
from sparsellm.method.sweep.integers import Integers
from sparsellm.model import Chain, Feed, Stream
from sparsellm.patterns import Pattern
from sparsellm.progress import PhaseClock, Progress, ProgressCallback
from sparsellm.records import KEEP, LinearResult, Totals
from sparsellm.run.choice import patterns_of, sizes_of
from sparsellm.run.forms import choose_forms
from sparsellm.run.journal import ALLOCATION, BlockRecord, Journal, conditions
from sparsellm.run.plan import Plan


@dataclass(frozen=True)
class Targets:
    """What the walk aims at: by the name of a linear, its pattern, what its values are rounded to, and ``E[g_i²]`` of
    its outputs (empty if the method needs none); and what an allocation chose (None for uniform zeros)."""

    patterns: dict[str, Pattern]
    values: dict[str, str]
    costs: dict[str, Tensor]
    allocation: Allocation | None


def survey(
    plan: Plan, feed: Feed, journal: Journal, walked: bool, clock: PhaseClock
) -> Targets:
    """The targets of a run, those of its first start if it is resumed; no output costs if all blocks are ``walked``."""
    choice = plan.choice
    sizes = sizes_of(plan.chain, plan.recipe)
    feed = replace(feed, blocks=plan.model.start)
    allocation = journal.allocation() if choice.allocates else None
    costs = journal.output_costs() if choice.needs.output_costs and not walked else {}
    allocates = choice.allocates and allocation is None
    saliency = allocates and choice.allocation_needs.gradient_tokens > 0
    gradients: LossGradients | None = None
    if saliency or costs is None:
        with clock.phase("gradients"):
            tokens = choice.allocation_needs.gradient_tokens or TOKENS
            first = feed.first(tokens, LEAST_WINDOWS)
            names = frozenset(size.name for size in sizes)
            gradients = loss_gradients(first, names, saliency=saliency)
        if choice.needs.output_costs:
            costs = gradients.output_squares
            # first: a saved allocation implies saved costs
            journal.keep_output_costs(costs)
    if allocates:
        with clock.phase("allocation"):
            if plan.recipe.bits is None:
                chosen = _allocate(plan, feed, sizes, gradients)
            else:
                chosen = choose_forms(
                    feed,
                    sizes,
                    gradients=gradients,
                    choice=plan.choice,
                    recipe=plan.recipe,
                )
            allocation = parallel.broadcast(chosen)
            journal.keep(ALLOCATION, allocation)
    patterns = patterns_of(plan.chain, plan.recipe, allocation)
    values = dict.fromkeys(patterns, plan.recipe.rounding)
    if allocation is not None and allocation.values:
        values = allocation.values
    return Targets(patterns, values, costs=costs or {}, allocation=allocation)


def _allocate(
    plan: Plan, feed: Feed, sizes: list[LinearSize], gradients: LossGradients | None
) -> Allocation:
    """The allocation of all zeros: fixed ones by the recipe, the others by the allocation that it names."""
    parts = divide_zeros(sizes, plan.recipe.sparsity)
    if not parts.free:
        return parts.allocation()
    surveyed = Survey(feed, parts.free, parts.sparsity, parts.zeros, gradients)
    chosen = plan.choice.allocator.function(surveyed, **plan.choice.allocation_options)
    if wrong := parts.wrong(chosen):
        raise RecipeError(
            f"allocation {plan.choice.allocator.name} {wrong}; use from_sparsities(survey, sparsities)"
        )
    result = parts.allocation(chosen)
    m = plan.recipe.chosen_of
    if m is None:
        return result
    zeros = round_to_groups(
        [result.zeros[x.name] for x in parts.free],
        [x.weights for x in parts.free],
        m,
        parts.zeros,
    )
    return Allocation.of(parts.free, zeros, result.report)


def walk(
    plan: Plan,
    targets: Targets,
    streams: Sequence[Stream],
    begin: int,
    finished: Sequence[LinearResult],
    clock: PhaseClock,
    progress: ProgressCallback,
) -> Iterator[BlockRecord]:
    """Prunes block after block from ``begin`` on, each on the outputs of the pruned blocks before it; yields the record
    of each while it is loaded with the weights to be written. ``streams`` are the inputs of that block, one for each
    set of calibration windows, which blocks take in turn; ``finished`` are the results of the linears before it."""
    chain = plan.chain
    done = list(finished)
    blocks = len(plan.chain)

    def tell(
        index: int, here: Sequence[LinearResult], step: str, part: float | None = None
    ) -> None:
        """Reports a step in block ``index``, which has the results ``here`` so far."""
        known = [*done, *here]
        sparsity = Totals.of(known).sparsity if known else None
        if part is None:
            # the outputs of the block take about one more
            part = len(here) / (len(chain.linears(index)) + 1)
        error = known[-1].error if known else None
        said = f"block {index + 1}/{blocks} {step}"
        last = known[-1].name if known else ""
        progress(
            Progress(
                "prune",
                index - begin + part,
                blocks - begin,
                said,
                error,
                sparsity,
                linear=last,
            )
        )

    for index in range(begin, blocks):
        # whatever ran before
        torch.manual_seed((plan.recipe.seed * 1_000_003 + index) % (1 << 63))
        results: list[LinearResult] = []
        report = partial(tell, index, results)
        with contextlib.ExitStack() as held:
            report("reading")
            with clock.phase("read"):
                held.enter_context(chain.block(index, plan.model.start))
            linears = [
                linear
                for linear in chain.linears(index)
                if linear.name in targets.patterns
            ]
            trained = plan.choice.trains_integers(plan.recipe)
            task = BlockTask(
                index,
                linears,
                patterns=targets.patterns,
                stream=streams[index % len(streams)],
                report=report,
                clock=clock,
                results=results,
                output_costs=targets.costs,
                values_of=targets.values,
                trained=trained,
            )
            with clock.phase("prune"):
                if linears:
                    plan.choice.method.function(task, **plan.choice.options)
                chain.settle_block(index)
                task.finish()
            plan.budget.check_block()
            if index + 1 < blocks:  # the output of the last block is not needed
                report("forward")
                with clock.phase("forward"):
                    for stream in streams:
                        stream.advance(index)
            for linear in linears:
                # the sweep goes on from there; this block ran rounded
                if linear.name in task.unrounded:
                    linear.assign(task.unrounded[linear.name])
            report("writing")
            yield BlockRecord(
                linears=list(results),
                versions=conditions(),
                seconds=clock.lap(),
                peak_rss=machine.peak_rss(),
            )
        done += results
        tell(index, (), "is done", part=1)


def integers_of(plan: Plan, linears: Sequence[LinearResult]) -> Integers | None:
    """The linears whose values are rounded in a sweep; None if the values are kept or no sweep follows."""
    if not plan.choice.trains_integers(plan.recipe):
        return None
    rounded = [linear for linear in linears if linear.values != KEEP]
    return Integers(
        plan.chain,
        values={linear.name: linear.values for linear in rounded},
        exponents={linear.name: linear.exponents for linear in rounded},
    )


def replay(
    chain: Chain,
    streams: list[Stream],
    index: int,
    weights: CheckpointReader | None,
    integers: Integers | None = None,
) -> None:
    """Advances streams through block ``index``, read from the shard of the pruned block, or the dense one if that is
    None. ``integers`` are rounded in memory, while the shard has the values that a sweep goes on from."""
    with chain.block(index, weights):
        if integers is not None:
            integers.settle(index)
        for stream in streams:
            stream.advance(index)
