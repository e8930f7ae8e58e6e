"""The walk over the chain: capture, solve, run again, write, next. No method and no model family is named here."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor

from sparsellm.chain import Chain, LinearView
from sparsellm.methods import BlockTask, LinearResult
from sparsellm.methods.base import Method
from sparsellm.patterns import Pattern
from sparsellm.progress import PhaseClock, Progress, ProgressCallback
from sparsellm.storage.reader import CheckpointReader
from sparsellm.storage.scratch import Scratch
from sparsellm.storage.shard import TensorSource
from sparsellm.streams import Stream


@dataclass(frozen=True)
class FinishedBlock:
    """A block that an earlier process pruned: its weights, and what became of its linears."""

    weights: CheckpointReader
    results: list[LinearResult]


@dataclass(frozen=True)
class WalkResult:
    """What became of each linear, and the dense stream behind the last block if there was one."""

    linears: list[LinearResult]
    dense: Stream | None


WriteBlock = Callable[[int, dict[str, TensorSource], list[LinearResult]], None]
"""``write(index, tensors, results)`` puts a finished block on disk, its tensors under their checkpoint names."""


def selected_linears(chain: Chain, index: int, exclude: list[str]) -> list[LinearView]:
    """The linears of block ``index`` that are to be pruned."""
    return [linear for linear in chain.linears(index) if not any(fnmatch(linear.name, pattern) for pattern in exclude)]


def walk(
    chain: Chain,
    windows: Tensor,
    method: Method,
    options: dict[str, Any],
    patterns: dict[str, Pattern],
    *,
    batch_tokens: int,
    write_block: WriteBlock | None,
    clock: PhaseClock,
    progress: ProgressCallback,
    name: str,
    seed: int,
    scratch: Scratch | None = None,
    finished: Sequence[FinishedBlock] = (),
    dense_stream: bool = False,
    output_costs: Mapping[str, Tensor] | None = None,
    read_ahead: bool = False,
) -> WalkResult:
    """Prunes the chain block by block; each is captured and solved on what the pruned blocks before it produce.

    Args:
        chain: the model.
        windows: calibration token ids, ``(samples, seq)``.
        method: what is done to each block, with its ``options``.
        patterns: the pattern of every linear to prune, by name.
        batch_tokens: tokens in one forward call.
        write_block: is given each block when it is done, or None to keep the model in memory only.
        clock: counts the seconds of each phase.
        progress: is told block, step and the last error.
        name: the method's name, for the progress.
        seed: of what methods draw at random, anew for each block, so that a run that goes on draws the same.
        scratch: where hidden states are kept; None for memory.
        finished: the first blocks, if an earlier process pruned them: they are only run.
        dense_stream: run the dense model beside the pruned one, from its own hidden states.
        output_costs: what an error of each linear's outputs costs, for methods that ask for it.
        read_ahead: read each block in a thread while the one before it is in work.
    """
    results = [result for block in finished for result in block.results]
    if len(finished) == len(chain) and not dense_stream:
        return WalkResult(results, None)
    detail = ""

    def report(step: str) -> None:
        progress(Progress("prune", index, len(chain), f"block {index + 1}/{len(chain)} {name} {step}{detail}"))

    index = 0
    with clock.phase("embed"):
        chain.load_outer(head=False)
        chain.load_block(0)
        stream = Stream(chain, windows, batch_tokens=batch_tokens, scratch=scratch)
        dense = stream.fork() if dense_stream else None
        chain.release_outer()
    for index in range(len(chain)):
        if index < len(finished):
            report("is finished; forward")
            with clock.phase("replay"):
                if dense is not None:
                    replay(dense, index, None)
                replay(stream, index, finished[index].weights)
            continue
        torch.manual_seed(block_seed(seed, index))
        report("reading")
        with clock.phase("read"):
            chain.load_block(index)
            if read_ahead:
                chain.read_ahead(index + 1)
        with clock.phase("prune"):
            linears = [linear for linear in chain.linears(index) if linear.name in patterns]
            task = BlockTask(index, linears, patterns, stream, report, clock, output_costs=output_costs or {})
            if dense is not None:
                report("dense forward")
                with clock.phase("prune/dense"):
                    dense.advance(index)  # while the block is dense
            if linears:
                method(task, **options)
            chain.settle_block(index)
            pruned = task.finish()
        results += pruned
        errors = [result.error for result in task.results]
        detail = f" · error {sum(errors) / len(errors):.3f}" if errors else ""
        if index + 1 < len(chain):  # nobody reads what leaves the last block
            report("forward")
            with clock.phase("forward"):
                stream.advance(index)
        if write_block is not None:
            report("writing")
            with clock.phase("write"):
                write_block(index, chain.block_tensors(index), pruned)
        chain.release_block(index)
        progress(Progress("prune", index + 1, len(chain), f"block {index + 1}/{len(chain)} {name}{detail}"))
    stream.close()
    return WalkResult(results, dense)


def replay(stream: Stream, index: int, weights: CheckpointReader | None) -> None:
    """Runs one stream through a block that was pruned before.

    A stream of the dense model, where a method has one, is replayed by a call of its own.

    Args:
        stream: what enters the block; afterwards, what leaves it.
        index: which block.
        weights: where the pruned block stands; None for the dense one.
    """
    stream.chain.load_block(index, weights)
    stream.advance(index)
    stream.chain.release_block(index)


def block_seed(seed: int, index: int) -> int:
    """A seed for each block that depends on nothing that happened before it."""
    return (seed * 1_000_003 + index) % (1 << 63)
