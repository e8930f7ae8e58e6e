"""The plan of a run: everything that is decided before the work. Bad input is refused here."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsellm import machine, parallel, plugins
from sparsellm.errors import RecipeError
from sparsellm.files.directory import check_destination, checkpoints_among
from sparsellm.inputs import without_folders
from sparsellm.method.sweep.whole_model import STEP_TOKENS, cut_to
from sparsellm.model import Chain
from sparsellm.model.matrices import outside_blocks, unmatched_patterns
from sparsellm.model.streams import check_forward
from sparsellm.progress import (
    NOTE,
    PhaseClock,
    Progress,
    ProgressCallback,
    note,
)
from sparsellm.recipe import Recipe
from sparsellm.records import Base, Prediction
from sparsellm.report.card import base_of
from sparsellm.run.budget import RESIDENT, STREAMED, Budget, choose_sweep, slowest
from sparsellm.run.choice import Choice, choice_for
from sparsellm.run.estimate import (
    Extent,
    checkpoint_bytes,
    estimate_here,
    needed,
)
from sparsellm.run.fingerprint import (
    model_fingerprint,
    start_fingerprint,
    tokens_fingerprint,
)
from sparsellm.run.journal import Identity
from sparsellm.run.opening import (
    Model,
    Models,
    Windows,
    given_windows,
    open_models,
    read_windows,
    save_companions,
)
from sparsellm.run.warnings import (
    already_pruned,
    short_text,
    stored_otherwise,
    without_effect,
)
from sparsellm.text.sources import SELF, default_source, shares_of
from sparsellm.text.texts import Text


@dataclass(frozen=True)
class Request:
    """The arguments of :func:`sparsellm.prune`, documented there."""

    model: Model
    recipe: Recipe
    out: str | os.PathLike[str] | None = None
    calibration: Tensor | Text | None = None
    tokenizer: PreTrainedTokenizerBase | None = None
    overwrite: bool = False
    restart: bool = False
    trust_remote_code: bool = False
    teacher: str | os.PathLike[str] | None = None
    name: str = ""  # in reports, in place of the one that the model was given by

    def destination(
        self, sources: Iterable[str | os.PathLike[str]] = (), need_bytes: int = 0
    ) -> Path | None:
        """The result's directory, resolved and checked by the first process (StorageError); None for one in memory."""
        if self.out is None:
            return None
        check = partial(check_destination, self.out, overwrite=self.overwrite)
        return Path(
            parallel.from_main(partial(check, sources=sources, need_bytes=need_bytes))
        )


@dataclass(frozen=True)
class Plan:
    """A run that has been checked and can start."""

    request: Request
    recipe: Recipe  # with the actual number and length of the calibration windows
    choice: Choice
    # absolute and without links; None for a model that is pruned in memory only
    out: Path | None
    model: Models
    windows: Windows
    prediction: Prediction  # what the run takes, estimated
    budget: Budget  # what this process may hold
    sweep: str  # how the sweep holds the blocks; "" for none
    disk_bytes: int  # for the checkpoint, the blocks of the walk and hidden states
    identity: Identity
    warnings: tuple[str, ...]

    @property
    def chain(self) -> Chain:
        """The chain of the run: that of the dense model, unless the teacher has other shapes."""
        return self.model.chain

    @property
    def base(self) -> Base:
        """The name, digest and bytes of the dense model, and its hub id and license where they are known."""
        model = self.request.teacher or self.request.model
        name = (
            getattr(model, "name_or_path", "")
            if isinstance(model, PreTrainedModel)
            else str(model)
        )
        known = base_of(model, self.model.dense)
        size = checkpoint_bytes(self.model.teacher or self.chain)
        return Base(
            name=self.request.name or without_folders(name),
            digest=self.identity.model,
            bytes=size,
            **known,
        )


def make_plan(request: Request, clock: PhaseClock, progress: ProgressCallback) -> Plan:
    """Opens the model, reads the calibration text, estimates what the run takes and checks every weight. Raises
    SparseLLMError if model, text, recipe or destination are wrong in a way that shows before the work."""
    recipe = request.recipe
    ids = request.calibration
    choice = Choice.of(recipe)
    request.destination(checkpoints_among(request.model, request.teacher))
    with clock.phase("open"):
        progress(Progress("open", 0, 1))
        model = open_models(
            request.model,
            request.teacher,
            recipe=recipe,
            tokenizer=request.tokenizer,
            text=not isinstance(ids, Tensor),
            loaded=request.out is None,
            trust=request.trust_remote_code,
        )
        chain = model.chain
        computing = computing_of(chain)
        # transformers may refuse what it saves last
        if request.out is not None and model.directory is None:
            with tempfile.TemporaryDirectory() as folder:
                save_companions(Path(folder), chain.model, request.tokenizer)
        taught = model.teacher is not None
        choice = choice_for(chain, recipe, taught=taught)
        disk_bytes = choice.copies * checkpoint_bytes(chain)
        out = request.destination(model.sources, disk_bytes)
    with clock.phase("calibration"):
        request, warnings = with_text(request, progress)
        windows, choice = draw_windows(request, choice, model, progress)
        check_forward(chain, windows.first, token_states=choice.token_states)
        machine.trim()
    recipe = request.recipe.updated(
        samples=len(windows.first), seq_len=windows.first.shape[1]
    )
    choice.check_processes(recipe.samples)
    warnings += (
        unmatched_patterns(chain, name_patterns(recipe))
        + outside_blocks(chain)
        + short_text(windows, choice)
    )
    warnings += stored_otherwise(chain, recipe, trust=request.trust_remote_code)
    warnings += without_effect(recipe, choice, teacher=request.teacher is not None)
    budget = Budget(recipe, chain.device)
    sweep = _sweep(chain, choice, recipe, windows, budget)
    windows = replace(windows, sharers=parallel.size() if sweep in RESIDENT else 1)
    extent = extent_of(windows, choice.passes)
    prediction = estimate_here(chain, choice, recipe, extent, budget)
    disk_bytes += int(parallel.total(prediction.hidden_on_disk_bytes))
    progress(Progress(NOTE, 1, 1, needed(prediction)))
    with clock.phase("check"):
        progress(Progress("check", 0, 1))
        # before digests, which the walk compares
        warnings += [
            *chain.unused(),
            *already_pruned(model, recipe),
        ]
        dense, start = _digests(model, progress)
    identity = Identity(
        recipe=choice.settings(recipe),
        model=dense,
        calibration_tokens=tokens_fingerprint(
            torch.cat([*windows.sets, windows.fresh])
        ),
        computing=computing,
        plugins=plugins.loaded(),
        start=start,
    )
    note(progress, warnings)
    return Plan(
        request,
        recipe,
        choice=choice,
        out=out,
        model=model,
        windows=windows,
        prediction=prediction,
        budget=budget,
        sweep=sweep,
        disk_bytes=disk_bytes,
        identity=identity,
        warnings=tuple(warnings),
    )


