"""Generated bad inputs of whole commands: each ends in one line with exit code 2, or succeeds, and destroys nothing.

An input is a command line with strange arguments, damaged files in the directory that it reads, or both. It runs in
this process, in a fresh directory, and depends on its command and number alone. A new command is one entry of
:data:`COMMANDS`."""

from __future__ import annotations

import contextlib
import copy
import fnmatch
import glob
import json
import os
import random
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import huggingface_hub
import huggingface_hub.constants
import transformers
import uvicorn
from typer.main import get_command

from sparsellm import Recipe, api
from sparsellm.app import cli
from sparsellm.progress import PHASES
from tests.files.small import tree
from tests.line import run
from tests.models import save_tiny, tiny_gpt2, tiny_llama, tiny_opt, tiny_tokenizer
from tests.models.in_gguf import write_gguf

# a line of ``--verbose``
STEP = re.compile(rf"\d\d:\d\d:\d\d |({'|'.join(PHASES.values())}): \d")
SECRET = "a file outside of the directory of the command"
TEXT = ("The quick brown fox jumps over the lazy dog. " * 20).strip()
SMALL = (
    "--method=magnitude",
    "--samples=2",
    "--seq-len=16",
    "--calibration=note.txt",
)
GRID = (*SMALL, "--text=note.txt")
SIZED = ("--bits=8", "--effort=0", *SMALL[1:])
COMPRESSING = ("{out}-pruned", "{out}-pruned/*", "{out}-pruned.partial*")
MEASURED = ("--sparsity=0.5", "--text-seq-len=16", "--max-tokens=64")


@dataclass(frozen=True)
class Command:
    """A command line that succeeds, the files whose damage it may meet, and the paths that it may change.

    Paths are patterns: ``{first}`` is the first argument, ``{out}`` that of ``--out``, and ``{stem}`` the same without
    its ending. Those ``kept`` may change also when it is refused."""

    line: tuple[str, ...]
    damaged: tuple[str, ...]
    changed: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    positional: int = (
        1  # arguments after the name of the command, which may be replaced
    )


