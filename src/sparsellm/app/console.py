"""The output of the command line: two consoles, tables that fit 80 columns, and progress.

Text of users and models is never markup, and control characters, which a terminal would obey, are shown as escapes.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import re
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping
from functools import cache
from typing import IO, Any

import psutil
from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.measure import Measurement
from rich.progress_bar import ProgressBar
from rich.segment import Segment, Segments
from rich.table import Column, Table
from rich.text import Text

from sparsellm import interrupts
from sparsellm.errors import RecipeError
from sparsellm.files.named import as_typed
from sparsellm.progress import (
    DETAIL,
    NOTE,
    PHASES,
    Pace,
    ProgressCallback,
)
from sparsellm.progress import Progress as Event

LONG_PHASE = 10.0  # seconds; a finished phase that took longer gets a line
CALM = 30.0  # seconds between two lines of progress in a log file

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_ENDS_OF_LINES = re.compile(r"[\n\u2028\u2029]")


class PlainConsole(Console):
    """A console that prints strings without interpreting markup."""

    def __init__(self, *, stderr: bool = False, file: IO[str] | None = None) -> None:
        super().__init__(
            stderr=stderr, file=file, markup=False, emoji=False, highlight=False
        )

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        return super().render_str(visible(text), **options)

    def on_broken_pipe(self) -> None:
        """Ends the program if the reader of stdout is gone, but not if the reader of stderr is."""
        if not self.stderr:
            super().on_broken_pipe()
        self.quiet = True


@cache
def out() -> PlainConsole:
    """The console for results, on stdout; wide in a pipe, where names must stay whole."""
    console = PlainConsole()
    if not console.is_terminal and "COLUMNS" not in os.environ:
        console.width = 160
    return console


@cache
def log() -> PlainConsole:
    """The console for everything else, on stderr."""
    return PlainConsole(stderr=True)


def piece(text: str) -> None:
    """Prints a piece of generated text, whose tabs rich would replace by spaces."""
    out().print(Segments([Segment(visible(text))]), end="", soft_wrap=True)


def visible(text: str) -> str:
    """The text with control characters but tabs and line breaks, and marks of direction, as escapes like ``\\x1b``."""
    return _CONTROLS.sub(_escape, text)


def one_line(text: str) -> str:
    """Same as :func:`visible`, with line breaks as escapes too."""
    return _ENDS_OF_LINES.sub(_escape, visible(text))


def _escape(match: re.Match[str]) -> str:
    return match.group().encode("unicode_escape").decode("ascii")


def say(line: str, *, error: bool = False, unbroken: bool = False) -> None:
    """Prints one line on stdout, or on stderr, whose own errors are ignored. On a terminal that is too narrow it breaks
    between words, unless it stays ``unbroken``, such as a command that is copied."""
    console = out()
    if error:
        console = log()
        line = as_typed(line)
    text = one_line(line)
    if console.is_terminal and not unbroken:
        text = textwrap.fill(
            text, console.width, break_long_words=False, break_on_hyphens=False
        )
    with contextlib.suppress(*((OSError,) if error else ())):
        console.print(text, soft_wrap=True)


def write_json(content: object) -> None:
    """Prints one JSON object on stdout, in ASCII if the encoding of stdout requires it."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(content, ensure_ascii=not utf8) + "\n")


def count(number: float) -> str:
    """A count in four digits or less: 950, 10.5K, 106.2M, 7.0B."""
    for unit, size in (("", 1.0), ("K", 1e3), ("M", 1e6), ("B", 1e9)):
        if number < 999.95 * size:
            return f"{number:.0f}" if not unit else f"{number / size:.1f}{unit}"
    return f"{number / 1e12:.1f}T"


