"""The commands: each parses its options, calls :mod:`sparsellm.api` or :mod:`sparsepack`, and prints."""

from __future__ import annotations

import io
import itertools
import logging
import os
import re
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
from sparsellm.errors import RecipeError, SparseLLMError, shown
from sparsellm.storage.remains import kept_by_compare, kept_by_prune

if TYPE_CHECKING:
    from sparsellm.recipe import Recipe
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


def _examples(*commands: str) -> str:
    """The end of a help text: commands as users type them."""
    return "\n\n".join(("Examples:", *(f"  {command}" for command in commands)))


def _registered(*packages: str) -> Callable[[], list[str]]:
    """The names that the modules of packages register, read from their text: a shell cannot wait for torch."""

    def names() -> list[str]:
        modules = [path for package in packages for path in sorted((Path(__file__).parent / package).glob("*.py"))]
        found = [re.findall(r'\.register\(\s*"([^"]+)"', path.read_text(encoding="utf-8")) for path in modules]
        return [name for each in found for name in each]

    return names


MODEL, TEXT, WHAT, MEASURE = "Model", "Text", "What to prune", "Measurement"
CALIBRATION, RESOURCES, OUTPUT = "Calibration", "Resources", "Output"
FLAG = ""  # typer shows the type of an option without a metavar, even where no value follows
DTYPES = ("auto", "float32", "bfloat16", "float16")
DEVICES = ("cpu", "cuda", "mps", "auto")
VALUES = ("keep", "bf16", "fp16", "fp32", "int8", "int4", "int3")
SOURCES = ("pydoc", "self", "wikitext2", "ptb", "c4", "hub:")
BOS = ("auto", "yes", "no")
BOS_HELP = (
    "Whether every window begins with the tokenizer's beginning-of-text token: auto (where the tokenizer adds it by "
    f"itself), yes, or no (windows cut anywhere, as in the papers).{_default('auto')}"
)

ModelArgument = Annotated[
    str,
    typer.Argument(metavar="MODEL", help="Checkpoint directory, hub id, .gguf file, or 'demo'.", rich_help_panel=MODEL),
]
JsonOption = Annotated[
    bool,
    typer.Option(
        "--json", metavar=FLAG, help="Print one JSON object on stdout, and nothing else there.", rich_help_panel=OUTPUT
    ),
]
QuietOption = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", metavar=FLAG, help="Print no progress, only the result and errors.", rich_help_panel=OUTPUT
    ),
]
VerboseOption = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", metavar=FLAG, help="Print every step, and the time of every phase.", rich_help_panel=OUTPUT
    ),
]
DeviceOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help=f"cpu, cuda, cuda:1 or mps.{_default('a GPU if there is one')}",
        autocompletion=_one_of(*DEVICES),
        rich_help_panel=RESOURCES,
    ),
]
DtypeOption = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Dtype in which blocks compute: float32, bfloat16 or float16."
        + _default("as the weights are stored, or float32 where a CPU does not multiply in that"),
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
        "--trust-remote-code",
        metavar=FLAG,
        help="Run modelling code that comes with the checkpoint.",
        rich_help_panel=RESOURCES,
    ),
]
SaveOption = Annotated[
    bool,
    typer.Option(
        "--save/--no-save",
        metavar=FLAG,
        help="Append the result to results.json in a directory that sparsellm wrote.",
        rich_help_panel=OUTPUT,
    ),
]
OverwriteOption = Annotated[
    bool, typer.Option("--overwrite", metavar=FLAG, help="Replace the checkpoint in DIR.", rich_help_panel=OUTPUT)
]
CleanOption = Annotated[
    bool,
    typer.Option(
        "--restart",
        metavar=FLAG,
        help="Remove the files that another unfinished run left for DIR.",
        rich_help_panel=OUTPUT,
    ),
]
RunningDeviceOption = Annotated[
    str,
    typer.Option(
        metavar="NAME", help="cpu, cuda or cuda:1.", autocompletion=_one_of(*DEVICES), rich_help_panel=RESOURCES
    ),
]
CalibrationOption = Annotated[
    str | None,
    typer.Option(
        metavar="SOURCE",
        help="Text: a .txt, .jsonl or .parquet file, wikitext2, ptb, c4, hub:OWNER/NAME, self (the model writes "
        f"it), or pydoc (Python's documentation).{_default('pydoc')}",
        autocompletion=_one_of(*SOURCES),
        rich_help_panel=CALIBRATION,
    ),
]
RecipeOption = Annotated[
    Path | None,
    typer.Option(metavar="FILE", help="A recipe in YAML; options given here override it.", rich_help_panel=WHAT),
]
SettingsOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Any field of the recipe, options.NAME, allocation_options.NAME or sparsity_of.GLOB. Repeatable.",
        rich_help_panel=WHAT,
    ),
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
        from sparsepack.compiled import kernels

        sys.stdout.write(f"{PROGRAM} {__version__}\nkernels: {kernels()}\n")
        raise typer.Exit()


