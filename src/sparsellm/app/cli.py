"""The commands: each calls ``sparsellm.api`` or ``sparsepack``, and returns a JSON value and what prints it."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial, wraps
from inspect import Parameter, Signature, signature
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from sparsellm import __version__, interrupts
from sparsellm.app import options as use
from sparsellm.app import process
from sparsellm.app.options import (
    GGUF,
    MEASURE,
    SERVER,
    TEXT,
    argument,
    field,
    flag,
    keeping,
    needed,
    option,
)
from sparsellm.errors import (
    MemoryBudgetError,
    MissingExtraError,
    RecipeError,
    StorageError,
    shown,
)
from sparsellm.progress import ProgressCallback
from sparsellm.recipe import RESOURCES, SEQ_LEN, SOURCES, WHAT, Recipe

Printed = tuple[Any, Callable[[], None]] | None


class _Commands(TyperGroup):
    """Lists the commands by group, and prints no type next to its own options, of which none takes a value."""

    def list_commands(self, ctx: Any) -> list[str]:
        def place(name: str) -> int:
            command: Any = self.commands[name]
            return use.GROUPS.index(command.rich_help_panel)

        return sorted(super().list_commands(ctx), key=place)

    def get_params(self, ctx: Any) -> list[Any]:
        params = super().get_params(ctx)
        for param in params:
            param.metavar = ""
        return params


app = typer.Typer(
    cls=_Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    help="The best model of a given size, from a model that you have, for the program that you run.",
)


class _Command(TyperCommand):
    """A command with ``--help`` in the last panel, where typer would give it the first, and with an answer to words
    that belong to no option."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        given = list(args)
        # else click refuses them, without a hint
        ctx.allow_extra_args = True
        try:
            super().parse_args(ctx, args)
        except typer.BadParameter:
            # one is missing; a wrong name is said first
            use.check_tasks(ctx.params)
            raise
        if ctx.args and not ctx.resilient_parsing:
            raise use.too_many(given, ctx.args[0], str(ctx.info_name))
        return list(ctx.args)

    def get_help_option(self, ctx: Any) -> Any:
        shown = super().get_help_option(ctx)
        if shown is not None:
            vars(shown)["rich_help_panel"] = use.OUTPUT
            vars(shown)["metavar"] = ""
        return shown


def _command(
    *parameters: Parameter,
    group: str,
    examples: Sequence[str],
    name: str | None = None,
) -> Callable[..., Any]:
    """Registers a command of a group with these options. One that is not given is not passed on, so the function's
    default holds; ``progress``, ``json``, ``quiet`` and ``verbose`` go to functions that take them. Only the main
    process prints."""

    def register(function: Callable[..., Printed]) -> Callable[..., None]:
        taken = signature(function).parameters

        @wraps(function)
        def call(**values: Any) -> None:
            if name == "exec":  # it does not return, and the imports below take seconds
                function(**values)
            if function.__name__ == "prune" and not (
                values.get("restart") or values.get("dry_run")
            ):
                from sparsellm.files.directory import PARTIAL, left_in

                # by an earlier process
                if left_in(Path(f"{values['out']}{PARTIAL}")) is not None:
                    interrupts.keeps(
                        f"finished blocks are kept next to {values['out']}", part=True
                    )
            # paths that several processes share are looked at by the first of them
            if process.count() == 1:
                use.look_at_names(values)
                if function.__name__ == "prune" and values.get("pack") is None:
                    use.look_at_place(values)
            if {"progress", "quiet"} & taken.keys() and not values.get("quiet"):
                process.announce()
            # a signal within torch's import may end the process without a word
            with interrupts.held():
                from sparsellm import parallel, plugins
                from sparsellm.app import console

            given = {
                name: value
                for name, value in values.items()
                if value is not None and value != []
            }
            for plugin in given.pop("plugin", ()):
                plugins.load_plugin(plugin)
            reporting = {
                name: given.pop(name, False) for name in ("json", "quiet", "verbose")
            }
            given |= {name: value for name, value in reporting.items() if name in taken}
            with use.named_as_typed(parameters, values):
                if "progress" in taken:
                    quiet = reporting["quiet"] or not parallel.is_main()
                    verbose = reporting["verbose"]
                    with console.progress(quiet=quiet, verbose=verbose) as progress:
                        printed = function(progress=progress, **given)
                else:
                    printed = function(**given)
            if printed is not None and parallel.is_main():
                content, show = printed
                show = (
                    partial(console.write_json, content) if reporting["json"] else show
                )
                show()

        call.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
        call.__annotations__ = {
            parameter.name: parameter.annotation for parameter in parameters
        }
        epilog = "\n\n".join(("Examples:", *(f"  {example}" for example in examples)))
        usage = " ".join([*filter(None, map(use.required, parameters)), "[OPTIONS]"])
        return app.command(
            name,
            cls=_Command,
            epilog=epilog,
            options_metavar=usage,
            rich_help_panel=group,
        )(call)

    return register


