"""Options of the command line, as parameters of a signature that typer reads.

An option that sets a field of the recipe is made from that field, which holds all that the option shows and checks.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from inspect import Parameter
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar, get_args, get_origin

import typer
from pydantic import ValidationError
from typer.models import OptionInfo

from sparsellm.errors import ModelError, RecipeError, refusal, shown
from sparsellm.files.directory import check_destination, checkpoints_among
from sparsellm.files.named import check_name, is_gguf
from sparsellm.inputs import as_number, as_whole_number, mixture_of, text_file
from sparsellm.recipe import (
    DEVICES,
    RESOURCES,
    SEQ_LEN,
    WHAT,
    Recipe,
    help_of,
    option_of,
)
from sparsepack.errors import SettingError, UserError

# groups of commands, as --help shows them
TO_MAKE = "Make"
TO_MEASURE = "Measure"
TO_RUN = "Run"
TO_SHARE = "Share"
GROUPS = [TO_MAKE, TO_MEASURE, TO_RUN, TO_SHARE]
# panels of a command's --help
TEXT = "Text"
MEASURE = "Measurement"
VALUES = "Values"
SERVER = "Server"
COMMON = "Common"
OUTPUT = "Output"
GGUF = "For GGUF"
# how names of text files end
TEXT_FILES = (".txt", ".jsonl", ".parquet")
Made = TypeVar("Made")
# Types by placeholder; values with other placeholders are text.
KINDS = {
    "": bool,
    "N": int,
    "0-3": int,
    "SHARE": float,
    "T": float,
    "RATE": float,
    "DIR": Path,
    "FILE": Path,
}


def _number(name: str) -> Callable[[Any], float]:
    """Reads the number of an option; a RecipeError says what to write in place of ``50%`` or ``0,5``."""

    def read(given: Any) -> float:
        try:
            return float(given)
        except ValueError:
            raise RecipeError(f"{name} is {shown(given)}; {as_number(given)}") from None

    return read


def _whole_number(name: str) -> Callable[[Any], int]:
    """The same for a whole number."""

    def read(given: Any) -> int:
        try:
            return int(given)
        except ValueError:
            raise RecipeError(
                f"{name} is {shown(given)}; {as_whole_number(given)}"
            ) from None

    return read


# Makers of readers by type
_NUMBERS: dict[Any, Callable[[str], Callable[[Any], Any]]] = {
    float: _number,
    int: _whole_number,
    list[int]: _whole_number,
}


def argument(metavar: str, help: str, kind: Any = str) -> Parameter:
    """A positional argument; its parameter is called like the placeholder."""
    annotation: Any = Annotated[
        kind, typer.Argument(metavar=metavar, help=help, rich_help_panel="Model")
    ]
    return Parameter(
        metavar.strip(".").lower(), Parameter.KEYWORD_ONLY, annotation=annotation
    )


def option(
    usage: str,
    help: str,
    panel: str = OUTPUT,
    *,
    default: Any = None,
    shown: object = "",
    kind: Any = None,
    values: Sequence[str] | Callable[[], list[str]] = (),
    name: str = "",
) -> Parameter:
    """An option. Its parameter is called ``name``, or like the first name in ``usage``, which has the names and the
    placeholder of the value, such as ``--quiet -q`` or ``--out DIR``. ``shown`` replaces the default in ``--help``,
    ``kind`` is that of the placeholder if None, and a shell completes ``values``."""
    names = usage.split()
    metavar = ""  # that of a flag; without any, typer shows a type that is not given
    if not names[-1].startswith("-"):
        metavar = names.pop()
    kind = kind or KINDS.get(metavar, str)
    made: Any = typer.Option(
        *names,
        metavar=metavar,
        parser=_NUMBERS[kind](names[0]) if kind in _NUMBERS else None,
        # rich must not take the bracket for markup
        help=f"{help} [dim]\\[default: {shown}][/dim]" if shown != "" else help,
        show_default=shown == "",
        autocompletion=(lambda: list(values() if callable(values) else values))
        if values
        else None,
        rich_help_panel=panel,
    )
    name = name or names[0].removeprefix("--").partition("/")[0].replace("-", "_")
    annotation: Any = Annotated[kind, made]
    return Parameter(
        name, Parameter.KEYWORD_ONLY, annotation=annotation, default=default
    )


flag = partial(option, default=False)
# a type that stays as it is unless another is named
keeping = partial(option, default="keep")
repeatable = partial(option, panel=WHAT, kind=list[str])
needed = partial(option, default=Parameter.empty)
out = partial(needed, "--out -o DIR")  # the directory that a command must write to


def required(parameter: Parameter) -> str:
    """An option without a default, as a line of usage shows it; empty for other parameters."""
    (info,) = parameter.annotation.__metadata__
    is_option = isinstance(info, OptionInfo) and parameter.default is Parameter.empty
    return f"--{parameter.name.replace('_', '-')} {info.metavar}" if is_option else ""


def registered(*packages: str) -> list[str]:
    """The names that the modules of packages of ``method`` register, read from their text.

    A shell cannot wait for torch."""
    modules = (
        path
        for package in packages
        for path in sorted((Path(__file__).parents[1] / package).glob("*.py"))
    )
    return [
        name
        for path in modules
        for name in re.findall(r'\.register\(\s*"([^"]+)"', path.read_text("utf-8"))
    ]


def field(name: str, panel: str = "", help: str = "") -> Parameter:
    """The option for a field of the recipe, which checks its value; ``help`` replaces that of the recipe."""
    info = Recipe.model_fields[name]
    line = option_of(name)
    assert line is not None
    default = info.get_default(call_default_factory=True)
    repeated = isinstance(default, list | dict)
    choices = line.values or (
        get_args(info.annotation) if get_origin(info.annotation) is Literal else ()
    )
    text = help or help_of(name)
    if line.registered:
        text += f" Known: {', '.join(sorted(registered(*line.registered)))}."
    if repeated:
        text += " Repeatable."
    written = default
    if default is None:
        written = line.null
    elif repeated:
        written = ""
    made = option(
        f"{line.flag or '--' + name.replace('_', '-')} {line.metavar}",
        text,
        panel or line.panel,
        kind=list[str] if repeated else None,
        shown=written,
        values=partial(registered, *line.registered) if line.registered else choices,
    )
    return made.replace(name=name)


COMMON_FIELDS = ["method", "sparsity", "pattern", "values", "effort", "calibration"]
# The fields that have an option; --set reaches the others.
FIELDS = [
    *COMMON_FIELDS,
    *["grid", "experts", "samples", "seq_len", "memory", "device"],
]
RECIPE = [
    option("--recipe FILE", "A recipe in YAML; options given here override it.", WHAT),
    repeatable(
        "--set KEY=VALUE",
        "Any field of the recipe, or options.NAME, allocation_options.NAME, expert_options.NAME or sparsity_of.GLOB; "
        "docs/options.md lists all. Repeatable.",
    ),
]


def look_at_names(values: Mapping[str, Any]) -> None:
    """Refuses models and texts that are not there, by the values of a command's options, before torch is imported,
    which takes seconds. Raises ModelError or DataError."""
    if "prompt" in values:
        _check_order(values["model"], values["prompt"])
    for name in ("model", "directory", "teacher", "against", "dense"):
        if isinstance(values.get(name), str):
            check_name(values[name], name)
    for name in ("text", "calibration"):
        given = values.get(name) or ""
        sources = [source for source, _ in mixture_of(given)]
        if "," not in given:
            sources = [given]
        for source in sources:
            if Path(source).suffix in TEXT_FILES and not source.startswith("hub:"):
                text_file(source.removeprefix("file:").removeprefix("wikitext2:"))


def _check_order(model: str, prompt: str) -> None:
    """Raises ModelError for a prompt that stands before the model."""
    if model == "demo" or os.path.lexists(model):
        return
    if is_gguf(prompt) or os.path.isfile(os.path.join(prompt, "config.json")):
        raise ModelError(
            f"model {shown(model)} not found, and the prompt {shown(prompt)} is a model; give the model first"
        )


def look_at_place(values: Mapping[str, Any]) -> None:
    """Refuses the directory of a result as the run does at its start, before torch is imported. Raises StorageError."""
    check_destination(
        values["out"],
        sources=checkpoints_among(values["model"], values.get("teacher")),
        overwrite=values["overwrite"],
    )


def too_many(given: Sequence[str], extra: str, command: str) -> RecipeError:
    """The error for a word of a command line that belongs to nothing; it says to which option it may belong."""
    before: list[str] = []
    for word in reversed(given[: len(given) - 1 - given[::-1].index(extra)]):
        before.insert(0, word)
        if word.startswith("-"):
            break
    option = before[0] if before else ""
    said = f"{shown(extra)} is one word too many"
    values = [*before[1:], extra]
    if not option.startswith("--") or "=" in option or len(values) < 2:
        return RecipeError(f"{said}; `sparsellm {command} --help` says what it takes")
    if option in ("--size", "--memory", "--max-bytes", "--max-body"):
        return RecipeError(f"{said}; write {option} {''.join(values)}")
    joined = ",".join(word.strip(",") for word in values)
    if command == "compare":
        return RecipeError(f"{said}; write {option} {joined}, with commas")
    return RecipeError(
        f"{said} after {option} {values[0]}; give one value, in quotes if it has spaces"
    )


def take_recipe(options: dict[str, Any]) -> Recipe:
    """Takes the recipe out of a command's options: the file, and over it the fields and ``--set`` together. Raises
    RecipeError for a field that is given by both."""
    chosen = (
        Recipe.from_yaml(options.pop("recipe")) if "recipe" in options else Recipe()
    )
    given = {name: options.pop(name) for name in FIELDS if name in options}
    for setting in options.get("set", ()):
        name = setting.partition("=")[0].strip()
        if name in given:
            raise RecipeError(
                f"{name} is given by an option and by --set {shown(setting)}; give one"
            )
    return chosen.with_settings(options.pop("set", ()), **given)


def take_running(options: dict[str, Any]) -> dict[str, str]:
    """Takes the values of ``RUNNING``, which say how a model is loaded, out of a command's options."""
    return {
        name: options.pop(name)
        for name in ("device", "dtype", "activations")
        if name in options
    }


