"""Plugins: by file and by module; what is wrong with one is one line."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

import sparsellm
from sparsellm import PruneResult, Recipe, parallel, plugins
from sparsellm.errors import RecipeError, StorageError
from sparsellm.method.blocks import METHODS
from sparsellm.method.solvers import SOLVERS
from tests.method.allocation.helpers import IDS
from tests.models import tiny_llama

pytestmark = pytest.mark.usefixtures("forgotten_plugins")

SOLVER = """
from sparsellm.method.solvers import SOLVERS

@SOLVERS.register("{name}", paper="none")
def mine(weight, gram, pattern, *, strength: float = 1.0):
    '''Keeps what [b]magnitude[/b] keeps.'''
    return SOLVERS["magnitude"].function(weight, gram, pattern)
"""
ALLOCATION = """
from sparsellm.method.allocation import ALLOCATIONS, Allocation
from sparsellm.method.allocation.allocator import from_sparsities

@ALLOCATIONS.register("first-less", paper="none")
def first_less(survey):
    '''Block 1 gives less.'''
    found = from_sparsities(survey, {x.name: 0.3 if x.block == 0 else 0.7 for x in survey.linears})
    return Allocation(found.zeros, {"aim": survey.linears[0]})
"""


def write(path: Path, source: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(source)
    return path


def test_a_file_registers_what_prune_then_knows(
    llama: Path, tmp_path: Path, run: Any
) -> None:
    solver = write(tmp_path / "s.py", SOLVER.format(name="mine"))
    allocation = write(tmp_path / "a.py", ALLOCATION)
    line = (
        "prune", llama, "--out", tmp_path / "p", "--plugin", solver, "--plugin", allocation, "--method", "mine",
        "--set", "allocation=first-less", "--set", "options.strength=2", "--samples", 2, "--seq-len", 16, "--json",
    )  # fmt: skip
    report = json.loads(run(*line, exits=0)[1])
    assert (report["recipe"]["method"], report["allocation"]["name"]) == (
        "mine",
        "first-less",
    )
    first, last = report["linears"][0], report["linears"][-1]
    assert first["sparsity"] < 0.5 < last["sparsity"]
    # no JSON value: its text
    assert report["allocation"]["aim"].startswith("LinearSize(")


@pytest.mark.parametrize("zeros", ["", "x.weights / 2", "-1"])
def test_an_allocation_that_does_not_fit_is_one_line(
    zeros: str, tmp_path: Path
) -> None:
    made = (
        f"    return Allocation({{x.name: {zeros} for x in survey.linears}})"
        if zeros
        else ""
    )
    plugins.load_plugin(
        write(tmp_path / "a.py", ALLOCATION.partition("    found")[0] + made)
    )
    with pytest.raises(
        RecipeError, match=r"allocation first-less .* zeros.*; use from_sparsities"
    ):
        sparsellm.prune(
            tiny_llama(),
            Recipe(method="wanda", allocation="first-less"),
            calibration=IDS,
        )


def test_an_option_without_a_default_must_be_given(tmp_path: Path) -> None:
    plugins.load_plugin(
        write(tmp_path / "s.py", SOLVER.format(name="mine").replace(" = 1.0", ""))
    )
    with pytest.raises(RecipeError, match="option strength of mine is missing"):
        METHODS["mine"].check({})
    assert METHODS["mine"].check({"strength": 2}) == {"strength": 2.0}
    with pytest.raises(
        RecipeError, match="solver mine with its defaults; give its option strength one"
    ):
        sparsellm.prune(
            tiny_llama(), Recipe(options={"solver": "mine"}), calibration=IDS
        )


def test_a_module_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path / "pruning_tricks" / "__init__.py", "")
    source = write(
        tmp_path / "pruning_tricks" / "solvers.py", SOLVER.format(name="mine")
    )
    monkeypatch.syspath_prepend(tmp_path)
    plugins.load_plugin("pruning_tricks.solvers")
    assert "mine" in METHODS
    assert plugins.loaded() == {
        "pruning_tricks.solvers": hashlib.sha256(source.read_bytes()).hexdigest()
    }


def test_a_file_is_loaded_once_and_known_by_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write(tmp_path / "s.py", SOLVER.format(name="mine"))
    (tmp_path / "link.py").symlink_to(source)
    monkeypatch.chdir(tmp_path)
    for path in (source, "./s.py", tmp_path / "link.py"):
        plugins.load_plugin(path)
    assert plugins.loaded() == {"s.py": hashlib.sha256(source.read_bytes()).hexdigest()}
    source.write_text(source.read_text() + "\n# changed")
    with pytest.raises(RecipeError, match=r"s\.py has changed since it was loaded"):
        plugins.load_plugin(source)


def test_processes_with_different_plugins_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gathered = [[("s.py", "1")], [("s.py", "2")]]
    monkeypatch.setattr(
        parallel,
        "gather",
        lambda value: gathered if isinstance(value, list) else [value],
    )
    with pytest.raises(RecipeError, match="a plugin differs between processes"):
        sparsellm.prune(tiny_llama(), Recipe(method="magnitude"), calibration=IDS)


def test_plugins_have_distinct_names_that_can_be_recorded(tmp_path: Path) -> None:
    for name, file in (("a", "a/s.py"), ("b", "b/s.py"), ("odd", "s\udcff.py")):
        plugins.load_plugin(write(tmp_path / file, SOLVER.format(name=name)))
    digest = hashlib.sha256((tmp_path / "b" / "s.py").read_bytes()).hexdigest()
    assert list(plugins.loaded()) == ["s.py", f"s.py {digest[:8]}", r"s\udcff.py"]


BROKEN: dict[str, tuple[str, list[str]]] = {
    "a name twice": (
        SOLVER.format(name="wanda"),
        ["solver 'wanda' is registered twice", "another name"],
    ),
    "a syntax error": ("x = 1\ndef (", ["SyntaxError", "line 2"]),
    "an exit": ("raise SystemExit(0)", ["SystemExit"]),
    "a module that is missing": (
        "import not_there",
        ["ModuleNotFoundError", "not_there", "line 1"],
    ),
    "no end": ("def f(): f()\nf()", ["RecursionError", "line 1"]),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_plugin_is_one_line(what: str, tmp_path: Path) -> None:
    source, said = BROKEN[what]
    with pytest.raises(RecipeError, match=r"^plugin .*broken\.py") as caught:
        plugins.load_plugin(write(tmp_path / "broken.py", source))
    assert all(part in str(caught.value) for part in said)
    assert plugins.loaded() == {}


@pytest.mark.parametrize(
    "name",
    [
        "no.py",
        "{tmp}",
        "{tmp}/.py",
        "not_there",
        "sparsellm.not_there",
        "..x",
        "",
        "a\0b",
    ],
)
def test_a_plugin_that_is_not_there_is_one_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"\.py"):  # what to give instead
        plugins.load_plugin(name.format(tmp=tmp_path))


def test_no_run_goes_on_with_a_changed_plugin(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, recipe = tmp_path / "s.py", Recipe(method="mine", samples=2, seq_len=16)

    def prune(code: str) -> PruneResult:
        for registry in (SOLVERS, METHODS):  # as in a new process
            registry.pop("mine", None)
        monkeypatch.setattr(plugins, "_loaded", {})
        plugins.load_plugin(write(source, code))
        return sparsellm.prune(llama, recipe, out=tmp_path / "p")

    text = SOLVER.format(name="mine")
    with pytest.raises(ZeroDivisionError):
        prune(text.replace("    return SOLVERS", "    1 / 0\n    return SOLVERS"))
    with pytest.raises(
        StorageError, match=r"plugins\.s\.py is '\w{64}' there and '\w{64}' here"
    ):
        prune(text)
    plugins.load_plugin(source)
    assert sparsellm.prune(llama, recipe, out=tmp_path / "p", restart=True).zeros


def test_a_pipe_or_a_directory_is_no_plugin(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.py")
    with pytest.raises(RecipeError, match=r"pipe\.py is not an ordinary file"):
        plugins.load_plugin(tmp_path / "pipe.py")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(RecipeError, match=r"folder\.py: Is a directory"):
        plugins.load_plugin(tmp_path / "folder.py")
    with (tmp_path / "large.py").open("wb") as file:
        file.truncate(17 << 20)
    with pytest.raises(RecipeError, match=r"large\.py has more than 16 MiB"):
        plugins.load_plugin(tmp_path / "large.py")
