"""A real process is killed at many points, and the same call again ends in the very files of an uninterrupted run."""

from __future__ import annotations

import errno
import json
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sparsellm
from sparsellm import Recipe
from sparsellm.errors import NumericalError, StorageError
from sparsellm.methods import METHODS
from sparsellm.progress import Progress
from sparsellm.storage import shard
from sparsellm.storage.destination import partial_of
from sparsellm.storage.resume import FOLDER, read_record, write_record
from sparsellm.storage.writer import CheckpointWriter
from sparsellm.sweep import whole_model as sweep_module
from tests import victim
from tests.cli import child
from tests.models import save_tiny, tiny_llama, tiny_opt, tiny_tokenizer

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no SIGKILL")

KILLED = -signal.SIGKILL
RECIPE: dict[str, Any] = {"method": "sparsegpt", "sparsity": 0.6, "samples": 4, "seq_len": 24, "batch_tokens": 48}
HALF_ON_DISK = 2 * 24 * 32 * 4  # bytes of one of the two batches of hidden states


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Stored in bf16 and computed in fp32, so that what is not rounded before it runs shows after a restart."""
    return save_tiny(tiny_llama().to(torch.bfloat16), tiny_tokenizer(), tmp_path_factory.mktemp("dense"))


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], dict[str, int]]:
    """The files of an uninterrupted run, and its steps."""
    out = tmp_path_factory.mktemp("whole") / "p"
    steps = victim.count_steps(source, out, {**RECIPE, "dtype": "float32"}, hidden_in_memory=HALF_ON_DISK)
    return contents(out), steps


def files(directory: Path) -> dict[str, bytes]:
    paths = [path for path in sorted(directory.rglob("*")) if path.is_file()]
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def contents(out: Path) -> dict[str, Any]:
    """Every file, bit by bit; of the report all but times, memory and where it was written."""
    found: dict[str, Any] = files(out)
    report = json.loads(found["pruning.json"])
    for key in ("seconds", "predicted_seconds", "peak_rss_bytes", "peaks_bytes", "memory", "path", "command"):
        del report[key]
    del found["report.html"]  # it shows these times
    return {**found, "pruning.json": report}


def run(source: Path, out: Path, die_at: tuple[str, int] | None = None) -> int | None:
    return victim.run(source, out, {**RECIPE, "dtype": "float32"}, die_at, hidden_in_memory=HALF_ON_DISK)


def finish(source: Path, out: Path) -> None:
    """The same call again; where the killed one had given the directory its name, it says so."""
    if not out.exists():
        assert run(source, out) == 0
    else:
        with pytest.raises(StorageError, match="exists and is not empty"):
            sparsellm.prune(source, Recipe(**RECIPE), out=out)
    assert not partial_of(out).exists()


@pytest.mark.parametrize("kind", victim.STEPS)
def test_killed_once(kind: str, source: Path, whole: tuple[dict[str, Any], dict[str, int]], tmp_path: Path) -> None:
    expected, steps = whole
    for number in victim.some(2, steps[kind], seed=victim.STEPS.index(kind)):
        out = tmp_path / f"p{number}"
        assert run(source, out, (kind, number)) == KILLED
        finish(source, out)
        assert contents(out) == expected, (kind, number)


SWEPT: dict[str, Any] = {**RECIPE, "method": "sparsellm", "dtype": "float32", "passes": 1, "sweep_rate": 0.0007}


def test_killed_in_the_sweep(source: Path, tmp_path: Path) -> None:
    """The walk's blocks are there again; of the sweep nothing stays but what ends in the same bytes."""
    steps = victim.count_steps(source, tmp_path / "whole", SWEPT)
    expected = contents(tmp_path / "whole")
    assert len(expected["pruning.json"]["sweeps"]) == 2
    # From the end: the walk's directory goes, the sweep's gets the name, its last shard and its first are written.
    for kind, back in [("remove", 0), ("remove", 6), ("rename", 0), ("rename", 1), ("rename", 3), ("read", 0)]:
        out = tmp_path / f"{kind}{back}"
        assert victim.run(source, out, SWEPT, (kind, steps[kind] - back)) == KILLED
        if out.exists():
            with pytest.raises(StorageError, match="exists and is not empty"):
                sparsellm.prune(source, Recipe(**SWEPT), out=out)
        else:
            assert len(list(partial_of(out).glob("*.safetensors"))) == 4, (kind, back)
            assert victim.run(source, out, SWEPT) == 0
        assert contents(out) == expected, (kind, back)
        assert sorted(path.name for path in tmp_path.glob(f"{out.name}*")) == [out.name]


