"""A GGUF file made smaller by llama.cpp and by sparsellm, at the same bytes of the whole file.

    pip install llama-cpp-py-sync
    python benchmarks/real_model.py model.gguf --theirs Q8_0 Q4_K_M Q2_K --ours Q4_K_M Q2_K --texts prose.txt code.txt \
        --out folder
    python benchmarks/real_model.py model.gguf --bf16 ...     # both start from a copy in bf16, which it makes

Each of llama.cpp's mixtures is made with importance from the same windows that `compress` calibrates on. `compress` is
asked for the bytes of that file. A file in few bits favours whoever keeps its types: `--bf16` gives both the same
numbers in bf16. Every file is read again and measured on each text, next to the model that both were made from. Files
stay in ``--out``; rows are appended to ``real-model.csv`` there. One that is there is not made again.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import time
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import torch
from forms import importance_matrix, quantised_gguf
from measure import code_version, cpu_name
from torch import Tensor

import sparsellm
from sparsellm.files.resolve import checkpoint_directory
from sparsellm.model.open import load_tokenizer
from sparsellm.programs import ProgramName, bytes_of
from sparsellm.text.windows import calibration_windows

FIELDS = [
    "code",
    "model",
    "size of",
    "seed",
    "made by",
    "bytes",
    "wall seconds",
    "CPU seconds",
    "peak MB",
    "text",
    "tokens",
    "kl",
    "kl low",
    "kl high",
    "agreement",
    "perplexity",
    "dense perplexity",
]


@cache
def importance_by_name(
    model: Path, calibration: str, samples: int, window: int, seed: int
) -> dict[str, Tensor]:
    """The mean squares of the inputs of each linear, by the name of its tensor in the file. All mixtures share them, so
    the time of the first one has theirs."""
    directory = checkpoint_directory(str(model))
    windows = calibration_windows(
        calibration, load_tokenizer(directory), samples, window, seed=seed
    )
    importance = importance_matrix(directory, windows)
    blocks = 1 + max(
        int(name.split(".layers.")[1].split(".")[0]) for name in importance
    )
    model_type = json.loads((directory / "config.json").read_text("utf-8"))[
        "model_type"
    ]
    architecture = next(
        number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == model_type
    )
    names = gguf.get_tensor_name_map(architecture, blocks)
    called = {}
    for name, values in importance.items():
        tensor = names.get_name(name, try_suffixes=(".weight",))
        if tensor is None:
            raise ValueError(f"llama.cpp has no name for {name}")
        called[tensor] = values
    return called


def by_llama_cpp(asked: argparse.Namespace, kind: str) -> dict[str, Any]:
    """Makes llama.cpp's file, unless it is there, and returns its columns."""
    out = asked.out / f"{asked.model.stem}-{kind}-{asked.seed}.gguf"
    columns: dict[str, Any] = {
        "made by": "llama.cpp",
        "file": out,
        "wall seconds": "",
        "CPU seconds": "",
        "peak MB": "",
    }
    if not out.is_file():
        began = time.perf_counter()
        before = time.process_time()
        importance = importance_by_name(
            asked.model, asked.calibration, asked.samples, asked.window, asked.seed
        )
        quantised_gguf(asked.model, kind, out, importance=importance)
        columns["wall seconds"] = round(time.perf_counter() - began)
        columns["CPU seconds"] = round(time.process_time() - before)
    columns["bytes"] = out.stat().st_size
    return columns


