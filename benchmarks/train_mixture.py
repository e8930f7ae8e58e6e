"""Trains a small mixture of experts (Qwen2-MoE: 16 experts, top 2, one shared) from scratch, on text of three kinds.

They are that of ``train_opt.py``, the standard library's code without docstrings, and the articles of a file with a
paragraph in each line, such as ``wikipedia.py`` writes. DIR gets a checkpoint and its tokenizer for ``sparsellm
prune DIR``, ``train.txt`` for calibration, ``heldout.txt``, other documents, for evaluation, and both for each kind.
The seed determines weights, text and the order of batches; the number of steps depends on the machine and is printed.

    python benchmarks/train_mixture.py --articles wikipedia.txt --packages numpy --minutes 12 --bf16 --out out/mixture
    python benchmarks/experts.py --model out/mixture                # the tables of docs/experts.md
"""

from __future__ import annotations

import argparse
import ast
import random
import sysconfig
from pathlib import Path

from train_opt import OUT, SHORTEST, options, run
from transformers import PreTrainedTokenizerFast, Qwen2MoeConfig, Qwen2MoeForCausalLM

LONGEST = 8000  # characters of a document: each kind has many


def code(seed: int) -> list[str]:
    """The functions and classes of the standard library, without docstrings and comments."""
    texts = []
    folder = Path(sysconfig.get_path("stdlib"))
    for path in sorted(folder.rglob("*.py")):
        if not {"site-packages", "test", "tests", "lib2to3"}.isdisjoint(
            path.relative_to(folder).parts
        ):
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in tree.body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                for inner in ast.walk(node):
                    if (
                        isinstance(inner, ast.FunctionDef | ast.ClassDef)
                        and ast.get_docstring(inner) is not None
                    ):
                        inner.body = inner.body[1:] or [ast.Pass()]
                texts.append(ast.unparse(node)[:LONGEST])
    random.Random(seed).shuffle(texts)
    return [text for text in texts if len(text) >= SHORTEST]


def articles(file: Path, seed: int) -> list[str]:
    """The text of a file with a paragraph in each line, ten in a row as one document."""
    lines = file.read_text(encoding="utf-8").splitlines()
    texts = ["\n".join(lines[at : at + 10]) for at in range(0, len(lines), 10)]
    random.Random(seed).shuffle(texts)
    return texts


def build(
    arguments: argparse.Namespace, tokenizer: PreTrainedTokenizerFast
) -> Qwen2MoeForCausalLM:
    """The untrained model. The loss includes the term that spreads the tokens over the experts."""
    config = Qwen2MoeConfig(
        vocab_size=len(tokenizer), hidden_size=arguments.width, num_hidden_layers=arguments.layers,
        num_attention_heads=arguments.width // 32 or 1, num_key_value_heads=arguments.width // 64 or 1,
        max_position_embeddings=arguments.positions, num_experts=arguments.experts, num_experts_per_tok=2,
        moe_intermediate_size=arguments.expert_width, shared_expert_intermediate_size=arguments.expert_width,
        norm_topk_prob=True, output_router_logits=True, router_aux_loss_coef=0.001,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = Qwen2MoeForCausalLM(config)
    model.set_experts_implementation("grouped_mm")
    return model


def main() -> None:
    parser = options(
        __doc__,
        out=OUT / "mixture",
        layers=3,
        width=128,
        vocabulary=2048,
        batch=8,
        rate=3e-3,
    )
    parser.add_argument("--experts", type=int, default=16)
    parser.add_argument("--expert-width", type=int, default=128)
    parser.add_argument(
        "--articles",
        type=Path,
        required=True,
        help="a text file with a paragraph in each line",
    )
    arguments = parser.parse_args()
    run(
        arguments,
        build,
        {
            "code": code(arguments.seed),
            "articles": articles(arguments.articles, arguments.seed),
        },
    )


if __name__ == "__main__":
    main()
