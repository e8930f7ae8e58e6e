"""A run of two stages: prune to a lower sparsity and sweep, then prune on from there, towards the same dense model.

Second-order statistics hold around the model that is pruned, and a swept model at 80 % is nearer to 90 % than a dense
one. Each stage is a run and resumes by itself. The first writes ``<out>.stage``; the second takes that as its model and
the dense model as its teacher, and removes it at the end.
"""

from __future__ import annotations

import contextlib
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

from transformers import PreTrainedModel

from sparsellm import interrupts, parallel
from sparsellm.errors import RecipeError, StorageError
from sparsellm.progress import NOTE, PLAN, PhaseClock, Progress, ProgressCallback, ignore
from sparsellm.recipe import Recipe
from sparsellm.records import PRUNING, EarlierStage, Pruning, read_pruning
from sparsellm.run.choice import Choice
from sparsellm.run.plan import Request, make_plan
from sparsellm.run.prune import execute, prune
from sparsellm.run.result import PruneResult
from sparsellm.storage.directory import WorkingDirectory, differences, left_in, partial_of, stage_of
from sparsellm.storage.files import empty

PAYS = 0.8  # sparsity from which two stages pay, unstructured, with LEAST_PASSES or more (docs/results.md)
LEAST_PASSES = 3
DENSITY = 1.5  # weights that the first stage keeps / weights that the second keeps: 70 % on the way to 80 %
SHARE = 1 / 3  # passes of the first stage / all passes; each has at least one


def prune_in_stages(request: Request, progress: ProgressCallback = ignore) -> PruneResult:
    """Prunes in the one or two stages that the recipe asks for.

    Raises:
        SparseLLMError: a subclass of it that names the cause.
    """
    recipes = recipes_of(request)
    if request.out is None:
        return prune(request, progress)
    progress, clock = progress if parallel.is_main() else ignore, PhaseClock()
    place, out, dense = stage_of(request.out), Path(request.out), request.dense
    for name, model in (("model", request.model), ("teacher", request.teacher)):
        if isinstance(model, (str, Path)) and Path(model).resolve() == place.resolve():
            raise RecipeError(f"the {name} {model} is where a first stage of this run would be; give another --out")
    is_finished = parallel.from_main(partial(_settle, place, out, request.restart, two=recipes is not None))
    request.destination()
    if recipes is None or isinstance(dense, PreTrainedModel):
        plan = make_plan(request, clock, progress)
        if request.restart:
            parallel.from_main(partial(_clear, place, out))
        return execute(plan, clock, progress)
    passes, further = (Choice.of(recipe).passes for recipe in recipes)
    said = ", then ".join(f"{recipe.sparsity:.0%} with {recipe.passes} sweeps" for recipe in recipes)
    progress(Progress(NOTE, 1, 1, f"two stages: {said}"))
    request = replace(request, both=request.recipe)
    kept = is_finished and not request.restart
    tell = partial(_tell, progress, 1, further / passes)
    first = replace(request, recipe=recipes[0], out=place, overwrite=is_finished, is_complete=kept)
    plan = make_plan(first, clock, tell)
    if request.restart:
        parallel.from_main(partial(_clear, place, out))
    if not kept:
        execute(plan, clock, tell)
    elif changed := differences(read_pruning(place).identity, asdict(plan.identity)):
        raise _another(place, "; ".join(changed[:4]))
    else:
        progress(Progress(NOTE, 1, 1, f"going on from the first stage in {place}"))
    before = _earlier(parallel.from_main(partial(read_pruning, place)))
    second = replace(request, recipe=recipes[1], model=place, teacher=dense, before=before)
    result = prune(second, partial(_tell, progress, 2, 1.0))
    parallel.from_main(partial(_remove, place))
    return result


def recipes_of(request: Request) -> tuple[Recipe, Recipe] | None:
    """The recipes of the two stages; None for a run of one.

    Raises:
        RecipeError: the recipe asks for two stages, and they do not go with its other settings.
    """
    recipe, passes = request.recipe, Choice.of(request.recipe).passes
    by_name = request.out is not None and not isinstance(request.model, PreTrainedModel)
    hindered = (
        (recipe.pattern is not None, f"pattern {recipe.pattern}, which has no lower sparsity on the way"),
        (bool(recipe.sparsity_of), "sparsity_of"),
        (recipe.sparsity <= 1 - 1 / DENSITY, f"sparsity {recipe.sparsity:g}; they begin above {1 - 1 / DENSITY:.2g}"),
        (not by_name, "a model in memory; give it by name, and out=DIR"),
        (passes < 2, f"{passes} passes; give effort 2 or 3"),
    )
    why = next((said for there, said in hindered if there), None)
    if recipe.stages == 2 and why is not None:
        raise RecipeError(f"stages is 2, and two stages do not go with {why}")
    pays = recipe.sparsity >= PAYS and passes >= LEAST_PASSES and request.teacher is None
    if recipe.stages == 1 or why is not None or not (recipe.stages == 2 or pays):
        return None
    first = min(max(1, round(SHARE * passes)), passes - 1)
    sparsity = round(1 - DENSITY * (1 - recipe.sparsity), 6)
    return (
        recipe.updated(sparsity=sparsity, values="keep", stages=1, passes=first),
        recipe.updated(stages=1, passes=passes - first),
    )


