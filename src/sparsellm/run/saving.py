"""The end of a run: its result, and the files next to the weights."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial

from torch import Tensor
from transformers import PreTrainedModel

from sparsellm import machine, parallel
from sparsellm.errors import SparseLLMError, one_line
from sparsellm.files.writer import CheckpointWriter, TensorSource
from sparsellm.inputs import without_folders
from sparsellm.method.allocation import HeadForm
from sparsellm.progress import NOTE, PhaseClock, Progress, ProgressCallback
from sparsellm.records import Base, ExpertsOfBlock, Settings, bits_per_weight
from sparsellm.report.card import CARD, base_of, card_text
from sparsellm.report.document import REPORT, write_report
from sparsellm.run.counts import (
    coarse,
    few_tokens,
    left_dense,
    rarely_chosen,
    shortfall,
    unreached,
)
from sparsellm.run.decided import Decided
from sparsellm.run.estimate import checkpoint_bytes
from sparsellm.run.fewer_experts import RemovalRecord, removal_settings
from sparsellm.run.head_forms import as_written
from sparsellm.run.journal import BlockRecord, Journal, other_conditions
from sparsellm.run.opening import Models, save_companions
from sparsellm.run.request import Request
from sparsellm.run.result import (
    Measured,
    PruneResult,
    environment,
    rounded_to,
)


def base_of_run(request: Request, models: Models, digest: str) -> Base:
    """The name, digest and bytes of the dense model, and its hub id and license where they are known."""
    dense = request.teacher or request.model
    name = str(dense)
    if isinstance(dense, PreTrainedModel):
        name = getattr(dense, "name_or_path", "")
    return Base(
        name=without_folders(name),
        digest=digest,
        bytes=checkpoint_bytes(models.teacher or models.chain),
        **base_of(dense, models.dense),
    )


def result_of(
    request: Request,
    models: Models,
    decided: Decided,
    measured: Measured,
    journal: Journal,
    finished: Sequence[BlockRecord],
    removed: RemovalRecord | None,
    clock: PhaseClock,
) -> PruneResult:
    """The result of a run, with the warnings that follow from it. ``finished`` are the blocks of earlier processes,
    ``removed`` is what the step before the run removed."""
    chain = models.chain
    recipe = decided.recipe
    linears = measured.linears
    with clock.phase("count"):
        # in the first process
        shards = []
        if journal.writer is not None:
            shards = journal.writer.shards[: len(chain)]
        count = partial(left_dense, chain, recipe, linears, shards)
        dense = parallel.from_main(count)
    values, grid = rounded_to(linears)
    asked = recipe.sparsity
    if recipe.program is not None:  # the allocation chose it
        zeros = sum(linear.asked * linear.weights for linear in linears)
        asked = zeros / sum(linear.weights for linear in linears)
    experts: list[ExpertsOfBlock] = []
    removal: Settings = {}
    warnings = [*decided.warnings]
    if removed is not None:
        experts = removed.experts
        removal = removal_settings(removed.identity, request.recipe)
        warnings += removed.warnings
    warnings += [
        *other_conditions([*finished]),
        *few_tokens(linears, recipe.min_tokens_per_expert),
        *rarely_chosen(experts),
        *measured.unmeasured,
        *coarse(linears),
        *unreached(linears),
        *shortfall(linears, dense, asked),
    ]
    return PruneResult(
        path=decided.out,
        model=models.in_memory,
        recipe=recipe,
        sparsity_asked=asked,
        values=values,
        grid=grid,
        seed=recipe.seed,
        bits_per_weight=bits_per_weight(linears),
        linears=linears,
        seconds=clock.seconds,
        peak_rss_bytes=max(parallel.gather(max(machine.peak_rss(), measured.peak_rss))),
        calibration_tokens=decided.windows.sets.numel(),
        calibration_bos=decided.windows.bos,
        resumed=len(finished),
        warnings=warnings,
        memory=measured.memory,
        sweeps=measured.sweeps,
        held_out=measured.held_out,
        allocation=measured.allocation,
        heads=measured.heads,
        processes=parallel.size(),
        dense=dense,
        base=base_of_run(request, models, decided.identity.model),
        environment=environment(chain.device),
        experts=experts,
        identity=asdict(decided.identity),
        removal=removal,
    )


def save(
    request: Request,
    models: Models,
    result: PruneResult,
    *,
    heads: Mapping[str, HeadForm],
    writer: CheckpointWriter | None,
    progress: ProgressCallback,
) -> None:
    """Writes the files next to the weights, and gives the checkpoint its final name."""
    if writer is None:
        return
    progress(Progress("save", 0, 1))
    chain = models.chain
    outer = chain.outer_tensors()
    for key, form in heads.items():
        outer[key] = replace(outer[key], read=partial(_rounded, outer[key], form))
    writer.write_shard(len(chain), outer)
    if models.directory is not None:
        writer.copy_companions(models.directory)
    else:  # the model was given as an object
        save_companions(writer.folder, chain.model, request.tokenizer)
        writer.write_config(writer.folder / "config.json")
    writer.write_text("recipe.yaml", result.recipe.named.to_yaml())
    writer.write_json("pruning.json", result.record.model_dump(mode="json"))
    writer.write_text(CARD, card_text(result.record))
    try:
        write_report(writer.folder, name=writer.work.out)
    # it can be written at any time, and must not cost the result of hours
    except Exception as error:
        reason = one_line(error)
        if isinstance(error, SparseLLMError):
            reason = str(error)
        later = f"afterwards `sparsellm report {shlex.quote(str(writer.work.out))}` writes it"
        progress(Progress(NOTE, 1, 1, f"{REPORT} was not written: {reason}; {later}"))
    writer.finish()


def _rounded(source: TensorSource, form: HeadForm) -> Tensor:
    """Embedding or head in its form."""
    return as_written(source.read(), form)
