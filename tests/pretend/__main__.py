"""What the tests of this folder run in a process of its own, since torch must be told of the device before its import.

python -m tests.pretend   # JSON: a fault or "" for every run, and the traffic of walk and sweep
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any
from unittest import mock

os.environ["TRITON_INTERPRET"] = "1"  # before triton
from tests.pretend import device  # before torch  # isort: skip

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import sparsellm
from sparsellm import Recipe
from sparsellm.method.solvers import kernels
from sparsellm.run.held_out import HeldOutWindows
from tests.files.small import tensors_of
from tests.models import save_tiny, tiny_tokenizer, windows
from tests.models.families import family

FAMILIES = ("Llama", "OPT", "Mixtral", "Gemma3Text")
TARGETS: tuple[dict[str, Any], ...] = ({"sparsity": 0.6}, {"pattern": "2:4"})
VALUES: tuple[dict[str, Any], ...] = (
    {},
    {"values": "int8"},
    {"grid": "q4_0"},
)
METHODS: tuple[dict[str, Any], ...] = (
    *({"method": name} for name in ("magnitude", "wanda", "sparsegpt", "admm")),
    {"method": "sparsellm", "effort": 1, "sweep_rate": 0.001},
    {"method": "sparsellm-paper"},
)


def runs() -> dict[str, tuple[str, dict[str, Any]]]:
    """Name → family and recipe. Every two of method, values, family and target meet in some run."""
    cases = {}
    for at, method in enumerate(METHODS):
        for turn, values in enumerate(VALUES):
            name, target = FAMILIES[(at + turn) % 4], TARGETS[(turn + at // 4) % 2]
            fields = {**method, **target, **values}
            if values:  # few linears: rounding takes nearly all of the time
                down = {"OPT": "*.0.fc2", "Mixtral": "*.0.*experts.1.down_proj"}.get(
                    name, "*.0.*down_proj"
                )
                fields["only"] = (
                    ["*.0.*v_proj"] if "grid" in values else ["*.0.*v_proj", down]
                )
            cases[" ".join((name, *map(str, fields.values())))] = (name, fields)
    return cases


def fault_of(source: Path, fields: dict[str, Any], folder: Path) -> str:
    """What differs between a checkpoint pruned on the card and on the CPU; empty if nothing does."""
    folder.mkdir()
    for name, context in (("cuda", device.cuda()), ("cpu", contextlib.nullcontext())):
        recipe = Recipe(device=name, products="float32", batch_tokens=32, **fields)
        try:
            # The CPU's own kernel of attention rounds otherwise. The interpreter of the other kernel is slow.
            with (
                context,
                sdpa_kernel(SDPBackend.MATH),
                mock.patch.object(kernels, "kernel_name", return_value="torch"),
            ):
                result = sparsellm.prune(
                    source, recipe, calibration=windows(4, 16), out=folder / name
                )
            if (
                result.sweeps
                and not result.sweeps[-1].held_out < result.sweeps[0].held_out
            ):
                return f"on {name}: the sweep lowers no divergence, so nothing of it is compared"
        except Exception:
            return f"on {name}: {traceback.format_exc()}"
    on_card, on_cpu = tensors_of(folder / "cuda"), tensors_of(folder / "cpu")
    return ", ".join(
        name for name in on_cpu if not torch.equal(on_card[name], on_cpu[name])
    )


def accepted_on_the_device() -> list[str]:
    """What the pretend device takes, of what CUDA refuses."""
    host = torch.ones(4)
    card = torch.ones(4, device="cuda")
    refused = {
        "two devices": lambda: card + host,
        "generator": lambda: torch.rand(4, device="cuda", generator=torch.Generator()),
        "numpy": lambda: card.numpy(),
        "whole numbers": lambda: torch.mv(card[None].long(), card.long()),
        "cat": lambda: torch.cat((card, host)),
    }
    accepted = []
    for name, call in refused.items():
        with contextlib.suppress(RuntimeError, TypeError, NotImplementedError):
            call()
            accepted.append(name)
    return accepted


def traffic_of_runs(source: Path, folder: Path) -> dict[str, Counter[str]]:
    """Of one run without and with a sweep, each for a block of the model, and of the measurement at a run's end."""
    table = {}
    at_end = Counter[str]()
    measure = HeldOutWindows.measure

    def counting(*given: Any, **named: Any) -> Any:
        with device.counted() as traffic:
            result = measure(*given, **named)
        at_end.clear()
        at_end.update(traffic)
        return result

    # the first of a process measures the device
    for number, effort in enumerate((0, 0, 1)):
        recipe = Recipe(
            device="cuda", batch_tokens=32, effort=effort, sparsity=0.6, sets=1
        )
        with (
            device.counted() as traffic,
            mock.patch.object(HeldOutWindows, "measure", counting),
        ):
            sparsellm.prune(
                source,
                recipe,
                calibration=windows(4, 16),
                out=folder / f"effort-{number}",
            )
        table[f"effort {effort}"] = traffic - at_end
    walk, both = table["effort 0"], table["effort 1"]
    of_sweep = Counter({what: both[what] - walk[what] for what in both})
    of_blocks = {
        name: Counter({what: number // 2 for what, number in traffic.items()})
        for name, traffic in (("walk, a block", walk), ("sweep, a block", of_sweep))
    }
    return {**of_blocks, "measurement": at_end}


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
        folder, faults = Path(name), {}
        sources = {
            kind: save_tiny(family(kind), tiny_tokenizer(), folder / kind)
            for kind in FAMILIES
        }
        for number, (case, (model, fields)) in enumerate(runs().items()):
            faults[case] = fault_of(sources[model], fields, folder / str(number))
        with device.cuda():
            accepted = accepted_on_the_device()
            traffic = traffic_of_runs(sources["Llama"], folder)
    print(json.dumps({"faults": faults, "traffic": traffic, "accepted": accepted}))


if __name__ == "__main__":
    main()
