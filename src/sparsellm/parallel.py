"""One run in several processes: how they divide the work, and how they come to agree again.

``torchrun --nproc-per-node N -m sparsellm prune ...`` starts N processes that all walk the same chain. Each holds a
share of the calibration windows; moments are added up; each solves a share of the rows of a weight, and all get the
whole. So the same block is in every process when the next one is read.

Every helper here does nothing in a single process, so code that calls them reads the same either way. Those that speak
to the other processes must be called by all of them, in the same order. They carry tensors by gloo or NCCL, whichever
serves the tensor's device, and small Python values by gloo.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sparsellm.errors import ProcessError, RecipeError, SparseLLMError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# A process that dies is noticed at once; this is for one that hangs, and longer than any may wait for another: while
# the main process writes the calibration text, or computes an allocation, alone.
TIMEOUT = timedelta(hours=12)
LAST_WORDS = 10.0  # seconds; the others find out at once, but on a busy machine they take a while to end
CHUNK_ELEMENTS = 1 << 24  # converted to fp64 at a time: 128 MiB

T = TypeVar("T")

_alone = False  # see main_alone()
_failures: Store | None = None  # where processes that fail leave word; see claims_failure()


# ---------------------------------------------------------------------- who is here


def size() -> int:
    """The processes of this run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() and not _alone else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if size() > 1 else 0


def is_main() -> bool:
    """Whether this is the process that writes and reports."""
    return rank() == 0


def on_this_machine() -> int:
    """How many of them share the machine of this one, and so its memory."""
    names = gather(socket.gethostname())
    return names.count(names[rank()])


def launched() -> int:
    """The processes that torchrun started, whether or not they have joined; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1")) if dist.is_available() and dist.is_torchelastic_launched() else 1


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Joins the processes that torchrun started. Nothing happens without it, or if they have joined already.

    After an error the group is left as it is: to take leave of it takes all processes, and the others may be gone.

    Raises:
        ProcessError: the others cannot be reached.
    """
    global _failures
    if launched() == 1 or size() > 1:
        yield
        return
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
    store, this, of = _reached(next, rendezvous("env://", timeout=TIMEOUT))
    _reached(
        dist.init_process_group,
        backend,
        store=PrefixStore("sparsellm", store),
        rank=this,
        world_size=of,
        timeout=TIMEOUT,
    )
    _failures = PrefixStore("sparsellm-failures", store)
    yield
    barrier()
    dist.destroy_process_group()
    _failures = None


def claims_failure() -> bool:
    """Whether this process, which fails, is the first to: the one to say why. The others fail of it, or of the same."""
    if _failures is None:
        return int(os.environ.get("RANK", "0")) == 0 if launched() > 1 else True
    try:
        return int(_failures.add("count", 1)) == 1
    except RuntimeError:  # whoever kept the count was killed, and said nothing
        return True


def await_other_failures() -> None:
    """For a process that has failed, before it ends: it may keep the count that :func:`claims_failure` reads, and the
    others must read it first. Waits until all have failed, but :data:`LAST_WORDS` at most: one may have been killed."""
    if _failures is None or int(os.environ.get("RANK", "0")) != 0:
        return
    deadline = time.monotonic() + LAST_WORDS
    with contextlib.suppress(RuntimeError):
        while int(_failures.add("count", 0)) < launched() and time.monotonic() < deadline:
            time.sleep(0.05)


def own_device(name: str) -> str:
    """The device of this process: of ``cuda``, or ``auto`` where there are GPUs, the one with its own local number.

    Raises:
        RecipeError: one GPU is named for all processes, or there are too few.
    """
    asked = name.partition(":")[0]
    if size() == 1 or not (asked == "cuda" or (name == "auto" and torch.cuda.is_available())):
        return name
    if asked != name:
        raise RecipeError(f"device {name!r} is one GPU, and {size()} processes need one each; say 'cuda'")
    count = torch.cuda.device_count()
    number = dist.get_node_local_rank(fallback_rank=rank() % max(count, 1))
    if number >= count:
        raise RecipeError(
            f"process {number} of this machine has no GPU of its own: there are {count}; start no more processes "
            "than GPUs, or say 'cpu'"
        )
    torch.cuda.set_device(number)
    return f"cuda:{number}"


