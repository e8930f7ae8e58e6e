"""A command as a process: its exit code, errors in one line, signals, and processes that torchrun started."""

from __future__ import annotations

import errno
import io
import logging
import os
import select
import shutil
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import typer

from sparsellm import __version__, interrupts
from sparsellm.errors import RecipeError, one_line, shown, some
from sparsepack.errors import Note, UserError

_ENVIRONMENT = dict(os.environ)  # before this process quiets libraries


def count() -> int:
    """The processes that torchrun started, by its environment; 1 where some of its variables are missing."""
    started = {
        "TORCHELASTIC_RUN_ID",
        "RANK",
        "MASTER_ADDR",
        "MASTER_PORT",
    } <= os.environ.keys()
    size = os.environ.get("WORLD_SIZE", "")
    return int(size) if started and size.isdecimal() else 1


def announce() -> None:
    """Says on stderr that the command has begun, unless torch is imported already: that takes seconds."""
    if "torch" not in sys.modules and os.environ.get("RANK", "0") == "0":
        with suppress(OSError):
            sys.stderr.write(
                f"sparsellm {__version__}: loading torch and transformers\n"
            )
            sys.stderr.flush()


def run(command: Callable[[], Any]) -> None:
    """Runs a command and ends the process: one line and code 2 after a mistake, 128 + its number after a signal."""
    # Python has None for a stream that the caller closed.
    if sys.stdout is None:
        sys.stdout = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w")  # noqa: SIM115 - until the process ends
    if not os.environ.get("COLUMNS", "1").strip("0"):
        del os.environ["COLUMNS"]  # rich would print empty tables
    _quiet_libraries()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # characters that the encoding lacks become escapes
            stream.reconfigure(errors="backslashreplace")
    code = _exit_code(command)
    if count() > 1:
        _leave_the_others(code)
    # Python flushes both when it ends, and a failure there would change the exit code.
    for stream in (sys.stderr, sys.stdout):
        try:
            stream.flush()
        except OSError:  # the terminal or pipe is closed, or the disk is full
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
    if code:
        sys.exit(code)


def execute(command: Sequence[str]) -> None:
    """Runs another command in place of this process. Every Python in it registers the packed format when it starts, and
    commands next to this Python are found first. A RecipeError if it does not exist or cannot be run."""
    environment = dict(_ENVIRONMENT)
    name = shown(command[0])
    for variable, path in (
        ("PYTHONPATH", Path(__file__).parent / "_startup"),
        ("PATH", Path(sys.executable).parent),
    ):
        environment[variable] = os.pathsep.join(
            [str(path), *filter(None, [environment.get(variable)])]
        )
    program = shutil.which(command[0], path=environment["PATH"])
    if program is None:
        raise RecipeError(
            f"{name} is not a command on PATH; give one, such as lm_eval, or python FILE"
        )
    try:
        # by Python; the next program would inherit that
        for ignored in (
            signal.SIGPIPE,
            signal.SIGXFSZ,
        ):
            signal.signal(ignored, signal.SIG_DFL)
        os.execve(program, list(command), environment)
    except (OSError, ValueError) as error:
        raise RecipeError(
            f"{name} cannot be run: {getattr(error, 'strerror', None) or error}"
        ) from None


def _exit_code(command: Callable[[], Any]) -> int:
    try:
        with interrupts.installed(), ExitStack() as processes:
            if count() > 1:
                from sparsellm import parallel

                processes.enter_context(parallel.session())
            command()
            sys.stdout.flush()  # what is still buffered can find a full disk too
        return 0
    except (interrupts.Interrupted, KeyboardInterrupt, typer.Abort):
        return _interrupted(interrupts.received() or signal.SIGINT)
    except Exception as error:
        # it has ended another process, for example
        if (signum := interrupts.received()) is not None:
            return _interrupted(signum)
        if isinstance(error, BrokenPipeError) and _reader_is_gone():
            return 1
        if (message := _message(error)) is not None:
            if message:  # empty if the help was shown instead
                _say_why(f"error: {message}")
            return 2
        if count() == 1:
            raise
        _say_why(f"unexpected {type(error).__name__}")
        traceback.print_exc()
        return 1


def _reader_is_gone() -> bool:
    """Whether stdout is a pipe whose other end is closed."""
    watched = select.poll()
    watched.register(sys.stdout.fileno(), 0)
    return any(event & select.POLLERR for _, event in watched.poll(0))


