"""The survey of the dense model, which allocates the zeros, and the walk over the chain: read, prune, run and write a
block. Neither depends on a method or a model family."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from pydantic import JsonValue
from torch import Tensor

from sparsellm import machine, parallel
from sparsellm.errors import RecipeError
from sparsellm.files.reader import CheckpointReader
from sparsellm.method.allocation import Allocation, HeadForm, LinearSize, Survey
from sparsellm.method.allocation.allocator import divide_zeros
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
from sparsellm.recipe import Recipe
from sparsellm.records import KEEP, LinearResult, Totals
from sparsellm.run.budget import Budget
from sparsellm.run.choice import Choice, patterns_of, sizes_of
from sparsellm.run.decided import Decided
from sparsellm.run.form_choice import choose_forms
from sparsellm.run.journal import ALLOCATION, BlockRecord, Journal, conditions
from sparsellm.run.opening import Models


@dataclass(frozen=True)
class Targets:
    """What the walk aims at, by the name of a linear."""

    patterns: dict[str, Pattern]
    values: dict[str, str]  # what its values are rounded to
    # E[g_i²] of its outputs; empty if the method needs none
    costs: dict[str, Tensor]
    report: dict[str, JsonValue]  # that of the allocation; empty for uniform zeros
    heads: dict[str, HeadForm]  # by tensor of embedding and head; empty if they stay


def survey(
    models: Models,
    decided: Decided,
    feed: Feed,
    journal: Journal,
    walked: bool,
    clock: PhaseClock,
) -> Targets:
    """The targets of a run, those of its first start if it is resumed; no output costs if all blocks are ``walked``."""
    choice = decided.choice
    sizes = sizes_of(models.chain, decided.recipe)
    feed = replace(feed, blocks=models.start)
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
            if decided.recipe.program is None:
                chosen = _allocate(choice, decided.recipe, feed, sizes, gradients)
            else:
                chosen = choose_forms(
                    feed,
                    sizes,
                    gradients=gradients,
                    choice=choice,
                    recipe=decided.recipe,
                )
            allocation = parallel.broadcast(chosen)
            journal.keep(ALLOCATION, allocation)
    if models.start is not None:
        models.chain.forget_shared()  # the walk reads the teacher's first
    patterns = patterns_of(models.chain, decided.recipe, allocation)
    values = dict.fromkeys(patterns, decided.recipe.rounding)
    report: dict[str, JsonValue] = {}
    heads: dict[str, HeadForm] = {}
    if allocation is not None:
        heads = allocation.heads
        values = allocation.values or values
        report = {**allocation.report, "name": choice.allocator.name}
    return Targets(patterns, values, costs=costs or {}, report=report, heads=heads)


def _allocate(
    choice: Choice,
    recipe: Recipe,
    feed: Feed,
    sizes: list[LinearSize],
    gradients: LossGradients | None,
) -> Allocation:
    """The allocation of all zeros: fixed ones by the recipe, the others by the allocation that it names."""
    parts = divide_zeros(sizes, recipe.sparsity)
    if not parts.free:
        return parts.allocation()
    surveyed = Survey(feed, parts.free, parts.sparsity, parts.zeros, gradients)
    chosen = choice.allocator.function(surveyed, **choice.allocation_options)
    if wrong := parts.wrong(chosen):
        raise RecipeError(
            f"allocation {choice.allocator.name} {wrong}; use from_sparsities(survey, sparsities)"
        )
    return parts.allocation(chosen)


def dense_end(
    models: Models, decided: Decided, feed: Feed, clock: PhaseClock
) -> Stream | None:
    """The stream behind the last block of the dense model, for a sweep that cannot run this model any more: pruning
    overwrites the weights of a model in memory, and a teacher may have other shapes. None if no sweep needs it."""
    teacher = models.teacher
    runs_later = models.chain.reader is not None and teacher is None
    if not decided.choice.passes or runs_later:
        return None
    with clock.phase("dense"):
        dense = teacher or models.chain
        windows = decided.windows.swept[0]
        stream = replace(feed, chain=dense, windows=windows).stream()
        for index in range(len(dense)):
            replay(dense, [stream], index, None)
    return stream


def walk(
    models: Models,
    decided: Decided,
    targets: Targets,
    feed: Feed,
    budget: Budget,
    journal: Journal,
    finished: Sequence[BlockRecord],
    clock: PhaseClock,
) -> list[BlockRecord]:
    """Prunes and writes the blocks that are not ``finished``, each on the outputs of the pruned blocks before it.
    Returns the records of all blocks."""
    chain = models.chain
    records = list(finished)
    budget.expect_block(chain)
    streams: list[Stream] = []
    with clock.phase("embed"):
        # one for each set of calibration windows
        if len(finished) < len(chain):
            for windows in decided.windows.own:
                streams.append(replace(feed, windows=windows).stream())
    integers = integers_of(chain, decided, finished)
    # A model in memory, which is dense as the user gave it, gets its finished blocks even if none is left to prune.
    replayed = len(finished) if streams or chain.reader is None else 0
    for index in range(replayed):
        said = f"block {index + 1}/{len(chain)}"
        feed.progress(Progress("replay", index, replayed, said))
        with clock.phase("replay"):
            replay(chain, streams, index, journal.block(index), integers)
    tell = _Teller(feed.progress, blocks=len(chain), begin=len(finished))
    for record in finished:
        tell.done += record.linears
    for index in range(len(finished), len(chain)):
        # whatever ran before
        torch.manual_seed((decided.recipe.seed * 1_000_003 + index) % (1 << 63))
        with contextlib.ExitStack() as held:
            tell.step(index, "reading")
            with clock.phase("read"):
                held.enter_context(chain.block(index, models.start))
            task = _task(chain, decided, targets, index, streams, tell, clock)
            _prune(task, decided.choice, clock)
            budget.check_block()
            if index + 1 < len(chain):  # the output of the last block is not needed
                task.report("forward")
                with clock.phase("forward"):
                    for stream in streams:
                        stream.advance(index)
            for linear in task.linears:
                # the sweep goes on from there; this block ran rounded
                if linear.name in task.unrounded:
                    linear.assign(task.unrounded[linear.name])
            task.report("writing")
            record = BlockRecord(
                linears=list(task.results),
                versions=conditions(),
                seconds=clock.lap(),
                peak_rss=machine.peak_rss(),
            )
            if journal.writes:
                with clock.phase("write"):
                    journal.write_block(index, chain.block_tensors(index), record)
        records.append(record)
        tell.done += record.linears
        tell.step(index, "is done", part=1)
    for stream in streams:
        stream.close()
    return records


def _task(
    chain: Chain,
    decided: Decided,
    targets: Targets,
    index: int,
    streams: Sequence[Stream],
    tell: _Teller,
    clock: PhaseClock,
) -> BlockTask:
    """What a method is given to prune the loaded block ``index``."""
    results: list[LinearResult] = []
    return BlockTask(
        index,
        [linear for linear in chain.linears(index) if linear.name in targets.patterns],
        patterns=targets.patterns,
        stream=streams[index % len(streams)],
        report=partial(tell.within, index, len(chain.linears(index)), results),
        clock=clock,
        results=results,
        output_costs=targets.costs,
        values_of=targets.values,
        trained=decided.choice.trains_integers(decided.recipe),
    )


def _prune(task: BlockTask, choice: Choice, clock: PhaseClock) -> None:
    """Prunes the block of a task by the method that was chosen."""
    with clock.phase("prune"):
        if task.linears:
            choice.method.function(task, **choice.options)
        task.stream.chain.settle_block(task.index)
        task.finish()


@dataclass
class _Teller:
    """Tells the progress of a walk that begins with block ``begin``."""

    progress: ProgressCallback
    blocks: int
    begin: int
    done: list[LinearResult] = field(default_factory=list)  # results of earlier blocks

    def step(self, index: int, step: str, part: float = 0.0) -> None:
        """Tells a step in block ``index``, of which a ``part`` is done."""
        self._tell(index, self.done, step, part)

    def within(
        self, index: int, linears: int, here: Sequence[LinearResult], step: str
    ) -> None:
        """Tells a step in block ``index``, which has ``here`` as results so far, and ``linears`` to prune."""
        # the outputs of the block take about as long as one more
        self._tell(index, [*self.done, *here], step, len(here) / (linears + 1))

    def _tell(
        self, index: int, known: list[LinearResult], step: str, part: float
    ) -> None:
        sparsity = None
        error = None
        last = ""
        if known:
            sparsity = Totals.of(known).sparsity
            error = known[-1].error
            last = known[-1].name
        self.progress(
            Progress(
                "prune",
                index - self.begin + part,
                self.blocks - self.begin,
                f"block {index + 1}/{self.blocks} {step}",
                error,
                sparsity,
                linear=last,
            )
        )


def integers_of(
    chain: Chain, decided: Decided, records: Sequence[BlockRecord]
) -> Integers | None:
    """The linears whose values are rounded in a sweep; None if the values are kept or no sweep follows."""
    if not decided.choice.trains_integers(decided.recipe):
        return None
    rounded = [
        linear
        for record in records
        for linear in record.linears
        if linear.values != KEEP
    ]
    return Integers(
        chain,
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
