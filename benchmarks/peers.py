"""Compares sparsellm with llmcompressor: time, memory and perplexity of the same method on the same windows.

llmcompressor is installed in a separate environment, because its dependencies may conflict:

    python -m venv peers && peers/bin/pip install 'llmcompressor>=0.14'
    python benchmarks/peers.py --python peers/bin/python --text wikitext2-raw-test.txt

Every run is a separate process, measured from the start of Python to the finished checkpoint; the two run in turns.
Both prune the linears of all blocks and leave embedding and head dense. llmcompressor reads the token ids; sparsellm
tokenises the text within its measured time. Both perplexities are by ``sparsellm eval``. Finished cells are kept in a
file, so that a stopped script continues when it is run again.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
from pathlib import Path
from typing import Any

import torch
from measure import cpu_name, measured
from quality import OUT, Cells, add_conditions, measure
from safetensors.torch import save_file
from wikipedia import write_wikipedia

import sparsellm
from sparsellm.calibration import calibration_windows
from sparsellm.chain.open import load_tokenizer
from sparsellm.sources.resolve import checkpoint_directory

WORKER = Path(__file__).with_name("peers_llmcompressor.py")
TOOLS = ("sparsellm", "llmcompressor")


def run(
    arguments: argparse.Namespace, tool: str, method: str, target: str, windows: Path, score: bool
) -> dict[str, Any]:
    """One run of one tool; the zeros of what it made and, where that is asked for, the perplexity."""
    out = OUT / "peers" / f"{tool}-{method}-{target}"
    for leftover in (out, out.with_name(f"{out.name}.partial")):  # of a run that was stopped
        shutil.rmtree(leftover, ignore_errors=True)
    common = [f"--out={out}", f"--method={method}", f"--{'pattern' if ':' in target else 'sparsity'}={target}"]
    if tool == "sparsellm":
        command = [
            sys.executable, "-m", "sparsellm", "prune", arguments.model, *common, "--json",
            f"--calibration={arguments.calibration}", f"--samples={arguments.samples}",
            f"--seq-len={arguments.window}", f"--seed={arguments.seed}",
        ]  # fmt: skip
    else:
        command = [arguments.python, str(WORKER), str(checkpoint_directory(arguments.model)), *common]
        command += [f"--windows={windows}", f"--batch-size={arguments.batch_size}"]
    found = measured(command, out.with_name(f"{out.name}.log"))
    report = json.loads(found.stdout.strip().splitlines()[-1])
    linears = sparsellm.inspect(out)
    result = {
        "seconds": found.seconds,
        "cpu_seconds": found.cpu_seconds,
        "peak_rss_bytes": found.peak_rss,
        "sparsity": sum(x.zeros for x in linears) / sum(x.weights for x in linears),
        "perplexity": measure(arguments, str(out))["perplexity"] if score else None,
        "versions": report["versions"] if tool == "sparsellm" else report,
    }
    shutil.rmtree(out)
    return result


def write_windows(arguments: argparse.Namespace) -> Path:
    """The file with the token ids of the calibration samples, ``windows``: (samples, seq)."""
    tokenizer = load_tokenizer(checkpoint_directory(arguments.model))
    ids = calibration_windows(arguments.calibration, tokenizer, arguments.samples, arguments.window, arguments.seed)
    path = OUT / "peers" / "windows.safetensors"
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({"windows": ids}, path)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", required=True, help="interpreter of the environment that has llmcompressor")
    add_conditions(parser)
    parser.add_argument("--methods", nargs="*", default=["sparsegpt", "wanda"], choices=["sparsegpt", "wanda"])
    parser.add_argument("--targets", nargs="*", default=["0.7", "0.5"], help="sparsities, or patterns such as 2:4")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; the median time counts")
    parser.add_argument("--batch-size", type=int, default=1, help="windows in a forward call of llmcompressor")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", type=Path, default=OUT / "peers.json")
    arguments = parser.parse_args()
    arguments.calibration = arguments.calibration or str(write_wikipedia(OUT / "wikipedia.txt"))

    windows = write_windows(arguments)
    cells = Cells(arguments.cells)
    conditions = (
        f"{arguments.model}/{Path(arguments.calibration).name}/{arguments.samples}x{arguments.window}/{arguments.seed}/"
        f"{Path(arguments.text).name}/{arguments.max_tokens}/batch {arguments.batch_size}"
    )
    dense = cells.get(f"{conditions}/dense", lambda: measure(arguments, arguments.model))
    found: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for repeat in range(arguments.repeats):
        for target in arguments.targets:
            for method in arguments.methods:
                for tool in TOOLS:  # in turns, so that what else the machine does falls on both
                    key = f"{conditions}/{tool}/{method}/{target}/{repeat}"
                    score = repeat == 0  # the later ones are for the time
                    cell = cells.get(
                        key, lambda t=tool, m=method, s=target, p=score: run(arguments, t, m, s, windows, p)
                    )
                    found.setdefault((target, method, tool), []).append(cell)

    peer = next(iter(found[arguments.targets[0], arguments.methods[0], "llmcompressor"]))["versions"]
    print(
        f"Model {arguments.model}, dense perplexity {dense['perplexity']:.2f}; {Path(arguments.text).name}, windows of "
        f"{arguments.window}, {dense['tokens_scored']} tokens scored; calibration {arguments.samples} × "
        f"{arguments.window} tokens of {Path(arguments.calibration).name}, seed {arguments.seed}; "
        f"median of {arguments.repeats} (least to most); sparsellm {sparsellm.__version__}, torch {torch.__version__}, "
        f"llmcompressor {peer['llmcompressor']} (torch {peer['torch']}, batches of {arguments.batch_size}); "
        f"{peer['threads']} threads, {cpu_name()}.\n"
    )
    print(
        "| target | method | tool | zeros | perplexity | seconds | CPU seconds | peak memory (GB) | time / ours "
        "| CPU time / ours | memory / ours |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for (target, method, tool), rows in found.items():
        ours = found[target, method, "sparsellm"]
        seconds = [row["seconds"] for row in rows]
        peak = max(row["peak_rss_bytes"] for row in rows)
        computed = [row["cpu_seconds"] for row in rows]
        time_ratio = statistics.median(seconds) / statistics.median(row["seconds"] for row in ours)
        cpu_ratio = statistics.median(computed) / statistics.median(row["cpu_seconds"] for row in ours)
        memory_ratio = peak / max(row["peak_rss_bytes"] for row in ours)
        print(
            f"| {target} | {method} | {tool} | {rows[0]['sparsity']:.2%} | {rows[0]['perplexity']:.1f} "
            f"| {statistics.median(seconds):.0f} ({min(seconds):.0f} to {max(seconds):.0f}) "
            f"| {statistics.median(computed):.0f} | {peak / 1e9:.2f} "
            f"| {time_ratio:.2f} | {cpu_ratio:.2f} | {memory_ratio:.2f} |"
        )


if __name__ == "__main__":
    main()
