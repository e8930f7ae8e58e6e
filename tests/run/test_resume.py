"""A process is killed at many points, and the same call again ends in the very files of an uninterrupted run."""

from __future__ import annotations

import errno
import json
import shutil
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from pydantic import create_model

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import DataError, NumericalError, StorageError
from sparsellm.files.directory import BLOCKS, STATE, partial_of
from sparsellm.files.files import keep_record, kept_record
from sparsellm.files.writer import CheckpointWriter
from sparsellm.method.blocks import METHODS
from sparsellm.progress import Progress
from sparsellm.run import journal
from sparsellm.run.journal import BlockRecord
from tests import killing
from tests.files.small import contents, tensors_of, tree
from tests.killing import (
    KILLED,
    Ended,
    fail_after_passes,
    fail_in_block,
    full_disk,
    some,
)
from tests.method.sweep.helpers import same_bits
from tests.models import RECIPE, save_tiny, tiny_llama, tiny_opt, tiny_tokenizer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")

FLOAT: dict[str, Any] = {**RECIPE, "dtype": "float32"}
SWEEPING: dict[str, Any] = {
    **FLOAT,
    "method": "sparsellm",
    "effort": 0,
    "passes": 3,
    "sweep_rate": 0.0007,
}
# Bytes of one of the two batches of hidden states. Runs in this process hold both: a small budget changes no bit.
HALF_ON_DISK = 2 * 24 * 32 * 4
Files = tuple[dict[str, Any], Counter[str]]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored in bf16 and computed in fp32, so that what is not rounded before it runs shows after a restart."""
    return save_tiny(
        tiny_llama().to(torch.bfloat16),
        tiny_tokenizer(),
        tmp_path_factory.mktemp("dense"),
    )


def run(source: Path, out: Path, recipe: dict[str, Any], at: Any = None) -> Ended:
    return killing.run(killing.prune, source, out, recipe, at=at, memory=HALF_ON_DISK)


def uninterrupted(source: Path, out: Path, recipe: dict[str, Any]) -> Files:
    """The files of an uninterrupted run, and its steps by kind."""
    ended = run(source, out, recipe)
    assert ended.code == 0
    return contents(out), ended.steps


@pytest.fixture(scope="module")
def uncut(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return uninterrupted(source, tmp_path_factory.mktemp("uncut") / "p", FLOAT)


@pytest.fixture(scope="module")
def swept(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Files:
    return uninterrupted(source, tmp_path_factory.mktemp("swept") / "p", SWEEPING)


def finish(source: Path, out: Path, recipe: dict[str, Any]) -> dict[str, Any]:
    """What the same call again makes; where the killed one had given the directory its name, it says so."""
    again = run(source, out, recipe)
    assert again.code == 0
    assert ("exists and is not empty" in again.error) == bool(again.error)
    assert [path.name for path in out.parent.glob(f"{out.name}*")] == [out.name]
    return contents(out)


def test_killed_again_and_again(source: Path, uncut: Files, tmp_path: Path) -> None:
    for kind in ("read", "solve", "write"):
        (number,) = some(1, uncut[1][kind] // 3, seed=len(kind))
        assert run(source, tmp_path / "p", FLOAT, (kind, number)).code == KILLED
    assert finish(source, tmp_path / "p", FLOAT) == uncut[0]


def test_biases_are_rounded_before_their_block_runs_on(tmp_path: Path) -> None:
    source = save_tiny(
        tiny_opt().to(torch.float16), tiny_tokenizer(), tmp_path / "dense"
    )
    recipe = Recipe(**{**RECIPE, "method": "sparsellm", "effort": 0})
    expected = sparsellm.prune(source, recipe, out=tmp_path / "uncut")
    with pytest.raises(KeyboardInterrupt):
        sparsellm.prune(
            source, recipe, out=tmp_path / "p", progress=killing.stop_after_one("prune")
        )
    assert sparsellm.prune(source, recipe, out=tmp_path / "p").resumed == 1
    assert same_bits(tensors_of(tmp_path / "p"), tensors_of(expected.path))


@pytest.mark.parametrize(
    ("kind", "back"),
    [
        ("rename", 0),
        ("rename", 3),
    ],
)
def test_killed_in_the_sweep(
    kind: str, back: int, source: Path, swept: Files, tmp_path: Path
) -> None:
    """Also at its end, where the result gets its name and files are removed."""
    assert (
        run(source, tmp_path / "p", SWEEPING, (kind, swept[1][kind] - back)).code
        == KILLED
    )
    assert finish(source, tmp_path / "p", SWEEPING) == swept[0]


@pytest.mark.parametrize("damaged", [False, True])
def test_a_saved_pass_is_not_swept_again_unless_damaged(
    damaged: bool,
    source: Path,
    swept: Files,
    steps: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out = tmp_path / "p"
    with monkeypatch.context() as patched:
        fail_after_passes(2, patched)
        with pytest.raises(NumericalError):
            sparsellm.prune(source, Recipe(**SWEEPING), out=out)
    count = len(steps) // 3  # in each pass
    if damaged:
        file = next((partial_of(out) / STATE / "sweep").glob("moments-002-*"))
        file.write_bytes(file.read_bytes()[:-1] + b"?")
    steps.clear()
    seen: list[Progress] = []
    sparsellm.prune(source, Recipe(**SWEEPING), out=out, progress=seen.append)
    assert [number for _, _, number, _ in steps] == list(
        range(1 if damaged else 2 * count + 1, 3 * count + 1)
    )
    shown = [event.done / event.total for event in seen if event.phase == "sweep"]
    assert shown == sorted(shown)
    assert shown[-1] == 1
    assert contents(out) == swept[0]


def test_without_room_a_sweep_begins_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def room(place: Path, need: int) -> None:
        if place.name == "p.partial":
            raise StorageError("its disk is full")

    said: list[str] = []
    monkeypatch.setattr(journal, "check_room", room)
    recipe = Recipe(**{**SWEEPING, "passes": 1})
    result = sparsellm.prune(
        source,
        recipe,
        out=tmp_path / "p",
        progress=lambda event: said.append(event.detail),
    )
    assert len(result.sweeps) == 2
    assert any(
        "an interrupted sweep will start again: its disk is full" in detail
        for detail in said
    )


def test_gradients_of_the_first_start_are_kept(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = Recipe(**{**FLOAT, "method": "sparsellm", "allocation": "uniform"})
    sparsellm.prune(source, recipe, out=tmp_path / "uncut")
    with monkeypatch.context() as patched:
        # the gradients read it twice before the walk
        fail_in_block(1, patched, after=2)
        with pytest.raises(NumericalError):
            sparsellm.prune(source, recipe, out=tmp_path / "p")
    torch.manual_seed(12345)  # nothing may depend on what was drawn before
    seen: list[Progress] = []
    assert (
        sparsellm.prune(
            source, recipe, out=tmp_path / "p", progress=seen.append
        ).resumed
        == 1
    )
    assert "gradients" not in {event.phase for event in seen}
    assert contents(tmp_path / "p") == contents(tmp_path / "uncut")


def test_a_model_in_memory_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After it stopped in a block, and again at the very end."""
    ids, recipe = torch.arange(96).view(4, 24), Recipe(method="sparsegpt", sparsity=0.6)
    expected, model = tiny_opt(), tiny_opt()
    sparsellm.prune(expected, recipe, calibration=ids, out=tmp_path / "uncut")
    for stop in (
        lambda patched: fail_in_block(1, patched),
        lambda p: p.setattr(CheckpointWriter, "finish", None),
    ):
        with monkeypatch.context() as patched:
            stop(patched)
            with pytest.raises((NumericalError, TypeError)):
                sparsellm.prune(tiny_opt(), recipe, calibration=ids, out=tmp_path / "p")
    assert (
        sparsellm.prune(model, recipe, calibration=ids, out=tmp_path / "p").resumed == 2
    )
    assert contents(tmp_path / "p") == contents(tmp_path / "uncut")
    assert all(
        torch.equal(a, b)
        for a, b in zip(model.parameters(), expected.parameters(), strict=True)
    )


