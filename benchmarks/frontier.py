"""Bits a weight with all overhead against what a form of the model loses, for forms of other tools and ours.

    pip install 'sparsellm[bench,instead,frontier]'
    python benchmarks/frontier.py --model DIR --text heldout.txt --calibration train.txt [--picture frontier.svg]
    python benchmarks/frontier.py ... --forms 'llama.cpp Q4_K_M' 'sparsellm 50% int4'     # names begin so

Every form is scored by the same code, in fp32, on the same windows: perplexity, and KL(dense ‖ form) in nats a token. A
form is the numbers that its file stands for. llama.cpp's and sparsellm's kernels can also round activations, which no
row has here.

*Linears*: the linears of the blocks in the form; embedding, head and norms are the dense model's, so that tools differ
in what they do to the linears alone. Bits are all stored bytes of those weights (codes, masks, scales, minima,
offsets), divided by their number. llama.cpp takes larger types than a mixture's name says where a row does not divide
by 256; what is counted is what its file has. *Whole*: embedding and head too as the form's file has them: llama.cpp's
default type, int8 by `pack --head int8` of sparsellm (as they are where it has no such form), and 16 bits in tools that
leave them as they are. A row without a second divergence has the first. A form is on the front if no other is as good
in both bits and divergence.

Importance matrices (mean squares of the inputs) are of the same calibration windows as sparsellm's. Speed is in
``instead.py``. Finished rows are kept in a file, by conditions, form and version of the tool; ``BENCHMARK_CODE``
replaces that of sparsellm (``measure.py``). A stopped script continues when it is run again.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from forms import (
    Numbers,
    block_linears,
    gguf_numbers,
    hqq_numbers,
    importance_matrix,
    open_dense,
    quantised_gguf,
    torchao_numbers,
    with_numbers,
    write_gguf,
)
from frontier_picture import draw
from measure import code_version, cpu_name
from quality import OUT, Cells, add_conditions, identity
from transformers import PreTrainedModel
from wikipedia import write_wikipedia

import sparsellm
from sparsellm.api import Opened
from sparsellm.errors import RecipeError
from sparsellm.files.gguf import without_bars
from sparsellm.files.resolve import checkpoint_directory
from sparsellm.model.open import load_tokenizer
from sparsellm.text.windows import calibration_windows
from sparsepack.grid import INTEGERS

SPARSITIES = (0.0, 0.3, 0.4, 0.5, 0.6, 0.7)
PLAIN = ("Q8_0", "Q6_K", "Q4_0", "Q4_K_M", "Q3_K_M", "Q3_K_S", "Q2_K")
WITH_IMPORTANCE = ("Q4_K_M", "IQ4_XS", "Q3_K_M", "Q3_K_S", "IQ3_XXS", "Q2_K", "IQ2_S")

Row = dict[str, Any]


class Bench:
    """The dense model, its texts, and what several forms need of them."""

    def __init__(self, arguments: argparse.Namespace, folder: Path) -> None:
        self.arguments, self.folder = arguments, folder
        self.directory = checkpoint_directory(arguments.model)
        self.tokenizer = load_tokenizer(self.directory)
        self.dense = Opened(
            str(self.directory), sparsellm.Recipe(products="float32"), trust=False
        )
        model = open_dense(self.directory, "auto")
        if model.dtype != torch.float32:
            raise SystemExit(
                f"{arguments.model} is in {model.dtype}; give a checkpoint in float32, as which all are scored"
            )
        self.sizes = {
            name: parameter.numel() for name, parameter in model.named_parameters()
        }
        self.linears = {
            name: linear.get_parameter("weight").numel()
            for name, linear in block_linears(model).items()
        }

    @cached_property
    def source(self) -> tuple[Path, dict[str, str]]:
        """The model as a GGUF file, and its parameters by GGUF name."""
        path = self.folder / "dense.gguf"
        return path, write_gguf(open_dense(self.directory), path)

    @cached_property
    def windows(self) -> torch.Tensor:
        """The calibration windows, the same as sparsellm's."""
        asked = self.arguments
        return calibration_windows(
            asked.calibration, self.tokenizer, asked.samples, asked.window, seed=0
        )

    @cached_property
    def importance(self) -> dict[str, torch.Tensor]:
        """The importance matrix by GGUF name."""
        result = importance_matrix(self.directory, self.windows)
        return {
            called: result[name]
            for called, name in self.source[1].items()
            if name in result
        }

    def score(self, model: PreTrainedModel | Path) -> Row:
        asked = self.arguments
        result = sparsellm.evaluate(
            model, asked.text, against=self.dense, seq_len=asked.window, max_tokens=asked.max_tokens or None,
            tokenizer=None if isinstance(model, Path) else self.tokenizer,
        )  # fmt: skip
        assert result.against is not None
        return {
            "perplexity": result.value,
            "kl": result.against.kl,
            "tokens": result.tokens,
        }

    def of_numbers(self, numbers: Numbers) -> Row:
        """The row of a form that is numbers, for linears alone or for more."""
        inside = {
            name: weight
            for name, weight in numbers.weights.items()
            if name in self.linears
        }
        stored = sum(numbers.bytes[name] for name in inside)
        # A linear that the tool left alone, and everything else that it does not store, takes 16 bits.
        stored += sum(
            2 * size for name, size in self.linears.items() if name not in inside
        )
        total = sum(numbers.bytes.values()) + sum(
            2 * n for name, n in self.sizes.items() if name not in numbers.bytes
        )
        row = {"bits": 8 * stored / sum(self.linears.values()), "whole_bytes": total}
        row |= self.score(with_numbers(self.directory, Numbers(inside, {})))
        if len(inside) < len(numbers.weights):
            row["whole_kl"] = self.score(with_numbers(self.directory, numbers))["kl"]
        return row


