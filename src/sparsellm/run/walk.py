"""The walk over the chain: read a block, prune it, run it. It depends on no method and no model family."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from functools import partial

import torch

from sparsellm import machine
from sparsellm.chain import Stream
from sparsellm.methods import BlockTask, LinearResult
from sparsellm.progress import PhaseClock, Progress, ProgressCallback
from sparsellm.run.journal import BlockRecord, conditions
from sparsellm.run.plan import Plan
from sparsellm.run.targets import Targets
from sparsellm.storage.reader import CheckpointReader
from sparsellm.sweep.integers import Integers


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
    of each while it is loaded with the weights to be written.

    Args:
        streams: the inputs of block ``begin``, one for each set of calibration windows; blocks take them in turn.
        finished: the results of the linears before that block.
    """
    chain, done, blocks = plan.chain, list(finished), len(plan.chain)

    def tell(index: int, here: Sequence[LinearResult], step: str, part: float | None = None) -> None:
        """Reports a step in block ``index``, which has the results ``here`` so far."""
        known = [*done, *here]
        weights = sum(each.shape[0] * each.shape[1] for each in known)
        sparsity = sum(each.zeros for each in known) / weights if weights else None
        if part is None:
            part = len(here) / (len(chain.linears(index)) + 1)  # the outputs of the block take about one more
        error, said = known[-1].error if known else None, f"block {index + 1}/{blocks} {step}"
        progress(Progress("prune", index - begin + part, blocks - begin, said, error, sparsity))

    for index in range(begin, blocks):
        torch.manual_seed(block_seed(plan.recipe.seed, index))
        results: list[LinearResult] = []
        report = partial(tell, index, results)
        with contextlib.ExitStack() as held:
            report("reading")
            with clock.phase("read"):
                held.enter_context(chain.block(index, plan.model.start))
            linears = [linear for linear in chain.linears(index) if linear.name in targets.patterns]
            task = BlockTask(
                index,
                linears,
                targets.patterns,
                streams[index % len(streams)],
                report,
                clock,
                results,
                output_costs=targets.costs,
                values=plan.recipe.values,
                trained=plan.trains_integers,
            )
            with clock.phase("prune"):
                if linears:
                    plan.choice.method.function(task, **plan.choice.options)
                chain.settle_block(index)
                results[:] = task.finish()
            if index + 1 < blocks:  # the output of the last block is not needed
                report("forward")
                with clock.phase("forward"):
                    for stream in streams:
                        stream.advance(index)
            for linear in linears:
                if linear.name in task.unrounded:  # the sweep goes on from there; this block ran rounded
                    linear.assign(task.unrounded[linear.name])
            report("writing")
            yield BlockRecord(
                linears=list(results), versions=conditions(), seconds=clock.lap(), peak_rss=machine.peak_rss()
            )
        done += results
        tell(index, (), "is done", part=1)


def integers_of(plan: Plan, linears: Sequence[LinearResult]) -> Integers | None:
    """The linears whose values are rounded in a sweep; None if the values are kept or no sweep follows."""
    values = plan.recipe.values
    if values == "keep" or not plan.choice.passes:
        return None
    return Integers(values, {each.name: each.exponents for each in linears})


def replay(
    streams: Sequence[Stream], index: int, weights: CheckpointReader | None, integers: Integers | None = None
) -> None:
    """Advances streams through block ``index``, read from the shard of the pruned block, or the dense one if that is
    None. ``integers`` are rounded in memory, while the shard has the values that a sweep goes on from."""
    chain = streams[0].chain
    with chain.block(index, weights):
        if integers is not None:
            integers.settle(chain, index)
        for stream in streams:
            stream.advance(index)


def block_seed(seed: int, index: int) -> int:
    """The seed of a block, independent of everything that ran before it."""
    return (seed * 1_000_003 + index) % (1 << 63)
