"""One pruning run: plan → survey → walk → sweep → save. Each step is a function that gets the results before it."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path

import torch
from pydantic_core import to_jsonable_python

from sparsellm import interrupts, machine, parallel
from sparsellm.errors import NumericalError, SparseLLMError, one_line
from sparsellm.files.directory import check_room, check_unfinished, partial_of
from sparsellm.files.writer import CheckpointWriter
from sparsellm.inputs import without_folders
from sparsellm.method.sweep.sweep_task import SweepTask
from sparsellm.method.sweep.whole_model import sweep
from sparsellm.model import Feed, Stream
from sparsellm.patterns import count_zeros
from sparsellm.progress import (
    NOTE,
    PhaseClock,
    Progress,
    ProgressCallback,
    ignore,
)
from sparsellm.records import (
    ExpertsOfBlock,
    LinearResult,
    Memory,
    Prediction,
    SweepPass,
)
from sparsellm.report.card import CARD, card_text
from sparsellm.report.document import REPORT, write_report
from sparsellm.run.budget import residence
from sparsellm.run.counts import (
    coarse,
    few_tokens,
    left_dense,
    rarely_chosen,
    shortfall,
    unreached,
)
from sparsellm.run.estimate import saved_sweep_bytes
from sparsellm.run.fewer_experts import (
    RemovalRecord,
    clean_up,
    open_removal,
    removal_record,
    remove_experts_of,
)
from sparsellm.run.journal import BlockRecord, Identity, Journal, other_conditions
from sparsellm.run.opening import device_of, save_companions
from sparsellm.run.plan import Plan, Request, make_plan
from sparsellm.run.result import PruneResult, bits_per_weight, environment
from sparsellm.run.walk import Targets, integers_of, replay, survey, walk


@dataclass(frozen=True)
class Pruned:
    """What walk and sweep did: the results of all linears, the divergence from the dense model after each pass, and the
    peak memory of earlier processes in bytes."""

    linears: list[LinearResult]
    sweeps: list[SweepPass]
    peak: int


def prune(request: Request, progress: ProgressCallback = ignore) -> PruneResult:
    """Prunes the model of a request, from where an earlier process stopped. Errors are SparseLLMErrors."""
    progress = progress if parallel.is_main() else ignore
    with machine.computing(device_of(request.model, request.recipe)):
        if request.recipe.experts is None:
            return run(request, progress)
        smaller = remove_experts_of(request, progress)
        result = run(
            replace(request, model=str(smaller), teacher=str(request.model)), progress
        )
        clean_up(smaller)
        return result


def run(request: Request, progress: ProgressCallback) -> PruneResult:
    """The run of a request. If its recipe removes experts, its model is the one that :func:`remove_experts_of` made."""
    clock = PhaseClock()
    plan = make_plan(request, clock, progress)
    try:
        return _pruned(plan, clock, progress)
    except NumericalError as error:
        if plan.chain.dtype != torch.float16:
            raise
        advice = (
            "blocks ran in float16, whose largest number is 65504; take dtype float32"
        )
        raise NumericalError(f"{error}; {advice}") from error


def _pruned(plan: Plan, clock: PhaseClock, progress: ProgressCallback) -> PruneResult:
    request = plan.request
    chain = plan.chain
    directory = plan.model.directory
    earlier = None
    if plan.recipe.experts is not None and directory is not None:
        earlier = removal_record(directory)
    with Journal(
        plan.out, len(chain), restart=request.restart, overwrite=request.overwrite
    ) as journal:
        journal.open(plan.identity, plan.disk_bytes)
        finished = journal.finished(progress)
        for record in finished:
            clock.add(record.seconds)
        if earlier is not None:
            clock.add(earlier.seconds)
        folder = partial_of(plan.out) if plan.out is not None else None
        # hidden states are in the system's directory for temporary files
        if folder is None:
            check_room(Path(tempfile.gettempdir()), plan.prediction.disk_bytes)
        budget = plan.budget
        scratch = budget.scratch(folder)
        feed = Feed(
            chain, plan.windows.first, plan.recipe.batch_tokens, scratch, progress
        )
        budget.expect_block(chain)
        targets = survey(plan, feed, journal, len(finished) == len(chain), clock)
        if plan.model.start is not None:
            chain.forget_shared()  # the walk reads the teacher's first
        clock.lap()
        dense = _dense_end(plan, feed, clock)
        blocks = _walk(plan, targets, feed, journal, finished, clock)
        pruned = _sweep(plan, feed, dense, journal, blocks, clock)
        result = _result(
            plan,
            targets,
            pruned=pruned,
            memory=budget.measured(scratch, plan.sweep),
            journal=journal,
            finished=finished,
            earlier=earlier,
            clock=clock,
        )
        parallel.barrier()  # after this no process reads the walk's blocks, so they can be removed
        parallel.from_main(partial(_save, plan, result, journal.writer, progress))
    return result


def rehearse(request: Request, progress: ProgressCallback = ignore) -> Prediction:
    """Does all that :func:`prune` does before it writes, with its refusals, and returns the estimate of the run."""
    progress = progress if parallel.is_main() else ignore
    # an unfinished run, which the same command without --dry-run resumes, is not what is stopped
    interrupts.keeps("")
    with machine.computing(device_of(request.model, request.recipe)):
        if request.recipe.experts is not None:
            step = open_removal(request, PhaseClock(), progress)
            need = 0 if step.overwrite else step.disk_bytes
            replace(request, out=step.place, overwrite=step.overwrite).destination(
                (), need
            )
            _check_resumes(step.place, step.identity, restart=request.restart)
            name = without_folders(str(request.model))
            return step.total.model_copy(update={"model": name})
        plan = make_plan(request, PhaseClock(), progress)
    request.destination((), plan.disk_bytes)
    if plan.out is not None:
        _check_resumes(plan.out, plan.identity, restart=request.restart)
    return plan.prediction.model_copy(update={"model": plan.base.name})


def _check_resumes(out: Path, identity: Identity, *, restart: bool) -> None:
    """Refuses an unfinished run into ``out`` that has another identity. Raises StorageError."""
    known = to_jsonable_python(asdict(identity))
    check = partial(check_unfinished, partial_of(out), known, restart=restart)
    parallel.from_main(check)


def _dense_end(plan: Plan, feed: Feed, clock: PhaseClock) -> Stream | None:
    """The stream behind the last block of the dense model, for a sweep that cannot run this model any more: pruning
    overwrites the weights of a model in memory, and a teacher may have other shapes. None if no sweep needs it."""
    chain = plan.chain
    teacher = plan.model.teacher
    if not plan.choice.passes or (chain.reader is not None and teacher is None):
        return None
    with clock.phase("dense"):
        chain = teacher or chain
        stream = replace(feed, chain=chain, windows=plan.windows.swept[0]).stream()
        for index in range(len(chain)):
            replay(chain, [stream], index, None)
    return stream


def _walk(
    plan: Plan,
    targets: Targets,
    feed: Feed,
    journal: Journal,
    finished: Sequence[BlockRecord],
    clock: PhaseClock,
) -> list[BlockRecord]:
    """Prunes and writes the blocks that an earlier process has not; returns the records of all blocks."""
    chain = plan.chain
    records = list(finished)
    begin = len(finished)
    linears = [linear for record in finished for linear in record.linears]
    plan.budget.expect_block(chain)
    with clock.phase("embed"):
        streams = (
            [replace(feed, windows=part).stream() for part in plan.windows.own]
            if begin < len(chain)
            else []
        )
    integers = integers_of(plan, linears)
    # A model in memory, which is dense as the user gave it, gets its finished blocks even if none is left to prune.
    for index in range(begin if streams or chain.reader is None else 0):
        feed.progress(
            Progress("replay", index, begin, f"block {index + 1}/{len(chain)}")
        )
        with clock.phase("replay"):
            replay(chain, streams, index, journal.block(index), integers)
    for record in walk(plan, targets, streams, begin, linears, clock, feed.progress):
        if journal.writes:
            with clock.phase("write"):
                journal.write_block(
                    len(records), chain.block_tensors(len(records)), record
                )
        records.append(record)
    for stream in streams:
        stream.close()
    return records


def _sweep(
    plan: Plan,
    feed: Feed,
    dense: Stream | None,
    journal: Journal,
    blocks: Sequence[BlockRecord],
    clock: PhaseClock,
) -> Pruned:
    """Trains all kept weights of the pruned model towards the dense model's predictions, if the plan has passes."""
    chain = plan.chain
    linears = [linear for record in blocks for linear in record.linears]
    peak = max(record.peak_rss for record in blocks)
    if not plan.choice.passes:
        return Pruned(linears, [], peak)
    feed.progress(Progress("sweep", 0, 1))
    choice = plan.choice
    state_bytes = saved_sweep_bytes(chain, choice)
    saved = journal.open_sweep(state_bytes, plan.disk_bytes, feed.progress)
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
    first, *others = plan.windows.swept
    machine.trim()  # what the walk has freed
    plan.budget.expect_sweep(chain, plan.sweep)
    with clock.phase("sweep"):
        task = SweepTask(
            replace(feed, windows=first),
            dense.hidden if dense is not None else None,
            choice.passes,
            plan.recipe.seed,
            write,
            learning_rate=plan.recipe.sweep_rate,
            blocks=[shard for shard in shards if shard is not None] or None,
            saved=saved,
            fresh=others,
            integers=integers_of(plan, linears),
            sources=plan.windows.swept_sources,
            resident=residence(chain, plan.sweep, parallel.size()),
        )
        sweeps = sweep(task)
    if dense is not None:
        dense.close()
    return Pruned(
        [linear.model_copy(update={"zeros": zeros[linear.name]}) for linear in linears],
        sweeps,
        peak,
    )


