"""Removes experts, a step of its own before a run: it writes the model with fewer experts, block by block.

The run then takes that checkpoint as its model, with the dense model as its teacher.
"""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import JsonValue
from pydantic_core import to_jsonable_python
from transformers import PreTrainedModel

from sparsellm import interrupts, machine, parallel
from sparsellm.errors import RecipeError
from sparsellm.files.contents import foreign_entries
from sparsellm.files.directory import (
    check_identity,
    checkpoints_among,
    left_in,
    partial_of,
)
from sparsellm.inputs import read_object
from sparsellm.method.experts import SCORES
from sparsellm.method.experts.fewer import FewerExperts
from sparsellm.method.experts.removal import Removal, remove_experts, running
from sparsellm.method.experts.sample import last_linears
from sparsellm.method.sweep.gradients import LEAST_WINDOWS, TOKENS, loss_gradients
from sparsellm.model import Chain, Feed
from sparsellm.model.matrices import outside_blocks, unmatched_patterns
from sparsellm.progress import (
    NOTE,
    PhaseClock,
    Progress,
    ProgressCallback,
    note,
)
from sparsellm.recipe import Recipe
from sparsellm.records import ExpertsOfBlock, Prediction, Settings
from sparsellm.run.budget import Budget
from sparsellm.run.calibration import Windows, draw_calibration
from sparsellm.run.choice import Choice, choice_for
from sparsellm.run.decided import extent_of, identity_of, name_patterns
from sparsellm.run.estimate import (
    Removing,
    after_removal,
    checkpoint_bytes,
    estimate_here,
    extent_asked,
    needed,
)
from sparsellm.run.fingerprint import model_fingerprint
from sparsellm.run.journal import (
    BlockRecord,
    Identity,
    Journal,
    conditions,
    other_conditions,
)
from sparsellm.run.opening import Models, computing_of, open_models
from sparsellm.run.request import Request
from sparsellm.run.warnings import short_text

EXPERTS = "experts.json"  # in the directory of the model with fewer experts: what was removed, and the step's identity
_TEXT = ("calibration", "samples", "seq_len", "seed", "bos", "batch_tokens")
_COMPUTING = ("memory", "device", "device_memory", "dtype", "products")
_SETTINGS = ("experts", "expert_score", "expert_options", "expert_refit")


@dataclass(frozen=True)
class OpenedRemoval:
    """A checked removal of experts, which can start."""

    place: Path  # the smaller model's directory, next to the result of the run
    overwrite: bool  # whether a smaller model that is there may be replaced
    recipe: Recipe  # settings of the removal alone, with the actual windows
    models: Models
    windows: Windows
    twin: FewerExperts
    identity: Identity
    budget: Budget  # what this process may hold
    total: Prediction  # what the removal and the run take
    disk_bytes: int  # for the smaller model, hidden states and the run


@dataclass(frozen=True)
class RemovalRecord:
    """What was removed, as the smaller model's directory says."""

    identity: Settings
    experts: list[ExpertsOfBlock]
    seconds: dict[str, float]
    warnings: list[str]

    @classmethod
    def of(cls, known: dict[str, Any]) -> RemovalRecord:
        """The record of the contents of the file."""
        experts = [ExpertsOfBlock.model_validate(entry) for entry in known["experts"]]
        return cls(known["identity"], experts, known["seconds"], known["warnings"])


