"""What a run takes on machines that are not at hand, by the forecast that `sparsellm prune` prints.

    python benchmarks/forecast.py --machine laptop=400,20,32,0 server=3000,100,256,2.5 card=200000,25,256,3

Writes checkpoints of the shape of Llama 3 whose weights are holes in the files, opens them as a run does, and predicts
memory, disk and time for the default recipe. Nothing is run: the speed of a machine is given as GFLOP/s of large
products, GB/s of memory (for a card: between it and the host), GB of memory for hidden states, and dollars an hour.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from scale import LLAMA
from transformers import AutoModelForCausalLM, LlamaConfig

from sparsellm import Recipe
from sparsellm.chain import Chain, open_chain
from sparsellm.run import predictions
from sparsellm.run.choice import Choice, patterns_of
from sparsellm.run.opening import windows_of_pass
from sparsellm.sweep.gradients import LEAST_WINDOWS, TOKENS
from sparsellm.version import __version__

SHAPES = {  # hidden, intermediate, blocks, heads, heads of keys and values: Llama 3.2 1B, Llama 3.1 8B and 70B
    "1b": (2048, 8192, 16, 32, 8),
    "8b": (4096, 14336, 32, 32, 8),
    "70b": (8192, 28672, 80, 64, 8),
}
SHARD = 2e9  # bytes


@dataclass(frozen=True)
class Machine:
    name: str
    flops: float  # operations a second in a large product
    transfer: float  # bytes a second of parameters and moments that a step of Adam moves
    memory: float  # bytes
    dollars: float  # an hour; 0 where it is owned

    @classmethod
    def of(cls, text: str) -> Machine:
        name, numbers = text.split("=")
        flops, transfer, memory, dollars = map(float, numbers.split(","))
        return cls(name, flops * 1e9, transfer * 1e9, memory * 1e9, dollars)


def hollow(size: str, directory: Path) -> Path:
    """A checkpoint whose safetensors files have their headers and, in place of weights, holes."""
    hidden, intermediate, blocks, heads, kv_heads = SHAPES[size]
    shape = {"hidden_size": hidden, "intermediate_size": intermediate, "num_hidden_layers": blocks}
    shape |= {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "vocab_size": 128256}
    config = {**LLAMA, **shape, "max_position_embeddings": 131072}
    directory.mkdir()
    (directory / "config.json").write_text(json.dumps(config))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(LlamaConfig(**config))
    shards: list[list[tuple[str, torch.Tensor]]] = [[]]
    index = {}
    for name, tensor in model.state_dict().items():
        if sum(2 * tensor.numel() for _, tensor in shards[-1]) > SHARD:
            shards.append([])
        shards[-1].append((name, tensor))
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        header: dict[str, object] = {}
        end = 0
        for name, tensor in shard:
            start, end = end, end + 2 * tensor.numel()
            header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [start, end]}
            index[name] = file
        text = json.dumps(header).encode()
        with (directory / file).open("wb") as opened:
            opened.write(struct.pack("<Q", len(text)) + text)
            opened.truncate(8 + len(text) + end)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    return directory


def demand(chain: Chain, choice: Choice, recipe: Recipe, seq_len: int) -> predictions.Demand:
    """What `sparsellm.run.plan` would ask for, with text for every set of windows."""
    gradients = max(LEAST_WINDOWS * seq_len, choice.allocation_needs.gradient_tokens or TOKENS)
    return predictions.Demand(
        samples=recipe.samples,
        seq_len=seq_len,
        batch_tokens=recipe.batch_tokens,
        workspace=choice.workspace.then(choice.allocator.workspace),
        gradient_tokens=gradients if choice.needs.output_costs or choice.allocation_needs.gradient_tokens else 0,
        sets=choice.sets,
        swept=choice.passes > 0,
        fresh=choice.passes > 0,
    )


def row(chain: Chain, recipe: Recipe, machine: Machine) -> list[str]:
    choice = Choice.of(recipe).on(patterns_of(chain, recipe).values(), recipe.values)
    seq_len = recipe.seq_len or 2048
    asked = demand(chain, choice, recipe, seq_len)
    working = max(predictions.working_bytes(chain, asked).values()) + predictions.LIBRARIES
    hidden = predictions.hidden_bytes(chain, asked)
    held = min(hidden, max(0, int(0.8 * machine.memory) - working))
    disk = predictions.checkpoint_bytes(chain) * (2 if choice.passes else 1) + hidden - held
    swept = choice.passes * windows_of_pass(recipe.samples) * seq_len
    # Operations a second come from the machine's row, not from this one.
    with mock.patch.multiple(predictions, _speed=lambda device: machine.flops, MEMORY=machine.transfer):
        phases = predictions.predicted_seconds(chain, choice, recipe.samples * seq_len, seq_len, swept=swept)
    hours = sum(phases.values()) / 3600
    fits = f"{(working + held) / 1e9:.0f}" if working < 0.8 * machine.memory else f"needs {working / 0.8e9:.0f}"
    money = f"{hours * machine.dollars:.0f}" if machine.dollars else "–"
    method = recipe.method + (f", effort {recipe.effort}" if recipe.method == "sparsellm" else "")
    return [machine.name, method, fits, f"{disk / 1e9:.0f}", f"{hours:.1f}", money]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--machine", type=Machine.of, nargs="+", required=True, help="NAME=GFLOP/s,GB/s,GB,$")
    parser.add_argument("--sizes", nargs="+", default=["8b", "70b"], choices=SHAPES)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--seq-len", type=int, default=2048)
    arguments = parser.parse_args()
    print(f"sparsellm {__version__}, {arguments.samples} windows of {arguments.seq_len} tokens, 50 %\n")
    print("| model | machine | method | memory (GB) | disk (GB) | hours | $ |\n|---|---|---|---|---|---|---|")
    for size in arguments.sizes:
        with tempfile.TemporaryDirectory() as folder:
            chain = open_chain(hollow(size, Path(folder) / size), device=torch.device("cpu"))
            for machine in arguments.machine:
                for changes in ({"method": "sparsegpt"}, {"effort": 0}, {"effort": 1}):
                    settings = {"sparsity": 0.5, "samples": arguments.samples, "seq_len": arguments.seq_len, **changes}
                    print(f"| {size} | {' | '.join(row(chain, Recipe(**settings), machine))} |", flush=True)


if __name__ == "__main__":
    main()
