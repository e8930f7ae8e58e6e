"""The walk over the chain: capture, solve, run again, write, next. No method and no model family is named here."""

from __future__ import annotations

from collections.abc import Callable
from fnmatch import fnmatch
from typing import Any

from torch import Tensor

from sparsellm.chain import Chain, LinearView
from sparsellm.methods import BlockTask, LinearResult
from sparsellm.methods.base import Method
from sparsellm.patterns import Pattern
from sparsellm.progress import PhaseClock, Progress, ProgressCallback
from sparsellm.streams import Stream


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
    write_block: Callable[[int, dict[str, Tensor]], None] | None,
    clock: PhaseClock,
    progress: ProgressCallback,
    name: str,
) -> list[LinearResult]:
    """Prunes the chain block by block; each is captured and solved on what the pruned blocks before it produce.

    Args:
        chain: the model.
        windows: calibration token ids, ``(samples, seq)``.
        method: what is done to each block, with its ``options``.
        patterns: the pattern of every linear to prune, by name.
        batch_tokens: tokens in one forward call.
        write_block: is given each finished block's tensors under their checkpoint names, or None to keep the model
            in memory only.
        clock: counts the seconds of each phase.
        progress: is told block, step and the last error.
        name: the method's name, for the progress.
    """
    results: list[LinearResult] = []
    detail = ""

    def report(step: str) -> None:
        progress(Progress("prune", index, len(chain), f"block {index + 1}/{len(chain)} {name} {step}{detail}"))

    index = 0
    with clock.phase("embed"):
        chain.load_outer()
        chain.load_block(0)
        stream = Stream(chain, windows, batch_tokens=batch_tokens)
        chain.release_outer()
    for index in range(len(chain)):
        report("reading")
        with clock.phase("read"):
            chain.load_block(index)
        with clock.phase("prune"):
            linears = [linear for linear in chain.linears(index) if linear.name in patterns]
            task = BlockTask(index, linears, patterns, stream, report, clock)
            if linears:
                method(task, **options)
            results += task.finish()
        errors = [result.error for result in task.results]
        detail = f" · error {sum(errors) / len(errors):.3f}" if errors else ""
        if index + 1 < len(chain):  # nobody reads what leaves the last block
            report("forward")
            with clock.phase("forward"):
                stream.advance(index)
        if write_block is not None:
            report("writing")
            with clock.phase("write"):
                write_block(index, chain.block_tensors(index))
        chain.release_block(index)
        progress(Progress("prune", index + 1, len(chain), f"block {index + 1}/{len(chain)} {name}{detail}"))
    return results