def _renew_card(results: Path | None) -> None:
    """Writes the card of a checkpoint again, with new results; says why if it cannot."""
    from sparsellm.app import console
    from sparsellm.records import PRUNING
    from sparsellm.report.card import card

    if results is None or not (results.parent / PRUNING).is_file():
        return
    try:
        card(results.parent)
    except (OSError, StorageError) as error:
        console.say(f"note: the card is not written again: {error}", error=True)


def _show_version(asked: bool) -> None:
    if asked:
        from sparsepack.compiled import kernels

        sys.stdout.write(f"sparsellm {__version__}\nkernels: {kernels()}\n")
        raise typer.Exit()


_VERSION = typer.Option(
    "--version",
    help="Show the version and the compiled kernels, and exit.",
    callback=_show_version,
    is_eager=True,
)


_HEAD = option(
    "--head TYPE",
    "Embedding and output head of a packed model: keep (as stored) or int8.",
    use.VALUES,
    shown="int8 where values are rounded, else keep",
    values=("keep", "int8"),
)


@app.callback()
def _begin(context: typer.Context, version: Annotated[bool, _VERSION] = False) -> None:
    if process.count() > 1 and context.invoked_subcommand not in (
        "prune",
        "eval",
        "compare",
    ):
        raise RecipeError(
            f"'sparsellm {context.invoked_subcommand}' runs in one process; start it without torchrun"
        )


@_command(
    use.ONE_MODEL,
    option(
        "--for PROGRAM",
        "Program that runs the result: llama.cpp, vllm, sparsellm or transformers.",
        use.COMMON,
        values=("llama.cpp", "vllm", "sparsellm", "transformers"),
        name="program",
    ),
    option(
        "--size SIZE",
        "Size of the whole file or directory, such as 4GB; auto for the smallest with at most the divergence of "
        "llama.cpp's Q4_K_M, auto:0.05 with at most 0.05 nats.",
        use.COMMON,
    ),
    option(
        "--bits B",
        "Bits of a weight instead, on average, such as 4.2.",
        use.COMMON,
        kind=float,
    ),
    needed(
        "--out -o PLACE", "The .gguf file, or the directory.", use.COMMON, kind=Path
    ),
    *[field(name, use.COMMON) for name in ("calibration", "effort")],
    field("sparsity", help="Fraction of zeros, for transformers alone."),
    option(
        "--converter FILE",
        "For llama.cpp: its convert_hf_to_gguf.py. Not needed if MODEL is a .gguf file.",
        GGUF,
        kind=Path,
    ),
    *map(field, ("samples", "seq_len", "memory", "device")),
    *use.RECIPE,
    flag("--dry-run", "Choose and print the forms, and write nothing."),
    *use.WRITING,
    group=use.TO_MAKE,
    examples=(
        "sparsellm compress demo --for sparsellm --size 90MB --out small",
        "sparsellm compress demo --for llama.cpp --bits 4.5 --out small.gguf",
        "sparsellm compress path/to/model --for vllm --size 4GB --out for-vllm",
    ),
)
def compress(
    model: str,
    out: Path,
    progress: Any,
    dry_run: bool,
    program: Any = "",
    **options: Any,
) -> Printed:
    """Compress MODEL to a size, for the program that runs it.

    If it is stopped, the same command goes on."""
    from sparsellm import programs
    from sparsellm.app import console, tables

    if not program:
        for name, known in programs.PROGRAMS.items():
            console.say(f"--for {name}: {known.keeps}", error=True)
        raise RecipeError(
            f"no program is named that runs the result; give --for and one of {', '.join(programs.PROGRAMS)}"
        )
    recipe = use.take_recipe(options)
    order = programs.ordered(model, recipe, program=program, out=out, **options)
    if dry_run:
        chosen = programs.choose_forms(order, progress)
        return chosen.to_dict(), lambda: tables.print_chosen(chosen)
    interrupts.keeps(f"finished blocks are kept next to {out}")
    result = programs.carry_out(order, progress)
    return result.to_dict(), lambda: tables.print_compressed(result)


