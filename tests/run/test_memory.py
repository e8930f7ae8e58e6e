"""Sizes as people write them, and the budget of a run: what it leaves for hidden states, by what a process holds."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import sparsellm
from sparsellm import Recipe, machine
from sparsellm.errors import MemoryBudgetError, RecipeError
from sparsellm.files.reader import CheckpointReader
from sparsellm.inputs import parse_bytes
from sparsellm.model import Chain, open_chain
from sparsellm.run import opening
from sparsellm.run.budget import (
    RESIDENT,
    STREAMED,
    Budget,
    Gauge,
    MeasuredRoom,
    choose_sweep,
    device_limit,
    host_limit,
    slowest,
    sweep_bytes,
)
from tests.models import VOCABULARY, save_tiny, tiny_llama, windows

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GiB", 4 << 30),
        ("500MB", 500_000_000),
        ("1.5 gib", 3 << 29),
        ("2tb", 2 * 10**12),
        ("7 kB", 7000),
        (12_000_000, 12_000_000),
        ("12B", 12),
    ],
)
def test_sizes(text: str | int, size: int) -> None:
    assert parse_bytes(text) == size
    assert Recipe(memory=text).memory == text


@pytest.mark.parametrize(
    "text",
    [
        "",
        "much",
        "4 gigs",
        "4G",
        "-1GiB",
        "GiB",
        "0MB",
        "1e9",
        "4GiB!",
        0,
        "8388608TiB",
    ],
)
def test_bad_sizes_are_refused_with_the_units(text: str | int) -> None:
    with pytest.raises(RecipeError, match="such as 4GiB"):
        Recipe(memory=text)


@pytest.mark.parametrize("text", ["4", 4, "999999"])
def test_a_plain_number_that_is_too_small_asks_for_its_unit(text: str | int) -> None:
    said = rf"means {int(text)} bytes; write a unit, such as {text}GiB"
    with pytest.raises(RecipeError, match=said):
        Recipe(memory=text)


def test_its_own_text_needs_a_model_in_memory(
    llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(opening, "load_whole", None)  # must not be reached
    recipe = Recipe(
        method="wanda",
        calibration="self:0.5,pydoc:0.5",
        samples=2,
        seq_len=16,
        memory="1MB",
    )
    with pytest.raises(
        MemoryBudgetError,
        match=r"its own text with all .* room for 0\.00 GB; name a text with --cal",
    ):
        sparsellm.prune(llama, recipe, out=tmp_path / "pruned")


@pytest.mark.parametrize("version", [1, 2])
def test_limits_of_outer_groups_count_and_the_page_cache_does_not(
    version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "PROC", tmp_path / "proc")
    monkeypatch.setattr(machine, "CONTROL_GROUPS", tmp_path / "groups")
    (tmp_path / "proc" / "self").mkdir(parents=True)
    line = "0::/job/step\n" if version == 2 else "9:name=x:/\n5:cpu,memory:/job/step\n"
    (tmp_path / "proc" / "self" / "cgroup").write_text(line)
    limit, usage, total = (
        ("max", "current", "")
        if version == 2
        else ("limit_in_bytes", "usage_in_bytes", "total_")
    )
    root = tmp_path / "groups" / ("" if version == 2 else "memory")
    for group, most in (("job/step", "max"), ("job", "1000")):
        (root / group).mkdir(parents=True, exist_ok=True)
        (root / group / f"memory.{limit}").write_text(f"{most}\n")
        (root / group / f"memory.{usage}").write_text("700\n")
        counts = f"anon 300\n{total}inactive_file 150\n{total}active_file 200\nactive_anon 50\n"
        (root / group / "memory.stat").write_text(counts)
    assert machine._control_group_rooms() == [1000 - 700 + 150 + 200]


@pytest.fixture
def chain(llama: Path) -> Chain:
    return open_chain(llama, device=CPU)


class Process:
    """A process that holds what a test says."""

    held = 1000
    most = 1000

    def hold(self, size: int) -> None:
        self.held = size
        self.most = max(self.most, size)

    def peak(self) -> int:
        peak = self.most
        self.most = self.held
        return peak


def test_a_room_leaves_the_peak_of_what_works_next_to_it() -> None:
    process = Process()
    room = MeasuredRoom(10_000, Gauge(lambda: process.held, process.peak))
    room.expect(3000)
    assert room.left == 9500 - 1000 - 3000
    assert room.take(4000)
    process.hold(5000 + 2500)  # a block works
    process.hold(5000)
    assert not room.take(1501)  # as long as more is expected
    room.settle()
    assert room.working == 1000 + 2500
    assert room.take(2000)
    room.give_back(6000)
    assert (room.taken, room.most_taken, room.highest) == (0, 6000, 7500)


def test_the_default_is_a_share_of_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(machine, "_control_group_rooms", lambda: [123])
    assert machine.free_memory() == 123
    monkeypatch.setattr(machine, "free_memory", lambda: 10 << 30)
    monkeypatch.setattr(machine, "held_rss", lambda: 1 << 30)
    assert host_limit(None) == 9 << 30
    assert host_limit(None, processes=2) == 5 << 30
    assert host_limit("2GiB") == 2 << 30


def test_a_card_may_be_used_as_far_as_it_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda *_: (10 << 30, 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda *_: 3 << 30)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda *_: 1 << 30)
    card = torch.device("cuda", 0)
    # What is free, and what torch keeps to use again.
    assert device_limit(card, None) == int(0.9 * (12 << 30))
    assert device_limit(card, "2GiB") == 2 << 30
    assert device_limit(card, "20GiB") == 12 << 30


def test_hidden_states_go_to_disk_beyond_the_budget_and_the_bits_stay(
    tmp_path: Path,
) -> None:
    model = save_tiny(tiny_llama(hidden_size=64), None, tmp_path / "model")
    ids = windows(4096, 128)  # 134 MB of hidden states
    recipe = Recipe(method="wanda", products="float32")
    room = machine.held_rss() + (110 << 20)
    tight = recipe.updated(memory=room)
    result = sparsellm.prune(model, tight, calibration=ids, out=tmp_path / "tight")
    assert result.memory is not None
    assert result.memory.hidden_on_disk_bytes > 0
    assert result.memory.peak_bytes <= result.memory.budget_bytes == room
    sparsellm.prune(model, recipe, calibration=ids, out=tmp_path / "free")
    first, second = (CheckpointReader(tmp_path / name) for name in ("free", "tight"))
    assert all(torch.equal(first.get(name), second.get(name)) for name in first)


def test_a_run_that_cannot_fit_ends_after_its_first_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = save_tiny(tiny_llama(), None, tmp_path / "model")
    recipe = Recipe(method="wanda", memory=1 << 40)
    measure = MeasuredRoom.settle

    def settle(room: MeasuredRoom) -> None:
        measure(room)
        room.working = (1 << 40) + 1

    monkeypatch.setattr(MeasuredRoom, "settle", settle)
    said = r"^this run took 1099\.51 GB of memory.*may take 1099\.51 GB; allow more with --memory, lower batch_tokens"
    with pytest.raises(MemoryBudgetError, match=said):
        sparsellm.prune(model, recipe, calibration=windows(4, 16), out=tmp_path / "p")
    monkeypatch.undo()
    recipe = recipe.updated(memory=1 << 20)
    with pytest.raises(MemoryBudgetError, match=r"may take 0\.00 GB"):
        sparsellm.prune(model, recipe, calibration=windows(4, 16), out=tmp_path / "q")


def test_a_sweep_is_resident_where_its_bytes_a_weight_fit(
    chain: Chain, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "held_rss", lambda: 0)
    budget = Budget(Recipe(memory="1GiB"), CPU)
    ways = ("resident", "resident, recomputing", STREAMED)
    limits = [sum(sweep_bytes(chain, RESIDENT[way], 512)) for way in ways[:2]]
    for way, limit in zip(ways, [*limits, limits[1] - 1], strict=True):
        budget.host.limit = limit
        chosen = choose_sweep(chain, budget, unrounded=False, ranks=1, step_tokens=512)
        assert chosen == way
    budget.host.limit = limits[0]
    assert (
        choose_sweep(chain, budget, unrounded=True, ranks=1, step_tokens=512)
        == STREAMED
    )
    assert slowest(["resident", STREAMED, ways[1]]) == STREAMED
    weights = sum(p.numel() for block in chain.blocks for p in block.parameters())
    assert sweep_bytes(chain, RESIDENT["resident"], 512)[0] == 20 * weights


def test_the_head_is_not_read_to_run_the_blocks(chain: Chain) -> None:
    with chain.outer(head=False):
        assert chain.model.get_input_embeddings().weight.device == CPU
        assert chain.model.get_output_embeddings().weight.is_meta
    assert chain.outer_elements() == 2 * VOCABULARY * 32 + 32
