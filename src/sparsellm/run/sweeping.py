"""The sweep of a run, which follows the walk: its windows, its place in memory, and what it writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sparsellm import machine, parallel
from sparsellm.method.sweep.sweep_task import SweepTask
from sparsellm.method.sweep.whole_model import sweep
from sparsellm.model import Feed, Stream
from sparsellm.patterns import count_zeros
from sparsellm.progress import PhaseClock, Progress
from sparsellm.records import LinearResult, SweepPass
from sparsellm.run.budget import Budget, residence
from sparsellm.run.decided import Decided
from sparsellm.run.estimate import saved_sweep_bytes
from sparsellm.run.journal import BlockRecord, Journal
from sparsellm.run.walk import integers_of


def sweep_model(
    decided: Decided,
    feed: Feed,
    dense: Stream | None,
    budget: Budget,
    journal: Journal,
    walked: Sequence[BlockRecord],
    clock: PhaseClock,
) -> tuple[list[LinearResult], list[SweepPass], int]:
    """Trains all kept weights of the pruned model towards the dense model's predictions, if passes were decided, and
    writes every block again. Returns the results of all linears, those of the passes, and the peak memory of earlier
    processes in bytes."""
    chain = feed.chain
    choice = decided.choice
    linears = [linear for record in walked for linear in record.linears]
    peak = max(record.peak_rss for record in walked)
    if not choice.passes:
        return linears, [], peak
    feed.progress(Progress("sweep", 0, 1))
    state_bytes = saved_sweep_bytes(chain, choice)
    saved = journal.open_sweep(state_bytes, decided.disk_bytes, feed.progress)
    if saved is not None and saved.last is not None:
        clock.add({"sweep": saved.last.seconds})
        peak = max(peak, saved.last.peak_rss)
    zeros: dict[str, int] = {}

    def write(index: int) -> None:
        for linear in chain.linears(index):
            zeros[linear.name] = count_zeros(linear.parameter)
        if journal.writer is not None:
            journal.writer.write_shard(index, chain.block_tensors(index))

    shards = [journal.block(index) for index in range(len(chain))]
    first, *others = decided.windows.swept
    machine.trim()  # what the walk has freed
    budget.expect_sweep(chain, decided.sweep)
    with clock.phase("sweep"):
        task = SweepTask(
            replace(feed, windows=first),
            dense.hidden if dense is not None else None,
            choice.passes,
            decided.recipe.seed,
            write,
            learning_rate=decided.recipe.sweep_rate,
            blocks=[shard for shard in shards if shard is not None] or None,
            saved=saved,
            fresh=others,
            integers=integers_of(chain, decided, walked),
            sources=decided.windows.swept_sources,
            resident=residence(chain, decided.sweep, parallel.size()),
        )
        sweeps = sweep(task)
    if dense is not None:
        dense.close()
    trained = [
        linear.model_copy(update={"zeros": zeros[linear.name]}) for linear in linears
    ]
    return trained, sweeps, peak
