"""``sparsellm prune`` started by torchrun, and what happens when one of its processes dies."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file

import sparsellm
from sparsellm import Recipe
from tests.files.small import tensors_of
from tests.models import save_tiny, tiny_llama, tiny_tokenizer
from tests.parallel.processes import ENVIRONMENT, LIMIT, by_torchrun, ended

# Dozens of interpreters that import torch: minutes. test_parallel.py always runs.
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def long_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """A run of many blocks, each of which takes a while."""
    source = save_tiny(
        tiny_llama(num_hidden_layers=40),
        tiny_tokenizer(),
        tmp_path_factory.mktemp("deep"),
    )
    return (
        "prune",
        str(source),
        "--samples=4",
        "--seq-len=32",
        "--method=admm",
        "--set=options.iterations=50",
    )


def side_by_side(size: int, *arguments: str) -> list[subprocess.Popen[str]]:
    """Processes as torchrun starts them, but nobody ends the others when one dies."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = {
        "TORCHELASTIC_RUN_ID": "test",
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
    }
    return [
        subprocess.Popen(
            [sys.executable, "-m", "sparsellm", *arguments],
            env={**ENVIRONMENT, **common, "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(size)
    ]  # fmt: skip


def wait_for_blocks(
    directory: Path, process: subprocess.Popen[str], shards: int = 2
) -> None:
    """Until that many shards are there."""
    deadline = time.monotonic() + LIMIT
    while len(list(directory.rglob("*.safetensors"))) < shards:
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.01)


def check_what_is_left(out: Path) -> None:
    assert not out.exists()
    shards = list(out.with_name(f"{out.name}.partial").rglob("*.safetensors"))
    assert 2 <= len(shards) < 41
    for shard in shards:  # each is whole
        assert all(
            bool(torch.isfinite(value).all()) for value in load_file(shard).values()
        )


def test_torchrun_writes_what_one_process_writes(llama: Path, tmp_path: Path) -> None:
    """With a sweep, which reads the shards of the walk in every process. The masks of seed 0 have a tie."""
    out, alone = tmp_path / "pruned", tmp_path / "alone"
    given = (
        "--method=sparsellm",
        "--samples=5",
        "--seq-len=40",
        "--set=batch_tokens=80",
        "--set=allocation=uniform",
    )
    run = by_torchrun(
        2,
        "prune",
        str(llama),
        f"--out={out}",
        *given,
        "--set=passes=2",
        "--set=seed=1",
        "--json",
    )
    stdout, stderr = ended(run)
    assert run.returncode == 0, stderr
    report = json.loads(stdout)  # one report, by one process
    assert report["processes"] == 2
    assert report["calibration_tokens"] == 400  # two sets of five windows
    assert {
        **json.loads((out / "pruning.json").read_text()),
        "path": str(out),
    } == report
    recipe = Recipe(
        method="sparsellm",
        samples=5,
        seq_len=40,
        batch_tokens=80,
        allocation="uniform",
        passes=2,
        seed=1,
    )
    expected_report = sparsellm.prune(llama, recipe, out=alone)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "pruned"]
    assert [linear["zeros"] for linear in report["linears"]] == [
        linear.zeros for linear in expected_report.linears
    ]
    assert len(report["sweeps"]) == len(expected_report.sweeps) == 3
    written, expected = tensors_of(out), tensors_of(alone)
    assert written.keys() == expected.keys()
    for name, value in written.items():
        assert torch.equal(value == 0, expected[name] == 0), name
        torch.testing.assert_close(value, expected[name], rtol=1e-3, atol=2e-5)


def test_those_who_are_left_end_by_themselves_and_one_says_why(
    long_run: Any, tmp_path: Path
) -> None:
    out = tmp_path / "pruned"
    runs = side_by_side(3, *long_run, f"--out={out}")
    wait_for_blocks(tmp_path / "pruned.partial", runs[0])
    runs[1].send_signal(signal.SIGKILL)
    printed = "".join(ended(run)[1] for run in runs)
    assert [run.returncode for run in runs] == [2, -signal.SIGKILL, 2]
    assert printed.count("error: lost touch with another process") == 1
    assert "Traceback" not in printed
    check_what_is_left(out)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("prune", "--samples=1", "--out=pruned"),
            "1 calibration windows cannot be divided among 2 processes",
        ),
        (
            ("inspect",),
            "'sparsellm inspect' runs in one process; start it without torchrun",
        ),
    ],
)
def test_a_mistake_is_told_once(
    arguments: tuple[str, ...], message: str, llama: Path
) -> None:
    command, *options = arguments
    runs = side_by_side(2, command, str(llama), *options)
    printed = "".join(ended(run)[1] for run in runs)
    assert [run.returncode for run in runs] == [2, 2]
    assert printed.count(message) == printed.count("error:") == 1
    assert "Traceback" not in printed


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_all_ends_each_and_one_says_what_is_kept(
    signum: int, long_run: Any, tmp_path: Path
) -> None:
    out = tmp_path / "pruned"
    runs = side_by_side(3, *long_run, f"--out={out}")
    wait_for_blocks(tmp_path / "pruned.partial", runs[0])
    for run in runs:
        run.send_signal(signum)
    printed = "".join(ended(run)[1] for run in runs)
    assert [run.returncode for run in runs] == [128 + signum] * 3
    assert printed.count("interrupted (") == 1, printed
    assert f"finished blocks are kept next to {out}" in printed
    assert "error: " not in printed
    assert "Traceback" not in printed
    check_what_is_left(out)


def test_torchrun_starts_a_run_again_and_it_goes_on(
    long_run: Any, tmp_path: Path
) -> None:
    run = by_torchrun(2, *long_run, f"--out={tmp_path / 'pruned'}", restarts=1)
    wait_for_blocks(tmp_path / "pruned.partial", run)
    psutil.Process(run.pid).children()[-1].kill()
    _, stderr = ended(run)
    assert run.returncode == 0, stderr
    assert stderr.count("resuming an unfinished run") == 1
