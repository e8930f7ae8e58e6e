"""Trains a small mixture of experts (Mixtral: 8 experts, top 2) from scratch, on the text of ``train_opt.py``.

Writes DIR with a checkpoint and its tokenizer for ``sparsellm prune DIR``, ``train.txt`` for calibration, and
``heldout.txt``, other documents, for evaluation. The seed determines weights, text and the order of batches. The number
of steps within the given minutes depends on the machine and is printed.

    python benchmarks/train_mixture.py --out out/mixture            # ten minutes
    python benchmarks/mixture.py --model out/mixture                # the tables of docs/results.md
"""

from __future__ import annotations

import argparse

from train_opt import OUT, options, run
from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast


def build(arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast) -> MixtralForCausalLM:
    """The untrained model. The loss includes the term that spreads the tokens over the experts."""
    config = MixtralConfig(
        vocab_size=len(tokenizer), hidden_size=arguments.width, intermediate_size=arguments.expert_width,
        num_hidden_layers=arguments.layers, num_attention_heads=arguments.width // 32 or 1,
        num_key_value_heads=arguments.width // 64 or 1, max_position_embeddings=arguments.positions,
        num_local_experts=arguments.experts, num_experts_per_tok=2, output_router_logits=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = MixtralForCausalLM(config)
    model.set_experts_implementation("eager")
    return model


def main() -> None:
    parser = options(__doc__, out=OUT / "mixture", layers=4, width=128, vocabulary=2048, batch=4, rate=2e-3)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--expert-width", type=int, default=256)
    run(parser.parse_args(), build)


if __name__ == "__main__":
    main()
