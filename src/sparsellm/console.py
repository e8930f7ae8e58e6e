"""The output of the command line: two consoles, tables that fit 80 columns, progress, and the seconds of each phase.

Text of users and models is never markup: the consoles ignore markup and emoji names, and show control characters, which
a terminal would obey, as escapes. Styles are set by :class:`rich.text.Text` only.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, Task, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from sparsellm import interrupts
from sparsellm.progress import NOTE, ProgressCallback
from sparsellm.progress import Progress as Event

LONG_PHASE = 10.0  # seconds; a finished phase that took longer gets a line in a log file
SMALL_SHARE = 0.02  # of the time; phases below it are added up in one row

_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_ENDS_OF_LINES = re.compile(r"[\n\u2028\u2029]")

_PHASES = {
    "open": "open the model",
    "calibration": "read the calibration text",
    "check": "check the weights",
    "allocation": "choose sparsities",
    "gradients": "gradients of the loss",
    "embed": "embed",
    "replay": "run finished blocks",
    "read": "read blocks",
    "prune": "prune blocks",
    "forward": "run pruned blocks",
    "write": "write blocks",
    "count": "count zeros",
    "sweep": "sweep the whole model",
    "prune/dense": "run dense blocks",
    "prune/statistics": "gather statistics",
    "prune/solve": "solve",
    "prune/targets": "targets",
    "prune/variables": "auxiliary variables",
    "prune/refine": "refit",
}


class PlainConsole(Console):
    """A console that prints strings without interpreting markup."""

    def __init__(self, *, stderr: bool = False) -> None:
        super().__init__(stderr=stderr, markup=False, emoji=False, highlight=False)

    def render_str(self, text: str, **options: Any) -> Text:  # type: ignore[override]
        return super().render_str(visible(text), **options)

    def on_broken_pipe(self) -> None:
        """Ends the program if the reader of stdout is gone, but not if the reader of stderr is."""
        if not self.stderr:
            super().on_broken_pipe()
        self.quiet = True


@cache
def out() -> PlainConsole:
    """The console for results, on stdout."""
    return PlainConsole()


@cache
def log() -> PlainConsole:
    """The console for everything else, on stderr."""
    return PlainConsole(stderr=True)


def visible(text: str) -> str:
    """The text with control characters, except tabs and line breaks, as escapes such as ``\\x1b``.

    Characters that change the direction of writing are escaped as well.
    """
    return _CONTROLS.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), text)


def one_line(text: str) -> str:
    """As :func:`visible`, with line breaks as escapes too."""
    return _ENDS_OF_LINES.sub(lambda match: match.group().encode("unicode_escape").decode("ascii"), visible(text))


def say(line: str, *, error: bool = False) -> None:
    """Prints one line, without wrapping it, on stdout or stderr.

    Errors of stderr, such as a closed terminal, are ignored.
    """
    with contextlib.suppress(*((OSError,) if error else ())):
        (log() if error else out()).print(one_line(line), soft_wrap=True)


def write_json(content: Any) -> None:
    """Prints one JSON object on stdout, in ASCII if the encoding of stdout requires it."""
    utf8 = (sys.stdout.encoding or "").lower().replace("-", "") == "utf8"
    sys.stdout.write(json.dumps(content, ensure_ascii=not utf8) + "\n")


# ---------------------------------------------------------------------- numbers and tables


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
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def speed(median: float, slowest: float, fastest: float) -> str:
    """A median with its range, such as ``41.2 (40.0–41.9)``."""

    def short(value: float) -> str:
        return f"{value:.1f}" if value < 99.95 else f"{value:.0f}" if value < 9999.5 else count(value)

    return f"{short(median)} ({short(slowest)}–{short(fastest)})"


def table(names: tuple[str, ...], numbers: tuple[str, ...], title: str | None = None) -> Table:
    """An empty table with columns of names, which wrap on a narrow terminal, and of numbers, which do not."""
    columns = [Column(name, overflow="fold") for name in names]
    columns += [Column(number, justify="right", no_wrap=True) for number in numbers]
    return Table(*columns, title=title)


def phases(seconds: Mapping[str, float], *, parts: bool = False) -> Table:
    """A table of the seconds of each phase and its share of the time, longest first; small phases are added up.

    Args:
        seconds: by phase; a name such as ``prune/solve`` is a part of ``prune``.
        parts: show parts as well, and small phases one by one.
    """
    whole = {name: value for name, value in seconds.items() if "/" not in name}
    total = sum(whole.values()) or 1.0
    shown = table(("step",), ("time", "share"))
    rest = 0.0
    for name, value in sorted(whole.items(), key=lambda item: -item[1]):
        if value < SMALL_SHARE * total and not parts:
            rest += value
            continue
        shown.add_row(_PHASES.get(name, name), duration(value), f"{value / total:.0%}")
        within = {part: value for part, value in seconds.items() if part.startswith(f"{name}/")} if parts else {}
        for part, took in sorted(within.items(), key=lambda item: -item[1]):
            shown.add_row(f"  {_PHASES.get(part, part)}", duration(took), f"{took / total:.0%}", style="dim")
    if rest:
        shown.add_row("everything else", duration(rest), f"{rest / total:.0%}")
    shown.add_section()
    shown.add_row("all", duration(sum(whole.values())), "", style="bold")
    return shown


# ---------------------------------------------------------------------- progress


@contextlib.contextmanager
def progress(*, quiet: bool = False, verbose: bool = False) -> Iterator[ProgressCallback]:
    """The display of progress: bars on a terminal, lines elsewhere.

    Each event is also a safe point, where the run stops if a library swallowed the exception of a signal.

    Args:
        quiet: show nothing.
        verbose: show a line for every step and every phase, instead of bars.
    """
    bars = log().is_terminal and not quiet and not verbose
    shown: _Bars | _Lines = _Bars() if bars else _Lines(quiet, verbose)

    def show(event: Event) -> None:
        interrupts.check()
        if event.phase != NOTE:
            shown.show(event)
        elif not quiet:
            say(event.detail, error=True)

    with shown:
        yield show


class _Phases:
    """The current phase of a run, and the seconds of each phase so far."""

    def __init__(self) -> None:
        self.name = ""
        self.seconds: dict[str, float] = {}
        self._since = time.monotonic()

    def enter(self, name: str) -> str:
        """Enters a phase, or none, and returns the phase that this ends, or ""."""
        if name == self.name:
            return ""
        left = self.name
        if left:
            self.seconds[left] = self.so_far(left)
        self.name, self._since = name, time.monotonic()
        return left

    def so_far(self, name: str) -> float:
        """Seconds of a phase, including the time since it was entered."""
        running = time.monotonic() - self._since if name == self.name else 0.0
        return self.seconds.get(name, 0.0) + running


class _Lines:
    """Progress for files and pipes: one line for a phase that took long; with ``verbose``, one for every step."""

    def __init__(self, quiet: bool, verbose: bool) -> None:
        self._quiet, self._verbose = quiet, verbose
        self._phases = _Phases()
        self._detail = ""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._finish(self._phases.enter(""))

    def show(self, event: Event) -> None:
        self._finish(self._phases.enter(event.phase))
        if self._verbose and event.detail and event.detail != self._detail:
            say(f"{time.strftime('%H:%M:%S')} {event.phase}: {event.detail}", error=True)
            self._detail = event.detail

    def _finish(self, name: str) -> None:
        took = self._phases.seconds.get(name, 0.0)
        if name and not self._quiet and (self._verbose or took >= LONG_PHASE):
            say(f"{name}: {duration(took)}", error=True)


class _Bars:
    """Progress for a terminal: a bar for the current phase, and a line with the seconds of each finished phase."""

    def __init__(self) -> None:
        self._phases = _Phases()
        self._tasks: dict[str, Any] = {}
        fixed = Column(no_wrap=True)
        columns = (
            _Name(table_column=fixed),
            _Bar(bar_width=20, table_column=fixed),
            _Detail(),
            _Seconds(self._phases, fixed),
            _Left(table_column=fixed),
        )
        self._progress = Progress(*columns, console=log())

    def __enter__(self) -> None:
        self._progress.start()

    def __exit__(self, kind: object, *_: object) -> None:
        if kind is None:
            self._finish(self._phases.enter(""))
        self._progress.stop()

    def show(self, event: Event) -> None:
        self._finish(self._phases.enter(event.phase))
        if event.phase not in self._tasks:
            self._tasks[event.phase] = self._progress.add_task(event.phase, detail="")
        self._progress.update(
            self._tasks[event.phase], completed=event.done, total=event.total, detail=event.detail, over=False
        )

    def _finish(self, name: str) -> None:
        if name:
            self._progress.update(self._tasks[name], over=True)


class _Name(ProgressColumn):
    def render(self, task: Task) -> Text:
        return Text(f"{visible(task.description):<12}")


class _Detail(ProgressColumn):
    def render(self, task: Task) -> Text:
        detail = "" if task.fields.get("over") else one_line(task.fields["detail"])
        return Text(detail, no_wrap=True, overflow="ellipsis")


class _Bar(BarColumn):
    def render(self, task: Task) -> RenderableType:  # type: ignore[override]
        return Text("✓", style="green") if task.fields.get("over") else super().render(task)


class _Seconds(ProgressColumn):
    def __init__(self, phases: _Phases, column: Column) -> None:
        super().__init__(table_column=column)
        self._phases = phases

    def render(self, task: Task) -> Text:
        return Text(duration(self._phases.so_far(task.description)), style="progress.elapsed")


class _Left(TimeRemainingColumn):
    """The remaining time; empty while it is unknown, instead of ``-:--:--``."""

    def render(self, task: Task) -> Text:
        if task.fields.get("over") or task.time_remaining is None:
            return Text("")
        return Text("left ") + super().render(task)