def _result(
    plan: Plan,
    targets: Targets,
    pruned: Pruned,
    memory: Memory,
    journal: Journal,
    finished: list[BlockRecord],
    earlier: RemovalRecord | None,
    clock: PhaseClock,
) -> PruneResult:
    """The result of a run, with the warnings that follow from it, and what was removed ``earlier``."""
    chain = plan.chain
    recipe = plan.recipe
    allocation = targets.allocation
    with clock.phase("count"):
        # in the first process
        shards = (
            journal.writer.shards[: len(chain)] if journal.writer is not None else []
        )
        dense = parallel.from_main(
            partial(left_dense, chain, recipe, pruned.linears, shards)
        )
    experts: list[ExpertsOfBlock] = []
    warnings = [*plan.warnings]
    if earlier is not None:
        experts = earlier.experts
        warnings += earlier.warnings
    warnings += other_conditions(finished) + coarse(pruned.linears)
    warnings += few_tokens(
        pruned.linears, recipe.min_tokens_per_expert
    ) + rarely_chosen(experts)
    warnings += unreached(pruned.linears) + shortfall(
        pruned.linears, dense, recipe.sparsity
    )
    return PruneResult(
        path=plan.out,
        model=plan.model.in_memory,
        recipe=recipe,
        sparsity_asked=recipe.sparsity,
        values=recipe.values,
        grid=recipe.grid,
        seed=recipe.seed,
        bits_per_weight=bits_per_weight(recipe, pruned.linears),
        linears=pruned.linears,
        seconds=clock.seconds,
        peak_rss_bytes=max(parallel.gather(max(machine.peak_rss(), pruned.peak))),
        calibration_tokens=plan.windows.sets.numel(),
        calibration_bos=plan.windows.bos,
        resumed=len(finished),
        warnings=warnings,
        memory=memory,
        sweeps=pruned.sweeps,
        allocation={**allocation.report, "name": plan.choice.allocator.name}
        if allocation is not None
        else {},
        processes=parallel.size(),
        dense=dense,
        base=plan.base,
        environment=environment(chain.device),
        experts=experts,
        identity=asdict(plan.identity),
    )


def _save(
    plan: Plan,
    result: PruneResult,
    writer: CheckpointWriter | None,
    progress: ProgressCallback,
) -> None:
    """Writes the files next to the weights, and gives the checkpoint its final name."""
    if writer is None:
        return
    progress(Progress("save", 0, 1))
    writer.write_shard(len(plan.chain), plan.chain.outer_tensors())
    directory = plan.model.directory
    if directory is not None:
        writer.copy_companions(directory)
    else:  # the model was given as an object
        save_companions(writer.folder, plan.chain.model, plan.request.tokenizer)
        writer.write_config(writer.folder / "config.json")
    writer.write_text("recipe.yaml", result.recipe.named.to_yaml())
    writer.write_json("pruning.json", result.record.model_dump(mode="json"))
    writer.write_text(CARD, card_text(result.record))
    try:
        write_report(writer.folder, name=writer.work.out)
    except (
        Exception
    ) as error:  # it can be written at any time, and must not cost the result of hours
        reason = str(error) if isinstance(error, SparseLLMError) else one_line(error)
        later = f"afterwards `sparsellm report {shlex.quote(str(writer.work.out))}` writes it"
        progress(Progress(NOTE, 1, 1, f"{REPORT} was not written: {reason}; {later}"))
    writer.finish()
