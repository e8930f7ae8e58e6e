"""Pruning on a pretend CUDA device: no fault, the CPU's bits, and few launches, synchronisations and copies."""

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
# the two errors of a solution. Each pass of a rounding waits once: the linears of a 135M model take six or seven.
MOST = {
    "magnitude": (750, 5),
    "wanda": (760, 10),
    "sparsegpt": (1200, 7),
    "admm": (1400, 20),
    "rounding": (10_000, 20),
}
CEILINGS = {
    f"{name} {target}": most for name, most in MOST.items() for target in ("0.6", "2:4")
}
CEILINGS |= {"walk, a block": (6300, 400), "sweep, a block": (1300, 170)}


def test_the_device_refuses_and_counts_like_cuda(report: dict[str, Any]) -> None:
    assert report["accepted"] == []
    launch, wait = {"launches": 1}, {"launches": 1, "syncs": 1}
    compared = {"launches": 2, "syncs": 1}  # the comparison, and the copy of its result
    expected = {
        "add": launch,
        "view": {},
        "item": wait,
        "bool": compared,
        "nonzero": wait,
        "by a mask": compared,
    }
    expected |= {
        "to the card": {**wait, "bytes_in": 16},
        "to the host": {**wait, "bytes_out": 16},
    }
    assert report["operations"] == expected


def test_all_runs_end_with_the_bits_of_the_cpu(report: dict[str, Any]) -> None:
    assert len(report["faults"]) == 31
    assert {name: fault for name, fault in report["faults"].items() if fault} == {}


@pytest.mark.parametrize("name", CEILINGS)
def test_launches_and_waits_stay_below_ceilings(
    name: str, report: dict[str, Any]
) -> None:
    launches, waits = CEILINGS[name]
    traffic = report["traffic"][name]
    assert traffic["launches"] <= launches
    assert traffic["syncs"] <= waits
    if not name.endswith("a block"):  # a weight stays on the card
        assert traffic.get("bytes_in", 0) + traffic.get("bytes_out", 0) <= 4 * 1024 * 10


def test_every_row_of_the_traffic_has_a_ceiling(report: dict[str, Any]) -> None:
    assert report["traffic"].keys() == CEILINGS.keys()