def llama_cpp(bench: Bench, folder: Path, kind: str, important: bool) -> Row:
    source, parameters = bench.source
    importance = bench.importance if important else None
    began = time.process_time()
    made = quantised_gguf(source, kind, folder / f"{kind}.gguf", importance=importance)
    seconds = time.process_time() - began
    return {**bench.of_numbers(gguf_numbers(made, parameters)), "seconds": seconds}


def other_tool(
    bench: Bench, folder: Path, make: Callable[[Bench, int], Numbers], bits: int
) -> Row:
    began = time.process_time()
    numbers = make(bench, bits)
    seconds = time.process_time() - began
    return {**bench.of_numbers(numbers), "seconds": seconds}


def pruned(bench: Bench, folder: Path, sparsity: float, values: str) -> Row:
    """Pruned to these values and packed, which loses nothing more; the whole model is packed again, with its head."""
    asked, began = bench.arguments, time.process_time()
    recipe = sparsellm.Recipe(
        sparsity=sparsity, values=values, effort=asked.effort, calibration=str(asked.calibration),
        samples=asked.samples, seq_len=asked.window,
    )  # fmt: skip
    zeros = sparsellm.prune(
        str(bench.directory), recipe, out=folder / "pruned"
    ).sparsity
    packed = sparsellm.pack(folder / "pruned", out=folder / "packed", head="keep")
    seconds = time.process_time() - began
    bits, scores = 8 * packed.packed_bytes / packed.weights, bench.score(packed.path)
    row = {"bits": bits, "zeros": zeros, **scores, "seconds": seconds}
    try:
        total = sparsellm.pack(
            folder / "pruned",
            out=folder / "whole",
            head="int8",
        )
    except RecipeError as error:
        print(f"{values}, the head as it is: {error}", flush=True)
        return {**row, "whole_bytes": packed.checkpoint_bytes}
    return {
        **row,
        "whole_bytes": total.checkpoint_bytes,
        "whole_kl": bench.score(total.path)["kl"],
    }


@dataclass(frozen=True)
class Form:
    """A row: its name, its series and label in the picture, the version of its tool, and how it is made."""

    name: str
    series: str
    label: str
    code: Callable[[], str]
    make: Callable[[Bench, Path], Row]


def forms(arguments: argparse.Namespace) -> Iterator[Form]:
    """All forms, other tools' first."""
    by_llama_cpp = partial(version, "llama-cpp-py-sync")
    for kinds, important, series in (
        (PLAIN, False, "llama.cpp"),
        (WITH_IMPORTANCE, True, "llama.cpp, importance"),
    ):
        for kind in kinds:
            name = f"llama.cpp {kind}" + (" with importance" if important else "")
            yield Form(
                name,
                series,
                kind,
                by_llama_cpp,
                partial(llama_cpp, kind=kind, important=important),
            )
    others: tuple[tuple[str, str, str, Callable[[Bench, int], Numbers], tuple[int, ...]], ...] = (
        ("torchao", "torchao", "int{}", lambda b, bits: torchao_numbers(b.directory, bits), (8, 4)),
        ("hqq", "hqq", "{} bits", lambda b, bits: hqq_numbers(b.directory, bits), (4, 3, 2)),
    )  # fmt: skip
    for series, package, label, make, widths in others:
        for bits in widths:
            named = label.format(bits)
            made = partial(other_tool, make=make, bits=bits)
            yield Form(
                f"{series} {named}", series, named, partial(version, package), made
            )
    for values in INTEGERS:
        for sparsity in SPARSITIES:
            yield Form(
                f"sparsellm {sparsity:.0%} {values}", f"sparsellm {values}", f"{sparsity:.0%} {values}",
                code_version, partial(pruned, sparsity=sparsity, values=values),
            )  # fmt: skip


