"""The commands of docs/scale.md: torchrun and sparsellm take each, and two processes on this machine run it."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from torch.distributed.run import get_args_parser

from tests.models import save_tiny, tiny_llama, tiny_tokenizer
from tests.test_docs import ROOT, SMALL, blocks

PAGE = ROOT / "docs" / "scale.md"
(SLURM,) = blocks(PAGE, "bash")
(SKYPILOT,) = [yaml.safe_load(block) for block in blocks(PAGE, "yaml")]
LINES = [line for block in blocks(PAGE, "sh") for line in block.splitlines()]
SCRIPTS = [*LINES, SLURM, SKYPILOT["run"]]
LIMIT = 300  # seconds, far beyond what any run here takes: one that hangs is ended, not waited for
COMMANDS = {  # for the scripts: torchrun of this Python, and those of Slurm, with two nodes on this machine
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    "srun": '"$@" & first=$!; "$@" & wait $! && wait $first',
    "scontrol": "echo localhost",
}


def small(script: str, port: int = 29400) -> str:
    """A script on a tiny model, in a directory of this test, with one process for each node."""
    script = script.replace("\\\n", " ").rstrip()
    for name, value in {"/shared": "shared", "node1:29400": f"localhost:{port}", "29400": str(port)}.items():
        script = script.replace(name, value)
    command = re.search(r"-m sparsellm (\w+)", script)
    assert command is not None
    return f"{script.replace('--nproc-per-node 8', '--nproc-per-node 1')} {SMALL[command[1]]}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for place in ("path/to/model", "shared/model"):
        save_tiny(tiny_llama(), tiny_tokenizer(), tmp_path / place)
    for name in ("my-text.txt", "my-test.txt", "shared/my-text.txt"):
        Path(name).write_text(
            "\n".join(f"Line {number} of a text about nothing in particular." for number in range(400))
        )
    return tmp_path


def test_torchrun_and_sparsellm_take_every_command(folder: Path, run: Any) -> None:
    for script in SCRIPTS:
        line = re.search(r"torchrun .*", re.sub(r'"?\$\w+', "2", small(script)))
        assert line is not None
        given = get_args_parser().parse_args(shlex.split(line[0].replace('"', ""))[1:])
        assert given.module
        assert given.training_script == "sparsellm"
        shutil.rmtree(folder / "shared" / "pruned", ignore_errors=True)
        code, _, stderr = run(*given.training_script_args)
        assert code == 0, f"{line[0]}: {stderr}"


def run_script(script: str, folder: Path, nodes: int = 1, **variables: str) -> None:
    """Runs a script in a shell, on several nodes at the same time; fails with its output if one fails."""
    places = folder / "bin"
    places.mkdir(exist_ok=True)
    for name, text in COMMANDS.items():
        (places / name).write_text(f"#!/bin/bash\n{text}\n")
        (places / name).chmod(0o755)
    environment = {**os.environ, **variables, "PATH": f"{places}{os.pathsep}{os.environ['PATH']}"}
    started = [
        subprocess.Popen(["bash", "-ec", script], env=environment, stderr=subprocess.PIPE, text=True)
        for _ in range(nodes)
    ]
    try:
        assert [each.wait(LIMIT) for each in started] == [0] * nodes, [
            each.stderr and each.stderr.read() for each in started
        ]
    finally:
        for each in started:
            each.kill()


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.slow
def test_two_processes_run_the_lines_of_the_page(folder: Path) -> None:
    for line in LINES:
        run_script(small(line, free_port()), folder, nodes=2 if "--nnodes 2" in line else 1)
    for place in ("pruned", "compared/wanda-0.5", "shared/pruned"):
        record = json.loads((folder / place / "pruning.json").read_text())
        assert record["processes"] == (1 if place.startswith("compared") else 2)
    (evaluation,) = json.loads((folder / "pruned" / "results.json").read_text())["evaluations"]
    assert evaluation["against"]["kl"] > 0


@pytest.mark.slow
@pytest.mark.parametrize("script", ["slurm", "skypilot"])
def test_the_script_runs_on_two_nodes(script: str, folder: Path) -> None:
    slurm = {"SLURM_NNODES": "2", "SLURM_GPUS_ON_NODE": "1", "SLURM_CPUS_PER_TASK": "1", "SLURM_JOB_ID": "7"}
    if script == "slurm":
        run_script(small(SLURM, free_port()), folder, SLURM_JOB_NODELIST="localhost", **slurm)
    else:
        assert SKYPILOT["num_nodes"] == 2
        sky = {
            "SKYPILOT_NUM_NODES": "2",
            "SKYPILOT_NUM_GPUS_PER_NODE": "1",
            "SKYPILOT_NODE_IPS": "localhost\nlocalhost",
        }
        run_script(small(SKYPILOT["run"], free_port()), folder, nodes=2, **sky)
    assert json.loads((folder / "shared" / "pruned" / "pruning.json").read_text())["processes"] == 2
