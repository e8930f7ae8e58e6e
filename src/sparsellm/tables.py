"""Tables of results for the command line, within 80 columns; exact numbers are in ``--json``."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from rich.table import Table
from rich.text import Text

from sparsellm.console import count, out, phases, say, speed, table, visible

if TYPE_CHECKING:
    from sparsellm.api import MatrixZeros, PruneResult
    from sparsellm.demo import DemoResult
    from sparsellm.recipe import Recipe
    from sparsellm.registry import Registry
    from sparsellm.runtime.bench import Comparison
    from sparsellm.runtime.convert import PackResult


def print_warnings(result: PruneResult, printed: Iterable[str] = ()) -> None:
    """Prints the warnings of a run on stderr, except those that were printed before."""
    for warning in result.warnings:
        if warning not in printed:
            say(f"note: {warning}", error=True)


def print_pruned(result: PruneResult, *, verbose: bool = False) -> None:
    """Prints zeros and error of each kind of linear, the time of each phase, and the path of the result."""
    allocation = result.allocation.get("name")
    out().print(_kinds(result, spread=allocation is not None))
    for linear in result.linears:
        for note in linear.notes:
            say(f"note: {linear.name}: {note}", error=True)
    out().print(phases(result.seconds, parts=verbose))
    say(_recipe_line(result.recipe, allocation))
    say(f"{result.calibration_tokens} calibration tokens · peak memory {result.peak_rss / 1e9:.2f} GB")
    say(f"written to {result.path}")


def share(matrices: Iterable[Any]) -> float:
    """The fraction of zeros over some matrices."""
    each = list(matrices)
    return float(sum(x.zeros for x in each) / sum(math.prod(x.shape) for x in each))


def _kinds(result: PruneResult, *, spread: bool) -> Table:
    shown = table(
        ("kind of linear",),
        ("weights", "zeros", "sparsity", *(("of one linear",) if spread else ()), "mean error"),
        title="Pruned",
    )
    kinds: dict[str, list[Any]] = {}
    for linear in result.linears:
        kinds.setdefault(linear.name.rpartition(".")[2], []).append(linear)
    for kind, part in kinds.items():
        weights, zeros = sum(x.shape[0] * x.shape[1] for x in part), sum(x.zeros for x in part)
        shares = [share([linear]) for linear in part]
        ends = (f"{min(shares):.0%} – {max(shares):.0%}",) if spread else ()
        error = sum(x.error for x in part) / len(part)
        shown.add_row(kind, count(weights), count(zeros), f"{zeros / weights:.2%}", *ends, f"{error:.4f}")
    shown.add_section()
    whole = result.matrices
    if result.dense:
        weights, zeros = whole.weights - result.weights, whole.zeros - result.zeros
        shown.add_row("pruned linears", count(result.weights), count(result.zeros), f"{result.sparsity_pruned:.2%}")
        shown.add_row("left dense", count(weights), count(zeros), f"{zeros / weights:.2%}")
    shown.add_row("all", count(whole.weights), count(whole.zeros), f"{whole.sparsity:.2%}", style="bold")
    return shown


def _recipe_line(recipe: Recipe, allocation: str | None) -> str:
    wanted = recipe.pattern or f"{recipe.sparsity:.0%}"
    shares = f" by {allocation}" if allocation is not None else ""
    return f"{recipe.method} {wanted}{shares} · calibrated on {recipe.calibration} {recipe.samples}×{recipe.seq_len}"


def print_zeros(matrices: list[MatrixZeros], blocks: dict[int, list[MatrixZeros]], pattern: str | None) -> None:
    """Prints the zeros of every matrix, every block, and all; the pattern of other matrices is "no linear"."""
    shown = table(("matrix",), ("shape", "zeros", "sparsity", "N:M"))
    for index, part in blocks.items():
        for matrix in part:
            shape = "×".join(map(str, matrix.shape))
            held = str(matrix.pattern or "–") if matrix.linear else "no linear"
            shown.add_row(matrix.name, shape, count(matrix.zeros), f"{matrix.sparsity:.2%}", held)
        shown.add_row(f"block {index}", "", count(sum(x.zeros for x in part)), f"{share(part):.2%}", "", style="bold")
        shown.add_section()
    shown.add_row(
        "all", "", count(sum(x.zeros for x in matrices)), f"{share(matrices):.2%}", pattern or "–", style="bold"
    )
    out().print(shown)


def print_choices(option: str, registry: Registry[Any], prefix: str, *, allocations: bool) -> None:
    """Prints the values of one option of ``prune``: each name with its paper, summary and options."""
    out().print(f"{option}:")
    for entry in registry:
        out().print(Text(visible(entry.name), style="bold").append(f"  ({visible(entry.paper)})", style="not bold"))
        lines = [entry.summary]
        if allocations:
            lines.append(f"Without --allocation or --pattern: {entry.allocation}.")
        for line in lines:
            _print_indented(line, "  ")
        for each in entry.options.values():
            _print_indented(f"{prefix}.{each.name}: {each.type_name} = {each.default}  {each.description}", "    ")


def _print_indented(line: str, indent: str) -> None:
    for part in textwrap.wrap(line, out().width, initial_indent=indent, subsequent_indent=indent):
        out().print(part, soft_wrap=True)


def print_demo(result: DemoResult) -> None:
    """Prints the demo's results for both models side by side."""
    print_pruned(result.pruned)
    shown = table(("SmolLM2-135M-Instruct",), ("dense", "pruned"))
    for name, dense, pruned in result.rows():
        shown.add_row(name, dense, pruned)
    out().print(shown)
    for name, text in (("dense", result.dense_text), ("pruned", result.pruned_text)):
        out().print(Text(f"{name}: ", style="bold").append(visible(result.prompt + text), style="not bold"))
    out().print()
    say(f"Pruned checkpoint: {result.pruned.path}")
    say(f"Dense checkpoint:  {result.dense_path}")
    say(f"Load it: AutoModelForCausalLM.from_pretrained({str(result.pruned.path)!r})")


