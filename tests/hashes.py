"""SHA-256 of tiny models pruned by every method: the proof that a change of the code is a move and changes no bit.

    python -m tests.hashes > before.json              # on one state of the code
    python -m tests.hashes --compare before.json      # on another: lists what differs, and then exits with 1

Each model is pruned in one process and in two. Hashes depend on the machine and on the version of torch, so compare
them on one machine. ``--only`` takes parts of names, such as ``sparsegpt`` or ``opt/``."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

import sparsellm
from sparsellm import Recipe, parallel
from sparsellm.errors import SparseLLMError
from tests.models import tiny_gpt2, tiny_llama, tiny_opt, windows
from tests.parallel.processes import run_in

FAMILIES: dict[str, Any] = {"llama": tiny_llama, "opt": tiny_opt, "gpt2": tiny_gpt2}
TARGETS: dict[str, dict[str, Any]] = {
    "0.6": {"sparsity": 0.6},
    "2:4": {"pattern": "2:4"},
}
METHODS: dict[str, dict[str, Any]] = {
    **{
        name: {"method": name}
        for name in ("magnitude", "wanda", "sparsegpt", "admm", "sparsellm-paper")
    },
    "sparsellm effort 0": {"method": "sparsellm", "effort": 0},
    "sparsellm effort 1": {"method": "sparsellm", "effort": 1},
    "sparsellm solver sparsegpt": {
        "method": "sparsellm",
        "effort": 0,
        "options": {"solver": "sparsegpt"},
    },
    "sparsellm refit false": {
        "method": "sparsellm",
        "effort": 0,
        "options": {"refit": False},
    },
    "sparsellm output_metric 0": {
        "method": "sparsellm",
        "effort": 0,
        "options": {"output_metric": 0.0},
    },
    "sparsellm norm_weighting 0": {
        "method": "sparsellm",
        "effort": 0,
        "options": {"norm_weighting": 0.0},
    },
    "sparsellm iterations 2": {
        "method": "sparsellm",
        "effort": 0,
        "options": {"iterations": 2},
    },
    "wanda values int8": {"method": "wanda", "values": "int8"},
    "sparsellm values int4": {"method": "sparsellm", "effort": 1, "values": "int4"},
}
ALLOCATIONS = ("uniform", "threshold")


def cases() -> dict[str, tuple[Any, dict[str, Any]]]:
    """Name of a case -> model family and fields of the recipe."""
    recipes = {
        f"{goal}/{name}": TARGETS[goal] | fields
        for goal in TARGETS
        for name, fields in METHODS.items()
    }
    for allocation in ALLOCATIONS:
        recipes[f"0.6/wanda, allocation {allocation}"] = {
            "sparsity": 0.6,
            "method": "wanda",
            "allocation": allocation,
        }
    return {
        f"{family}/{name}": (make, fields)
        for family, make in FAMILIES.items()
        for name, fields in recipes.items()
    }


def digest(model: PreTrainedModel) -> str:
    """SHA-256 of all weights with their names, in order."""
    result = hashlib.sha256()
    for name, value in sorted(model.state_dict().items()):
        result.update(name.encode())
        result.update(
            value.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        )
    return result.hexdigest()


def hashes(only: list[str]) -> dict[str, str]:
    """Name of a case -> digest of the pruned model, or the error that refused it."""
    result = {}
    for name, (make, fields) in cases().items():
        if not any(part in name for part in only):
            continue
        model = make()
        try:
            sparsellm.prune(
                model, Recipe(batch_tokens=80, **fields), calibration=windows(7)
            )
            result[name] = digest(model)
        except SparseLLMError as refusal:
            result[name] = f"refused: {type(refusal).__name__}"
    return result


def in_one_of_several(folder: Path, only: list[str]) -> None:
    """What each of several joined processes runs."""
    (folder / f"{parallel.rank()}.json").write_text(json.dumps(hashes(only)))


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--compare", type=Path, help="a file of hashes; report what differs from it"
    )
    parser.add_argument(
        "--only", nargs="*", default=[""], help="parts of names of the cases to run"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    result = {
        f"{name} (1 process)": value for name, value in hashes(arguments.only).items()
    }
    with tempfile.TemporaryDirectory() as folder:
        run_in(2, in_one_of_several, Path(folder), arguments.only)
        first, second = (
            json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(2)
        )
    assert first == second, "the processes end with different models"
    result.update({f"{name} (2 processes)": value for name, value in first.items()})
    if arguments.compare is None:
        print(json.dumps(result, indent=1))
        return 0
    before = json.loads(arguments.compare.read_text())
    shared = before.keys() & result.keys()
    different = sorted(name for name in shared if before[name] != result[name])
    for name in different:
        print(f"differs: {name}\n  {before[name]}\n  {result[name]}")
    print(f"{len(shared)} hashes compared, {len(different)} differ", file=sys.stderr)
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