def _check_pack(
    pack: Path, out: Path, models: list[str], options: dict[str, Any]
) -> None:
    """Refuses a directory to pack into, before the run."""
    from sparsellm import parallel
    from sparsellm.files.directory import check_destination, checkpoints_among, resolved
    from sparsellm.records import PRUNING

    if resolved(pack) == resolved(out):
        raise RecipeError(f"--out and --pack are both {out}; name two directories")
    sources = [out, *checkpoints_among(*models)]
    overwrite = options["overwrite"]
    parallel.from_main(
        lambda: check_destination(
            pack, sources=sources, overwrite=overwrite, option="--pack"
        )
    )
    if parallel.from_main(partial(os.path.isfile, out / PRUNING)) and not overwrite:
        again = shlex.join(["sparsellm", "pack", str(out), "--out", str(pack)])
        raise RecipeError(
            f"{out} is a complete checkpoint: `{again}` packs it; --overwrite prunes it again"
        )
    if options["trust_remote_code"]:
        raise RecipeError(
            "a packed model runs no code of a checkpoint; leave out --trust-remote-code or --pack"
        )


def _check_values(
    recipe: Recipe, pack: Path | None, head: str | None, progress: ProgressCallback
) -> None:
    """Refuses values and a head that ``pack`` would refuse, before the run. If nothing is packed, notes how to ask for
    values that can be exported, which is too late to hear after the run."""
    from sparsellm.convert import check_packable
    from sparsellm.exports.linears import other_grids
    from sparsellm.progress import note

    if pack is not None:
        check_packable(recipe, head)
    elif head is not None:
        raise RecipeError(
            f"--head {head} is of the packed model; give --pack DIR, or leave it out"
        )
    elif recipe.grid == "own" and recipe.values != "keep" and recipe.program is None:
        note(progress, [other_grids(recipe.values)])


@_command(
    use.ONE_MODEL,
    needed("--out -o DIR", "Directory of the pruned checkpoint.", use.COMMON),
    *use.RUN,
    option(
        "--teacher MODEL",
        "The dense model, if MODEL was pruned from it already: sweeps follow its predictions.",
        WHAT,
    ),
    use.TRUST,
    option(
        "--pack DIR",
        "Also pack the result into DIR, measure that against MODEL, and write its report.",
    ),
    _HEAD,
    flag(
        "--dry-run",
        "Refuse what the run would refuse, print what it needs, and write nothing.",
    ),
    *use.RESTARTING,
    flag("--quiet -q", "Print warnings and errors only."),
    use.VERBOSE,
    use.JSON,
    group=use.TO_MAKE,
    examples=(
        "sparsellm prune path/to/model --out pruned --sparsity 0.5 --calibration my-text.txt",
        "sparsellm prune path/to/model --out pruned --pack packed --values int4 --effort 2",
        "sparsellm prune demo --out pruned --method wanda --samples 32 --seq-len 512",
    ),
)
def prune(
    model: str,
    out: Path,
    quiet: bool,
    verbose: bool,
    progress: Any,
    pack: Path | None = None,
    head: Any = None,
    **options: Any,
) -> Printed:
    """Prune MODEL and save a checkpoint that plain transformers loads.

    If the run is stopped, the same command resumes it. Processes started by torchrun share the work."""
    from sparsellm import api, parallel
    from sparsellm.app import console, tables
    from sparsellm.run.request import Request

    recipe = use.take_recipe(options)
    dense = options.get("teacher", model)
    if pack is not None:
        _check_pack(pack, out, [model, dense], options)
    _check_values(recipe, pack, head, progress)
    if options.pop("dry_run"):
        prediction = api.dry_run(model, recipe, out=out, progress=progress, **options)
        return prediction.model_dump(mode="json"), lambda: tables.print_prediction(
            prediction
        )
    told: set[str] = set()

    def tell(event: Any) -> None:
        progress(event)
        told.add(event.detail)

    result = api.prune(model, recipe, out=out, progress=tell, **options)
    if not parallel.is_main():
        return None
    for note in (f"note: {warning}" for warning in result.warnings):
        if quiet or note not in told:
            console.say(note, error=True)

    content: dict[str, Any] = result.to_dict()
    packed = None
    evaluation = None
    if pack is not None:
        interrupts.keeps(
            f"{out} is complete, and `sparsellm pack` goes on from it", resumes=False
        )
        given = {name: options[name] for name in ("overwrite", "restart")}
        run = Request(model, result.recipe, out, **given)
        with parallel.alone():
            packed, evaluation = api.pack_and_measure(
                run, pack, dense, progress, head=head
            )
            try:
                api.keep_results(pack, [evaluation])
            except (
                OSError,
                StorageError,
            ) as error:  # both checkpoints are complete, and the numbers are printed
                console.say(
                    f"note: the measurement is not kept in {pack}: {error}", error=True
                )
        content |= {
            "packed": packed.to_dict(),
            "evaluation": evaluation.model_dump(mode="json"),
        }

    def show() -> None:
        tables.print_pruned(result, verbose=verbose)
        if packed is not None and evaluation is not None:
            tables.print_packed(packed)
            tables.print_evaluation(evaluation, None)
        else:
            tables.print_next(out, result.recipe, dense)

    return content, lambda: None if quiet else show()


