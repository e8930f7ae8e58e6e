"""What users read: names that look like markup, help, tables and progress at 80 columns, JSON on a clean stdout."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from typer.main import get_command

from sparsellm import Recipe, __version__, api
from sparsellm.app import cli, console, options
from sparsellm.recipe import help_of, option_of
from sparsepack.compiled import kernels
from tests.models import save_tiny, tiny_llama, tiny_tokenizer

NASTY = ("a[/b]", "run[v2]", ":x:", "[bold]b", "\\[x", "%s{0}", "ünï")
SMALL = ("--samples", 2, "--seq-len", 16)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(
        tiny_llama(), tiny_tokenizer(), tmp_path_factory.mktemp("x") / "".join(NASTY)
    )


def test_every_command_shows_names_as_they_are_and_a_json(
    model: Path, tmp_path: Path, run: Any, refusal: Any
) -> None:
    name = model.name
    text = tmp_path / f"{name}.txt"
    text.write_text("some words of no importance\n" * 200)
    recipe = tmp_path / f"{name}.yaml"
    recipe.write_text("method: magnitude\n")
    pruned, packed, again = (
        tmp_path / kind / name for kind in ("pruned", "packed", "again")
    )
    shown = {}
    for name, *rest in (
        (
            "prune",
            model,
            "--out",
            pruned,
            "--calibration",
            text,
            "--recipe",
            recipe,
            *SMALL,
        ),
        ("eval", pruned, "--text", text, "--seq-len", 32),
        ("inspect", pruned, "--all"),
        ("pack", pruned, "--out", packed),
        ("export", packed, "--to", "transformers", "--out", again),
        (
            "bench",
            packed,
            "--dense",
            pruned,
            "--prompt-tokens",
            4,
            "--new-tokens",
            2,
            "--repeats",
            1,
        ),
        ("generate", packed, "see [bold]x[/bold] :smile: [/]", "--max-new-tokens", 2),
    ):
        _, shown[name], stderr = run(name, *rest, columns=80, exits=0)
        assert "\x1b" not in shown[name] + stderr
        more = (
            [["--quiet"], ["--overwrite", "--quiet"]]["--out" in rest]
            if name != "inspect"
            else []
        )
        _, stdout, stderr = run(name, *rest, *more, "--json", exits=0)
        assert all(
            line.startswith("note: 32 calibration tokens are few")
            for line in stderr.splitlines()
        )
        assert isinstance(json.loads(stdout), dict)
    assert all(
        part in shown["prune"]
        for part in (f"written to {pruned}\n", f"calibrated on {text} ", "50.0")
    )
    assert "block 2" in shown["inspect"]
    assert f"written to {packed}\n" in shown["pack"]
    assert f"written to {again}\n" in shown["export"]
    assert all(part in shown["bench"] for part in ("packed is", "weights in memory"))
    assert shown["generate"].startswith("see [bold]x[/bold] :smile: [/]")
    assert "--max-new-tokens is 0" in refusal(
        "generate", packed, "see", "--max-new-tokens", 0
    )


@pytest.mark.parametrize(
    ("name", "shown"),
    [*((name, name) for name in NASTY if "\\" not in name), ("a\nb\x1b[2Jc", "a\\nb\\x1b[2Jc"), ("\udcff", "\\udcff")],
)  # fmt: skip
def test_an_error_is_one_line_with_the_name_as_it_is(
    name: str, shown: str, refusal: Any
) -> None:
    assert f"/nowhere/{shown}" in refusal("inspect", f"/nowhere/{name}", columns=80)


def test_what_a_terminal_would_obey_is_shown_as_an_escape() -> None:
    assert (
        console.visible("a\x1b[31mb\x07\r\tc\nd\x9b\u202e")
        == "a\\x1b[31mb\\x07\\r\tc\nd\\x9b\\u202e"
    )
    assert console.one_line("a\nb\u2028c") == "a\\nb\\u2028c"


COMMANDS = get_command(cli.app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_help_fits_80_columns(command: str, run: Any) -> None:
    stdout = run(command, "--help", columns=80, exits=0)[1]
    assert f"Usage: sparsellm {command}" in stdout
    needed = [
        param
        for param in COMMANDS[command].params
        if param.param_type_name == "option" and param.required
    ]
    assert all(
        f"{param.opts[0]} {param.metavar}" in " ".join(stdout.partition("╭")[0].split())
        for param in needed
    )
    assert "Examples:" in stdout
    assert max(map(len, stdout.splitlines())) <= 80
    assert "…" not in stdout


def test_every_field_with_an_option_is_shown_with_its_default(run: Any) -> None:
    stdout = run("prune", "--help", columns=80)[1]
    words = " ".join(stdout.replace("│", " ").split())
    for name in options.FIELDS:
        line, default = option_of(name), getattr(Recipe(), name)
        assert line is not None
        panel = "Common" if name in options.COMMON_FIELDS else line.panel
        assert f"─ {panel} ─" in stdout
        assert help_of(name) in words
        if line.registered:
            assert f"{help_of(name)} Known: admm, magnitude, " in words
            assert f"[default: {default}]" in words
        elif line.null or default not in (None, [], {}):
            assert f"{help_of(name)} [default: {line.null or default}]" in words


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("--values", "int8"), ["--grid q8_0 or ", "w8a8"]),
        (("--values", "int3"), ["give --grid w3a16 (compressed-tensors)"]),
        (("--grid", "w8a8"), []),
        ((), []),
        (("--values", "int8", "--pack", "p"), []),
    ],
)
def test_before_the_work_it_is_said_what_can_be_exported(
    settings: Any, said: list[str], llama: Path, tmp_path: Path, run: Any
) -> None:
    line = ("prune", llama, "--out", tmp_path / "out", "--dry-run", *SMALL, *settings)
    stderr = run(*line, exits=0)[2]
    notes = [text for text in stderr.splitlines() if "`sparsellm pack` alone" in text]
    assert len(notes) == bool(said)
    assert all(part in stderr for part in said)


def test_the_help_is_short_and_begins_with_what_is_common(run: Any) -> None:
    stdout = run("prune", "--help", columns=80)[1]
    panels = re.findall("─ ([A-Z][\\w ]+) ─", stdout)
    assert panels[:2] == ["Model", "Common"]
    # and --help
    assert len(re.findall(r"^│ [* ] *--|^│ --", stdout, re.MULTILINE)) <= 26 + 1
    assert len(COMMANDS) <= 15


@pytest.mark.parametrize(
    ("arguments", "field", "value"),
    [
        (["--set", "only=[a, b]"], "only", ["a", "b"]),
        (["--set", "exclude=['*.a']"], "exclude", ["*.a"]),
        (
            ["--set", "sparsity_of.*.up=0.25", "--set", "sparsity_of.b=0.5"],
            "sparsity_of",
            {"*.up": 0.25, "b": 0.5},
        ),
        (["--sparsity", "0"], "sparsity", 0.0),
        (["--memory", "4GiB"], "memory", "4GiB"),
        (["--set", "bos=no"], "bos", "no"),
        (["--effort", "2", "--set", "seed=3"], "effort", 2),
        (["--recipe", "{tmp}/r.yaml"], "seed", 7),
        (["--recipe", "{tmp}/r.yaml", "--set", "seed=8"], "seed", 8),
        (
            ["--recipe", "{tmp}/r.yaml", "--set", "effort=2"],
            "effort",
            2,
        ),
    ],
)
def test_an_option_sets_its_field(
    arguments: list[str],
    field: str,
    value: Any,
    tmp_path: Path,
    run: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Options and ``--set`` override the file."""
    (tmp_path / "r.yaml").write_text("seed: 7\nsamples: 5\n")
    recipe = recipe_of(
        run, monkeypatch, [word.replace("{tmp}", str(tmp_path)) for word in arguments]
    )
    assert getattr(recipe, field) == value
    assert recipe.samples == (5 if "--recipe" in arguments else 128)