def _settle(place: Path, out: Path, restart: bool, *, two: bool) -> bool:
    """Removes the first stage in ``place`` if a process was killed between the renaming of its result to ``out`` and
    the end of this removal. Returns whether there is a finished one.

    Raises:
        StorageError: another run is where the first stage belongs; or, without ``restart``, the unfinished run into
            ``out`` has another number of stages.
    """
    report, reported = _report(place), []
    with contextlib.suppress(StorageError):  # the report is absent, or is not one of sparsellm's
        reported = read_pruning(out).stages
    is_finished = report is not None and (place / "config.json").is_file()
    if report is not None and (not is_finished or reported == [_earlier(report)]):
        _remove(place)
        is_finished = False
    if reported:
        with contextlib.suppress(OSError):
            place.rmdir()  # empty only if a process was killed while it removed the directory
    begun = _begun(place)
    if two and not begun and left_in(partial_of(place)):
        raise StorageError(
            f"{partial_of(place)} holds an unfinished run into {place}, where the first stage belongs; finish that "
            "one, give another --out, or stages=1"
        )
    if not restart and not two and (is_finished or begun):
        raise _another(place if is_finished else partial_of(place), "it has two stages, and this one has one")
    if not restart and two and not is_finished and left_in(partial_of(out)) is not None:
        raise _another(partial_of(out), "it has one stage, and this one has two")
    return is_finished


def _report(place: Path) -> Pruning | None:
    """The report of the first stage in ``place``, which may be removed in part; None if it holds none."""
    with contextlib.suppress(StorageError):  # there is none, or no run of ours wrote it
        report = read_pruning(place)
        return report if report.identity.get("stage") == 1 else None
    return None


def _earlier(report: Pruning) -> EarlierStage:
    """What the result reports of its first stage."""
    return EarlierStage(**{name: getattr(report, name) for name in EarlierStage.model_fields})


def _begun(place: Path) -> bool:
    """Whether an unfinished first stage into ``place`` has begun."""
    return (left_in(partial_of(place)) or {}).get("stage") == 1


def _clear(place: Path, out: Path) -> None:
    """Removes what an unfinished run of one stage or two has left, the last part first.

    Raises:
        StorageError: a process is active in it, or it holds foreign files.
    """
    for each in (out, place) if _begun(place) else (out,):
        if left_in(partial_of(each)) is not None:
            WorkingDirectory(each, {}, overwrite=True, restart=True).discard()
    if _report(place) is not None:
        _remove(place)


def _remove(place: Path) -> None:
    """Removes a first stage: its config first, so that it is not finished any more, and its report last, so that a
    process that goes on knows whose files are left."""
    with interrupts.held(), contextlib.suppress(OSError):  # the result is complete, or the user wants to start again
        (place / "config.json").unlink(missing_ok=True)
        empty(place, (PRUNING,))
        (place / PRUNING).unlink(missing_ok=True)
        place.rmdir()


def _another(place: Path, why: str) -> StorageError:
    return StorageError(
        f"{place} holds a part of another unfinished run: {why}; repeat its settings to resume it, or give --restart "
        "to start again"
    )


def _tell(progress: ProgressCallback, number: int, ratio: float, event: Progress) -> None:
    """Shows an event of a stage. The prediction of the first includes the second, of the same cost but for the sweep,
    which has ``ratio`` times the passes."""
    if event.phase == NOTE:
        progress(event)
        return
    costs = {f"{phase}, stage {number}": cost for phase, cost in event.costs.items()}
    if number == 1:
        more = {"calibration": 0.0, "replay": 0.0, "sweep": ratio}
        costs |= {f"{phase}, stage 2": more.get(phase, 1.0) * cost for phase, cost in event.costs.items()}
    phase = event.phase if event.phase == PLAN else f"{event.phase}, stage {number}"
    progress(replace(event, phase=phase, costs=costs))
