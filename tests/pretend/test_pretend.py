"""Pruning on a pretend CUDA device: no fault, the CPU's bits, and few launches, synchronisations and copies."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.timeout(0)  # the process takes a minute of computing, however busy the machine is
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    """What one process with the pretend device finds."""
    if shutil.which("g++") is None:
        pytest.skip("there is no g++, which compiles the pretend device")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "tests.pretend"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


# The most launches and synchronisations of a linear with 64 inputs and outputs, and of a block of a tiny Llama.
CEILINGS = {
    "magnitude 0.6": (40, 7),
    "magnitude 2:4": (80, 6),
    "wanda 0.6": (60, 13),
    "wanda 2:4": (85, 6),
    "sparsegpt 0.6": (350, 10),
    "sparsegpt 2:4": (1900, 41),
    "admm 0.6": (650, 60),
    "admm 2:4": (1300, 42),
    "rounding int4 0.6": (30_000, 55),
    "rounding int4 2:4": (30_000, 55),
    "walk, a block": (6600, 720),
    "sweep, a block": (1300, 210),
}


def test_the_device_refuses_and_counts_like_cuda(found: dict[str, Any]) -> None:
    assert found["accepted"] == []
    launch, wait = {"launches": 1}, {"launches": 1, "syncs": 1}
    assert found["operations"] == {
        "add": launch,
        "view": {},
        "item": wait,
        "bool": {"launches": 2, "syncs": 1},  # the comparison, and the copy of its result
        "nonzero": wait,
        "by a mask": {"launches": 2, "syncs": 1},
        "to the card": {**wait, "bytes_in": 16},
        "to the host": {**wait, "bytes_out": 16},
    }


def test_all_runs_end_with_the_bits_of_the_cpu(found: dict[str, Any]) -> None:
    assert len(found["faults"]) == 35
    assert {name: fault for name, fault in found["faults"].items() if fault} == {}


@pytest.mark.parametrize("name", CEILINGS)
def test_launches_and_waits_stay_below_ceilings(name: str, found: dict[str, Any]) -> None:
    """``python -m tests.pretend --places`` names the lines of src that launch and wait most."""
    launches, waits = CEILINGS[name]
    traffic = found["traffic"][name]
    assert traffic["launches"] <= launches
    assert traffic["syncs"] <= waits
    if not name.endswith("a block"):  # a linear stays on the card, but for masks that rounding counts on the host
        limit = 34_000 if name.startswith("rounding") else 4 * 64 * 10
        assert traffic.get("bytes_in", 0) + traffic.get("bytes_out", 0) <= limit


def test_every_row_of_the_traffic_has_a_ceiling(found: dict[str, Any]) -> None:
    assert found["traffic"].keys() == CEILINGS.keys()