def open_removal(
    request: Request, clock: PhaseClock, progress: ProgressCallback
) -> OpenedRemoval:
    """Opens the model of a request and reads the text, for the removal of its experts into a directory next to the
    request's ``out``. Raises a SparseLLMError for what the removal, or the run after it, refuses."""
    recipe = request.recipe
    unfit = request.teacher is not None or request.trust_remote_code
    if unfit or request.out is None or isinstance(request.model, PreTrainedModel):
        raise RecipeError(
            "experts takes a model by name, and out=DIR, without teacher or trust_remote_code"
        )
    request.destination(checkpoints_among(request.model))
    place = _place_of(request.out)
    rest = partial_of(Path(request.out).expanduser())
    # Without that file it is a checkpoint of the user's.
    overwrite = (place / EXPERTS).is_file()
    SCORES[recipe.expert_score].check(recipe.expert_options)
    copies = Choice.of(recipe).copies
    kept = {name: getattr(recipe, name) for name in (*_TEXT, *_COMPUTING, *_SETTINGS)}
    alone = Recipe(method="magnitude", sparsity=0.0, **kept)
    step = replace(request, recipe=alone, out=place, overwrite=overwrite)
    choice: Choice = Removing.by(recipe)
    step.destination(checkpoints_among(request.model))
    with clock.phase("open"):
        progress(Progress("open", 0, 1))
        models = open_models(step)
        chain = models.chain
        computing = computing_of(chain)
        twin = FewerExperts(chain, recipe.experts or 0)
        disk_bytes = (1 + copies) * checkpoint_bytes(twin.chain)
        # A smaller model that is there may be the one that is wanted; else the journal asks again.
        out = step.destination(models.sources, 0 if overwrite else disk_bytes)
        assert out is not None
    budget = Budget(alone, chain.device)
    with clock.phase("calibration"):
        calibration = draw_calibration(step, choice, models, budget, progress)
        calibration.check(chain)
    settled = calibration.recipe
    windows = calibration.windows
    warnings = [
        *calibration.warnings,
        *outside_blocks(chain),
        *short_text(windows, choice),
    ]
    extent = extent_of(windows, passes=0)
    first = estimate_here(chain, choice, settled, extent, budget)
    disk_bytes += int(parallel.total(first.hidden_on_disk_bytes))
    total = _with_run(recipe, settled, twin.chain, first, budget)
    with clock.phase("check"):
        progress(Progress("check", 0, 1))
        warnings += chain.unused()
        digest = model_fingerprint(chain, progress)
    progress(Progress(NOTE, 1, 1, needed(total)))
    identity = identity_of(calibration, model=digest, computing=computing)
    note(progress, warnings)
    check = partial(_check_run, rest, out, identity, restart=request.restart)
    parallel.from_main(check)
    return OpenedRemoval(
        out,
        overwrite,
        recipe=settled,
        models=models,
        windows=windows,
        twin=twin,
        identity=identity,
        budget=budget,
        total=total,
        disk_bytes=disk_bytes,
    )


def _check_run(rest: Path, place: Path, identity: Identity, *, restart: bool) -> None:
    """Refuses to replace the smaller model from which an unfinished run in ``rest`` goes on. Raises StorageError."""
    known = _read(place)
    if known and not restart and left_in(rest) is not None:
        check_identity(rest, known.get("identity"), identity.stored())


def _with_run(
    recipe: Recipe,
    settled: Recipe,
    smaller: Chain,
    first: Prediction,
    budget: Budget,
) -> Prediction:
    """The estimate of a removal with that of the run by ``recipe`` on the smaller model, which is checked, too."""
    recipe = recipe.updated(samples=settled.samples, seq_len=settled.seq_len)
    choice = choice_for(smaller, recipe, taught=True)
    choice.check_processes(recipe.samples)
    unmatched_patterns(smaller, name_patterns(recipe))
    extent = extent_asked(smaller, choice, recipe, parallel.size())
    rest = estimate_here(smaller, choice, recipe, extent, budget)
    return after_removal(first, rest)


def remove_experts_of(request: Request, progress: ProgressCallback) -> Path:
    """Writes the model of a request without some experts, from where an earlier process stopped, and returns its
    directory; errors as ``open_removal``."""
    clock = PhaseClock()
    step = open_removal(request, clock, progress)
    chain = step.models.chain
    place = step.place
    recipe = step.recipe
    identity = step.identity.stored()
    if parallel.from_main(partial(_read, place)).get("identity") == identity:
        return place
    score = SCORES[recipe.expert_score]
    options = score.check(recipe.expert_options)
    with Journal(
        place, len(chain), restart=request.restart, overwrite=step.overwrite
    ) as journal:
        journal.open(step.identity, step.disk_bytes, model=request.called)
        scratch = step.budget.scratch(partial_of(place))
        step.budget.expect_block(chain)
        feed = Feed(chain, step.windows.first, recipe.batch_tokens, scratch, progress)
        costs = journal.output_costs() if score.needs(options).output_costs else {}
        if costs is None:
            with clock.phase("gradients"):
                names = [
                    name
                    for index in range(len(chain))
                    for name in last_linears(chain, index)
                ]
                costs = loss_gradients(
                    feed.first(TOKENS, LEAST_WINDOWS), frozenset(names)
                ).output_squares
            journal.keep_output_costs(costs)
        clock.lap()
        function = partial(score.function, **options)
        removal = Removal(step.twin, function, costs, recipe.expert_refit, recipe.seed)
        done = journal.finished(progress)
        walked = replace(feed, windows=step.windows.own[0])
        experts = _walk(removal, walked, step.budget, journal, done, clock)
        parallel.barrier()
        kept: dict[str, JsonValue] = {
            "identity": identity,
            "experts": [record.model_dump() for record in experts],
            "seconds": {**clock.seconds},
            "warnings": [*other_conditions(done)],
        }
        parallel.from_main(partial(_save, step, journal, kept))
    machine.trim()  # the run begins with what is left
    return place