@_command(
    argument("MODEL", "As for prune, or a config.json; only the config is read."),
    *use.RUN,
    use.TRUST,
    option(
        "--gpu NAME",
        "GPU such as h100, on a host limited by --memory alone.",
        RESOURCES,
        shown="this machine",
    ),
    option(
        "--ranks N",
        "Processes of torchrun, with a GPU each if there are any.",
        RESOURCES,
        default=1,
    ),
    use.JSON,
    group=use.TO_MAKE,
    examples=(
        "sparsellm plan path/to/model",
        "sparsellm plan config.json --gpu h100 --ranks 8 --effort 2",
        "sparsellm plan demo --samples 32 --memory 2GiB --json",
    ),
)
def plan(model: str, json: bool, **options: Any) -> Printed:
    """Predict time, memory and disk of `sparsellm prune` for MODEL, on this machine or on GPUs.

    The exit code is 2 if the run does not fit into the memory."""
    from sparsellm import api
    from sparsellm.app import console, tables

    prediction = api.plan(model, use.take_recipe(options), **options)
    if json:
        console.write_json(prediction.model_dump(mode="json"))
    else:
        tables.print_prediction(prediction)
        here = "gpu" not in options and options.get("ranks", 1) == 1
        # prune takes no config alone
        startable = here and Path(model).suffix != ".json"
        if startable and not prediction.notes:
            start = interrupts.command_line().replace(" plan ", " prune ", 1)
            console.say(f"start it:  {start} --out OUT", unbroken=True)
    if prediction.notes:
        raise MemoryBudgetError(
            f"{'; '.join(prediction.notes)}; allow more with --memory, or lower --seq-len or batch_tokens"
        )
    return None


@_command(
    use.ONE_MODEL,
    needed(
        "--text SOURCE",
        "As --calibration of prune; for pydoc and pycode, the part that is never used for calibration.",
        TEXT,
        values=SOURCES,
    ),
    *use.WINDOW,
    field("bos", TEXT),
    option(
        "--against MODEL",
        "Dense model to compare with: KL divergence, same likeliest tokens, recovery.",
        MEASURE,
    ),
    option(
        "--tasks A,B",
        "Tasks of lm-eval to run on the whole model (needs sparsellm\\[eval]).",
        MEASURE,
    ),
    option(
        "--tasks-dir DIR",
        "Directory with further tasks, in lm-eval's YAML files.",
        MEASURE,
    ),
    field("device"),
    field("dtype"),
    use.TRUST,
    use.SAVE,
    *use.REPORTING,
    name="eval",
    group=use.TO_MEASURE,
    examples=(
        "sparsellm eval pruned --text my-text.txt",
        "sparsellm eval demo --text pydoc --seq-len 512 --max-tokens 4096",
        "sparsellm eval pruned --text pydoc --against path/to/model",
    ),
)
def evaluate(
    model: str, text: str, save: bool, progress: Any, tasks: str = "", **options: Any
) -> Printed:
    """Measure the perplexity of MODEL on a text, its divergence from a dense model, and tasks of lm-eval."""
    from sparsellm import api, parallel
    from sparsellm.app import console, tables
    from sparsellm.files import results
    from sparsellm.inputs import mixture_of
    from sparsellm.records import read_pruning

    # no directory of that name is meant
    place = results.place_of_results(model) if save and model != "demo" else None
    keep = results.keeper(place, partial(console.say, error=True))
    flatters = False
    file = Path(text.removeprefix("file:"))
    # a text given as such may be too long for a name
    if place is not None and os.path.isfile(file):
        with suppress(StorageError):  # a damaged record
            given = str(read_pruning(place).recipe.get("calibration"))
            parts = [name for name, _ in mixture_of(given)] or [given]
            flatters = file.name in [name.removeprefix("file:") for name in parts]
    result = api.evaluate(
        model, text, tasks=use.listed(tasks) or None, progress=progress, **options
    )
    if not parallel.is_main():
        return None
    saved = keep(result)
    _renew_card(saved)
    if flatters:
        console.say(
            "note: the model was calibrated on a text of this name, which flatters its numbers",
            error=True,
        )
    content = {
        "model": model,
        **result.model_dump(mode="json"),
        "results": saved and str(saved),
    }

    def show() -> None:
        tables.print_evaluation(result, saved)
        if saved is not None:
            tables.say_next("see it all", "sparsellm report {}", place)
        elif result.against is None:
            tables.say_next("make it smaller", "sparsellm compress {}", model)

    return content, show


