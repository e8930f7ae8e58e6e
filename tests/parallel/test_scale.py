"""The commands of docs/scale.md: torchrun and sparsellm take each, and two processes on this machine run it."""

from __future__ import annotations

import re
import shlex
import shutil
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import get_args_parser

from tests.documents import ROOT, SMALL, blocks
from tests.models import save_tiny, tiny_llama, tiny_tokenizer

PAGE = ROOT / "docs" / "scale.md"
SCRIPTS = [*"".join(blocks(PAGE, "sh")).splitlines(), *blocks(PAGE, "bash")]


def small(script: str, port: int = 29400) -> str:
    """A script on a tiny model, in the working directory, with one process for each node."""
    command = re.search(r"-m sparsellm (\w+)", script)
    assert command is not None
    script = (
        script.replace("\\\n", " ")
        .rstrip()
        .replace("/shared", "shared")
        .replace("node1:", "localhost:")
    )
    return f"{script.replace('node 8', 'node 1').replace('29400', str(port))} {SMALL[command[1]]}"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for place in ("path/to/model", "shared/model"):
        save_tiny(tiny_llama(), tiny_tokenizer(), tmp_path / place)
    for name in ("my-text.txt", "my-test.txt", "shared/my-text.txt"):
        Path(name).write_text(
            "\n".join(
                f"Line {n} of a text about nothing in particular." for n in range(400)
            )
        )
    return tmp_path


def test_torchrun_and_sparsellm_take_every_command(folder: Path, run: Any) -> None:
    for script in SCRIPTS:
        line = re.search(r"torchrun .*", re.sub(r"\$\w+", "2", small(script)))
        assert line is not None
        given = get_args_parser().parse_args(shlex.split(line[0])[1:])
        assert (given.module, given.training_script) == (True, "sparsellm")
        shutil.rmtree(folder / "shared" / "pruned", ignore_errors=True)
        code, _, stderr = run(*given.training_script_args)
        assert code == 0, f"{line[0]}: {stderr}"
