"""A result with other weights than those that its numbers are of: what says so, and through which doors."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM

import sparsellm
from sparsellm.errors import StorageError
from sparsellm.files.contents import LIST, weights_difference
from sparsellm.files.results import append_result
from sparsellm.records import Continuation
from sparsellm.report.card import card
from sparsellm.report.document import write_report
from sparsepack.errors import Note
from tests.exports.checkpoints import pruned, wide_llama
from tests.files.small import SHARDS, source, tree, write

FIRST = f"model-00001-of-{SHARDS:05d}.safetensors"
INDEX = "model.safetensors.index.json"


def change(path: Path) -> None:
    """Flips the last bit of a file."""
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


def retrained(directory: Path) -> None:
    """What a trainer does that saves into the directory of the model that it was given."""
    model = AutoModelForCausalLM.from_pretrained(directory)
    for parameter in model.parameters():
        parameter.data += 0.5
    model.save_pretrained(directory)


CHANGES: dict[str, tuple[Callable[[Path], object], list[str]]] = {
    "nothing": (lambda place: None, []),
    "times": (lambda place: (place / FIRST).touch(), []),
    "not a weight": (lambda place: (place / "notes.safetensors").touch(), []),
    "config": (lambda place: (place / "config.json").write_text("{}"), []),
    "no result": (lambda place: (place / "pruning.json").unlink(), []),
    "a bit": (lambda place: change(place / FIRST), [f"{FIRST} (changed)"]),
    "index": (
        lambda place: (place / INDEX).write_text("{}"),
        [f"{INDEX} (changed)"],
    ),
    "missing": (lambda place: (place / FIRST).unlink(), [f"{FIRST} (missing)"]),
    "new": (
        lambda place: (place / "model.safetensors").touch(),
        ["model.safetensors (new)"],
    ),
    "list": (lambda place: (place / LIST).unlink(), [f"no readable {LIST}"]),
    "no list": (
        lambda place: (place / LIST).write_text("[]"),
        [f"no readable {LIST}"],
    ),
}


@pytest.mark.parametrize("case", CHANGES)
def test_weights_that_differ_are_named(case: str, tmp_path: Path) -> None:
    place = write(tmp_path / "out", 1.0, source(tmp_path / "model"))
    assert weights_difference(place) is None
    make, named = CHANGES[case]
    make(place)
    said = weights_difference(place)
    assert (said is None) == (not named)
    for name in named:
        assert said is not None
        assert name in said


def test_links_of_a_snapshot_are_followed(tmp_path: Path) -> None:
    place = write(tmp_path / "out", 1.0, source(tmp_path / "model"))
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    for file in place.iterdir():
        (snapshot / file.name).symlink_to(file)
    assert weights_difference(snapshot) is None
    change(place / FIRST)
    said = weights_difference(snapshot)
    assert said is not None
    assert f"{FIRST} (changed)" in said


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A result on a grid of another program, which can be packed and exported."""
    place = tmp_path_factory.mktemp("result")
    return pruned(wide_llama(), place, "q4_0", method="magnitude")


@pytest.fixture
def other(result: Path, tmp_path: Path) -> Path:
    """A copy of the result, with other weights."""
    copied = Path(shutil.copytree(result, tmp_path / "other"))
    retrained(copied)
    return copied


DOORS: dict[str, list[str]] = {
    "report": ["report", "OTHER"],
    "comparison": ["report", "RESULT", "OTHER", "--out", "PLACE/compare.html"],
    "pack": ["pack", "OTHER", "--out", "PLACE/packed", "--values", "int4"],
    "export": ["export", "OTHER", "--to", "compressed-tensors", "--out", "PLACE/out"],
    "eval": ["eval", "OTHER", "--text", "pydoc", "--seq-len", "32"],
}


@pytest.mark.parametrize("door", DOORS)
def test_no_command_shows_numbers_of_other_weights(
    door: str, result: Path, other: Path, tmp_path: Path, refusal: Any
) -> None:
    before = tree(tmp_path)
    places = {"RESULT": result, "OTHER": other, "PLACE": tmp_path}
    words = []
    for word in DOORS[door]:
        for name, place in places.items():
            word = word.replace(name, str(place))
        words.append(word)
    line = refusal(*words)
    assert f"{other} has other weights than those that its numbers are of" in line
    assert "model.safetensors (new)" in line
    assert tree(tmp_path) == before


def test_no_function_keeps_a_number_of_other_weights(other: Path) -> None:
    record = Continuation(prompt="", dense="", pruned="")
    before = tree(other)
    for function in (
        lambda: append_result(other, record),
        lambda: card(other),
        lambda: write_report(other),
    ):
        with pytest.raises(StorageError, match=r"model\.safetensors \(new\)"):
            function()
    assert tree(other) == before


def test_a_packed_result_is_compared_too(result: Path, tmp_path: Path) -> None:
    packed = sparsellm.pack(result, out=tmp_path / "packed", values="int4").path
    write_report(packed)
    change(next(packed.glob("*.safetensors")))
    with pytest.raises(StorageError, match=r"safetensors \(changed\)"):
        write_report(packed)
    with pytest.raises(StorageError, match=r"safetensors \(changed\)"):
        sparsellm.unpack(packed, out=tmp_path / "dense")


def test_inspect_and_eval_measure_other_weights_and_say_so(
    other: Path, run: Any
) -> None:
    with pytest.warns(Note, match=r"model\.safetensors \(new\)"):
        _, stdout, _ = run("inspect", other, "--json", exits=0)
    assert json.loads(stdout)["zeros"] == 0
    words = ["--text", "pydoc", "--seq-len", "32", "--max-tokens", "64", "--no-save"]
    run("eval", other, *words, exits=0)
    assert not (other / "results.json").exists()


def test_a_cell_with_other_weights_stops_a_comparison(
    llama: Path, tmp_path: Path, refusal: Any, run: Any
) -> None:
    words = ["--method", "magnitude", "--sparsity", "0.5", "--calibration", "pydoc"]
    words += ["--text-seq-len", "32", "--max-tokens", "64", "--samples", "4"]
    words += ["--seq-len", "32"]
    run("compare", llama, "--out", tmp_path / "out", *words, exits=0)
    retrained(tmp_path / "out" / "magnitude-0.5")
    line = refusal("compare", llama, "--out", tmp_path / "out", *words)
    assert "cell magnitude-0.5: " in line
    assert "model.safetensors (new)" in line


def test_a_pipe_in_place_of_a_weight_file_is_refused_and_not_waited_for(
    result: Path, tmp_path: Path
) -> None:
    place = Path(shutil.copytree(result, tmp_path / "result"))
    victim = sorted(place.glob("*.safetensors"))[0]
    victim.unlink()
    os.mkfifo(victim)
    with pytest.raises(StorageError, match="not an ordinary file"):
        weights_difference(place)
