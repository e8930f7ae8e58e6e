"""The walk over the chain: read a block, prune it, run it, write it. It depends on no method and no model family."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch

from sparsellm.chain import Stream
from sparsellm.chain.matrices import kind_of
from sparsellm.machine import heap
from sparsellm.methods import BlockTask, LinearResult
from sparsellm.progress import Progress
from sparsellm.run.journal import BlockRecord, conditions
from sparsellm.run.magnitudes import Magnitudes, add, joined, magnitudes
from sparsellm.storage.reader import CheckpointReader
from sparsellm.sweep.integers import Integers

if TYPE_CHECKING:
    from sparsellm.run.run import Run


def walk(run: Run) -> None:
    """Prunes the chain block by block, each on the outputs of the pruned blocks before it.

    Args:
        run: its ``finished`` blocks are only run. Afterwards ``run.linears`` holds the results of all linears, and, if
            a sweep follows that cannot run the dense model any more, ``run.dense`` its stream behind the last block.
    """
    blocks = len(run.chain)
    run.linears = [result for record in run.finished for result in record.linears]
    counts = [record.magnitudes for record in run.finished]
    swept = run.choice.effort.passes > 0
    if len(run.finished) == blocks and not swept:
        run.magnitudes = joined(counts)
        _take_finished(run)
        return
    with run.clock.phase("embed"):
        streams = [replace(run.feed, windows=each).stream() for each in run.prepared.calibration_sets]
    if swept and run.chain.reader is None:  # its weights are overwritten, and the sweep follows what they predict
        with run.clock.phase("dense"):
            first = run.prepared.sweep_windows[0]
            run.dense = replace(run.feed, windows=first).stream()
            for index in range(blocks):
                replay([run.dense], index, None)
    for index in range(blocks):
        if index < len(run.finished):
            run.progress(Progress("replay", index, len(run.finished), f"block {index + 1}/{blocks}"))
            with run.clock.phase("replay"):
                replay(streams, index, run.journal.block(index), run.integers)
        else:
            results, counted = _prune_block(run, index, streams)
            run.linears += results
            counts.append(counted)
    for stream in streams:
        stream.close()
    run.magnitudes = joined(counts)


def _prune_block(run: Run, index: int, streams: list[Stream]) -> tuple[list[LinearResult], Magnitudes]:
    """Reads one block, prunes it on one of the streams, runs all through it, and writes it.

    Args:
        run: as of :func:`walk`.
        index: the number of the block.
        streams: the inputs of the block in the pruned model, one for each set of calibration windows.
    """
    chain, clock, blocks = run.chain, run.clock, len(run.chain)
    task: BlockTask | None = None
    counted: Magnitudes = {}
    linears_here, begun, last = len(chain.linears(index)), len(run.finished), run.linears[-1:]
    zeros_before = sum(each.zeros for each in run.linears)
    weights_before = sum(math.prod(each.shape) for each in run.linears)

    def report(step: str, part: float | None = None) -> None:
        results = [] if task is None else task.results
        if part is None:
            part = len(results) / (linears_here + 1)  # the outputs of the block take about one more
        known = [*last, *results]
        zeros = zeros_before + sum(each.zeros for each in results)
        weights = weights_before + sum(math.prod(each.shape) for each in results)
        run.progress(
            Progress(
                "prune",
                index - begun + part,
                blocks - begun,
                f"block {index + 1}/{blocks} {step}",
                known[-1].error if known else None,
                zeros / weights if weights else None,
            )
        )

    torch.manual_seed(block_seed(run.recipe.seed, index))
    with contextlib.ExitStack() as held:
        report("reading")
        with clock.phase("read"):
            held.enter_context(chain.block(index, run.start))
        with clock.phase("prune"):
            linears = [linear for linear in chain.linears(index) if linear.name in run.patterns]
            for linear in linears:
                add(counted, kind_of(chain, linear.name, index), "before", magnitudes(linear.parameter))
            task = BlockTask(
                index,
                linears,
                run.patterns,
                streams[index % len(streams)],
                report,
                clock,
                output_costs=run.costs,
                values=run.recipe.values,
                trained=run.integers is not None,
            )
            if linears:
                run.choice.method.function(task, **run.choice.options)
            chain.settle_block(index)
            results = task.finish()
            for linear in linears:
                add(counted, kind_of(chain, linear.name, index), "after", magnitudes(linear.parameter))
        if index + 1 < blocks:  # the output of the last block is not needed
            report("forward")
            with clock.phase("forward"):
                for stream in streams:
                    stream.advance(index)
        for linear in linears:
            if linear.name in task.unrounded:  # the sweep goes on from there; the block before it ran rounded
                linear.assign(task.unrounded[linear.name])
        if run.journal.writes:
            report("writing")
            with clock.phase("write"):
                record = BlockRecord(results, conditions(), clock.lap(), heap.peak_rss(), counted)
                run.journal.write_block(index, chain.block_tensors(index), record)
    report("is done", part=1)
    return results, counted


def _take_finished(run: Run) -> None:
    """Puts the finished blocks into a model in memory, which is dense as the user gave it; a chain on disk has them."""
    if run.chain.reader is not None:
        return
    for index in range(len(run.chain)):
        with run.chain.block(index, run.journal.block(index)):
            pass


def replay(
    streams: Sequence[Stream], index: int, weights: CheckpointReader | None, integers: Integers | None = None
) -> None:
    """Advances streams through a block that was pruned before, which is read once.

    Args:
        streams: the inputs of the block, at least one; afterwards, its outputs.
        index: the number of the block.
        weights: the shard of the pruned block; None for the dense one.
        integers: the linears that are rounded in memory, while the shard holds the values that a sweep goes on from.
    """
    chain = streams[0].chain
    with chain.block(index, weights):
        if integers is not None:
            integers.settle(chain, index)
        for stream in streams:
            stream.advance(index)


def block_seed(seed: int, index: int) -> int:
    """The seed of a block, independent of everything that ran before it."""
    return (seed * 1_000_003 + index) % (1 << 63)