RECORDS = (
    "pruning.json",
    "results.json",
    "config.json",
    "README.md",
    "report.html",
    "recipe.yaml",
    "packed.json",
)
RECORDS += ("sparsellm-files.json",)
WEIGHTS = "model.safetensors"
SHARD = "model-00001-of-00003.safetensors"
MODEL = tuple(
    f"model/{name}"
    for name in ("config.json", WEIGHTS, "tokenizer.json", "tokenizer_config.json")
)
MEASURING = tuple(
    f"{{first}}/{name}"
    for name in ("results.json", "README.md", "report.html", "sparsellm-files.json")
)
COMMANDS: dict[str, Command] = {
    "prune": Command(
        ("prune", "model", "--out=new", *SMALL),
        MODEL,
        ("{out}", "{out}/*", "{pack}", "{pack}/*"),
        kept=("{out}.partial", "{out}.partial/*"),
    ),
    "plan": Command(
        ("plan", "gpt2", *SMALL[:3]), ("gpt2/config.json", f"gpt2/{WEIGHTS}")
    ),
    "eval": Command(
        ("eval", "pruned", "--text=note.txt", "--seq-len=16", "--max-tokens=64"),
        tuple(f"pruned/{name}" for name in (*RECORDS[:4], "tokenizer.json")),
        MEASURING,
    ),
    "inspect": Command(("inspect", "opt"), ("opt/config.json", f"opt/{WEIGHTS}")),
    "pack": Command(
        ("pack", "pruned", "--out=new"),
        tuple(f"pruned/{name}" for name in (*RECORDS[:3], SHARD)),
        ("{out}", "{out}/*"),
    ),
    "generate": Command(
        ("generate", "packed", "The", "--max-new-tokens=2"),
        ("packed/config.json", "packed/generation_config.json", f"packed/{WEIGHTS}"),
        positional=2,
    ),
    "bench": Command(
        ("bench", "packed", "--prompt-tokens=4", "--new-tokens=2", "--repeats=1"),
        ("packed/config.json", "packed/packed.json"),
        MEASURING,
    ),
    "report": Command(
        ("report", "pruned"),
        tuple(f"pruned/{name}" for name in RECORDS),
        ("{first}/report.html", "{first}/sparsellm-files.json", "{out}"),
    ),
    "report of two": Command(
        ("report", "pruned", "packed", "--out=page.html"),
        tuple(
            f"{place}/{name}" for place in ("pruned", "packed") for name in RECORDS[:2]
        ),
        ("{out}",),
        positional=2,
    ),
    "compare": Command(
        ("compare", "model", "--out=new", *GRID, *MEASURED),
        (
            "model/config.json",
            "model/model.safetensors.index.json",
            "model/tokenizer.json",
            "model/README.md",
        ),
        ("{out}", "{out}/*"),
    ),
    "compare again": Command(
        ("compare", "model", "--out=grid", *GRID, *MEASURED),
        (
            "grid/compare.html",
            *(
                f"grid/magnitude-0.5{end}/{name}"
                for end in ("", "-packed")
                for name in RECORDS
            ),
        ),
        ("{out}", "{out}/*"),
        kept=("{out}/magnitude-0.5*.partial",),
    ),
    "export": Command(
        ("export", "gridded", "--to=compressed-tensors", "--out=new"),
        tuple(f"gridded/{name}" for name in (*RECORDS, "model.safetensors.index.json")),
        (
            "{out}",
            "{out}/*",
            "{first}/results.json",
            "{first}/README.md",
            "{first}/sparsellm-files.json",
        ),
    ),
    "serve": Command(
        ("serve", "packed", "--port=0"),
        tuple(
            f"packed/{name}"
            for name in (*RECORDS, "model.safetensors.index.json", "tokenizer.json")
        ),
    ),
    "compress": Command(
        ("compress", "model", "--for=sparsellm", "--out=new", *SIZED),
        MODEL,
        ("{out}", "{out}/*"),
        kept=COMPRESSING,
    ),
    "compress for llama.cpp": Command(
        ("compress", "wide.gguf", "--for=llama.cpp", "--out=new.gguf", *SIZED),
        ("wide.gguf",),
        ("{out}", "{stem}.Modelfile", "{stem}.html"),
        kept=COMPRESSING,
    ),
    "exec": Command(
        ("exec", "--", "python", "-c", "pass"),
        ("model/config.json", "model/README.md"),
        positional=3,
    ),
}

HUGE = [
    "0",
    "-1",
    "1.5",
    "1e9",
    "nan",
    "-inf",
    "1e400",
    "true",
    "9" * 5000,
    str(2**63),
    str(-(2**64)),
    "0x10",
]
WORDS = [
    "",
    " ",
    "None",
    "a,b",
    ",",
    "2:4",
    "0:0",
    "9" * 400 + ":4",
    "x" * 300,
    "x" * 5000,
    "[",
    "*a",
    "!!int x",
]
WORDS += [
    "{a: 1, a: 2}",
    "[" * 50_000,
    "-",
    "--",
    "%s",
    "a=b",
    "=",
    "samples=",
    "options.x=1",
    "seed=1e99",
    "1e-30",
]
ODD = [
    "a\nb",
    "\x1b[31m",
    "\x7f",
    "\u2028",
    "\u202egnp",
    "\udcff",
    "\udc80/x",
    "\U0001f40d",
    "é",
    "a\tb",
    "\r",
]
PATHS = [
    "/",
    "//",
    "/..",
    ".",
    "..",
    "./.",
    "~",
    "~no-such-user/x",
    "missing",
    "missing/x",
    "note.txt",
    "note.txt/x",
]
PATHS += [
    "folder",
    "folder/",
    "full",
    "full/mine.txt",
    "model",
    "model/config.json",
    "pruned",
    "packed",
    "grid",
]
PATHS += [
    "link-to-folder",
    "link-to-file",
    "link-to-model",
    "dangling",
    "loop",
    "socket",
    "pipe",
    "outside",
]
PATHS += [
    "/dev/null",
    "/dev/zero",
    "/proc/self/mem",
    "../outside/mine.txt",
    "../outside",
    "pruned/pruning.json",
]
PATHS += ["model/..", "new/../new", "A" * 254, "a/" * 3000]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2**31,
    2**63,
    10**12,
    10**400,
    0.5,
    -0.0,
    1e308,
    5e-324,
    "",
    "x" * 10_000,
]
VALUES += ["F8_E4M3", "I8", "BF16", "F64", "opt", "bert", "mixtral", "mamba", [32]]
VALUES += [
    [],
    {},
    [[]],
    {"a": {}},
    [None] * 50,
    "\ud800",
    "<script>alert(1)</script>",
    "{{ 7 * 7 }}",
    "a\nb\x1b[31m",
]
VALUES += [
    "../../outside/mine.txt",
    "/etc/passwd",
    float("nan"),
    float("inf"),
    float("-inf"),
    {"": ""},
    "9" * 5000,
]