def on_front(rows: dict[str, Row]) -> set[str]:
    """The forms to which no other is equal or better in bits and divergence, and better in one."""
    return {
        name
        for name, row in rows.items()
        if not any(
            (other["bits"], other["kl"]) != (row["bits"], row["kl"])
            and other["bits"] <= row["bits"]
            and other["kl"] <= row["kl"]
            for other in rows.values()
        )
    }


def print_table(rows: dict[str, Row], front: set[str]) -> None:
    print(
        "| form | zeros | bits a weight | KL | perplexity | on the front | whole model (MB) | KL, whole | CPU s |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for name, row in rows.items():
        zeros = f"{row['zeros']:.1%}" if row.get("zeros", 0) else ""
        total = f"{row['whole_kl']:.5f}" if "whole_kl" in row else ""
        print(
            f"| {name} | {zeros} | {row['bits']:.2f} | {row['kl']:.5f} | {row['perplexity']:.2f} "
            f"| {'yes' if name in front else ''} | {row['whole_bytes'] / 1e6:.2f} | {total} | {row['seconds']:.0f} |"
        )


def measure(
    bench: Bench, chosen: list[Form], cells: Cells
) -> tuple[dict[str, Row], dict[str, str]]:
    """The rows, and for each form that has none the reason."""
    asked = bench.arguments
    conditions = (
        identity(asked.model), asked.text, asked.calibration, asked.samples, asked.window, asked.max_tokens,
        asked.effort,
    )  # fmt: skip
    rows, missing = {}, {}
    for form in chosen:
        try:
            key = "/".join(str(part) for part in (*conditions, form.code(), form.name))
            with tempfile.TemporaryDirectory(
                prefix="form-", dir=bench.folder
            ) as folder:
                rows[form.name] = cells.get(
                    key, partial(form.make, bench, Path(folder))
                )
        except (ImportError, ValueError) as reason:
            missing[form.name] = f"{type(reason).__name__}: {reason}"
    return rows, missing


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_conditions(parser)
    parser.add_argument("--effort", type=int, default=1, help="of sparsellm")
    parser.add_argument(
        "--forms", nargs="*", default=[""], help="only forms whose name begins so"
    )
    parser.add_argument("--picture", type=Path, help="write an SVG")
    parser.add_argument("--cells", type=Path, default=OUT / "frontier.json")
    arguments = parser.parse_args()
    arguments.calibration = arguments.calibration or str(
        write_wikipedia(OUT / "wikipedia.txt")
    )
    torch.set_num_threads(1)
    OUT.mkdir(parents=True, exist_ok=True)
    chosen = [
        form
        for form in forms(arguments)
        if form.name.startswith(tuple(arguments.forms))
    ]
    with (
        tempfile.TemporaryDirectory(prefix="frontier-", dir=OUT) as folder,
        without_bars(),
    ):
        bench = Bench(arguments, Path(folder))
        dense = Cells(arguments.cells, versioned=False).get(
            f"{identity(arguments.model)}/{arguments.text}/{arguments.window}/{arguments.max_tokens}/dense",
            lambda: bench.score(bench.directory),
        )
        rows, missing = measure(bench, chosen, Cells(arguments.cells, versioned=False))
    conditions = (
        f"Model {Path(arguments.model).name}, {sum(bench.linears.values()):,} weights in linears of "
        f"{sum(bench.sizes.values()):,}; dense perplexity {dense['perplexity']:.2f}; {Path(arguments.text).name}, "
        f"windows of {arguments.window}, {dense['tokens']} tokens scored"
    )
    print(
        f"{conditions}; calibration {arguments.samples} × {arguments.window} tokens of "
        f"{Path(arguments.calibration).name}; effort {arguments.effort}; torch {torch.__version__}, 1 thread, "
        f"{cpu_name()}.\n"
    )
    front = on_front(rows)
    print_table(rows, front)
    for name, reason in missing.items():
        print(f"\nno row {name}: {reason}")
    if arguments.picture and rows:
        drawn = [
            (form.series, form.label, rows[form.name])
            for form in chosen
            if form.name in rows
        ]
        points = [
            (series, label, row["bits"], row["kl"]) for series, label, row in drawn
        ]
        arguments.picture.write_text(draw(points, conditions), encoding="utf-8")


if __name__ == "__main__":
    main()
