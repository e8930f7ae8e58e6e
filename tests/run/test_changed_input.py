"""A checkpoint that changes, is cut short or goes away: between two starts of a run, and while one reads it."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import NumericalError, StorageError
from sparsellm.files.directory import partial_of
from sparsellm.files.reader import CheckpointReader
from sparsellm.model import open_chain
from sparsellm.run.fingerprint import model_fingerprint
from tests.files.small import shards_of
from tests.killing import once_in_block, stop_after_one
from tests.models import save_tiny, tiny_llama

IDS = torch.arange(96).view(4, 24)
RECIPE = Recipe(method="magnitude", sparsity=0.5)
WEIGHTS = "model.safetensors"
MIDDLE = "model.layers.2.mlp.up_proj.weight"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return save_tiny(tiny_llama(), None, tmp_path / "model")


def prune(source: Path, out: Path, **more: Any) -> sparsellm.PruneResult:
    return sparsellm.prune(source, RECIPE, out=out, calibration=IDS, **more)


def change_a_middle_row(source: Path) -> None:
    tensors = load_file(source / WEIGHTS)
    tensors[MIDDLE][40] *= 1.5  # neither the first row nor the last
    save_file(tensors, source / WEIGHTS, {"format": "pt"})


def test_a_row_changed_between_two_starts_is_another_model(
    source: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        prune(source, tmp_path / "p", progress=stop_after_one("prune"))
    kept = {
        path.name: path.read_bytes()
        for path in partial_of(tmp_path / "p").rglob("*.safetensors")
    }
    change_a_middle_row(source)
    with pytest.raises(StorageError, match="unfinished run of another model"):
        prune(source, tmp_path / "p")
    assert {
        path.name: path.read_bytes()
        for path in partial_of(tmp_path / "p").rglob("*.safetensors")
    } == kept
    said: list[str] = []
    save_tiny(tiny_llama(), None, source)  # as it was, though written anew
    assert (
        prune(
            source, tmp_path / "p", progress=lambda event: said.append(event.detail)
        ).resumed
        == 1
    )
    assert any(
        "reading all weights once, for their checksums" in detail for detail in said
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_number_of_a_model_in_memory_counts(dtype: torch.dtype) -> None:
    first, same, other = (tiny_llama().to(dtype) for _ in range(3))
    other.model.layers[1].mlp.up_proj.weight.data[40, 16] *= 1.5
    chains = (
        open_chain(model, device=torch.device("cpu")) for model in (first, same, other)
    )
    known, again, changed = map(model_fingerprint, chains)
    assert known == again != changed


def test_a_parameter_in_memory_must_be_finite_and_a_mask_need_not() -> None:
    model = tiny_llama()
    model.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
    chain = open_chain(model, device=torch.device("cpu"))
    assert model_fingerprint(chain) != model_fingerprint(
        open_chain(tiny_llama(), device=torch.device("cpu"))
    )
    model.model.norm.weight.data[3] = torch.nan
    with pytest.raises(NumericalError, match=r"weight model\.norm\.weight has NaN"):
        model_fingerprint(chain)


def rewritten_in_place(source: Path) -> None:
    """As large as before, the same file, and its times put back: only the numbers tell."""
    file = source / WEIGHTS
    before = file.stat()
    weight = load_file(file)[MIDDLE].numpy().tobytes()
    with file.open("r+b") as opened:
        opened.seek(file.read_bytes().index(weight) + 5000)
        opened.write(b"\x01\x02\x03\x04")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns


def cut_short(source: Path) -> None:
    os.truncate(source / WEIGHTS, (source / WEIGHTS).stat().st_size // 3)


CHANGES = {
    change_a_middle_row: f"tensor {MIDDLE} in .* is not what it was when the run began",
    rewritten_in_place: f"tensor {MIDDLE} in .* is not what it was when the run began",
    cut_short: "model.safetensors was cut short while it was read",
    shutil.rmtree: "model.safetensors cannot be read any more",
}


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_change_is_one_line_and_blocks_are_kept(
    change: Callable[[Path], None], source: Path, tmp_path: Path
) -> None:
    with pytest.MonkeyPatch.context() as patched:
        once_in_block(1, patched, lambda: change(source), after=1)
        with pytest.raises(StorageError, match=CHANGES[change]) as caught:
            prune(source, tmp_path / "p")
    assert "a pruning run keeps the blocks that are done" in str(caught.value)
    save_tiny(tiny_llama(), None, source)
    assert prune(source, tmp_path / "p").resumed >= 1
    prune(source, tmp_path / "whole")
    assert shards_of(tmp_path / "p") == shards_of(tmp_path / "whole")


@pytest.mark.parametrize("anew", [False, True])
def test_files_only_touched_are_read(
    anew: bool, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def touch() -> None:
        if anew:
            shutil.copyfile(source / WEIGHTS, tmp_path / "copy")
            os.replace(tmp_path / "copy", source / WEIGHTS)
        os.utime(source / WEIGHTS)

    once_in_block(1, monkeypatch, touch, after=1)
    assert prune(source, tmp_path / "p").resumed == 0


def test_a_change_between_the_header_and_the_checksums_is_seen(source: Path) -> None:
    reader = CheckpointReader(source)
    change_a_middle_row(source)
    with pytest.raises(StorageError, match="has changed since it was opened"):
        reader.digests()


def test_evaluation_stops_as_well(
    source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once_in_block(1, monkeypatch, lambda: cut_short(source))
    with pytest.raises(StorageError, match=WEIGHTS):
        sparsellm.evaluate(source, IDS)


def test_digests_are_those_of_the_stored_bytes_and_progress_ends(source: Path) -> None:
    seen: list[tuple[int, int]] = []
    digests = CheckpointReader(source).digests(
        lambda done, total: seen.append((done, total))
    )
    tensors = load_file(source / WEIGHTS)
    assert digests == {
        name: hashlib.sha256(value.numpy().tobytes()).hexdigest()
        for name, value in tensors.items()
    }
    assert seen[-1][0] == seen[-1][1] == sum(value.nbytes for value in tensors.values())
    assert len(seen) == len(tensors)
