"""Tables of results for the command line, within 80 columns; exact numbers are in ``--json``."""

from __future__ import annotations

import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

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
    width_of,
)
from sparsellm.files.named import is_gguf
from sparsellm.inputs import about
from sparsellm.patterns import strictest
from sparsellm.progress import PHASES
from sparsellm.records import Totals, by_kind, error_of, kind_of
from sparsepack.grids import GRIDS

if TYPE_CHECKING:
    from pathlib import Path

    from sparsellm.api import MatrixZeros, PruneResult
    from sparsellm.app.compare import Comparison
    from sparsellm.app.demo import DemoResult
    from sparsellm.convert import PackResult
    from sparsellm.exports.door import ExportResult
    from sparsellm.method.experts.fewer import Routing
    from sparsellm.programs import ChosenForms, CompressResult
    from sparsellm.recipe import Recipe
    from sparsellm.records import Benchmark, Evaluation, Matrix, Prediction
    from sparsellm.run.counts import Stored

# as many fit behind the name of a kind on a line of 80 columns
BLOCKS_OF_LINE = 60
# the share of a size that forms may leave without a word
NEAR = 0.01


def print_pruned(result: PruneResult, *, verbose: bool = False) -> None:
    """Prints zeros and error of each kind of linear, the time of each phase, and the path of the result."""
    out().print(_kinds(result))
    for linear in result.linears:
        for note in linear.notes:
            say(f"note: {linear.name}: {note}", error=True)
    out().print(phases(result.seconds, parts=verbose))
    recipe = result.recipe
    shares = f" by {result.allocated_by}" if result.allocated_by is not None else ""
    target = f"{100 * recipe.sparsity:.4g}%"
    if recipe.pattern is not None:
        target = recipe.pattern
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
    best = result.best_pass
    if best is not None:
        before = f"{best.held_out:.3f} nats a token ({result.sweeps[0].held_out:.3f} before the sweep)"
        before += "".join(
            f", {visible(name)} {divergence:.3f}"
            for name, divergence in best.sources.items()
        )
        say(f"KL from the dense model on held-out calibration windows: {before}")
    held_out = result.held_out
    if held_out is not None:
        say(
            f"held-out text ({held_out}): KL from the dense model {held_out.kl:.3g} nats a token, perplexity "
            f"{held_out.perplexity:.4g} (dense {held_out.dense_perplexity:.4g})"
        )
    if result.idle_sweep:
        say(f"note: {result.idle_sweep}")
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


