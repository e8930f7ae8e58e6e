"""SIGINT, SIGTERM and SIGHUP, in real processes: what is said, what is kept, and how the process ends."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import sparsellm
from sparsellm import PruneResult, interrupts
from tests import killing

ODD_NAME = "it's [b]out[/b] :x:"
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


def pruning(llama: Path, folder: Path, name: str = "p") -> list[Any]:
    return [
        "prune",
        llama,
        "--out",
        folder / name,
        "--method=magnitude",
        "--samples=2",
        "--seq-len=16",
    ]


def stopped(
    folder: Path, signum: int, *command: Any, **options: Any
) -> tuple[int, str]:
    """The exit code of a command that gets a signal where it waits, and the last line of what it says."""
    with killing.command(folder, *command, **options) as process:
        killing.send(process, signum)
        code = killing.ended(process)
    assert (folder / "stdout").read_text() == ""
    return code, (folder / "stderr").read_text().splitlines()[-1]


def go_on(said: str, run: Any) -> str:
    """What the command says that a last line names."""
    program, *again = shlex.split(said.partition("the same command resumes it:")[2])
    assert program == "sparsellm"
    return str(run(*again, exits=0)[2])


def test_a_signal_stops_and_says_what_is_kept(
    llama: Path, tmp_path: Path, run: Any
) -> None:
    out = tmp_path / ODD_NAME
    code, line = stopped(
        tmp_path,
        signal.SIGTERM,
        *pruning(llama, tmp_path, ODD_NAME),
        "--json",
        "--restart",
    )
    assert code == 143
    assert line.startswith(
        f"interrupted (SIGTERM); finished blocks are kept next to {out}; "
    )
    assert "--restart" not in line
    assert not out.exists()
    assert "resuming an unfinished run: 1 of 3 blocks are done" in go_on(line, run)
    assert (out / "pruning.json").is_file()


@pytest.mark.parametrize("options", [{"restart": True}, {}])
def test_what_does_not_go_on_keeps_nothing(
    options: dict[str, bool], llama: Path, tmp_path: Path
) -> None:
    """Of an unfinished run, before it is begun anew, and, without options, in a dry run."""
    (state := tmp_path / "p.partial" / ".sparsellm-run").mkdir(parents=True)
    (state / "run.json").write_text("{}")
    start = sparsellm.prune if options else sparsellm.dry_run
    with pytest.raises(interrupts.Interrupted), interrupts.installed():
        start(
            llama,
            out=tmp_path / "p",
            progress=lambda on: on.phase == "check" and signal.raise_signal(15),
            **options,
        )
    assert "this command keeps nothing: start it again" in interrupts.last_words(
        signal.SIGTERM
    )


def test_a_comparison_says_what_is_kept(llama: Path, tmp_path: Path, run: Any) -> None:
    grid = [
        "compare",
        llama,
        "--out",
        tmp_path / "grid",
        "--sparsity=0.5",
        "--method=magnitude",
        "--text=pydoc",
    ]
    grid += [
        "--calibration=pydoc",
        "--text-seq-len=32",
        "--max-tokens=64",
        "--samples=2",
        "--seq-len=16",
    ]
    code, line = stopped(tmp_path, signal.SIGINT, *grid)
    assert code == 130
    assert line.startswith(
        f"interrupted (SIGINT); finished runs and blocks are kept in {tmp_path / 'grid'}; the same"
    )
    assert "1 of 3 blocks are done" in go_on(line, run)


def test_a_signal_within_the_import_of_torch_is_told_without_torch(
    tmp_path: Path,
) -> None:
    """An import that a signal cut in two and that begins again is no longer one, and may end the process."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n"
    )
    line = [sys.executable, "-m", "sparsellm", "prune", "demo", "--out", "p"]
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path]),
    }
    done = subprocess.run(
        line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 130
    said = f"interrupted (SIGINT); this command keeps nothing: start it again with  {shlex.join(line)}"
    assert done.stderr.splitlines()[1:] == [said]
    (tmp_path / "p.partial" / ".sparsellm-run").mkdir(parents=True)
    # an earlier process left it
    (tmp_path / "p.partial" / ".sparsellm-run" / "run.json").write_text("{}")
    done = subprocess.run(
        line, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert (
        "finished blocks are kept next to p; the same command resumes"
        in done.stderr.splitlines()[1]
    )


def test_a_swallowed_signal_stops_the_run_at_its_next_step(
    llama: Path, tmp_path: Path
) -> None:
    code, line = stopped(
        tmp_path, signal.SIGINT, *pruning(llama, tmp_path), how="swallow"
    )
    assert (tmp_path / "swallowed").exists()
    assert code == 130
    assert "blocks are kept" in line


def test_a_second_signal_stops_at_once(llama: Path, tmp_path: Path) -> None:
    with killing.command(
        tmp_path, *pruning(llama, tmp_path), how="swallow for ever"
    ) as process:
        killing.send(process, signal.SIGINT)
        killing.await_file(tmp_path / "swallowed", process)
        killing.send(process, signal.SIGTERM)
        assert killing.ended(process) == 143
    assert "stopped at once" in (tmp_path / "stderr").read_text()


def test_an_ignored_signal_stays_ignored(llama: Path, tmp_path: Path) -> None:
    """As under nohup."""
    with killing.command(
        tmp_path, *pruning(llama, tmp_path), ignore=(signal.SIGHUP,)
    ) as process:
        killing.send(process, signal.SIGHUP)
        (tmp_path / "go").touch()
        assert killing.ended(process) == 0
    assert (tmp_path / "p" / "pruning.json").is_file()


def test_a_closed_terminal_does_not_change_the_exit_code(
    llama: Path, tmp_path: Path
) -> None:
    with killing.command(tmp_path, *pruning(llama, tmp_path), closed=True) as process:
        killing.send(process, signal.SIGHUP)
        assert killing.ended(process) == 129


def test_a_python_program_gets_its_own_keyboard_interrupt(
    llama: Path, tmp_path: Path
) -> None:
    with pytest.raises(KeyboardInterrupt):
        sparsellm.prune(
            llama,
            out=tmp_path / "p",
            progress=lambda event: signal.raise_signal(signal.SIGINT),
        )


def test_handlers_are_put_back(run: Any) -> None:
    before = [signal.getsignal(signum) for signum in CODES]
    assert run("--version")[0] == 0
    assert [signal.getsignal(signum) for signum in CODES] == before


def held(reached: list[str], signum: int, error: Exception | None = None) -> None:
    with interrupts.held():
        with interrupts.held():
            signal.raise_signal(signum)
            reached.append("inner")
        reached.append("outer")
        if error is not None:
            raise error
    reached.append("after")


@pytest.mark.parametrize(
    "error", [None, OSError("the disk is gone")], ids=["no error", "an error"]
)
def test_held_postpones_to_its_end(error: Exception | None) -> None:
    reached: list[str] = []
    with pytest.raises(interrupts.Interrupted) as stopped, interrupts.installed():
        held(reached, signal.SIGTERM, error)
    assert reached == ["inner", "outer"]
    assert interrupts.received() == signal.SIGTERM
    assert stopped.value.__context__ is error
    assert not isinstance(stopped.value, Exception)  # no handler of errors swallows it


def test_held_postpones_what_python_itself_would_do() -> None:
    reached: list[str] = []
    with pytest.raises(KeyboardInterrupt):
        held(reached, signal.SIGINT)
    assert reached == ["inner", "outer"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_forked_child_ends_by_its_own_signal() -> None:
    with interrupts.installed():
        ready, started = os.pipe()
        process = os.fork()
        if not process:
            # a signal before Python's own work after the fork is lost
            os.write(started, b".")
            while True:
                time.sleep(0.1)
        os.read(ready, 1)
        os.kill(process, signal.SIGTERM)
        assert os.waitpid(process, 0)[1] == signal.SIGTERM
        assert interrupts.received() is None


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["/opt/bin/sparsellm", "prune", "a b"], "sparsellm prune 'a b'"),
        (
            ["/x/sparsellm/__main__.py", "prune", "m"],
            f"{shlex.quote(sys.orig_argv[0])} -m sparsellm prune m",
        ),
        (["/x/other/__main__.py", "--token", "secret"], "__main__.py"),
    ],
)
def test_the_command_line_is_quoted(
    argv: list[str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", argv)
    assert interrupts.command_line() == expected


def test_a_recorded_command_is_unicode(monkeypatch: pytest.MonkeyPatch) -> None:
    # a byte that is not UTF-8
    monkeypatch.setattr(sys, "argv", ["/opt/bin/sparsellm", "prune", "\udce9"])
    assert (
        PruneResult.model_fields["command"].get_default(call_default_factory=True)
        == "sparsellm prune '?'"
    )


@pytest.mark.skipif(
    not Path("/dev/full").exists(), reason="no device that is always full"
)
def test_standard_output_on_a_full_disk_is_one_line() -> None:
    command = [sys.executable, "-m", "sparsellm", "--help"]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    said = "error: standard output is on a full disk; make room, or write elsewhere\n"
    assert (result.returncode, result.stderr) == (2, said)


@pytest.mark.parametrize("flushed", [True, False])
def test_a_full_disk_is_seen_whether_or_not_the_command_flushes(flushed: bool) -> None:
    lines = [
        "import sys",
        "from sparsellm.app import process",
        f"process.run(lambda: print('result', flush={flushed}))",
    ]
    command = [sys.executable, "-c", "\n".join(lines)]
    with open("/dev/full", "w") as full:
        result = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    said = "error: standard output is on a full disk; make room, or write elsewhere\n"
    assert (result.returncode, result.stderr) == (2, said)


def test_a_reader_of_stdout_that_is_gone_is_no_traceback() -> None:
    lines = [
        "from sparsellm.app import process",
        "process.run(lambda: print('result'))",
    ]
    reads, writes = os.pipe()
    os.close(reads)
    command = [sys.executable, "-c", "\n".join(lines)]
    result = subprocess.run(command, stdout=writes, stderr=subprocess.PIPE, text=True)
    os.close(writes)
    assert (result.returncode, result.stderr) == (1, "")
