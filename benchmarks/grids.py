"""What the grids of other programs cost: divergence from the dense model on our own grid and on theirs.

    pip install 'sparsellm[bench]'
    python benchmarks/grids.py --texts wikitext2:wikitext2-raw-test.txt news.txt [--model demo]
    python benchmarks/grids.py ... --grids own q4_0 --sparsities 0 0.5
    python benchmarks/grids.py ... --grids w4a16 --sparsities 0 --peers gptq=peers/bin/python awq=peers/bin/python

Each cell is one run of `prune --grid` (for own: `--values int4`), measured on every text: KL(dense ‖ pruned) in nats a
token, and perplexity. At sparsity 0 the dense model rounded to nearest is a row too, and on ``w4a16`` what other tools
make of it with their defaults on the same windows: GPTQ of gptqmodel (``gptqmodel``), GPTQ and AWQ of llmcompressor
(``gptq``, ``awq``), each run in its own environment. The weights measured are those of the checkpoint, with which the
other program computes; it may round activations too. Models are scored by the same code in fp32. Without ``news.txt``,
the second text is the news of the Lee corpus in the gensim package, since it should be of another kind than the
calibration. Finished cells are kept in a file.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from forms import block_linears, open_dense
from measure import cpu_name, measured
from peers import write_windows
from quality import OUT, Cells, identity
from transformers import PreTrainedModel
from wikipedia import write_news, write_wikipedia

import sparsellm
from sparsellm.api import Opened
from sparsellm.files.resolve import checkpoint_directory
from sparsellm.model.open import load_tokenizer
from sparsepack.grid import on_grid
from sparsepack.grids import GRIDS

Row = dict[str, Any]
Dense = dict[str, Opened]  # by the text on which its outputs are kept


def scores(
    asked: argparse.Namespace,
    model: str | Path | PreTrainedModel,
    dense: Dense | None = None,
) -> Row:
    """For each text its perplexity, the tokens scored, and the divergence from the dense model if there is one."""
    rows: Row = {}
    for text in asked.texts:
        result = sparsellm.evaluate(
            model if isinstance(model, PreTrainedModel) else str(model), text,
            against=dense[text] if dense else None, seq_len=asked.window, max_tokens=asked.max_tokens or None,
            tokenizer=load_tokenizer(checkpoint_directory(asked.model)) if isinstance(model, PreTrainedModel) else None,
        )  # fmt: skip
        kl = result.against.kl if result.against is not None else 0.0
        rows[Path(text).name] = {
            "perplexity": result.value,
            "tokens": result.tokens,
            "kl": kl,
        }
    return rows


@torch.no_grad()
def nearest(asked: argparse.Namespace, grid: str, dense: Dense) -> Row:
    """The dense model with each weight at the nearest number, the largest of a group at the lowest."""
    model = open_dense(checkpoint_directory(asked.model))
    bits = weights = 0.0
    for linear in block_linears(model).values():
        weight = linear.get_parameter("weight")
        weight.copy_(
            on_grid(weight.float(), "int4" if grid == "own" else grid, torch.float32)
        )
        weights += weight.numel()
        bits += weight.numel() * (
            GRIDS[grid].bits_per_weight(weight.shape[1]) if grid in GRIDS else 4.5
        )
    return {"zeros": 0.0, "bits": bits / weights, "texts": scores(asked, model, dense)}


def pruned(asked: argparse.Namespace, grid: str, sparsity: float, dense: Dense) -> Row:
    """One run and its scores, with the bits a weight and the CPU seconds of pruning."""
    rounding = {"values": "int4"} if grid == "own" else {"grid": grid}
    recipe = sparsellm.Recipe(
        sparsity=sparsity, effort=asked.effort, calibration=asked.calibration, samples=asked.samples,
        seq_len=asked.window, **rounding,
    ).with_settings(asked.set)  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="grid-", dir=OUT) as folder:
        began = time.process_time()
        result = sparsellm.prune(asked.model, recipe, out=Path(folder) / "pruned")
        took = time.process_time() - began
        texts = scores(asked, Path(folder) / "pruned", dense)
    return {
        "zeros": result.sparsity_pruned,
        "bits": result.bits_per_weight,
        "seconds": took,
        "texts": texts,
    }


def peer(
    asked: argparse.Namespace, method: str, python: str, grid: str, dense: Dense
) -> Row:
    """Another tool's rounding of the dense model, with its CPU seconds."""
    group = GRIDS[grid].group
    worker = str(Path(__file__).with_name("peers_rounding.py"))
    with tempfile.TemporaryDirectory(prefix="peer-", dir=OUT) as folder:
        command = [
            python, worker, str(checkpoint_directory(asked.model)), f"--out={folder}/out", f"--method={method}",
            f"--group={group}", f"--windows={write_windows(asked)}",
        ]  # fmt: skip
        run = measured(command, OUT / f"{method}.log")
        texts = scores(asked, Path(folder) / "out", dense)
    bits = 4 + 16 / group  # as its file would have
    versions = json.loads(run.stdout.strip().splitlines()[-1])
    return {
        "zeros": 0.0,
        "bits": bits,
        "seconds": run.cpu_seconds,
        "texts": texts,
        "versions": versions,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--texts",
        nargs="+",
        required=True,
        help="test texts; nothing is chosen by them",
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument(
        "--calibration", help="a text source; by default a sample of Wikipedia"
    )
    parser.add_argument("--grids", nargs="+", default=["own", "q4_0", "w4a16-64"])
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.0, 0.3, 0.5])
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=8192,
        help="of each test text; 0 for all of it",
    )
    parser.add_argument("--effort", type=int, default=1)
    parser.add_argument(
        "--set", nargs="*", default=[], help="settings for every run, key=value"
    )
    parser.add_argument(
        "--peers", nargs="*", default=[], help="METHOD=PYTHON of the tool's environment"
    )
    parser.add_argument("--cells", type=Path, default=OUT / "grids.json")
    # chooses the windows: other tools get those of our runs
    parser.set_defaults(seed=sparsellm.Recipe().seed)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    asked.calibration = asked.calibration or str(write_wikipedia(OUT / "wikipedia.txt"))
    if len(asked.texts) == 1:
        asked.texts.append(str(write_news(OUT / "news.txt")))
    cells = Cells(asked.cells)
    conditions = "/".join(
        map(
            str,
            (
                identity(asked.model),
                *asked.texts,
                asked.calibration,
                asked.samples,
                asked.window,
                asked.max_tokens,
            ),
        )
    )
    dense = cells.get(f"{conditions}/dense", partial(scores, asked, asked.model))
    directory, settings = (
        str(checkpoint_directory(asked.model)),
        sparsellm.Recipe(products="float32"),
    )
    opened = {text: Opened(directory, settings, trust=False) for text in asked.texts}
    read = "; ".join(
        f"{name} {row['tokens']} tokens, dense {row['perplexity']:.2f}"
        for name, row in dense.items()
    )
    print(
        f"Model {asked.model}; windows of {asked.window}: {read}; calibration {asked.samples} × {asked.window} tokens "
        f"of {Path(asked.calibration).name}; effort {asked.effort}; {' '.join(asked.set)}\n"
        f"{cpu_name()}, 1 thread, torch {torch.__version__}, code {cells.code}\n"
    )
    print(
        "| grid | sparsity | zeros | bits a weight |"
        + "".join(f" {name}: KL | perplexity |" for name in dense)
    )
    print("|---|---|---|---|" + "---|---|" * len(dense))
    for sparsity, grid in itertools.product(asked.sparsities, asked.grids):
        key = f"{conditions}/{asked.effort}/{' '.join(asked.set)}/{grid}/{sparsity}"
        rows = {grid: cells.get(key, partial(pruned, asked, grid, sparsity, opened))}
        if sparsity == 0:
            rows[f"{grid}, to nearest"] = cells.get(
                f"{conditions}/{grid}/nearest", partial(nearest, asked, grid, opened)
            )
        for method, python in (
            pair.split("=")
            for pair in asked.peers
            if sparsity == 0 and grid.startswith("w4a16")
        ):
            rows[f"{grid}, {method}"] = cells.get(
                f"{conditions}/{grid}/{method}",
                partial(peer, asked, method, python, grid, opened),
            )
        for name, row in rows.items():
            shown = "".join(
                f" {text['kl']:.3g} | {text['perplexity']:.2f} |"
                for text in row["texts"].values()
            )
            print(
                f"| {name} | {sparsity:.0%} | {row['zeros']:.1%} | {row['bits']:.2f} |{shown}",
                flush=True,
            )


if __name__ == "__main__":
    main()
