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

from tests.documents import ROOT, SMALL, blocks
from tests.models import save_tiny, tiny_llama, tiny_tokenizer

PAGE = ROOT / "docs" / "scale.md"
(SLURM,), (SKYPILOT,) = (blocks(PAGE, language) for language in ("bash", "yaml"))
LINES, JOBS = (
    "".join(blocks(PAGE, "sh")).splitlines(),
    [SLURM, yaml.safe_load(SKYPILOT)["run"]],
)
LIMIT = 300  # seconds, far beyond what any run here takes: one that hangs is ended, not waited for
COMMANDS = {  # for the scripts: torchrun of this Python, and those of Slurm, with two nodes on this machine
    "torchrun": f'exec {sys.executable} -m torch.distributed.run "$@"',
    "srun": '"$@" & first=$!; "$@" & wait $! && wait $first',
    "scontrol": "echo localhost",
}
VARIABLES = {
    f"SLURM_{name}": "1"
    for name in ("GPUS_ON_NODE", "CPUS_PER_TASK", "JOB_ID", "JOB_NODELIST")
}
VARIABLES |= {
    "SLURM_NNODES": "2",
    "SKYPILOT_NUM_NODES": "2",
    "SKYPILOT_NUM_GPUS_PER_NODE": "1",
}
VARIABLES |= {"SKYPILOT_NODE_IPS": "localhost\nlocalhost"}


def small(script: str, port: int = 29400) -> str:
    """A script on a tiny model, in the working directory, with one process for each node."""
    command = re.search(r"-m sparsellm (\w+)", script)
    assert command is not None
    script = (
        script.replace("\\\n", " ")
        .rstrip()
        .replace("/shared", "shared")
        .replace("node1:", "localhost:")
    )
    return f"{script.replace('node 8', 'node 1').replace('29400', str(port))} {SMALL[command[1]]}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for place in ("path/to/model", "shared/model"):
        save_tiny(tiny_llama(), tiny_tokenizer(), tmp_path / place)
    for name in ("my-text.txt", "my-test.txt", "shared/my-text.txt"):
        Path(name).write_text(
            "\n".join(
                f"Line {n} of a text about nothing in particular." for n in range(400)
            )
        )
    return tmp_path


def test_torchrun_and_sparsellm_take_every_command(folder: Path, run: Any) -> None:
    for script in [*LINES, *JOBS]:
        line = re.search(r"torchrun .*", re.sub(r"\$\w+", "2", small(script)))
        assert line is not None
        given = get_args_parser().parse_args(shlex.split(line[0])[1:])
        assert (given.module, given.training_script) == (True, "sparsellm")
        shutil.rmtree(folder / "shared" / "pruned", ignore_errors=True)
        code, _, stderr = run(*given.training_script_args)
        assert code == 0, f"{line[0]}: {stderr}"


@pytest.mark.slow
@pytest.mark.parametrize("scripts", [LINES, JOBS], ids=["lines", "jobs"])
def test_two_processes_run_every_script(scripts: list[str], folder: Path) -> None:
    for name, text in COMMANDS.items():
        (folder / name).write_text(f"#!/bin/bash\n{text}\n")
        (folder / name).chmod(0o755)
    environment = {
        **os.environ,
        **VARIABLES,
        "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}",
    }
    for script in scripts:
        shutil.rmtree(folder / "shared" / "pruned", ignore_errors=True)
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        command = ["timeout", str(LIMIT), "bash", "-ec", small(script, port)]
        nodes = 2 if "--nnodes" in script and "srun" not in script else 1
        running = [subprocess.Popen(command, env=environment) for _ in range(nodes)]
        assert [process.wait() for process in running] == [0] * nodes, script
        for record in [
            *folder.glob("pruned/pruning.json"),
            *folder.glob("shared/pruned/pruning.json"),
        ]:
            assert json.loads(record.read_text())["processes"] == 2
