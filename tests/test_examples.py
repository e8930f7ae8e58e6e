"""Every example runs, on a tiny model."""

from __future__ import annotations

import ast
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsellm
from sparsellm import Recipe
from tests.files.small import tensors_of
from tests.models import save_tiny, tiny_tokenizer
from tests.models.families import mixtral

EXAMPLES = Path(__file__).parents[1] / "examples"
pytestmark = pytest.mark.usefixtures("forgotten_plugins")
SMALL = ("--samples", 4, "--seq-len", 32)


@pytest.mark.parametrize(
    "recipe", sorted((EXAMPLES / "recipes").glob("*.yaml")), ids=lambda path: path.stem
)
def test_a_recipe_says_when_to_take_it_and_prunes_so(
    recipe: Path, llama: Path, tmp_path: Path, run: Any
) -> None:
    model = (
        llama
        if recipe.stem != "experts"
        else save_tiny(mixtral(), tiny_tokenizer(), tmp_path / "mixture")
    )
    line = ("prune", model, "--out", tmp_path / "p", "--recipe", recipe, *SMALL)
    report = json.loads(run(*line, "--json", exits=0)[1])
    expected = Recipe.from_yaml(recipe)
    assert report["recipe"]["method"] == expected.method
    assert report["sparsity_pruned"] == pytest.approx(expected.sparsity, abs=1e-3)
    for field in expected.model_fields_set - {"samples", "seq_len", "sparsity"}:
        assert report["recipe"][field] == getattr(expected, field)
    comment = [
        line.strip("# \n")
        for line in recipe.read_text().splitlines()
        if line.startswith("#")
    ]
    assert "Take it" in " ".join(comment)
    assert f"--recipe examples/recipes/{recipe.name}" in comment[-1]
    attention = [linear for linear in report["linears"] if "attn" in linear["name"]]
    assert (attention == []) == (recipe.stem == "dense-attention")
    if expected.pattern:
        assert (
            json.loads(run("inspect", tmp_path / "p", "--json")[1])["pattern"]
            == expected.pattern
        )


def test_the_solver_loses_less_than_wanda_whose_mask_it_has(
    llama: Path, tmp_path: Path, run: Any
) -> None:
    errors = {}
    methods = {name: [name] for name in ("wanda", "wanda-refit")}
    for name, method in {
        **methods,
        "plain": ["wanda-refit", "--set", "options.iterations=0"],
    }.items():
        line = (
            "prune",
            llama,
            "--out",
            tmp_path / name,
            "--plugin",
            EXAMPLES / "my_solver.py",
            "--method",
            *method,
        )
        stdout = run(*line, *SMALL, "--json", exits=0)[1]
        # the first linear has the same inputs in all runs
        errors[name] = json.loads(stdout)["linears"][0]["error"]
    assert errors["wanda-refit"] < 0.9 * errors["wanda"]
    assert errors["plain"] == pytest.approx(errors["wanda"])


def test_the_script_prunes_and_measures(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    words = (
        EXAMPLES / "prune.py",
        llama,
        tmp_path / "p",
        "samples=2",
        "seq_len=16",
        "effort=0",
    )
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    runpy.run_path(str(EXAMPLES / "prune.py"), run_name="__main__")
    said = capsys.readouterr().out
    assert "50.0%" in said
    assert said.count("perplexity") == 2
    assert (tmp_path / "p" / "pruning.json").is_file()
    with pytest.raises(SystemExit, match="is not empty"):
        runpy.run_path(str(EXAMPLES / "prune.py"), run_name="__main__")


def test_the_notebook_runs_and_shows_its_results(
    llama: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Its cells on a tiny model, the last line of each shown as a notebook would."""
    monkeypatch.chdir(tmp_path)
    names, shown = dict[str, Any](), list[str]()
    for cell in json.loads((EXAMPLES / "prune.ipynb").read_text(encoding="utf-8"))[
        "cells"
    ]:
        if cell["cell_type"] == "code":
            assert (cell["outputs"], cell["execution_count"]) == ([], None)
            body = ast.parse("".join(cell["source"])).body
            last = (
                ast.unparse(body.pop().value)
                if isinstance(body[-1], ast.Expr)
                else None
            )  # type: ignore[attr-defined]
            exec(compile(ast.Module(body, []), "prune.ipynb", "exec"), names)
            if "MODEL" in names and not shown:
                names.update(MODEL=str(llama), SIZES={"samples": 4, "seq_len": 32})
            value = eval(last, names) if last is not None else None
            if value is not None:
                shown.append(
                    value._repr_html_()
                    if hasattr(value, "_repr_html_")
                    else repr(value)
                )
    assert [text[:6] for text in shown] == ["<div><", "<table", "PackRe"]
    assert len(capsys.readouterr().out) > 10


def test_lora_keeps_every_zero(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    recipe = Recipe(method="magnitude", samples=2, seq_len=16, calibration="pydoc")
    pruned = sparsellm.prune(llama, recipe, out=tmp_path / "pruned").path
    (tmp_path / "text.txt").write_text("the same few words again and again\n" * 200)
    words = (EXAMPLES / "lora.py", pruned, tmp_path / "tuned", tmp_path / "text.txt", 4)
    monkeypatch.setattr(sys, "argv", list(map(str, words)))
    script = runpy.run_path(str(EXAMPLES / "lora.py"))
    script["main"].__globals__["SEQ_LEN"] = 32
    script["main"](*sys.argv[1:])
    before, after = tensors_of(pruned), tensors_of(tmp_path / "tuned")
    trained = 0
    for name, weight in before.items():
        if "layers" in name and weight.ndim == 2:
            assert torch.equal(weight == 0, after[name] == 0), name
            trained += int(not torch.equal(weight, after[name]))
    assert trained >= 7