def _message(error: Exception) -> str | None:
    """What the user reads of an error: empty where the help was shown instead, None for an error that is unexpected."""
    # click's own errors: a missing argument, an unknown option
    if hasattr(error, "format_message"):
        return _usage_message(error)
    if isinstance(error, PermissionError | FileNotFoundError) and (
        error.filename or error.errno == errno.ENOENT
    ):
        return f"{error.filename or 'the current directory'}: {error.strerror}; correct the path or its permissions"
    # files of a run raise StorageError
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return "standard output is on a full disk; make room, or write elsewhere"
    # torch's, from the system
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        advice = "raise its limit (ulimit -v), or lower batch, tokens, context or --memory where there is one"
        return f"the system gives this process no more memory; {advice}"
    if type(error).__name__ == "OutOfMemoryError":  # torch's, from the memory of a GPU
        return f"the GPU has no memory left ({one_line(error)[:160]}); lower batch, tokens or context, or say cpu"
    return str(error) if isinstance(error, UserError) else None


def _usage_message(error: Any) -> str:
    """What the user reads of an error of click: what is wrong with the words of the command line, and what to write."""
    said = str(error.format_message()).rstrip(".")
    if not said:
        return ""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "sparsellm"
    parameter = getattr(error, "param", None)
    if said.startswith("Missing") and parameter is not None:
        return _missing(parameter)
    option = shown(getattr(error, "option_name", ""))[1:-1]
    if hasattr(error, "possibilities"):
        hint = f"`{command} --help` lists all"
        others = _commands_with(error.option_name, context)
        if command.endswith(" exec"):
            hint = "write -- before the command that is run"
        elif others:
            hint = f"it belongs to {some(others, 3)}; {hint}"
        elif error.possibilities:
            hint = f"did you mean {error.possibilities[0]}?"
        return f"{command} has no option {option}; {hint}"
    if option:
        return f"{option} has no value; write one after it, as `--help` shows"
    if said.startswith("No such command") and "Did you mean" not in said:
        return f"{said}; `{command} --help` lists all"
    return said


def _commands_with(option: str, context: Any) -> list[str]:
    """The names of the commands that have an option."""
    if context is None or context.parent is None:
        return []
    commands = []
    for name, command in context.parent.command.commands.items():
        if any(option in parameter.opts for parameter in command.params):
            commands.append(name)
    return commands


def _missing(parameter: Any) -> str:
    """The message for an argument or an option without which a command does nothing."""
    name = parameter.metavar
    usage = name
    if parameter.param_type_name == "option":
        name = parameter.opts[0]
        usage = f"{name} {parameter.metavar}"
    told = (parameter.help or "").rstrip(".")
    return f"{name} is missing; give {usage}: {told}"


def _interrupted(signum: int) -> int:
    """Prints which files are kept and which command resumes the run; returns the exit code."""
    words = interrupts.last_words(signum)
    if sys.stderr.isatty():  # the command in a separate line, to copy it
        words, _, command = words.partition(interrupts.RESUMES)
        _say_why(
            *filter(None, (words, command and interrupts.RESUMES.strip("; "), command))
        )
    else:
        _say_why(words)
    return interrupts.EXIT_CODE + signum


def _say_why(first: str, *more: str) -> None:
    """Prints an error; if several processes fail, only the first does."""
    from sparsellm.app import console

    if count() > 1:
        from sparsellm import parallel

        # If the count is gone, its process was killed and reported nothing, or a signal stopped it and it has reported.
        if not parallel.claims_failure(alone=interrupts.received() is None):
            return
        first = f"process {os.environ['RANK']} of {count()}: {first}"
    console.say(first, error=True)
    for line in more:
        console.say(line, error=True, unbroken=True)


def _leave_the_others(code: int) -> None:
    """Ends a process that torchrun started, without the interpreter's shutdown, during which a thread of the process
    group that is not joined sometimes aborts it ("terminate called without an active exception")."""
    with suppress(OSError):
        sys.stdout.flush()
        sys.stderr.flush()
    # the others may wait for this process until it is gone
    if code and interrupts.received() is None:
        from sparsellm import parallel

        parallel.await_other_failures()
    os._exit(code)


def _quiet_libraries() -> None:
    """Silences bars and warnings of libraries, which would break our progress bars or mix with results on stdout."""
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    logging.getLogger("transformers").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning)
    warnings.formatwarning = _formatted
    # sizes of 0 in a config are refused later
    warnings.filterwarnings("ignore", "Initializing zero-element tensors")


_plain = warnings.formatwarning


def _formatted(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    line: str | None = None,
) -> str:
    """A note of ours as one line, and other warnings as Python shows them."""
    if issubclass(category, Note):
        return f"note: {message}\n"
    return _plain(message, category, filename, lineno, line=line)