def print_packed(result: PackResult) -> None:
    """Prints the bytes before and after packing."""
    report = result.to_dict()
    dense = sum(entry is None for entry in result.linears.values())
    say(
        f"linears of the blocks: {result.dense_bytes / 1e6:.1f} MB dense, {result.packed_bytes / 1e6:.1f} MB packed "
        f"({report['bits_per_weight']:.2f} bits a weight, {report['of_bf16']:.3f} of dense bf16)"
    )
    if dense:
        say(f"{dense} of {len(result.linears)} linears are smaller dense and were not packed")
    head = "in int8" if result.head else "unchanged"
    say(f"weight files: {result.checkpoint_bytes / 1e6:.1f} MB, including embedding and head, {head}")
    say(f"written to {result.path}")


def print_speeds(report: Comparison) -> None:
    """Prints tokens per second of a packed and a dense checkpoint: the median, and the slowest and fastest round."""
    shown = table(("",), ("batch", "threads", "dense tok/s", "packed tok/s", "ratio"))
    for first, second in report.pairs():
        shown.add_row(
            first.phase,
            str(first.batch),
            str(first.threads),
            speed(first.median, first.slowest, first.fastest),
            speed(second.median, second.slowest, second.fastest),
            f"{second.median / first.median:.2f}",
        )
    out().print(shown)
    say(
        f"weights in memory: {report.dense_bytes / 1e6:.1f} MB dense, {report.packed_bytes / 1e6:.1f} MB packed; "
        f"linears of the blocks: {report.dense_linear_bytes / 1e6:.1f} and {report.packed_linear_bytes / 1e6:.1f} MB"
    )
    say(f"small batches: {report.kernel} · activations {report.dtype}, dense weights {report.dense_dtype}")
    for line in report.verdict:
        say(line)