def made(kind: type[Made], **values: Any) -> Made:
    """A command's settings; a RecipeError names the first value that they refuse."""
    try:
        return kind(**values)
    except SettingError as error:
        said = str(error)
    except ValidationError as error:
        said = refusal(error)
    name, _, why = said.partition(" ")
    raise RecipeError(f"--{name.replace('_', '-')} {why}")


@contextlib.contextmanager
def named_as_typed(
    parameters: Sequence[Parameter], values: Mapping[str, Any]
) -> Iterator[None]:
    """In the context an error that begins with a setting's name has the option's name in its place, if the option was
    typed: its value is in ``values``."""
    try:
        yield
    except UserError as error:
        said = str(error)
        setting = re.match(r"(recipe field )?(\w+) is ", said)
        for parameter in parameters:
            typed = values.get(parameter.name) not in (None, [])
            if setting is None or not typed or setting[2] != parameter.name:
                continue
            if setting[1] or ": it should " in said:
                (info,) = parameter.annotation.__metadata__
                # typer keeps the first name of an option in place of a default
                name = str(info.default) if isinstance(info, OptionInfo) else setting[2]
                error.args = (f"{name}{said[setting.end(2) :]}",)
        raise


def check_tasks(values: Mapping[str, Any]) -> None:
    """Refuses names of tasks that lm-eval does not know, where another option of a command is missing. Raises
    RecipeError."""
    if values.get("tasks"):
        from sparsellm.evaluation.tasks import find_tasks

        find_tasks(listed(values["tasks"]), values.get("tasks_dir"))