def duration(seconds: float) -> str:
    """A time such as 0.3 s, 42 s, 17 min 13 s, 3 h 05 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    rounded = round(seconds)
    if rounded < 60:
        return f"{rounded} s"
    if rounded < 3600:
        return f"{rounded // 60} min {rounded % 60:02d} s"
    return f"{rounded // 3600} h {rounded % 3600 // 60:02d} min"


def speed(median: float, slowest: float, fastest: float) -> str:
    """A median with its range, such as ``41.2 (40.0–41.9)``."""

    def short(rate: float) -> str:
        if rate < 99.95:
            return f"{rate:.1f}"
        if rate < 9999.5:
            return f"{rate:.0f}"
        return count(rate)

    return f"{short(median)} ({short(slowest)}–{short(fastest)})"


def table(
    names: tuple[str, ...], numbers: tuple[str, ...], title: str | None = None
) -> Table:
    """An empty table with columns of names, which wrap on a narrow terminal, and of numbers, which do not."""
    columns = [Column(name, overflow="fold") for name in names]
    columns += [Column(number, justify="right", no_wrap=True) for number in numbers]
    return Table(*columns, title=title)


def width_of(shown: Table) -> int:
    """The columns of a terminal that a table takes if nothing in it is broken."""
    wide = out().options.update(width=10_000)
    return Measurement.get(out(), wide, shown).maximum


def phases(seconds: Mapping[str, float], *, parts: bool = False) -> Table:
    """The seconds of each phase and its share of the time, longest first; with ``parts`` also ``prune/solve`` etc."""
    longest = sorted(seconds, key=lambda name: -seconds[name])
    names = [name for name in longest if "/" not in name]
    total = sum(seconds[name] for name in names)
    shown = table(("step",), ("time", "share"))
    for name in names:
        within = [part for part in longest if parts and part.startswith(f"{name}/")]
        for phase in (name, *within):
            step = f"{'  ' * ('/' in phase)}{PHASES.get(phase, phase)}"
            share = seconds[phase] / (total or 1)
            shown.add_row(
                step,
                duration(seconds[phase]),
                f"{share:.0%}",
                style="dim" if "/" in phase else None,
            )
    shown.add_section()
    shown.add_row("all", duration(total), "", style="bold")
    return shown


@contextlib.contextmanager
def progress(
    *, quiet: bool = False, verbose: bool = False
) -> Iterator[ProgressCallback]:
    """A display of progress, as a callback for ``progress=``: a bar on a terminal or in a notebook, lines elsewhere;
    nothing if ``quiet``, a line for every step and every phase if ``verbose``. At each event, the run stops if a
    library swallowed the exception of a signal."""
    if quiet and verbose:
        raise RecipeError(
            "--quiet and --verbose contradict each other; give one of them"
        )
    display = (
        None
        if quiet
        else _Display(live=not verbose and _can_redraw(log()), verbose=verbose)
    )

    def show(event: Event) -> None:
        interrupts.check()
        if display is not None:
            display.show(event)

    with display or contextlib.nullcontext():
        yield show


def _can_redraw(console: Console) -> bool:
    """Whether lines on the console can be replaced. A notebook needs ipywidgets for it."""
    if console.is_jupyter:
        return importlib.util.find_spec("ipywidgets") is not None
    return console.is_terminal and not console.is_dumb_terminal


def _step(event: Event) -> str:
    """The phase and the step in work."""
    name = PHASES.get(event.phase, event.phase)
    return one_line(f"{name}: {event.detail}" if event.detail else name)


def _state(event: Event) -> str:
    """The sparsity so far, the memory, and the error of the linear that was pruned last."""
    parts = [f"sparsity {event.sparsity:.1%}"] if event.sparsity is not None else []
    parts.append(f"memory {psutil.Process().memory_info().rss / 1e9:.2f} GB")
    parts += (
        [f"error of {one_line(event.linear)} {event.error:.4f}"]
        if event.error is not None
        else []
    )
    return " · ".join(parts)


class _Display:
    """Progress of a run, with a line for each phase that took long; ``live``: a bar and the step in work below it,
    else a line at a calm rate, or with ``verbose`` for every step and phase."""

    def __init__(self, *, live: bool, verbose: bool) -> None:
        self._verbose = verbose
        self._pace = Pace()
        self._event: Event | None = None
        self._over = False
        self._said = 0.0  # elapsed seconds at the last line
        self._live = Live(self, console=log(), refresh_per_second=4) if live else None

    def __enter__(self) -> None:
        if self._live is not None:
            self._live.start()

    def __exit__(self, kind: object, *_: object) -> None:
        self._over = True
        if kind is None:
            self._finish(self._pace.end())
        if self._live is not None:
            # nothing was done: nothing to show
            self._live.transient = kind is not None and not self._pace.share
            self._live.stop()

    def show(self, event: Event) -> None:
        if event.phase in (NOTE, DETAIL):
            if event.phase == NOTE or self._verbose:
                say(event.detail, error=True)
            return
        self._finish(self._pace.see(event))
        before = self._event
        self._event = event
        if (
            self._verbose
            and event.detail
            and (before is None or event.detail != before.detail)
        ):
            say(
                f"{time.strftime('%H:%M:%S')} {_step(event)} · {_state(event)}",
                error=True,
            )
        elif (
            self._live is None
            and not self._verbose
            and self._pace.elapsed - self._said >= CALM
        ):
            say(f"{self._done()} · {_step(event)} · {_state(event)}", error=True)
            self._said = self._pace.elapsed

    def _finish(self, phase: str) -> None:
        took = self._pace.took
        if phase and (self._verbose or took >= LONG_PHASE):
            part = ""
            if self._event is not None and self._event.part:
                part = f"{self._event.part}: "
            say(f"{part}{PHASES.get(phase, phase)}: {duration(took)}", error=True)
            self._said = self._pace.elapsed

    def _done(self) -> str:
        """The share done of the phase, and the time left of it if it is known."""
        done = f"{int(100 * self._pace.share)} %"
        left = self._pace.left
        if self._over:
            return f"{done} in {duration(self._pace.elapsed)}"
        if left is None:
            return done
        return f"{done}, about {duration(left)} left"

    def __rich_console__(
        self, console: Console, options: ConsoleOptions
    ) -> Iterator[RenderableType]:
        if self._event is None:
            return
        grid = Table.grid(
            Column(ratio=1),
            Column(no_wrap=True, min_width=28),
            padding=(0, 1, 0, 0),
            expand=True,
        )
        grid.add_row(ProgressBar(total=1.0, completed=self._pace.share), self._done())
        yield grid
        if self._pace.phase:
            for line in (_step(self._event), _state(self._event)):
                yield Text(f"  {line}", "dim", no_wrap=True, overflow="ellipsis")
