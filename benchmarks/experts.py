"""Mixtures with fewer experts: divergence, perplexity and a task on each kind of text, by score and repair.

    python benchmarks/train_mixture.py --articles wikipedia.txt --packages numpy --minutes 12 --bf16 --out out/mixture
    python benchmarks/experts.py --model out/mixture --shares 0.25 0.5 --seeds 0 1 2
    python benchmarks/experts.py --model out/mixture --shares 0.5 --calibration docs --ways reap "coordinated, refit"
    python benchmarks/experts.py --model out/mixture --bytes
    python benchmarks/experts.py --model out/mixture --peer peers/bin/python

Calibration is on ``train.txt`` of all kinds, or on that of one kind; tests are the held-out documents of each kind. The
task is a cloze: the next word of a document among four words of that kind. ``--bytes`` compares experts, zeros and
bits; ``--peer`` runs REAP of llmcompressor, in its own environment as in ``peers.py``, on the same windows.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import statistics
import sys
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from measure import code_version, cpu_name, measured
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

import sparsellm
from sparsellm import Recipe
from sparsellm.api import Opened
from sparsellm.files.reader import open_checkpoint
from sparsellm.method.experts.scores import SCORES, MixtureView
from sparsellm.model.open import load_tokenizer
from sparsellm.text.windows import calibration_windows

WAYS: dict[str, dict[str, Any]] = {
    "random": {"expert_score": "random", "expert_refit": False, "effort": 0},
    "frequency": {"expert_score": "frequency", "expert_refit": False, "effort": 0},
    "reap": {"expert_score": "reap", "expert_refit": False, "effort": 0},
    "coordinated": {"expert_score": "coordinated", "expert_refit": False, "effort": 0},
    "reap, refit": {"expert_score": "reap", "effort": 0},
    "coordinated, refit": {"expert_score": "coordinated", "effort": 0},
    "coordinated, refit, one sweep": {"expert_score": "coordinated", "effort": 1},
    "coordinated, refit, three sweeps": {"expert_score": "coordinated", "effort": 2},
}
# Compositions, each with one sweep, and the bits of a weight of the pruned linears; None: those of the grid.
MIXED: dict[str, tuple[dict[str, Any], float | None]] = {
    "experts 50 %, bf16": ({"experts": 0.5, "sparsity": 0.0}, 16.0),
    "experts 25 %, 50 % zeros, bf16": (
        {"experts": 0.25, "sparsity": 0.5},
        9.0,
    ),  # 16 / 2, and a bit for each
    "50 % zeros, bf16": ({"sparsity": 0.5}, 9.0),
    "int4": ({"grid": "w4a16-32"}, None),
    "experts 25 %, int4": ({"experts": 0.25, "grid": "w4a16-32"}, None),
    "experts 50 %, int4": ({"experts": 0.5, "grid": "w4a16-32"}, None),
}
READ = 1_000_000  # characters of the calibration text
# characters before the word of a cloze, and words to choose from
CONTEXT, CHOICES = (
    400,
    4,
)


@SCORES.register("random", paper="–")
def chance(view: MixtureView) -> torch.Tensor:
    """Random numbers, as a control."""
    seed = view.seed * 1_000_003 + view.block
    return torch.rand(len(view.tokens), generator=torch.Generator().manual_seed(seed))


@dataclass(frozen=True)
class Point:
    """A model on each kind of text: divergence from the dense model, perplexity, and the share of right words."""

    kl: dict[str, float]
    perplexity: dict[str, float]
    task: dict[str, float]

    @property
    def mean(self) -> float:
        return statistics.fmean(self.kl.values())


def kinds_of(model: Path) -> list[str]:
    return sorted(
        path.stem.removeprefix("heldout-") for path in model.glob("heldout-*.txt")
    )


def cloze(text: str, count: int, seed: int) -> list[tuple[str, list[str]]]:
    """Texts, and the word that follows before others that follow elsewhere."""
    draw, places = (
        random.Random(seed),
        [m for m in re.finditer(r" [A-Za-z]{3,}\b", text) if m.start() >= CONTEXT],
    )
    chosen, words = draw.sample(places, count), sorted({match[0] for match in places})
    return [
        (
            text[m.start() - CONTEXT : m.start()],
            [m[0], *draw.sample([w for w in words if w != m[0]], CHOICES - 1)],
        )
        for m in chosen
    ]


@torch.no_grad()
def right_words(
    model: PreTrainedModel, tokenizer: Any, docs: Iterable[tuple[str, list[str]]]
) -> float:
    """The share of texts whose likeliest word, by the probability of its tokens, is the one that follows."""
    right = []
    for context, words in docs:
        before = tokenizer(context)["input_ids"]
        after = [tokenizer(word)["input_ids"] for word in words]
        longest = max(map(len, after))
        ids = torch.tensor(
            [[*before, *tokens, *[0] * (longest - len(tokens))] for tokens in after]
        )
        scores = model(ids, use_cache=False).logits.log_softmax(-1)
        sums = [
            sum(
                float(scores[row, len(before) + at - 1, token])
                for at, token in enumerate(tokens)
            )
            for row, tokens in enumerate(after)
        ]
        right.append(max(range(len(words)), key=sums.__getitem__) == 0)
    return statistics.fmean(right)


class Tests:
    """The dense model, opened once, and the tests on each kind of text."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.model, self.window, self.tokens = (
            arguments.model,
            arguments.window,
            arguments.tokens,
        )
        settings = Recipe(products="float32")
        self.dense = {
            kind: Opened(str(self.model), settings, trust=False)
            for kind in kinds_of(self.model)
        }
        texts = {
            kind: (self.model / f"heldout-{kind}.txt").read_text(encoding="utf-8")
            for kind in self.dense
        }
        self.docs = {
            kind: cloze(text, arguments.words, 0) for kind, text in texts.items()
        }
        self.tokenizer = load_tokenizer(self.model)

    def on(self, directory: Path) -> Point:
        results = {
            kind: sparsellm.evaluate(
                directory, str(self.model / f"heldout-{kind}.txt"), seq_len=self.window, max_tokens=self.tokens,
                against=opened,
            )
            for kind, opened in self.dense.items()
        }  # fmt: skip
        model = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32
        ).eval()
        return Point(
            {
                kind: result.against.kl
                for kind, result in results.items()
                if result.against is not None
            },
            {kind: result.perplexity.value for kind, result in results.items()},
            {
                kind: right_words(model, self.tokenizer, docs)
                for kind, docs in self.docs.items()
            },
        )


