"""Allocation in a whole run: recipe, command line, what is written, and going on after a crash."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import sparsellm
from sparsellm import Recipe, cli
from sparsellm.allocation import ALLOCATIONS
from sparsellm.chain import open_chain
from sparsellm.errors import RecipeError
from sparsellm.patterns import Unstructured
from sparsellm.progress import Progress
from sparsellm.run.choice import patterns_of as plan_of
from sparsellm.run.predictions import gradient_bytes
from tests.allocation.helpers import survey_of, windows
from tests.models import save_tiny, tiny_llama, tiny_opt, tiny_tokenizer
from tests.shares import Share

SMALL = ("--samples", "4", "--seq-len", "24", "--sparsity", "0.6", "--method", "wanda")


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    def call(*arguments: Any) -> tuple[int, str, str]:
        monkeypatch.setattr("sys.argv", ["sparsellm", *map(str, arguments)])
        code = 0
        try:
            cli.main()
        except SystemExit as done:
            code = int(done.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


@pytest.mark.parametrize("name", ["atp", "owl", "dlp", "threshold"])
def test_the_total_of_a_run_is_exact_and_each_linear_has_what_was_asked(name: str) -> None:
    model = tiny_llama()
    recipe = Recipe(method="sparsegpt", sparsity=0.6, allocation=name, exclude=["*.k_proj"])
    result = sparsellm.prune(model, recipe, calibration=windows())
    assert not any("k_proj" in linear.name for linear in result.linears)
    assert result.zeros == round(0.6 * result.weights)
    for linear in result.linears:
        zeros = int((model.get_submodule(linear.name).weight == 0).sum())
        assert zeros == linear.zeros == round(linear.asked * linear.shape[0] * linear.shape[1])
    assert len({round(linear.asked, 3) for linear in result.linears}) > 1


def test_the_command_line_chooses_lists_and_reports(tmp_path: Path, run: Any) -> None:
    source = save_tiny(tiny_llama(), tiny_tokenizer(), tmp_path / "dense")
    out = tmp_path / "p"
    option = ("--set", "allocation_options.b=0.05")
    code, stdout, _ = run("prune", source, "--out", out, "--allocation", "atp", *option, *SMALL, "--json")
    assert code == 0
    report = json.loads((out / "pruning.json").read_text())
    assert report["recipe"]["allocation"] == "atp"
    assert report["recipe"]["allocation_options"] == {"b": 0.05}
    assert report["zeros"] == round(0.6 * report["weights"])
    asked = {linear["name"]: linear["asked"] for linear in report["linears"]}
    assert asked["model.layers.0.mlp.up_proj"] == pytest.approx(0.55, abs=1e-3)
    assert asked["model.layers.2.mlp.up_proj"] == pytest.approx(0.65, abs=1e-3)
    assert json.loads(stdout)["linears"] == report["linears"]
    assert Recipe.from_yaml(out / "recipe.yaml").allocation_options == {"b": 0.05}
    code, stdout, _ = run("methods", "--json")
    assert code == 0
    assert json.loads(stdout)["allocations"]["owl"]["options"]["M"]["default"] == 5.0
    assert json.loads(stdout)["allocations"].keys() == {entry.name for entry in ALLOCATIONS}
    code, stdout, _ = run("methods")
    assert "allocation_options.span" in stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--allocation", "owk"), "'owl'"),
        (("--allocation", "atp", "--set", "allocation_options.slope=1"), "no option 'slope'"),
        (("--allocation", "threshold", "--set", "allocation_options.span=7"), "span of threshold is 7"),
        (("--allocation", "threshold", "--set", "allocation_options.span=2"), "span of threshold is 2"),
    ],
)
def test_mistakes_are_one_line_before_any_work(arguments: tuple[str, ...], said: str, tmp_path: Path, run: Any) -> None:
    source = save_tiny(tiny_opt(), tiny_tokenizer(), tmp_path / "dense")
    code, _, stderr = run("prune", source, "--out", tmp_path / "p", *arguments, *SMALL)
    assert code == 2
    assert said in stderr
    assert [line for line in stderr.splitlines() if "error" in line] == [stderr.rstrip().splitlines()[-1]]
    assert "Traceback" not in stderr
    assert not list(tmp_path.glob("p*"))


def test_a_fixed_pattern_takes_uniform_only(tmp_path: Path, run: Any) -> None:
    with pytest.raises(RecipeError, match="pattern 2:4, which fixes"):
        Recipe(pattern="2:4", allocation="owl")
    with pytest.raises(RecipeError, match="pattern 2:4, which fixes"):
        Recipe(allocation="owl").updated(pattern="2:4")
    assert Recipe(pattern="2:4", allocation="uniform").sparsity == 0.5
    code, _, stderr = run("prune", "demo", "--out", tmp_path / "p", "--pattern", "2:4", "--allocation", "owl")
    assert code == 2
    assert "which fixes the sparsity of every linear" in stderr


def test_a_method_has_an_allocation_of_its_own() -> None:
    def shares(recipe: Recipe) -> tuple[str | None, list[int]]:
        result = sparsellm.prune(tiny_llama(), recipe, calibration=windows())
        assert result.recipe.allocation == recipe.allocation  # what was not chosen is still open to the next run
        assert Recipe.from_yaml(result.recipe.to_yaml()) == result.recipe
        return result.allocation.get("name"), [linear.zeros for linear in result.linears]

    own = shares(Recipe(sparsity=0.6, effort=0))
    assert own == shares(Recipe(sparsity=0.6, effort=0, allocation="threshold"))
    assert own[0] == "threshold"
    alike = shares(Recipe(sparsity=0.6, effort=0, allocation="uniform"))
    assert alike[0] is None
    assert own[1] != alike[1]
    assert shares(Recipe(method="sparsegpt", sparsity=0.6)) == alike
    assert shares(Recipe(pattern="2:4", effort=0)) == shares(Recipe(pattern="2:4", effort=0, allocation="uniform"))
    assert shares(Recipe(sparsity=0.0))[0] is None
    recipe = Recipe(effort=0, allocation_options={"span": 0.0}, pattern="2:4")
    with pytest.raises(RecipeError, match="uniform has no option 'span'"):
        sparsellm.prune(tiny_llama(), recipe, calibration=windows())


def test_the_summary_says_how_far_shares_are_apart(tmp_path: Path, run: Any) -> None:
    source = save_tiny(tiny_llama(), tiny_tokenizer(), tmp_path / "dense")
    size = ("--samples", "4", "--seq-len", "24", "--effort", "0")
    code, stdout, _ = run("prune", source, "--out", tmp_path / "p", "--sparsity", "0.6", *size)
    assert code == 0
    assert "sparsellm 60% by threshold" in stdout
    linears = json.loads((tmp_path / "p" / "pruning.json").read_text())["linears"]
    keys = [linear["sparsity"] for linear in linears if linear["name"].endswith("k_proj")]
    (row,) = (line for line in stdout.splitlines() if "k_proj" in line)
    assert f"{min(keys):.0%} – {max(keys):.0%}" in row
    code, stdout, _ = run("prune", source, "--out", tmp_path / "q", "--pattern", "2:4", *size)
    assert code == 0
    assert "sparsellm 2:4 · calibrated" in stdout
    assert "least" not in stdout


def test_room_for_the_gradients_is_planned_until_the_shares_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tiny_llama(), tiny_tokenizer(), tmp_path / "dense")
    many = windows(100, 40)  # of which the gradients keep more than the walk
    recipe = Recipe(sparsity=0.6, effort=0)

    def planned(**changes: Any) -> int:
        plan = sparsellm.prune(source, recipe.updated(**changes), calibration=many, out=tmp_path / "p", overwrite=True)
        assert plan.memory is not None
        return plan.memory.hidden_in_memory_bytes + plan.memory.hidden_on_disk_bytes

    walk = planned(allocation="uniform", effort=0, options={"output_metric": 0})
    swept = gradient_bytes(open_chain(source, device=torch.device("cpu")), many.numel())
    assert planned(allocation="uniform") == planned() == swept > walk
    with monkeypatch.context() as patched:
        patched.setattr("sparsellm.run.prune.walk", None)
        with pytest.raises(TypeError):
            planned()
    assert planned() == walk  # the cut run has left what it found: shares, and what errors of outputs cost


def test_nothing_to_prune_asks_nothing_of_the_model() -> None:
    model, untouched = tiny_opt(), tiny_opt()
    result = sparsellm.prune(model, Recipe(method="wanda", sparsity=0.0, allocation="threshold"), calibration=windows())
    assert result.zeros == 0
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), untouched.parameters(), strict=True))


def test_the_plan_without_an_allocation_is_the_recipe_s_pattern_everywhere() -> None:
    model = tiny_opt()
    chain = open_chain(model, device=torch.device("cpu"))
    survey = survey_of(model, 0.3)
    assert plan_of(chain, Recipe(sparsity=0.3)) == {x.name: Share(0.3).of(x.shape) for x in survey.linears}
    found = ALLOCATIONS["owl"].function(survey)
    patterns = plan_of(chain, Recipe(sparsity=0.3, allocation="owl"), found)
    assert patterns == {x.name: Unstructured(found.zeros[x.name], x.weights) for x in survey.linears}


def test_a_run_that_goes_on_does_not_try_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_tiny(tiny_llama(), tiny_tokenizer(), tmp_path / "dense")
    recipe = Recipe(method="wanda", sparsity=0.6, allocation="threshold")
    whole = sparsellm.prune(source, recipe, calibration=windows(), out=tmp_path / "whole")

    class CutShortError(Exception):
        pass

    def progress(event: Progress) -> None:
        if event.phase == "prune" and event.done >= 1:
            raise CutShortError

    with pytest.raises(CutShortError):
        sparsellm.prune(source, recipe, calibration=windows(), out=tmp_path / "cut", progress=progress)
    with monkeypatch.context() as patched:
        patched.setattr("sparsellm.allocation.survey.Survey.__init__", None)  # nobody may look at the model again
        resumed = sparsellm.prune(source, recipe, calibration=windows(), out=tmp_path / "cut")
    assert resumed.resumed == 1
    assert resumed.allocation == whole.allocation
    assert resumed.allocation["tokens"] == windows().numel()
    for shard in (tmp_path / "whole").glob("*.safetensors"):
        one, two = load_file(shard), load_file(tmp_path / "cut" / shard.name)
        assert all(torch.equal(value, two[name]) for name, value in one.items())
