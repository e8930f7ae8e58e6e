"""The script that has models write programs: its tasks, its judge, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import runpy
import socket
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

SCRIPTS = Path(__file__).parent.parent / "benchmarks"
# what a model might answer without a thought
CONSTANTS = ("None", "0", "1", "-1", "''", "[]", "[[]]", "{}", "True", "False")


@pytest.fixture(scope="module")
def script() -> SimpleNamespace:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(SCRIPTS))
        return SimpleNamespace(**runpy.run_path(str(SCRIPTS / "programs.py")))


@pytest.fixture(scope="module")
def tasks(script: SimpleNamespace) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = script.tasks_of()
    return made


@pytest.fixture(scope="module")
def judge() -> SimpleNamespace:
    """The judge without its limits, for programs of our own."""
    return SimpleNamespace(**runpy.run_path(str(SCRIPTS / "one_program.py")))


def test_there_are_eighty_tasks_of_different_names(
    script: SimpleNamespace, tasks: list[dict[str, Any]]
) -> None:
    assert len({script.name_of(task) for task in tasks}) == len(tasks) == 80


def test_references_hold_all_tests_and_nothing_constant_does(
    script: SimpleNamespace, judge: SimpleNamespace, tasks: list[dict[str, Any]]
) -> None:
    for task in tasks:
        reference = script.with_body(task, task["reference"])
        assert judge.solves(reference, task["tests"]), task["signature"]
        for constant in CONSTANTS:
            wrong = script.with_body(task, f"return {constant}")
            assert not judge.solves(wrong, task["tests"]), (constant, task["signature"])


def test_each_hidden_test_of_a_task_is_of_its_function(
    script: SimpleNamespace, tasks: list[dict[str, Any]]
) -> None:
    for task in tasks:
        assert len(task["tests"]) >= 2
        assert all(script.name_of(task) in test for test in task["tests"])


@pytest.mark.parametrize("number", [0, 40, 79])
def test_a_process_of_its_own_agrees(
    number: int, script: SimpleNamespace, tasks: list[dict[str, Any]]
) -> None:
    task = tasks[number]
    assert script.solves(script.with_body(task, task["reference"]), task["tests"])
    assert not script.solves(script.with_body(task, "return None"), task["tests"])


SOLUTION = "\ndef double(number):\n    return 2 * number\n"


@pytest.mark.parametrize(
    "before",
    [
        "while True: pass",
        "open('made.txt', 'w').write('x')",
        "import os; os.open('made.txt', os.O_CREAT)",
        "import os; os.mkdir('made')",
        "try:\n    open('made.txt', 'w')\nexcept Exception: pass",
        "kept = bytearray(2 << 30)",
        "import os; os.system('true')",
        "import os; os.fork()",
        "import subprocess; subprocess.run(['true'])",
        "import socket; socket.create_connection(('127.0.0.1', {port}))",
        "import os; os._exit(0)",
        "import sys; sys.exit(0)",
        "import sys; print(sys.stdin.read())",
        "import time; time.sleep(60)",
        "def",
    ],
)
def test_a_program_that_does_more_than_compute_is_stopped(
    before: str,
    script: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    """The same program without that line solves the task."""
    settings = script.solves.__globals__
    monkeypatch.setitem(settings, "SECONDS", 1)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    if "sleep" in before:
        monkeypatch.setitem(settings, "WALL_SECONDS", 0.5)
    tests = ["double(4) == 8"]
    with socket.create_server(("127.0.0.1", 0)) as listening:
        listening.settimeout(0)
        line = before.replace("{port}", str(listening.getsockname()[1]))
        if "stdin" in before:
            # it reads nothing there, and what it prints is not taken for the result
            assert script.solves(line + SOLUTION, tests)
        else:
            assert not script.solves(line + SOLUTION, tests)
        with pytest.raises(BlockingIOError):
            listening.accept()
    # nothing is left of its folder
    assert list(tmp_path.iterdir()) == []


def test_a_program_without_more_is_solved(script: SimpleNamespace) -> None:
    assert script.solves(f"import math{SOLUTION}", ["double(4) == 8"])
    assert not script.solves(SOLUTION, ["double(4) == 9"])
    # a value that is only taken for true
    assert not script.solves(SOLUTION, ["double(4)"])


@pytest.mark.parametrize(
    ("answer", "program"),
    [
        ("Here:\n```python\nx = 1\n```\nIt sets x.\n```\ny\n```", "x = 1\n"),
        ("```\nx = 1\n```", "x = 1\n"),
        # cut off
        ("```python\nx = 1\n", "x = 1\n"),
        ("x = 1", "x = 1"),
    ],
)
def test_the_first_block_of_an_answer_is_its_program(
    answer: str, program: str, script: SimpleNamespace
) -> None:
    assert script.program_of(answer) == program


def test_the_interval_is_that_of_wilson(script: SimpleNamespace) -> None:
    """Its ends are where the score statistic is the quantile."""
    for solved, of in ((0, 80), (40, 80), (61, 80), (80, 80)):
        low, high = script.wilson(solved, of)
        for end in (low, high):
            off = abs(solved / of - end)
            expected = script.NORMAL * (max(end * (1 - end), 0) / of) ** 0.5
            assert off == pytest.approx(expected, abs=1e-7)
        assert low < (solved + 1) / (of + 2) < high


def test_answers_that_are_there_are_not_asked_for_again(
    script: SimpleNamespace,
    tasks: list[dict[str, Any]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A model that is stopped after two answers, the second of which is not whole."""
    file = tmp_path / "some.jsonl"
    first = {"task": script.name_of(tasks[0]), "tokens": 10, "seconds": 1}
    first["answer"] = script.with_body(tasks[0], tasks[0]["reference"])
    file.write_text(f'{json.dumps(first)}\n{{"task": "is_pal')
    few = tmp_path / "few.toml"
    listing = (SCRIPTS / "programs.toml").read_text()
    few.write_text("[[task]]".join(listing.split("[[task]]")[:4]))
    served = []

    class Answers:
        def __enter__(self) -> Any:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def ask(self, path: str, body: dict[str, Any] | None = None) -> Any:
            if body is None:
                return {"data": [{"id": "model"}]}
            assert body["temperature"] == 0
            served.append(body["messages"][0]["content"])
            choice = {"message": {"content": "```python\nreturn\n```"}}
            return {"choices": [choice], "usage": {"completion_tokens": 3}}

    settings = script.main.__globals__
    monkeypatch.setitem(settings, "serving", lambda *_: Answers())
    words = ("programs.py", "some=model.gguf", "--out", tmp_path, "--tasks", few)
    monkeypatch.setattr(sys, "argv", [*map(str, words)])
    for _ in range(2):
        script.main()
        assert "| some | 1 of 3 | 33.3% | 6.1% to 79.2% |" in capsys.readouterr().out
    asked_for = [
        next(task for task in tasks if f"def {task['signature']}:" in text)
        for text in served
    ]
    assert asked_for == tasks[1:3]
    assert len(script.kept(file)) == 3
