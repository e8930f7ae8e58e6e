"""Tables of results for the command line, within 80 columns; exact numbers are in ``--json``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from sparsellm.app.console import (
    count,
    duration,
    out,
    phases,
    say,
    speed,
    table,
    visible,
)
from sparsellm.inputs import about
from sparsellm.progress import PHASES
from sparsellm.records import Totals, by_kind, error_of
from sparsepack.grids import GRIDS

if TYPE_CHECKING:
    from pathlib import Path

    from sparsellm.api import MatrixZeros, PruneResult
    from sparsellm.app.compare import Comparison
    from sparsellm.app.demo import DemoResult
    from sparsellm.convert import PackResult
    from sparsellm.exports.door import ExportResult
    from sparsellm.method.experts.fewer import Routing
    from sparsellm.recipe import Recipe
    from sparsellm.records import Benchmark, Evaluation, Matrix, Prediction


def print_pruned(result: PruneResult, *, verbose: bool = False) -> None:
    """Prints zeros and error of each kind of linear, the time of each phase, and the path of the result."""
    out().print(_kinds(result))
    for linear in result.linears:
        for note in linear.notes:
            say(f"note: {linear.name}: {note}", error=True)
    out().print(phases(result.seconds, parts=verbose))
    recipe = result.recipe
    shares = f" by {result.allocated_by}" if result.allocated_by is not None else ""
    share = f"{100 * recipe.sparsity:.4g}%"
    target = share if recipe.pattern is None else recipe.pattern
    target += f" {share}" if recipe.chosen_of is not None else ""
    windows = f"{recipe.samples}×{recipe.seq_len}"
    say(
        f"{recipe.method} {target}{shares} · calibrated on {recipe.calibration} {windows}"
    )
    if result.bits_per_weight is not None:
        grid = GRIDS.get(recipe.grid)
        stored = str(recipe.values)
        if grid is not None:
            stored = f"{stored} ({grid.name})" if grid.plain else grid.name
        then = "it is packed" if grid is None else "it is exported"
        then += (
            ", experts aside"
            if grid is None
            and any(entry.tokens is not None for entry in result.linears)
            else ""
        )
        say(f"{stored} values, {result.bits_per_weight:.2f} bits a weight when {then}")
    if result.sweeps:
        best = min(result.sweeps, key=lambda record: record.held_out)
        before = f"{best.held_out:.3f} nats a token ({result.sweeps[0].held_out:.3f} before the sweep)"
        before += "".join(
            f", {visible(name)} {divergence:.3f}"
            for name, divergence in best.sources.items()
        )
        say(f"KL from the dense model on held-out calibration windows: {before}")
    led = " in windows that begin with BOS" if result.calibration_bos == "yes" else ""
    say(
        f"{result.calibration_tokens} calibration tokens{led} · peak memory {result.peak_rss_bytes / 1e9:.2f} GB"
    )
    say(f"written to {result.path}")
    if result.report is not None:
        say(f"report: {result.report}")


def print_prediction(prediction: Prediction) -> None:
    """Prints the estimated seconds of each phase, and memory, disk and tokens of a run."""
    shown = phases({name: took for name, took in prediction.seconds.items() if took})
    shown.title = f"Estimated for {visible(prediction.machine)}"
    if prediction.ranks > 1:
        shown.title += f" × {prediction.ranks}"
    out().print(shown)
    needs = table(("need",), ("size",))
    rows = {
        "memory of a process": prediction.memory_bytes,
        "memory of its GPU": prediction.device_bytes,
        "of it, hidden states and swept weights": prediction.hidden_bytes,
        "disk, at most": prediction.disk_bytes,
        "of it, for want of memory": prediction.hidden_on_disk_bytes * prediction.ranks,
    }
    for name, size in rows.items():
        if size:
            needs.add_row(name, about(size))
    out().print(needs)
    tokens = ", ".join(
        f"{PHASES[name]} {count(number)}"
        for name, number in prediction.tokens.items()
        if number
    )
    sweep = f"; sweep {prediction.sweep}" if prediction.sweep else ""
    say(f"tokens: {tokens}{sweep}")
    for note in prediction.notes:
        say(f"note: {note}")


def print_next(out: Path, recipe: Recipe, dense: str) -> None:
    """Prints the two commands that come next for a pruned checkpoint: one measures it, one packs or exports it."""
    name = shlex.quote(str(out))
    grid = GRIDS.get(recipe.grid)
    say(
        f"measure it:  sparsellm eval {name} --text pydoc --against {shlex.quote(dense)}",
        unbroken=True,
    )
    base = str(out).rstrip("/")
    if grid is not None:
        end, like = (
            (".gguf", " --like FILE.gguf") if grid.form == "gguf" else ("-exported", "")
        )
        place = shlex.quote(base + end)
        say(
            f"export it:   sparsellm export {name} --to {grid.form} --out {place}{like}",
            unbroken=True,
        )
        return
    packed = f" --values {recipe.values}" if recipe.values != "keep" else ""
    if recipe.sparsity or packed:
        say(
            f"pack it:     sparsellm pack {name} --out {shlex.quote(f'{base}-packed')}{packed}",
            unbroken=True,
        )


def _kinds(result: PruneResult) -> Table:
    spread = result.allocated_by is not None or bool(result.recipe.sparsity_of)
    columns = (
        "weights",
        "zeros",
        "sparsity",
        *(("of one linear",) if spread else ()),
        "mean error",
    )
    shown = table(("kind of linear",), columns, title="Pruned")

    def row(
        name: str, matrices: Iterable[Matrix], *more: str, style: str | None = None
    ) -> None:
        total = Totals.of(matrices)
        shown.add_row(
            name,
            count(total.weights),
            count(total.zeros),
            f"{total.sparsity:.2%}",
            *more,
            style=style,
        )

    for kind, part in by_kind(result.linears).items():
        shares = [linear.sparsity for linear in part]
        ends = (f"{min(shares):.0%} – {max(shares):.0%}",) if spread else ()
        row(kind, part, *ends, f"{error_of(part):.4f}")
    shown.add_section()
    if result.dense:
        row("pruned linears", result.linears)
        row("left dense", result.dense)
    row("all", [*result.linears, *result.dense], style="bold")
    return shown


def print_zeros(
    matrices: list[MatrixZeros],
    blocks: dict[int, list[MatrixZeros]],
    pattern: str | None,
    mixtures: Routing,
) -> None:
    """Prints the zeros of every matrix, every block, and all, and what is known of mixtures. The experts of a block
    share one row for each kind of matrix, because a mixture may have thousands."""
    from sparsellm.patterns import strictest

    shown = table(("matrix",), ("shape", "zeros", "sparsity", "N:M"))

    def row(
        name: str,
        shape: str,
        alike: list[MatrixZeros],
        held: str,
        style: str | None = None,
    ) -> None:
        total = Totals.of(alike)
        shown.add_row(
            name, shape, count(total.zeros), f"{total.sparsity:.2%}", held, style=style
        )

    for index, part in blocks.items():
        rows: dict[str, list[MatrixZeros]] = {}
        for matrix in part:
            rows.setdefault(
                re.sub(r"(?<=\.experts\.)\d+(?=\.)", "*", matrix.name), []
            ).append(matrix)
        for name, alike in rows.items():
            held = (
                strictest(matrix.kept for matrix in alike)
                if alike[0].linear
                else "no linear"
            )
            row(name, "×".join(map(str, alike[0].shape)), alike, held or "–")
        row(f"block {index}", "", part, "", "bold")
        shown.add_section()
    row("all", "", matrices, pattern or "–", "bold")
    out().print(shown)
    if mixtures.experts:
        sizes = " or ".join(map(str, sorted(set(mixtures.experts.values()))))
        parts = [f"{sizes} experts in {len(mixtures.experts)} of {len(blocks)} blocks"]
        named = {
            "for a token": mixtures.per_token,
            "shared": mixtures.shared,
            "groups": mixtures.groups,
        }
        parts += [
            f"{number} {what}"
            for what, number in named.items()
            if number and (what, number) != ("groups", 1)
        ]
        can = f"prune --experts can keep {mixtures.least} or more of them"
        say(
            f"mixtures: {', '.join(parts)}; {f'none can be removed: {mixtures.why}' if mixtures.why else can}"
        )


def print_demo(result: DemoResult, *, verbose: bool = False) -> None:
    """Prints the forms of the demo's model side by side, both answers, and the paths of what was written."""
    if verbose:
        print_pruned(result.pruned, verbose=True)
    forms = (result.dense, result.q4_0, result.packed)
    speeds = result.speeds
    against = [form.evaluation.against for form in forms]
    shown = table(
        ("SmolLM2-135M-Instruct", "dense bf16", "llama.cpp Q4_0", "pruned, packed"), ()
    )
    shown.add_row("weights", *(_megabytes(form.weight_bytes) for form in forms))
    shown.add_row(
        "perplexity, held-out text", *(f"{form.evaluation.value:.2f}" for form in forms)
    )
    shown.add_row(
        "KL from dense, nats a token",
        *(f"{record.kl:.3f}" if record else "0" for record in against),
    )
    shown.add_row(
        "same next token as dense",
        *(f"{record.agreement:.1%}" if record else "100%" for record in against),
    )
    if (pair := speeds.decoding) is not None:
        dense, packed, eager = (
            f"{rate.median:.1f}"
            for rate in (pair.dense, pair.packed, pair.transformers)
        )
        other = result.q4_0_tokens_per_second
        llama_cpp = (
            f"{other:.1f} (×{other / pair.dense.median:.2f})"
            if other is not None
            else "not installed"
        )
        ratio = f"{packed} (×{pair.packed.median / pair.dense.median:.2f})"
        shown.add_row("tokens/s, same decoder", dense, llama_cpp, ratio)
        shown.add_row(
            "tokens/s by transformers",
            eager,
            "",
            f"(×{pair.ratio.dense_by_transformers:.2f})",
        )
    shown.add_row(
        "peak memory of decoding", *(_megabytes(form.peak_rss_bytes) for form in forms)
    )
    out().print(shown)
    pruned = result.pruned
    say(
        f"packed: {pruned.sparsity_pruned:.0%} zeros, {pruned.bits_per_weight:.2f} bits a weight, embedding in int8"
    )
    say(
        f"pruned in {duration(result.seconds['prune'])} with {pruned.peak_rss_bytes / 1e9:.2f} GB of memory"
    )
    texts = result.texts
    answers = table((visible(texts.prompt), ""), ())
    answers.add_row("dense", Text(visible(texts.dense.strip())))
    answers.add_row("packed", Text(visible(texts.pruned.strip())))
    out().print(answers)
    say(f"everything took {duration(sum(result.seconds.values()))}")
    for name, path in (
        ("pruned", pruned.path),
        ("packed", result.packed_path),
        ("report", result.report),
    ):
        if path is not None:
            say(f"{name}: {path}")


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.0f} MB"


