"""What `sparsellm prune` takes on machines that are not at hand, and its predictions against runs on this one.

    python benchmarks/forecast.py
    python benchmarks/forecast.py --models 8b --machines laptop=400,300,40,32,1
    python benchmarks/forecast.py --against demo /path/to/gemma.gguf --text my-text.txt --cpu-seconds

The tables come from configs alone, as `sparsellm plan` has them, for the default recipe; where that does not fit, for
the highest effort or else the local method that does. A machine is a GPU of `sparsellm plan --gpu` with GB of memory
and a number of processes that share it, or, for a CPU, GFLOP/s in bf16 and fp32, GB/s and GB. With `--against`, runs
are predicted and done, each in a process of its own; `1.1b` and `7b-1-layers` are made of random weights.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from scale import CONFIGS, make_checkpoint
from transformers import LlamaConfig, PretrainedConfig, Qwen3MoeConfig

from sparsellm import Recipe
from sparsellm.inputs import about
from sparsellm.model.chain import Chain, outline
from sparsellm.progress import PHASES
from sparsellm.records import Prediction
from sparsellm.run.needs import foresee
from sparsellm.run.opening import set_products
from sparsellm.run.speeds import Speeds, named
from sparsellm.version import __version__


def llama(hidden: int, intermediate: int, blocks: int, heads: int) -> PretrainedConfig:
    """Llama 3, with its eight heads of keys and values."""
    return LlamaConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        num_key_value_heads=8,
        vocab_size=128256,
        max_position_embeddings=131072,
        tie_word_embeddings=hidden == 2048,
        dtype="bfloat16",
    )


def qwen_mixture(
    hidden: int, intermediate: int, blocks: int, experts: int
) -> PretrainedConfig:
    """A mixture with the shapes of Qwen3, which routes a token to eight experts."""
    sizes: dict[str, Any] = {
        "hidden_size": hidden,
        "moe_intermediate_size": intermediate,
        "num_hidden_layers": blocks,
    }
    heads = {"num_attention_heads": 64, "num_key_value_heads": 4, "head_dim": 128}
    sizes |= {
        **heads,
        "num_experts": experts,
        "num_experts_per_tok": 8,
        "vocab_size": 151936,
    }
    return Qwen3MoeConfig(
        **sizes,
        max_position_embeddings=40960,
        tie_word_embeddings=False,
        dtype="bfloat16",
    )


MODELS = {
    "1b": llama(2048, 8192, 16, 32),
    "8b": llama(4096, 14336, 32, 32),
    "70b": llama(8192, 28672, 80, 64),
    "400b": qwen_mixture(
        5120, 1536, 96, 176
    ),  # Qwen3-235B with wider blocks and more experts: 405B, 21B a token
}
MACHINES = [
    "laptop=400,300,40,32,1",
    "server=6000,3000,400,512,1",
    "rtx4090=64,1",
    "h100=256,1",
    "h100=2000,8",
]
TRIED: list[dict[str, Any]] = [
    {},
    {"effort": 0},
    {"method": "sparsegpt"},
    {"method": "wanda"},
]  # the default, and what holds less


def machine(text: str) -> tuple[str, Speeds, float, int]:
    """Name, speeds, bytes of memory of the host, and processes."""
    name, numbers = text.split("=")
    *rates, memory, ranks = map(float, numbers.split(","))
    if rates:
        blocks, exact, moved = rates
        speeds = Speeds(name, blocks * 1e9, exact * 1e9, moved * 1e9)
    else:
        speeds = named(name)
        name = f"{int(ranks)} × {speeds.name}"
    return f"{name}, {memory:g} GB", speeds, memory * 1e9, int(ranks)


def hours(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.0f} min"


def row(model: str, chain: Chain, text: str) -> str:
    name, speeds, memory, ranks = machine(text)
    chain.device = torch.device("cuda" if speeds.gpu_bytes else "cpu")
    budget = f"{int(0.8 * memory / ranks)}B"
    prediction: Prediction | None = None
    for changes in TRIED:
        recipe = Recipe(memory=budget, **changes)
        set_products(chain, recipe)
        prediction = foresee(chain, recipe, ranks=ranks, speeds=speeds)
        if not prediction.notes:
            break
    assert prediction is not None
    what = (
        recipe.method
        if recipe.method != "sparsellm"
        else f"effort {recipe.effort if recipe.effort is not None else 1}"
    )
    what = f"{what}, does not fit" if prediction.notes else what
    needs = [
        prediction.memory.predicted_peak_rss_bytes,
        prediction.memory.predicted_peak_device_bytes,
        prediction.disk_bytes,
    ]
    phases = [prediction.seconds[phase] for phase in ("prune", "sweep")]
    cells = [
        model,
        name,
        what,
        hours(sum(prediction.seconds.values())),
        *map(hours, phases),
    ]
    return " | ".join([*cells, *(about(size) if size else "–" for size in needs)])


def tables(models: list[str], machines: list[str]) -> None:
    print(f"sparsellm {__version__}, 50 %, 128 windows of 2048 tokens\n")
    print(
        "| model | machine | what fits | time | walk | sweep | memory | GPU memory | disk |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for model in models:
        with tempfile.TemporaryDirectory() as folder:
            MODELS[model].to_json_file(Path(folder) / "config.json")
            chain = outline(
                Path(folder), device=torch.device("cpu"), dtype=torch.bfloat16
            )
        for text in machines:
            print(f"| {row(model, chain, text)} |", flush=True)


RUN = """
import json, sys, time
if sys.argv[4] == "cpu":
    time.perf_counter = time.process_time
