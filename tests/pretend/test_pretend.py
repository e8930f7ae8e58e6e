"""Pruning on a pretend CUDA device: no fault, the CPU's bits, and few launches and synchronisations."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

# the process takes a minute of computing, however busy the machine is
pytestmark = pytest.mark.timeout(0)
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    """What one process with the pretend device finds."""
    if shutil.which("g++") is None or find_spec("triton") is None:
        pytest.skip(
            "there is no g++, which compiles the device, or no Triton, which runs its kernel"
        )
    if torch.version.cuda is not None:
        pytest.skip(
            "this torch is built for CUDA, and has hooks where the pretend device would put its own"
        )
    command = [sys.executable, "-m", "tests.pretend"]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


# The most launches and waits of a linear with 4096 inputs and outputs, and of a block of a tiny Llama. 700 launches are
# the two errors of a solution. Each pass of a rounding waits once: the linears of a 135M model take six or seven. The
# measurement runs eight windows, one by one as `sparsellm eval` does, through the pruned and the dense model.
def test_the_device_refuses_what_cuda_refuses(report: dict[str, Any]) -> None:
    assert report["accepted"] == []


def test_all_runs_end_with_the_bits_of_the_cpu(report: dict[str, Any]) -> None:
    assert len(report["faults"]) == 18
    assert {name: fault for name, fault in report["faults"].items() if fault} == {}


def test_launches_and_waits_stay_below_ceilings(report: dict[str, Any]) -> None:
    ceilings = {
        "walk, a block": (6300, 400),
        "sweep, a block": (1300, 170),
        "measurement": (1300, 340),
    }
    assert report["traffic"].keys() == ceilings.keys()
    for name, (launches, waits) in ceilings.items():
        assert launches / 10 < report["traffic"][name]["launches"] <= launches
        assert waits / 10 < report["traffic"][name]["syncs"] <= waits
