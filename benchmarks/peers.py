"""Runs of llmcompressor for ``pareto.py``: time, memory and perplexity on the windows that sparsellm reads.

llmcompressor is installed in a separate environment, because its dependencies may conflict:

    python -m venv peers && peers/bin/pip install 'llmcompressor>=0.14'

A run is a separate process, measured from the start of Python to the finished checkpoint. Embedding and head stay
dense. llmcompressor reads token ids, so it does not spend time on tokenising. Perplexities are by ``sparsellm eval``.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from measure import measured
from quality import OUT, measure
from safetensors.torch import save_file

import sparsellm
from sparsellm.files.resolve import checkpoint_directory
from sparsellm.model.open import load_tokenizer
from sparsellm.text.windows import calibration_windows

WORKER = Path(__file__).with_name("peers_llmcompressor.py")


def run(arguments: argparse.Namespace, method: str, target: str) -> dict[str, Any]:
    """One run: its time and memory, the zeros of the result, and its perplexity."""
    out = OUT / "peers" / f"{method}-{target}"
    shutil.rmtree(out, ignore_errors=True)  # a stopped run left it
    command = [
        arguments.python, str(WORKER), str(checkpoint_directory(arguments.model)), f"--out={out}",
        f"--method={method}", f"--{'pattern' if ':' in target else 'sparsity'}={target}",
        f"--windows={write_windows(arguments)}", f"--batch-size={arguments.batch_size}",
    ]  # fmt: skip
    run = measured(command, out.with_name(f"{out.name}.log"))
    linears = sparsellm.inspect(out)
    result = {
        "seconds": run.seconds,
        "cpu_seconds": run.cpu_seconds,
        "peak_rss_bytes": run.peak_rss,
        "sparsity": sum(x.zeros for x in linears) / sum(x.weights for x in linears),
        **measure(arguments, str(out)),
        "versions": json.loads(run.stdout.strip().splitlines()[-1]),
    }
    shutil.rmtree(out)
    return result


def write_windows(arguments: argparse.Namespace) -> Path:
    """The file with the token ids of the calibration samples, ``windows``: (samples, seq)."""
    tokenizer = load_tokenizer(checkpoint_directory(arguments.model))
    ids = calibration_windows(
        arguments.calibration,
        tokenizer,
        arguments.samples,
        arguments.window,
        arguments.seed,
    )
    path = OUT / "peers" / "windows.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"windows": ids}, path)
    return path
