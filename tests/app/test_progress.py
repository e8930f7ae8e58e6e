"""The display of progress, as a terminal emulator shows it, in pipes, and in notebooks."""

from __future__ import annotations

import io
import re
from functools import cache
from pathlib import Path

import pyte
import pytest

import sparsellm
from sparsellm.app import console, options
from sparsellm.interrupts import Interrupted
from sparsellm.method.allocation import ALLOCATIONS
from sparsellm.method.blocks import METHODS
from sparsellm.progress import NOTE, Pace, Progress


class Terminal(io.StringIO):
    """A terminal that remembers everything it was sent."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.columns = columns

    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """The lines that are shown now, without those that are empty."""
        screen = pyte.Screen(self.columns, 60)
        pyte.Stream(screen).feed(self.getvalue().replace("\n", "\r\n"))
        return [line.rstrip() for line in screen.display if line.strip()]


@pytest.fixture
def terminal(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Terminal:
    """Stderr as a terminal of 80 columns, or as many as the test asks for."""
    columns = getattr(request, "param", 80)
    made = Terminal(columns)
    for name in ("NO_COLOR", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {
        "COLUMNS": str(columns),
        "LINES": "60",
        "TERM": "xterm-256color",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        console, "log", cache(lambda: console.PlainConsole(stderr=True, file=made))
    )
    return made


def events() -> list[Progress]:
    return [
        Progress("open", 0, 1, "opening [b]the[/b] model"),
        Progress(NOTE, 1, 1, "predicted [peak] memory " + "of a run " * 12),
        Progress("check", 0, 1),
        Progress("prune", 0, 2, "block 1/2 :x:", 0.01234, 0.5, linear="0.a"),
        Progress(
            "prune",
            1,
            2,
            "block 2/2 :x: " + "very long " * 20,
            0.02,
            0.498765,
            linear="1.b",
        ),
    ]


def show_a_run(events: list[Progress], error: BaseException | None = None) -> None:
    with console.progress() as show:
        for event in events:
            show(event)
        if error is not None:
            raise error


def test_long_phases_get_a_line_and_the_bar_becomes_full(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console, "LONG_PHASE", 0.0)
    show_a_run(events())
    note, *_, first, second, third, bar = terminal.screen()
    assert note.startswith("predicted [peak] memory of a run")
    for line, phase in (
        (first, "open the model"),
        (second, "check the weights"),
        (third, "prune blocks"),
    ):
        assert re.fullmatch(rf"{phase}: \d\.\d s", line)
    assert re.fullmatch(r"━+ 100 % in \d\.\d s", bar)


@pytest.mark.parametrize("terminal", [80, 120], indirect=True)
def test_below_the_bar_stands_the_step_in_work(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr(console, "Pace", lambda: Pace(lambda: now[0]))
    with console.progress() as show:
        for event in events():
            show(event)
            now[0] += 20
        now[0] -= 5
        console.log()._live_stack[-1].refresh()
        bar, step, state = terminal.screen()[-3:]
        now[0] += 60
        console.log()._live_stack[-1].refresh()
        late = terminal.screen()[-3]
    assert re.search(r"━ +50 %, about 5.0 s left$", bar)
    assert re.search(r"━ +50 %$", late)  # it takes longer than was foreseen
    assert step.startswith("  prune blocks: block 2/2 :x: very long ")
    assert re.fullmatch(
        r"  sparsity 49\.9% · memory \d+\.\d\d GB · error of 1\.b 0\.0200", state
    )
    assert max(map(len, terminal.screen())) <= terminal.columns


def test_what_is_said_at_a_signal_stands_below_the_bar(terminal: Terminal) -> None:
    with pytest.raises(Interrupted):
        show_a_run(events(), Interrupted(2))
    console.say("interrupted (SIGINT); 1 of 2 blocks are kept", error=True)
    shown = terminal.screen()
    assert shown[-1] == "interrupted (SIGINT); 1 of 2 blocks are kept"
    # how far it came, without a time left
    assert re.search(r"━ +\d+ % in \d\.\d s$", shown[-4])
    assert terminal.getvalue().count("\x1b[?25h") == 1  # the cursor is shown again


def test_a_dumb_terminal_gets_lines(
    terminal: Terminal, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", "dumb")
    console.log.cache_clear()
    show_a_run(events())
    assert "\x1b" not in terminal.getvalue()
    assert "━" not in terminal.getvalue()


def test_a_pipe_gets_lines_at_a_calm_rate(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    console.log.cache_clear()
    show_a_run(events())
    captured = capsys.readouterr()
    assert captured.out == ""
    assert [line[:23] for line in captured.err.splitlines()] == [
        "predicted [peak] memory"
    ]
    monkeypatch.setattr(console, "CALM", 0.0)
    monkeypatch.setattr(console, "LONG_PHASE", 0.0)
    show_a_run(events())
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith(
        "0 % · open the model: opening [b]the[/b] model · memory "
    )
    assert lines[2:4] == ["open the model: 0.0 s", lines[3]]
    said = r"\d % · prune blocks: block 1/2 :x: · sparsity 50\.0% · memory .* · error of 0\.a 0\.0123"
    assert re.search(said, lines[5])
    assert lines[-1] == "prune blocks: 0.0 s"


def test_the_shell_completes_registered_names() -> None:
    assert set(options.registered("method/blocks", "method/solvers")) == set(METHODS)
    assert set(options.registered("method/allocation")) == set(ALLOCATIONS)


def test_a_program_shows_the_progress_of_a_run_with_one_line(
    llama: Path, terminal: Terminal
) -> None:
    with sparsellm.show_progress() as progress:
        sparsellm.prune(
            llama,
            sparsellm.Recipe(method="magnitude", samples=2, seq_len=16),
            progress=progress,
        )
    assert "100 %" in terminal.screen()[-1]