SWEPT_THRICE: dict[str, Any] = {**SWEPT, "passes": 3}


def test_killed_in_a_sweep_it_goes_on_after_the_last_pass(source: Path, tmp_path: Path) -> None:
    """At random steps of the second half, which is the sweeps': the same bytes, whatever pass it was in."""
    steps = victim.count_steps(source, tmp_path / "whole", SWEPT_THRICE, hidden_in_memory=HALF_ON_DISK)
    expected = contents(tmp_path / "whole")
    assert len(expected["pruning.json"]["sweeps"]) == 4
    found = set()
    for kind in ("write", "rename", "sync", "remove"):
        for number in victim.some(2, steps[kind] // 2, seed=len(kind)):
            out = tmp_path / f"{kind}{number}"
            at = (kind, steps[kind] // 2 + number)
            assert victim.run(source, out, SWEPT_THRICE, at, hidden_in_memory=HALF_ON_DISK) == KILLED
            record = partial_of(out) / FOLDER / "sweep.json"
            found.add(len(json.loads(record.read_text())["history"]) if record.exists() else 0)
            finish_swept(source, out)
            assert contents(out) == expected, at
    assert len(found) > 2  # they died in different passes


def test_killed_in_a_sweep_on_text_of_its_own_it_writes_the_same_again(source: Path, tmp_path: Path) -> None:
    recipe = {**SWEPT_THRICE, "calibration": "self"}
    steps = victim.count_steps(source, tmp_path / "whole", recipe)
    out = tmp_path / "p"
    assert victim.run(source, out, recipe, ("rename", steps["rename"] - 8)) == KILLED
    assert len(json.loads((partial_of(out) / FOLDER / "sweep.json").read_text())["history"]) > 1
    assert victim.run(source, out, recipe) == 0
    assert contents(out) == contents(tmp_path / "whole")
    assert sparsellm.prune(source, Recipe(**recipe), out=tmp_path / "q").sweeps  # in another process: the same text
    assert files(tmp_path / "q").keys() == files(out).keys()


def finish_swept(source: Path, out: Path) -> None:
    if not out.exists():
        assert victim.run(source, out, SWEPT_THRICE, hidden_in_memory=HALF_ON_DISK) == 0
    else:
        with pytest.raises(StorageError, match="exists and is not empty"):
            sparsellm.prune(source, Recipe(**SWEPT_THRICE), out=out)
    assert sorted(path.name for path in out.parent.glob(f"{out.name}*")) == [out.name]


def test_a_pass_that_is_saved_is_not_swept_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And one whose files are damaged is."""
    steps: list[int] = []
    step = sweep_module._Run.step

    def counted(self: Any, piece: Any, process: int, rate: float, number: int) -> float:
        steps.append(number)
        if len(steps) == die_after:
            raise NumericalError("the processor caught fire")
        return step(self, piece, process, rate, number)

    monkeypatch.setattr(sweep_module._Run, "step", counted)
    recipe, die_after = Recipe(**SWEPT_THRICE), 0
    result = sparsellm.prune(source, recipe, out=tmp_path / "whole")
    each = len(steps) // 3
    for damaged in (False, True):
        out = tmp_path / f"p{damaged}"
        steps.clear()
        die_after = 2 * each + 1  # in the third pass
        with pytest.raises(NumericalError):
            sparsellm.prune(source, recipe, out=out)
        if damaged:
            file = next((partial_of(out) / FOLDER / "sweep").glob("moments-002-*"))
            file.write_bytes(file.read_bytes()[:-1] + b"?")
        steps.clear()
        die_after = 0
        seen: list[Progress] = []
        again = sparsellm.prune(source, recipe, out=out, progress=seen.append)
        assert steps == list(range(1 if damaged else 2 * each + 1, 3 * each + 1))
        shown = [event.done / event.total for event in seen if event.phase == "sweep"]
        assert shown == sorted(shown)
        assert shown[-1] == 1
        assert again.sweeps == result.sweeps
        assert contents(out) == contents(tmp_path / "whole")


def test_without_room_for_its_state_a_sweep_runs_and_begins_anew(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr("sparsellm.run.prune.saved_sweep_bytes", lambda chain, unrounded: 1 << 60)
    result = sparsellm.prune(
        source, Recipe(**SWEPT), out=tmp_path / "p", progress=lambda event: said.append(event.detail)
    )
    assert len(result.sweeps) == 2
    assert any("an interrupted sweep will start again" in detail for detail in said)


def test_beginning_anew_forgets_a_sweep_that_was_killed(source: Path, tmp_path: Path) -> None:
    steps = victim.count_steps(source, tmp_path / "whole", SWEPT)
    out = tmp_path / "p"
    assert victim.run(source, out, SWEPT, ("rename", steps["rename"] - 4)) == KILLED
    assert partial_of(out, second=True).exists()
    result = sparsellm.prune(source, Recipe(**RECIPE), out=out, restart=True)
    assert (result.resumed, result.sweeps) == (0, [])
    assert {path.name for path in tmp_path.iterdir()} == {"whole", "p"}


def test_killed_again_and_again(source: Path, whole: tuple[dict[str, Any], dict[str, int]], tmp_path: Path) -> None:
    expected, steps = whole
    out, draw = tmp_path / "p", random.Random(7)
    deaths = 0
    while not out.exists():
        code = run(source, out, ("any", draw.randint(1, sum(steps.values()) // 2)))
        assert code in (0, KILLED)
        deaths += code == KILLED
    finish(source, out)
    assert deaths > 1
    assert contents(out) == expected


def test_the_command_line_killed_at_any_time(source: Path, tmp_path: Path) -> None:
    """By the clock, not by a step: the process does not know."""

    def started(out: Path) -> Any:
        options = [
            f"--{name.replace('_', '-')}={RECIPE[name]}" for name in ("method", "sparsity", "samples", "seq_len")
        ]
        return child.started(child.command_line, ["prune", str(source), "--out", str(out), *options], tmp_path)

    with child.started(child.command_line, ["--version"], tmp_path) as process:  # the server's start takes seconds
        assert child.ended(process) == 0
    start = time.monotonic()
    with started(tmp_path / "whole") as process:
        assert child.ended(process) == 0
    length = time.monotonic() - start
    with started(tmp_path / "p") as process:
        time.sleep(length * random.Random(3).uniform(0.7, 0.95))
        process.kill()
        child.ended(process)
    if not (tmp_path / "p").exists():
        with started(tmp_path / "p") as process:
            assert child.ended(process) == 0
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")


@pytest.mark.parametrize("method", sorted(entry.name for entry in METHODS))
def test_every_method_goes_on_with_the_same_bits(
    method: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In this process: an error in block 2 in place of a signal."""
    recipe = Recipe(**{**RECIPE, "method": method, "dtype": "float32", "allocation": "uniform"})
    sparsellm.prune(source, recipe, out=tmp_path / "whole")
    with monkeypatch.context() as patched:
        # A sweep of gradients reads it twice before the walk.
        fail_in_block(1, patched, after=2 if method == "sparsellm" else 0)
        with pytest.raises(NumericalError):
            sparsellm.prune(source, recipe, out=tmp_path / "p")
    torch.manual_seed(12345)  # nothing may depend on what was drawn before
    with monkeypatch.context() as patched:
        patched.setattr("sparsellm.run.targets.loss_gradients", None)  # what it found is there
        result = sparsellm.prune(source, recipe, out=tmp_path / "p")
    assert result.resumed == 1
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")


def fail_in_block(index: int, patched: pytest.MonkeyPatch, after: int = 0) -> None:
    from sparsellm.chain import Chain

    block = Chain.block
    times = 0

    def failing(self: Chain, at: int, *rest: Any) -> Any:
        nonlocal times
        times += at == index and all(each is None for each in rest)  # the model's own weights
        if times > after:
            raise NumericalError("the processor caught fire")
        return block(self, at, *rest)

    patched.setattr(Chain, "block", failing)


def test_a_model_in_memory_goes_on_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ids = torch.arange(96).view(4, 24)
    recipe = Recipe(method="sparsegpt", sparsity=0.6)
    expected = tiny_opt()
    sparsellm.prune(expected, recipe, calibration=ids, out=tmp_path / "whole")
    with monkeypatch.context() as patched:
        fail_in_block(1, patched)
        with pytest.raises(NumericalError):
            sparsellm.prune(tiny_opt(), recipe, calibration=ids, out=tmp_path / "p")
    found = tiny_opt()
    assert sparsellm.prune(found, recipe, calibration=ids, out=tmp_path / "p").resumed == 1
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


def test_a_model_in_memory_is_pruned_though_all_its_blocks_were_finished_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = torch.arange(96).view(4, 24)
    recipe = Recipe(method="sparsegpt", sparsity=0.6)
    expected = tiny_opt()
    sparsellm.prune(expected, recipe, calibration=ids, out=tmp_path / "whole")
    with monkeypatch.context() as patched:
        patched.setattr(CheckpointWriter, "finish", raises_at_the_end)
        with pytest.raises(StorageError, match="the very end"):
            sparsellm.prune(tiny_opt(), recipe, calibration=ids, out=tmp_path / "p")
    found = tiny_opt()
    assert sparsellm.prune(found, recipe, calibration=ids, out=tmp_path / "p").resumed == 2
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), expected.parameters(), strict=True))