def test_a_full_disk_for_the_files_of_a_model_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, full = tiny_opt(), OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(model.config, "save_pretrained", Mock(side_effect=full))
    with pytest.raises(StorageError, match=r"disk of .* is full"):
        sparsellm.prune(
            model,
            Recipe(method="magnitude"),
            calibration=torch.arange(96).view(4, 24),
            out=tmp_path / "p",
        )


@pytest.fixture(scope="module")
def stopped(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The working directory of a run that ended in its last block; two blocks are done."""
    out = tmp_path_factory.mktemp("stopped") / "p"
    with pytest.MonkeyPatch.context() as patched:
        fail_in_block(2, patched)
        with pytest.raises(NumericalError):
            sparsellm.prune(source, Recipe(**FLOAT), out=out)
    return partial_of(out)


@pytest.fixture
def unfinished(stopped: Path, tmp_path: Path) -> Path:
    shutil.copytree(stopped, partial_of(tmp_path / "p"))
    return tmp_path / "p"


@pytest.mark.parametrize("damaged", ["shard", "record"])
def test_a_damaged_block_is_pruned_again(
    damaged: str, source: Path, uncut: Files, unfinished: Path
) -> None:
    if damaged == "shard":
        path = sorted((partial_of(unfinished) / BLOCKS).glob("*.safetensors"))[1]
        path.write_bytes(path.read_bytes()[:-1] + b"?")
    else:
        path = sorted((partial_of(unfinished) / STATE).glob("model-*.json"))[1]
        record = json.loads(path.read_text())
        del record["linears"]
        path.write_text(json.dumps(record))
    assert sparsellm.prune(source, Recipe(**FLOAT), out=unfinished).resumed == 1
    assert contents(unfinished) == uncut[0]


def test_time_and_memory_of_both_processes_count(
    source: Path, unfinished: Path
) -> None:
    """And it is said that the first blocks were pruned with other libraries, and by how many processes and threads."""
    paths = sorted((partial_of(unfinished) / STATE).glob("model-*.json"))[:2]
    first, second = (kept_record(path, BlockRecord) for path in paths)
    assert first is not None
    assert second is not None
    changed = {**second.versions, "torch": "1.0", "processes": "2", "threads": "64"}
    keep_record(paths[1], replace(second, versions=changed, peak_rss=1 << 50))
    result = sparsellm.prune(source, Recipe(**FLOAT), out=unfinished)
    assert result.resumed == 2
    assert result.peak_rss_bytes == 1 << 50
    assert (
        result.seconds["prune"] > first.seconds["prune"] + second.seconds["prune"] > 0
    )
    assert result.seconds["replay"] > 0
    assert len(result.linears) == 21
    here = f"torch {torch.__version__}, processes 1, threads {torch.get_num_threads()}"
    there = "torch 1.0, processes 2, threads 64"
    assert (
        f"blocks up to 2 were pruned with {there}, those after them with {here}"
        in result.warnings
    )


DIFFERENT: list[tuple[str, dict[str, Any], list[str]]] = [
    (
        "recipe",
        {"seed": 3},
        ["recipe.seed is 0 there and 3 here", "calibration_tokens is"],
    ),
    ("config", {}, ["an unfinished run of", "and this one prunes"]),
    (
        "defaults",
        {},
        ["recipe.options.damping"],
    ),  # another release may have another default
]


def test_no_other_run_goes_on(
    source: Path, unfinished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_llama().to(torch.bfloat16)
    model.config.rms_norm_eps *= 2
    save_tiny(model, tiny_tokenizer(), tmp_path / "config")
    entry = METHODS["sparsegpt"]
    fields = {
        name: (field.annotation, field.default)
        for name, field in entry.options.model_fields.items()
    }
    changed = create_model(
        "sparsegpt", **{**fields, "damping": (float, 2 * fields["damping"][1])}
    )
    before = tree(partial_of(unfinished))
    for what, changes, said in DIFFERENT:
        if what == "defaults":
            monkeypatch.setitem(METHODS, "sparsegpt", replace(entry, options=changed))
        place = tmp_path / what if what == "config" else source
        with pytest.raises(StorageError) as refused:
            sparsellm.prune(place, Recipe(**{**FLOAT, **changes}), out=unfinished)
        assert all(part in str(refused.value) for part in [*said, "--restart"]), str(
            refused.value
        )
        assert tree(partial_of(unfinished)) == before
    assert (
        sparsellm.prune(source, Recipe(**FLOAT), out=unfinished, restart=True).resumed
        == 0
    )


@pytest.mark.parametrize(
    "counter", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"]
)
def test_a_launcher_resumes_it(
    counter: str, source: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(counter, "1")
    assert (
        sparsellm.prune(source, Recipe(**FLOAT), out=unfinished, restart=True).resumed
        > 0
    )


def test_a_launcher_restarts_another_run(
    source: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert (
        sparsellm.prune(
            source, Recipe(**{**FLOAT, "seed": 9}), out=unfinished, restart=True
        ).resumed
        == 0
    )


def test_a_restart_with_bad_input_removes_nothing(
    source: Path, unfinished: Path
) -> None:
    before = tree(partial_of(unfinished))
    with pytest.raises(DataError, match="tokens"):
        sparsellm.prune(
            source,
            Recipe(**FLOAT),
            out=unfinished,
            calibration=[{"text": "Too short."}],
            restart=True,
        )
    assert tree(partial_of(unfinished)) == before


def test_memory_place_and_shards_make_no_other_run(
    unfinished: Path, tmp_path: Path
) -> None:
    tiny_llama().to(torch.bfloat16).save_pretrained(
        tmp_path / "moved", max_shard_size="20KB"
    )
    tiny_tokenizer().save_pretrained(tmp_path / "moved")
    assert len(list((tmp_path / "moved").glob("*.safetensors"))) > 1
    assert (
        sparsellm.prune(
            tmp_path / "moved", Recipe(**FLOAT, memory="1TiB"), out=unfinished
        ).resumed
        == 2
    )


def test_a_full_disk_loses_nothing(
    source: Path, uncut: Files, unfinished: Path
) -> None:
    for at in (1, 5, 15):
        before = tree(partial_of(unfinished) / BLOCKS)
        with (
            full_disk(at),
            pytest.raises(
                StorageError, match="is full; make room and run the same command again"
            ),
        ):
            sparsellm.prune(source, Recipe(**FLOAT), out=unfinished)
        assert before.items() <= tree(partial_of(unfinished) / BLOCKS).items()
        # the space of unfinished files is free again
        assert not list(partial_of(unfinished).rglob("*.tmp"))
    assert sparsellm.prune(source, Recipe(**FLOAT), out=unfinished).resumed >= 2
    assert contents(unfinished) == uncut[0]
