"""Rules of the house that no linter has: files of distinct names, a start without extras."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[1]


def test_no_two_files_have_one_name() -> None:
    for package in ("sparsellm", "sparsepack"):
        names = Counter(
            path.name
            for path in (ROOT / "src" / package).rglob("*.py")
            if path.name != "__init__.py"
        )
        assert {name for name, count in names.items() if count > 1} == set()


def test_it_starts_without_what_only_extras_bring() -> None:
    extras = (
        "triton",
        "plotly",
        "peft",
        "lm_eval",
        "starlette",
        "uvicorn",
        "compressed_tensors",
        "datasets",
    )
    blocked = "".join(f"sys.modules[{name!r}] = None; " for name in extras)
    code = f"import sys; {blocked}import sparsellm.api, sparsellm.app.cli, sparsellm.app.tables, sparsellm.app.demo"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
