"""How much memory a run may take, and how much it will take: said before it starts."""

from __future__ import annotations

import contextlib
import ctypes
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from sparsellm.chain import Chain
from sparsellm.errors import MemoryBudgetError
from sparsellm.refine.gradients import kept_bytes
from sparsellm.refine.head import DIVERGENCE_COPIES, HEAD_TOKENS, NEXT_TOKEN_COPIES
from sparsellm.registry import Workspace
from sparsellm.sizes import parse_bytes
from sparsellm.statistics.gram import CHUNK_ELEMENTS, REMEMBERED_BYTES, accumulator_bytes

DEFAULT_SHARE = 0.8  # of the memory that is free now: the rest is for the page cache and for others
SLACK = 0.05  # of the budget, which hidden states leave free: a prediction is not exact
LIBRARIES = 128 << 20  # what torch, its kernels and the allocator take beside what is counted here


def free_memory() -> int:
    """Bytes that this process can still get: what the machine has free, or what its control group leaves it."""
    return min([psutil.virtual_memory().available, *_control_group_rooms()])


def give_back_freed() -> None:
    """Gives what the C heap has free back to the system, where the C library can: tokenising a text leaves a hundred
    times its size in holes that nothing else fits into."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # glibc alone has the function
        ctypes.CDLL(None).malloc_trim(0)


def _control_group_rooms() -> list[int]:
    """What containers may take, by the files of cgroup version 2 and 1; empty where there is no limit."""
    rooms = []
    for folder, limit, usage in (
        ("/sys/fs/cgroup", "memory.max", "memory.current"),
        ("/sys/fs/cgroup/memory", "memory.limit_in_bytes", "memory.usage_in_bytes"),
    ):
        try:
            most, used = int((Path(folder) / limit).read_text()), int((Path(folder) / usage).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        rooms.append(max(0, most - used))
    return rooms


@dataclass(frozen=True)
class MemoryPlan:
    """Bytes of resident memory, as predicted.

    Attributes:
        budget: the most that the process may hold.
        start: what it holds before the run, Python and libraries included.
        working: what the worst moment adds: a block, statistics, the solver's workspace, activations.
        worst: which moment that is.
        hidden_in_memory: hidden states of the calibration windows, and what a sweep keeps of the weights, that stay in
            memory.
        hidden_on_disk: those that are read from files, batch by batch, when they are most: in the walk, or
            when gradients are taken before it, for which every block's are kept.
        device: what the worst moment takes on an accelerator, in its own memory; 0 on the CPU.
    """

    budget: int
    start: int
    working: int
    worst: str
    hidden_in_memory: int
    hidden_on_disk: int
    device: int = 0

    @property
    def peak(self) -> int:
        """Predicted peak of resident memory."""
        return self.start + self.working + self.hidden_in_memory

    def __str__(self) -> str:
        hidden = f"hidden states and swept weights {self.hidden_in_memory / 1e9:.2f} GB in memory"
        if self.hidden_on_disk:
            hidden += f", {self.hidden_on_disk / 1e9:.2f} GB on disk"
        device = f", {self.device / 1e9:.2f} GB on the device" if self.device else ""
        return (
            f"predicted peak memory {self.peak / 1e9:.2f} GB of {self.budget / 1e9:.2f} GB{device} "
            f"({self.start / 1e9:.2f} before the start, {self.working / 1e9:.2f} for {self.worst}; {hidden})"
        )

    def to_dict(self) -> dict[str, Any]:
        return {
            "budget_bytes": self.budget,
            "predicted_peak_rss_bytes": self.peak,
            "start_bytes": self.start,
            "working_bytes": self.working,
            "worst": self.worst,
            "hidden_in_memory_bytes": self.hidden_in_memory,
            "hidden_on_disk_bytes": self.hidden_on_disk,
            "predicted_peak_device_bytes": self.device,
        }


def plan_memory(
    chain: Chain,
    samples: int,
    seq_len: int,
    batch_tokens: int,
    workspace: Workspace,
    budget: str | int | None,
    swept_copies: int = 0,
    sharers: int = 1,
    read_ahead: bool = False,
    gradient_tokens: int = 0,
) -> MemoryPlan:
    """Predicts the peak, and shares the budget: first what the work needs, then hidden states, the rest to disk.

    Args:
        chain: the model, nothing loaded.
        samples: calibration windows.
        seq_len: tokens in each.
        batch_tokens: tokens in one forward call.
        workspace: of the method.
        swept_copies: fp32 copies of all blocks that a sweep keeps; like hidden states, on disk where memory is short.
        budget: the most that the process may hold; None for a share of what the machine has free, beside what the
            process holds already.
        sharers: processes that share what the machine has free.
        read_ahead: whether the next block, as it is stored, is in memory beside the one in work.
        gradient_tokens: calibration tokens that a sweep of the dense model's gradient takes before the walk.

    Raises:
        MemoryBudgetError: the run needs more than the budget.
        RecipeError: the budget is no number of bytes.
    """
    start = psutil.Process().memory_info().rss
    most = int(start + DEFAULT_SHARE * free_memory() / sharers) if budget is None else parse_bytes(budget)
    width = chain.config.get_text_config().hidden_size
    hidden = (1 + workspace.streams) * samples * seq_len * width * chain.dtype.itemsize
    if swept_copies:
        sizes = (source.shape for index in range(len(chain)) for source in chain.block_tensors(index).values())
        hidden += swept_copies * 4 * sum(math.prod(shape) for shape in sizes)
    moments = working_bytes(chain, samples, seq_len, batch_tokens, workspace)
    if gradient_tokens:
        moments["gradients"] = head_bytes(chain, NEXT_TOKEN_COPIES)
    if swept_copies:
        moments["sweeps"] = head_bytes(chain, DIVERGENCE_COPIES)
    worst = max(moments, key=lambda name: moments[name])
    on_device = moments[worst] if chain.device.type != "cpu" else 0
    working = LIBRARIES + (_largest_tensor(chain) if on_device else moments[worst])
    if read_ahead:
        blocks = (chain.block_tensors(index).values() for index in range(len(chain)))
        working += max(sum(source.bytes for source in sources) for sources in blocks)
    room = int(most * (1 - SLACK)) - start - working
    if start + working > most:
        raise MemoryBudgetError(
            f"this run needs {(start + working) / 1e9:.2f} GB ({start / 1e9:.2f} before the start, {working / 1e9:.2f} "
            f"for {worst}) and may take {most / 1e9:.2f} GB; allow more with --memory, lower batch_tokens (now "
            f"{batch_tokens}), or take a method that needs less"
        )
    in_memory = min(hidden, max(0, room))
    # Gradients are over when the walk begins: they get no more memory than it will need, so the peak is the walk's.
    on_disk = max(hidden, kept_bytes(chain, gradient_tokens)) - in_memory
    return MemoryPlan(most, start, working, worst, in_memory, on_disk, on_device)


def working_bytes(chain: Chain, samples: int, seq_len: int, batch_tokens: int, workspace: Workspace) -> dict[str, int]:
    """Bytes that each moment of a run holds at its worst, in the block where that is most."""
    computing = chain.dtype.itemsize
    tokens = min(samples, max(1, batch_tokens // seq_len)) * seq_len
    width = chain.config.get_text_config().hidden_size
    converted = 2 * 4 * CHUNK_ELEMENTS  # tokens in fp32, on their way into a Gram matrix
    moments = {"checking": _largest_tensor(chain), "embedding": 0, "statistics": 0, "solving": 0}
    for index in range(len(chain)):
        linears = chain.linears(index)
        elements = sum(math.prod(source.shape) for source in chain.block_tensors(index).values())
        loaded = computing * elements if chain.weights is not None else 0
        widest = max((linear.out_features for linear in linears), default=width)
        # A feed-forward unit holds gate, up, product and one more at once; attention and norms, copies of their inputs.
        activations = tokens * (4 * widest + 8 * width) * computing
        # One for each linear: which of them share an input is only known when the block runs.
        squares = [4 * linear.in_features**2 for linear in linears]
        sums = sum(accumulator_bytes(linear.in_features) for linear in linears)
        grams = sums + max(squares, default=0) if workspace.grams else 0
        moments["statistics"] = max(moments["statistics"], loaded + activations + grams + converted)
        optimised = int(workspace.blocks * 4 * elements)
        for position, linear in enumerate(linears):
            solved = int(workspace.weights * 4 * linear.in_features * linear.out_features)
            square = squares[position]
            remembered = min(workspace.remembered * square, max(REMEMBERED_BYTES, square))
            held = int(workspace.grams * square) + remembered + sum(squares[position + 1 :]) if workspace.grams else 0
            moments["solving"] = max(moments["solving"], loaded + max(solved + held, optimised + activations))
        if index == 0:
            outer = computing * chain.outer_elements(head=False) if chain.weights is not None else 0
            moments["embedding"] = outer + loaded + activations
    return moments


def head_bytes(chain: Chain, copies: int) -> int:
    """Of what is outside the blocks, and of so many copies of a chunk of logits in fp32."""
    outer = chain.dtype.itemsize * chain.outer_elements() if chain.weights is not None else 0
    return outer + copies * 4 * HEAD_TOKENS * int(chain.config.get_text_config().vocab_size)


def _largest_tensor(chain: Chain) -> int:
    return max(source.bytes for source in [*chain.outer_tensors().values(), *chain.block_tensors(0).values()])