def recipe_of(arguments: argparse.Namespace, seed: int, **fields: Any) -> Recipe:
    sizes = {"samples": arguments.samples, "seq_len": arguments.window, "seed": seed}
    return Recipe(
        calibration=str(arguments.text), method="sparsellm", **sizes, **fields
    )


def row(name: str, points: list[Point], *more: str) -> None:
    """Prints the means over seeds: divergences, perplexities, tasks, and the range of the mean divergence."""
    means = [point.mean for point in points]
    columns = (
        [point.kl for point in points],
        [point.perplexity for point in points],
        [point.task for point in points],
    )
    shown = [
        " / ".join(
            form.format(statistics.fmean(values[kind] for values in column))
            for kind in points[0].kl
        )
        for column, form in zip(columns, ("{:.3f}", "{:.1f}", "{:.2f}"), strict=True)
    ]
    ends = (
        f"{statistics.fmean(means):.3f}"
        + f" ({min(means):.3f}–{max(means):.3f})" * (len(means) > 1)
    )
    print(f"| {' | '.join([name, *shown, ends, *more])} |", flush=True)


def head(tests: Tests, first: str, *more: str) -> None:
    kinds = " / ".join(tests.dense)
    names = [first, f"KL: {kinds}", "perplexity", "right words", "mean KL", *more]
    print(f"\n| {' | '.join(names)} |\n|{'---|' * len(names)}", flush=True)


def ways(arguments: argparse.Namespace, tests: Tests) -> None:
    """The table of scores and repairs."""
    for share in arguments.shares:
        head(tests, f"{share:.0%} removed", "of reap's")
        reap = 0.0
        for name, fields in WAYS.items():
            if name not in (arguments.ways or WAYS):
                continue
            points = []
            for seed in arguments.seeds:
                with tempfile.TemporaryDirectory() as folder:
                    recipe = recipe_of(
                        arguments, seed, experts=share, sparsity=0.0, **fields
                    )
                    sparsellm.prune(
                        str(arguments.model), recipe, out=Path(folder) / "out"
                    )
                    points.append(tests.on(Path(folder) / "out"))
            mean = statistics.fmean(point.mean for point in points)
            reap = mean if name == "reap" else reap
            row(name, points, f"{mean / reap:.2f}" if reap else "")