# ---------------------------------------------------------------------- what each does


def share(total: int, unit: int = 1) -> slice:
    """The part of ``total`` things, in order, that falls to this process; shares differ by one unit at most.

    Units are left whole where there are enough of them: then batches are made of the same windows, and so come out the
    same to the bit, whatever the number of processes.
    """
    units = -(-total // unit)
    if units < size():
        unit, units = 1, total
    start, stop = (units * edge // size() * unit for edge in (rank(), rank() + 1))
    return slice(start, min(stop, total))


def from_main(make: Callable[[], T]) -> T:
    """What ``make`` gives in the main process, in all of them; the project's own errors are raised in all of them."""
    if size() == 1:
        return make()
    value: Any = None
    failure: SparseLLMError | None = None
    if is_main():
        try:
            value = make()
        except SparseLLMError as error:
            failure = error
    value, failure = broadcast((value, failure))
    if failure is not None:
        raise failure
    made: T = value
    return made


def main_first(make: Callable[[], T]) -> T:
    """What ``make`` gives in each process; the main one goes first, so that what it fetches is there for the rest."""
    made: list[T] = []
    from_main(lambda: made.append(make()))
    return made[0] if made else make()


def main_alone(make: Callable[[], T]) -> T:
    """As :func:`from_main`, of work that speaks to the other processes elsewhere: here the main one is by itself."""

    def apart() -> T:
        global _alone
        before, _alone = _alone, True
        try:
            return make()
        finally:
            _alone = before

    return from_main(apart)


def together(make: Callable[[], T]) -> T:
    """What ``make`` gives in each process; where it fails in one by the project's own error, that is raised in all."""
    made: list[T] = []
    failure: SparseLLMError | None = None
    try:
        made.append(make())
    except SparseLLMError as error:
        failure = error
    failures = [each for each in gather(failure) if each is not None]
    if failures:
        raise failures[0]
    return made[0]


# ---------------------------------------------------------------------- how they agree


def barrier() -> None:
    """Waits until all processes are here."""
    gather(None)


def all_sum_(tensor: Tensor) -> Tensor:
    """Adds up a tensor of at least one dimension over all processes, in place; all hold the same bits then.

    The sum is in fp64, so that its order leaves no trace in what is rounded to fp32 in the end.
    """
    if size() > 1:
        rows = max(1, CHUNK_ELEMENTS // max(1, tensor[:1].numel()))
        for part in tensor.split(rows):
            wide = part.to(torch.float64 if part.is_floating_point() else torch.int64).contiguous()
            _reached(dist.all_reduce, wide)
            if wide is not part:
                part.copy_(wide)
    return tensor


def total(number: float) -> float:
    """The sum of a number over all processes, in their order."""
    return sum(gather(number)) if size() > 1 else number


def gather(value: T) -> list[T]:
    """The value of each process, in order, for small values: they are pickled."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    _reached(dist.all_gather_object, values, value)
    return values


def gather_list(tensor: Tensor) -> list[Tensor]:
    """The tensor of each process, in order, on the device of one's own; shapes may differ, dtypes not."""
    if size() == 1:
        return [tensor]
    shapes = gather(tuple(tensor.shape))
    return [
        broadcast_(tensor.contiguous() if source == rank() else tensor.new_empty(shape), source)
        for source, shape in enumerate(shapes)
    ]


def broadcast_(tensor: Tensor, source: int = 0) -> Tensor:
    """Overwrites a contiguous tensor with that of the process ``source``."""
    if size() > 1:
        _reached(dist.broadcast, tensor, src=source)
    return tensor


def broadcast(value: T, source: int = 0) -> T:
    """The value of the process ``source``, for small values: they are pickled."""
    if size() == 1:
        return value
    values: list[Any] = [value]
    _reached(dist.broadcast_object_list, values, src=source)
    received: T = values[0]
    return received


def _reached(operation: Callable[..., T], *arguments: Any, **options: Any) -> T:
    try:
        return operation(*arguments, **options)
    except RuntimeError as error:  # what torch raises for a closed connection, a timeout, a failed NCCL call
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ProcessError(
            f"lost touch with another process of this run, which has ended or cannot be reached ({reason[:200]}); "
            "what it printed, or torchrun's report, says why; blocks that were finished stay where they were written"
        ) from error