import sparsellm
result = sparsellm.prune(sys.argv[1], json.loads(sys.argv[3]), out=sys.argv[2])
memory = result.memory.predicted_peak_rss_bytes
print(json.dumps([result.predicted_seconds, result.seconds, memory, result.peak_rss_bytes]))
"""


def against(
    models: list[str], scratch: Path, settings: dict[str, object], clock: str
) -> None:
    print("| model | what | predicted | measured | ratio |\n|---|---|---|---|---|")
    for model in models:
        size, _, layers = model.removesuffix("-layers").partition("-")
        place = scratch / model if size in CONFIGS else model
        if size in CONFIGS:
            config = CONFIGS[size] | (
                {"num_hidden_layers": int(layers)} if layers else {}
            )
            make_checkpoint(scratch / model, config, 0)
        out = scratch / "pruned"
        command = [
            sys.executable,
            "-c",
            RUN,
            str(place),
            str(out),
            json.dumps(settings),
            clock,
        ]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        shutil.rmtree(out)
        predicted, measured, memory, peak = json.loads(done.stdout)
        measured["prune"] = sum(
            measured.get(name, 0.0) for name in ("read", "prune", "forward", "write")
        )
        phases = [
            name for name in ("gradients", "prune", "sweep") if measured.get(name)
        ]
        rows = [(PHASES[name], predicted[name], measured[name], "s") for name in phases]
        rows += [
            (
                "these phases",
                *(
                    sum(seconds[name] for name in phases)
                    for seconds in (predicted, measured)
                ),
                "s",
            )
        ]
        for what, first, second, unit in [
            *rows,
            ("memory", memory / 1e9, peak / 1e9, "GB"),
        ]:
            print(
                f"| {Path(model).name} | {what} | {first:.3g} {unit} | {second:.3g} {unit} | {first / second:.2f} |"
            )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=MODELS)
    parser.add_argument(
        "--machines",
        nargs="+",
        default=MACHINES,
        metavar="NAME=…",
        help="CARD=GB,N or NAME=4 rates,N",
    )
    parser.add_argument("--against", nargs="+", metavar="MODEL", help="run these")
    parser.add_argument("--text", help="calibration text of the runs")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="of the runs, see `prune`",
    )
    parser.add_argument(
        "--cpu-seconds",
        action="store_true",
        help="processor time of one thread, on a busy machine",
    )
    parser.add_argument("--scratch", type=Path, default=Path(__file__).parent / "out")
    arguments = parser.parse_args()
    if not arguments.against:
        return tables(arguments.models, arguments.machines)
    recipe = Recipe(samples=16, seq_len=512, calibration=arguments.text).with_settings(
        arguments.set
    )
    arguments.scratch.mkdir(exist_ok=True)
    settings = recipe.model_dump(exclude_unset=True)
    against(
        arguments.against,
        arguments.scratch,
        settings,
        "cpu" if arguments.cpu_seconds else "wall",
    )


if __name__ == "__main__":
    main()
