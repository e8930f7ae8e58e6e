"""The walk over the chain: read a block, prune it, run it, write it. It depends on no method and no model family."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
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

if TYPE_CHECKING:
    from sparsellm.run.run import Run


def walk(run: Run) -> None:
    """Prunes the chain block by block, each on the outputs of the pruned blocks before it.

    Args:
        run: its ``finished`` blocks are only run. Afterwards ``run.linears`` holds the results of all linears, and, if
            a sweep follows, ``run.dense`` the dense model's stream behind the last block.
    """
    blocks = len(run.chain)
    run.linears = [result for record in run.finished for result in record.linears]
    counts = [record.magnitudes for record in run.finished]
    swept = run.choice.needs.passes > 0
    if len(run.finished) == blocks and not swept:
        run.magnitudes = joined(counts)
        _take_finished(run)
        return
    with run.clock.phase("embed"):
        stream = run.feed.stream()
        dense = stream.fork() if swept else None  # the sweep fits the pruned model to the dense one
    for index in range(blocks):
        if index < len(run.finished):
            run.progress(Progress("prune", index, blocks, f"block {index + 1}/{blocks} is finished; forward"))
            with run.clock.phase("replay"):
                if dense is not None:
                    replay(dense, index, None)
                replay(stream, index, run.journal.block(index))
        else:
            results, counted = _prune_block(run, index, stream, dense)
            run.linears += results
            counts.append(counted)
    stream.close()
    run.magnitudes = joined(counts)
    run.dense = dense


def _prune_block(run: Run, index: int, stream: Stream, dense: Stream | None) -> tuple[list[LinearResult], Magnitudes]:
    """Reads one block, prunes it, runs the streams through it, and writes it."""
    chain, clock, blocks, name = run.chain, run.clock, len(run.chain), run.recipe.method
    title = f"block {index + 1}/{blocks} {name}"
    detail = ""
    counted: Magnitudes = {}

    def report(step: str) -> None:
        run.progress(Progress("prune", index, blocks, f"{title} {step}{detail}"))

    torch.manual_seed(block_seed(run.recipe.seed, index))
    with contextlib.ExitStack() as held:
        report("reading")
        with clock.phase("read"):
            held.enter_context(chain.block(index))
            if run.read_ahead:
                chain.read_ahead(index + 1)
        with clock.phase("prune"):
            linears = [linear for linear in chain.linears(index) if linear.name in run.patterns]
            for linear in linears:
                add(counted, kind_of(chain, linear.name, index), "before", magnitudes(linear.parameter))
            task = BlockTask(index, linears, run.patterns, stream, report, clock, output_costs=run.costs)
            if dense is not None:
                report("dense forward")
                with clock.phase("prune/dense"):
                    dense.advance(index)  # before pruning, while the block is dense
            if linears:
                run.choice.method.function(task, **run.choice.options)
            chain.settle_block(index)
            results = task.finish()
            for linear in linears:
                add(counted, kind_of(chain, linear.name, index), "after", magnitudes(linear.parameter))
        detail = _mean_error(results)
        if index + 1 < blocks:  # the output of the last block is not needed
            report("forward")
            with clock.phase("forward"):
                stream.advance(index)
        if run.journal.writes:
            report("writing")
            with clock.phase("write"):
                record = BlockRecord(results, conditions(), clock.lap(), heap.peak_rss(), counted)
                run.journal.write_block(index, chain.block_tensors(index), record)
    run.progress(Progress("prune", index + 1, blocks, f"{title}{detail}"))
    return results, counted


def _take_finished(run: Run) -> None:
    """Puts the finished blocks into a model in memory, which is dense as the user gave it; a chain on disk has them."""
    if run.chain.weights is not None:
        return
    for index in range(len(run.chain)):
        with run.chain.block(index, run.journal.block(index)):
            pass


def _mean_error(results: Sequence[LinearResult]) -> str:
    """The mean error of a block's linears, as text for the progress."""
    errors = [result.error for result in results]
    return f" · error {sum(errors) / len(errors):.3f}" if errors else ""


def replay(stream: Stream, index: int, weights: CheckpointReader | None) -> None:
    """Advances a stream through a block that was pruned before.

    Args:
        stream: the inputs of the block; afterwards, its outputs.
        index: the number of the block.
        weights: the shard of the pruned block; None for the dense one.
    """
    with stream.chain.block(index, weights):
        stream.advance(index)


def block_seed(seed: int, index: int) -> int:
    """The seed of a block, independent of everything that ran before it."""
    return (seed * 1_000_003 + index) % (1 << 63)