@_command(
    use.ONE_MODEL,
    flag("--all", "Print every matrix and every block, not only each kind of matrix."),
    use.TRUST,
    use.JSON,
    group=use.TO_MEASURE,
    examples=["sparsellm inspect pruned", "sparsellm inspect pruned --all"],
)
def inspect(model: str, all: bool, trust_remote_code: bool) -> Printed:
    """Say what MODEL holds: parameters, types, bytes, zeros of each kind of matrix, N:M, and which experts can go."""
    from sparsellm import api
    from sparsellm.app import tables
    from sparsellm.files.resolve import checkpoint_directory
    from sparsellm.patterns import strictest
    from sparsellm.records import Totals
    from sparsellm.run.counts import Stored

    matrices = api.inspect(model, trust_remote_code=trust_remote_code)
    mixtures = api.inspect_experts(model, trust_remote_code=trust_remote_code)
    stored = Stored.of(checkpoint_directory(model))
    blocks = {
        index: list(part)
        for index, part in groupby(matrices, lambda matrix: matrix.block)
    }
    pattern = strictest(matrix.kept for matrix in matrices)
    totals = {index: Totals.of(part) for index, part in blocks.items()}
    total = Totals.of(matrices)
    content = {
        **stored.model_dump(),
        **total.model_dump(),
        "sparsity": total.sparsity,
        "pattern": pattern,
        "blocks": [
            {"block": i, "sparsity": part.sparsity, "zeros": part.zeros}
            for i, part in totals.items()
        ],
        "linears": [
            matrix.model_dump(mode="json") for matrix in matrices if matrix.linear
        ],
        "others": [
            matrix.model_dump(mode="json") for matrix in matrices if not matrix.linear
        ],
        "mixtures": mixtures.model_dump(mode="json") if mixtures.experts else None,
    }

    def show() -> None:
        tables.print_stored(stored)
        if all:
            tables.print_zeros(blocks, pattern)
        else:
            tables.print_kinds(matrices, pattern)
        tables.print_mixtures(mixtures, len(blocks))
        if total.zeros:
            tables.say_next("measure it", "sparsellm eval {} --text pydoc", model)
        else:
            tables.say_next("make it smaller", "sparsellm compress {}", model)

    return content, show


@_command(
    argument(
        "DIRECTORIES...",
        "Pruned checkpoints: one, or several of one model to compare.",
        list[str],
    ),
    option(
        "--out -o FILE",
        "The HTML file.",
        shown="report.html in DIRECTORY; needed for several",
    ),
    group=use.TO_SHARE,
    examples=("sparsellm report pruned", "sparsellm report a b c --out compare.html"),
)
def report(directories: list[str], out: Path | None = None) -> Printed:
    """Write the report of a pruned checkpoint, or compare several, as one HTML file that loads nothing."""
    from sparsellm.app import console, tables
    from sparsellm.report.comparison import write_comparison
    from sparsellm.report.document import write_report

    if len(directories) == 1:
        path = write_report(directories[0], out)
    elif out is not None:
        path = write_comparison(directories, out)
    else:
        raise RecipeError(
            f"{len(directories)} runs need a file for the comparison; give --out compare.html"
        )

    def show() -> None:
        console.say(f"written to {path}")
        if len(directories) == 1:
            tables.say_next("share it", "hf upload OWNER/NAME {}", directories[0])

    return None, show


@_command(
    use.ONE_MODEL,
    option("--method NAMES", "Methods, with commas.", WHAT, default="sparsellm"),
    option("--sparsity SHARES", "Sparsities, with commas: 0.5,0.7.", WHAT, default=""),
    option("--pattern N:M", "Patterns, with commas: 2:4,4:8.", WHAT, default=""),
    *use.RECIPE,
    use.PLUGIN,
    option(
        "--effort LIST", "Efforts of the sweep, with commas: 0,1,2.", WHAT, default=""
    ),
    option(
        "--values TYPES",
        "Types of the kept values, with commas: keep,int4. As in prune.",
        WHAT,
        default="",
    ),
    option(
        "--experts LIST",
        "Experts to remove or keep, as in prune, with commas: 0.25,0.5.",
        WHAT,
        default="",
    ),
    *map(field, ("calibration", "samples", "seq_len", "memory", "device")),
    option(
        "--text SOURCE",
        "Text to measure on, as in eval.",
        TEXT,
        default="pydoc",
        values=SOURCES,
    ),
    option("--text-seq-len N", "Tokens in a window of that text.", TEXT, shown=SEQ_LEN),
    use.MAX_TOKENS,
    flag("--speed", "Also measure how fast each packed model decodes.", MEASURE),
    option(
        "--max-bytes SIZE",
        "Recommend the best packed model up to this size, such as 1GB.",
        MEASURE,
    ),
    use.out("Directory of the comparison; an earlier one goes on."),
    *use.REPORTING,
    group=use.TO_MEASURE,
    examples=(
        "sparsellm compare demo --out compared --sparsity 0.5,0.7 --method wanda,sparsellm",
        "sparsellm compare demo --out compared --sparsity 0.3,0.5 --values int8,int4 --max-bytes 1GB",
    ),
)
def compare(model: str, out: Path, progress: Any, **options: Any) -> Printed:
    """Prune MODEL with every combination of the options that are lists, and measure each result against MODEL.

    The same command goes on with a comparison that was stopped. Each run is a checkpoint in DIR."""
    from sparsellm.app import compare as comparison
    from sparsellm.app import tables
    from sparsellm.inputs import parse_bytes, parse_yaml

    numbers = {
        name: [
            parse_yaml(entry, f"--{name}") for entry in use.listed(options.pop(name))
        ]
        for name in ("sparsity", "effort", "experts")
    }
    names = {
        name: use.listed(options.pop(name)) for name in ("method", "pattern", "values")
    }
    max_bytes = options.pop("max_bytes", None)
    interrupts.keeps(f"finished runs and blocks are kept in {out}")
    result = comparison.compare(
        model,
        out=out,
        cells=comparison.cells_of(
            use.take_recipe(options),
            methods=names["method"],
            patterns=names["pattern"],
            values=names["values"],
            sparsities=numbers["sparsity"],
            efforts=numbers["effort"],
            experts=numbers["experts"],
        ),
        text=options["text"],
        seq_len=options.get("text_seq_len"),
        max_tokens=options.get("max_tokens"),
        speed=options["speed"],
        max_bytes=parse_bytes(max_bytes) if max_bytes is not None else None,
        progress=progress,
    )
    return result.model_dump(mode="json"), lambda: tables.print_comparison(
        result, limited=max_bytes is not None
    )


