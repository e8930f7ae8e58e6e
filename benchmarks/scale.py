"""Peak memory and time per block of a model of any size, and a check that a killed run is resumed.

    python benchmarks/scale.py --model 1.1b
    python benchmarks/scale.py --model 7b --blocks 4
    python benchmarks/scale.py --model 1.1b --layers 2 --methods sparsellm --memory 2.3GiB
    python benchmarks/scale.py --model 1.1b --samples 32 256 --seq-len 2048 --memory 2.5GiB --blocks 1 --once

Writes a checkpoint of random weights under a real config, shard by shard, and runs ``sparsellm prune`` on it in a
process of its own, whose resident memory (of the whole process tree) is sampled. The memory of a process that only
imports the package is subtracted. With ``--blocks N`` the process is killed by SIGKILL when N blocks are on the
disk, and started again to check that it resumes; the second run is killed after one more block.

Memory and time do not depend on the values of weights, so random ones suffice. Every block has the weights of the
first, since drawing 7B random numbers takes longer than writing them.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import PeakMemory
from safetensors.torch import save_file

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "vocab_size": 32000,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
}
CONFIGS: dict[str, dict[str, Any]] = {
    "1.1b": {  # TinyLlama-1.1B
        **LLAMA,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_hidden_layers": 22,
        "num_attention_heads": 32,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
    },
    "7b": {  # Llama-2-7B
        **LLAMA,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 32,
        "max_position_embeddings": 4096,
    },
    "135m": {  # SmolLM2-135M, the demo model
        **LLAMA,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
    },
}
BARS = {"1.1b": 2.0, "7b": 5.0}  # GB of resident memory beyond the imports


def make_checkpoint(directory: Path, config: dict[str, Any], seed: int) -> None:
    """Random weights, one shard a block and one for the rest; does nothing where they are already."""
    if (directory / "model.safetensors.index.json").is_file():
        return
    directory.mkdir(parents=True, exist_ok=True)
    width, inner = config["hidden_size"], config["intermediate_size"]
    head = width // config["num_attention_heads"]
    keys = head * config["num_key_value_heads"]
    vocabulary, blocks = config["vocab_size"], config["num_hidden_layers"]
    block = {
        "self_attn.q_proj": (width, width),
        "self_attn.k_proj": (keys, width),
        "self_attn.v_proj": (keys, width),
        "self_attn.o_proj": (width, width),
        "mlp.gate_proj": (inner, width),
        "mlp.up_proj": (inner, width),
        "mlp.down_proj": (width, inner),
        "input_layernorm": (width,),
        "post_attention_layernorm": (width,),
    }
    shards = [
        {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
        for i in range(blocks)
    ]
    shards.append(
        {
            "model.embed_tokens.weight": (vocabulary, width),
            "model.norm.weight": (width,),
            "lm_head.weight": (vocabulary, width),
        }
    )
    generator = torch.Generator().manual_seed(seed)
    weight_map: dict[str, str] = {}
    drawn: dict[str, torch.Tensor] = {}
    for number, shapes in enumerate(shards, 1):
        name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensors = {}
        for key, shape in shapes.items():
            # all blocks have the numbers of the first
            part = key.partition(".layers.")[2].partition(".")[2] or key
            if part not in drawn:
                values = torch.randn(shape, generator=generator).mul_(
                    config["initializer_range"]
                )
                drawn[part] = (torch.ones(shape) if len(shape) == 1 else values).to(
                    torch.bfloat16
                )
            tensors[key] = drawn[part]
        save_file(tensors, directory / name, {"format": "pt"})
        weight_map.update(dict.fromkeys(shapes, name))
        print(
            f"\rwriting the checkpoint: shard {number}/{len(shards)}",
            end="",
            file=sys.stderr,
        )
    print(file=sys.stderr)
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    make_tokenizer(directory)
    (directory / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )


def make_tokenizer(directory: Path) -> None:
    """A small byte-level tokenizer: it only has to make token ids that the model has."""
    from pydoc_data.topics import topics

    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=1000,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=alphabet,
        show_progress=False,
    )
    tokenizer.train_from_iterator(topics.values(), trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>"
    ).save_pretrained(directory)


def import_memory() -> int:
    """Resident bytes of a process that only imports the package."""
    program = "import psutil, sparsellm, sparsellm.api, sparsellm.app.cli; print(psutil.Process().memory_info().rss)"
    return int(
        subprocess.run(
            [sys.executable, "-c", program], check=True, capture_output=True, text=True
        ).stdout
    )


@dataclass
class Run:
    """What was seen of one process."""

    peak: int  # bytes
    seconds: float
    # seconds of each phase, of every block that is on the disk
    blocks: list[dict[str, float]]
    first: int  # blocks that were there before


def records(out: Path) -> list[dict[str, float]]:
    """Seconds of each phase, of every block that a run has finished."""
    paths = sorted(
        out.with_name(f"{out.name}.partial").glob(".sparsellm-run/model-*.json")
    )
    facts = [json.loads(path.read_text()) for path in paths]
    return [entry["seconds"] for entry in facts if "linears" in entry]


COMMAND = ("-m", "sparsellm")


def prune(
    model: Path,
    out: Path,
    options: list[str],
    stop_after: int | None,
    program: Sequence[str] = COMMAND,
) -> Run:
    """Runs the command, and kills it when ``stop_after`` blocks are on the disk. ``program``: what Python runs."""
    first = len(records(out))
    command = [
        sys.executable,
        *program,
        "prune",
        str(model),
        "--out",
        str(out),
        *options,
    ]
    start = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    memory = PeakMemory(process.pid)
    memory.start()
    said: list[str] = []
    assert process.stderr is not None
    listener = threading.Thread(
        target=lambda stream: said.extend(stream), args=(process.stderr,), daemon=True
    )
    listener.start()
    seen: list[dict[str, float]] = []
    while process.poll() is None:
        time.sleep(0.2)
        seen = records(out) or seen
        if stop_after is not None and len(seen) >= stop_after:
            process.send_signal(signal.SIGKILL)
            break
    process.wait()
    listener.join(timeout=5)
    memory.join(timeout=5)
    text = "".join(said)
    if process.returncode not in (0, -signal.SIGKILL):
        raise SystemExit(f"{' '.join(command)} failed:\n{text}")
    return Run(
        memory.peak,
        time.perf_counter() - start,
        seen,
        first,
    )


def row(name: str, what: str, run: Run, imports: int, blocks: int) -> str:
    # The first block pays for the libraries' first steps.
    work = [
        sum(v for k, v in entry.items() if "/" not in k and k not in BEFORE)
        for entry in run.blocks[run.first :]
    ]
    entry = sum(work[1:] or work) / max(1, len(work[1:] or work))
    outside = max(0.0, run.seconds - sum(work))
    peak = (run.peak - imports) / 1e9
    bar = (
        f" ({'within' if peak <= BARS[name] else 'ABOVE'} {BARS[name]:g})"
        if name in BARS
        else ""
    )
    return (
        f"| {name} | {what} | {run.first}…{len(run.blocks)} of {blocks} | {peak:.2f} GB{bar} "
        f"| {entry:.1f} s | {run.seconds:.0f} s "
        f"| {outside + entry * blocks:.0f} s |"
    )


# phases that are not part of a block
BEFORE = (
    "open",
    "calibration",
    "check",
    "embed",
    "replay",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=CONFIGS, default="1.1b")
    parser.add_argument("--methods", nargs="+", default=["sparsegpt"])
    parser.add_argument("--sparsity", type=float, default=0.5)
    parser.add_argument("--samples", type=int, nargs="+", default=[8])
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--memory", help="see `sparsellm prune`")
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="see `sparsellm prune`",
    )
    parser.add_argument("--layers", type=int, help="cut the model to N blocks")
    parser.add_argument(
        "--blocks",
        type=int,
        help="kill the run when N are done, and go on for one more",
    )
    parser.add_argument(
        "--once", action="store_true", help="with --blocks: do not go on after the kill"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--scratch",
        type=Path,
        default=Path(__file__).parent / "out",
        help="where checkpoints are made",
    )
    parser.add_argument(
        "--restart",
        action="store_true",
        help="forget what an unfinished run of this script has left",
    )
    parser.add_argument(
        "--keep", action="store_true", help="keep the pruned checkpoint"
    )
    arguments = parser.parse_args()
    config = dict(CONFIGS[arguments.model])
    config["num_hidden_layers"] = blocks = (
        arguments.layers or config["num_hidden_layers"]
    )
    name = arguments.model + (f"-{arguments.layers}-layers" if arguments.layers else "")
    model = arguments.scratch / f"random-{name}-{arguments.seed}"
    make_checkpoint(model, config, arguments.seed)
    imports = import_memory()
    print(
        f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}; "
        f"imports alone {imports / 1e9:.2f} GB; sparsity {arguments.sparsity:g}, seed {arguments.seed}.\n"
    )
    print(
        "| model | run | blocks | peak beyond imports | a block | this run | whole model, projected |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for method in arguments.methods:
        for samples in arguments.samples:
            out = arguments.scratch / f"pruned-{name}-{method}-{samples}"
            for leftover in (
                out,
                *([out.with_name(f"{out.name}.partial")] if arguments.restart else []),
            ):
                shutil.rmtree(leftover, ignore_errors=True)
            options = [
                "--method",
                method,
                "--sparsity",
                str(arguments.sparsity),
                "--samples",
                str(samples),
            ]
            options += [
                "--seq-len",
                str(arguments.seq_len),
                "--calibration",
                "pydoc",
                "--verbose",
            ]
            options += ["--memory", arguments.memory] if arguments.memory else []
            options += [
                part for setting in arguments.set for part in ("--set", setting)
            ]
            what = f"{method}, {samples} × {arguments.seq_len}"
            stops = (
                [None]
                if arguments.blocks is None
                else [arguments.blocks, arguments.blocks + 1]
            )
            for position, stop in enumerate(stops[:1] if arguments.once else stops):
                run = prune(model, out, options, stop)
                label = f"{what}, killed and gone on" if position else what
                print(row(arguments.model, label, run, imports, blocks), flush=True)
            if not arguments.keep:
                for leftover in (out, out.with_name(f"{out.name}.partial")):
                    shutil.rmtree(leftover, ignore_errors=True)


if __name__ == "__main__":
    main()
