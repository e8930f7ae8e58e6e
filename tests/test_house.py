"""Rules of the house that no linter has: short functions, few parameters, files of distinct names."""

from __future__ import annotations

import runpy
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
# Commands and functions registered by name have options of their own. So may these have more parameters:
EXCEPTIONS = {
    "src/sparsellm/api.py:prune",  # what a user can say of a run
    "src/sparsellm/api.py:evaluate",  # what a user can say of a measurement
    "src/sparsellm/exports/door.py:export",  # what a user can say of an export
    "src/sparsepack/triton_kernels.py:_multiply",  # a kernel
    "src/sparsellm/solvers/panels.py:_panel",  # a kernel
    "src/sparsellm/solvers/panels.py:_eliminate",  # a kernel
}


def test_functions_are_short_and_have_few_parameters(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    tool = runpy.run_path(str(ROOT / "tools" / "figures.py"))
    files = {path: text for path, text in tool["files_of"](None).items() if path.startswith("src/")}
    functions = list(tool["functions"](files))
    assert len(functions) > 1000
    assert [function for function in functions if function.lines > tool["LONGEST"]] == []
    assert {function.place for function in functions if function.parameters > tool["MOST_PARAMETERS"]} == EXCEPTIONS


def test_no_two_files_have_one_name() -> None:
    for package in ("sparsellm", "sparsepack"):
        names = Counter(path.name for path in (ROOT / "src" / package).rglob("*.py") if path.name != "__init__.py")
        assert {name for name, count in names.items() if count > 1} == set()


def test_it_starts_without_what_only_extras_bring() -> None:
    extras = ("triton", "plotly", "peft", "lm_eval", "fastapi", "uvicorn", "compressed_tensors", "datasets")
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in extras)
    code = f"import sys; {blocked}import sparsellm.api, sparsellm.cli, sparsellm.tables, sparsellm.demo"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