@_command(
    option(
        "--size SIZE",
        "Size of the result with all of its files, such as 80MB.",
        WHAT,
        default="90MB",
    ),
    option(
        "--out -o DIR",
        "Directory of the packed model.",
        shown="in the cache",
    ),
    *use.WRITING,
    group=use.TO_MAKE,
    examples=("sparsellm demo", "sparsellm demo --size 75MB --out demo"),
)
def demo(
    progress: Any, verbose: bool, out: Path | None = None, **options: Any
) -> Printed:
    """Compress a small real Llama, and show what it costs and what it saves. Takes minutes, needs no hub."""
    from sparsellm.app import tables
    from sparsellm.app.demo import place, run_demo

    interrupts.keeps(f"finished blocks are kept next to {place(out)}")
    result = run_demo(out=out, progress=progress, **options)
    return result.to_dict(), lambda: tables.print_demo(result, verbose=verbose)


@_command(
    use.ONE_MODEL,
    use.out("Directory of the packed checkpoint."),
    option(
        "--values TYPE",
        "Type of the kept values: keep (as stored), bf16, fp16, fp32, int8, int6, int5, int4 or int3.",
        use.VALUES,
        shown="as the run rounded them, else keep",
        values=("keep", "bf16", "fp16", "fp32", "int8", "int6", "int5", "int4", "int3"),
    ),
    _HEAD,
    flag(
        "--round-again",
        "Allow another type than the run rounded to, which loses quality.",
        use.VALUES,
    ),
    *use.WRITING,
    group=use.TO_MAKE,
    examples=(
        "sparsellm pack pruned --out packed",
        "sparsellm pack pruned --out packed --values int8 --head keep",
    ),
)
def pack(model: str, progress: Any, **options: Any) -> Printed:
    """Pack a pruned MODEL: store the kept values and where they are. It stays packed in memory too."""
    from sparsellm import convert
    from sparsellm.app import tables

    result = convert.pack(model, progress=progress, **options)
    return result.to_dict(), lambda: tables.print_packed(result)


@_command(
    argument("DIRECTORY", "A checkpoint that was pruned with --grid, or a packed one."),
    needed(
        "--to FORMAT",
        "gguf, compressed-tensors, or transformers: a packed checkpoint as an ordinary dense one.",
        values=("gguf", "compressed-tensors", "transformers"),
    ),
    needed("--out -o PLACE", "The .gguf file, or the directory.", kind=Path),
    option(
        "--converter FILE",
        "llama.cpp's convert_hf_to_gguf.py, which is run on DIRECTORY.",
        GGUF,
        kind=Path,
    ),
    option("--like FILE", "Instead, the .gguf file that was pruned.", GGUF, kind=Path),
    keeping(
        "--head TYPE",
        "Type of embedding and output head: keep (that of the template), q8_0 or q6_k.",
        GGUF,
        values=("keep", "q8_0", "q6_k"),
    ),
    use.SAVE,
    *use.WRITING,
    group=use.TO_SHARE,
    examples=(
        "sparsellm export pruned --to gguf --out model.gguf --converter convert_hf_to_gguf.py",
        "sparsellm export pruned --to compressed-tensors --out for-vllm",
        "sparsellm export packed --to transformers --out dense",
    ),
)
def export(directory: str, save: bool, progress: Any, **options: Any) -> Printed:
    """Write DIRECTORY for llama.cpp (GGUF), vLLM (compressed-tensors) or plain transformers, without loss."""
    if options["to"] not in ("gguf", "compressed-tensors", "transformers"):
        raise RecipeError(
            f"--to is {shown(options['to'])}; write gguf (for llama.cpp), compressed-tensors (for vLLM) or transformers"
        )
    if options["to"] == "transformers":
        return _unpack(directory, progress, options)
    from sparsellm.app import tables
    from sparsellm.exports import door
    from sparsellm.files import results
    from sparsellm.records import RESULTS

    place = results.place_of_results(directory) if save else None
    result = door.export(
        directory, save=place is not None, progress=progress, **options
    )
    saved = place / RESULTS if place is not None else None
    _renew_card(saved)
    return {
        **result.to_dict(),
        "results": saved and str(saved),
    }, lambda: tables.print_exported(result, saved)


