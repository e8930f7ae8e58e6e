"""Files that a run writes for others have names and digests: no path, user or host of the machine that wrote them."""

from __future__ import annotations

import getpass
import os
import platform
import socket
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsellm
from tests.files.small import shards_of
from tests.models import save_tiny, tiny_llama, tiny_tokenizer

USER, HOST = "zaphod-the-user", "milliways-the-host"
SMALL = ["--set=samples=4", "--set=seq_len=32", "--sparsity=0.5"]


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The home directory of a user, with a model, a text and two plugins of one name; it is not the current one."""
    home = tmp_path / USER
    save_tiny(tiny_llama(), tiny_tokenizer(), home / "models" / "tiny")
    (home / "texts").mkdir()
    (home / "texts" / "words.txt").write_text(" ".join(map(str, range(4000))))
    for folder in ("first", "second"):
        (home / folder).mkdir()
        (home / folder / "mine.py").write_text(f'"""The {folder}."""\n')
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(home))
    for name in ("USER", "LOGNAME", "USERNAME"):
        monkeypatch.setenv(name, USER)
    monkeypatch.setenv("HOSTNAME", HOST)
    monkeypatch.setattr(socket, "gethostname", lambda: HOST)
    monkeypatch.setattr(platform, "node", lambda: HOST)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    return home


@pytest.mark.usefixtures("forgotten_plugins")
def test_no_file_for_others_names_the_machine(home: Path, run: Any) -> None:
    model, text, out = (
        home / "models" / "tiny",
        home / "texts" / "words.txt",
        home / "out",
    )
    secret = {
        USER,
        HOST,
        str(home.parent),
        sys.prefix,
        os.path.dirname(os.getcwd()),
        socket.gethostname(),
    }
    measured = ("--text", f"file:{text}", "--seq-len", 32, "--max-tokens", 256)
    grid = ("--text", f"file:{text}", "--text-seq-len", 32, "--max-tokens", 256)
    plugins = [
        f"--plugin={home / folder / 'mine.py'}" for folder in ("first", "second")
    ]
    half, again, packed = out / "half", out / "other" / "half", out / "packed"
    commands: list[tuple[object, ...]] = [
        ("prune", model, "--out", half, "--calibration", text, *plugins, *SMALL),
        ("prune", "../zaphod-the-user/models/tiny", f"--out={again}", f"--set=calibration=file:{text}", *SMALL),
        ("pack", half, "--out", packed),
        ("export", packed, "--to", "transformers", "--out", out / "unpacked"),
        ("eval", half, *measured, "--against", model),
        ("eval", packed, *measured, "--against", f"{model}/"),
        ("bench", packed, "--dense", half, "--prompt-tokens", 4, "--new-tokens", 2, "--repeats", 1),
        ("report", half),
        ("report", packed),
        ("report", half, again, packed, "--out", out / "all.html"),
        ("compare", model, "--out", out / "grid", "--method=magnitude,wanda", "--calibration", text, *grid, *SMALL),
    ]  # fmt: skip
    for command in commands:
        run(*command, exits=0)
    loaded = AutoModelForCausalLM.from_pretrained(model)
    recipe = sparsellm.Recipe(
        method="wanda", samples=4, seq_len=32, calibration=str(text)
    )
    sparsellm.prune(
        loaded,
        recipe,
        out=out / "object",
        tokenizer=AutoTokenizer.from_pretrained(model),
    )
    secret |= {word for word in (getpass.getuser(), str(Path.home())) if len(word) > 5}
    files = [file for file in out.rglob("*") if file.is_file()]
    names = {
        "pruning.json",
        "results.json",
        "recipe.yaml",
        "README.md",
        "report.html",
        "packed.json",
        "compare.html",
    }
    assert names | {"all.html", "config.json"} <= {file.name for file in files}
    assert any(file.suffix == ".safetensors" for file in files)
    written = {str(file.relative_to(out)): file.read_bytes() for file in files}
    assert not [
        (name, word)
        for name, held in written.items()
        for word in secret
        if word.encode() in held
    ]
    assert "words.txt" in (half / "pruning.json").read_text()


def test_the_recipe_that_is_written_prunes_again(
    home: Path, monkeypatch: pytest.MonkeyPatch, run: Any
) -> None:
    """The text is found where it lies by its name, or is named again."""
    text, out = home / "texts" / "words.txt", home / "out"
    assert (
        run(
            "prune",
            home / "models" / "tiny",
            "--out",
            out / "one",
            "--calibration",
            text,
            *SMALL,
        )[0]
        == 0
    )
    words = (
        "prune",
        home / "models" / "tiny",
        "--recipe",
        out / "one" / "recipe.yaml",
        "--out",
    )
    assert (
        "text file 'words.txt' does not exist" in run(*words, out / "two", exits=2)[2]
    )
    assert run(*words, out / "two", "--calibration", text)[0] == 0
    monkeypatch.chdir(text.parent)
    assert run(*words, out / "three")[0] == 0
    assert shards_of(out / "one") == shards_of(out / "two") == shards_of(out / "three")
