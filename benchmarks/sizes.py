"""What a size buys: divergence from the dense model at equal bits, with types and zeros by linear and alike.

    pip install 'sparsellm[bench]'
    python benchmarks/sizes.py --texts wikitext2:wikitext2-raw-test.txt news.txt --bits 4.19 3.35
    python benchmarks/sizes.py ... --programs llama.cpp --bits 5 6
    python benchmarks/sizes.py ... --bits --alike int4:0.3 int3:0.3 q4_0:0

    python benchmarks/sizes.py ... --bits --theirs Q4_K_M IQ4_XS Q3_K_M     # pip install llama-cpp-py-sync

Each row is one run: `bits` of a recipe for each program, and for `--alike` one type or grid with zeros by `threshold`.
`--theirs` are
llama.cpp's own mixtures of types, with importance from the same windows; embedding and head stay dense in every row.
It is measured on every text: KL(dense ‖ compressed) in nats a token, and perplexity. Rows are appended to ``--csv``,
with what was compared before the run and what that took; a row that is there already is not run again.
"""

from __future__ import annotations

import argparse
import csv
import json
import re
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from forms import (
    Numbers,
    block_linears,
    gguf_numbers,
    importance_matrix,
    open_dense,
    quantised_gguf,
    with_numbers,
    write_gguf,
)
from measure import code_version, cpu_name
from quality import OUT
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from wikipedia import write_news, write_wikipedia

import sparsellm
from sparsellm.api import Opened
from sparsellm.files.resolve import checkpoint_directory
from sparsellm.model.open import load_tokenizer
from sparsellm.records import read_pruning
from sparsellm.text.windows import calibration_windows
from sparsepack.grids import GRIDS

FIELDS = [
    *("code", "model", "row", "seed", "effort", "bits", "zeros", "seconds"),
    *("text", "kl", "perplexity", "choice"),
]


def settings_of(row: str) -> dict[str, Any]:
    """The fields of the recipe of a row: ``PROGRAM BITS``, or ``TYPE:SPARSITY``."""
    if ":" not in row:
        program, bits = row.split()
        return {"program": program, "bits": float(bits)}
    values, sparsity = row.split(":")
    rounding = {"grid": values} if values in GRIDS else {"values": values}
    return {**rounding, "sparsity": float(sparsity)}


def run(asked: argparse.Namespace, row: str, seed: int) -> list[dict[str, Any]]:
    """The measurements of one run, one for each text."""
    recipe = sparsellm.Recipe(
        effort=asked.effort,
        calibration=asked.calibration,
        samples=asked.samples,
        seq_len=asked.window,
        seed=seed,
        options={"solver": asked.solver},
        **settings_of(row),
    )
    # an interrupted run is resumed when the script starts again
    name = re.sub(r"\W", "-", f"{Path(asked.model).name} {row} {seed} {asked.effort}")
    out = OUT / f"size-{name}"
    if not out.exists():
        sparsellm.prune(asked.model, recipe, out=out)
    record = read_pruning(out)
    rows = measured(
        asked,
        out,
        {
            "row": row,
            "seed": seed,
            "bits": round(record.bits_per_weight or 0, 4),
            "zeros": round(record.sparsity_pruned, 4),
            "seconds": round(sum(record.whole_seconds.values())),
            "choice": json.dumps(record.allocation),
        },
    )
    shutil.rmtree(out)
    return rows