@app.callback()
def _begin(
    context: typer.Context,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            metavar=FLAG,
            help="Show the version and the compiled kernels, and exit.",
            callback=_show_version,
            is_eager=True,
        ),
    ] = False,
) -> None:
    if _processes() > 1 and context.invoked_subcommand != "prune":
        raise RecipeError(f"'sparsellm {context.invoked_subcommand}' runs in one process; start it without torchrun")


@app.command(
    epilog=_examples(
        "sparsellm prune path/to/model --out pruned --sparsity 0.5 --calibration my-text.txt",
        "sparsellm prune path/to/model --out pruned --pattern 2:4 --effort 2",
        "sparsellm prune demo --out pruned --method wanda --samples 32 --seq-len 512",
    )
)
def prune(  # noqa: PLR0913 - a command
    model: ModelArgument,
    *,
    method: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help=f"How weights are chosen; `sparsellm methods` lists all.{_default('sparsellm')}",
            autocompletion=_registered("methods", "solvers"),
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
        typer.Option(
            metavar="N:M",
            help="Keep N of every M consecutive inputs, such as 2:4. With auto:8, the allocation chooses an N of 8 for "
            "each linear, and --sparsity is reached.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    values: Annotated[
        str | None,
        typer.Option(
            metavar="TYPE",
            help="Round kept values while pruning, to int8, int4 or int3; `sparsellm pack --values` then stores them "
            f"without loss.{_default('keep')}",
            autocompletion=_one_of("keep", "int8", "int4", "int3"),
            rich_help_panel=WHAT,
        ),
    ] = None,
    allocation: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="How the zeros are divided among blocks and linears; `sparsellm methods` lists all."
            f"{_default('threshold with sparsellm, else uniform')}",
            autocompletion=_registered("allocation"),
            rich_help_panel=WHAT,
        ),
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(
            "--only",
            metavar="GLOB",
            help="Prune these linears alone, such as '*.mlp.*'; all others stay dense. Repeatable.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    skip: Annotated[
        list[str] | None,
        typer.Option(
            "--skip",
            metavar="GLOB",
            help="Leave these dense, such as '*.down_proj': the recipe's field `exclude`. Repeatable.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    sparsity_of: Annotated[
        list[str] | None,
        typer.Option(
            "--sparsity-of",
            metavar="GLOB=SHARE",
            help="The sparsity of some linears, such as '*.down_proj=0.6'; the others make up for it, so that "
            "--sparsity is reached. The last one that matches counts. Repeatable.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    allow_dense: Annotated[
        list[str] | None,
        typer.Option(
            metavar="GLOB",
            help="Parameters that no linear owns and that may stay dense, such as '*.conv1d'. Repeatable.",
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
    calibration: CalibrationOption = None,
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
    bos: Annotated[
        str | None,
        typer.Option(metavar="WHEN", help=BOS_HELP, autocompletion=_one_of(*BOS), rich_help_panel=CALIBRATION),
    ] = None,
    min_tokens_per_expert: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Warn of experts that fewer calibration tokens are routed to.{_default('1')}",
            rich_help_panel=CALIBRATION,
        ),
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
    recipe: RecipeOption = None,
    settings: SettingsOption = None,
    plugin: PluginOption = None,
    teacher: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The dense model, if MODEL was pruned from it already: sweeps follow its predictions.",
            rich_help_panel=WHAT,
        ),
    ] = None,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory of the pruned checkpoint.", rich_help_panel=OUTPUT)
    ],
    overwrite: OverwriteOption = False,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            metavar=FLAG,
            help="Start from block 1, even if an unfinished run could be resumed.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", metavar=FLAG, help="Print warnings and errors only.", rich_help_panel=OUTPUT),
    ] = False,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Prune MODEL and save a checkpoint that plain transformers loads.

    If the run is stopped, the same command resumes it. Processes started by torchrun share the work.
    """
    global _kept
    _kept = partial(kept_by_prune, out, time.time())
    from sparsellm import api, console, parallel, tables

    printed = _load_plugins(plugin)
    given = {
        "method": method,
        "sparsity": sparsity,
        "pattern": pattern,
        "values": values,
        "allocation": allocation,
        "only": only or None,
        "exclude": skip or None,
        "allow_dense": allow_dense,
        "calibration": calibration,
        "samples": samples,
        "seq_len": seq_len,
        "seed": seed,
        "bos": bos,
        "min_tokens_per_expert": min_tokens_per_expert,
        "memory": memory,
        "device": device,
        "dtype": dtype,
        "effort": effort,
    }
    chosen = _recipe(recipe, given, [*_as_settings(sparsity_of), *(settings or [])])
    with console.progress(quiet=quiet or not parallel.is_main(), verbose=verbose) as progress:
        result = api.prune(
            model,
            chosen,
            teacher=teacher,
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


def _recipe(file: Path | None, given: dict[str, Any], settings: list[str]) -> Recipe:
    """The recipe of a file, or the default one; then with the fields that are not None, then with settings."""
    from sparsellm.recipe import Recipe

    chosen = Recipe.from_yaml(file) if file is not None else Recipe()
    return chosen.updated(**{name: value for name, value in given.items() if value is not None}).with_settings(settings)


def _as_settings(sparsity_of: list[str] | None) -> list[str]:
    """The values of --sparsity-of as settings of the recipe's field."""
    for each in sparsity_of or []:
        if not each.partition("=")[0].strip() or "=" not in each:
            raise RecipeError(f"--sparsity-of is {shown(each)}; write GLOB=SHARE, such as '*.down_proj=0.6'")
    return [f"sparsity_of.{each}" for each in sparsity_of or []]


