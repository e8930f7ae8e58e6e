"""One run in several processes: division of the work, and exchange of the results.

``torchrun --nproc-per-node N -m sparsellm prune ...`` starts N processes that walk the same chain, each with some
windows. Moments are summed, each process solves some linears, and all get the result.

In a single process every helper here does nothing. Helpers that communicate must be called by all processes, in the
same order. Tensors are sent by gloo or NCCL, depending on their device, and small Python values are pickled.
"""

from __future__ import annotations

import contextlib
import math
import os
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from itertools import accumulate, count
from typing import TYPE_CHECKING, Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sparsellm.errors import ProcessError, RecipeError, SparseLLMError

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

# for a process that hangs: longer than the main one ever works alone
TIMEOUT = timedelta(hours=12)
LAST_WORDS = 10.0  # seconds to wait for other processes to fail; on a busy machine they take a while to end
CHUNK_ELEMENTS = 1 << 24  # elements converted to fp64 at a time: 128 MiB

T = TypeVar("T")

_alone = False  # within alone()
_failures: Store | None = None  # counts the processes that have failed
# processes of this run on this machine, as they were last counted
_here = 1


def size() -> int:
    """The number of processes of this run."""
    if _alone or not dist.is_available() or not dist.is_initialized():
        return 1
    return dist.get_world_size()


def rank() -> int:
    """The number of this process, from 0."""
    if size() == 1:
        return 0
    return dist.get_rank()


def is_main() -> bool:
    """Whether this process is the one that writes and reports."""
    return rank() == 0


def on_this_machine() -> int:
    """The number of processes of this run on this machine, which share its memory. They have one host name."""
    global _here
    if not dist.is_available() or not dist.is_initialized():
        return 1
    if size() > 1:  # else within alone(), and as many as before
        names = gather(socket.gethostname())
        _here = names.count(names[rank()])
    return _here


@contextlib.contextmanager
def session() -> Iterator[None]:
    """Joins the processes that torchrun started; raises ProcessError if they cannot be reached. After an error the
    group is not closed, since closing needs all processes, and others may have ended."""
    global _failures
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    store, this, of = _reached(next, rendezvous("env://", timeout=TIMEOUT))
    # the store keeps the addresses of processes that ended
    start = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    prefixed = PrefixStore(f"sparsellm-{start}", store)
    _reached(
        dist.init_process_group,
        backend(),
        store=prefixed,
        rank=this,
        world_size=of,
        timeout=TIMEOUT,
    )
    _failures = PrefixStore(f"sparsellm-failures-{start}", store)
    yield
    barrier()
    dist.destroy_process_group()
    _failures = None


def backend() -> str:
    """What sends tensors: gloo those on the CPU, NCCL those on GPUs."""
    if torch.cuda.is_available() and dist.is_nccl_available():
        return "cpu:gloo,cuda:nccl"
    return "gloo"


def claims_failure(*, alone: bool) -> bool:
    """Whether this process, which torchrun started, is the first to fail; only that one reports its error, since the
    others fail for the same reason. ``alone`` is the answer where the count is gone."""
    if _failures is None:
        return os.environ["RANK"] == "0"
    try:
        return int(_failures.add("count", 1)) == 1
    except RuntimeError:
        return alone


def await_other_failures() -> None:
    """In process 0, closes gloo's connections, on which others may wait, then waits until all have failed, at most
    ``LAST_WORDS`` seconds: process 0 may hold the count that ``claims_failure`` reads in the others."""
    if _failures is None or os.environ["RANK"] != "0":
        return
    deadline = time.monotonic() + LAST_WORDS
    with contextlib.suppress(RuntimeError):
        # NCCL would wait for those that have ended
        if dist.is_initialized() and backend() == "gloo":
            dist.destroy_process_group()
        while (
            int(_failures.add("count", 0)) < int(os.environ["WORLD_SIZE"])
            and time.monotonic() < deadline
        ):
            time.sleep(0.05)


def own_device(name: str) -> str:
    """The device of this process: for ``cuda``, or ``auto`` with GPUs, the GPU with the process's local number. One GPU
    for several processes, or fewer GPUs than processes, is a RecipeError."""
    asked = name.partition(":")[0]
    if size() == 1 or not (
        asked == "cuda" or (name == "auto" and torch.cuda.is_available())
    ):
        return name
    if asked != name:
        raise RecipeError(
            f"device {name!r} is one GPU, and {size()} processes need one each; say 'cuda'"
        )
    count = torch.cuda.device_count()
    number = dist.get_node_local_rank(fallback_rank=rank() % max(count, 1))
    if number >= count:
        raise RecipeError(
            f"process {number} of this machine has no GPU: there are {count}; start fewer, or say 'cpu'"
        )
    torch.cuda.set_device(number)
    return f"cuda:{number}"