def print_packed(result: PackResult) -> None:
    """Prints the bytes before and after packing."""
    report = result.to_dict()
    say(
        f"linears of the blocks: {result.dense_bytes / 1e6:.1f} MB dense, {result.packed_bytes / 1e6:.1f} MB packed "
        f"({report['bits_per_weight']:.2f} bits a weight, {report['of_bf16']:.3f} of dense bf16)"
    )
    if dense := sum(entry is None for entry in result.linears.values()):
        say(
            f"{dense} of {len(result.linears)} linears are smaller dense and were not packed"
        )
    if result.expert_weights:
        say(
            f"note: {count(result.expert_weights)} weights of experts stay dense; they have no packed form",
            error=True,
        )
    if result.rounded:
        say(
            f"note: {len(result.rounded)} of {len(result.linears)} linears were rounded to nearest. A model that was "
            "pruned with the same --values loses nothing if its own pruning.json is in the directory of the weights",
            error=True,
        )
    head = "in int8" if result.head else "unchanged"
    say(
        f"weight files: {result.checkpoint_bytes / 1e6:.1f} MB, including embedding and head, {head}"
    )
    say(f"written to {result.path}")


def print_exported(result: ExportResult, saved: Path | None) -> None:
    """Prints the size of an export, what its zeros cost there, and where it runs."""
    record = result.record
    if result.sparsity:
        packed = result.packed_bytes
        more = (
            ""
            if packed is None
            else f", and {packed / 1e6:.1f} MB as `sparsellm pack` stores them"
        )
        say(
            f"note: {record.to} stores the {result.sparsity:.0%} of zeros like other values: the linears take "
            f"{result.linear_bytes / 1e6:.1f} MB there{more}",
            error=True,
        )
    say(
        f"{record.to}, {record.grid}: {record.bytes / 1e6:.1f} MB; it runs in {record.runs_in}"
    )
    say(f"written to {result.path}")
    if saved is not None:
        say(f"recorded in {saved}; its card names it, and so does `sparsellm report`")