def _load_plugins(named: list[str] | None) -> list[str]:
    """Loads the named plugins, then those of installed packages; prints and returns the failures of the latter."""
    from sparsellm import console, parallel, plugins

    for each in named or []:
        plugins.load_plugin(each)
    failures = plugins.load_installed()
    for failure in failures if parallel.is_main() else []:
        console.say(f"note: {failure}", error=True)
    return failures


@app.command(
    "eval",
    epilog=_examples(
        "sparsellm eval pruned --text my-text.txt",
        "sparsellm eval demo --text pydoc --seq-len 512 --max-tokens 4096",
        "sparsellm eval pruned --text pydoc --against path/to/model",
    ),
)
def evaluate(  # noqa: PLR0913 - a command
    model: ModelArgument,
    text: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="As --calibration of prune; for pydoc, the part that is never used for calibration.",
            autocompletion=_one_of(*SOURCES),
            rich_help_panel=TEXT,
        ),
    ],
    seq_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Tokens in a window.{_default('2048, or the limit of the model')}",
            rich_help_panel=TEXT,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help=f"Most tokens of the text to use.{_default('all')}", rich_help_panel=TEXT),
    ] = None,
    bos: Annotated[
        str | None, typer.Option(metavar="WHEN", help=BOS_HELP, autocompletion=_one_of(*BOS), rich_help_panel=TEXT)
    ] = None,
    against: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL",
            help="The dense model to compare with: KL divergence, same first choices, recovery.",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    tasks: Annotated[
        str | None,
        typer.Option(
            metavar="A,B",
            help="Tasks of lm-eval to run on the whole model (needs sparsellm\\[eval]).",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    tasks_dir: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR", help="Directory with further tasks, in lm-eval's YAML files.", rich_help_panel=MEASURE
        ),
    ] = None,
    device: DeviceOption = None,
    dtype: DtypeOption = None,
    trust_remote_code: TrustOption = False,
    save: SaveOption = True,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Measure the perplexity of MODEL on a text, its divergence from a dense model, and tasks of lm-eval."""
    from sparsellm import api, console, tables
    from sparsellm.progress import PhaseClock
    from sparsellm.storage import results

    keeps = _keeps(model, save=save and model != "demo")  # no directory of that name is meant
    clock = PhaseClock()
    with console.progress(quiet=quiet, verbose=verbose) as progress, clock.phase("evaluate"):
        result = api.evaluate(
            model,
            text,
            seq_len=seq_len,
            max_tokens=max_tokens,
            bos="auto" if bos is None else bos,  # type: ignore[arg-type]  # it is checked there
            against=against,
            tasks=None if tasks is None else [name.strip() for name in tasks.split(",")],
            tasks_dir=tasks_dir,
            device="auto" if device is None else device,
            dtype="auto" if dtype is None else dtype,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    saved = results.append_result(keeps, "evaluations", result.to_dict()) if keeps is not None else None
    if as_json:
        console.write_json(
            {
                **result.to_dict(),
                "perplexity": result.value,
                "interval": [result.low, result.high],
                "nll": result.nll,
                "tokens_scored": result.tokens,
                "window": result.window,
                "model": model,
                "text": text,
                "results": None if saved is None else str(saved),
                "seconds": clock.seconds,
                "peak_rss_bytes": api.peak_rss(),
                "versions": api.versions(),
            }
        )
        return
    tables.print_evaluation(result)
    if saved is not None:
        console.say(f"results in {saved}")


def _keeps(directory: str, *, save: bool) -> Path | None:
    """The directory that keeps the results, checked before the work; None if they are not to be kept."""
    from sparsellm.storage import results

    with suppress(OSError, RuntimeError, ValueError):  # what cannot be a path is refused as a model
        place = Path(directory).expanduser()
        if save and results.keeps_results(place):
            results.check_results(place)
            return place
    return None


@app.command(epilog=_examples("sparsellm inspect pruned"))
def inspect(
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="A checkpoint, pruned or not.", rich_help_panel=MODEL)
    ],
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Count the zeros of a checkpoint per matrix, per block, and in all, and check N:M."""
    from sparsellm import api, console, tables
    from sparsellm.patterns import common, listed

    matrices = api.inspect(directory, trust_remote_code=trust_remote_code)
    blocks: dict[int, list[api.MatrixZeros]] = {}
    for matrix in matrices:
        blocks.setdefault(matrix.block, []).append(matrix)
    zeros = sum(matrix.zeros for matrix in matrices)
    weights = sum(matrix.weights for matrix in matrices)
    held = listed(common(matrix.patterns for matrix in matrices))
    if as_json:
        console.write_json(
            {
                "zeros": zeros,
                "weights": weights,
                "sparsity": zeros / weights,
                "pattern": held,
                "blocks": [
                    {"block": index, "sparsity": tables.share(part), "zeros": sum(matrix.zeros for matrix in part)}
                    for index, part in blocks.items()
                ],
                "linears": [matrix.to_dict() for matrix in matrices if matrix.linear],
                "others": [matrix.to_dict() for matrix in matrices if not matrix.linear],
            }
        )
        return
    tables.print_zeros(matrices, blocks, held)