def _sweep(
    chain: Chain, choice: Choice, recipe: Recipe, windows: Windows, budget: Budget
) -> str:
    """How the sweep holds the blocks in all processes: as the one with the least room; "" for none."""
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
            unrounded=choice.trains_integers(recipe),
            ranks=parallel.size(),
            step_tokens=max(step, STEP_TOKENS // parallel.size()),
        )
    return slowest(parallel.gather(way))


def _digests(models: Models, progress: ProgressCallback) -> tuple[str, str]:
    """The digests of the dense model, and of the weights to prune; "" if they are the dense model's."""
    dense = model_fingerprint(models.teacher or models.chain, progress)
    if models.teacher is not None:
        return dense, model_fingerprint(models.chain, progress)
    if models.start is not None:
        return dense, start_fingerprint(models.start, progress)
    return dense, ""


def computing_of(chain: Chain) -> str:
    """Dtype and device of the blocks, by which a run is known. Refuses processes that differ in it, or in a plugin."""
    products = ", products in bf16" if chain.products is not None else ""
    ways = {*parallel.gather(f"{chain.dtype} on {chain.device.type}{products}")}
    if len(ways) > 1:
        differ = (
            f"processes would compute in different ways ({'; '.join(sorted(ways))})"
        )
        raise RecipeError(
            f"{differ}; set device, dtype and products, or leave out the machines that differ"
        )
    if len({*map(str, parallel.gather(sorted(plugins.loaded().items())))}) > 1:
        raise RecipeError(
            "a plugin differs between processes; give all machines the same file"
        )
    return ways.pop()


def name_patterns(recipe: Recipe) -> dict[str, Iterable[str]]:
    """The shell patterns of a recipe, by field."""
    return {
        name: getattr(recipe, name)
        for name in ("exclude", "only", "sparsity_of", "allow_dense")
    }


def with_text(
    request: Request, progress: ProgressCallback
) -> tuple[Request, list[str]]:
    """The request with the name of a calibration text, and a warning if that is a text which suits no model well."""
    if request.calibration is not None or request.recipe.calibration is not None:
        return request, []
    progress(Progress("calibration", 0, 1))
    demo = any(
        isinstance(model, str) and model == "demo"
        for model in (request.model, request.teacher)
    )
    source, warnings = parallel.from_main(partial(default_source, demo=demo))
    return replace(request, recipe=request.recipe.updated(calibration=source)), warnings


def extent_of(windows: Windows, passes: int) -> Extent:
    """The extent of a run with these windows."""
    swept = windows.swept
    ranks = parallel.size()
    return Extent(
        samples=len(windows.first),
        seq_len=windows.first.shape[1],
        batch_tokens=windows.batch_tokens,
        sets=len(windows.sets),
        swept=ranks
        * sum(swept[number % len(swept)].numel() for number in range(passes)),
        ranks=ranks,
    )


def draw_windows(
    request: Request, choice: Choice, model: Models, progress: ProgressCallback
) -> tuple[Windows, Choice]:
    """The calibration windows, and the choice with as many passes as have its tokens."""
    recipe = request.recipe
    chain = model.chain
    # The sweep takes new windows where the dense model runs next to the pruned one.
    runs = chain.reader is not None and model.teacher is None
    passes = choice.passes if runs else 0
    tokens = choice.sweep_tokens if choice.passes and recipe.passes is None else None
    if tokens is not None and not passes:
        # all tokens at once: later passes have no others
        choice = replace(choice, passes=1)
    progress(Progress("calibration", 0, 1))
    if isinstance(request.calibration, Tensor):
        read: Callable[[], Windows] = partial(
            given_windows, request.calibration, chain, recipe, choice, passes
        )
    else:
        if SELF in shares_of(recipe.calibration or "") and chain.reader is not None:
            check = partial(Budget(recipe, chain.device).check_writing, chain)
            parallel.from_main(check)
        text = (
            recipe.calibration if request.calibration is None else request.calibration
        )
        assert text is not None  # see _with_text
        read = partial(read_windows, text, recipe, model, choice, passes, progress)
    windows = parallel.from_main(read)
    if tokens is not None:
        choice = replace(choice, passes=windows.passes_over(tokens))
    return windows, choice
