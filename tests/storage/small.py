"""Checkpoints of a few numbers, written by the real writer, without a model: what they are can be told at once."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from sparsellm.storage.shard import TensorSource
from sparsellm.storage.writer import CheckpointWriter

SHARDS = 2


def source(directory: Path, **files: str) -> Path:
    """The directory of a model, as far as a writer looks at it: a config and a tokenizer, and ``files`` beside."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", "quantization_config": {}}))
    (directory / "tokenizer.json").write_text("{}")
    for name, content in files.items():
        (directory / name.replace("__", ".")).write_text(content)
    return directory


def write(out: Path, value: float, model: Path, **options: Any) -> Path:
    """Writes a checkpoint whose weights all are ``value``; goes on where a call with the same value was cut short."""
    with CheckpointWriter(out, shards=SHARDS, identity={"value": value}, **options) as writer:
        for index in range(SHARDS):
            if writer.finished(index) is None:
                writer.write_shard(index, {f"w{index}": TensorSource.of(torch.full((3, 2), value))})
        writer.copy_companions(model)
        writer.write_json("pruning.json", {"value": value})
        return writer.finish()


def value_of(directory: Path) -> float:
    """What :func:`write` was given, if the checkpoint is whole: every file says the same, and there is no other."""
    names = {path.name for path in directory.iterdir()}
    listed = {"config.json", "tokenizer.json", "pruning.json", "model.safetensors.index.json"}
    shards = {f"model-{index + 1:05d}-of-{SHARDS:05d}.safetensors" for index in range(SHARDS)}
    assert names == listed | shards, names
    assert json.loads((directory / "config.json").read_text()) == {"model_type": "llama"}
    index = json.loads((directory / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index.values()) == shards
    value = float(json.loads((directory / "pruning.json").read_text())["value"])
    for key, shard in index.items():
        assert torch.equal(load_file(directory / shard)[key], torch.full((3, 2), value))
    return value