def print_evaluation(result: Evaluation, saved: Path | None) -> None:
    """Prints perplexity and protocol, the comparison with a dense model, tasks, and the file with the results."""
    protocol = result.protocol
    begins = {"yes": "each begins with BOS", "no": "cut anywhere", "given": "as given"}[
        protocol.bos
    ]
    say(
        f"{protocol.tokens} tokens scored in {protocol.windows} windows of {protocol.window}, {begins}"
    )
    for name, dense, value in result.rows():
        say(f"{name} {value}" if dense is None else f"{name} {value} · dense {dense}")
    if (other := result.against) is not None and result.dense is None:
        say(
            f"{other.model} is pruned too, so no recovery is given; its perplexity is {other.perplexity.shown()}"
        )
        say(
            f"KL from it {other.divergence.shown(3)} nats a token, same likeliest token {other.agreement:.1%}"
        )
    for task, metrics in (result.tasks or {}).items():
        for name, metric in metrics.items():
            say(f"{task}: {name} {metric.shown()}")
    if saved is not None:
        say(f"results in {saved}")


def print_comparison(result: Comparison, *, limited: bool) -> None:
    """Prints one row for each cell of a comparison, after one of the dense model, and the recommendation."""
    timed = any(cell.tokens_per_second is not None for cell in result.cells)
    shown = table(
        ("run",),
        ("zeros", "ppl", "recovery", "KL", "same", "MB", "tok/s" if timed else "time"),
    )
    first = result.cells[0]
    dense = (
        f"{first.dense_tokens_per_second:.1f}"
        if first.dense_tokens_per_second is not None
        else ""
    )
    size = f"{first.dense_bytes / 1e6:,.1f}"
    shown.add_row(
        "dense",
        "",
        f"{first.dense_perplexity:.2f}",
        "100%",
        "0",
        "100%",
        size,
        dense,
        end_section=True,
    )
    for cell in result.cells:
        speed_of = (
            f"{cell.tokens_per_second:.1f}"
            if cell.tokens_per_second is not None
            else "–"
        )
        quality = (
            f"{cell.perplexity:.2f}",
            f"{cell.recovery:.1%}",
            f"{cell.kl:.3f}",
            f"{cell.agreement:.1%}",
        )
        size = f"{cell.packed_bytes / 1e6:,.1f}"
        last = speed_of if timed else duration(cell.seconds)
        shown.add_row(cell.name, f"{cell.sparsity:.1%}", *quality, size, last)
    out().print(shown)
    say(
        "MB: weight files, packed · same: tokens with the same first choice · recovery: dense ppl / ppl"
    )
    if (eager := first.transformers_tokens_per_second) is not None:
        say(f"tok/s: dense by the same decoder; {eager:.1f} as transformers runs it")
    say(f"least KL at each size, smallest first: {', '.join(result.best_at_each_size)}")
    if result.recommended is not None:
        say(
            f"recommended: {result.recommended}, packed in {result.out / result.recommended}-packed"
        )
    elif limited:
        say("no run is as small as --max-bytes; allow more, or add a sparsity")
    if result.page is not None:
        say(f"compared in {result.page}")


def print_speeds(report: Benchmark, saved: Path | None) -> None:
    """Prints tokens per second of a packed and a dense checkpoint: the median, and the slowest and fastest round."""
    shown = table(
        ("batch × threads, dense by",), ("dense tok/s", "packed tok/s", "ratio")
    )
    for pair in report.pairs():
        packed = pair.packed
        for how, dense in pair.against:
            name = f"{packed.phase} {packed.batch} × {packed.threads}, {how}"
            rates = (
                speed(timing.median, timing.slowest, timing.fastest)
                for timing in (dense, packed)
            )
            shown.add_row(name, *rates, f"{packed.median / dense.median:.2f}")
    out().print(shown)
    say(
        f"weights in memory: {report.dense_bytes / 1e6:.1f} MB dense, {report.packed_bytes / 1e6:.1f} MB packed; "
        f"linears of the blocks: {report.dense_linear_bytes / 1e6:.1f} and {report.packed_linear_bytes / 1e6:.1f} MB"
    )
    say(
        f"small batches: {report.kernel} · activations {report.dtype}, dense weights {report.dense_dtype}"
    )
    for line in report.verdict:
        say(line)
    if saved is not None:
        say(f"results in {saved}")
