"""The command line as its users meet it: commands end to end, one JSON object, and one clear line per mistake."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from transformers import BertConfig, BertForMaskedLM, T5Config

from sparsepack.errors import Note
from tests.models import save_tiny, tiny_llama, tiny_tokenizer

SMALL = ("--samples", 4, "--seq-len", 32)


def test_what_prune_prints_is_its_record_and_what_inspect_counts(
    llama: Path, tmp_path: Path, run: Any
) -> None:
    out = tmp_path / "pruned"
    line = (
        "prune",
        llama,
        "--out",
        out,
        "--method",
        "sparsegpt",
        "--pattern",
        "2:4",
        *SMALL,
    )
    report = json.loads(run(*line, "--json", exits=0)[1])
    assert report["sparsity_asked"] == report["sparsity_reached"] == 0.5
    assert report["peak_rss_bytes"] > 0
    assert {"read", "prune", "forward", "write"} <= report["seconds"].keys()
    assert report["recipe"]["samples"] == 4
    assert {
        "path": str(out),
        **json.loads((out / "pruning.json").read_text()),
    } == report
    inspected = json.loads(run("inspect", out, "--json", exits=0)[1])
    assert inspected["pattern"] == "2:4"
    assert inspected["sparsity"] == 0.5
    assert (
        sum(block["zeros"] for block in inspected["blocks"])
        == inspected["zeros"]
        == report["zeros"]
    )


def test_a_run_says_what_it_needs_and_what_comes_next(
    llama: Path, tmp_path: Path, run: Any
) -> None:
    """Without a hub, and with few tokens, of which it warns once."""
    out = tmp_path / "a b"
    _, stdout, stderr = run("prune", llama, "--out", out, *SMALL, exits=0)
    first, *others = stderr.splitlines()
    assert re.fullmatch(
        r"needs about [\d.]+ [MG]B of memory, [\d.]+ MB of disk and a few seconds",
        first,
    )
    assert "before the start" not in stderr
    assert (
        len(
            [
                line
                for line in others
                if line.startswith("note: calibrated on Python's documentation")
            ]
        )
        == 1
    )
    assert (
        len(
            [
                line
                for line in others
                if line.startswith("note: 128 calibration tokens are few")
            ]
        )
        == 1
    )
    sweeps = json.loads((out / "pruning.json").read_text())["sweeps"]
    least, before = min(sweep["held_out"] for sweep in sweeps), sweeps[0]["held_out"]
    assert (
        f"held-out calibration windows: {least:.3f} nats a token ({before:.3f} before the sweep)"
        in stdout
    )
    assert (
        json.loads((out / "pruning.json").read_text())["recipe"]["calibration"]
        == "pydoc"
    )
    following = [
        line.partition("sparsellm ")[2]
        for line in stdout.splitlines()
        if "it:  " in line
    ]
    assert [line.split()[0] for line in following] == ["eval", "pack"]
    for command in following:
        run(*shlex.split(command), exits=0)
    more = ("--method", "wanda", "--calibration", "pydoc", "--verbose")
    stderr = run("prune", llama, "--out", tmp_path / "b", *SMALL, *more, exits=0)[2]
    assert "no text was named" not in stderr


def test_each_command_ends_with_the_one_that_comes_next(
    llama: Path, tmp_path: Path, run: Any
) -> None:
    """With the paths of its user, quoted. A plan by a config alone has none, since prune needs the weights."""
    pruned = tmp_path / "a b"
    packed = tmp_path / "c d"
    dense = tmp_path / "e"
    run("prune", llama, "--out", pruned, *SMALL, exits=0)
    measured = ("--text", "pydoc", "--seq-len", 32, "--max-tokens", 64)
    lines = {
        ("plan", llama, *SMALL): f"start it:  sparsellm prune {llama}",
        ("inspect", llama): f"make it smaller:  sparsellm compress {llama}",
        ("inspect", pruned): f"measure it:  sparsellm eval '{pruned}' --text pydoc",
        ("eval", pruned, *measured): f"see it all:  sparsellm report '{pruned}'",
        ("report", pruned): f"share it:  hf upload OWNER/NAME '{pruned}'",
        ("pack", pruned, "--out", packed): f"run it:  sparsellm serve '{packed}'",
        ("export", packed, "--to", "transformers", "--out", dense): (
            f"measure it:  sparsellm eval {dense} --text pydoc"
        ),
        ("bench", packed, "--new-tokens", 2, "--prompt-tokens", 4, "--repeats", 1): (
            f"run it:  sparsellm serve '{packed}'"
        ),
    }
    for command, next_line in lines.items():
        _, stdout, _ = run(*command, exits=0)
        last = stdout.splitlines()[-1]
        assert last.startswith(next_line), (command, last)
    _, stdout, _ = run("plan", llama / "config.json", *SMALL, exits=0)
    assert "start it:" not in stdout


def test_one_command_prunes_packs_measures_and_reports(
    llama: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pruned, packed = tmp_path / "pruned", tmp_path / "packed"
    line = (
        "prune",
        llama,
        "--out",
        pruned,
        "--pack",
        packed,
        "--values",
        "int8",
        *SMALL,
        "--effort",
        0,
    )
    content = json.loads(run(*line, "--json", exits=0)[1])
    assert content["packed"]["path"] == str(packed)
    types = {entry["value_type"] for entry in content["packed"]["head"].values()}
    assert types == {"int8"}
    (measured,) = json.loads((packed / "results.json").read_text())["evaluations"]
    assert measured == content["evaluation"]
    assert (measured["protocol"]["text"], measured["against"]["kl"] > 0) == (
        "pydoc",
        True,
    )
    assert f"{measured['against']['kl']:.3f}"[:4] in (packed / "report.html").read_text(
        encoding="utf-8"
    )
    assert "KL" in (packed / "README.md").read_text()
    for model, place in (
        (llama, llama / "inside"),
        (pruned, pruned),
    ):
        line = (
            "prune",
            model,
            "--out",
            tmp_path / "q",
            "--pack",
            place,
            "--overwrite",
            *SMALL,
        )
        assert "overlaps with the model" in run(*line, exits=2)[2]
    again = run(
        "prune", llama, "--out", pruned, "--pack", tmp_path / "later", *SMALL, exits=2
    )[2]
    assert f"`sparsellm pack {pruned} --out {tmp_path / 'later'}` packs it" in again
    assert (
        "give --overwrite"
        in run(
            "prune", llama, "--out", tmp_path / "q", "--pack", packed, *SMALL, exits=2
        )[2]
    )


def test_something_is_printed_before_torch_is_imported() -> None:
    program = (
        "import sys\nfrom sparsellm.app import cli\nsys.stderr = sys.stdout\n"
        "class Finder:\n    def find_spec(self, name, path=None, target=None):\n"
        "        if name == 'torch':\n            print('torch')\n            raise SystemExit(3)\n"
        "sys.meta_path.insert(0, Finder())\nsys.argv = ['sparsellm', 'prune', 'model', '--out', 'x', *sys.argv[1:]]\n"
        "cli.main()\n"
    )
    done = [
        subprocess.run(
            [sys.executable, "-c", program, *more],
            capture_output=True,
            text=True,
            check=False,
        )
        for more in ([], ["--quiet"])
    ]
    assert [process.returncode for process in done] == [3, 3]
    assert re.fullmatch(
        r"sparsellm \S+: loading torch and transformers\ntorch\n", done[0].stdout
    )
    assert done[1].stdout == "torch\n"


MISTAKES: dict[
    str, tuple[list[str], list[str]]
] = {  # one from each part that refuses; its tests have the others
    "model not found": (["prune", "{tmp}/nowhere"], ["nowhere", "not found"]),
    "an encoder": (["prune", "{tmp}/bert"], ["bert", "decoder"]),
    "unknown method": (["prune", "{llama}", "--method", "wonda"], ["wonda", "'wanda'"]),
    "a percentage": (
        ["prune", "{llama}", "--sparsity", "70"],
        ["70", "did you mean 0.7?"],
    ),
    "no weight left": (
        ["prune", "{llama}", "--method=wanda", "--sparsity=0.9999999999"],
        ["0.9999999999", "every"],
    ),
    "code": (
        ["prune", "{llama}", "--pack=p", "--trust-remote-code"],
        ["a packed model runs no code of a checkpoint"],
    ),
    "pack in out": (
        ["prune", "{llama}", "--pack={tmp}/pruned/p"],
        ["--pack", "overlaps with --out"],
    ),
    "head without pack": (
        ["prune", "{llama}", "--out", "{tmp}/o", "--head", "int8"],
        ["--head int8 is of the packed model; give --pack DIR"],
    ),
    "another head": (
        ["prune", "{llama}", "--out", "{tmp}/o", "--pack", "{tmp}/p", "--head", "int7"],
        ["--head is 'int7'; it should be keep or int8"],
    ),
    "no tokenizer": (
        ["prune", "{tmp}/bare"],
        ["no tokenizer's files", "copy tokenizer.json"],
    ),
    "no tokenizer to talk with": (["chat", "{tmp}/bare"], ["no tokenizer's files"]),
    "out cannot be written": (["prune", "{llama}", "--out", "/proc/pruned"], ["/proc"]),
    "quiet and verbose": (
        ["pack", "{llama}", "--out", "{tmp}/p", "--quiet", "--verbose"],
        ["contradict each other"],
    ),
    "bench what is dense": (["bench", "{llama}"], ["not packed", "sparsellm pack"]),
    "unknown command": (["prume", "{llama}"], ["prume"]),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_clear_line_and_exit_code_2(
    mistake: str, llama: Path, tmp_path: Path, run: Any
) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "short.txt").write_text("too short")
    arguments, said = MISTAKES[mistake]
    command = [part.format(llama=llama, tmp=tmp_path) for part in arguments]
    if mistake.startswith("no tokenizer"):
        save_tiny(tiny_llama(), None, tmp_path / "bare")
    if mistake == "an encoder":
        sizes = {
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 64,
        }
        save_tiny(
            BertForMaskedLM(BertConfig(vocab_size=300, **sizes)),
            tiny_tokenizer(),
            tmp_path / "bert",
        )
    elif mistake == "an encoder-decoder":
        T5Config().save_pretrained(tmp_path / "t5")
    if command[0] == "prune" and "--out" not in command:
        command += ["--out", str(tmp_path / "pruned")]
    _, stdout, stderr = run(*command, exits=2)
    assert stdout == ""
    *_, line = stderr.splitlines()
    assert line.startswith("error: ")
    assert stderr.count("error: ") == 1
    assert all(part in line for part in said), line
    assert "Traceback" not in stderr
    assert not (tmp_path / "pruned").exists()


def test_a_full_disk_is_said_at_once(
    llama: Path, tmp_path: Path, run: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from sparsellm.files import directory

    prune = ("prune", llama, "--method", "wanda", *SMALL)
    kept, rounded = tmp_path / "kept", tmp_path / "rounded"
    run(*prune, "--out", kept, exits=0)
    run(*prune, "--grid", "w8a8", "--out", rounded, exits=0)
    usage = directory.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(
        directory.shutil, "disk_usage", lambda path: usage._replace(free=1000)
    )
    others = [
        ("pack", kept),
        ("export", rounded, "--to", "compressed-tensors"),
    ]
    for line in (prune, *others):
        assert (
            " MB and its disk has 0.00 MB free; make room"
            in run(*line, "--out", tmp_path / "p", exits=2)[2]
        )


def test_no_memory_from_the_system_is_one_line(
    llama: Path, tmp_path: Path, refusal: Any, monkeypatch: Any
) -> None:
    for error in (
        MemoryError(),
        RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate"
        ),
    ):
        monkeypatch.setattr("sparsellm.api.prune", Mock(side_effect=error))
        assert "gives this process no more memory" in refusal(
            "prune", llama, "--out", tmp_path / "p"
        )


def test_what_may_not_be_read_is_one_line(
    llama: Path, tmp_path: Path, refusal: Any, monkeypatch: Any
) -> None:
    """A directory without permission to search it, which root has, and a current directory that was removed."""
    monkeypatch.setattr(
        "sparsellm.api.inspect",
        Mock(side_effect=PermissionError(13, "Permission denied", "m/x")),
    )
    assert (
        refusal("inspect", llama)
        == "error: m/x: Permission denied; correct the path or its permissions"
    )
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert "the current directory: No such file" in refusal(
        "prune", llama, "--out", "p"
    )


def test_a_damaged_text_of_the_model_is_named(
    llama: Path, tmp_path: Path, run: Any, monkeypatch: Any
) -> None:
    monkeypatch.setenv("SPARSELLM_CACHE", str(tmp_path / "cache"))
    line = ("prune", llama, "--calibration", "self", "--method", "wanda", *SMALL)
    run(*line, "--out", tmp_path / "p", exits=0)
    (file,) = (tmp_path / "cache" / "written").glob("*.safetensors")
    os.truncate(file, 500)
    assert str(file) in run(*line, "--out", tmp_path / "q", exits=2)[2]


def test_commands_in_one_process_do_not_pile_up(run: Any) -> None:
    run("--version", exits=0)
    first = warnings.formatwarning
    run("--version", exits=0)
    assert warnings.formatwarning is first
    assert warnings.formatwarning(Note("said"), Note, "", 1) == "note: said\n"


def test_closed_streams_end_nothing() -> None:
    closed = [
        "sh",
        "-c",
        'exec "$@" >&- 2>&-',
        "sh",
        sys.executable,
        "-m",
        "sparsellm",
        "--version",
    ]
    assert subprocess.run(closed, check=False).returncode == 0
