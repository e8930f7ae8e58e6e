"""Every example runs, on a tiny model."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from sparsellm import Recipe
from tests.models import save_tiny, tiny_llama, tiny_tokenizer

EXAMPLES = Path(__file__).parents[1] / "examples"
RECIPES = sorted((EXAMPLES / "recipes").glob("*.yaml"))
pytestmark = pytest.mark.usefixtures("forgotten_plugins")
SMALL = ("--samples", 4, "--seq-len", 32)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tiny_llama(), tiny_tokenizer(), tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_a_recipe_prunes_to_what_it_says(recipe: Path, llama: Path, tmp_path: Path, run: Any) -> None:
    code, stdout, stderr = run("prune", llama, "--out", tmp_path / "p", "--recipe", recipe, *SMALL, "--json")
    assert code == 0, stderr
    report = json.loads(stdout)
    wanted = Recipe.from_yaml(recipe)
    assert report["recipe"]["method"] == wanted.method
    assert report["sparsity_pruned"] == pytest.approx(wanted.sparsity, abs=1e-3)
    for field in wanted.model_fields_set - {"samples", "seq_len", "sparsity"}:
        assert report["recipe"][field] == getattr(wanted, field)
    attention = [linear for linear in report["linears"] if "attn" in linear["name"]]
    assert (attention == []) == (recipe.stem == "dense-attention")
    if wanted.pattern:
        assert json.loads(run("inspect", tmp_path / "p", "--json")[1])["pattern"] == wanted.pattern


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_each_recipe_says_when_to_take_it(path: Path) -> None:
    comment = [line.strip("# \n") for line in path.read_text().splitlines() if line.startswith("#")]
    assert "Take it" in " ".join(comment)
    assert f"--recipe examples/recipes/{path.name}" in comment[-1]


def test_the_solver_loses_less_than_wanda_whose_mask_it_has(llama: Path, tmp_path: Path, run: Any) -> None:
    errors = {}
    for name, options in {
        "wanda": (),
        "wanda-refit": (),
        "plain": ("--set", "options.iterations=0"),
    }.items():
        method = "wanda-refit" if name == "plain" else name
        code, stdout, stderr = run(
            "prune", llama, "--out", tmp_path / name, "--plugin", EXAMPLES / "my_solver.py", "--method", method,
            *options, *SMALL, "--json",
        )  # fmt: skip
        assert code == 0, stderr
        errors[name] = json.loads(stdout)["linears"][0]["error"]  # the first linear has the same inputs in all runs
    assert errors["wanda-refit"] < 0.9 * errors["wanda"]
    assert errors["plain"] == pytest.approx(errors["wanda"])


def test_the_script_prunes_and_measures(llama: Path, tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "prune.py", llama, tmp_path / "p", "samples=2", "seq_len=16"]
    command += ["effort=0"]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert "50.0%" in done.stdout
    assert done.stdout.count("perplexity") == 2
    assert (tmp_path / "p" / "pruning.json").is_file()
    again = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    assert again.returncode == 1
    assert "is not empty" in again.stderr
    assert "Traceback" not in again.stderr