def removal_settings(step: Settings, recipe: Recipe) -> Settings:
    """What tells a run that removes experts from others: the identity of the ``step`` that removes them, and the
    settings of a recipe, as it was given."""
    asked = Choice.of(recipe).settings(recipe)
    return {"step": step, "asked": to_jsonable_python(asked)}


def removal_of(request: Request, progress: ProgressCallback) -> Settings:
    """The ``removal_settings`` of a request; errors as ``open_removal``."""
    step = open_removal(request, PhaseClock(), progress)
    return removal_settings(step.identity.stored(), request.recipe)


def removal_before(recipe: Recipe, directory: Path | None) -> RemovalRecord | None:
    """What was removed from the model that ``remove_experts_of`` wrote into this directory; None if the recipe
    removes nothing."""
    if recipe.experts is None or directory is None:
        return None
    return RemovalRecord.of(parallel.from_main(partial(_read, directory)))


def _read(place: Path) -> dict[str, Any]:
    """What was removed from the model with fewer experts; empty where there is none."""
    file = place / EXPERTS
    return read_object(file) if file.is_file() else {}


def clean_up(directory: Path) -> None:
    """Removes a checkpoint between two steps, which is not needed any more; not if it has files of others now."""
    with interrupts.held():
        if parallel.is_main() and not foreign_entries(directory):
            shutil.rmtree(directory, ignore_errors=True)


def clean_up_removal(out: str | os.PathLike[str]) -> None:
    """Removes the smaller model next to a complete result in ``out``, which a start leaves that is stopped at its very
    end; not one that no removal wrote."""
    place = _place_of(out)
    if (place / EXPERTS).is_file():
        clean_up(place)


def _place_of(out: str | os.PathLike[str]) -> Path:
    """The directory of the smaller model, next to the result of the run."""
    return Path(f"{os.path.expanduser(out)}-experts")


def _walk(
    removal: Removal,
    feed: Feed,
    budget: Budget,
    journal: Journal,
    done: list[BlockRecord],
    clock: PhaseClock,
) -> list[ExpertsOfBlock]:
    """Removes experts of the blocks that are not ``done``, each on the outputs of the smaller blocks before it."""
    chain = feed.chain
    fewer = removal.fewer
    records = [record.experts for record in done]
    for record in done:
        clock.add(record.seconds)
    stream = feed.stream()
    for index in range(len(chain)):
        feed.progress(
            Progress("experts", index, len(chain), f"block {index + 1}/{len(chain)}")
        )
        with contextlib.ExitStack() as stack:
            if index < len(done):
                stack.enter_context(fewer.chain.block(index, journal.block(index)))
            else:
                stack.enter_context(clock.phase("experts"))
                stack.enter_context(chain.block(index))
                stack.callback(fewer.release, index)
                records.append(remove_experts(removal, stream, index))
                budget.check_block()
            with running(stream, index, fewer):
                stream.advance(index)
            if index >= len(done) and journal.writes:
                record = BlockRecord(
                    [],
                    conditions(),
                    clock.lap(),
                    machine.peak_rss(),
                    experts=records[-1],
                )
                journal.write_block(index, fewer.chain.block_tensors(index), record)
    stream.close()
    return [record for record in records if record is not None]


def _save(step: OpenedRemoval, journal: Journal, kept: dict[str, JsonValue]) -> None:
    """Writes the tensors outside the blocks and the files next to the weights, and names the checkpoint."""
    writer = journal.writer
    directory = step.models.directory
    chain = step.models.chain
    if writer is None:
        return
    assert directory is not None
    writer.write_shard(len(chain), chain.outer_tensors())
    writer.copy_companions(directory)
    config = read_object(writer.folder / "config.json")
    step.twin.change(config)
    writer.write_json("config.json", config)
    writer.write_json(EXPERTS, kept)
    with interrupts.held():
        writer.finish()
        interrupts.keeps(f"{step.place} is kept", part=True)
