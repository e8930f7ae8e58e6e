"""The commands: parse, call the API, print. Everything of substance is in :mod:`sparsellm.api`."""

from __future__ import annotations

import itertools
import json
import logging
import os
import sys
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from sparsellm.errors import RecipeError, SparseLLMError

if TYPE_CHECKING:
    from sparsellm.api import PruneResult
    from sparsellm.progress import ProgressCallback
    from sparsellm.recipe import Recipe
    from sparsellm.registry import Entry

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Prune Hugging Face language models after training, globally, and make the sparsity pay.",
)
out_console = Console(highlight=False)
log_console = Console(stderr=True, highlight=False)

ModelArgument = Annotated[
    str, typer.Argument(metavar="MODEL", help="Checkpoint directory, hub id, .gguf file, or 'demo'.")
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.")]
DeviceOption = Annotated[str | None, typer.Option(help="cpu, cuda, ... [default: auto]", show_default=False)]
DtypeOption = Annotated[
    str | None, typer.Option(help="auto, float32, bfloat16 or float16. [default: auto]", show_default=False)
]
ThreadsOption = Annotated[int | None, typer.Option(help="Of the CPU. [default: as torch chooses]", show_default=False)]
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run modelling code that comes with the checkpoint.")
]


@app.callback()
def _begin(context: typer.Context) -> None:
    if _processes() > 1 and context.invoked_subcommand != "prune":
        raise RecipeError(f"'sparsellm {context.invoked_subcommand}' runs in one process; start it without torchrun")