@app.command(epilog=_examples("sparsellm report pruned", "sparsellm report a b c --out compare.html"))
def report(
    directories: Annotated[
        list[str], typer.Argument(metavar="DIR...", help="Pruned checkpoints: one, or several of one model to compare.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help=f"The HTML file.{_default('report.html in DIR; needed for several')}"),
    ] = None,
) -> None:
    """Write the report of a pruned checkpoint, or compare several, as one HTML file that loads nothing."""
    from sparsellm import console
    from sparsellm.report.comparison import write_comparison
    from sparsellm.report.document import write_report

    if len(directories) == 1:
        console.say(f"written to {write_report(directories[0], out)}")
        return
    if out is None:
        raise RecipeError(f"{len(directories)} runs are compared in a file of their own; give --out compare.html")
    console.say(f"written to {write_comparison(directories, out)}")


@app.command(
    epilog=_examples(
        "sparsellm compare demo --out grid --sparsity 0.5,0.7 --method wanda,sparsellm",
        "sparsellm compare demo --out grid --sparsity 0.5,0.6,0.7 --recover 0.9",
    )
)
def compare(  # noqa: PLR0913 - a command
    model: ModelArgument,
    out: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Directory of the comparison; an earlier one goes on.", rich_help_panel=OUTPUT
        ),
    ],
    text: Annotated[
        str,
        typer.Option(
            metavar="SOURCE",
            help="Text to measure on, as of eval.",
            autocompletion=_one_of(*SOURCES),
            rich_help_panel=MEASURE,
        ),
    ] = "pydoc",
    method: Annotated[
        str,
        typer.Option(metavar="NAMES", help="Methods, with commas.", rich_help_panel=WHAT),
    ] = "sparsellm",
    sparsity: Annotated[
        str | None,
        typer.Option(metavar="FRACTIONS", help="Sparsities, with commas: 0.5,0.7.", rich_help_panel=WHAT),
    ] = None,
    pattern: Annotated[
        str | None, typer.Option(metavar="N:M", help="Patterns, with commas: 2:4,4:8.", rich_help_panel=WHAT)
    ] = None,
    calibration: CalibrationOption = None,
    recipe: RecipeOption = None,
    settings: SettingsOption = None,
    seq_len: Annotated[
        int | None,
        typer.Option(
            metavar="N",
            help=f"Tokens in a window of --text.{_default('2048, or the limit of the model')}",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    max_tokens: Annotated[
        int | None,
        typer.Option(metavar="N", help=f"Most tokens of --text to use.{_default('all')}", rich_help_panel=MEASURE),
    ] = None,
    values: Annotated[
        str,
        typer.Option(
            metavar="TYPE",
            help="Values of the packed checkpoints, as of pack.",
            autocompletion=_one_of(*VALUES),
            rich_help_panel=MEASURE,
        ),
    ] = "keep",
    speed: Annotated[
        bool,
        typer.Option(
            "--speed",
            metavar=FLAG,
            help="Also measure how fast each packed model decodes.",
            rich_help_panel=MEASURE,
        ),
    ] = False,
    recover: Annotated[
        float | None,
        typer.Option(
            metavar="FRACTION",
            help="Recommend the smallest model with this recovery, such as 0.95.",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    max_bytes: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Recommend among packed models up to this size, such as 1GB.",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    log: Annotated[
        str | None,
        typer.Option(
            metavar="NAME", help="Log each run to trackio or wandb, if it is installed.", rich_help_panel=OUTPUT
        ),
    ] = None,
    plugin: PluginOption = None,
    trust_remote_code: TrustOption = False,
    as_json: JsonOption = False,
) -> None:
    """Prune MODEL by every method at every sparsity, and measure each against it.

    With --recover or --max-bytes it recommends one. The comparison is one job that the same command resumes. Each run
    is a checkpoint in DIR.
    """
    global _kept
    _kept = partial(kept_by_compare, out)
    from sparsellm import compare as grid
    from sparsellm import console, tables
    from sparsellm.inputs.sizes import parse_bytes

    _load_plugins(plugin)
    base = _recipe(recipe, {"calibration": calibration}, settings or [])
    cells = grid.cells_of(
        base, methods=_listed(method), sparsities=_fractions(sparsity), patterns=_listed(pattern or "")
    )
    if recover is not None and not 0 < recover <= 1:
        raise RecipeError(f"--recover is {recover}; it is a fraction above 0, up to 1, such as 0.95")
    limits = grid.Constraints(recover, parse_bytes(max_bytes) if max_bytes is not None else None)
    with console.progress() as progress:
        result = grid.compare(
            model,
            out=out,
            cells=cells,
            protocol=grid.Protocol(text, seq_len, max_tokens, values, speed),
            constraints=limits,
            log=log,
            trust_remote_code=trust_remote_code,
            progress=progress,
        )
    if as_json:
        console.write_json(result.to_dict())
    else:
        tables.print_grid(result, constrained=limits != grid.Constraints())


def _listed(text: str) -> list[str]:
    """The parts of a text with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


def _fractions(text: str | None) -> list[float]:
    try:
        return [float(part) for part in _listed(text or "")]
    except ValueError:
        raise RecipeError(f"--sparsity is {text!r}; give fractions with commas, such as 0.5,0.7") from None


@app.command(epilog=_examples("sparsellm methods", "sparsellm methods --plugin my_solver.py --json"))
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


@app.command(epilog=_examples("sparsellm demo", "sparsellm demo --sparsity 0.7 --out demo"))
def demo(
    sparsity: Annotated[
        float,
        typer.Option(metavar="SHARE", help="Fraction of zeros, from 0 up to, not including, 1.", rich_help_panel=WHAT),
    ] = 0.5,
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help=f"Directory of the checkpoints, DIR/pruned and DIR/packed.{_default('in the cache')}",
            rich_help_panel=OUTPUT,
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar=FLAG, help="Replace the checkpoints in DIR.", rich_help_panel=OUTPUT)
    ] = False,
    restart: Annotated[
        bool,
        typer.Option(
            "--restart",
            metavar=FLAG,
            help="Begin anew, even where an unfinished run could go on.",
            rich_help_panel=OUTPUT,
        ),
    ] = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Prune and pack a small real Llama, and show what it costs and what it saves. About five minutes, no hub."""
    global _kept
    from sparsellm import console, tables
    from sparsellm.demo import places, run_demo

    _kept = partial(kept_by_prune, places(out)[0], time.time())
    with console.progress(quiet=quiet, verbose=verbose) as progress:
        result = run_demo(out=out, sparsity=sparsity, overwrite=overwrite, restart=restart, progress=progress)
    if as_json:
        console.write_json(result.to_dict())
        return
    tables.print_demo(result, verbose=verbose)


@app.command(epilog=_examples("sparsellm pack pruned --out packed", "sparsellm pack pruned --out packed --values int8"))
def pack(  # noqa: PLR0913 - a command
    model: ModelArgument,
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory of the packed checkpoint.", rich_help_panel=OUTPUT)
    ],
    values: Annotated[
        str,
        typer.Option(
            metavar="TYPE",
            help="Type of the kept values: keep (the stored type, lossless), bf16, fp16, fp32, int8, int4 or int3.",
            autocompletion=_one_of(*VALUES),
            rich_help_panel="Values",
        ),
    ] = "keep",
    head: Annotated[
        str,
        typer.Option(
            metavar="TYPE",
            help="Embedding and output head: keep (as stored) or int8.",
            autocompletion=_one_of("keep", "int8"),
            rich_help_panel="Values",
        ),
    ] = "keep",
    overwrite: OverwriteOption = False,
    restart: CleanOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Pack a pruned MODEL: store the kept values and a bit for each weight. It stays packed in memory too."""
    from sparsellm import console, convert, tables

    with console.progress(quiet=quiet, verbose=verbose) as progress:
        result = convert.pack(
            model, out=out, values=values, head=head, overwrite=overwrite, restart=restart, progress=progress
        )
    if as_json:
        console.write_json(result.to_dict())
        return
    tables.print_packed(result)


@app.command(epilog=_examples("sparsellm unpack packed --out dense"))
def unpack(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A packed checkpoint.", rich_help_panel=MODEL)],
    out: Annotated[
        Path, typer.Option(metavar="DIR", help="Directory of the dense checkpoint.", rich_help_panel=OUTPUT)
    ],
    overwrite: OverwriteOption = False,
    restart: CleanOption = False,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    as_json: JsonOption = False,
) -> None:
    """Write a packed checkpoint as an ordinary dense one."""
    from sparsellm import console, convert

    with console.progress(quiet=quiet, verbose=verbose) as progress:
        result = convert.unpack(directory, out=out, overwrite=overwrite, restart=restart, progress=progress)
    if as_json:
        console.write_json({"path": str(result.path), "checkpoint_bytes": result.checkpoint_bytes})
        return
    console.say(f"weight files: {result.checkpoint_bytes / 1e6:.1f} MB")
    console.say(f"written to {result.path}")


@app.command(epilog=_examples("sparsellm eval pruned --text wikitext2", "sparsellm card pruned"))
def card(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint that prune wrote and eval measured.")],
    force: Annotated[
        bool, typer.Option("--force", metavar=FLAG, help="Replace a card that was edited.", rich_help_panel=OUTPUT)
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Write the model card (README.md) of DIR anew, with the results of its evaluations."""
    from sparsellm import api, console

    path = api.card(directory, force=force)
    if as_json:
        console.write_json({"path": str(path)})
        return
    console.say(f"written to {path}")


@app.command(
    epilog=_examples(
        "sparsellm push pruned me/my-model-50", "sparsellm push packed me/my-model-50 --revision packed --private"
    )
)
def push(
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A checkpoint.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="Repository of the hub: owner/name.")],
    private: Annotated[
        bool, typer.Option("--private", metavar=FLAG, help="Create a private repository.", rich_help_panel=OUTPUT)
    ] = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help=f"Branch.{_default('main')}", rich_help_panel=OUTPUT)
    ] = None,
    as_json: JsonOption = False,
) -> None:
    """Upload DIR to the Hugging Face hub, with the token of `hf auth login` or HF_TOKEN."""
    from sparsellm import api, console

    pushed = api.push(directory, repo, private=private, revision=revision)
    if as_json:
        console.write_json(pushed.to_dict())
        return
    if pushed.left_out:
        console.say(f"note: no part of the checkpoint and not uploaded: {', '.join(pushed.left_out)}", error=True)
    console.say(f"{len(pushed.files)} files, {pushed.bytes / 1e6:.1f} MB, uploaded to {pushed.url}")