def run_theirs(asked: argparse.Namespace, row: str, seed: int) -> list[dict[str, Any]]:
    """The measurements of one of llama.cpp's mixtures, one for each text. Bits are those of the linears."""
    directory = checkpoint_directory(asked.model)
    tokenizer = load_tokenizer(directory)
    windows = calibration_windows(
        asked.calibration, tokenizer, asked.samples, asked.window, seed=seed
    )
    linears = block_linears(open_dense(directory))
    importance_of = importance_matrix(directory, windows)
    with tempfile.TemporaryDirectory(prefix="size-", dir=OUT) as folder:
        source = Path(folder) / "dense.gguf"
        parameters = write_gguf(open_dense(directory), source)
        importance = {
            called: importance_of[name]
            for called, name in parameters.items()
            if name in importance_of
        }
        began = time.process_time()
        made = quantised_gguf(
            source, row, Path(folder) / "made.gguf", importance=importance
        )
        seconds = time.process_time() - began
        numbers = gguf_numbers(made, parameters)
    inside = {
        name: weight for name, weight in numbers.weights.items() if name in linears
    }
    stored = sum(numbers.bytes[name] for name in inside)
    weights = sum(weight.numel() for weight in inside.values())
    model = with_numbers(directory, Numbers(inside, {}))
    return measured(
        asked,
        model,
        {
            "row": row,
            "seed": seed,
            "bits": round(8 * stored / weights, 4),
            "zeros": 0.0,
            "seconds": round(seconds),
            "choice": "",
        },
        tokenizer,
    )


def measured(
    asked: argparse.Namespace,
    model: Path | PreTrainedModel,
    columns: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> list[dict[str, Any]]:
    """The columns of a model, with its divergence and perplexity on each text."""
    # the outputs of the dense model are kept for each text
    settings = sparsellm.Recipe(products="float32")
    directory = str(checkpoint_directory(asked.model))
    rows = []
    for text in asked.texts:
        evaluation = sparsellm.evaluate(
            model,
            text,
            against=Opened(directory, settings, trust=False),
            seq_len=asked.window,
            max_tokens=asked.max_tokens,
            tokenizer=tokenizer,
        )
        assert evaluation.against is not None
        rows.append(
            {
                "code": code_version(),
                "model": asked.model,
                "effort": asked.effort,
                **columns,
                "text": Path(text).name,
                "kl": round(evaluation.against.kl, 6),
                "perplexity": round(evaluation.value, 3),
            }
        )
    return rows


def known(path: Path) -> list[dict[str, str]]:
    """The rows of the file."""
    if not path.is_file():
        return []
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--texts", nargs="+", default=[], help="test texts")
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", help="by default a sample of Wikipedia")
    parser.add_argument("--programs", nargs="+", default=["sparsellm"])
    parser.add_argument("--bits", nargs="*", type=float, default=[4.19, 3.35])
    parser.add_argument("--alike", nargs="*", default=[], help="TYPE:SPARSITY")
    parser.add_argument("--theirs", nargs="*", default=[], help="llama.cpp's mixtures")
    parser.add_argument("--seeds", nargs="+", type=int, default=[3])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--effort", type=int, default=0)
    parser.add_argument("--solver", default="sparsegpt")
    parser.add_argument("--csv", type=Path, default=OUT / "sizes.csv")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    asked.calibration = asked.calibration or str(write_wikipedia(OUT / "wikipedia.txt"))
    asked.texts = asked.texts or [str(write_news(OUT / "news.txt"))]
    rows = [f"{program} {bits:g}" for program in asked.programs for bits in asked.bits]
    print(f"{cpu_name()}, 1 thread, torch {torch.__version__}, code {code_version()}")
    for seed in asked.seeds:
        for row in [*rows, *asked.alike, *asked.theirs]:
            key = (code_version(), asked.model, row, str(seed), str(asked.effort))
            there = [
                known_row
                for known_row in known(asked.csv)
                if tuple(known_row[name] for name in FIELDS[:5]) == key
            ]
            if not there:
                make = run_theirs if row in asked.theirs else run
                there = make(asked, row, seed)
                new = not asked.csv.is_file()
                with asked.csv.open("a", newline="") as file:
                    writer = csv.DictWriter(file, FIELDS)
                    if new:
                        writer.writeheader()
                    writer.writerows(there)
            for measured in there:
                shown = (f"{name} {measured[name]}" for name in FIELDS[2:-1])
                print("; ".join(shown), flush=True)


if __name__ == "__main__":
    main()
