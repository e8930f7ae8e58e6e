"""Bytes and tokens per second of a packed model, compared with the same model dense.

    python benchmarks/payoff.py [--layers 22] [--sparsities 0.5 0.7 0.9] [--threads 1] [--values keep int4]
    python benchmarks/payoff.py --text demo-pruned-dir          # is greedy text the same, dense and packed?

Every model is decoded by the compiled decoder, and by transformers' generate; each has its ratio to dense bf16.
The model has the shape of a 1.1B Llama (TinyLlama: 22 layers, 2048 wide, 5632 inside, 4 of 32 heads for keys and
values, vocabulary 32000) and random weights with random zeros: speed does not depend on their values. The models of one
sparsity run in turns, so that other load on the machine affects all; medians are printed, with the range in --verbose.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from measure import cpu_name
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

import sparsellm
from sparsellm.model.open import load_tokenizer
from sparsepack.bench import Rounds, measure, resident_bytes, weight_file_bytes
from sparsepack.module import kernel_name

PROMPT = "The Python programming language is"


def llama(layers: int, **changes: int) -> Any:
    """Random weights in bf16; drawn in bf16 at once, as fp32 would need 4.4 GB."""
    shape: dict[str, Any] = {
        "vocab_size": 32000,
        "hidden_size": 2048,
        "intermediate_size": 5632,
        "num_attention_heads": 32,
    }
    shape |= {
        "num_hidden_layers": layers,
        "num_key_value_heads": 4,
        "max_position_embeddings": 2048,
        **changes,
    }
    config = LlamaConfig(**shape, tie_word_embeddings=False, dtype="bfloat16")
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.fill_(1)
            else:
                parameter.normal_(0, 0.02, generator=generator)
    # its tables were lost with the meta device
    model.model.rotary_emb = type(model.model.rotary_emb)(config)
    return model.eval()


@torch.no_grad()
def prune_at_random(model: nn.Module, sparsity: float) -> None:
    """Zeros anywhere, more of them each time it is called with a higher sparsity."""
    generator = torch.Generator().manual_seed(1)
    for layer in model.model.layers:  # type: ignore[union-attr]
        for module in layer.modules():
            if isinstance(module, nn.Linear):
                module.weight.masked_fill_(
                    torch.rand(module.weight.shape, generator=generator) < sparsity, 0
                )


def speeds(arguments: argparse.Namespace) -> None:
    print(
        f"Llama of 1.1B's shape, {arguments.layers} layers; {conditions(arguments.threads)}."
    )
    clock = "processor" if arguments.cpu_seconds else "wall-clock"
    print(
        f"Prompt {arguments.prompt_tokens}, {arguments.new_tokens} tokens decoded, {arguments.repeats} rounds, "
        f"{clock} time.\n"
    )
    print(
        "| sparsity | model | MB on disk | MB in memory | linears / dense bf16 | prefill tokens/s | decode tokens/s "
        "| × bf16, same decoder | × bf16 by transformers | both by transformers |\n"
        + "|---" * 10
        + "|"
    )
    for sparsity in sorted(arguments.sparsities):
        with tempfile.TemporaryDirectory() as folder:
            for line in row_group(arguments, sparsity, Path(folder)):
                print(line, flush=True)


def row_group(
    arguments: argparse.Namespace, sparsity: float, folder: Path
) -> list[str]:
    source = llama(arguments.layers)
    prune_at_random(source, sparsity)
    source.save_pretrained(folder / "dense")
    del source
    sizes = {"bf16": weight_file_bytes(folder / "dense")}
    models: dict[str, PreTrainedModel] = {
        "bf16": sparsellm.load(folder / "dense", dtype="bfloat16")
    }
    for values in arguments.values:
        name = f"packed {values}"
        sparsellm.pack(
            folder / "dense", out=folder / values, values=values, head="keep"
        )
        sizes[name] = weight_file_bytes(folder / values)
        models[name] = sparsellm.load(folder / values)
    measured = measure(
        models,
        Rounds(
            threads=[arguments.threads],
            prompt_tokens=arguments.prompt_tokens,
            new_tokens=arguments.new_tokens,
            repeats=arguments.repeats,
        ),
        twice=models,
        clock=time.process_time if arguments.cpu_seconds else time.perf_counter,
    )
    rates = {(speed.model, speed.phase, speed.decoder): speed for speed in measured}
    fast: Any = (
        "compiled" if ("bf16", "decode", "compiled") in rates else "transformers"
    )
    dense = [rates["bf16", "decode", by].median for by in (fast, "transformers")]
    linear_bytes = resident_bytes(models["bf16"], linears_only=True)
    lines = []
    for name, model in models.items():
        share = resident_bytes(model, linears_only=True) / linear_bytes
        decode, eager = (rates[name, "decode", by] for by in (fast, "transformers"))
        ratios = (
            decode.median / dense[0],
            decode.median / dense[1],
            eager.median / dense[1],
        )
        spread = (
            f" ({decode.slowest:.2f} – {decode.fastest:.2f})"
            if arguments.verbose
            else ""
        )
        lines.append(
            f"| {sparsity:.0%} | {name} | {sizes[name] / 1e6:.0f} | {resident_bytes(model) / 1e6:.0f} | {share:.3f} "
            f"| {rates[name, 'prefill', fast].median:.1f} | {decode.median:.2f}{spread} "
            f"| {' | '.join(f'{ratio:.2f}' for ratio in ratios)} |"
        )
    return lines


def text(directory: Path, tokens: int) -> None:
    """Greedy text of a pruned checkpoint, dense with zeros and packed, in fp32."""
    tokenizer = load_tokenizer(directory)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    with tempfile.TemporaryDirectory() as folder:
        result = sparsellm.pack(directory, out=Path(folder) / "packed")
        written = []
        for path in (directory, result.path):
            model = sparsellm.load(path, dtype="float32")
            with torch.no_grad():
                output = model.generate(
                    ids, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens
                )  # type: ignore[operator]
                written.append(output[0, ids.shape[1] :])
                logits = model(ids).logits
            if path == directory:
                reference = logits
    same = int((written[0] == written[1]).long().cumprod(0).sum())
    print(
        f"{directory}: {same} of {tokens} greedy tokens are the same, dense and packed ({kernel_name()}, fp32)"
    )
    print(
        f"largest difference of a logit over the prompt: {float((logits - reference).abs().max()):.2e}"
    )
    print(
        f"linears: {result.packed_bytes / (2 * result.weights):.4f} of dense bf16 ({result.packed_bytes / 1e6:.1f} MB)"
    )


def conditions(threads: int) -> str:
    return f"{cpu_name()}, {threads} threads, torch {torch.__version__}, kernel {kernel_name()}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=22)
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.5, 0.7, 0.9])
    parser.add_argument(
        "--values", nargs="+", default=["keep"], help="value types to pack in"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--cpu-seconds",
        action="store_true",
        help="processor time: one thread on a shared machine",
    )
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--verbose", action="store_true", help="with the range of the rounds"
    )
    parser.add_argument(
        "--text",
        type=Path,
        metavar="DIR",
        help="compare greedy text of this pruned checkpoint instead",
    )
    parser.add_argument("--tokens", type=int, default=200, help="of the greedy text")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.text is not None:
        text(arguments.text, arguments.tokens)
    else:
        speeds(arguments)


if __name__ == "__main__":
    main()
