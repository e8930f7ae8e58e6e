"""What a run does: settled after the models are opened, before any work. Bad input is refused here."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sparsellm import parallel, plugins
from sparsellm.files.directory import checkpoints_among
from sparsellm.files.scratch import Scratch
from sparsellm.method.sweep.whole_model import STEP_TOKENS, cut_to
from sparsellm.model import Chain, Feed
from sparsellm.model.matrices import outside_blocks, unmatched_patterns
from sparsellm.progress import NOTE, PhaseClock, Progress, ProgressCallback, note
from sparsellm.recipe import Recipe
from sparsellm.records import Prediction
from sparsellm.run.budget import RESIDENT, STREAMED, Budget, choose_sweep, slowest
from sparsellm.run.calibration import Calibration, Windows, draw_calibration
from sparsellm.run.choice import Choice, choice_for
from sparsellm.run.estimate import Extent, checkpoint_bytes, estimate_here, needed
from sparsellm.run.fingerprint import (
    model_fingerprint,
    start_fingerprint,
    tokens_fingerprint,
)
from sparsellm.run.form_choice import check_forms, check_size
from sparsellm.run.journal import Identity
from sparsellm.run.opening import Models, computing_of, open_models, save_companions
from sparsellm.run.request import Request
from sparsellm.run.warnings import (
    already_pruned,
    short_text,
    stored_otherwise,
    without_effect,
)


@dataclass(frozen=True)
class Decided:
    """What a run does, the same in all of its starts and processes."""

    recipe: Recipe  # with the actual number and length of the calibration windows
    choice: Choice
    windows: Windows
    sweep: str  # how the sweep holds the blocks; "" for none
    # absolute and without links; None for a model that is pruned in memory only
    out: Path | None
    disk_bytes: int  # for the checkpoint, the blocks of the walk and hidden states
    estimate: Prediction
    identity: Identity
    warnings: tuple[str, ...]

    def feed(self, chain: Chain, scratch: Scratch, progress: ProgressCallback) -> Feed:
        """The first set of calibration windows, as the model is run on it."""
        windows = self.windows.first
        return Feed(chain, windows, self.recipe.batch_tokens, scratch, progress)


def open_and_decide(
    request: Request, clock: PhaseClock, progress: ProgressCallback
) -> tuple[Models, Budget, Decided]:
    """What a run opens, may hold and does. Errors as ``open_run`` and ``decide``."""
    models = open_run(request, clock, progress)
    budget = Budget(request.recipe, models.chain.device)
    return models, budget, decide(request, models, budget, clock, progress)


def open_run(request: Request, clock: PhaseClock, progress: ProgressCallback) -> Models:
    """Opens the models of a request. What is wrong with its recipe or destination alone is refused before."""
    Choice.of(request.recipe)
    request.destination(checkpoints_among(request.model, request.teacher))
    with clock.phase("open"):
        progress(Progress("open", 0, 1))
        models = open_models(request)
        if request.out is not None and models.directory is None:
            # transformers may refuse what it saves last
            with tempfile.TemporaryDirectory() as folder:
                save_companions(Path(folder), models.chain.model, request.tokenizer)
    return models


def decide(
    request: Request,
    models: Models,
    budget: Budget,
    clock: PhaseClock,
    progress: ProgressCallback,
) -> Decided:
    """Reads the calibration text, settles every setting and checks every weight. Raises a SparseLLMError if model,
    text, recipe or destination are wrong in a way that shows before the work."""
    chain = models.chain
    computing = computing_of(chain)
    choice = choice_for(chain, request.recipe, taught=models.teacher is not None)
    if request.recipe.program is not None:
        check_forms(request.recipe.program, chain, request.recipe)
    check_size(chain, request.recipe)
    disk_bytes = choice.copies * checkpoint_bytes(chain)
    out = request.destination(models.sources, disk_bytes)
    with clock.phase("calibration"):
        calibration = draw_calibration(request, choice, models, budget, progress)
        calibration.check(chain)
    recipe = calibration.recipe
    choice = calibration.choice
    windows = calibration.windows
    warnings = [
        *calibration.warnings,
        *unmatched_patterns(chain, name_patterns(recipe)),
        *outside_blocks(chain),
        *short_text(windows, choice),
        *stored_otherwise(chain, recipe, trust=request.trust_remote_code),
        *without_effect(recipe, choice, teacher=request.teacher is not None),
    ]
    sweep = _sweep(chain, calibration, budget)
    if sweep in RESIDENT:
        windows = replace(windows, step_processes=parallel.size())
    extent = extent_of(windows, choice.passes)
    estimate = estimate_here(chain, choice, recipe, extent, budget)
    disk_bytes += int(parallel.total(estimate.hidden_on_disk_bytes))
    with clock.phase("check"):
        progress(Progress("check", 0, 1))
        # before digests, which the walk compares
        warnings += chain.unused()
        warnings += already_pruned(models, recipe)
        dense = model_fingerprint(models.teacher or chain, progress)
        start = _start_digest(models, progress)
    # after all that a model may be refused for
    progress(Progress(NOTE, 1, 1, needed(estimate)))
    note(progress, warnings)
    return Decided(
        recipe=recipe,
        choice=choice,
        windows=windows,
        sweep=sweep,
        out=out,
        disk_bytes=disk_bytes,
        estimate=estimate,
        identity=identity_of(
            calibration, model=dense, start=start, computing=computing
        ),
        warnings=tuple(warnings),
    )


def identity_of(
    calibration: Calibration, *, model: str, computing: str, start: str = ""
) -> Identity:
    """The identity of a run with these windows, on a dense ``model`` with this digest."""
    windows = calibration.windows
    return Identity(
        recipe=calibration.choice.settings(calibration.recipe),
        model=model,
        calibration_tokens=tokens_fingerprint(
            torch.cat([*windows.sets, windows.fresh])
        ),
        computing=computing,
        plugins=plugins.loaded(),
        start=start,
    )


def _sweep(chain: Chain, calibration: Calibration, budget: Budget) -> str:
    """How the sweep holds the blocks in all processes: as the one with the least room; "" for none."""
    choice = calibration.choice
    windows = calibration.windows
    if not choice.passes:
        return ""
    step = cut_to(windows.first.shape[1], parallel.size())
    if windows.bos == "given":
        step = windows.first.shape[1]
    way = STREAMED
    if min(map(len, windows.swept)):
        way = choose_sweep(
            chain,
            budget,
            unrounded=choice.trains_integers(calibration.recipe),
            ranks=parallel.size(),
            step_tokens=max(step, STEP_TOKENS // parallel.size()),
        )
    return slowest(parallel.gather(way))


def _start_digest(models: Models, progress: ProgressCallback) -> str:
    """The digest of the weights to prune; "" if they are the dense model's."""
    if models.teacher is not None:
        return model_fingerprint(models.chain, progress)
    if models.start is not None:
        return start_fingerprint(models.start, progress)
    return ""


def name_patterns(recipe: Recipe) -> dict[str, Iterable[str]]:
    """The shell patterns of a recipe, by field."""
    return {
        name: getattr(recipe, name)
        for name in ("exclude", "only", "sparsity_of", "allow_dense")
    }


def extent_of(windows: Windows, passes: int) -> Extent:
    """The extent of a run with these windows."""
    swept = windows.swept
    tokens = sum(swept[number % len(swept)].numel() for number in range(passes))
    ranks = parallel.size()
    return Extent(
        samples=len(windows.first),
        seq_len=windows.first.shape[1],
        batch_tokens=windows.batch_tokens,
        sets=len(windows.sets),
        swept=ranks * tokens,
        ranks=ranks,
    )
