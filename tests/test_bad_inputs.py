"""Generated inputs at every command: each ends in exit code 0, or in exit code 2 with one line, and leaves no trace.

An example is a directory with a tiny model, a packed one, and generated files, in which one command line runs in this
process. Afterwards everything that was there is as it was, to the byte; only a finished ``--out`` is new."""

from __future__ import annotations

import contextlib
import copy
import json
import struct
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from typer.main import get_command

import sparsellm
from sparsellm import Recipe
from sparsellm.app import cli
from tests.files.small import tree
from tests.generated import TEXT, alone
from tests.line import run
from tests.models import save_tiny, tiny_gpt2, tiny_llama, tiny_opt, tiny_tokenizer
from tests.models.pruned import prune_tiny

SMALL = ["--samples=2", "--seq-len=16", "--method=magnitude"]


@dataclass
class Example:
    """A command line, and files of the model that are changed; None where one is missing."""

    arguments: list[str]
    files: dict[str, bytes | None] = field(default_factory=dict)
    family: str = "llama"


NUMBERS = [
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
    str(2**64),
    "0x10",
]
STRANGE = [
    "",
    " ",
    ".",
    "..",
    "/",
    "a/b",
    "x" * 5000,
    "~no-such-user/x",
    "a\nb",
    "a[/b]",
    "run[v2]",
    "\x1b[31m",
]
STRANGE += [
    "\u2028",
    "\udcff",
    "{a: b}",
    "[",
    "*a",
    "!!int x",
    "%s",
    "self:x",
    "pydoc:foo",
    "hub:",
    "missing.txt",
]
STRANGE += ["dir.txt", "model", "model/config.json", "2:4", "4:2", "0:0"]

garbage = st.one_of(
    st.sampled_from([*STRANGE, *NUMBERS, "9" * 400 + ":4"]),
    st.text(st.characters(codec="utf-8", exclude_characters="\0"), max_size=20),
)
integers = st.one_of(st.sampled_from(NUMBERS), st.integers(-(2**65), -1).map(str))

ODD = [
    0,
    -1,
    1,
    2**31,
    10**12,
    10**30,
    0.5,
    -0.0,
    1e300,
    "",
    "x",
    "float8",
    "\ud83d\ude00",
]
json_values: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.sampled_from(ODD)
    | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
DEEP = "[" * 50_000

COMMANDS = {
    "prune": ["prune", "model", "--out=out", *SMALL],
    "plan": ["plan", "model", *SMALL],
    "eval": ["eval", "model", "--text=note.txt", "--seq-len=16", "--max-tokens=64"],
    "inspect": ["inspect", "model"],
    "report": ["report", "model"],
    "pack": ["pack", "model", "--out=out"],
    "unpack": ["unpack", "packed", "--out=out"],
    "generate": ["generate", "packed", "The", "--max-new-tokens=2"],
    "bench": ["bench", "packed", "--prompt-tokens=4", "--new-tokens=2", "--repeats=1"],
}
SETTINGS = [
    *Recipe.model_fields,
    "options.x",
    "options.",
    ".x",
    "",
    "self",
    "allocation_options.b",
]
TELLING = {  # values that come far, or have been wrong before
    "pack": ["note.txt", "model", "full", "out/x", "out", "packed"],
    "out": [
        "note.txt",
        "note.txt/x",
        "model",
        "full",
        "./x/../model",
        "model/x",
        "packed",
        "model/..",
        "new/..",
    ],
    "sparsity": ["0", "0.5", "1", "0.999999", "1e-9"],
    "pattern": ["2:4", "1:4", "4:8", "3:7"],
    "memory": ["4GiB", "1B", "1e9", "-4GiB", "9" * 500 + "TB", "٣GiB"],
    "device": ["cpu", "cuda:99", "meta", "xla", "opencl", "cuda:-1"],
    "dtype": ["float32", "int8", "bfloat16"],
    "values": ["keep", "int8", "int6", "int4", "fp16", "int3"],
    "temperature": ["0.5", "1e-30", "1e30"],
    "batch": ["0", "-1", str(2**40), "9" * 30],
    "set": [
        f"{key}={one}"
        for key in SETTINGS
        for one in (DEEP, "&a [*a]", "2024-99-99", "yes", "{a: 1, a: 2}", "3")
    ],
}