def compositions(arguments: argparse.Namespace, tests: Tests) -> None:
    """The table of bytes: experts, zeros and bits. Weights that are not pruned, such as the embedding, have 16 bits."""
    head(tests, "what", "MB")
    for name, (fields, bits) in MIXED.items():
        points, sizes = [], []
        for seed in arguments.seeds:
            with tempfile.TemporaryDirectory() as folder:
                out = Path(folder) / "out"
                result = sparsellm.prune(
                    str(arguments.model),
                    recipe_of(arguments, seed, effort=1, **fields),
                    out=out,
                )
                points.append(tests.on(out))
                reader = open_checkpoint(out)
                every = sum(torch.Size(reader.shape(key)).numel() for key in reader)
            stored = result.bits_per_weight if bits is None else bits
            assert stored is not None
            sizes.append(
                (result.weights * stored + (every - result.weights) * 16) / 8e6
            )
        row(name, points, f"{statistics.fmean(sizes):.2f}")


def peer(arguments: argparse.Namespace, tests: Tests) -> None:
    """REAP of llmcompressor and ours, on the same windows: which experts stay, CPU seconds and memory of a process."""
    worker = Path(__file__).with_name("peers_llmcompressor.py")
    for share in arguments.shares:
        head(
            tests, f"{share:.0%} removed, seed", "CPU s", "MB of memory", "same experts"
        )
        for seed in arguments.seeds:
            recipe = recipe_of(
                arguments, seed, experts=share, sparsity=0.0, **WAYS["reap"]
            )
            ids = calibration_windows(
                str(recipe.calibration),
                tests.tokenizer,
                recipe.samples,
                arguments.window,
                seed,
            )
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                save_file({"windows": ids}, folder / "windows.safetensors")
                (folder / "recipe.yaml").write_text(recipe.to_yaml())
                theirs = [
                    arguments.peer, str(worker), str(arguments.model), f"--out={folder / 'theirs'}", "--method=reap",
                    f"--sparsity={share}", f"--windows={folder / 'windows.safetensors'}", "--batch-size=16",
                    f"--report={folder / 'kept.json'}",
                ]  # fmt: skip
                ours = [
                    sys.executable,
                    "-m",
                    "sparsellm",
                    "prune",
                    str(arguments.model),
                    f"--out={folder / 'ours'}",
                ]
                runs = {
                    "llmcompressor": measured(theirs, folder / "theirs.log"),
                    "sparsellm": measured(
                        [*ours, f"--recipe={folder / 'recipe.yaml'}", "--quiet"],
                        folder / "ours.log",
                    ),
                }
                kept = list(json.loads((folder / "kept.json").read_text()).values())
                chosen = [
                    record["kept"]
                    for record in json.loads(
                        (folder / "ours" / "pruning.json").read_text()
                    )["experts"]
                ]
                same = sum(len({*a} & {*b}) for a, b in zip(kept, chosen, strict=True))
                for who, run in runs.items():
                    place = folder / ("ours" if who == "sparsellm" else "theirs")
                    cost = (
                        f"{run.cpu_seconds:.1f}",
                        f"{run.peak_rss / 1e6:.0f}",
                        f"{same} of {sum(map(len, chosen))}",
                    )
                    row(f"{who}, {seed}", [tests.on(place)], *cost)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--shares", type=float, nargs="+", default=[0.25, 0.5])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--ways", nargs="+", default=[], help="their names; all if none is given"
    )
    parser.add_argument(
        "--calibration",
        default="",
        help="one kind of text; all kinds if it is not given",
    )
    parser.add_argument(
        "--bytes",
        action="store_true",
        help="the table of experts, zeros and bits instead",
    )
    parser.add_argument(
        "--peer",
        default="",
        help="Python of an environment with llmcompressor: compare with its REAP",
    )
    parser.add_argument("--samples", type=int, default=64)
    parser.add_argument("--window", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8192, help="of each test text")
    parser.add_argument(
        "--words",
        type=int,
        default=200,
        help="words of the cloze, of each kind of text",
    )
    arguments = parser.parse_args()
    tests = Tests(arguments)
    print(f"{cpu_name()}, sparsellm {code_version()}, seeds {arguments.seeds}")
    print(
        f"{arguments.samples} × {arguments.window} tokens of {arguments.calibration or 'all kinds'}"
    )
    with tempfile.TemporaryDirectory() as folder:
        # documents in random order; to read all takes longer than a run
        arguments.text = Path(folder) / "calibration.txt"
        name = (
            f"train-{arguments.calibration}.txt"
            if arguments.calibration
            else "train.txt"
        )
        arguments.text.write_text(
            (arguments.model / name).read_text(encoding="utf-8")[:READ],
            encoding="utf-8",
        )
        if arguments.peer:
            peer(arguments, tests)
        elif arguments.bytes:
            compositions(arguments, tests)
        else:
            head(tests, "model")
            row("dense", [tests.on(arguments.model)])
            ways(arguments, tests)


if __name__ == "__main__":
    main()
