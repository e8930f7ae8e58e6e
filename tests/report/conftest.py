"""Three runs that the tests of the report share, each made once; a test that changes one copies it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from sparsellm import Recipe, prune
from tests.models import save_tiny, tiny_llama, tiny_opt, tiny_tokenizer
from tests.report.pages import results


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``opt`` with a sweep and a decomposition; ``half`` and ``nm`` of one Llama. The latter two were evaluated."""
    folder = tmp_path_factory.mktemp("runs")
    save_tiny(tiny_opt(), tiny_tokenizer(), folder / "dense-opt")
    save_tiny(tiny_llama(), tiny_tokenizer(), folder / "dense-llama")
    small = {"samples": 8, "seq_len": 32}
    options = {"iterations": 2, "solver": "sparsegpt"}
    prune(
        folder / "dense-opt",
        Recipe(sparsity=0.8, options=options, **small),
        out=folder / "opt",
    )
    prune(
        folder / "dense-llama",
        Recipe(sparsity=0.5, method="wanda", **small),
        out=folder / "half",
    )
    prune(
        folder / "dense-llama",
        Recipe(pattern="2:4", method="sparsegpt", **small),
        out=folder / "nm",
    )
    said = [
        {
            "prompt": "<b>one</b>",
            "dense": "two </script><script>alert(1)</script>",
            "pruned": "three",
        }
    ]
    (folder / "half" / "results.json").write_text(
        json.dumps(results(31.4, continuations=said))
    )
    (folder / "nm" / "results.json").write_text(json.dumps(results(41.2)))
    return folder


@pytest.fixture
def copied(runs: Path, tmp_path: Path) -> Path:
    """A copy of the directory of the Llama at 50 %."""
    return Path(shutil.copytree(runs / "half", tmp_path / "half"))