@app.command(
    epilog=_examples(
        "sparsellm generate packed 'The capital of France is'",
        "sparsellm generate packed 'Once upon a time' --temperature 0.8 --max-new-tokens 200",
    )
)
def generate(  # noqa: PLR0913 - a command
    directory: Annotated[
        str, typer.Argument(metavar="DIR", help="A checkpoint, packed or dense.", rich_help_panel=MODEL)
    ],
    prompt: Annotated[str, typer.Argument(metavar="PROMPT", help="Text to continue.", rich_help_panel=MODEL)],
    max_new_tokens: Annotated[
        int, typer.Option(metavar="N", help="Most tokens to generate.", rich_help_panel=TEXT)
    ] = 100,
    threads: ThreadsOption = None,
    temperature: Annotated[
        float,
        typer.Option(
            metavar="T", help="0 takes the likeliest token; above 0, tokens are sampled.", rich_help_panel=TEXT
        ),
    ] = 0.0,
    seed: Annotated[int, typer.Option(metavar="N", help="Seed of the sampling.", rich_help_panel=TEXT)] = 0,
    device: RunningDeviceOption = "cpu",
    dtype: DtypeOption = None,
    quiet: Annotated[
        bool,
        typer.Option("--quiet", "-q", metavar=FLAG, help="Print the text without the speed.", rich_help_panel=OUTPUT),
    ] = False,
    activations: ActivationsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Continue PROMPT, token by token, and print the speed."""
    from sparsellm import console
    from sparsellm.arguments import check_arguments
    from sparsellm.chain.open import load_tokenizer
    from sparsepack.generation import generate as continue_prompt
    from sparsepack.loading import load
    from sparsepack.threads import use_threads

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
    if quiet:
        return
    console.say(
        f"{result.tokens_per_second:.1f} tokens/s · {result.new_tokens} tokens after a prompt of "
        f"{result.prompt_tokens}, read in {result.prefill_seconds:.2f} s · threads: {result.threads}",
        error=True,
    )


@app.command(epilog=_examples("sparsellm bench packed", "sparsellm bench packed --batch 1 --batch 8 --threads 2"))
def bench(  # noqa: PLR0913 - a command
    directory: Annotated[str, typer.Argument(metavar="DIR", help="A packed checkpoint.", rich_help_panel=MODEL)],
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="DIR",
            help=f"A dense checkpoint to compare with.{_default('the packed one, unpacked')}",
            rich_help_panel=MEASURE,
        ),
    ] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", help=f"Sequences decoded at once. Repeatable.{_default('1')}", rich_help_panel=MEASURE
        ),
    ] = None,
    threads: Annotated[
        list[int] | None,
        typer.Option(
            metavar="N", help=f"CPU threads. Repeatable.{_default('as torch chooses')}", rich_help_panel=RESOURCES
        ),
    ] = None,
    prompt_tokens: Annotated[
        int, typer.Option(metavar="N", help="Tokens read before decoding.", rich_help_panel=MEASURE)
    ] = 128,
    new_tokens: Annotated[int, typer.Option(metavar="N", help="Tokens decoded.", rich_help_panel=MEASURE)] = 32,
    repeats: Annotated[
        int, typer.Option(metavar="N", help="Rounds; the median is shown.", rich_help_panel=MEASURE)
    ] = 5,
    device: RunningDeviceOption = "cpu",
    dtype: DtypeOption = None,
    save: SaveOption = True,
    quiet: QuietOption = False,
    verbose: VerboseOption = False,
    activations: ActivationsOption = None,
    as_json: JsonOption = False,
) -> None:
    """Compare speed and memory of a packed checkpoint and a dense one, which take turns on this machine."""
    from sparsellm import console, tables
    from sparsellm.machine.devices import resolve_device
    from sparsellm.run.result import stamp
    from sparsellm.storage import results
    from sparsepack.bench import compare

    keeps = _keeps(directory, save=save)
    with console.progress(quiet=quiet, verbose=verbose) as progress:
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
    saved = None
    if keeps is not None:
        record: Any = {**report.to_dict(), **stamp(resolve_device(device))}
        saved = results.append_result(keeps, "benchmarks", record)
    if as_json:
        console.write_json({**report.to_dict(), "results": None if saved is None else str(saved)})
        return
    tables.print_speeds(report)
    if saved is not None:
        console.say(f"results in {saved}")


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
    words = interrupts.last_words(signum, _kept)
    if sys.stderr.isatty():  # the command in a line of its own, whole, to copy it
        words, _, command = words.partition(interrupts.RESUMES)
        _say_why(*filter(None, (words, command and interrupts.RESUMES.strip("; "), command)))
    else:
        _say_why(words)
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


def _say_why(line: str, *more: str) -> None:
    """Prints an error line, and lines that belong to it; if several processes fail, only the first does."""
    from sparsellm import console

    if _processes() > 1:
        from sparsellm import parallel

        if not parallel.claims_failure():
            return
        line = f"process {parallel.rank()} of {parallel.launched()}: {line}"
    for each in (line, *more):
        console.say(each, error=True)


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