def own_slice(total: int, unit: int = 1) -> slice:
    """The slice of ``total`` items for this process; slices differ by one unit at most. Units, such as the windows of a
    batch, are not split if there are enough of them, so they have the same bits for any number of processes."""
    units = -(-total // unit)
    if units < size():
        unit = 1
        units = total
    start, stop = (units * edge // size() * unit for edge in (rank(), rank() + 1))
    return slice(start, min(stop, total))


def from_main(make: Callable[[], T]) -> T:
    """Calls ``make`` in the main process, ``alone``; all return its result, or raise its SparseLLMError."""
    if size() == 1:
        return make()
    made: tuple[T | None, SparseLLMError | None] = None, None
    if is_main():
        with alone():
            made = _attempt(make)
    value, failure = broadcast(made)
    if failure is not None:
        raise failure
    return cast(T, value)


def greedy(costs: Sequence[float]) -> list[int]:
    """The process of each job. Jobs are given away by falling cost, each to the first process with the least to do."""
    loads = [0.0] * size()
    owners = [0] * len(costs)
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        owners[job] = loads.index(min(loads))
        loads[owners[job]] += costs[job]
    return owners


def main_first(make: Callable[[], T]) -> T:
    """Calls ``make`` in every process, in the main one first, so that the others use the files that it downloads."""
    made: list[T] = []
    from_main(lambda: made.append(make()))
    if not made:
        made.append(make())
    return made[0]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Until the context ends, this process works as if it were the only one."""
    global _alone
    before = _alone
    _alone = True
    try:
        yield
    finally:
        _alone = before


def together(make: Callable[[], T]) -> T:
    """Calls ``make`` in every process and returns its own result; a SparseLLMError of one is raised in all."""
    value, failure = _attempt(make)
    for error in gather(failure):
        if error is not None:
            raise error
    return cast(T, value)


def _attempt(make: Callable[[], T]) -> tuple[T | None, SparseLLMError | None]:
    try:
        return make(), None
    except SparseLLMError as error:
        return None, error


def barrier() -> None:
    """Waits until all processes have called this."""
    gather(None)


def all_sum_(tensor: Tensor) -> Tensor:
    """Sums a tensor of at least one dimension over all processes, in place; all then have the same bits. The sum is in
    fp64, so that its order does not affect a result that is rounded to fp32."""
    if size() == 1:
        return tensor
    dtype = torch.int64
    if tensor.is_floating_point():
        dtype = torch.float64
    for part in tensor.split(max(1, CHUNK_ELEMENTS // max(1, tensor[:1].numel()))):
        wide = part.to(dtype).contiguous()
        _reached(dist.all_reduce, wide)
        part.copy_(wide)
    return tensor


def all_sums_(
    tensors: dict[str, Tensor],
    sizes: Mapping[str, tuple[int, ...]],
    device: torch.device,
) -> None:
    """Sums fp32 tensors by name over all processes, in place, for the names in ``sizes``, in that order. A tensor that
    only other processes have is added, with that size."""
    known: set[str] = set().union(*gather(tensors.keys() & sizes.keys()))
    for name in [name for name in sizes if name in known]:
        all_sum_(tensors.setdefault(name, torch.zeros(sizes[name], device=device)))


def total(number: float) -> float:
    """The sum of a number over all processes, in their order."""
    return sum(gather(number))


def gather(value: T) -> list[T]:
    """The values of all processes, in order."""
    if size() == 1:
        return [value]
    values: list[Any] = [None] * size()
    _reached(dist.all_gather_object, values, value)
    return values


def spread(counts: Sequence[int], about: int) -> list[slice]:
    """Slices of this process's batches, which have these ``counts`` of tokens. They take every n-th token of all
    processes, about ``about`` tokens together. n has no divisor in common with the number of all tokens, and so none
    with the length of a window: otherwise they would take only some positions of a window."""
    every = gather(sum(counts))
    step = next(
        number
        for number in count(max(1, sum(every) // about))
        if math.gcd(number, sum(every)) == 1
    )
    starts = accumulate(counts, initial=sum(every[: rank()]))
    return [
        slice(-start % step, None, step)
        for start, _ in zip(starts, counts, strict=False)
    ]


def gather_list(tensor: Tensor) -> list[Tensor]:
    """The tensors of all processes, in order, on the device of this one's; shapes may differ, dtypes may not."""
    shapes = gather(tuple(tensor.shape))
    tensors = [tensor.new_empty(shape) for shape in shapes]
    tensors[rank()] = tensor.contiguous()
    return [broadcast_(value, source) for source, value in enumerate(tensors)]


def broadcast_(tensor: Tensor, source: int) -> Tensor:
    """Overwrites a contiguous tensor with that of the process ``source``, in all processes."""
    if size() > 1 and tensor.numel():  # as bytes, since gloo does not know all dtypes
        _reached(dist.broadcast, tensor.reshape(-1).view(torch.uint8), src=source)
    return tensor


def broadcast(value: T, source: int = 0) -> T:
    """The value of the process ``source``."""
    if size() == 1:
        return value
    values = [value]
    _reached(dist.broadcast_object_list, values, src=source)
    return values[0]


def _reached(operation: Callable[..., T], *arguments: Any, **options: Any) -> T:
    try:
        return operation(*arguments, **options)
    except RuntimeError as error:  # torch raises it for a closed connection, a timeout, a failed NCCL call
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ProcessError(
            f"lost touch with another process of this run, which has ended or cannot be reached ({reason[:200]}); "
            "see its output, or torchrun's report, for the reason; finished blocks are kept"
        ) from error
