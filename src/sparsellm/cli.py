"""The commands: each parses its options, calls :mod:`sparsellm.api` or :mod:`sparsellm.runtime`, and prints."""

from __future__ import annotations

import io
import itertools
import logging
import os
import signal
import sys
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from sparsellm import __version__, interrupts
from sparsellm.errors import RecipeError, SparseLLMError
from sparsellm.storage.remains import kept_by_prune

if TYPE_CHECKING:
    from sparsellm.registry import Entry

PROGRAM = "sparsellm"

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="Prune Hugging Face language models after training, globally, and make the sparsity pay.",
)

_kept: Callable[[], tuple[str, bool]] | None = None  # describes the files of a stopped command


def _default(text: str) -> str:
    """The default of an option that the recipe sets, in typer's style; the bracket is escaped, as it is no markup."""
    return f" [dim]\\[default: {text}][/dim]"


def _one_of(*values: str) -> Callable[[], list[str]]:
    """The values with which a shell completes an option."""
    return lambda: list(values)


WHAT, CALIBRATION, RESOURCES, OUTPUT = "What to prune", "Calibration", "Resources", "Output"
DTYPES = ("auto", "float32", "bfloat16", "float16")
VALUES = ("keep", "bf16", "fp16", "fp32", "int8", "int4")
SOURCES = ("pydoc", "self", "wikitext2", "ptb", "c4", "hub:")