@app.command()
def prune(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the pruned checkpoint.")],
    method: Annotated[
        str | None, typer.Option(help="See `sparsellm methods`. [default: sparsellm]", show_default=False)
    ] = None,
    sparsity: Annotated[
        float | None, typer.Option(help="Fraction of zeros. [default: 0.7]", show_default=False)
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(metavar="N:M", help="Keep N of every M inputs, e.g. 2:4.", show_default=False)
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(help="What each block gives; see `sparsellm methods`. [default: method's]", show_default=False),
    ] = None,
    effort: Annotated[
        int | None,
        typer.Option(
            min=0,
            max=3,
            help="Time that sparsellm spends: 0 solves only, 3 sweeps longest. [default: 1]",
            show_default=False,
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="File (.txt, .jsonl, .parquet), wikitext2, ptb, c4, hub:OWNER/NAME, self, or pydoc. [default: pydoc]",
            show_default=False,
        ),
    ] = None,
    samples: Annotated[int | None, typer.Option(help="[default: 128]", show_default=False)] = None,
    seq_len: Annotated[
        int | None, typer.Option(help="[default: 2048, or the model's limit]", show_default=False)
    ] = None,
    seed: Annotated[int | None, typer.Option(help="[default: 0]", show_default=False)] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Most memory of the run, such as 4GiB; hidden states beyond it go to disk. [default: of what is free]",
            show_default=False,
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    recipe: Annotated[Path | None, typer.Option(metavar="FILE", help="A recipe in YAML; options override it.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Any recipe field, options.NAME or allocation_options.NAME."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in DIR.")] = False,
    restart: Annotated[bool, typer.Option("--restart", help="Begin anew, not where a killed run was.")] = False,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Prune MODEL and save a checkpoint that plain transformers loads. Processes of torchrun share the work."""
    from sparsellm import api, parallel
    from sparsellm.recipe import Recipe

    given = {
        "method": method,
        "sparsity": sparsity,
        "pattern": pattern,
        "allocation": allocation,
        "calibration": calibration,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
        "memory": memory,
        "device": device,
        "dtype": dtype,
    }
    chosen = Recipe.from_yaml(recipe) if recipe is not None else Recipe()
    chosen = chosen.updated(**{name: value for name, value in given.items() if value is not None})
    chosen = chosen.with_settings([*([f"options.effort={effort}"] if effort is not None else []), *(settings or [])])
    with _bar() as progress:
        result = api.prune(
            model,
            chosen,
            out=out,
            overwrite=overwrite,
            restart=restart,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if not parallel.is_main():
        return
    for warning in result.warnings:
        log_console.print(f"note: {warning}")
    if as_json:
        _print_json(result.to_dict())
    else:
        _print_pruned(result)


@app.command("eval")
def evaluate(
    model: ModelArgument,
    text: Annotated[
        str, typer.Option(metavar="SOURCE", help="As --calibration of prune; 'pydoc' is its held-out part.")
    ],
    seq_len: Annotated[
        int | None, typer.Option(help="[default: 2048, or the model's limit]", show_default=False)
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help="Use no more of the text.", show_default=False)
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Perplexity of MODEL on a text, by the protocol of the papers."""
    from sparsellm import api
    from sparsellm.progress import PhaseClock

    clock = PhaseClock()
    with _bar() as progress, clock.phase("evaluate"):
        found = api.evaluate(
            model,
            text,
            seq_len=seq_len,
            max_tokens=max_tokens,
            device=device or "auto",
            dtype=dtype or "auto",
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        _print_json(
            {
                "perplexity": found.value,
                "nll": found.nll,
                "tokens_scored": found.tokens,
                "window": found.window,
                "model": model,
                "text": text,
                "seconds": clock.seconds,
                "peak_rss_bytes": api.peak_rss(),
                "versions": api.versions(),
            }
        )
    else:
        out_console.print(f"perplexity {found.value:.4f} · {found.tokens} tokens scored in windows of {found.window}")


@app.command()
def inspect(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint, pruned or not.")],
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Count the zeros of a checkpoint per linear, per block, and in all, and check N:M."""
    from sparsellm import api

    linears = api.inspect(directory, trust_remote_code=trust_remote_code)
    blocks: dict[int, list[api.LinearZeros]] = {}
    for linear in linears:
        blocks.setdefault(linear.block, []).append(linear)
    zeros = sum(linear.zeros for linear in linears)
    weights = sum(linear.shape[0] * linear.shape[1] for linear in linears)
    held = {linear.pattern for linear in linears}
    common = str(held.pop()) if len(held) == 1 and None not in held else None
    if as_json:
        _print_json(
            {
                "zeros": zeros,
                "weights": weights,
                "sparsity": zeros / weights,
                "pattern": common,
                "blocks": [
                    {"block": index, "sparsity": _share(part), "zeros": sum(linear.zeros for linear in part)}
                    for index, part in blocks.items()
                ],
                "linears": [
                    {
                        "name": linear.name,
                        "block": linear.block,
                        "shape": list(linear.shape),
                        "zeros": linear.zeros,
                        "sparsity": linear.sparsity,
                        "pattern": str(linear.pattern) if linear.pattern else None,
                    }
                    for linear in linears
                ],
            }
        )
        return
    table = Table("linear", "shape", "zeros", "sparsity", "N:M")
    for index, part in blocks.items():
        for linear in part:
            shape = "×".join(map(str, linear.shape))
            table.add_row(linear.name, shape, str(linear.zeros), f"{linear.sparsity:.2%}", str(linear.pattern or "–"))
        table.add_row(f"block {index}", "", str(sum(x.zeros for x in part)), f"{_share(part):.2%}", "", style="bold")
        table.add_section()
    table.add_row("all", "", str(zeros), f"{zeros / weights:.2%}", common or "–", style="bold")
    out_console.print(table)


@app.command()
def methods(as_json: JsonOption = False) -> None:
    """What can be chosen as --method and as --allocation, with options and papers."""
    from sparsellm.allocation import ALLOCATIONS
    from sparsellm.methods import METHODS

    if as_json:
        allocations = {entry.name: _described(entry) for entry in ALLOCATIONS}
        chosen = {entry.name: {**_described(entry), "allocation": entry.allocation} for entry in METHODS}
        _print_json({**chosen, "allocations": allocations})
        return
    for title, entries, prefix in (
        ("--method", METHODS, "options"),
        ("--allocation", ALLOCATIONS, "allocation_options"),
    ):
        out_console.print(f"{title}:", markup=False)
        for entry in entries:
            out_console.print(f"[bold]{entry.name}[/bold]  ({entry.paper})")
            out_console.print(f"  {entry.summary}", markup=False)
            if entries is METHODS:
                out_console.print(f"  Without --allocation or --pattern: {entry.allocation}.", markup=False)
            for option in entry.options.values():
                out_console.print(
                    f"    {prefix}.{option.name}: {option.type_name} = {option.default}  {option.description}",
                    markup=False,
                )


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="[default: in the cache]", show_default=False)] = None,
    sparsity: Annotated[float, typer.Option(help="Fraction of zeros.")] = 0.7,
    as_json: JsonOption = False,
) -> None:
    """Prune a small real Llama, measure it before and after, save it, and show the result. Needs no hub."""
    from sparsellm.demo import run_demo

    with _bar() as progress:
        result = run_demo(out=out, sparsity=sparsity, progress=progress)
    if as_json:
        _print_json(result.to_dict())
        return
    _print_pruned(result.pruned)
    table = Table("", "dense", "pruned", title="SmolLM2-135M-Instruct")
    for name, dense, pruned in result.rows():
        table.add_row(name, dense, pruned)
    out_console.print(table)
    for name, text in (("dense", result.dense_text), ("pruned", result.pruned_text)):
        out_console.print(f"[bold]{name}:[/bold]", end=" ")
        out_console.print(f"{result.prompt}{text}", markup=False)
    out_console.print(f"\nPruned checkpoint: {result.pruned.path}", soft_wrap=True)
    out_console.print(f"Dense checkpoint:  {result.dense_path}", soft_wrap=True)
    out_console.print(f'Load it: AutoModelForCausalLM.from_pretrained("{result.pruned.path}")', soft_wrap=True)


@app.command()
def pack(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the packed checkpoint.")],
    values: Annotated[
        str, typer.Option(help="keep (as each weight is stored, losing nothing), bf16, fp16, fp32, int8 or int4.")
    ] = "keep",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in DIR.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Remove what another unfinished run left for DIR.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Store a pruned MODEL packed: the kept values and a bit for each weight; it stays packed in memory too."""
    from sparsellm import packing

    with _bar() as progress:
        result = packing.pack(model, out=out, values=values, overwrite=overwrite, restart=restart, progress=progress)
    if as_json:
        _print_json(result.to_dict())
        return
    report = result.to_dict()
    dense = sum(entry is None for entry in result.linears.values())
    out_console.print(
        f"linears of the blocks: {result.dense_bytes / 1e6:.1f} MB dense, {result.packed_bytes / 1e6:.1f} MB packed "
        f"({report['bits_per_weight']:.2f} bits a weight, {report['of_bf16']:.3f} of dense bf16)"
    )
    if dense:
        out_console.print(f"{dense} of {len(result.linears)} linears are smaller dense and were left so")
    out_console.print(f"weight files: {result.checkpoint_bytes / 1e6:.1f} MB, with embedding and head as they came")
    out_console.print(f"written to {result.path}", soft_wrap=True)


@app.command()
def unpack(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A packed checkpoint.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the dense checkpoint.")],
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the checkpoint in DIR.")] = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Remove what another unfinished run left for DIR.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a packed checkpoint as an ordinary dense one."""
    from sparsellm import packing

    with _bar() as progress:
        result = packing.unpack(directory, out=out, overwrite=overwrite, restart=restart, progress=progress)
    if as_json:
        _print_json({"path": str(result.path), "checkpoint_bytes": result.checkpoint_bytes})
        return
    out_console.print(f"weight files: {result.checkpoint_bytes / 1e6:.1f} MB")
    out_console.print(f"written to {result.path}", soft_wrap=True)


@app.command()
def generate(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint, packed or dense.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 100,
    threads: ThreadsOption = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue PROMPT, as it is written, and say how fast that was."""
    from sparsellm.chain.open import load_tokenizer
    from sparsellm.runtime.generate import generate as continue_prompt
    from sparsellm.runtime.load import load
    from sparsellm.runtime.threads import use_threads

    use_threads(threads)
    model = load(directory, device=device, dtype=dtype or "auto")
    tokenizer = load_tokenizer(Path(directory).expanduser())
    pieces = itertools.chain([prompt], itertools.repeat(""))  # the prompt goes before the first piece, once

    def show(text: str) -> None:
        out_console.print(next(pieces) + text, end="", markup=False, soft_wrap=True)

    result = continue_prompt(
        model,
        tokenizer,
        prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seed=seed,
        on_text=None if as_json else show,
    )
    if as_json:
        _print_json(result.to_dict())
        return
    out_console.print(next(pieces), markup=False, soft_wrap=True)  # ends the line
    log_console.print(
        f"{result.tokens_per_second:.1f} tokens/s · {result.new_tokens} tokens after a prompt of "
        f"{result.prompt_tokens}, read in {result.prefill_seconds:.2f} s · threads: {result.threads}"
    )


@app.command()
def bench(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A packed checkpoint.")],
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="DIR", help="A dense checkpoint to compare with. [default: the same, unpacked]", show_default=False
        ),
    ] = None,
    batch: Annotated[list[int] | None, typer.Option(help="Repeatable. [default: 1]", show_default=False)] = None,
    threads: Annotated[
        list[int] | None, typer.Option(help="Repeatable. [default: as torch chooses]", show_default=False)
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(help="Read before decoding.")] = 128,
    new_tokens: Annotated[int, typer.Option(help="Decoded.")] = 32,
    repeats: Annotated[int, typer.Option(help="Rounds; the median counts.")] = 5,
    device: Annotated[str, typer.Option(help="cpu, cuda, ...")] = "cpu",
    dtype: DtypeOption = None,
    as_json: JsonOption = False,
) -> None:
    """Speed and memory of a packed checkpoint against a dense one, taking turns on this machine."""
    from sparsellm.runtime.bench import compare

    with _bar() as progress:
        report = compare(
            directory,
            dense,
            batches=batch or [1],
            threads=threads,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            device=device,
            dtype=dtype or "auto",
            progress=progress,
        )
    if as_json:
        _print_json(report.to_dict())
        return
    table = Table("", "batch", "threads", "dense tokens/s", "packed tokens/s", "ratio")
    for first, second in report.pairs():
        table.add_row(
            first.phase,
            str(first.batch),
            str(first.threads),
            f"{first.median:.1f} ({first.slowest:.1f} – {first.fastest:.1f})",
            f"{second.median:.1f} ({second.slowest:.1f} – {second.fastest:.1f})",
            f"{second.median / first.median:.2f}",
        )
    out_console.print(table)
    out_console.print(
        f"weights in memory: {report.dense_bytes / 1e6:.1f} MB dense, {report.packed_bytes / 1e6:.1f} MB packed; "
        f"linears of the blocks: {report.dense_linear_bytes / 1e6:.1f} and {report.packed_linear_bytes / 1e6:.1f} MB"
    )
    out_console.print(
        f"small batches: {report.kernel} · activations {report.dtype}, dense weights {report.dense_dtype}"
    )
    for line in report.verdict:
        out_console.print(line, markup=False, soft_wrap=True)


def main() -> None:
    """The command line. A mistake of the user's ends in one line on stderr and exit code 2, never a traceback."""
    code = _run()
    if _processes() > 1:
        # What a failure leaves of the group has threads that nobody joins: on the interpreter's ordinary way out one of
        # them now and then aborts the process ("terminate called without an active exception").
        sys.stdout.flush()
        sys.stderr.flush()
        if code:
            from sparsellm import parallel

            parallel.await_other_failures()
        os._exit(code)
    if code:
        sys.exit(code)


def _run() -> int:
    """Runs the command line; the exit code."""
    _quiet_libraries()
    try:
        with _joined():
            app(standalone_mode=False)
        return 0
    except SparseLLMError as error:
        _say_why(f"error: {error}")
        return 2
    except typer.Exit as done:
        return done.exit_code
    except (KeyboardInterrupt, typer.Abort):
        _say_why("interrupted; the same command goes on where this one was")
        return 130
    except Exception as error:
        if hasattr(error, "format_message"):  # click's own errors: a missing argument, an unknown option
            _say_why(f"error: {error.format_message()}")
            return 2
        if _processes() == 1:
            raise
        _say_why(f"unexpected {type(error).__name__}")
        traceback.print_exc()
        return 1


def _processes() -> int:
    """How many torchrun started; without it, torch need not be imported to know."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return 1
    from sparsellm import parallel

    return parallel.launched()


@contextmanager
def _joined() -> Iterator[None]:
    if _processes() == 1:
        yield
        return
    from sparsellm import parallel

    with parallel.session():
        yield


def _say_why(line: str) -> None:
    """Of processes that fail together, the first says why."""
    if _processes() > 1:
        from sparsellm import parallel

        if not parallel.claims_failure():
            return
        line = f"process {parallel.rank()} of {parallel.launched()}: {line}"
    log_console.print(line, markup=False, soft_wrap=True)


def _quiet_libraries() -> None:
    """Libraries' own bars and warnings would tear ours, and stdout belongs to the result."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


@contextmanager
def _bar() -> Iterator[ProgressCallback]:
    from sparsellm import parallel
    from sparsellm.progress import NOTE, ignore
    from sparsellm.progress import Progress as Event

    columns = (
        TextColumn("{task.description:<12}"),
        BarColumn(),
        TextColumn("{task.fields[detail]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(elapsed_when_finished=False),
    )
    tasks: dict[str, Any] = {}
    if not parallel.is_main():
        yield ignore
        return
    with Progress(*columns, console=log_console, transient=not log_console.is_terminal) as bar:

        def show(event: Event) -> None:
            if event.phase == NOTE:
                log_console.print(event.detail, markup=False, soft_wrap=True)
                return
            if event.phase not in tasks:
                tasks[event.phase] = bar.add_task(event.phase, detail="")
            bar.update(tasks[event.phase], completed=event.done, total=event.total, detail=event.detail)

        yield show


def _print_json(content: Any) -> None:
    sys.stdout.write(json.dumps(content, ensure_ascii=False) + "\n")


def _described(entry: Entry[Any]) -> dict[str, Any]:
    return {
        "summary": entry.summary,
        "paper": entry.paper,
        "options": {
            option.name: {"type": option.type_name, "default": option.default, "description": option.description}
            for option in entry.options.values()
        },
    }


def _share(linears: list[Any]) -> float:
    return float(sum(x.zeros for x in linears) / sum(x.shape[0] * x.shape[1] for x in linears))


def _print_pruned(result: PruneResult) -> None:
    allocation = result.allocation.get("name")
    spread = () if allocation is None else ("least", "most")  # of one linear
    table = Table("kind of linear", "weights", "zeros", "sparsity", *spread, "mean error", title="Pruned")
    kinds: dict[str, list[Any]] = {}
    for linear in result.linears:
        kinds.setdefault(linear.name.rpartition(".")[2], []).append(linear)
    for kind, part in kinds.items():
        weights = sum(x.shape[0] * x.shape[1] for x in part)
        error = sum(x.error for x in part) / len(part)
        shares = [_share([linear]) for linear in part]
        ends = () if allocation is None else (f"{min(shares):.1%}", f"{max(shares):.1%}")
        zeros = sum(x.zeros for x in part)
        table.add_row(kind, f"{weights:,}", f"{zeros:,}", f"{_share(part):.2%}", *ends, f"{error:.4f}")
    table.add_section()
    table.add_row("all", f"{result.weights:,}", f"{result.zeros:,}", f"{result.sparsity:.2%}", style="bold")
    out_console.print(table)
    for linear in result.linears:
        for note in linear.notes:
            log_console.print(f"note: {linear.name}: {note}", markup=False)
    phases = ", ".join(f"{name} {value:.1f}" for name, value in result.seconds.items())
    out_console.print(f"seconds: {phases}")
    out_console.print(
        f"{_recipe_line(result.recipe, allocation)} · {result.calibration_tokens} calibration tokens · "
        f"peak memory {result.peak_rss / 1e9:.2f} GB"
    )
    out_console.print(f"written to {result.path}", soft_wrap=True)


def _recipe_line(recipe: Recipe, allocation: str | None) -> str:
    wanted = recipe.pattern or f"{recipe.sparsity:.0%}"
    shares = f" by {allocation}" if allocation is not None else ""
    return f"{recipe.method} {wanted}{shares} · calibrated on {recipe.calibration} {recipe.samples}×{recipe.seq_len}"
