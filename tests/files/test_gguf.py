"""GGUF conversion: a tiny Llama written as GGUF here gives the logits of the model it came from."""

from __future__ import annotations

import functools
import json
import os
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import gguf
import numpy as np
import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

import sparsellm
from sparsellm.errors import MemoryBudgetError, ModelError, StorageError
from sparsellm.files import cache
from sparsellm.files.cache import cached
from sparsellm.files.contents import LIST
from sparsellm.files.gguf import gguf_checkpoint
from sparsellm.files.reader import CheckpointReader
from tests.files.small import tree
from tests.killing import ahead_of
from tests.models import tiny_llama, tiny_tokenizer
from tests.models.families import family
from tests.models.in_gguf import CHAT, quantized_llama, write_gguf

F32 = gguf.GGMLQuantizationType.F32


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SPARSELLM_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "gguf"


def u32(*numbers: int) -> bytes:
    return struct.pack(f"<{len(numbers)}I", *numbers)


@pytest.mark.parametrize("dtype", ["auto", "float32"])
@pytest.mark.parametrize("kind", [F32, gguf.GGMLQuantizationType.Q8_0])
def test_a_silent_conversion_has_the_logits_of_the_model(
    tmp_path: Path,
    kind: Any,
    dtype: str,
    own_cache: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    model, path = quantized_llama(kind), tmp_path / "tiny.gguf"
    write_gguf(model, path, kind)
    capfd.readouterr()
    directory = gguf_checkpoint(path, dtype)
    captured = capfd.readouterr()
    assert (captured.out, "it/s" in captured.err) == ("", False)
    assert directory.parent == own_cache
    # nothing half-built is left
    assert [entry.name for entry in own_cache.iterdir()] == [directory.name]
    config = json.loads((directory / "config.json").read_text())
    assert not {"quantization_config", "sparsity_config"} & set(config)
    stored = "float32" if dtype == "float32" else "bfloat16"
    assert config["dtype"] == stored
    reader = CheckpointReader(directory)
    assert {reader.dtype(name) for name in reader} == {getattr(torch, stored)}
    for parameter in model.parameters():
        parameter.data = parameter.data.to(getattr(torch, stored)).float()
    loaded = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    ids = torch.arange(60)[None]
    assert torch.equal(loaded(ids).logits, model(ids).logits)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    assert (
        tokenizer("Hello world")["input_ids"]
        == tiny_tokenizer()("Hello world")["input_ids"]
    )
    assert tokenizer.chat_template == CHAT
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)


CHANGED: dict[
    str, tuple[dict[str, Any], Any]
] = {  # what transformers' table lacks: the config, and what the file says
    "Starcoder2": (
        {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}},
        lambda writer: None,
    ),
    "Phi-4": (
        {"sliding_window": None, "pad_token_id": 1},
        lambda writer: (writer.add_sliding_window(0), writer.add_pad_token_id(1)),
    ),
    "Phi3": (
        {"sliding_window": 8, "pad_token_id": 1},
        lambda writer: (writer.add_sliding_window(8), writer.add_pad_token_id(1)),
    ),
    "StableLm": (
        {
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e5,
                "partial_rotary_factor": 0.5,
            }
        },
        lambda writer: (
            writer.add_rope_dimension_count(4),
            writer.add_parallel_residual(True),
        ),
    ),
}


@pytest.mark.parametrize("name", sorted(CHANGED))
@torch.no_grad()
def test_what_a_file_says_of_positions_and_attention_counts(
    name: str, tmp_path: Path
) -> None:
    changes, more = CHANGED[name]
    model = family(name.replace("-4", "3"), **changes).eval()
    path = write_gguf(
        model, tmp_path / "tiny.gguf", F32, model.config.model_type, more=more
    )
    ids = torch.arange(4, 60)[None]
    directory = gguf_checkpoint(path, "float32")
    assert torch.equal(
        AutoModelForCausalLM.from_pretrained(directory)(ids).logits,
        model(ids).logits,
    )


