"""Programs that models write: every task can be solved, no wrong answer passes, no program leaves its process."""

from __future__ import annotations

import re
import socket
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmarks"))
import programs  # isort: skip

TASKS = programs.read_tasks()
ADD = programs.Task(
    "add(a: int, b: int) -> int", "Adds.", "return a + b", ["add(1, 2) == 3"]
)


def raises(kind: type[Exception], call: object, *arguments: object) -> bool:
    try:
        call(*arguments)  # type: ignore[operator]
    except kind:
        return True
    return False


def passes(task: programs.Task, body: str) -> bool:
    """Whether a body that we wrote passes; in this process, since a process for each takes a tenth of a second."""
    names: dict[str, object] = {"raises": raises}
    exec(task.with_body(body), names)
    try:
        return all(eval(test, names) for test in task.tests)
    except Exception:  # a test sorts or measures what is None
        return False


def test_there_are_eighty_tasks_with_names_of_their_own() -> None:
    assert len({task.name for task in TASKS}) == len(TASKS) == 80


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_reference_passes_and_an_empty_body_does_not(task: programs.Task) -> None:
    assert passes(task, task.reference)
    assert not passes(task, "return None")
    first = re.split(r"[(:)]", task.signature)[1]
    assert not passes(task, f"return {first}")


def test_the_first_block_of_code_is_the_program() -> None:
    assert (
        programs.program_of("Sure:\n```python\nx = 1\n```\nmore\n```\ny\n```")
        == "x = 1\n"
    )
    assert programs.program_of("```py\nx = 1") == "x = 1"
    assert programs.program_of("x = 1") == "x = 1"


def test_a_right_program_solves_a_task_and_a_wrong_one_does_not() -> None:
    assert programs.solves(ADD, "print('noise')\n" + ADD.with_body("return a + b"))
    assert not programs.solves(ADD, ADD.with_body("return a - b"))
    assert not programs.solves(ADD, "def add(a, b:")


@pytest.mark.parametrize(
    "body",
    [
        "import sys; sys.exit(0)",
        "import os; os._exit(0)",
        "print('0' * 32); return 3 if a > 5 else 0",
        "x = bytearray(2 << 30); return a + b",
        "f = open('left', 'w'); f.write('x'); f.flush(); return a + b",
        "while True: pass",
    ],
    ids=["exit", "os exit", "noise", "memory", "file", "endless"],
)
def test_a_program_cannot_pass_by_other_means(
    body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if "while" in body:
        quick = programs.CHILD.replace("RLIMIT_CPU, (10, 10)", "RLIMIT_CPU, (1, 1)")
        assert quick != programs.CHILD
        monkeypatch.setattr(programs, "CHILD", quick)
    assert not programs.solves(ADD, ADD.with_body(body))


def test_a_program_has_no_network() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        body = f"import socket; socket.create_connection(('127.0.0.1', {port})); return a + b"
        assert not programs.solves(ADD, ADD.with_body(body))


def test_the_interval_is_wilsons() -> None:
    # its ends are the p for which (share - p)² = z² p (1 - p) / n
    for share in programs.wilson(30, 80):
        assert (30 / 80 - share) ** 2 == pytest.approx(
            1.96**2 * share * (1 - share) / 80
        )
