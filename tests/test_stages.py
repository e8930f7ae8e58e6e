"""A run of two stages: a lower sparsity first, then on from there, towards the same dense model."""

from __future__ import annotations

import shutil
import sys
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import DataError, NumericalError, RecipeError, StorageError
from sparsellm.progress import NOTE, PLAN, Progress
from sparsellm.run import plan, stages
from sparsellm.run import prune as story
from sparsellm.run.plan import Plan, Request
from sparsellm.run.predictions import Demand
from sparsellm.run.stages import recipes_of
from sparsellm.storage.directory import partial_of, stage_of
from sparsellm.sweep.whole_model import SweepTask
from tests import killing
from tests.models import save_tiny, tiny_llama, tiny_tokenizer
from tests.parallel import workers
from tests.parallel.processes import run_in
from tests.test_resume import contents, fail_in_block

SETTINGS: dict[str, Any] = {
    "sparsity": 0.8, "samples": 4, "seq_len": 24, "batch_tokens": 48, "dtype": "float32",
    "passes": 3, "sweep_rate": 0.0007, "stages": 2,
}  # fmt: skip
Whole = tuple[dict[str, Any], dict[str, int]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_llama().to(torch.bfloat16), tiny_tokenizer(), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """The files of an uninterrupted run, and its steps."""
    out = tmp_path_factory.mktemp("whole") / "p"
    steps = killing.run(killing.prune, source, out, SETTINGS).steps
    return without_times(out), steps


def without_times(out: Path) -> dict[str, Any]:
    found = contents(out)
    for stage in found["pruning.json"]["stages"]:
        del stage["seconds"], stage["peak_rss_bytes"]
    return found


def names(out: Path) -> list[str]:
    return sorted(path.name for path in out.parent.glob(f"{out.name}*"))


def prune(source: Path, out: Path, **kwargs: Any) -> sparsellm.PruneResult:
    return sparsellm.prune(source, Recipe(**SETTINGS), out=out, **kwargs)


def test_the_second_stage_goes_on_from_the_first(source: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """It takes windows that the first has not swept, and the result says what both did."""
    tasks: list[SweepTask] = []
    sweep = story.sweep
    monkeypatch.setattr(story, "sweep", lambda task: (tasks.append(task), sweep(task))[1])
    seen: list[Progress] = []
    result = prune(source, tmp_path / "p", progress=seen.append)
    assert [(task.passes, task.swept, len(task.fresh)) for task in tasks] == [(1, 0, 2), (2, 1, 2)]
    assert torch.equal(tasks[0].feed.windows, tasks[1].feed.windows)
    (first,) = result.stages
    assert first.sparsity_pruned == pytest.approx(0.7, abs=1e-3)
    assert (len(first.sweeps), len(result.sweeps)) == (2, 3)
    assert result.zeros == round(0.8 * result.weights)
    assert sum(result.seconds.values()) > sum(first.seconds.values())
    assert (result.recipe.passes, result.recipe.stages) == (3, 2)
    assert result.base.name == str(source)
    assert Recipe.from_yaml(tmp_path / "p" / "recipe.yaml") == result.recipe
    assert names(tmp_path / "p") == ["p"]
    assert "A first stage, at sparsity 70%, was left at" in (tmp_path / "p" / "report.html").read_text(encoding="utf-8")
    phases = {event.phase for event in seen} - {NOTE, PLAN}
    assert {"sweep, stage 1", "sweep, stage 2"} <= phases
    assert not [phase for phase in phases if ", stage " not in phase]
    planned = next(event.costs for event in seen if event.phase == PLAN)
    assert planned["sweep, stage 2"] == pytest.approx(2 * planned["sweep, stage 1"])


@pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")
def test_killed_anywhere_it_ends_in_the_same_bytes(source: Path, whole: Whole, tmp_path: Path) -> None:
    expected, steps = whole
    total = sum(steps.values())
    for number in [*killing.some(3, total, seed=1), total - 5, total]:
        out = tmp_path / f"p{number}"
        assert killing.run(killing.prune, source, out, SETTINGS, at=number).code == killing.KILLED
        if out.exists():
            with pytest.raises(StorageError, match="exists and is not empty"):
                prune(source, out)
        else:
            assert killing.run(killing.prune, source, out, SETTINGS).code == 0
        assert without_times(out) == expected, number
        assert names(out) == [out.name]


@pytest.fixture(scope="module")
def halfway(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run into `p` that stopped in its second stage."""
    folder, walk = tmp_path_factory.mktemp("halfway"), story.walk

    def stopping(plan: Plan, *arguments: Any) -> Any:
        if plan.model.start is not None:
            raise NumericalError("the processor caught fire")
        return walk(plan, *arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(story, "walk", stopping)
        with pytest.raises(NumericalError):
            prune(source, folder / "p")
    assert names(folder / "p") == ["p.partial", "p.stage"]
    return folder


@pytest.fixture
def out(halfway: Path, tmp_path: Path) -> Path:
    """The directory of a run that stopped in its second stage."""
    return shutil.copytree(halfway, tmp_path, dirs_exist_ok=True) / "p"


def test_a_finished_stage_is_not_repeated(source: Path, out: Path, whole: Whole, monkeypatch: Any) -> None:
    walks: list[bool] = []
    walk = story.walk
    monkeypatch.setattr(story, "walk", lambda plan, *rest: (walks.append(bool(plan.model.start)), walk(plan, *rest))[1])
    prune(source, out)
    assert walks == [True]
    assert without_times(out) == whole[0]


def test_the_stages_of_another_run_are_refused_or_removed(source: Path, out: Path) -> None:
    for changes, said in (
        ({"stages": 1}, "it has two stages, and this one has one"),
        ({"seed": 1}, "recipe.seed is 0 there and 1 here"),
    ):
        with pytest.raises(StorageError, match=said) as caught:
            sparsellm.prune(source, Recipe(**{**SETTINGS, **changes}), out=out)
        assert "--restart" in str(caught.value)
    sparsellm.prune(source, Recipe(**{**SETTINGS, "passes": 0, "stages": 1}), out=out, restart=True)
    assert names(out) == ["p"]


@pytest.mark.parametrize("number", [1, 2])
def test_a_restart_with_bad_input_removes_nothing(number: int, source: Path, out: Path, tmp_path: Path) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    there = {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()}
    wrong = {"stages": number, "calibration": str(short)}
    with pytest.raises(DataError, match="tokens"):
        sparsellm.prune(source, Recipe(**{**SETTINGS, **wrong}), out=out, restart=True)
    assert {path: path.stat().st_size for path in tmp_path.rglob("*") if path.is_file()} == there


@pytest.mark.parametrize("removed", ["shards", "records"])
def test_a_removal_that_was_cut_short_is_completed(
    removed: str, source: Path, out: Path, whole: Whole, monkeypatch: pytest.MonkeyPatch
) -> None:
    """--restart removes the first stage; no later run needs --restart again, or keeps a part of it."""

    def killed(folder: Path, keep: tuple[str, ...]) -> None:
        for path in folder.glob("*.safetensors" if removed == "shards" else "*.json"):
            if path.name not in keep:
                path.unlink()
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(stages, "empty", killed)
        with pytest.raises(ZeroDivisionError):
            prune(source, out, restart=True)
    assert names(out) == ["p.stage"]
    prune(source, out)
    assert without_times(out) == whole[0]
    assert names(out) == ["p"]


def test_a_run_of_one_stage_is_not_gone_on_with(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is refused before the first stage, not after it."""
    out = tmp_path / "p"
    with monkeypatch.context() as patch:
        patch.setattr(story, "sweep", lambda task: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sparsellm.prune(source, Recipe(**{**SETTINGS, "stages": 1}), out=out)
    with pytest.raises(StorageError, match="it has one stage, and this one has two"):
        prune(source, out)
    assert not partial_of(stage_of(out)).exists()


def test_a_directory_of_somebody_else_is_left_alone(source: Path, tmp_path: Path) -> None:
    place = stage_of(tmp_path / "p")
    place.mkdir()
    (place / "thesis.tex").write_text("\\chapter{}")
    with pytest.raises(StorageError, match=r"p\.stage exists and is not empty"):
        prune(source, tmp_path / "p")
    assert [path.name for path in place.iterdir()] == ["thesis.tex"]


def test_the_run_of_somebody_else_is_left_alone(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An unfinished run into `p.stage` is no first stage of a run into `p`; an empty directory is not ours either."""
    place = stage_of(tmp_path / "p")
    one = Recipe(**{**SETTINGS, "passes": 0, "stages": 1})
    with monkeypatch.context() as patch:
        fail_in_block(1, patch)
        with pytest.raises(NumericalError):
            sparsellm.prune(source, one, out=place)
    sparsellm.prune(source, one, out=tmp_path / "p", restart=True)
    for restart in (False, True):
        with pytest.raises(StorageError, match="where the first stage belongs"):
            prune(source, tmp_path / "p", overwrite=True, restart=restart)
    assert partial_of(place).exists()
    stage_of(tmp_path / "q").mkdir()
    sparsellm.prune(source, one, out=tmp_path / "q")
    assert stage_of(tmp_path / "q").exists()
    (stage_of(tmp_path / "q") / "pruning.json").write_text("{")
    sparsellm.prune(source, one, out=tmp_path / "q", overwrite=True)


def test_a_model_in_the_place_of_the_first_stage_is_refused(source: Path, tmp_path: Path) -> None:
    place = stage_of(tmp_path / "p")
    shutil.copytree(source, place)
    with pytest.raises(RecipeError, match="where a first stage of this run would be"):
        prune(place, tmp_path / "p", restart=True)
    with pytest.raises(RecipeError, match=r"the teacher .* is where a first stage"):
        sparsellm.prune(source, Recipe(sparsity=0.8), out=tmp_path / "p", teacher=place, restart=True)
    assert (place / "model.safetensors").exists()


def room_for(models: float, source: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Gives every disk room for this number of the source's files of weights."""
    usage = namedtuple("usage", "total used free")
    free = int(models * (source / "model.safetensors").stat().st_size)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(free, 0, free))


def test_a_finished_stage_needs_no_second_place_on_the_disk(source: Path, out: Path, monkeypatch: Any) -> None:
    room_for(2.2, source, monkeypatch)
    prune(source, out)
    assert names(out) == ["p"]


def test_several_processes_go_through_the_stages_together(tmp_path: Path) -> None:
    save_tiny(tiny_llama(num_hidden_layers=2), tiny_tokenizer(), tmp_path / "dense")
    run_in(2, workers.prune_in_two_stages, tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        workers.prune_in_two_stages(tmp_path)
    finally:
        torch.set_num_threads(threads)
    shards = sorted((tmp_path / "p1").glob("*.safetensors"))
    assert len(shards) == 3
    for shard in shards:
        assert shard.read_bytes() == (tmp_path / "p2" / shard.name).read_bytes()
    assert sorted(path.name for path in tmp_path.glob("p*")) == ["p1", "p2"]


def request(**changes: Any) -> Request:
    settings = {"sparsity": 0.9, "effort": 2, **changes}
    return Request("model", Recipe(**settings), "out")


def test_both_stages_draw_one_text_and_foresee_the_memory(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    demands: list[Demand] = []
    drawn: list[Any] = []
    read, predict = plan.read_windows, plan.plan_memory

    def predicting(chain: Any, demand: Demand, *arguments: Any, **options: Any) -> Any:
        demands.append(demand)
        return predict(chain, demand, *arguments, **options)

    monkeypatch.setattr(plan, "read_windows", lambda *args: (drawn.append(args), read(*args))[1])
    monkeypatch.setattr(plan, "plan_memory", predicting)
    sparsellm.prune(source, Recipe(**SETTINGS, values="int4"), out=tmp_path / "p")
    assert len(drawn) == 1
    first, second = demands
    assert first.unrounded
    assert first.workspace == second.workspace


def test_two_stages_where_they_pay() -> None:
    recipes = recipes_of(request())
    assert recipes is not None
    assert [(recipe.sparsity, recipe.passes) for recipe in recipes] == [(0.85, 1), (0.9, 2)]
    recipes = recipes_of(request(effort=3, values="int4"))
    assert recipes is not None
    assert [(recipe.values, recipe.passes) for recipe in recipes] == [("keep", 3), ("int4", 5)]
    for changes in (
        {"effort": 1},
        {"sparsity": 0.7, "effort": 3},
        {"effort": 2, "stages": 1},
        {"sparsity_of": {"*.o_proj": 0.5}},
        {"method": "wanda", "effort": None},
    ):
        assert recipes_of(request(**changes)) is None, changes
    assert recipes_of(Request("model", Recipe(pattern="1:16", effort=2), "out")) is None
    assert recipes_of(Request("model", request().recipe, "out", teacher="dense")) is None
    assert recipes_of(Request("model", request().recipe)) is None


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"pattern": "2:8", "sparsity": 0.75}, "pattern 2:8"),
        ({"sparsity": 0.33}, "sparsity 0.33; they begin above 0.33"),
        ({"sparsity_of": {"*.o_proj": 0.5}}, "sparsity_of"),
        ({"passes": 1}, "1 passes; give effort 2 or 3"),
    ],
)
def test_two_stages_that_cannot_be_are_refused(changes: dict[str, Any], reason: str) -> None:
    with pytest.raises(RecipeError, match=f"stages is 2, and two stages do not go with {reason}"):
        recipes_of(request(stages=2, **changes))


def test_a_model_in_memory_is_pruned_in_one_stage() -> None:
    with pytest.raises(RecipeError, match="do not go with a model in memory"):
        recipes_of(Request(tiny_llama(), request(stages=2).recipe, "out"))