@pytest.mark.parametrize(("name", "blocks"), [("Gemma2", 46), ("Gemma3Text", 62)])
def test_the_largest_gemmas_are_known_by_their_blocks(
    name: str, blocks: int, tmp_path: Path, monkeypatch: Any
) -> None:
    # made 1,062 times
    monkeypatch.setattr(
        gguf, "get_tensor_name_map", functools.cache(gguf.get_tensor_name_map)
    )
    model = family(
        name, num_hidden_layers=blocks, hidden_size=48, num_attention_heads=4
    )
    path = write_gguf(
        model,
        tmp_path / "a.gguf",
        F32,
        name[:6].lower(),
        more=lambda writer: writer.add_key_length(8),
    )
    assert (
        json.loads((gguf_checkpoint(path) / "config.json").read_text())[
            "query_pre_attn_scalar"
        ]
        == 48 / 4
    )


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


DAMAGES: dict[str, Any] = {
    "a bit of a weight": lambda place: flip(place / "model.safetensors"),
    "the config": lambda place: flip(place / "config.json"),
    "no tokenizer": lambda place: (place / "tokenizer.json").unlink(),
    "another file": lambda place: (place / "more.safetensors").touch(),
    "no list": lambda place: (place / LIST).unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_conversion_is_made_again(
    damage: str, tmp_path: Path, own_cache: Path
) -> None:
    path = write_gguf(tiny_llama(), tmp_path / "tiny.gguf", F32)
    directory = gguf_checkpoint(path)
    before = tree(directory)
    DAMAGES[damage](directory)
    assert tree(directory) != before
    assert gguf_checkpoint(path) == directory
    assert tree(directory) == before
    assert [entry.name for entry in own_cache.iterdir()] == [directory.name]


def test_a_run_in_float32_converts_to_it(tmp_path: Path, own_cache: Path) -> None:
    path = write_gguf(tiny_llama(), tmp_path / "tiny.gguf", F32)
    settings = {"method": "magnitude", "samples": 2, "seq_len": 32}
    dtypes = {"auto": torch.bfloat16, "float32": torch.float32}
    for asked, expected in dtypes.items():
        recipe = sparsellm.Recipe(**settings, dtype=asked, calibration="pydoc")
        out = sparsellm.prune(path, recipe, out=tmp_path / asked).path
        assert out is not None
        reader = CheckpointReader(out)
        assert {reader.dtype(name) for name in reader} == {expected}
    assert len(list(own_cache.iterdir())) == 2


def test_a_second_call_converts_nothing_even_from_another_place(tmp_path: Path) -> None:
    path = write_gguf(tiny_llama(), tmp_path / "tiny.gguf", F32, split="qwen2")
    (tmp_path / "tokenizer.json").write_text("{}")  # another model's
    first = gguf_checkpoint(path)
    before = (first / "config.json").stat().st_mtime_ns
    assert gguf_checkpoint(path.rename(tmp_path / "moved.gguf")) == first
    assert (first / "config.json").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    "more",
    [
        lambda writer: writer.add_tensor(
            "rope_freqs.weight", np.full(8, 2.0, np.float32)
        ),
        lambda writer: writer.add_rope_scaling_factor(4.0),
        lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.ones(64, np.float32)),
    ],
)
def test_what_transformers_would_drop_is_refused(more: Any, tmp_path: Path) -> None:
    said = (
        r"tiny\.gguf has (rope_freqs|llama\.rope|blk\.0\.attn_q\.bias).* Hugging Face"
    )
    with pytest.raises(ModelError, match=said):
        gguf_checkpoint(
            write_gguf(tiny_llama(), tmp_path / "tiny.gguf", F32, more=more)
        )


