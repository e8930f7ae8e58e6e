"""Prunes a model with llmcompressor on given windows. ``peers.py`` runs this in llmcompressor's own environment.

It does not import sparsellm, so that llmcompressor alone is measured, with its defaults.
"""

from __future__ import annotations

import argparse
import json
from importlib.metadata import version

import torch
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.pruning import (
    REAPPruningModifier,
    SparseGPTModifier,
    WandaPruningModifier,
)
from safetensors.torch import load_file

MODIFIERS = {
    "sparsegpt": SparseGPTModifier,
    "wanda": WandaPruningModifier,
    "reap": REAPPruningModifier,
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--out", required=True)
    parser.add_argument("--method", choices=MODIFIERS, required=True)
    goal = parser.add_mutually_exclusive_group(required=True)
    goal.add_argument("--sparsity", type=float)
    goal.add_argument("--pattern", help="N:M: keep N of every M inputs, such as 2:4")
    parser.add_argument(
        "--windows",
        required=True,
        help="safetensors file with token ids, (samples, seq)",
    )
    parser.add_argument(
        "--report", help="file for the numbers of the experts that reap keeps"
    )
    parser.add_argument(
        "--batch-size", type=int, default=1, help="windows in one forward call"
    )
    arguments = parser.parse_args()
    ids = load_file(arguments.windows)["windows"]  # (samples, seq)
    structure = {"sparsity": arguments.sparsity}
    if arguments.pattern:
        kept, group = (int(part) for part in arguments.pattern.split(":"))
        # llmcompressor's N is the number of zeros.
        structure = {
            "sparsity": 1 - kept / group,
            "mask_structure": f"{group - kept}:{group}",
        }
    if arguments.report:
        structure["report_path"] = arguments.report
    rows = [
        {"input_ids": row.tolist(), "attention_mask": [1] * len(row)} for row in ids
    ]
    oneshot(
        model=arguments.model,
        dataset=Dataset.from_list(rows),
        recipe=MODIFIERS[arguments.method](**structure, ignore=["re:.*lm_head"]),
        max_seq_length=ids.shape[1],
        num_calibration_samples=len(ids),
        shuffle_calibration_samples=False,
        batch_size=arguments.batch_size,
        moe_calibrate_all_experts=arguments.method
        != "reap",  # which says that it needs no such calibration
        save_compressed=False,
        output_dir=arguments.out,
    )
    packages = ("llmcompressor", "compressed-tensors", "transformers", "torch")
    print(
        json.dumps(
            {
                **{name: version(name) for name in packages},
                "threads": torch.get_num_threads(),
            }
        )
    )


if __name__ == "__main__":
    main()