SETTINGS = [*Recipe.model_fields, "options.x", "options.", ".x", "", "self"]
TELLING = {
    "set": [
        f"{key}={value}"
        for key in SETTINGS
        for value in ("[" * 50000, "&a [*a]", "2024-99-99", "yes", "{a: 1, a: 2}", "3")
    ],
    "out": ["model", "full", "./x/../model", "model/x", "note.txt/x", "new/.."],
    "pack": ["model", "full", "new", "new/x", "packed"],
    "sparsity": ["0", "1", "0.999999", "1e-9"],
    "pattern": ["2:4", "4:8", "3:7"],
    "memory": ["4GiB", "1B", "-4GiB", "9" * 500 + "TB"],
    "device": ["cuda:99", "meta", "xla", "cuda:-1"],
    "values": ["int8", "int4", "fp16"],
    "program": ["sparsellm", "vllm", "llama.cpp", "transformers", "ollama"],
    "size": ["1KB", "2MB", "1GB", "4", "0.1MB", "9" * 500 + "GB"],
    "bits": ["0.1", "2", "3.01", "6.5", "16", "17"],
    "like": ["wide.gguf", "model", "note.txt", "pipe", "missing.gguf"],
}


@cache
def template() -> Path:
    """A directory with models, of one its pruned and packed forms, both measured, and a finished comparison."""
    work = Path(tempfile.mkdtemp(prefix="generated-")) / "work"
    work.mkdir()
    (work / "note.txt").write_text(TEXT)
    save_tiny(
        tiny_llama(num_hidden_layers=2, hidden_size=16, intermediate_size=24),
        tiny_tokenizer(),
        work / "model",
    )
    write_gguf(
        tiny_llama(num_hidden_layers=1, intermediate_size=96), work / "wide.gguf"
    )
    save_tiny(tiny_opt(num_hidden_layers=1), tiny_tokenizer(), work / "opt")
    save_tiny(tiny_gpt2(n_layer=1), tiny_tokenizer(), work / "gpt2")
    with contextlib.chdir(work):
        for line in (
            "prune model --out pruned --method magnitude --sparsity 0.5 --calibration note.txt --set samples=2 "
            "--set seq_len=16",
            "eval pruned --text note.txt --seq-len 16 --max-tokens 64 --against model",
            "pack pruned --out packed",
            "eval packed --text note.txt --seq-len 16 --max-tokens 64",
            "prune model --out gridded --method magnitude --sparsity 0 --grid w8a16 --calibration note.txt "
            "--set samples=2 --set seq_len=16",
            " ".join(("compare model --out grid", *GRID, *MEASURED)),
        ):
            code, said = run(line.split())
            assert code == 0, said
    return work