def say_next(what: str, command: str, path: object, *, error: bool = False) -> None:
    """Prints the command that comes next, in one piece on a narrow terminal too; ``path`` replaces its {}, and
    ``error`` is that of ``say``."""
    words = command.format(shlex.quote(str(path)))
    say(f"{what}:  {words}", error=error, unbroken=True)


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
        place = shlex.quote(f"{base}-exported")
        template = ""
        if grid.form == "gguf":
            place = shlex.quote(f"{base}.gguf")
            if is_gguf(dense):
                template = f" --like {shlex.quote(dense)}"
            elif dense != "demo":
                template = " --converter convert_hf_to_gguf.py"
        say(
            f"export it:   sparsellm export {name} --to {grid.form} --out {place}{template}",
            unbroken=True,
        )
        return
    if recipe.sparsity or recipe.values != "keep":
        say(
            f"pack it:     sparsellm pack {name} --out {shlex.quote(f'{base}-packed')}",
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


def print_stored(stored: Stored) -> None:
    """Prints architecture, parameters, types and bytes of a checkpoint."""
    types = ", ".join(
        f"{name} {count(number)}" if len(stored.dtypes) > 1 else name
        for name, number in stored.dtypes.items()
    )
    parameters = f"{count(stored.parameters)} parameters ({types})"
    size = f"{stored.file_bytes / 1e6:,.1f} MB of weight files"
    say(f"{visible(stored.architecture)}: {parameters}, {size}")


def print_kinds(matrices: list[MatrixZeros], pattern: str | None) -> None:
    """Prints the zeros of each kind of matrix in the blocks, and of all."""
    shown = table(("kind of matrix",), ("number", "shape", "zeros", "sparsity", "N:M"))
    kinds: dict[str, list[MatrixZeros]] = {}
    for matrix in matrices:
        kinds.setdefault(kind_of(matrix.name), []).append(matrix)
    for kind, part in kinds.items():
        shapes = list(dict.fromkeys("×".join(map(str, x.shape)) for x in part))
        shape = shapes[0] if len(shapes) == 1 else "several"
        shown.add_row(kind, str(len(part)), shape, *_zeros_of(part))
    shown.add_section()
    zeros, sparsity, _ = _zeros_of(matrices)
    held = pattern or "–"
    shown.add_row("all", str(len(matrices)), "", zeros, sparsity, held, style="bold")
    out().print(shown)


def _zeros_of(alike: list[MatrixZeros]) -> tuple[str, str, str]:
    """Zeros, sparsity and the pattern of some matrices, as text."""
    total = Totals.of(alike)
    held = "no linear"
    if alike[0].linear:
        held = strictest(matrix.kept for matrix in alike) or "–"
    return count(total.zeros), f"{total.sparsity:.2%}", held


def print_zeros(blocks: dict[int, list[MatrixZeros]], pattern: str | None) -> None:
    """Prints the zeros of every matrix, every block, and all. The experts of a block share one row for each kind of
    matrix, because a mixture may have thousands."""
    shown = table(("matrix",), ("shape", "zeros", "sparsity", "N:M"))
    for index, part in blocks.items():
        rows: dict[str, list[MatrixZeros]] = {}
        for matrix in part:
            name = re.sub(r"(?<=\.experts\.)\d+(?=\.)", "*", matrix.name)
            rows.setdefault(name, []).append(matrix)
        for name, alike in rows.items():
            shape = "×".join(map(str, alike[0].shape))
            shown.add_row(name, shape, *_zeros_of(alike))
        zeros, sparsity, _ = _zeros_of(part)
        shown.add_row(f"block {index}", "", zeros, sparsity, "", style="bold")
        shown.add_section()
    every = [matrix for part in blocks.values() for matrix in part]
    zeros, sparsity, _ = _zeros_of(every)
    shown.add_row("all", "", zeros, sparsity, pattern or "–", style="bold")
    out().print(shown)


def print_mixtures(mixtures: Routing, blocks: int) -> None:
    """Prints what is known of the mixtures of a model with this number of blocks, if it has any."""
    if not mixtures.experts:
        return
    sizes = " or ".join(map(str, sorted(set(mixtures.experts.values()))))
    parts = [f"{sizes} experts in {len(mixtures.experts)} of {blocks} blocks"]
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
    if mixtures.why:
        can = f"none can be removed: {mixtures.why}"
    say(f"mixtures: {', '.join(parts)}; {can}")


def print_demo(result: DemoResult, *, verbose: bool = False) -> None:
    """Prints the forms of the demo's model side by side, both answers, and the paths of what was written."""
    if verbose:
        print_compressed(result.compressed)
    forms = (result.dense, result.q4_0, result.packed)
    speeds = result.speeds
    against = [form.evaluation.against for form in forms]
    shown = table(
        ("SmolLM2-135M-Instruct", "dense bf16", "llama.cpp Q4_0", "ours, packed"), ()
    )
    shown.add_row("weight files", *(_megabytes(form.weight_bytes) for form in forms))
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
    run = result.compressed.run
    say(f"packed: {run.in_short}, embedding in int8")
    say(
        f"compressed in {duration(result.seconds['compress'])} with {run.peak_rss_bytes / 1e9:.2f} GB of memory"
    )
    texts = result.texts
    answers = table((visible(texts.prompt), ""), ())
    answers.add_row("dense", Text(visible(texts.dense.strip())))
    answers.add_row("packed", Text(visible(texts.pruned.strip())))
    out().print(answers)
    say(f"everything took {duration(sum(result.seconds.values()))}")
    say(f"written to {result.compressed.path}")
    if result.report is not None:
        say(f"report: {result.report}")
    say_next("talk to it", "sparsellm chat {}", result.compressed.path)


def _megabytes(size: int | None) -> str:
    return "" if size is None else f"{size / 1e6:.0f} MB"


def print_chosen(chosen: ChosenForms) -> None:
    """Prints the forms by kind of linear and by block, and what was compared."""
    kinds: dict[str, Counter[str]] = {}
    for name, values in chosen.values.items():
        kinds.setdefault(name.rpartition(".")[2], Counter())[values] += 1
    shown = table(("kind", "forms"), ("zeros",))
    for kind, forms in kinds.items():
        shares = [
            share
            for name, share in chosen.sparsity.items()
            if name.rpartition(".")[2] == kind
        ]
        said = ", ".join(f"{count} × {form}" for form, count in forms.most_common())
        shown.add_row(kind, said, f"{sum(shares) / len(shares):.1%}")
    out().print(shown)
    say("bits of a value, block after block:")
    for line in bars_of_bits(chosen.values):
        say(line, unbroken=True)
    _print_heads(chosen.heads)
    _print_candidates(chosen.candidates, chosen.chosen)


def _print_heads(heads: Mapping[str, str]) -> None:
    """Prints the types of embedding and head, if they were chosen."""
    if heads:
        said = ", ".join(f"{key} {values}" for key, values in heads.items())
        say(f"embedding and head: {said}")


def bars_of_bits(values: Mapping[str, str]) -> list[str]:
    """A line for each kind of linear with a digit for each block, the bits of its values; a point where a block has no
    such linear. Several linears of one kind, such as experts, have the digit of most of them. ``values`` are types by
    the name of a linear. Longer models take several lines of a kind."""
    digits: dict[str, dict[int, Counter[str]]] = {}
    for name, form in values.items():
        parts = name.split(".")
        block = next((int(part) for part in parts if part.isdecimal()), 0)
        bits = next((letter for letter in form if letter.isdecimal()), "?")
        digits.setdefault(parts[-1], {}).setdefault(block, Counter())[bits] += 1
    width = max(map(len, digits), default=0)
    last = max((block for blocks in digits.values() for block in blocks), default=0)
    lines = []
    for kind, blocks in digits.items():
        bar = ""
        for block in range(last + 1):
            known = blocks.get(block)
            bar += known.most_common(1)[0][0] if known else "·"
        for start in range(0, len(bar), BLOCKS_OF_LINE):
            part = bar[start : start + BLOCKS_OF_LINE]
            lines.append(f"{kind:{width}}  {part}")
    return lines


def _print_candidates(candidates: Sequence[Mapping[str, Any]], chosen: str) -> None:
    """Prints what was compared before the run."""
    shown = table(("compared", ""), ("bits", "quick divergence"))
    for candidate in candidates:
        taken = "taken" if candidate["name"] == chosen else ""
        shown.add_row(
            str(candidate["name"]),
            taken,
            f"{candidate['bits']:.2f}",
            f"{candidate['divergence']:.4f}",
        )
    out().print(shown)


def print_compressed(result: CompressResult) -> None:
    """Prints size, forms and quality of a compressed model, and the line that starts it."""
    of_dense = ""
    if result.dense_bytes:
        of_dense = f", {result.bytes / result.dense_bytes:.1%} of the dense weights"
    asked = ""
    if result.asked_bytes is not None:
        asked = f"; asked for {about(result.asked_bytes)}"
        unused = 1 - result.bytes / result.asked_bytes
        # a small model has few forms
        if unused > NEAR:
            asked += f", of which the chosen forms leave {unused:.1%}"
    say(f"{result.path}: {about(result.bytes)}{of_dense}{asked}")
    say(result.run.in_short)
    report = result.run.allocation
    _print_heads(result.run.heads)
    candidates = report.get("candidates")
    if isinstance(candidates, list):
        known = [x for x in candidates if isinstance(x, dict)]
        _print_candidates(known, str(report["chosen"]))
    print_evaluation(result.evaluation, None)
    say(f"run it:  {result.start}", unbroken=True)


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
    say_next("run it", "sparsellm serve {}", result.path)


def print_exported(result: ExportResult, saved: Path | None) -> None:
    """Prints the size of an export, what its zeros cost there, where it runs, and the command that starts it."""
    from sparsellm.programs import PROGRAMS

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
    program = PROGRAMS["llama.cpp" if record.to == "gguf" else "vllm"]
    say_next("run it", program.starts, result.path)


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
    first = result.cells[0]
    timed = any(cell.tokens_per_second is not None for cell in result.cells)
    # on a narrow terminal the first of these make room for names, which must stay whole
    for without in ((), ("same",), ("same", "recovery"), ("same", "recovery", "zeros")):
        shown = _compared(result, timed=timed, without=without)
        if width_of(shown) <= out().width:
            break
    out().print(shown)
    say(
        "MB: weight files, packed · same: tokens with the same first choice · recovery: dense ppl / ppl"
    )
    if (eager := first.transformers_tokens_per_second) is not None:
        say(f"tok/s: dense by the same decoder; {eager:.1f} as transformers runs it")
    say(f"least KL at each size, smallest first: {', '.join(result.best_at_each_size)}")
    if result.recommended is not None:
        packed = f"{result.out / result.recommended}-packed"
        say(f"recommended: {result.recommended}, packed in {packed}")
    elif limited:
        say("no run is as small as --max-bytes; allow more, or add a sparsity")
    if result.page is not None:
        say(f"compared in {result.page}")
    if result.recommended is not None:
        say_next("run it", "sparsellm serve {}", packed)


def _compared(result: Comparison, *, timed: bool, without: Sequence[str]) -> Table:
    """The table of a comparison without some of its columns; ``timed`` ends it with speeds, else with times."""
    first = result.cells[0]
    last = "tok/s" if timed else "time"
    columns = ("zeros", "ppl", "recovery", "KL", "same", "MB", last)
    kept = [name for name in columns if name not in without]
    shown = table(("run",), tuple(kept))
    dense = {
        "ppl": f"{first.dense_perplexity:.2f}",
        "recovery": "100%",
        "KL": "0",
        "same": "100%",
        "MB": f"{first.dense_bytes / 1e6:,.1f}",
    }
    if first.dense_tokens_per_second is not None:
        dense["tok/s"] = f"{first.dense_tokens_per_second:.1f}"
    shown.add_row("dense", *(dense.get(name, "") for name in kept), end_section=True)
    for cell in result.cells:
        speed_of = "–"
        if cell.tokens_per_second is not None:
            speed_of = f"{cell.tokens_per_second:.1f}"
        row = {
            "zeros": f"{cell.sparsity:.1%}",
            "ppl": f"{cell.perplexity:.2f}",
            "recovery": f"{cell.recovery:.1%}",
            "KL": f"{cell.kl:.3f}",
            "same": f"{cell.agreement:.1%}",
            "MB": f"{cell.packed_bytes / 1e6:,.1f}",
            "tok/s": speed_of,
            "time": duration(cell.seconds),
        }
        shown.add_row(cell.name, *(row[name] for name in kept))
    return shown


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