def by_sparsellm(
    asked: argparse.Namespace, program: ProgramName, kind: str, size: int
) -> dict[str, Any]:
    """Compresses for a program to a size, unless the result is there, and returns its columns."""
    name = f"{asked.model.stem}-as-{kind}-{asked.seed}"
    out = asked.out / name
    made_by = f"sparsellm for {program}"
    if asked.effort:
        name += f"-effort-{asked.effort}"
        made_by += f", effort {asked.effort}"
    if program == "llama.cpp":
        out = asked.out / f"{name}.gguf"
    columns: dict[str, Any] = {
        "made by": made_by,
        "file": out,
        "wall seconds": "",
        "CPU seconds": "",
        "peak MB": "",
    }
    if not out.exists():
        recipe = sparsellm.Recipe(
            effort=asked.effort,
            calibration=asked.calibration,
            samples=asked.samples,
            seq_len=asked.window,
            seed=asked.seed,
            memory=asked.memory,
        )
        before = time.process_time()
        made = sparsellm.compress(
            str(asked.model), recipe, program=program, out=out, size=size
        )
        columns["CPU seconds"] = round(time.process_time() - before)
        columns["wall seconds"] = round(sum(made.run.whole_seconds.values()))
        columns["peak MB"] = round(made.run.peak_rss_bytes / 1e6)
    columns["bytes"] = bytes_of(out)
    return columns


def measured(asked: argparse.Namespace, file: Path, text: str) -> dict[str, Any]:
    """The columns of one file on one text."""
    evaluation = sparsellm.evaluate(
        str(file),
        text,
        against=str(asked.model),
        seq_len=asked.window,
        max_tokens=asked.max_tokens,
    )
    against = evaluation.against
    assert against is not None
    return {
        "text": Path(text).name,
        "tokens": asked.max_tokens,
        "kl": round(against.kl, 6),
        "kl low": against.kl_low and round(against.kl_low, 6),
        "kl high": against.kl_high and round(against.kl_high, 6),
        "agreement": round(against.agreement, 4),
        "perplexity": round(evaluation.value, 4),
        "dense perplexity": round(against.perplexity.value, 4),
    }


def rows_there(table: Path, row: dict[str, Any]) -> bool:
    """Whether a table has the row of this model, size, maker, seed and text."""
    same = ("model", "size of", "seed", "made by", "text")
    with table.open(newline="") as file:
        return any(
            all(other[name] == str(row[name]) for name in same)
            for other in csv.DictReader(file)
        )


def add_rows(asked: argparse.Namespace, table: Path, made: dict[str, Any]) -> None:
    """Measures a file on the texts that it was not yet measured on."""
    for text in asked.texts:
        row: dict[str, Any] = {
            "code": code_version(),
            "model": asked.name or asked.model.name,
            "seed": asked.seed,
            "text": Path(text).name,
            **{name: made[name] for name in FIELDS if name in made},
        }
        if rows_there(table, row):
            continue
        row |= measured(asked, made["file"], text)
        with table.open("a", newline="") as file:
            csv.DictWriter(file, FIELDS).writerow(row)
        print(row, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path, help="a .gguf file")
    parser.add_argument("--name", help="of the model, in the table")
    parser.add_argument("--bf16", action="store_true", help="start from a copy in bf16")
    parser.add_argument("--theirs", nargs="+", default=["Q3_K_M", "Q2_K"])
    parser.add_argument("--ours", nargs="*", help="of --theirs; all by default")
    parser.add_argument("--programs", nargs="+", default=["llama.cpp"])
    parser.add_argument("--texts", nargs="+", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--calibration", default="pydoc:0.5,pycode:0.5")
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--effort", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory", default="5GiB")
    asked = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    asked.out.mkdir(parents=True, exist_ok=True)
    print(f"{cpu_name()}, torch {torch.__version__}, code {code_version()}")
    table = asked.out / "real-model.csv"
    if not table.is_file():
        with table.open("w", newline="") as file:
            csv.DictWriter(file, FIELDS).writeheader()
    if asked.bf16:
        copy = asked.out / f"{asked.model.stem}-bf16.gguf"
        asked.model = quantised_gguf(asked.model, "BF16", copy)
    for kind in asked.theirs:
        theirs = by_llama_cpp(asked, kind)
        theirs["size of"] = kind
        add_rows(asked, table, theirs)
        if asked.ours is not None and kind not in asked.ours:
            continue
        for program in asked.programs:
            ours = by_sparsellm(asked, program, kind, theirs["bytes"])
            ours["size of"] = kind
            add_rows(asked, table, ours)


if __name__ == "__main__":
    main()
