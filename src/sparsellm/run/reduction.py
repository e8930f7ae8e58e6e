"""Removes experts before a run: writes the model with fewer experts, block by block, which the run then prunes."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

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
from sparsellm.model import Feed
from sparsellm.progress import PhaseClock, Progress, ProgressCallback
from sparsellm.recipe import Recipe
from sparsellm.records import ExpertsOfBlock
from sparsellm.run.journal import BlockRecord, Journal, conditions, other_conditions
from sparsellm.run.plan import Plan, Removed, Request, make_plan

EXPERTS = "experts.json"  # in the directory of the model with fewer experts: what was removed, and the run's identity
_TEXT = ("calibration", "samples", "seq_len", "seed", "bos", "batch_tokens")
_COMPUTING = ("memory", "device", "device_memory", "dtype", "products")
_SETTINGS = ("experts", "expert_score", "expert_options", "expert_refit")


def plan_removal(
    request: Request, clock: PhaseClock, progress: ProgressCallback
) -> Plan:
    """The plan of the pass that writes the model of a request without some experts, next to the request's ``out``, and
    the estimate of all that follows. Raises a SparseLLMError for what the pass, or the run after it, refuses."""
    recipe, unfit = (
        request.recipe,
        request.teacher is not None or request.trust_remote_code,
    )
    if unfit or request.out is None or isinstance(request.model, PreTrainedModel):
        raise RecipeError(
            "experts takes a model by name, and out=DIR, without teacher or trust_remote_code"
        )
    request.destination(checkpoints_among(request.model))
    place, rest = (
        Path(f"{os.path.expanduser(request.out)}-experts"),
        partial_of(Path(request.out).expanduser()),
    )
    overwrite = (
        place / EXPERTS
    ).is_file()  # without that file it is a checkpoint of the user's
    kept = {name: getattr(recipe, name) for name in (*_TEXT, *_COMPUTING, *_SETTINGS)}
    alone = Recipe(method="magnitude", sparsity=0.0, **kept)
    plan = make_plan(
        replace(request, recipe=alone, out=place, overwrite=overwrite, then=recipe),
        clock,
        progress,
    )

    def check_rest() -> None:
        """Refuses to replace the smaller model from which an unfinished run goes on."""
        if (
            not request.restart
            and left_in(rest) is not None
            and (known := _read(place))
        ):
            check_identity(
                rest, known.get("identity"), to_jsonable_python(asdict(plan.identity))
            )

    parallel.from_main(check_rest)
    return plan


def remove_experts_of(request: Request, progress: ProgressCallback) -> Removed:
    """The model of a request without some experts, resumed if there is a part of it; errors as :func:`plan_removal`."""
    clock = PhaseClock()
    plan = plan_removal(request, clock, progress)
    fewer, place, recipe = plan.fewer, plan.out, plan.recipe
    assert fewer is not None
    assert place is not None
    identity = to_jsonable_python(asdict(plan.identity))
    if (known := parallel.from_main(partial(_read, place))).get("identity") == identity:
        records = [ExpertsOfBlock.model_validate(entry) for entry in known["experts"]]
        return Removed(
            plan, records, known.get("seconds", {}), known.get("warnings", [])
        )
    with Journal(
        place,
        len(plan.chain),
        restart=request.restart,
        overwrite=plan.request.overwrite,
    ) as journal:
        journal.open(plan.identity, plan.disk_bytes)
        scratch = plan.budget.scratch(partial_of(place))
        plan.budget.expect_block(plan.chain)
        feed = Feed(
            plan.chain, plan.windows.first, recipe.batch_tokens, scratch, progress
        )
        costs = journal.output_costs() if plan.choice.needs.output_costs else {}
        if costs is None:
            with clock.phase("gradients"):
                names = [
                    name
                    for index in range(len(feed.chain))
                    for name in last_linears(feed.chain, index)
                ]
                costs = loss_gradients(
                    feed.first(TOKENS, LEAST_WINDOWS), frozenset(names)
                ).output_squares
            journal.keep_output_costs(costs)
        clock.lap()
        score = SCORES[recipe.expert_score]
        function = partial(score.function, **score.check(recipe.expert_options))
        removal = Removal(fewer, function, costs, recipe.expert_refit, recipe.seed)
        done = journal.finished(progress)
        records = _walk(
            plan,
            removal,
            replace(feed, windows=plan.windows.own[0]),
            journal,
            done,
            clock,
        )
        parallel.barrier()
        kept = {
            "identity": identity,
            "experts": [record.model_dump() for record in records],
            "seconds": clock.seconds,
        }
        kept["warnings"] = warnings = other_conditions(done)
        parallel.from_main(partial(_save, plan, fewer, journal, kept))
    machine.trim()  # the pass that follows begins with what is left
    return Removed(plan, records, clock.seconds, warnings)


def _read(place: Path) -> dict[str, Any]:
    """What was removed from the model with fewer experts; empty where there is none."""
    file = place / EXPERTS
    return read_object(file) if file.is_file() else {}


def clean_up(removed: Removed) -> None:
    """Removes the model with fewer experts, which has been pruned; not if it has files of others now."""
    directory = removed.plan.out
    with interrupts.held():
        if (
            parallel.is_main()
            and directory is not None
            and not foreign_entries(directory)
        ):
            shutil.rmtree(directory, ignore_errors=True)


def _walk(
    plan: Plan,
    removal: Removal,
    feed: Feed,
    journal: Journal,
    done: list[BlockRecord],
    clock: PhaseClock,
) -> list[ExpertsOfBlock]:
    """Removes experts of the blocks that are not ``done``, each on the outputs of the smaller blocks before it."""
    chain, fewer = plan.chain, removal.fewer
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
                plan.budget.check_block()
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


def _save(
    plan: Plan, fewer: FewerExperts, journal: Journal, kept: dict[str, object]
) -> None:
    """Writes the tensors outside the blocks and the files next to the weights, and names the checkpoint."""
    writer, directory = journal.writer, plan.model.directory
    if writer is None:
        return
    assert directory is not None
    writer.write_shard(len(plan.chain), plan.chain.outer_tensors())
    writer.copy_companions(directory)
    config = read_object(writer.folder / "config.json")
    fewer.change(config)
    writer.write_json("config.json", config)
    writer.write_json(EXPERTS, kept)
    with interrupts.held():
        writer.finish()
        interrupts.keeps(f"{plan.out} is kept", part=True)
