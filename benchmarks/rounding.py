"""What int8 activations and int8 heads cost: divergence from the exact model, perplexity, and equal choices.

    python benchmarks/rounding.py --text wikitext2:wikitext2-raw-test.txt --pruned DIR [--values int8 int4]

The packed model reads the same tokens four times: embedding and head as stored or in int8, activations exact (fp32) or
rounded to int8. It reads 8 tokens at a time with a cache, so that every product goes through the kernels for small
batches, as in decoding. KL is that of the next token's distribution from the one with the stored head and exact
activations, in nats a token; "same token" is the share of positions where the likeliest token is the same.
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path

import torch
from measure import cpu_name
from torch import Tensor
from transformers import PreTrainedModel

import sparsellm
from sparsellm.model.open import load_tokenizer
from sparsellm.text.windows import evaluation_windows
from sparsepack.module import kernel_name

PIECE = 8  # tokens; all kernels round the activations of so few


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """``(tokens, vocabulary)`` for a window of token ids, read a small batch at a time."""
    cache, scores = None, []
    for piece in ids.split(PIECE):
        output = model(
            input_ids=piece.unsqueeze(0), past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        scores.append(output.logits[0].float().log_softmax(-1))
    return torch.cat(scores)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", required=True)
    parser.add_argument(
        "--pruned", type=Path, required=True, metavar="DIR", help="a pruned checkpoint"
    )
    parser.add_argument("--values", nargs="+", default=["int8", "int4"])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument(
        "--out", type=Path, required=True, help="directory of packed checkpoints"
    )
    arguments = parser.parse_args()
    tokenizer = load_tokenizer(arguments.pruned)
    windows = evaluation_windows(
        arguments.text,
        tokenizer,
        arguments.window,
        arguments.windows * arguments.window,
    )
    print(
        f"{len(windows)} windows of {arguments.window}; {cpu_name()}, kernel {kernel_name()}\n"
    )
    print(
        "| values | head | activations | perplexity | KL | same token |\n|---|---|---|---|---|---|"
    )
    for values in arguments.values:
        exact: list[Tensor] = []
        for head in ("keep", "int8"):
            directory = arguments.out / f"{values}-{head}"
            sparsellm.pack(
                arguments.pruned,
                out=directory,
                values=values,
                head=head,
                overwrite=True,
            )
            for activations in ("fp32", "int8"):
                model = sparsellm.load(
                    directory, dtype="float32", activations=activations
                )
                loss, divergence, same, tokens = 0.0, 0.0, 0, 0
                for index, ids in enumerate(windows):
                    scores = log_probabilities(model, ids)
                    if head == "keep" and activations == "fp32":
                        exact.append(scores)
                    loss -= float(
                        scores[:-1].gather(1, ids[1:].unsqueeze(1)).double().sum()
                    )
                    divergence += float(
                        (exact[index].exp() * (exact[index] - scores)).double().sum()
                    )
                    same += int((scores.argmax(-1) == exact[index].argmax(-1)).sum())
                    tokens += len(ids)
                perplexity = math.exp(loss / (tokens - len(windows)))
                print(
                    f"| {values} | {head} | {activations} | {perplexity:.2f} | {divergence / tokens:.2e} "
                    f"| {same / tokens:.2%} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