def test_a_model_larger_than_memory_or_disk_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_gguf(tiny_llama(), tmp_path / "tiny.gguf", F32)
    weights = sum(parameter.numel() for parameter in tiny_llama().parameters())
    monkeypatch.setattr("sparsellm.files.gguf.free_memory", lambda: 4 * weights - 1)
    with pytest.raises(
        MemoryBudgetError,
        match=rf"tiny\.gguf has {weights:,} weights: converting .* GB are free",
    ):
        gguf_checkpoint(tmp_path / "tiny.gguf")
    full = SimpleNamespace(free=2 * weights - 1)
    monkeypatch.setattr(
        "sparsellm.files.directory.shutil.disk_usage", lambda place: full
    )
    with pytest.raises(StorageError, match="its disk has"):
        gguf_checkpoint(tmp_path / "tiny.gguf")


def test_a_cache_that_fills_up_is_one_line(tmp_path: Path) -> None:
    full = SafetensorError(
        "Error while serializing: I/O error: No space left on device (os error 28)"
    )
    with pytest.raises(
        ModelError, match=r"No space left on device.*set SPARSELLM_CACHE"
    ):
        cached(tmp_path / "cache" / "key.safetensors", Mock(side_effect=full))


def test_digits_are_split_and_turns_end_as_in_the_file(tmp_path: Path) -> None:
    path = write_gguf(
        tiny_llama(), tmp_path / "tiny.gguf", F32, split="smollm", last="<end_of_turn>"
    )
    directory = gguf_checkpoint(path)
    assert json.loads((directory / "generation_config.json").read_text())[
        "eos_token_id"
    ] == [1, 299]
    split = AutoTokenizer.from_pretrained(directory).backend_tokenizer.pre_tokenizer
    assert [part for part, _ in split.pre_tokenize_str("in  2024")] == [
        "in",
        "ĠĠ",
        "2",
        "0",
        "2",
        "4",
    ]


def test_what_is_not_gguf_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.gguf"
    for content, said in (
        (b"PK\x03\x04 else", "it starts with b'PK"),
        (b"GGUF\x03", "cut short"),
    ):
        path.write_bytes(content)
        with pytest.raises(ModelError, match=said):
            gguf_checkpoint(path)
    for split in ("falcon", "seed-coder"):
        write_gguf(tiny_llama(), path, F32, split=split)
        with pytest.raises(
            ModelError,
            match=rf"a\.gguf splits text as {split}; .* Hugging Face checkpoint",
        ):
            gguf_checkpoint(path)
    path.unlink()
    with pytest.raises(ModelError, match=r"cannot read .*a\.gguf"):
        gguf_checkpoint(path)


@pytest.mark.parametrize("keep", [0.01, 0.7])
def test_a_cut_file_and_an_unknown_architecture_are_refused(
    tmp_path: Path, keep: float, own_cache: Path
) -> None:
    path = write_gguf(tiny_llama(), tmp_path / "cut.gguf", F32)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * keep)])
    with pytest.raises(ModelError, match=r"cut\.gguf cannot be converted"):
        gguf_checkpoint(path)
    assert list(own_cache.iterdir()) == []
    write_gguf(tiny_llama(), path, F32, arch="oddity")
    with pytest.raises(ModelError, match=r"oddity.*give a Hugging Face checkpoint"):
        gguf_checkpoint(path)