ModelArgument = Annotated[
    str,
    typer.Argument(
        metavar="MODEL", help="Checkpoint directory, hub id, .gguf file, or 'demo'.", rich_help_panel="Model"
    ),
]
JsonOption = Annotated[
    bool,
    typer.Option("--json", help="Print one JSON object on stdout, and nothing else there.", rich_help_panel=OUTPUT),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME", help=f"cpu, cuda, cuda:1 or mps.{_default('a GPU if there is one')}", rich_help_panel=RESOURCES
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"Dtype in which blocks compute: float32, bfloat16 or float16.{_default('as the weights are stored')}",
        autocompletion=_one_of(*DTYPES),
        rich_help_panel=RESOURCES,
    ),
]
ActivationsOption = Annotated[
    str | None,
    typer.Option(
        metavar="TYPE",
        help="Activations of packed int8 and int4 weights: int8 (faster) or fp32 (exact)."
        f"{_default('SPARSELLM_ACTIVATIONS, else int8')}",
        autocompletion=_one_of("int8", "fp32"),
        rich_help_panel=RESOURCES,
    ),
]
ThreadsOption = Annotated[
    int | None,
    typer.Option(metavar="N", help=f"CPU threads.{_default('as torch chooses')}", rich_help_panel=RESOURCES),
]
TrustOption = Annotated[
    bool,
    typer.Option(
        "--trust-remote-code", help="Run modelling code that comes with the checkpoint.", rich_help_panel=RESOURCES
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", help="Replace the checkpoint in DIR.", rich_help_panel=OUTPUT)
]
PluginOption = Annotated[
    list[str] | None,
    typer.Option(
        "--plugin",
        metavar="FILE|MODULE",
        help="Python code that registers solvers, allocations or methods. It is run. Repeatable.",
        rich_help_panel=WHAT,
    ),
]


def _show_version(wanted: bool) -> None:
    if wanted:
        sys.stdout.write(f"{PROGRAM} {__version__}\n")
        raise typer.Exit()


@app.callback()
def _begin(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    if _processes() > 1 and context.invoked_subcommand != "prune":
        raise RecipeError(f"'sparsellm {context.invoked_subcommand}' runs in one process; start it without torchrun")


@app.command(
    epilog="Examples:\n\n"
    "  sparsellm prune path/to/model --out pruned --sparsity 0.5 --calibration my-text.txt\n\n"
    "  sparsellm prune path/to/model --out pruned --pattern 2:4 --effort 2\n\n"
    "  sparsellm prune demo --out pruned --method wanda --samples 32 --seq-len 512"
)
def prune(  # noqa: PLR0913 - a command
    model: ModelArgument,
    *,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"How weights are chosen; `sparsellm methods` lists all.{_default('sparsellm')}",
            rich_help_panel=WHAT,
        ),
    ] = None,
    sparsity: Annotated[
        float | None,
        typer.Option(
            metavar="SHARE",
            help=f"Fraction of zeros, from 0 up to, not including, 1.{_default('0.7')}",
            rich_help_panel=WHAT,
        ),
    ] = None,
    pattern: Annotated[
        str | None,
        typer.Option(metavar="N:M", help="Keep N of every M consecutive inputs, such as 2:4.", rich_help_panel=WHAT),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How the zeros are divided among blocks and linears; `sparsellm methods` lists all."
            f"{_default('threshold with sparsellm, else uniform')}",
            rich_help_panel=WHAT,
        ),
    ] = None,
    effort: Annotated[
        int | None,
        typer.Option(
            metavar="0-3",
            help="Sweeps of the whole model at the end, for method sparsellm: 0 none, 1 one, 2 three, 3 eight. More "
            f"sweeps take longer and lose less.{_default('1')}",
            rich_help_panel=WHAT,
        ),
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="SOURCE",
            help="Text: a .txt, .jsonl or .parquet file, wikitext2, ptb, c4, hub:OWNER/NAME, self (the model writes "
            f"it), or pydoc (Python's documentation).{_default('pydoc')}",
            autocompletion=_one_of(*SOURCES),
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    samples: Annotated[
        int | None,
        typer.Option(metavar="N", help=f"Calibration windows.{_default('128')}", rich_help_panel=CALIBRATION),
    ] = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Tokens in a window.{_default('2048, or the limit of the model')}",
            rich_help_panel=CALIBRATION,
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(metavar="N", help=f"Seed of all random choices.{_default('0')}", rich_help_panel=CALIBRATION),
    ] = None,
    memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Most memory of the run, such as 4GiB; hidden states beyond it go to disk."
            f"{_default('80 % of the free memory')}",
            rich_help_panel=RESOURCES,
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    recipe: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="A recipe in YAML; options given here override it.", rich_help_panel=WHAT),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any field of the recipe, options.NAME or allocation_options.NAME. Repeatable.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    plugin: PluginOption = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory of the pruned checkpoint.", rich_help_panel=OUTPUT)
    ],
    overwrite: OverwriteOption = False,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            help="Start from block 1, even if an unfinished run could be resumed.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    quiet: Annotated[
        bool, typer.Option("--quiet", "-q", help="Print warnings and errors only.", rich_help_panel=OUTPUT)
    ] = False,
    verbose: Annotated[
        bool,
        typer.Option("--verbose", "-v", help="Print every step, and the time of every phase.", rich_help_panel=OUTPUT),
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Prune MODEL and save a checkpoint that plain transformers loads.

    If the run is stopped, the same command resumes it. Processes started by torchrun share the work.
    """
    global _kept
    if quiet and verbose:
        raise RecipeError("--quiet and --verbose contradict each other; give one of them")
    _kept = partial(kept_by_prune, out, time.time())
    from sparsellm import api, console, parallel, tables
    from sparsellm.recipe import Recipe

    printed = _load_plugins(plugin)
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
    with console.progress(quiet=quiet or not parallel.is_main(), verbose=verbose) as progress:
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
    tables.print_warnings(result, printed)
    if as_json:
        console.write_json(result.to_dict())
    elif not quiet:
        tables.print_pruned(result, verbose=verbose)


def _load_plugins(named: list[str] | None) -> list[str]:
    """Loads the named plugins, then those of installed packages; prints and returns the failures of the latter."""
    from sparsellm import console, parallel, plugins

    for each in named or []:
        plugins.load_plugin(each)
    failures = plugins.load_installed()
    for failure in failures if parallel.is_main() else []:
        console.say(f"note: {failure}", error=True)
    return failures


@app.command("eval")
def evaluate(
    model: ModelArgument,
    text: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="As --calibration of prune; for pydoc, the part that is never used for calibration.",
            autocompletion=_one_of(*SOURCES),
        ),
    ],
    seq_len: Annotated[
        int | None,
        typer.Option(metavar="N", help=f"Tokens in a window.{_default('2048, or the limit of the model')}"),
    ] = None,
    max_tokens: Annotated[
        int | None, typer.Option(metavar="N", help=f"Most tokens of the text to use.{_default('all')}")
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the perplexity of MODEL on a text, by the protocol of the papers."""
    from sparsellm import api, console
    from sparsellm.progress import PhaseClock

    clock = PhaseClock()
    with console.progress() as progress, clock.phase("evaluate"):
        result = api.evaluate(
            model,
            text,
            seq_len=seq_len,
            max_tokens=max_tokens,
            device="auto" if device is None else device,
            dtype="auto" if dtype is None else dtype,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        console.write_json(
            {
                "perplexity": result.value,
                "nll": result.nll,
                "tokens_scored": result.tokens,
                "window": result.window,
                "model": model,
                "text": text,
                "seconds": clock.seconds,
                "peak_rss_bytes": api.peak_rss(),
                "versions": api.versions(),
            }
        )
    else:
        console.say(f"perplexity {result.value:.4f} · {result.tokens} tokens scored in windows of {result.window}")


@app.command()
def inspect(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint, pruned or not.")],
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Count the zeros of a checkpoint per matrix, per block, and in all, and check N:M."""
    from sparsellm import api, console, tables

    matrices = api.inspect(directory, trust_remote_code=trust_remote_code)
    blocks: dict[int, list[api.MatrixZeros]] = {}
    for matrix in matrices:
        blocks.setdefault(matrix.block, []).append(matrix)
    zeros = sum(matrix.zeros for matrix in matrices)
    weights = sum(matrix.weights for matrix in matrices)
    held = {matrix.pattern for matrix in matrices}
    common = str(held.pop()) if len(held) == 1 and None not in held else None
    if as_json:
        console.write_json(
            {
                "zeros": zeros,
                "weights": weights,
                "sparsity": zeros / weights,
                "pattern": common,
                "blocks": [
                    {"block": index, "sparsity": tables.share(part), "zeros": sum(matrix.zeros for matrix in part)}
                    for index, part in blocks.items()
                ],
                "linears": [matrix.to_dict() for matrix in matrices if matrix.linear],
                "others": [matrix.to_dict() for matrix in matrices if not matrix.linear],
            }
        )
        return
    tables.print_zeros(matrices, blocks, common)


@app.command()
def methods(plugin: PluginOption = None, as_json: JsonOption = False) -> None:
    """List the values of --method and --allocation, with options and papers."""
    from sparsellm import console, tables
    from sparsellm.allocation import ALLOCATIONS
    from sparsellm.methods import METHODS

    _load_plugins(plugin)
    if as_json:
        allocations = {entry.name: _described(entry) for entry in ALLOCATIONS}
        chosen = {entry.name: {**_described(entry), "allocation": entry.allocation} for entry in METHODS}
        console.write_json({**chosen, "allocations": allocations})
        return
    tables.print_choices("--method", METHODS, "options", allocations=True)
    tables.print_choices("--allocation", ALLOCATIONS, "allocation_options", allocations=False)


@app.command()
def demo(
    out: Annotated[
        Path | None, typer.Option(metavar="DIR", help=f"Directory of the pruned model.{_default('in the cache')}")
    ] = None,
    sparsity: Annotated[float, typer.Option(metavar="SHARE", help="Fraction of zeros.")] = 0.7,
    restart: Annotated[
        bool, typer.Option("--restart", help="Begin anew, even where an unfinished run could go on.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Prune a small real Llama, measure it before and after, save it, and show the result. Needs no hub."""
    global _kept
    from sparsellm import console, tables
    from sparsellm.demo import run_demo
    from sparsellm.sources.cache import cache_dir

    _kept = partial(kept_by_prune, out or cache_dir() / "demo-pruned", time.time())
    with console.progress() as progress:
        result = run_demo(out=out, sparsity=sparsity, restart=restart, progress=progress)
    if as_json:
        console.write_json(result.to_dict())
        return
    tables.print_demo(result)


@app.command()
def pack(
    model: ModelArgument,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the packed checkpoint.")],
    values: Annotated[
        str,
        typer.Option(
            metavar="TYPE",
            help="Type of the kept values: keep (the stored type, lossless), bf16, fp16, fp32, int8 or int4.",
            autocompletion=_one_of(*VALUES),
        ),
    ] = "keep",
    head: Annotated[
        str,
        typer.Option(
            metavar="TYPE",
            help="Embedding and output head: keep (as stored) or int8.",
            autocompletion=_one_of("keep", "int8"),
        ),
    ] = "keep",
    overwrite: OverwriteOption = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Remove the files that another unfinished run left for DIR.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Pack a pruned MODEL: store the kept values and a bit for each weight. It stays packed in memory too."""
    from sparsellm import console, tables
    from sparsellm.runtime import convert

    with console.progress() as progress:
        result = convert.pack(
            model, out=out, values=values, head=head, overwrite=overwrite, restart=restart, progress=progress
        )
    if as_json:
        console.write_json(result.to_dict())
        return
    tables.print_packed(result)


@app.command()
def unpack(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A packed checkpoint.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Directory of the dense checkpoint.")],
    overwrite: OverwriteOption = False,
    restart: Annotated[
        bool, typer.Option("--restart", help="Remove the files that another unfinished run left for DIR.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write a packed checkpoint as an ordinary dense one."""
    from sparsellm import console
    from sparsellm.runtime import convert

    with console.progress() as progress:
        result = convert.unpack(directory, out=out, overwrite=overwrite, restart=restart, progress=progress)
    if as_json:
        console.write_json({"path": str(result.path), "checkpoint_bytes": result.checkpoint_bytes})
        return
    console.say(f"weight files: {result.checkpoint_bytes / 1e6:.1f} MB")
    console.say(f"written to {result.path}")


@app.command()
def generate(  # noqa: PLR0913 - a command
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint, packed or dense.")],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(metavar="N", help="Most tokens to generate.")] = 100,
    threads: ThreadsOption = None,
    temperature: Annotated[
        float, typer.Option(metavar="T", help="0 takes the likeliest token; above 0, tokens are sampled.")
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the sampling.")] = 0,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="cpu, cuda or cuda:1.", rich_help_panel=RESOURCES)
    ] = "cpu",
    dtype: DtypeOption = None,
    activations: ActivationsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue PROMPT, token by token, and print the speed."""
    from sparsellm import console
    from sparsellm.arguments import check_arguments
    from sparsellm.chain.open import load_tokenizer
    from sparsellm.runtime.generate import generate as continue_prompt
    from sparsellm.runtime.load import load
    from sparsellm.runtime.threads import use_threads

    use_threads(threads)
    check_arguments(prompt=prompt, max_new_tokens=max_new_tokens, temperature=temperature, seed=seed)
    model = load(directory, device=device, dtype="auto" if dtype is None else dtype, activations=activations)
    tokenizer = load_tokenizer(Path(directory).expanduser())
    pieces = itertools.chain([prompt], itertools.repeat(""))  # the prompt goes before the first piece, once

    def show(text: str) -> None:
        console.out().print(next(pieces) + text, end="", soft_wrap=True)

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
        console.write_json(result.to_dict())
        return
    console.out().print(next(pieces), soft_wrap=True)  # ends the line
    console.say(
        f"{result.tokens_per_second:.1f} tokens/s · {result.new_tokens} tokens after a prompt of "
        f"{result.prompt_tokens}, read in {result.prefill_seconds:.2f} s · threads: {result.threads}",
        error=True,
    )


@app.command()
def bench(  # noqa: PLR0913 - a command
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A packed checkpoint.")],
    dense: Annotated[
        str | None,
        typer.Option(metavar="DIR", help=f"A dense checkpoint to compare with.{_default('the packed one, unpacked')}"),
    ] = None,
    batch: Annotated[
        list[int] | None, typer.Option(metavar="N", help=f"Sequences decoded at once. Repeatable.{_default('1')}")
    ] = None,
    threads: Annotated[
        list[int] | None, typer.Option(metavar="N", help=f"CPU threads. Repeatable.{_default('as torch chooses')}")
    ] = None,
    prompt_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens read before decoding.")] = 128,
    new_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens decoded.")] = 32,
    repeats: Annotated[int, typer.Option(metavar="N", help="Rounds; the median is shown.")] = 5,
    device: Annotated[
        str, typer.Option(metavar="NAME", help="cpu, cuda or cuda:1.", rich_help_panel=RESOURCES)
    ] = "cpu",
    dtype: DtypeOption = None,
    activations: ActivationsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare speed and memory of a packed checkpoint and a dense one, which take turns on this machine."""
    from sparsellm import console, tables
    from sparsellm.runtime.bench import compare

    with console.progress() as progress:
        report = compare(
            directory,
            dense,
            batches=batch or [1],
            threads=threads,
            prompt_tokens=prompt_tokens,
            new_tokens=new_tokens,
            repeats=repeats,
            device=device,
            dtype="auto" if dtype is None else dtype,
            activations=activations,
            progress=progress,
        )
    if as_json:
        console.write_json(report.to_dict())
        return
    tables.print_speeds(report)


def main() -> None:
    """Runs the command line. A user's mistake prints one line on stderr and exits with code 2, without a traceback."""
    global _kept
    _kept = None
    code = _run()
    if _processes() > 1:
        _leave_the_others(code)
    _drop_what_cannot_be_written(sys.stderr, *([sys.stdout] if interrupts.received() is not None else []))
    if code:
        sys.exit(code)


def _run() -> int:
    """Runs the command line and returns the exit code."""
    _quiet_libraries()
    try:
        with interrupts.installed(_stop_slowly):
            return _called()
    except interrupts.Interrupted as stopped:
        return _interrupted(stopped.signum)


def _called() -> int:
    """The exit code of the command, or of its error."""
    _tolerate_any_text()
    try:
        with _joined():
            returned = app(prog_name=PROGRAM, standalone_mode=False)
        return returned if isinstance(returned, int) else 0
    except typer.Exit as done:
        return done.exit_code
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted(signal.SIGINT)
    except Exception as error:
        interrupts.check()  # the error may follow from a signal, which has ended another process for example
        if isinstance(error, SparseLLMError):
            _say_why(f"error: {error}")
            return 2
        if hasattr(error, "format_message"):  # click's own errors: a missing argument, an unknown option
            if message := error.format_message():  # empty if the help was shown instead
                _say_why(f"error: {message}")
            return 2
        if _processes() == 1:
            raise
        _say_why(f"unexpected {type(error).__name__}")
        traceback.print_exc()
        return 1


def _interrupted(signum: int) -> int:
    """Prints which files are kept and which command resumes the run; returns the exit code."""
    _say_why(interrupts.last_words(signum, _kept))
    return interrupts.exit_code(signum)


def _stop_slowly(signum: int) -> None:
    """Called when the current step has not ended some time after a signal.

    A single process prints a note and lets the step end. With several processes, the step may wait for others that have
    stopped, so the process ends here. Its files are complete at any moment.
    """
    if _processes() == 1:
        from sparsellm import console

        console.say("stopping when this step is done; a second signal stops at once", error=True)
        return
    _leave_the_others(_interrupted(signum))


def _leave_the_others(code: int) -> None:
    """Ends a process that torchrun started, without the interpreter's usual shutdown.

    After a failure, the process group has threads that are not joined. During a usual shutdown one of them sometimes
    aborts the process ("terminate called without an active exception").
    """
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    if code:
        from sparsellm import parallel

        parallel.await_other_failures()
    os._exit(code)


def _drop_what_cannot_be_written(*streams: TextIO) -> None:
    """Discards output for a closed terminal or pipe, so that the last flush does not fail and change the exit code."""
    for stream in streams:
        try:
            stream.flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _processes() -> int:
    """The number of processes that torchrun started; does not import torch if there is only one."""
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
    """Prints an error line; if several processes fail, only the first does."""
    from sparsellm import console

    if _processes() > 1:
        from sparsellm import parallel

        if not parallel.claims_failure():
            return
        line = f"process {parallel.rank()} of {parallel.launched()}: {line}"
    console.say(line, error=True)


def _quiet_libraries() -> None:
    """Silences bars and warnings of libraries, which would break our progress bars or mix with results on stdout."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)


def _tolerate_any_text() -> None:
    """Makes stdout and stderr write characters that their encoding lacks as escapes, instead of failing."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _described(entry: Entry[Any]) -> dict[str, Any]:
    return {
        "summary": entry.summary,
        "paper": entry.paper,
        "options": {
            option.name: {"type": option.type_name, "default": option.default, "description": option.description}
            for option in entry.options.values()
        },
    }
