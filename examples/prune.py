"""Prunes a model, measures it before and after, and prints both.

python examples/prune.py                         the demo model, into ./pruned
python examples/prune.py path/to/model my-out    a model of yours
"""

import sys

import sparsellm

SETTINGS = {"sparsity": 0.5, "method": "sparsellm", "samples": 16, "seq_len": 512}


def main(model: str = "demo", out: str = "pruned", *settings: str) -> None:
    recipe = sparsellm.Recipe(**SETTINGS).with_settings(list(settings))
    result = sparsellm.prune(model, recipe, out=out)
    for warning in result.warnings:
        print("note:", warning)
    print(
        f"{result.zeros:,} of {result.weights:,} weights are zero, {result.sparsity_pruned:.1%}"
    )
    window = result.recipe.seq_len or 512
    for name, path in (("dense", model), ("pruned", out)):
        evaluation = sparsellm.evaluate(
            path, "pydoc", seq_len=window, max_tokens=8 * window
        )
        print(
            f"{name}: perplexity {evaluation.value:.2f} over {evaluation.tokens} tokens"
        )
    print(f"load it with AutoModelForCausalLM.from_pretrained({str(result.path)!r})")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:])
    except sparsellm.SparseLLMError as error:
        sys.exit(f"error: {error}")