@st.composite
def command_lines(draw: st.DrawFn) -> Example:
    """A command with up to three strange options of its own, or with a strange word in place of an argument."""
    name = draw(st.sampled_from(sorted(COMMANDS)))
    line = list(COMMANDS[name])
    if draw(st.integers(0, 3)) == 0 and len(line) > 1:
        line[draw(st.integers(1, 2 if name == "generate" else 1))] = draw(garbage)
        options = [
            word
            for word in line[1:]
            if word in COMMANDS[name] and word.startswith("--")
        ]
        return Example(
            [
                line[0],
                *options,
                "--",
                *(word for word in line[1:] if word not in options),
            ]
        )
    options = [
        param
        for param in get_command(cli.app).commands[name].params
        if param.param_type_name == "option"
    ]  # type: ignore[attr-defined]
    for option in draw(st.lists(st.sampled_from(options), min_size=1, max_size=3)):
        if option.name in ("help", "tasks"):
            continue
        values = integers if option.metavar in ("N", "0-3") else garbage
        values = (
            st.one_of(st.sampled_from(TELLING[option.name]), values)
            if option.name in TELLING
            else values
        )
        line.append(
            option.opts[0]
            if option.is_flag and draw(st.booleans())
            else f"{option.opts[0]}={draw(values)}"
        )
    return Example(line)


def mutated(data: bytes) -> st.SearchStrategy[bytes]:
    """Cut short, with a byte replaced, in another encoding, or with bytes in front."""
    return st.one_of(
        st.integers(0, max(len(data) - 1, 0)).map(lambda stop: data[:stop]),
        st.tuples(
            st.integers(0, max(len(data) - 1, 0)), st.binary(min_size=1, max_size=3)
        ).map(lambda change: data[: change[0]] + change[1] + data[change[0] + 1 :]),
        st.just(data.decode("latin-1").encode("utf-16")),
        st.binary(max_size=30).map(lambda front: front + data),
    )


ON_MODEL = [
    [*COMMANDS["prune"], "--calibration=note.txt"],
    *(COMMANDS[name] for name in ("eval", "inspect", "pack", "plan")),
    ["generate", "model", "The", "--max-new-tokens=2"],
]
HUGE = [
    -1,
    0,
    1,
    3,
    2**31,
    10**5,
    10**12,
    10**30,
    "32",
    None,
    True,
    0.5,
    -0.5,
    [],
    [32],
    {},
    {"rope_type": "x"},
]
HUGE += [
    "nonsense",
    "llama",
    "opt",
    "gpt2",
    "bert",
    "t5",
    "mixtral",
    "mamba",
    "qwen2_vl",
]


@st.composite
def changed_object(draw: st.DrawFn, data: bytes) -> bytes:
    """A JSON object with one to three of its values, at any depth, replaced, removed or added; or bytes mutated."""
    if draw(st.integers(0, 3)) == 0:
        return draw(mutated(data))
    content = json.loads(data)
    for _ in range(draw(st.integers(1, 3))):
        inside = content
        while True:
            key = draw(st.sampled_from([*sorted(inside), "added"]))
            if (
                isinstance(inside.get(key), dict)
                and inside[key]
                and draw(st.booleans())
            ):
                inside = inside[key]
                continue
            break
        action = draw(
            st.sampled_from(["replace", "replace", "replace", "remove", "nest"])
        )
        if action == "replace":
            inside[key] = copy.deepcopy(
                draw(st.one_of(st.sampled_from(HUGE), json_values))
            )
        elif action == "remove":
            inside.pop(key, None)
        else:
            inside[key] = {key: [inside.get(key)]}
    return json.dumps(content).encode()


def changed_header(data: bytes) -> st.SearchStrategy[bytes]:
    """A safetensors file with another header, another length of it, or cut short."""
    length = struct.unpack("<Q", data[:8])[0]
    header, rest = data[8 : 8 + length], data[8 + length :]

    def with_header(new: bytes) -> bytes:
        return struct.pack("<Q", len(new)) + new + rest

    kinds = [
        "F8_E4M3",
        "F8_E5M2",
        "I8",
        "I64",
        "BOOL",
        "U16",
        "C64",
        "F64",
        "BF16",
        "F16",
        "NOPE",
    ]
    retyped = st.sampled_from(kinds).map(
        lambda kind: with_header(header.replace(b'"F32"', f'"{kind}"'.encode()))
    )
    lengths = st.sampled_from([0, 1, 2**31, 2**63, 2**64 - 1]).map(
        lambda size: struct.pack("<Q", size) + data[8:]
    )
    return st.one_of(
        changed_object(header).map(with_header), retyped, lengths, mutated(data)
    )


