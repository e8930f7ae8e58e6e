"""The share of eighty small programs that a model writes correctly, by a greedy answer to each.

    python benchmarks/programs.py dense=DIR small=small.gguf --xllamacpp PYTHON --out FOLDER

A form is a name and a checkpoint, dense or packed, which `sparsellm serve` runs, or a GGUF file, which llama.cpp does
(`--llama-server`, or `--xllamacpp` as in serving.py). The tasks are in `programs.toml`: a signature, a sentence, a
reference and hidden tests, written for this. Each is one message in the model's chat template. The code of the answer
runs in a process of its own, in an empty folder, with limits of time and memory; it can write no file, start no
process and reach no network. Answers are kept in `FOLDER/NAME.jsonl`, and one that is there is not asked for again.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from functools import cache
from pathlib import Path
from typing import Any

from measure import code_version, cpu_name
from serving import Form, Server, chat, parser_of_forms, serving

HERE = Path(__file__).parent
TASKS = HERE / "programs.toml"
JUDGE = HERE / "one_program.py"
SECONDS = 5  # of the processor
WALL_SECONDS = 20.0  # on a machine that others use too
MEMORY = 1 << 30  # bytes
NORMAL = 1.959964  # the 97.5th percentile of the normal distribution
BLOCK = re.compile(r"```[a-zA-Z]*\n(.*?)(?:```|\Z)", re.DOTALL)
QUESTION = """Write a Python function.

```python
def {signature}:
    \"\"\"{says}\"\"\"
```

Answer with the whole function in one code block."""


def tasks_of(path: Path = TASKS) -> list[dict[str, Any]]:
    """The tasks: ``signature``, ``says``, ``reference`` (the body of the function) and ``tests``."""
    with path.open("rb") as file:
        tasks: list[dict[str, Any]] = tomllib.load(file)["task"]
    return tasks


def name_of(task: dict[str, Any]) -> str:
    """The name of a task's function."""
    name, _, _ = task["signature"].partition("(")
    return str(name)


def with_body(task: dict[str, Any], body: str) -> str:
    """The program whose function has this body."""
    lines = body.strip("\n").splitlines()
    indented = "\n".join(f"    {line}" for line in lines)
    return f"def {task['signature']}:\n{indented}\n"


def program_of(answer: str) -> str:
    """The program in an answer: its first code block, or all of it if there is none."""
    block = BLOCK.search(answer)
    if block is None:
        return answer
    return block.group(1)


@cache
def without_network() -> list[str]:
    """The words before a command that take the network from it; none where the system does not let us."""
    words = ["unshare", "--map-root-user", "--net"]
    if shutil.which("unshare") is None:
        return []
    tried = subprocess.run([*words, "true"], capture_output=True, check=False)
    return words if tried.returncode == 0 else []


def solves(program: str, tests: list[str]) -> bool:
    """Whether all tests hold for a program, which runs under limits in a process and an empty folder of its own."""
    token = secrets.token_hex(16)
    asked = {
        "program": program,
        "tests": tests,
        "token": token,
        "seconds": SECONDS,
        "bytes": MEMORY,
    }
    with tempfile.TemporaryDirectory(prefix="program-") as folder:
        try:
            done = subprocess.run(
                [*without_network(), sys.executable, "-I", "-S", str(JUDGE)],
                input=json.dumps(asked),
                capture_output=True,
                text=True,
                cwd=folder,
                env={"HOME": folder},
                timeout=WALL_SECONDS,
                check=False,
            )
        except subprocess.TimeoutExpired:
            return False
    return done.stdout == token


def wilson(solved: int, of: int) -> tuple[float, float]:
    """The 95 % interval of a share by Wilson (1927), which holds near 0 and 1 too."""
    share = solved / of
    squared = NORMAL**2 / of
    middle = (share + squared / 2) / (1 + squared)
    spread = math.sqrt(share * (1 - share) / of + squared / (4 * of))
    half = NORMAL * spread / (1 + squared)
    return middle - half, middle + half


def kept(path: Path) -> dict[str, dict[str, Any]]:
    """The answers of a file by the name of their task. A last line that is not whole is left out."""
    answers = {}
    if path.is_file():
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):
                answer = json.loads(line)
                answers[answer["task"]] = answer
    return answers


def ask(server: Server, task: dict[str, Any], new_tokens: int) -> dict[str, Any]:
    """The greedy answer of a model to a task, with its tokens and seconds."""
    question = QUESTION.format(signature=task["signature"], says=task["says"])
    began = time.perf_counter()
    made = chat(server, question, new_tokens)
    return {
        "task": name_of(task),
        "answer": made["choices"][0]["message"]["content"],
        "tokens": made["usage"]["completion_tokens"],
        "seconds": round(time.perf_counter() - began, 2),
    }


def answers_of(
    form: Form, tasks: list[dict[str, Any]], file: Path, asked: argparse.Namespace
) -> dict[str, dict[str, Any]]:
    """The answers of a form to all tasks; those that are missing are asked for, and appended to the file."""
    answers = kept(file)
    missing = [task for task in tasks if name_of(task) not in answers]
    if not missing:
        return answers
    lines = "".join(f"{json.dumps(answer)}\n" for answer in answers.values())
    file.write_text(lines)
    with serving(form, asked) as server, file.open("a") as open_file:
        for task in missing:
            answer = ask(server, task, asked.new_tokens)
            open_file.write(f"{json.dumps(answer)}\n")
            open_file.flush()
            answers[answer["task"]] = answer
    return answers


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = parser_of_forms(__doc__, new_tokens=400, context=1024, out=None)
    parser.add_argument("--tasks", type=Path, default=TASKS)
    return parser.parse_args()


def main() -> None:
    asked = parsed()
    asked.out.mkdir(parents=True, exist_ok=True)
    tasks = tasks_of(asked.tasks)
    rows = []
    for text in asked.forms:
        name, _, path = text.partition("=")
        form = Form.of(path)
        answers = answers_of(form, tasks, asked.out / f"{name}.jsonl", asked)
        solved = []
        for task in tasks:
            program = program_of(answers[name_of(task)]["answer"])
            if solves(program, task["tests"]):
                solved.append(name_of(task))
        low, high = wilson(len(solved), len(tasks))
        tokens = sum(answer["tokens"] for answer in answers.values())
        seconds = sum(answer["seconds"] for answer in answers.values())
        rows.append(
            f"| {name} | {len(solved)} of {len(tasks)} | {len(solved) / len(tasks):.1%} | {low:.1%} to {high:.1%} | "
            f"{tokens / seconds:.1f} |"
        )
    network = "no network" if without_network() else "sockets refused"
    print(
        f"One greedy answer of at most {asked.new_tokens} tokens to each task, {network}, {asked.threads} thread(s); "
        f"{cpu_name()}, code {code_version()}.\n"
    )
    print("| form | solved | share | 95 % interval | tokens/s |")
    print("|---|---|---|---|---|")
    print("\n".join(rows))


if __name__ == "__main__":
    main()
