"""The story of a pruning run: open → survey → walk → sweep → measure → save. Each step gets the results before it."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from sparsellm import interrupts, machine, parallel
from sparsellm.errors import NumericalError
from sparsellm.files.contents import check_weights
from sparsellm.files.directory import check_room, check_unfinished, partial_of
from sparsellm.inputs import without_folders
from sparsellm.model import Chain
from sparsellm.progress import PhaseClock, ProgressCallback, ignore, note
from sparsellm.records import PRUNING, Prediction, Pruning, read_pruning
from sparsellm.run.budget import Budget
from sparsellm.run.decided import decide, open_and_decide, open_run
from sparsellm.run.fewer_experts import (
    clean_up,
    open_removal,
    removal_before,
    removal_of,
    remove_experts_of,
)
from sparsellm.run.form_choice import for_whole
from sparsellm.run.held_out import HeldOutWindows
from sparsellm.run.journal import Identity, Journal
from sparsellm.run.opening import device_of
from sparsellm.run.request import Request
from sparsellm.run.result import Measured, PruneResult
from sparsellm.run.saving import base_of_run, result_of, save
from sparsellm.run.sweeping import sweep_model
from sparsellm.run.walk import Targets, dense_end, survey, walk

OF_WHOLE = (
    "the forms are those of the whole mixture, scaled to the size with fewer experts; the run chooses them after the "
    "removal"
)


def prune(request: Request, progress: ProgressCallback = ignore) -> PruneResult:
    """Prunes the model of a request, from where an earlier process stopped. Errors are SparseLLMErrors."""
    progress = progress if parallel.is_main() else ignore
    with machine.computing(device_of(request.model, request.recipe)):
        if request.recipe.experts is None:
            return run(request, progress)
        smaller = remove_experts_of(request, progress)
        taught = replace(request, model=str(smaller), teacher=str(request.model))
        result = run(taught, progress)
        clean_up(smaller)
        return result


def run(request: Request, progress: ProgressCallback) -> PruneResult:
    """The run of a request. If its recipe removes experts, its model is the one that ``remove_experts_of`` made."""
    clock = PhaseClock()
    models, budget, decided = open_and_decide(request, clock, progress)
    chain = models.chain
    removed = removal_before(request.recipe, models.directory)
    with (
        _float16_explained(chain),
        Journal(
            decided.out,
            len(chain),
            restart=request.restart,
            overwrite=request.overwrite,
        ) as journal,
    ):
        journal.open(decided.identity, decided.disk_bytes, model=request.called)
        finished = journal.finished(progress)
        for record in finished:
            clock.add(record.seconds)
        if removed is not None:
            clock.add(removed.seconds)
        scratch = budget.scratch(_scratch_folder(decided.out, decided.estimate))
        feed = decided.feed(chain, scratch, progress)
        budget.expect_block(chain)
        walked = len(finished) == len(chain)
        targets = survey(models, decided, feed, journal, walked, clock)
        clock.lap()
        held_out = HeldOutWindows.drawn(models, decided, clock)
        dense = dense_end(models, decided, feed, clock)
        blocks = walk(
            models,
            decided,
            targets=targets,
            feed=feed,
            budget=budget,
            journal=journal,
            finished=finished,
            clock=clock,
        )
        linears, sweeps, peak = sweep_model(
            decided,
            feed,
            dense=dense,
            budget=budget,
            journal=journal,
            walked=blocks,
            clock=clock,
        )
        quality, unmeasured = held_out.measure(
            models,
            decided,
            journal=journal,
            budget=budget,
            clock=clock,
            progress=progress,
        )
        measured = Measured(
            allocation=targets.report,
            heads={key: form.values for key, form in targets.heads.items()},
            linears=linears,
            sweeps=sweeps,
            held_out=quality,
            unmeasured=unmeasured,
            memory=budget.measured(scratch, decided.sweep),
            peak_rss=peak,
        )
        result = result_of(
            request,
            models,
            decided=decided,
            measured=measured,
            journal=journal,
            finished=finished,
            removed=removed,
            clock=clock,
        )
        parallel.barrier()  # after this no process reads the walk's blocks, so they can be removed
        parallel.from_main(
            partial(
                save,
                request,
                models,
                result,
                heads=targets.heads,
                writer=journal.writer,
                progress=progress,
            )
        )
    return result


def complete_run(request: Request, progress: ProgressCallback) -> Pruning | None:
    """The record of the complete run in a request's ``out``, if it is this one: the same settings, model and text.
    Raises StorageError if its weights were replaced since."""
    if request.out is None or not (Path(request.out) / PRUNING).is_file():
        return None
    # it is read, and not replaced
    there = replace(request, overwrite=True)
    known = read_pruning(Path(request.out))
    with machine.computing(device_of(request.model, request.recipe)):
        if request.recipe.experts is None:
            _, _, decided = open_and_decide(there, PhaseClock(), progress)
            alike = known.identity == decided.identity.stored()
        else:
            alike = known.removal == removal_of(there, progress)
    if not alike:
        return None
    check_weights(Path(request.out))
    return known


def choose(request: Request, progress: ProgressCallback) -> Targets:
    """What a run would aim at: all that it does before its first block, with its refusals. Nothing is written. If
    experts are to be removed, which writes a checkpoint, it is chosen for all of them."""
    progress = progress if parallel.is_main() else ignore
    clock = PhaseClock()
    with machine.computing(device_of(request.model, request.recipe)):
        models = open_run(request, clock, progress)
        if request.recipe.experts is not None:
            recipe = for_whole(request.recipe, models.chain)
            request = replace(request, recipe=recipe)
            note(progress, [OF_WHOLE])
        budget = Budget(request.recipe, models.chain.device)
        decided = decide(request, models, budget, clock, progress)
        blocks = len(models.chain)
        with Journal(None, blocks, restart=False, overwrite=False) as journal:
            feed = decided.feed(models.chain, budget.scratch(None), progress)
            budget.expect_block(models.chain)
            return survey(models, decided, feed, journal, walked=False, clock=clock)


def _scratch_folder(out: Path | None, estimate: Prediction) -> Path | None:
    """Where hidden states go that memory has no room for: next to the result, or None for the system's directory for
    temporary files. Raises StorageError if that has no room for them."""
    if out is not None:
        return partial_of(out)
    check_room(Path(tempfile.gettempdir()), estimate.disk_bytes)
    return None


@contextlib.contextmanager
def _float16_explained(chain: Chain) -> Iterator[None]:
    """Says what to do about a NumericalError of blocks that run in float16."""
    try:
        yield
    except NumericalError as error:
        if chain.dtype != torch.float16:
            raise
        advice = (
            "blocks ran in float16, whose largest number is 65504; take dtype float32"
        )
        raise NumericalError(f"{error}; {advice}") from error


def rehearse(request: Request, progress: ProgressCallback = ignore) -> Prediction:
    """Does all that ``prune`` does before it writes, with its refusals, and returns the estimate of the run."""
    progress = progress if parallel.is_main() else ignore
    # an unfinished run, which the same command without --dry-run resumes, is not what is stopped
    interrupts.keeps("")
    clock = PhaseClock()
    with machine.computing(device_of(request.model, request.recipe)):
        if request.recipe.experts is not None:
            step = open_removal(request, clock, progress)
            need = 0 if step.overwrite else step.disk_bytes
            smaller = replace(request, out=step.place, overwrite=step.overwrite)
            smaller.destination((), need)
            _check_resumes(step.place, step.identity, request)
            name = without_folders(str(request.model))
            return step.total.model_copy(update={"model": name})
        models, _, decided = open_and_decide(request, clock, progress)
    request.destination((), decided.disk_bytes)
    if decided.out is not None:
        _check_resumes(decided.out, decided.identity, request)
    name = base_of_run(request, models, decided.identity.model).name
    return decided.estimate.model_copy(update={"model": name})


def _check_resumes(out: Path, identity: Identity, request: Request) -> None:
    """Refuses an unfinished run into ``out`` that has another identity. Raises StorageError."""
    check = partial(
        check_unfinished,
        partial_of(out),
        identity.stored(),
        restart=request.restart,
        model=request.called,
    )
    parallel.from_main(check)
