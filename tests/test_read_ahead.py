"""The next block read in a thread: the same bytes, the usual errors, and memory that is counted."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import sparsellm
from sparsellm import Recipe
from sparsellm.chain import open_chain
from sparsellm.errors import StorageError
from sparsellm.registry import Workspace
from sparsellm.run.memory import Demand, plan_memory
from sparsellm.storage.reader import CheckpointReader
from tests.models import save_tiny, tiny_gpt2, tiny_llama, tiny_opt, tiny_tokenizer

CPU = torch.device("cpu")
RECIPE: dict[str, Any] = {"method": "sparsegpt", "sparsity": 0.6, "samples": 4, "seq_len": 24, "dtype": "float32"}


@pytest.fixture
def readers(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, bool]]:
    """Every weight that is read, and whether that was in a thread of its own."""
    seen: list[tuple[str, bool]] = []
    get = CheckpointReader.get

    def watched(self: CheckpointReader, name: str, *rest: Any) -> Tensor:
        if self.directory.name == "dense":  # the report reads one weight of the result
            seen.append((name, threading.current_thread() is not threading.main_thread()))
        return get(self, name, *rest)

    monkeypatch.setattr(CheckpointReader, "get", watched)
    return seen


@pytest.mark.parametrize("family", [tiny_llama, tiny_gpt2, tiny_opt], ids=lambda family: family.__name__)
def test_the_same_bytes_and_every_later_block_is_read_once(
    family: Any, tmp_path: Path, readers: list[tuple[str, bool]]
) -> None:
    source = save_tiny(family().to(torch.bfloat16), tiny_tokenizer(), tmp_path / "dense")
    sparsellm.prune(source, Recipe(**RECIPE), out=tmp_path / "without")
    assert not any(in_thread for _, in_thread in readers)
    readers.clear()
    sparsellm.prune(source, Recipe(**RECIPE, read_ahead=True), out=tmp_path / "with")
    chain = open_chain(source, device=CPU)
    later = {name for index in range(1, len(chain)) for name in chain.block_tensors(index)}
    assert {name for name, in_thread in readers if in_thread} == later
    for name in later:
        assert sum(each == name for each, _ in readers) == 1, name
    shards = sorted(path.name for path in (tmp_path / "with").glob("*.safetensors"))
    assert len(shards) == len(chain) + 1
    for name in shards:
        assert (tmp_path / "with" / name).read_bytes() == (tmp_path / "without" / name).read_bytes(), name


def test_an_error_in_the_thread_is_the_usual_one_and_the_run_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_tiny(tiny_llama(), tiny_tokenizer(), tmp_path / "dense")
    get = CheckpointReader.get

    def failing(self: CheckpointReader, name: str, *rest: Any) -> Tensor:
        if ".2." in name and threading.current_thread() is not threading.main_thread():
            raise StorageError("the disk has gone")
        return get(self, name, *rest)

    with monkeypatch.context() as patched:
        patched.setattr(CheckpointReader, "get", failing)
        with pytest.raises(StorageError, match="the disk has gone"):
            sparsellm.prune(source, Recipe(**RECIPE, read_ahead=True), out=tmp_path / "p")
    assert sparsellm.prune(source, Recipe(**RECIPE), out=tmp_path / "p").resumed == 2  # and without reading ahead


def test_what_was_read_ahead_for_another_block_is_not_used(tmp_path: Path) -> None:
    model = tiny_llama()
    chain = open_chain(save_tiny(model, None, tmp_path / "dense"), device=CPU)
    chain.read_ahead(2)
    with chain.block(1):
        chain.read_ahead(3)  # there is none
        for name, value in chain.block_parameters(1).items():
            assert torch.equal(value, model.get_parameter(name))
    with chain.block(2):
        for name, value in chain.block_parameters(2).items():
            assert torch.equal(value, model.get_parameter(name))


def test_its_memory_is_counted_as_it_is_stored(tmp_path: Path) -> None:
    chain = open_chain(save_tiny(tiny_llama().to(torch.bfloat16), None, tmp_path / "dense"), device=CPU)
    plans = [plan_memory(chain, Demand(4, 24, 96, Workspace(), read_ahead=ahead), None) for ahead in (False, True)]
    block = sum(source.bytes for source in chain.block_tensors(0).values())
    assert plans[1].working - plans[0].working == block == 2 * sum(p.numel() for p in chain.blocks[0].parameters())