@contextlib.contextmanager
def directory() -> Iterator[Path]:
    """A fresh copy of the template as the current directory, next to a directory that no command may touch."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        work = root / "work"
        shutil.copytree(template(), work)
        (root / "outside").mkdir()
        (root / "outside" / "mine.txt").write_text(SECRET)
        for name in ("folder", "full"):
            (work / name).mkdir()
        (work / "full" / "mine.txt").write_text("mine")
        links = {
            "link-to-folder": "folder",
            "link-to-file": "full/mine.txt",
            "link-to-model": "model",
            "loop": "loop",
        }
        for name, target in (
            links | {"dangling": "../outside/none", "outside": "../outside"}
        ).items():
            (work / name).symlink_to(target)
        os.mkfifo(work / "pipe")
        with contextlib.chdir(work):
            with contextlib.closing(socket.socket(socket.AF_UNIX)) as unix:
                unix.bind("socket")
            yield root


@dataclass
class Input:
    """A command line, and what is done to files, as text."""

    arguments: list[str]
    damage: list[tuple[str, Callable[[Path], None]]] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{[word[:100] for word in self.arguments]} {[name for name, _ in self.damage]}"


def generated(name: str, number: int) -> Input:
    """Input ``number`` of a command."""
    chance, command = random.Random(f"{name} {number}"), COMMANDS[name]
    made, kind = Input(list(command.line)), chance.random()
    if kind < 0.6:
        for _ in range(chance.choice((1, 1, 2, 3))):
            _strange_argument(made.arguments, command, chance)
    if kind > 0.5:
        count = min(len(command.damaged), chance.choice((1, 1, 2)))
        for file in chance.sample(command.damaged, count):
            made.damage.append(_damage(file, chance))
    return made


def _strange_argument(line: list[str], command: Command, chance: random.Random) -> None:
    """Replaces an argument, or adds an option of the command with a strange value."""
    pool = chance.choice((HUGE, WORDS, ODD, PATHS, PATHS))
    options = [
        param
        for param in get_command(cli.app).commands[line[0]].params
        if param.param_type_name == "option"
    ]  # type: ignore[attr-defined]
    options = [
        param
        for param in options
        if param.name not in ("help", "plugin", "trust_remote_code", "tasks")
    ]
    if chance.random() < 0.4 or not options:
        word = chance.choice(pool)
        line[chance.randint(1, command.positional)] = (
            word if not word.startswith("-") else f"./{word}"
        )
        return
    option = chance.choice(options)
    pool = chance.choice((pool, TELLING.get(option.name, pool)))
    line.append(
        option.opts[0] if option.is_flag else f"{option.opts[0]}={chance.choice(pool)}"
    )


def _damage(file: str, chance: random.Random) -> tuple[str, Callable[[Path], None]]:
    """A change of one file, with its name: a JSON value, bytes, or something else in the place of the file."""
    name, change = chance.choice(
        (("value", change_value), ("bytes", change_bytes), ("place", _change_place))
    )
    seed = chance.random()
    return f"{file}: {name}", lambda work: change(work / file, random.Random(seed))


def change_value(path: Path, chance: random.Random) -> None:
    """A value of a JSON file, or of the header of a safetensors file, is another one, or is gone."""
    front = rest = b""
    try:
        text = path.read_bytes()
        if path.suffix == ".safetensors":
            end = 8 + int.from_bytes(text[:8], "little")
            text, rest = text[8:end], text[end:]
        content = json.loads(text)
    except (ValueError, OSError):
        return change_bytes(path, chance)
    for _ in range(chance.choice((1, 1, 3))):
        inside = content
        while True:
            keys: Sequence[Any] = (
                [*inside, "added"] if isinstance(inside, dict) else range(len(inside))
            )
            key = chance.choice(keys)
            deeper = inside.get(key) if isinstance(inside, dict) else inside[key]
            if isinstance(deeper, dict | list) and deeper and chance.random() < 0.7:
                inside = deeper
                continue
            break
        if isinstance(inside, dict) and chance.random() < 0.2:
            inside.pop(key, None)
        else:
            inside[key] = copy.deepcopy(chance.choice(VALUES))
    sys.set_int_max_str_digits(0)  # a file may hold what Python does not write
    text = json.dumps(content).encode()
    sys.set_int_max_str_digits(4300)
    if path.suffix == ".safetensors":
        front = struct.pack("<Q", len(text))
    return path.write_bytes(front + text + rest) and None


def change_bytes(path: Path, chance: random.Random) -> None:
    data = path.read_bytes() if path.is_file() else b""
    at = chance.randrange(len(data) + 1)
    changes = (
        data[:at],
        data[:at] + chance.randbytes(3) + data[at + 1 :],
        b"",
        b"\xef\xbb\xbf" + data,
        data.decode("latin-1").encode("utf-16"),
        b'{"linears": [], "evaluations": 3, ' + data[1:],  # keys that come twice
        b"[" * 100_000,
        b'{"a":' * 100_000 + b"1" + b"}" * 100_000,
        b"NaN",
        b"[]",
        b'{"format": 1}',
        b'{"format": ' + b"9" * 5000 + b"}",
        chance.randbytes(300),
        b"\0" * 1000,
    )
    path.write_bytes(chance.choice(changes))


def _change_place(path: Path, chance: random.Random) -> None:
    """Something else at the path of a file, or nothing."""
    path.unlink(missing_ok=True)
    match chance.choice(
        ("missing", "folder", "pipe", "loop", "link", "link", "link", "empty")
    ):
        case "folder":
            path.mkdir()
        case "pipe":
            os.mkfifo(path)
        case "loop":
            path.symlink_to(path.name)
        case "link":
            targets = (
                "../../outside/mine.txt",
                "../../outside/new",
                "/dev/zero",
                "/dev/null",
                "../pipe",
                "../full",
            )
            path.symlink_to(chance.choice(targets))
        case "empty":
            path.write_bytes(b"{}")


class HangingError(BaseException):
    """A command took longer than the limit; no handler of errors catches it."""


@contextlib.contextmanager
def limited(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise HangingError

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def outcome(name: str, number: int, seconds: float = 60.0) -> tuple[str, str]:
    """``refused`` or ``succeeded``, or what is wrong with the end of an input, and a text that shows it."""
    command = COMMANDS[name]
    made = generated(name, number)
    with directory() as root:
        for _, change in made.damage:
            change(root / "work")
        before = tree(root)
        try:
            with limited(seconds):
                code, stderr = run(made.arguments)
        except HangingError:
            return "hangs", str(made)
        except BaseException:
            return "traceback", f"{made}\n{traceback.format_exc()[-1500:]}"
        after = tree(root)
        outs = [
            word.partition("=")[2]
            for word in made.arguments
            if word.startswith("--out=")
        ]
        packs = [word[7:] for word in made.arguments if word.startswith("--pack=")]
        named = {
            "{first}": made.arguments[1],
            "{out}": outs[-1] if outs else "",
            "{pack}": packs[-1] if packs else "",
            "{stem}": os.path.splitext(outs[-1])[0] if outs else "",
        }
        at = os.path.realpath(root)
        places = {
            key: os.path.relpath(os.path.realpath(os.path.expanduser(p)), at)
            for key, p in named.items()
            if p
        }
    shown = f"{made}\nexit {code}: {stderr[:600]}"
    lines = [line for line in stderr.splitlines() if line.strip()]
    if "--verbose" in made.arguments:  # which asks for a line for each step
        lines = [line for line in lines[:-1] if not STEP.match(line)] + lines[-1:]
    if code not in (0, 2) or "Traceback" in stderr:
        return "traceback", shown
    if code == 2 and (
        len(lines) != 1 or not lines[0].startswith("error: ") or len(lines[0]) > 2000
    ):
        return "more than a line", shown
    allowed = command.kept if code == 2 else (*command.changed, *command.kept)
    patterns = [
        rule.replace(key, glob.escape(path))
        for rule in allowed
        for key, path in places.items()
        if key in rule
    ]
    changed = [
        path
        for path in before.keys() | after.keys()
        if before.get(path) != after.get(path)
    ]
    made_for_out = [
        str(parent) for parent in Path(places.get("{out}", "")).parents if code == 0
    ]
    patterns += [glob.escape(parent) for parent in made_for_out if parent not in before]
    beyond = [
        path
        for path in changed
        if not any(fnmatch.fnmatchcase(path, pattern) for pattern in patterns)
    ]
    if beyond:
        return "changed other files", f"{shown}\n{sorted(beyond)[:10]}"
    return ("refused" if code else "succeeded"), shown


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Short measurements; no network, no waiting server, no program in place of this one, no bars of transformers."""
    with (
        mock.patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
        mock.patch.object(api, "MEASURED_TOKENS", 64),
        mock.patch.object(uvicorn.Server, "run", return_value=None),
        mock.patch.object(os, "execve", mock.Mock(side_effect=SystemExit(0))),
    ):
        transformers.utils.logging.disable_progress_bar()
        yield