BLOCKS, TOKENS, WIDTH = (
    b"llama.block_count",
    b"tokenizer.ggml.tokens",
    b"llama.embedding_length",
)
HEADERS: dict[str, tuple[bytes, bytes, str]] = {
    "blocks beyond the tensors": (
        BLOCKS + u32(4, 3),
        BLOCKS + u32(4, 10**5),
        "block_count 100000, and has 30 tensors",
    ),
    "a block without tensors": (
        BLOCKS + u32(4, 3),
        BLOCKS + u32(4, 4),
        "no weight model.layers.3.input_layernorm",
    ),
    "no end of tokens": (
        TOKENS + u32(9, 8, 300),
        TOKENS + u32(9, 4, 2**31),
        "8589934592 bytes at",
    ),
    "unknown type": (TOKENS + u32(9), TOKENS + u32(77), "values of type 77"),
    "version": (b"GGUF" + u32(3), b"GGUF" + u32(1), "version 1"),
}


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_beyond_its_file_is_refused(
    case: str, tmp_path: Path, own_cache: Path
) -> None:
    before, after, said = HEADERS[case]
    path = write_gguf(tiny_llama(), tmp_path / "a.gguf", F32)
    data = path.read_bytes()
    assert data.count(before) == 1
    path.write_bytes(data.replace(before, after))
    with pytest.raises(ModelError, match=said):
        gguf_checkpoint(path)
    assert list(own_cache.iterdir()) == []


def test_a_killed_conversion_leaves_nothing_for_ever(
    tmp_path: Path, own_cache: Path
) -> None:
    """Of the same model and of others; what a living process has in work stays."""
    program = (
        "import sys\nfrom pathlib import Path\nfrom sparsellm.files.cache import cached\n"
        "def make(folder):\n"
        "    (folder / 'half').write_text('a checkpoint')\n"
        "    print('inside', flush=True)\n"
        "    sys.exit(sys.stdin.read())\n"
        "cached(Path(sys.argv[1]), make)\n"
    )
    own_cache.mkdir(parents=True)

    def inside(name: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-c", program, str(own_cache / name)]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        assert process.stdout is not None
        assert process.stdout.readline() == b"inside\n"
        return process

    processes = [inside(name) for name in ("same-model", "other-model", "living-model")]
    for process in processes[:2]:
        process.kill()
        process.wait()
    assert len(list(own_cache.glob("*.partial"))) == 3

    def make(folder: Path) -> Path:
        assert {
            path.name.partition(".")[0] for path in own_cache.glob("*.partial")
        } == {"same-model", "living-model"}
        (folder / "whole").write_text("a checkpoint")
        return folder / "whole"

    cached(own_cache / "same-model", make)
    processes[2].communicate(b"")
    assert [path.name for path in own_cache.iterdir()] == ["same-model"]


@pytest.mark.parametrize("planted", ["the entry", "its folder", "of another user"])
def test_what_others_can_have_planted_is_not_trusted(
    planted: str, tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tiny_llama(), tmp_path / "tiny.gguf", F32)
    umask = os.umask(0o002)  # as where users share a group
    try:
        made = gguf_checkpoint(path)
    finally:
        os.umask(umask)
    assert gguf_checkpoint(path) == made
    assert not any(
        entry.stat().st_mode & 0o022 for entry in (own_cache, made, *made.iterdir())
    )
    if planted == "of another user":
        monkeypatch.setattr(os, "geteuid", lambda: made.stat().st_uid + 1)
        monkeypatch.setattr(
            cache, "user_of_new_files", lambda folder: made.stat().st_uid + 1
        )
    else:
        (made if planted == "the entry" else own_cache).chmod(0o775)
    with pytest.raises(
        ModelError, match="is not trusted; remove it, or set SPARSELLM_CACHE"
    ):
        gguf_checkpoint(path)


def test_a_conversion_is_synced_before_named(
    tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_gguf(tiny_llama(), tmp_path / "tiny.gguf", F32)
    synced: set[int] = set()

    def checked(source: Any, target: Any) -> None:
        if Path(target).parent == own_cache:
            for entry in [Path(source), *Path(source).rglob("*")]:
                assert entry.stat().st_ino in synced, entry

    ahead_of(
        monkeypatch,
        os,
        "fsync",
        lambda descriptor: synced.add(os.fstat(descriptor).st_ino),
    )
    ahead_of(monkeypatch, os, "replace", checked)
    assert len(list(gguf_checkpoint(path).iterdir())) > 3
    assert own_cache.stat().st_ino in synced
