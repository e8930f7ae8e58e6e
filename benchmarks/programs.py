"""The share of eighty small programs that a served model solves, with one greedy answer each.

    sparsellm serve small --port 8000          # or llama-server, vllm serve: what speaks OpenAI's API
    python benchmarks/programs.py --url http://127.0.0.1:8000/v1 --model small --answers small.jsonl

A task is a signature and a sentence (``programs.toml``); its tests are hidden from the model. A program runs in a
process of its own: no network, no file, 1 GB of memory, ten seconds. Answers are kept, so a stopped run goes on.
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
import textwrap
import tomllib
import urllib.request
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

TASKS = Path(__file__).with_suffix(".toml")
PROMPT = """Write a Python function.

def {signature}:

{says}

Answer with the code of the function alone."""
MOST_TOKENS = 512
SECONDS = 10
MEMORY = 1 << 30
FENCE = re.compile(r"```(?:python|py)?[ \t]*\n(.*?)(?:```|\Z)", re.DOTALL)

# What runs a program: limits first, then its text, then its tests. It says the token, which the program cannot know,
# if all hold.
CHILD = f"""
import json, os, resource, socket, sys
given = json.loads(sys.stdin.read())
resource.setrlimit(resource.RLIMIT_CPU, ({SECONDS}, {SECONDS}))
resource.setrlimit(resource.RLIMIT_AS, ({MEMORY}, {MEMORY}))
resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
def refused(*_, **__):
    raise OSError("there is no network here")
socket.socket = refused
def raises(kind, call, *arguments):
    try:
        call(*arguments)
    except kind:
        return True
    return False
said = sys.stdout
sys.stdout = open(os.devnull, "w")
names = {{"__name__": "answer"}}
exec(compile(given["program"], "answer", "exec"), names)
held = all(eval(test, {{**names, "raises": raises}}) for test in given["tests"])
said.write(given["token"] if held else "")
"""


@dataclass(frozen=True)
class Task:
    """One program to write."""

    signature: str
    says: str
    reference: str  # the body of a function that solves it
    tests: list[str]  # expressions, each of which is true

    @property
    def name(self) -> str:
        """The name of the function."""
        return self.signature.partition("(")[0]

    @property
    def prompt(self) -> str:
        """What the model reads."""
        return PROMPT.format(signature=self.signature, says=self.says)

    def with_body(self, body: str) -> str:
        """A program with this body of the function."""
        return f"def {self.signature}:\n" + textwrap.indent(body.strip(), "    ")


def read_tasks() -> list[Task]:
    """The tasks, in the order of their file."""
    with TASKS.open("rb") as file:
        return [Task(**fields) for fields in tomllib.load(file)["task"]]


def program_of(answer: str) -> str:
    """The program in an answer: its first block of code, or all of it if there is none."""
    found = FENCE.search(answer)
    return found[1] if found else answer


@cache
def without_network() -> list[str]:
    """The command that runs another in a network namespace of its own; empty where that is not allowed."""
    command = ["unshare", "--user", "--map-root-user", "--net"]
    if shutil.which("unshare") is None:
        return []
    tried = subprocess.run([*command, "true"], capture_output=True, check=False)
    return [] if tried.returncode else command


def solves(task: Task, program: str) -> bool:
    """Whether a program passes the tests of a task, in a process of its own with limits of time, memory and files."""
    token = secrets.token_hex(16)
    given = {"program": program, "tests": task.tests, "token": token}
    with tempfile.TemporaryDirectory() as folder:
        try:
            done = subprocess.run(
                [*without_network(), sys.executable, "-I", "-c", CHILD],
                input=json.dumps(given),
                capture_output=True,
                text=True,
                cwd=folder,
                env={"PATH": "/usr/bin:/bin"},
                timeout=2 * SECONDS,
                check=False,
            )
        except (subprocess.TimeoutExpired, UnicodeDecodeError):
            return False
    return done.stdout == token


def wilson(solved: int, tried: int) -> tuple[float, float]:
    """The 95 % interval of a share (Wilson, 1927)."""
    z = 1.96
    share = solved / tried
    middle = share + z * z / (2 * tried)
    half = z * math.sqrt(share * (1 - share) / tried + z * z / (4 * tried * tried))
    whole = 1 + z * z / tried
    return (middle - half) / whole, (middle + half) / whole


def asked_of(url: str, model: str, prompt: str) -> str:
    """The greedy answer of a server that speaks OpenAI's API."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": "user", "content": prompt}],
        "max_tokens": MOST_TOKENS,
        "temperature": 0,
    }
    request = urllib.request.Request(
        f"{url}/chat/completions",
        data=json.dumps(body).encode(),
        headers={"Content-Type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=1200) as answer:
        return str(json.load(answer)["choices"][0]["message"]["content"])


def known_answers(path: Path) -> dict[str, str]:
    """The answers that a file has already, by the name of the task."""
    if not path.is_file():
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    return {line["task"]: line["answer"] for line in map(json.loads, lines)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--url", required=True, help="such as http://127.0.0.1:8000/v1")
    parser.add_argument("--model", default="model", help="its name at the server")
    parser.add_argument("--answers", type=Path, required=True, help="a JSONL file")
    asked = parser.parse_args()
    tasks = read_tasks()
    answers = known_answers(asked.answers)
    for task in tasks:
        if task.name not in answers:
            answer = asked_of(asked.url, asked.model, task.prompt)
            answers[task.name] = answer
            with asked.answers.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"task": task.name, "answer": answer}) + "\n")
    solved = [
        task.name for task in tasks if solves(task, program_of(answers[task.name]))
    ]
    low, high = wilson(len(solved), len(tasks))
    print(
        f"{asked.answers.stem}: {len(solved)} of {len(tasks)} solved, {low:.0%} to {high:.0%}"
    )
    print("not solved:", *(task.name for task in tasks if task.name not in solved))


if __name__ == "__main__":
    main()
