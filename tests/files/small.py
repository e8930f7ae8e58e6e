"""Checkpoints of a few numbers, written by the real writer without a model, and what a directory holds."""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sparsellm.files.contents import LATER, LIST
from sparsellm.files.directory import WorkingDirectory, old_of
from sparsellm.files.files import TORN
from sparsellm.files.writer import CheckpointWriter, shard_names

SHARDS = 2


def source(directory: Path, **files: str) -> Path:
    """The directory of a model, as far as a writer reads it: config, tokenizer and ``files`` (``__`` for a dot)."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": {}})
    )
    (directory / "tokenizer.json").write_text("{}")
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(content)
    return directory


def identity(kind: str, value: float) -> dict[str, object]:
    """The identity of a run of :func:`write`."""
    return {"kind": kind, "value": value}


def write(
    out: Path, value: float, model: Path, kind: str = "prune", **options: Any
) -> Path:
    """Writes a checkpoint whose weights all are ``value``."""
    with WorkingDirectory(out, identity(kind, value), **options) as work:
        writer = CheckpointWriter(work, SHARDS, resumes=True)
        for index in range(SHARDS):
            writer.write_shard(index, {f"w{index}": torch.full((3, 2), value)})
        writer.copy_companions(model)
        writer.write_json("pruning.json", {"value": value})
        return writer.finish()


def value_of(directory: Path) -> float:
    """The value that :func:`write` was given, if every file of the checkpoint is there and no other file."""
    shards = set(shard_names(SHARDS))
    others = {
        "config.json",
        "tokenizer.json",
        "pruning.json",
        "model.safetensors.index.json",
        LIST,
    }
    assert {
        path.name for path in directory.iterdir() if not TORN.fullmatch(path.name)
    } - set(LATER) == others | shards
    assert json.loads((directory / "config.json").read_text()) == {
        "model_type": "llama"
    }
    index = json.loads((directory / "model.safetensors.index.json").read_text())[
        "weight_map"
    ]
    assert set(index.values()) == shards
    value = float(json.loads((directory / "pruning.json").read_text())["value"])
    for key, shard in index.items():
        assert torch.equal(load_file(directory / shard)[key], torch.full((3, 2), value))
    return value


def value_there(place: Path) -> float | None:
    """The value of the checkpoint under a name, or of the older one between two renames; None where there is none."""
    for path in (place, old_of(place)):
        if path.is_dir() and any(path.iterdir()):
            return value_of(path)
    return None


def tree(directory: Path) -> dict[str, bytes | str | None]:
    """Every path below a directory: its bytes, where it links to, None for a folder, or another kind of file."""

    def content(path: Path) -> bytes | str | None:
        if path.is_symlink():
            return os.readlink(path)
        return (
            path.read_bytes()
            if path.is_file()
            else None
            if path.is_dir()
            else stat.filemode(path.stat().st_mode)
        )

    return {
        str(path.relative_to(directory)): content(path) for path in directory.rglob("*")
    }


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    """The weights of a checkpoint, or of an unfinished one."""
    return {
        name: value
        for file in directory.rglob("*.safetensors")
        for name, value in load_file(file).items()
    }


def shards_of(directory: Path) -> dict[str, bytes]:
    """The bytes of every file of weights."""
    return {path.name: path.read_bytes() for path in directory.glob("*.safetensors")}


def contents(out: Path) -> dict[str, Any]:
    """Every file, bit by bit; of the report all but times, memory and the command."""
    there: dict[str, Any] = tree(out)
    report = json.loads(there["pruning.json"])
    for key in ("seconds", "peak_rss_bytes", "memory", "command"):
        del report[key]
    del there["report.html"]  # it shows these times
    listed = json.loads(there[LIST]).items()
    lasting = {
        name: digests
        for name, digests in listed
        if name not in ("pruning.json", "report.html")
    }
    return {**there, "pruning.json": report, LIST: lasting}