def _unpack(directory: str, progress: Any, options: dict[str, Any]) -> Printed:
    """Writes a packed checkpoint as an ordinary dense one."""
    from sparsellm import convert
    from sparsellm.app import console, tables

    del options["to"]
    if options.pop("head") != "keep" or {"like", "converter"} & options.keys():
        raise RecipeError(
            "--converter, --like and --head are settings of GGUF; leave them out for transformers"
        )
    result = convert.unpack(directory, progress=progress, **options)
    content = {"path": str(result.path), "checkpoint_bytes": result.checkpoint_bytes}

    def show() -> None:
        size = result.checkpoint_bytes / 1e6
        console.say(f"weight files: {size:.1f} MB, written to {result.path}")
        tables.say_next("measure it", "sparsellm eval {} --text pydoc", result.path)

    return content, show


@_command(
    use.ONE_MODEL,
    argument("PROMPT", "Text to continue."),
    option("--max-new-tokens N", "Most tokens to generate.", TEXT, default=100),
    option(
        "--temperature T",
        "0 takes the likeliest token; above 0, tokens are sampled.",
        TEXT,
        default=0.0,
    ),
    option("--seed N", "Seed of the sampling.", TEXT, default=0),
    *use.SERVED,
    flag("--quiet -q", "Print the text without the speed."),
    use.JSON,
    group=use.TO_RUN,
    examples=(
        "sparsellm generate packed 'The capital of France is'",
        "sparsellm generate packed 'Once upon a time' --temperature 0.8 --max-new-tokens 200",
    ),
)
def generate(
    model: str, prompt: str, quiet: bool, json: bool, **options: Any
) -> Printed:
    """Continue PROMPT, token by token, and print the speed."""
    from sparsellm.app import console, tables
    from sparsellm.serving.prompts import open_model
    from sparsepack.generation import Sampling
    from sparsepack.generation import generate as continue_prompt

    # before the load
    Sampling(
        max_new_tokens=options["max_new_tokens"],
        temperature=options["temperature"],
        seed=options["seed"],
    )
    loaded, tokenizer = open_model(model, use.take_running(options))
    before = [prompt]  # printed with the first piece, since errors may come before that

    def show(text: str) -> None:
        console.piece(before.pop() + text if before else text)

    result = continue_prompt(
        loaded, tokenizer, prompt, on_text=None if json else show, **options
    )
    speed = (
        f"{result.tokens_per_second:.1f} tokens/s · {result.new_tokens} tokens after a prompt of "
        f"{result.prompt_tokens}, read in {result.prefill_seconds:.2f} s · threads: {result.threads}"
    )

    def end() -> None:
        show("\n")
        if not quiet:
            console.say(speed, error=True)
            tables.say_next("serve it", "sparsellm serve {}", model, error=True)

    return result.to_dict(), end