@st.composite
def checkpoint_files(draw: st.DrawFn, name: str, family: str) -> Example:
    data = stored("model", family)[name]
    if draw(st.integers(0, 20)) == 0:
        content = None
    elif name.endswith(".safetensors"):
        content = draw(changed_header(data))
    elif name == "tokenizer.json":
        content = draw(mutated(data))
    else:
        content = draw(changed_object(data))
    return Example(draw(st.sampled_from(ON_MODEL)), {name: content}, family)


FAMILIES = {
    "llama": lambda: tiny_llama(
        num_hidden_layers=1, hidden_size=16, intermediate_size=24
    ),
    "opt": lambda: tiny_opt(num_hidden_layers=1),
    "gpt2": lambda: tiny_gpt2(n_layer=1),
}


@cache
def stored(folder: str, family: str = "llama") -> dict[str, bytes]:
    """All files of the ``model`` (with an index) or the ``packed`` one that examples are made from, by name."""
    with tempfile.TemporaryDirectory() as place:
        root = Path(place)
        model = prune_tiny(FAMILIES[family]())
        save_tiny(model, tiny_tokenizer(), root / "model")
        (root / "model" / "model.safetensors").unlink()
        model.save_pretrained(root / "model", max_shard_size="20KB")
        if folder == "packed":
            sparsellm.pack(root / "model", out=root / "packed")
        return {file.name: file.read_bytes() for file in (root / folder).iterdir()}


def files(name: str, family: str = "llama") -> Callable[[], st.SearchStrategy[Example]]:
    """Examples in which one file, or one of several with this ending, is changed."""
    return lambda: st.sampled_from(
        sorted(file for file in stored("model", family) if file.endswith(name))
    ).flatmap(lambda file: checkpoint_files(file, family))


CASES: dict[str, Callable[[], st.SearchStrategy[Example]]] = {
    "command lines": command_lines,
    "config.json of OPT": files("config.json", family="opt"),
    "config.json of GPT-2": files("config.json", family="gpt2"),
    **{
        name: files(name)
        for name in ("config.json", "tokenizer.json", "index.json", ".safetensors")
    },
}


@contextlib.contextmanager
def laid_out(example: Example) -> Iterator[Path]:
    """A fresh current directory with the models and the files of an example."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "outer" / "work"
        work.mkdir(parents=True)
        for name in ("model",) if example.files else ("model", "packed"):
            (work / name).mkdir()
            for file, data in (stored(name, example.family) | example.files).items():
                if data is not None:
                    (work / name / file).write_bytes(data)
        (work / "note.txt").write_text(TEXT)
        (work / "dir.txt").mkdir()
        (work / "full").mkdir()
        (work / "full" / "mine.txt").write_text("mine")
        with contextlib.chdir(work):
            yield Path(folder)


def check(example: Example) -> None:
    with laid_out(example) as root:
        before = tree(root)
        code, stderr = run(example.arguments)
        after = tree(root)
    assert code in (0, 2), (code, stderr)
    lines = [line for line in stderr.splitlines() if line.strip()]
    assert "Traceback" not in stderr
    if code == 2:
        assert len(lines) == 1, stderr
        assert lines[0].startswith("error: ")
        assert len(lines[0]) < 2000
        assert after == before, sorted(after.keys() ^ before.keys())
        return
    changed = {
        path
        for path in before.keys() | after.keys()
        if before.get(path) != after.get(path)
    }
    # the last one of a name counts
    given = dict(word.partition("=")[::2] for word in example.arguments)
    inside = {Path("outer/work") / given.get(name, "/") for name in ("--out", "--pack")}
    # they keep what they measured next to the checkpoint
    if example.arguments[0] in (
        "bench",
        "eval",
    ):
        changed -= {
            f"outer/work/{example.arguments[1]}/{file}"
            for file in ("results.json", "sparsellm-files.json")
        }
    assert all(inside & {Path(path), *Path(path).parents} for path in changed), changed
    assert not any(name.endswith(".partial") for name in after)


@pytest.mark.parametrize("many", [False, pytest.param(True, marks=pytest.mark.slow)])
@pytest.mark.parametrize("case", CASES)
def test_a_bad_input_is_one_line_and_leaves_nothing(case: str, many: bool) -> None:
    """A thousand of them in all, if many."""
    examples = (20 if case == "command lines" else 5) * (12 if many else 1)
    how: dict[str, Any] = {
        "deadline": None,
        "database": None,
        "suppress_health_check": list(HealthCheck),
    }
    with alone():
        settings(max_examples=examples, derandomize=not many, **how)(
            given(CASES[case]())(check)
        )()
