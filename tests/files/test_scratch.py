"""A store against the list that it stands for, in memory, on disk, and half of each."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparsellm.errors import StorageError
from sparsellm.files.scratch import Room, Scratch, TensorStore, _Pinned, _Slot, powers
from sparsellm.machine import pinned
from sparsepack.errors import Note
from tests.killing import full_disk

CPU = torch.device("cpu")
BATCH = 4 * 6  # bytes of a batch below


def bytes_on_disk(store: TensorStore) -> int:
    return sum(
        item.shape.numel() * item.dtype.itemsize
        for item in store._items
        if isinstance(item, _Slot)
    )


def batch(value: float) -> torch.Tensor:
    return torch.full((2, 3), float(value))


numbers = st.floats(-9, 9, width=32)
changes = [
    st.tuples(st.just(kind), numbers, st.integers(0, 7))
    for kind in ("set", "other shape")
]
actions = st.lists(
    st.one_of(st.tuples(st.just("append"), numbers), *changes), max_size=20
)


@settings(deadline=None, max_examples=40)
@given(actions=actions, memory=st.sampled_from([None, 0, 2 * BATCH, 5 * BATCH]))
def test_a_store_is_a_list(actions: list[Any], memory: int | None) -> None:
    expected: list[torch.Tensor] = []
    with Scratch(Room(memory)).store() as store:
        for kind, value, *place in actions:
            if kind == "append":
                store.append(batch(value))
                expected.append(batch(value))
            elif expected:
                index = place[0] % len(expected)
                new = (
                    batch(value)
                    if kind == "set"
                    else torch.full((place[0],), value, dtype=torch.bfloat16)
                )
                store[index] = new
                expected[index] = new
        assert len(store) == len(expected)
        for tensor, right in zip(store, expected, strict=True):
            assert tensor.dtype == right.dtype
            assert torch.equal(tensor, right)
        if memory is not None:
            assert (
                sum(tensor.nbytes for tensor in expected) - bytes_on_disk(store)
                <= memory
            )


def test_stores_share_one_budget_and_give_it_back() -> None:
    scratch = Scratch(Room(3 * BATCH))
    first, second = scratch.store(), scratch.store()
    for value in range(2):
        first.append(batch(value))
        second.append(batch(value))
    assert (bytes_on_disk(first), bytes_on_disk(second)) == (0, BATCH)
    first.close()
    assert len(first) == 0
    third = scratch.store()
    for value in range(2):
        third.append(batch(value))
    assert bytes_on_disk(third) == 0


def test_advancing_in_place_writes_no_new_room(tmp_path: Path) -> None:
    store = Scratch(Room(0), tmp_path).store()
    for value in range(3):
        store.append(batch(value))
    for step in range(5):
        for index in range(3):
            store[index] = batch(10 * step + index)
    assert store._end == 3 * BATCH
    assert [float(tensor[0, 0]) for tensor in store] == [40, 41, 42]


def test_an_item_is_no_alias_and_keeps_nothing_else(tmp_path: Path) -> None:
    for memory in (None, 0):
        store = Scratch(Room(memory), tmp_path).store()
        store.append((torch.ones(1000, requires_grad=True) * 2)[:2])
        assert not store[0].requires_grad
        assert store[0].untyped_storage().nbytes() == 8
    store[0].add_(1)
    assert torch.equal(store[0], torch.full((2,), 2.0))  # on disk
    assert bytes_on_disk(store) == 8
    # files have no name: nothing to remove, however the process ends
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    store: TensorStore = Scratch(Room(0), tmp_path).store()
    with full_disk(1), pytest.raises(StorageError, match="full; make room"):
        store.append(batch(1))


class Queue:
    """A stream whose copies run when an event behind them is waited for, and no sooner."""

    def __init__(self) -> None:
        self.copies: list[Callable[[], object]] = []

    def wait_stream(self, _: Queue) -> None:
        """Nothing is pending on the stream of the computation, which runs at once."""

    def record_event(self) -> list[Callable[[], object]]:
        return list(self.copies)

    def wait_event(self, before: list[Callable[[], object]]) -> None:
        for copy in before:
            copy()


def test_what_is_read_from_pinned_memory_has_arrived(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    queue, empty, copy, copying = Queue(), torch.empty, torch.Tensor.copy_, []

    @contextmanager
    def inside(_: Queue) -> Iterator[None]:
        copying.append(True)
        yield
        copying.pop()

    def later(
        target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False
    ) -> None:
        assert copying
        assert non_blocking
        queue.copies.append(partial(copy, target, source))

    monkeypatch.setattr(torch.cuda, "stream", inside)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: queue)
    monkeypatch.setattr(
        torch, "empty", lambda *size, **kind: empty(*size, **kind).zero_()
    )
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda *_: None)
    monkeypatch.setattr(torch.Tensor, "copy_", later)
    first, second = (torch.randn(1, 700_001)[:, 1:].bfloat16() for _ in range(2))
    assert powers(1_400_000) == [1 << 20, 1_400_000 - (1 << 20)]
    parts = [empty(size, dtype=torch.uint8) for size in powers(1_400_000)]
    kept = _Pinned(first.T, parts, queue)  # type: ignore[arg-type]
    assert torch.equal(kept.read(CPU), first.T)
    kept.expect(CPU)
    kept.write(second)
    assert torch.equal(kept.read(CPU), second)
    assert torch.equal(kept.read(CPU), second)


def test_memory_that_cannot_be_pinned_is_said() -> None:
    if torch.cuda.is_available():
        pytest.skip("it can be here")
    with pytest.warns(
        Note, match="memory cannot be pinned, so copies wait for the GPU"
    ):
        assert pinned(1) is None
