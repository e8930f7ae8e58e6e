"""A model that is pruned already is pruned again, while the sweep follows the dense model."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import ModelError, RecipeError, StorageError
from sparsellm.method.sweep.sweep_task import TrainingSet
from tests.files.small import shards_of
from tests.models import save_tiny, tiny_llama, tiny_tokenizer

SETTINGS: dict[str, Any] = {
    "samples": 8,
    "seq_len": 24,
    "batch_tokens": 48,
    "dtype": "float32",
}
SWEPT = Recipe(**SETTINGS, sparsity=0.8, effort=0, passes=2, sweep_rate=0.01)


@pytest.fixture(scope="module")
def half(llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The dense model at 60 %."""
    recipe = Recipe(**SETTINGS, sparsity=0.6, method="magnitude")
    return sparsellm.prune(
        llama, recipe, out=tmp_path_factory.mktemp("half") / "p"
    ).path


def divergence(model: Path, dense: Path) -> float:
    measured = sparsellm.evaluate(
        model, "pydoc", seq_len=24, max_tokens=480, against=dense
    )
    assert measured.against is not None
    return measured.against.kl


def test_the_sweep_follows_the_teacher(llama: Path, half: Path, tmp_path: Path) -> None:
    recipe = SWEPT.updated(samples=32, passes=4, sweep_rate=0.03)
    result = sparsellm.prune(half, recipe, out=tmp_path / "taught", teacher=llama)
    alone = sparsellm.prune(half, recipe, out=tmp_path / "alone")
    assert divergence(tmp_path / "taught", llama) < 0.9 * divergence(
        tmp_path / "alone", llama
    )
    # from the dense model, not the half-pruned one
    assert result.sweeps[0].held_out > 2 * alone.sweeps[0].held_out
    assert result.sparsity_pruned == pytest.approx(0.8, abs=1e-3)
    assert result.base.name == llama.name
    results = {"taught": result}
    for name, change in {
        "fewer": {"sparsity": 0.3},
        "grouped": {"pattern": "2:4"},
    }.items():
        results[name] = sparsellm.prune(
            half, recipe.updated(**change, passes=0), out=tmp_path / name, teacher=llama
        )
    for name, said in (("taught", False), ("fewer", True), ("grouped", True)):
        assert (
            any("already pruned" in warning for warning in results[name].warnings)
            == said
        )


def test_before_the_sweep_it_is_the_model_that_is_pruned(
    llama: Path, half: Path, tmp_path: Path
) -> None:
    """Without a sweep and with statistics that ask for no gradients, the teacher changes no bit."""
    recipe = Recipe(**SETTINGS, sparsity=0.8, method="wanda")
    for name, teacher in (("taught", llama), ("alone", None)):
        result = sparsellm.prune(half, recipe, out=tmp_path / name, teacher=teacher)
        assert any(
            "the teacher changes no weight" in said for said in result.warnings
        ) == (teacher is not None)
    assert shards_of(tmp_path / "taught") == shards_of(tmp_path / "alone")


def test_a_run_is_resumed_with_its_teacher_alone(
    llama: Path, half: Path, tmp_path: Path
) -> None:
    out, uncut = tmp_path / "p", tmp_path / "whole"
    sparsellm.prune(half, SWEPT, out=uncut, teacher=llama)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainingSet, "step", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            sparsellm.prune(half, SWEPT, out=out, teacher=llama)
    with pytest.raises(
        StorageError, match=r"start is '[0-9a-f]{16}' there and '' here"
    ):
        sparsellm.prune(llama, SWEPT, out=out)
    assert sparsellm.prune(half, SWEPT, out=out, teacher=llama).resumed == 3
    assert shards_of(out) == shards_of(uncut)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"intermediate_size": 64}, "outside the blocks, has other values"),
        ({"rope_theta": 500.0}, "in config.json is"),
        ({}, "outside the blocks, has other values"),
    ],
)
def test_another_model_is_no_teacher(
    config: dict[str, Any], reason: str, half: Path, tmp_path: Path
) -> None:
    other = save_tiny(
        tiny_llama(seed=7, **config), tiny_tokenizer(), tmp_path / "other"
    )
    with pytest.raises(ModelError, match=reason) as caught:
        sparsellm.prune(half, SWEPT, out=tmp_path / "p", teacher=other)
    assert str(caught.value).startswith(f"{other} cannot be the teacher of {half}: ")
    assert {path.name for path in tmp_path.iterdir()} <= {"other"}


def test_a_teacher_may_have_blocks_of_other_shapes(half: Path, tmp_path: Path) -> None:
    large = tiny_llama(seed=7, intermediate_size=64, num_hidden_layers=4)
    outer = AutoModelForCausalLM.from_pretrained(half).state_dict()
    same = {name: value for name, value in outer.items() if ".layers." not in name}
    large.load_state_dict(same, strict=False)
    other = save_tiny(large, tiny_tokenizer(), tmp_path / "other")
    result = sparsellm.prune(half, SWEPT, out=tmp_path / "taught", teacher=other)
    assert result.base.name == "other"
    assert result.seconds["dense"] > 0
    divergences = [swept.held_out for swept in result.sweeps]
    assert min(divergences[1:]) < divergences[0]
    written = AutoModelForCausalLM.from_pretrained(tmp_path / "taught")
    assert written.config.intermediate_size != 64


@pytest.mark.parametrize(
    ("teacher", "reason"),
    [
        ("nothere/", "teacher 'nothere/' not found: "),
        ("nothere.gguf", "teacher nothere.gguf: there is no such file"),
        (".", r"teacher \. has no config.json"),
    ],
)
def test_a_teacher_that_is_not_there_is_named_as_such(
    teacher: str,
    reason: str,
    half: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=f"^{reason}"):
        sparsellm.prune(half, SWEPT, out="p", teacher=teacher)
    assert not list(tmp_path.iterdir())


def test_another_tokenizer_is_refused(llama: Path, half: Path, tmp_path: Path) -> None:
    other = shutil.copytree(llama, tmp_path / "other")
    known = json.loads((other / "tokenizer.json").read_text())
    vocabulary = known["model"]["vocab"]
    first, second, *_ = [token for token in vocabulary if len(token) == 1]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(known))
    with pytest.raises(ModelError, match="the tokenizers differ"):
        sparsellm.prune(half, SWEPT, out=tmp_path / "p", teacher=other)


def test_models_in_memory_have_no_teacher(
    llama: Path, half: Path, tmp_path: Path
) -> None:
    for model, out in ((half, None), (tiny_llama(), tmp_path / "p")):
        with pytest.raises(RecipeError, match="teacher needs models on disk"):
            sparsellm.prune(
                model, SWEPT, out=out, teacher=llama, tokenizer=tiny_tokenizer()
            )