def raises_at_the_end(_: CheckpointWriter) -> Path:
    raise StorageError("the very end")


def test_what_stands_beside_a_model_in_memory_finds_the_disk_full(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    model = tiny_opt()
    monkeypatch.setattr(model.config, "save_pretrained", full)
    with pytest.raises(StorageError, match=r"disk of .* is full"):
        sparsellm.prune(model, Recipe(method="magnitude"), calibration=torch.arange(96).view(4, 24), out=tmp_path / "p")


@pytest.fixture
def unfinished(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The directory of a run that ended in its last block; two blocks are done."""
    with monkeypatch.context() as patched:
        fail_in_block(2, patched)
        with pytest.raises(NumericalError):
            sparsellm.prune(source, Recipe(**RECIPE), out=tmp_path / "p")
    return tmp_path / "p"


def test_a_run_does_not_go_on_with_other_defaults(
    source: Path, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = METHODS[RECIPE["method"]].options
    name, option = next(iter(options.items()))
    monkeypatch.setitem(options, name, replace(option, default=option.default * 2))  # as another release may have it
    with pytest.raises(StorageError, match=name):
        sparsellm.prune(source, Recipe(**RECIPE), out=unfinished)


def test_a_damaged_shard_is_pruned_again(source: Path, unfinished: Path, tmp_path: Path) -> None:
    sparsellm.prune(source, Recipe(**RECIPE), out=tmp_path / "whole")
    damaged = sorted(partial_of(unfinished).glob("*.safetensors"))[1]
    data = bytearray(damaged.read_bytes())
    data[-1] ^= 1
    damaged.write_bytes(data)
    result = sparsellm.prune(source, Recipe(**RECIPE), out=unfinished)
    assert result.resumed == 1
    assert contents(unfinished) == contents(tmp_path / "whole")


def test_time_and_work_of_both_processes_count(source: Path, unfinished: Path) -> None:
    first = [json.loads(p.read_text()) for p in sorted(partial_of(unfinished).glob(f"{FOLDER}/model-*.json"))]
    before = sum(record["seconds"]["prune"] for record in first if "linears" in record)
    result = sparsellm.prune(source, Recipe(**RECIPE), out=unfinished)
    assert result.seconds["prune"] > before > 0
    assert result.seconds["replay"] > 0
    assert len(result.linears) == 21


def test_other_libraries_are_said(source: Path, unfinished: Path) -> None:
    record = sorted(partial_of(unfinished).glob(f"{FOLDER}/model-*.json"))[0]
    facts = read_record(record)
    assert facts is not None
    write_record(record, {**facts, "versions": {**facts["versions"], "torch": "1.0"}, "peak_rss": 1 << 50})
    result = sparsellm.prune(source, Recipe(**RECIPE), out=unfinished)
    assert result.resumed == 2
    assert f"up to 1 were pruned with torch 1.0, those after them with torch {torch.__version__}" in result.warnings[0]
    assert result.peak_rss == 1 << 50


def test_another_number_of_threads_is_said(source: Path, unfinished: Path) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        result = sparsellm.prune(source, Recipe(**RECIPE), out=unfinished)
    finally:
        torch.set_num_threads(threads)
    assert result.resumed == 2
    said = f"up to 2 were pruned with threads {threads}, those after them with threads {threads + 1}"
    assert said in result.warnings[0]


def test_a_damaged_record_of_a_block_means_that_it_is_pruned_again(
    source: Path, unfinished: Path, tmp_path: Path
) -> None:
    record = sorted(partial_of(unfinished).glob(f"{FOLDER}/model-*.json"))[1]
    facts = json.loads(record.read_text())
    del facts["linears"]
    record.write_text(json.dumps(facts))
    assert sparsellm.prune(source, Recipe(**RECIPE), out=unfinished).resumed == 1
    sparsellm.prune(source, Recipe(**RECIPE), out=tmp_path / "whole")
    assert contents(unfinished) == contents(tmp_path / "whole")


DIFFERENT: dict[str, tuple[dict[str, Any], list[str]]] = {
    "sparsity": ({"sparsity": 0.5}, ["recipe.sparsity is 0.6 there and 0.5 here"]),
    "seed": ({"seed": 3}, ["recipe.seed is 0 there and 3 here", "calibration tokens"]),
    "method": ({"method": "wanda"}, ["recipe.method is 'sparsegpt' there and 'wanda' here"]),
    "options": ({"options": {"damping": 0.5}}, ["recipe.options.damping"]),
    "dtype": ({"dtype": "float32"}, ["recipe.dtype is 'auto' there and 'float32' here"]),
}


@pytest.mark.parametrize("what", DIFFERENT)
def test_another_recipe_is_refused(what: str, source: Path, unfinished: Path) -> None:
    changes, said = DIFFERENT[what]
    before = files(partial_of(unfinished))
    with pytest.raises(StorageError) as refused:
        sparsellm.prune(source, Recipe(**{**RECIPE, **changes}), out=unfinished)
    assert all(part in str(refused.value) for part in [*said, "--restart"]), str(refused.value)
    assert files(partial_of(unfinished)) == before
    result = sparsellm.prune(source, Recipe(**{**RECIPE, **changes}), out=unfinished, restart=True)
    assert (result.resumed, result.recipe.seed) == (0, changes.get("seed", 0))


def test_another_memory_is_not_another_run(source: Path, unfinished: Path) -> None:
    assert sparsellm.prune(source, Recipe(**RECIPE, memory="1TiB"), out=unfinished).resumed == 2


@pytest.mark.parametrize("change", ["weights", "config", "text"])
def test_another_model_or_text_is_refused(change: str, unfinished: Path, tmp_path: Path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    recipe = RECIPE
    if change == "weights":
        model.model.layers[2].mlp.up_proj.weight.data *= 1.01
    if change == "config":
        model.config.rms_norm_eps *= 2
    if change == "text":
        (tmp_path / "t.txt").write_text("other words " * 200)
        recipe = {**RECIPE, "calibration": str(tmp_path / "t.txt")}
    other = save_tiny(model, tiny_tokenizer(), tmp_path / "other")
    with pytest.raises(StorageError, match="calibration tokens is" if change == "text" else "model is"):
        sparsellm.prune(other, Recipe(**recipe), out=unfinished)


def test_the_same_model_elsewhere_and_otherwise_divided_is_the_same(unfinished: Path, tmp_path: Path) -> None:
    model = tiny_llama().to(torch.bfloat16)
    model.save_pretrained(tmp_path / "moved", max_shard_size="20KB")
    tiny_tokenizer().save_pretrained(tmp_path / "moved")
    assert len(list((tmp_path / "moved").glob("*.safetensors"))) > 1
    assert sparsellm.prune(tmp_path / "moved", Recipe(**RECIPE), out=unfinished).resumed == 2


def test_overwriting_goes_on_as_well_and_keeps_the_old_one_until_the_end(source: Path, tmp_path: Path) -> None:
    recipe = {**RECIPE, "dtype": "float32"}
    old = Recipe(**{**recipe, "sparsity": 0.3})
    sparsellm.prune(source, old, out=tmp_path / "p")
    before = contents(tmp_path / "p")
    with pytest.MonkeyPatch.context() as patched:
        fail_in_block(1, patched)
        with pytest.raises(NumericalError):
            sparsellm.prune(source, Recipe(**recipe), out=tmp_path / "p", overwrite=True)
    assert contents(tmp_path / "p") == before
    assert sparsellm.prune(source, Recipe(**recipe), out=tmp_path / "p", overwrite=True).resumed == 1
    sparsellm.prune(source, Recipe(**recipe), out=tmp_path / "whole")
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")
    assert {path.name for path in tmp_path.iterdir()} == {"p", "whole"}


def test_a_full_disk_is_said_and_the_run_goes_on_when_there_is_room(
    source: Path, whole: tuple[dict[str, Any], dict[str, int]], tmp_path: Path
) -> None:
    """A limit on the size of files, which the system enforces: a block of 20 kB does not fit, the records do."""
    recipe, out = {**RECIPE, "dtype": "float32"}, tmp_path / "p"
    assert run(source, out, ("solve", whole[1]["solve"] // 2)) == KILLED
    shards = sorted(partial_of(out).glob("*.safetensors"))
    assert victim.run(source, out, recipe, file_limit=15_000, hidden_in_memory=HALF_ON_DISK) == 1
    assert sorted(partial_of(out).glob("*.safetensors")) == shards
    assert not list(partial_of(out).rglob("*.tmp"))  # the room of what was not finished is free again
    assert run(source, out) == 0
    assert contents(out) == whole[0]


@pytest.mark.parametrize("at", [1, 5, 30])
def test_no_space_left(at: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, left = shard.write_all, at

    def filling(file: Any, data: Any) -> None:
        nonlocal left
        left -= 1
        if not left:
            write(file, memoryview(data).cast("B")[:1])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    with monkeypatch.context() as patched:
        patched.setattr(shard, "write_all", filling)
        with pytest.raises(StorageError, match="is full; make room and run the same command again"):
            sparsellm.prune(source, Recipe(**RECIPE), out=tmp_path / "p")
    assert not list((tmp_path / "p.partial").rglob("*.tmp"))
    sparsellm.prune(source, Recipe(**RECIPE), out=tmp_path / "p")
    sparsellm.prune(source, Recipe(**RECIPE), out=tmp_path / "whole")
    assert contents(tmp_path / "p") == contents(tmp_path / "whole")