def recipe_of(
    run: Any, monkeypatch: pytest.MonkeyPatch, arguments: list[str]
) -> Recipe:
    """The recipe with which a command line of ``prune`` would run."""
    stop = Mock(side_effect=cli.RecipeError("enough"))
    monkeypatch.setattr(api, "prune", stop)
    monkeypatch.setattr(cli.use, "look_at_names", Mock())  # nothing is there
    assert run("prune", "model", "--out", "out", *arguments)[2] == "error: enough\n"
    return stop.call_args.args[1]  # type: ignore[no-any-return]


def test_the_examples_of_the_help_are_command_lines(
    run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = [
        line.strip()
        for line in COMMANDS["prune"].epilog.split("\n\n")
        if "sparsellm prune" in line
    ]
    assert len(examples) == 3
    for example in examples:
        recipe_of(run, monkeypatch, example.split()[3:])


def test_version_and_completion_need_no_torch() -> None:
    program = (
        "import sys\nfrom sparsellm.app import cli\nsys.argv = ['sparsellm', *{arguments}]\n"
        "try:\n    cli.main()\nexcept SystemExit as done:\n    assert not done.code, done.code\n"
        "assert 'torch' not in sys.modules\nassert 'transformers' not in sys.modules\n"
    )

    def shown(*arguments: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, "-c", program.replace("{arguments}", repr(arguments))],
            env={**os.environ, **environment}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        return done.stdout

    assert shown("--version") == f"sparsellm {__version__}\nkernels: {kernels()}\n"
    script = shown(
        "--show-completion", "bash", _TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION="1"
    )
    assert "complete -o default -F _sparsellm_completion sparsellm" in script
    asked = {
        "_SPARSELLM_COMPLETE": "complete_bash",
        "COMP_WORDS": "sparsellm prune m --ca",
        "COMP_CWORD": "3",
    }
    assert shown(**asked) == "--calibration\n"
    asked |= {"COMP_WORDS": "sparsellm prune m --values ", "COMP_CWORD": "4"}
    assert shown(**asked).split() == ["keep", "int8", "int6", "int5", "int4", "int3"]


def test_no_arguments_show_the_help_and_no_empty_error(run: Any) -> None:
    _, stdout, stderr = run(exits=2)
    assert "Usage: sparsellm" in stdout + stderr
    assert "error" not in stderr


def test_numbers_are_short() -> None:
    counts = {
        0: "0",
        999: "999",
        999.96: "1.0K",
        10_500: "10.5K",
        106_168_320: "106.2M",
        2e13: "20.0T",
    }
    assert {number: console.count(number) for number in counts} == counts
    times = {
        9.94: "9.9 s",
        9.96: "10 s",
        59.6: "1 min 00 s",
        1033: "17 min 13 s",
        11_100: "3 h 05 min",
    }
    assert {seconds: console.duration(seconds) for seconds in times} == times
    assert console.speed(41.23, 40.0, 99.96) == "41.2 (40.0–100)"
    assert console.speed(12_345, 9_999.6, 13_000) == "12.3K (10.0K–13.0K)"


def test_a_quiet_run_warns_only_a_verbose_one_shows_steps(
    model: Path, tmp_path: Path, run: Any
) -> None:
    given = ("--method", "magnitude", *SMALL, "--out")
    _, stdout, stderr = run(
        "prune", model, *given, tmp_path / "a", "--verbose", exits=0
    )
    assert "prune blocks: block 2/3 down_proj · " in stderr
    assert "\nprune blocks: " in stderr  # the phase is over
    assert "gather statistics" in stdout
    _, stdout, stderr = run(
        "prune", tmp_path / "a", *given, tmp_path / "c", "--quiet", exits=0
    )
    assert stdout == ""
    assert "\nnote: the model is already pruned" in stderr
    assert all(line.startswith("note: ") for line in stderr.splitlines())


def test_json_is_readable_whatever_the_encoding(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for encoding in ("utf-8", "ascii", "latin-1"):
        stream = io.TextIOWrapper(
            io.BytesIO(), encoding=encoding, errors="backslashreplace"
        )
        monkeypatch.setattr(sys, "stdout", stream)
        console.write_json({"path": "ü–\udcff[b]"})
        stream.flush()
        assert json.loads(stream.buffer.getvalue().decode(encoding)) == {
            "path": "ü–\udcff[b]"
        }  # type: ignore[attr-defined]