def listed(text: str) -> list[str]:
    """The parts of a text with commas."""
    return [part.strip() for part in text.split(",") if part.strip()]


# Options of several commands
ONE_MODEL = argument("MODEL", "Checkpoint directory, hub id, .gguf file, or 'demo'.")
MAX_TOKENS = option(
    "--max-tokens N", "Most tokens of the text to use.", TEXT, shown="all"
)
WINDOW = [option("--seq-len N", "Tokens in a window.", TEXT, shown=SEQ_LEN), MAX_TOKENS]
TRUST = flag(
    "--trust-remote-code",
    "Run modelling code that comes with the checkpoint.",
    RESOURCES,
)
PLUGIN = repeatable(
    "--plugin FILE|MODULE",
    "Python code that registers solvers, allocations or methods. It is run. Repeatable.",
)
RUN = [
    *[field(name, COMMON) for name in COMMON_FIELDS],
    *[field(name) for name in FIELDS if name not in COMMON_FIELDS],
    *RECIPE,
    PLUGIN,
]
RUNNING = [
    option(
        "--device NAME",
        "cpu, cuda or cuda:1.",
        RESOURCES,
        default="cpu",
        values=DEVICES,
    ),
    field(
        "dtype",
        help="Type of the computation: float32, bfloat16, float16, or auto for the stored one.",
    ),
    option(
        "--activations TYPE",
        "Activations of packed int8 and int4 weights: int8 (faster) or fp32 (exact).",
        RESOURCES,
        shown="SPARSELLM_ACTIVATIONS, else int8",
        values=("int8", "fp32"),
    ),
]
SERVED = [
    option("--threads N", "CPU threads.", RESOURCES, shown="as torch chooses"),
    *RUNNING,
]
SAVE = flag(
    "--save/--no-save",
    "Append the result to results.json, in a directory with pruning.json or packed.json.",
    default=True,
)
VERBOSE = flag("--verbose -v", "Print every step, and the time of every phase.")
JSON = flag("--json", "Print one JSON object on stdout, and nothing else there.")
REPORTING = [
    flag("--quiet -q", "Print no progress, only the result, warnings and errors."),
    VERBOSE,
    JSON,
]
RESTARTING = [
    flag("--overwrite", "Replace an earlier output that sparsellm wrote."),
    flag("--restart", "Start from the beginning; remove what an unfinished run left."),
]
WRITING = [*RESTARTING, *REPORTING]
