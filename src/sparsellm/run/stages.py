"""A run of two stages: prune to a lower sparsity and sweep, then prune on from there, towards the same dense model.

What a weight is worth is judged by second-order statistics around the model that is pruned. From a dense model 90 % is
far away; from a model at 80 % that the sweep has fitted it is nearer, and so are the weights that are kept.

Each stage is a whole run with its own working directory, and resumes by itself. The first one writes ``<out>.stage``,
whose ``pruning.json`` has its identity, so that a process that goes on recognises it; it is removed at the end.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from sparsellm import interrupts, parallel, plugins
from sparsellm.errors import RecipeError, StorageError
from sparsellm.inputs.json_input import read_object
from sparsellm.progress import NOTE, PLAN, Progress, ProgressCallback, ignore
from sparsellm.recipe import Recipe
from sparsellm.run.effort import Effort
from sparsellm.run.prepare import Request, destination
from sparsellm.run.result import PruneResult
from sparsellm.run.run import Run
from sparsellm.storage.destination import partial_of, stage_of
from sparsellm.storage.resume import RunState, differences, discard, empty, left_in

PAYS = 0.8  # sparsity from which two stages pay, unstructured, with three sweeps or more (docs/results.md)
LEAST_PASSES = 3
DENSITY = 1.5  # the first stage keeps so many times the weights that the second keeps
RECORDED = ("sparsity_pruned", "sweeps", "seconds", "peak_rss_bytes")  # what a report says of the first stage
REMOVED = ".sparsellm-removed"  # the report of a first stage whose removal has begun
SHARE = 1 / 3  # of the passes in the first stage; at least one in each


@dataclass(frozen=True)
class Stage:
    """One of the two stages of a run.

    Attributes:
        asked: the recipe of the whole run.
        passes: sweeps of both stages.
        swept: sweeps of the stage before this one, whose windows this one does not take again.
        copies: of the checkpoint that are on the disk at once, from this stage on.
        before: the record of the stage before this one; None for the first.
    """

    asked: Recipe
    passes: int
    swept: int = 0
    copies: int = 2
    before: dict[str, Any] | None = None


def execute(request: Request, progress: ProgressCallback = ignore) -> PruneResult:
    """Runs all stages of a request, mostly one.

    Raises:
        SparseLLMError: a subclass of it that names the cause.
    """
    plugins.load_installed()  # the recipe may name what they register; each run warns of those left out
    recipes = recipes_of(request)
    if request.out is None:
        return Run(request, progress).execute()
    progress = progress if parallel.is_main() else ignore
    place = stage_of(request.out)
    _check_models(request, place)
    parallel.from_main(partial(_remove_leftover, place, Path(request.out)))
    out = destination(request)
    assert out is not None
    parallel.from_main(partial(_refuse, place, out, request.restart, alone=recipes is None))
    clear = partial(_clear, place, out, alone=recipes is None) if request.restart else None
    if recipes is None:
        run = Run(request, progress)
        _open(run, clear)
        return run.finish()
    passes = [Effort.of(recipe).passes for recipe in recipes]
    first = Stage(request.recipe, sum(passes), copies=3)  # of the first stage, of the walk after it, and of the sweep
    parts = [f"{recipe.sparsity:.0%} with {sweeps} sweeps" for recipe, sweeps in zip(recipes, passes, strict=True)]
    progress(Progress(NOTE, 1, 1, f"two stages: {', then '.join(parts)}"))
    record = _first(replace(request, recipe=recipes[0], stage=first), place, partial(_tell, progress, 1, passes), clear)
    dense = request.dense
    assert not isinstance(dense, PreTrainedModel)  # recipes_of takes it as one stage
    second = Stage(request.recipe, sum(passes), swept=passes[0], before=record)
    result = Run(
        replace(request, recipe=recipes[1], model=place, teacher=dense, stage=second),
        partial(_tell, progress, 2, passes),
    ).execute()
    parallel.from_main(partial(_remove, place))
    return result


def recipes_of(request: Request) -> tuple[Recipe, Recipe] | None:
    """The recipes of the two stages; None for a run of one.

    Raises:
        RecipeError: the recipe asks for two stages, and they do not go with its other settings.
    """
    recipe, effort = request.recipe, Effort.of(request.recipe)
    if effort.stages == 1:
        return None
    by_name = request.out is not None and not isinstance(request.model, PreTrainedModel)
    hindered = (
        (recipe.pattern is not None, f"pattern {recipe.pattern}, which has no lower sparsity on the way"),
        (bool(recipe.sparsity_of), "sparsity_of"),
        (recipe.sparsity <= 1 - 1 / DENSITY, f"sparsity {recipe.sparsity:g}; they begin above {1 - 1 / DENSITY:.2g}"),
        (not by_name, "a model in memory; give it by name, and out=DIR"),
    )
    why = next((said for there, said in hindered if there), None)
    if effort.stages is None and (
        why is not None or recipe.sparsity < PAYS or effort.passes < LEAST_PASSES or request.teacher is not None
    ):
        return None
    if why is not None:
        raise RecipeError(f"stages is 2, and two stages do not go with {why}")
    passes = min(max(1, round(SHARE * effort.passes)), effort.passes - 1)
    sparsity = round(1 - DENSITY * (1 - recipe.sparsity), 6)
    return (
        recipe.updated(sparsity=sparsity, values="keep", stages=1, passes=passes),
        recipe.updated(stages=1, passes=effort.passes - passes),
    )


def _first(
    request: Request, place: Path, progress: ProgressCallback, clear: Callable[[], None] | None
) -> dict[str, Any]:
    """Runs the first stage unless an earlier process finished it; returns its record. Parts of an unfinished run are
    removed with ``clear``, if it is given."""
    identity, stage = parallel.from_main(partial(_identity, place)), request.stage
    if identity is not None and stage is not None:  # its files are there; the second stage checks for its own
        request = replace(request, stage=replace(stage, copies=0))
    run = Run(replace(request, out=place, overwrite=identity is not None), progress)
    _open(run, clear)
    if identity is None or clear is not None:
        run.stage = stage  # files that were there are removed: room for new ones is checked
        run.finish()
    elif changed := differences(identity, run.identity.to_dict()):
        raise _another(place, "; ".join(changed[:4]))
    else:
        progress(Progress(NOTE, 1, 1, f"going on from the first stage in {place}"))
    return parallel.from_main(partial(_record, place))


def _open(run: Run, clear: Callable[[], None] | None) -> None:
    """Opens and plans a run. Nothing is removed before its arguments, text and model have been checked."""
    run.open()
    run.plan()
    if clear is not None:
        parallel.from_main(clear)


def _identity(place: Path) -> dict[str, Any] | None:
    """The identity of the finished first stage in ``place``; None if it holds none."""
    report = place / "pruning.json"
    try:
        found = read_object(report) if report.is_file() else {}
    except StorageError:  # no run of ours wrote it
        return None
    identity = found.get("stage")
    return identity if isinstance(identity, dict) and found.keys() >= set(RECORDED) else None


def _record(place: Path) -> dict[str, Any]:
    """What the report of a run says of its first stage."""
    report = read_object(place / "pruning.json")
    return {key: report[key] for key in RECORDED}


def _remove_leftover(place: Path, out: Path) -> None:
    """Removes the first stage in ``place`` if a process was killed when its result had just got the name ``out``, or
    while it removed that stage."""
    if (place / REMOVED).is_file():
        _remove(place)
    report = out / "pruning.json"
    stages = read_object(report).get("stages") if report.is_file() else None
    if not stages:
        return
    if _identity(place) is not None and stages == [_record(place)]:
        _remove(place)
    with contextlib.suppress(OSError):
        place.rmdir()  # empty only if a process was killed while it removed the directory


def _refuse(place: Path, out: Path, restart: bool, *, alone: bool) -> None:
    """Refuses what another run left in the directory of the first stage, which ``restart`` may remove later.

    Raises:
        StorageError: there is a first stage and the run has one stage only, or there is a second one without a first;
            or another run stands where the first stage belongs, or is active there.
    """
    finished, unfinished = _identity(place) is not None, _begun(place)
    left = left_in(partial_of(place))
    if not alone and left is not None and left.identity is not None and not unfinished:
        raise StorageError(
            f"{partial_of(place)} holds an unfinished run into {place}, where the first stage belongs; finish that "
            "one, give another --out, or stages=1"
        )
    if restart:
        return
    if alone and (finished or unfinished):
        raise _another(place if finished else partial_of(place), "it has two stages, and this one has one")
    if not alone and not finished and left_in(partial_of(out)) is not None:
        raise _another(partial_of(out), "it has one stage, and this one has two")


def _clear(place: Path, out: Path, *, alone: bool) -> None:
    """Removes the first stage of an unfinished run, so that this one begins anew."""
    unfinished = _begun(place)
    if _identity(place) is not None:
        _drop(partial_of(out))  # the second stage, which a process that is killed here could not go on with
        _remove(place)
    if alone and unfinished:
        _drop(partial_of(place))
        discard(partial_of(place, second=True))


def _begun(place: Path) -> bool:
    """Whether the first stage of a run has begun, and is not finished."""
    left = left_in(partial_of(place))
    return left is not None and left.identity is not None and left.identity.get("stage") == 1


def _check_models(request: Request, place: Path) -> None:
    """Refuses a model that stands where the first stage of this run belongs, and would be removed.

    Raises:
        RecipeError: the model or its teacher is there.
    """
    for name, model in (("model", request.model), ("teacher", request.teacher)):
        if isinstance(model, (str, Path)) and Path(model).resolve() == place.resolve():
            raise RecipeError(f"the {name} {model} is where a first stage of this run would be; give another --out")


def _another(place: Path, why: str) -> StorageError:
    return StorageError(
        f"{place} holds a part of another unfinished run: {why}; repeat its settings to resume it, or give --restart "
        "to start again"
    )


def _drop(partial: Path) -> None:
    """Removes the unfinished run in a working directory, if there is one.

    Raises:
        StorageError: a process is active in it, or it holds foreign files.
    """
    left = left_in(partial)
    if left is not None and left.kind is not None and left.identity is not None:
        RunState(partial, left.identity, kind=left.kind).discard()


def _remove(place: Path) -> None:
    """Removes a first stage. Its report gets another name first and is removed last, so that a process that goes on
    knows what an interrupted removal has left."""
    report, removed = place / "pruning.json", place / REMOVED
    with interrupts.held(), contextlib.suppress(OSError):  # the result is complete, or the user wants to start again
        if report.is_file():
            os.replace(report, removed)
        empty(place, (removed.name,))
        removed.unlink(missing_ok=True)
        place.rmdir()


def _tell(progress: ProgressCallback, number: int, passes: list[int], event: Progress) -> None:
    """Shows an event of a stage; the prediction of the first includes the second, of the same cost but for passes."""
    if event.phase == NOTE:
        progress(event)
        return

    def name(phase: str, stage: int) -> str:
        return f"{phase}, stage {stage}"

    costs = {name(phase, number): cost for phase, cost in event.costs.items()}
    if number == 1 and event.phase == PLAN:
        more = {"calibration": 0.0, "replay": 0.0, "sweep": passes[1] / passes[0]}
        costs |= {name(phase, 2): more.get(phase, 1.0) * cost for phase, cost in event.costs.items()}
    progress(replace(event, phase=event.phase if event.phase == PLAN else name(event.phase, number), costs=costs))
