"""The memory that a run may take, by what its process holds. Every rule about memory in a run is in this file.

Nothing is predicted: hidden states stay in memory while the budget has room for them next to the most that the process
has held besides, and go to files from then on. The first block shows how much that is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from sparsellm import machine, parallel
from sparsellm.errors import MemoryBudgetError
from sparsellm.files.scratch import Room, Scratch
from sparsellm.inputs import parse_bytes
from sparsellm.method.sweep.head import HEAD_TOKENS
from sparsellm.method.sweep.sweep_task import Residence
from sparsellm.method.sweep.whole_model import STEP_TOKENS
from sparsellm.model import Chain
from sparsellm.model.experts import ExpertLinear
from sparsellm.recipe import Recipe
from sparsellm.records import Memory

# share of the free memory; the rest is for the page cache and other processes
HOST_SHARE = 0.8
DEVICE_SHARE = 0.9  # share of the free memory of a GPU; the rest is for libraries, and for holes between tensors
SLACK = 0.05  # hidden states leave this part of the budget free, since the next block may take a little more
BLOCK_COPIES = 8  # fp32 copies of the largest block that the first one is expected to take, until it has shown it

STREAMED = "streamed"
RESIDENT = {  # the ways to hold all blocks in a sweep, the fastest first
    "resident": Residence(),
    "resident, recomputing": Residence(recomputes=True),
}
# bytes a weight: fp32 parameter, its gradient, two moments, the best state so far
STATE_BYTES = 5 * 4
STREAMED_COPIES = 6  # fp32 copies of the largest block in a step of a streamed sweep
NARROW_BYTES = 2  # bytes a weight of the copy that blocks multiply with in bf16
# Activations of a block that its gradients read, for a token: as wide as the hidden state, and as the widest output.
KEPT_WIDTHS = 10
KEPT_OUTPUTS = 4
KEPT_SCORES = 4  # matrices of attention's scores, which a GPU computes as plain products where gradients follow
LOGIT_COPIES = 4  # fp32 copies of the logits of a chunk of tokens in a loss


@dataclass(frozen=True)
class Gauge:
    """What shows how many bytes are held, in the memory of the process or of a GPU."""

    held: Callable[[], int]
    peak: Callable[[], int]  # the most since it was last called


PROCESS = Gauge(machine.held_rss, machine.recent_peak_rss)


def gauge_of(device: torch.device) -> Gauge:
    """The gauge of a CUDA device."""

    def peak() -> int:
        most = torch.cuda.max_memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        return most

    return Gauge(lambda: torch.cuda.memory_allocated(device), peak)


class MeasuredRoom(Room):
    """The bytes of ``limit`` that are left next to the most that the gauge has shown besides what users reserved.

    Attributes:
        limit: the most bytes that may be held.
        working: the most that was held at any time since ``expect``, without what users had reserved then.
        most_taken: the most that users had reserved at any time.
    """

    def __init__(self, limit: int, gauge: Gauge) -> None:
        super().__init__()
        self.limit = limit
        self._gauge = gauge
        self.taken = 0
        self.most_taken = 0
        self.highest = 0
        self.working = 0
        self._expected = 0
        self.expect(0)

    @property
    def left(self) -> int:
        """The bytes that users may still reserve."""
        most = int(self.limit * (1 - SLACK))
        return most - max(self.working, self._expected) - self.taken

    def take(self, size: int) -> bool:
        self.measure()
        if size > self.left:
            return False
        self.taken += size
        self.most_taken = max(self.most_taken, self.taken)
        return True

    def give_back(self, size: int) -> None:
        self.measure()
        self.taken -= size

    def measure(self) -> None:
        """Notes the peak since the last call: in between, users reserved nothing and gave nothing back."""
        peak = self._gauge.peak()
        self.highest = max(self.highest, peak)
        self.working = max(self.working, peak - self.taken)

    def expect(self, size: int) -> None:
        """Begins a step of the run that is expected to take ``size`` bytes more than what is held now."""
        self.highest = max(self.highest, self._gauge.peak())
        self.working = self._gauge.held() - self.taken
        self._expected = self.working + size

    def settle(self) -> None:
        """Ends the expectation: what the step has taken is measured now."""
        self.measure()
        self._expected = 0


class Budget:
    """What the process and its GPU may hold in a run, and hold.

    Args:
        recipe: ``memory`` and ``device_memory`` are the limits; without them, a share of what is free now is added to
            what is held, divided among the processes of this machine.
        device: where blocks run.
    """

    def __init__(self, recipe: Recipe, device: torch.device) -> None:
        self._batch_tokens = recipe.batch_tokens
        self._device = device
        limit = host_limit(recipe.memory, parallel.on_this_machine())
        self.host = MeasuredRoom(limit, PROCESS)
        self.card: MeasuredRoom | None = None
        if device.type == "cuda":
            limit = device_limit(device, recipe.device_memory)
            self.card = MeasuredRoom(limit, gauge_of(device))

    @property
    def running(self) -> MeasuredRoom:
        """The memory in which blocks run."""
        return self.host if self.card is None else self.card

    def scratch(self, folder: Path | None) -> Scratch:
        """Storage for hidden states, with files in a folder."""
        return Scratch(self.host, folder, self.card)

    def expect_block(self, chain: Chain) -> None:
        """Leaves room for the first block of a pass, whose statistics and solver are not measured yet. Raises
        MemoryBudgetError if the process holds more than the budget already."""
        largest = max(elements_of(chain, index) for index in range(len(chain)))
        self.running.expect(4 * BLOCK_COPIES * largest)
        parallel.together(self._check)

    def expect_sweep(self, chain: Chain, sweep: str) -> None:
        """Leaves room for what the sweep holds next to its stores."""
        way = RESIDENT.get(sweep)
        if way is None:
            largest = max(elements_of(chain, index) for index in range(len(chain)))
            self.running.expect(4 * STREAMED_COPIES * largest + logit_bytes(chain))
            return
        state, activations = sweep_bytes(chain, way, STEP_TOKENS)
        self.running.expect(state // parallel.size() + activations)

    def check_block(self) -> None:
        """Goes by what a block has taken. Raises MemoryBudgetError if that is more than the budget, wherever the hidden
        states are."""
        for room in self._rooms:
            room.settle()
        parallel.together(self._check)

    @property
    def _rooms(self) -> list[MeasuredRoom]:
        return [self.host] if self.card is None else [self.host, self.card]

    def _check(self) -> None:
        for room in self._rooms:
            if room.working <= room.limit:
                continue
            where = "of memory"
            option = "--memory"
            if room is self.card:
                name = machine.machine_name(self._device)
                where = f"on {name}"
                option = "--set device_memory=…"
            raise MemoryBudgetError(
                f"this run took {_gb(room.working)} {where}, hidden states aside, and may take {_gb(room.limit)}; "
                f"allow more with {option}, lower batch_tokens (now {self._batch_tokens}), or take a method that needs "
                "less"
            )

    def check_writing(self, chain: Chain) -> None:
        """Raises MemoryBudgetError if the budget has no room for all weights of a model that writes its own text."""
        weights = sum(elements_of(chain, index) for index in range(len(chain)))
        needed = chain.dtype.itemsize * (weights + chain.outer_elements())
        room = self.host.limit - machine.held_rss()
        if self.card is not None:
            room = min(room, self.card.limit)
        if needed > room:
            raise MemoryBudgetError(
                f"a model writes its own text with all of its weights in memory: {_gb(needed)}, and there is room for "
                f"{_gb(max(0, room))}; name a text with --calibration, or allow more (--memory, --set device_memory=…)"
            )

    def check_measuring(self, chain: Chain) -> None:
        """Raises MemoryBudgetError if the budget has no room for embedding, head and the logits of some tokens."""
        outer = chain.dtype.itemsize * chain.outer_elements()
        needed = outer + logit_bytes(chain)
        held = machine.held_rss() if self.card is None else 0
        room = self.running.limit - held
        if needed > room:
            raise MemoryBudgetError(
                f"embedding, head and logits take {_gb(needed)} of memory, and there is room for {_gb(max(0, room))}"
            )

    def measured(self, scratch: Scratch, sweep: str) -> Memory:
        """The record of what this process has held."""
        self.host.measure()
        card = self.card
        if card is not None:
            card.measure()
        return Memory(
            budget_bytes=self.host.limit,
            peak_bytes=self.host.highest,
            hidden_in_memory_bytes=self.host.most_taken,
            hidden_on_disk_bytes=scratch.on_disk,
            device_budget_bytes=0 if card is None else card.limit,
            device_peak_bytes=0 if card is None else card.highest,
            hidden_on_device_bytes=0 if card is None else card.most_taken,
            sweep=sweep,
        )


def host_limit(asked: str | int | None, processes: int = 1) -> int:
    """The bytes that this process may hold: those asked for, or a share of the free memory on top of what it holds."""
    if asked is not None:
        return parse_bytes(asked)
    free = HOST_SHARE / processes * machine.free_memory()
    return int(machine.held_rss() + free)


def device_limit(device: torch.device, asked: str | int | None) -> int:
    """The bytes that a run may hold on a CUDA device: those asked for, at most what is free, or a share of that."""
    reserved = torch.cuda.memory_reserved(device)
    reusable = reserved - torch.cuda.memory_allocated(device)
    free = torch.cuda.mem_get_info(device)[0] + reusable
    if asked is None:
        return int(DEVICE_SHARE * free)
    return min(parse_bytes(asked), free)


def elements_of(chain: Chain, index: int) -> int:
    """The elements of a block."""
    sources = chain.block_tensors(index).values()
    return sum(math.prod(source.shape) for source in sources)


def choose_sweep(
    chain: Chain, budget: Budget, *, unrounded: bool, ranks: int, step_tokens: int
) -> str:
    """How the sweep holds the blocks: the first way of ``RESIDENT`` for which the budget has room, else streamed.

    Args:
        unrounded: whether the sweep trains values that are rounded when a block runs.
        ranks: processes that divide the weights.
        step_tokens: the most tokens of a step in this process.

    Only a streamed sweep takes experts, rounded values and, in several processes, models with a parameter that is a
    single number or is shared, which processes do not divide by rows."""
    room = budget.host.limit - machine.held_rss()
    if budget.card is not None:
        room = budget.card.left
    for name in (
        RESIDENT if can_be_resident(chain, unrounded=unrounded, ranks=ranks) else ()
    ):
        state, activations = sweep_bytes(chain, RESIDENT[name], step_tokens)
        if state // ranks + activations <= room:
            return name
    return STREAMED


def can_be_resident(chain: Chain, *, unrounded: bool, ranks: int) -> bool:
    """Whether all blocks can be in memory at once in a sweep, given enough of it."""
    mixtures = any(
        isinstance(linear.module, ExpertLinear)
        for index in range(len(chain))
        for linear in chain.linears(index)
    )
    if unrounded or mixtures or chain.device.type not in ("cpu", "cuda"):
        return False
    return ranks == 1 or divisible(chain)


def divisible(chain: Chain) -> bool:
    """Whether every parameter of the blocks has rows and belongs to one block."""
    return all(
        all(chain.owns(name) for name in chain.names_of(index))
        and all(source.shape for source in chain.block_tensors(index).values())
        for index in range(len(chain))
    )


def sweep_bytes(chain: Chain, way: Residence, step_tokens: int) -> tuple[int, int]:
    """Bytes of a resident sweep that stay from step to step, and those that a step takes where blocks run."""
    text = chain.config.get_text_config()
    weights = sum(elements_of(chain, index) for index in range(len(chain)))
    copies = NARROW_BYTES * weights if chain.products is not None else 0
    widest = max(linear.out_features for linear in chain.linears(0))
    blocks = 1 if way.recomputes else len(chain)
    of_token = KEPT_WIDTHS * text.hidden_size + KEPT_OUTPUTS * widest
    if chain.device.type == "cuda":
        of_token += KEPT_SCORES * text.num_attention_heads * step_tokens
    kept = 4 * step_tokens * of_token * blocks
    inputs = 4 * step_tokens * text.hidden_size * len(chain)
    outer = chain.dtype.itemsize * chain.outer_elements()
    working = copies + kept + inputs + logit_bytes(chain) + outer
    return STATE_BYTES * weights, working


def logit_bytes(chain: Chain) -> int:
    """Bytes of the logits of a chunk of tokens in a loss."""
    vocabulary = chain.config.get_text_config().vocab_size
    return 4 * LOGIT_COPIES * HEAD_TOKENS * int(vocabulary)


def slowest(ways: Sequence[str]) -> str:
    """The slowest of the ways to hold the blocks that processes have room for, which all take then."""
    return max(ways, key=[*RESIDENT, STREAMED].index)


def residence(chain: Chain, sweep: str, ranks: int) -> Residence | None:
    """The resident sweep of this name; None for a streamed one or none."""
    way = RESIDENT.get(sweep)
    if way is None:
        return None
    narrow = chain.device.type == "cuda" and chain.dtype is torch.bfloat16
    return replace(way, sharded=ranks > 1, narrow=narrow)


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB"