@_command(
    use.ONE_MODEL,
    option("--host NAME", "Address to listen at.", SERVER, default="127.0.0.1"),
    option("--port N", "Port; 0 for any that is free.", SERVER, default=8000),
    option(
        "--key-file FILE",
        "File with the key that clients send.",
        SERVER,
        shown="SPARSELLM_API_KEY, else no key",
    ),
    option("--name NAME", "Name of the model.", SERVER, shown="that of MODEL"),
    option(
        "--context N",
        "Most tokens of a prompt and its answer.",
        SERVER,
        shown="the model's, at most 8192",
    ),
    option("--max-tokens N", "Most tokens of an answer.", SERVER, default=2048),
    option(
        "--queue N", "Requests that may wait; more are refused.", SERVER, default=16
    ),
    option("--max-body SIZE", "Most bytes of a request.", SERVER, default="1MB"),
    *use.SERVED,
    flag("--quiet -q", "Print no line for each request."),
    group=use.TO_RUN,
    examples=(
        "sparsellm serve packed",
        "sparsellm serve packed --host 0.0.0.0 --key-file key.txt",
    ),
)
def serve(model: str, quiet: bool, max_body: str, **options: Any) -> None:
    """Serve MODEL to clients of OpenAI's API: chat, completions, streaming.

    Needs starlette and uvicorn. A key, which clients must send, comes from the environment or a file."""
    from sparsellm.app import console
    from sparsellm.inputs import parse_bytes

    try:
        from sparsellm.serving.server import ServerSettings
        from sparsellm.serving.server import serve as listen
    except ModuleNotFoundError as missing:
        if missing.name not in ("starlette", "uvicorn"):
            raise
        raise MissingExtraError(
            f"{missing.name} is not installed: pip install starlette uvicorn"
        ) from None
    running = use.take_running(options)
    settings = use.made(
        ServerSettings, max_body=parse_bytes(max_body), quiet=quiet, **options
    )
    listen(model, settings, running, lambda line: console.say(line, error=True))


@_command(
    use.ONE_MODEL,
    option("--system TEXT", "What the model is told first.", TEXT),
    option("--max-new-tokens N", "Most tokens of an answer.", TEXT, default=512),
    option(
        "--temperature T",
        "0 takes the likeliest token.",
        TEXT,
        shown="as the model recommends",
    ),
    option("--seed N", "Seed of the sampling.", TEXT, shown="another each time"),
    *use.SERVED,
    group=use.TO_RUN,
    examples=(
        "sparsellm chat packed",
        "sparsellm chat packed --system 'Answer in one sentence.'",
    ),
)
def chat(model: str, **options: Any) -> None:
    """Talk with MODEL, which needs a chat template, in the terminal.

    /reset begins anew, /quit or Ctrl-D ends, Ctrl-C stops an answer."""
    from sparsellm.app import console
    from sparsellm.serving import terminal

    running = use.take_running(options)
    manner = use.made(terminal.Manner, **options)
    terminal.chat(
        model,
        manner,
        running,
        show=console.piece,
        say=lambda line: console.say(line, error=True),
    )


@_command(
    argument("MODEL", "A packed checkpoint."),
    option(
        "--dense MODEL",
        "A dense checkpoint to compare with.",
        MEASURE,
        shown="the packed one, unpacked",
    ),
    option(
        "--batch N",
        "Sequences decoded at once. Repeatable.",
        MEASURE,
        kind=list[int],
        shown=1,
    ),
    option(
        "--threads N",
        "CPU threads. Repeatable.",
        RESOURCES,
        kind=list[int],
        shown="as torch chooses",
    ),
    option("--prompt-tokens N", "Tokens read before decoding.", MEASURE, default=128),
    option("--new-tokens N", "Tokens decoded.", MEASURE, default=32),
    option("--repeats N", "Rounds; the median is shown.", MEASURE, default=5),
    *use.RUNNING,
    use.SAVE,
    *use.REPORTING,
    group=use.TO_MEASURE,
    examples=(
        "sparsellm bench packed",
        "sparsellm bench packed --batch 1 --batch 8 --threads 2",
    ),
)
def bench(
    model: str,
    save: bool,
    progress: Any,
    batch: Sequence[int] = (1,),
    **options: Any,
) -> Printed:
    """Compare speed and memory of a packed checkpoint and a dense one, which take turns on this machine."""
    from sparsellm.app import console, tables
    from sparsellm.evaluation.speed import compared_speed
    from sparsellm.files import results

    keep = results.keeper(
        results.place_of_results(model) if save else None,
        partial(console.say, error=True),
    )
    measured = compared_speed(
        model,
        options.pop("dense", None),
        batches=batch,
        progress=progress,
        **options,
    )
    saved = keep(measured)
    content = {
        **measured.model_dump(),
        "results": saved and str(saved),
    }

    def show() -> None:
        tables.print_speeds(measured, saved)
        tables.say_next("run it", "sparsellm serve {}", model)

    return content, show


@_command(
    argument("COMMAND...", "A command with its arguments, after --.", list[str]),
    name="exec",
    group=use.TO_RUN,
    examples=(
        "sparsellm exec -- lm_eval --model hf --model_args pretrained=packed --tasks arc_easy",
        "sparsellm exec -- python my_program.py packed",
    ),
)
def execute(command: list[str]) -> None:
    """Run any COMMAND, and what it starts, in a Python in which transformers loads packed checkpoints."""
    process.execute(command)


def main() -> None:
    """Runs the command line. A user's mistake prints one line on stderr and exits with code 2, without a traceback."""
    process.run(lambda: app(prog_name="sparsellm", standalone_mode=False))
