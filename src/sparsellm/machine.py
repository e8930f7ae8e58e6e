"""The machine that a run is on: its devices, and the memory of this process."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import resource
import sys
import warnings
from collections.abc import Iterator
from operator import attrgetter
from pathlib import Path, PurePosixPath

import psutil
import torch
from torch import Tensor

from sparsellm.errors import MemoryBudgetError, RecipeError, one_line, shown
from sparsepack.errors import Note

PROC = Path("/proc")
CONTROL_GROUPS = Path("/sys/fs/cgroup")
# Parameters of glibc's mallopt.
_TRIM_THRESHOLD = -1
_MMAP_THRESHOLD = -3
_forgotten_peak = 0  # the highest peak that recent_peak_rss() made the system forget


def machine_name(device: torch.device) -> str:
    """The model of a GPU that is here; or that of the processor, and the threads in use."""
    if device.type == "cuda":
        # without CUDA, a run can only be planned
        with contextlib.suppress(AssertionError, RuntimeError):
            return torch.cuda.get_device_name(device)
        return "the GPU"
    return f"{processor_name()}, {torch.get_num_threads()} threads"


def processor_name() -> str:
    """The model of the processor where the system tells it, else its kind."""
    try:
        lines = (
            Path("/proc/cpuinfo")
            .read_text(encoding="utf-8", errors="replace")
            .splitlines()
        )
        return next(
            line.partition(":")[2].strip()
            for line in lines
            if line.startswith("model name")
        )
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def resolve_device(name: str) -> torch.device:
    """The device that a recipe or a command names; ``auto`` is a GPU if there is one. Raises RecipeError if the machine
    has no such device, or it does not multiply two matrices as it should."""
    here = ["cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))]
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    elif name.removesuffix(":0") not in {
        *here,
        *(known.partition(":")[0] for known in here),
    }:
        raise RecipeError(
            f"device {shown(name)} does not exist here; here: {', '.join(here)}, or 'auto'"
        )
    # a product of small whole numbers is exact in every precision
    matrix = torch.arange(64.0).remainder_(7).view(8, 8)
    try:
        if not torch.equal((matrix.to(name) @ matrix.to(name)).cpu(), matrix @ matrix):
            raise RuntimeError("a product of two small matrices is wrong")
    except (RuntimeError, AssertionError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise RecipeError(
            f"device {name!r} cannot be used here ({reason[:160]}); try another, such as 'cpu'"
        ) from None
    return torch.device(name)


def bf16_is_native(device: torch.device) -> bool:
    """Whether a CPU or a CUDA device has units for products in bf16, which it otherwise emulates."""
    # a GPU that is not here, for which a run is planned, has them
    if device.type == "cuda":
        return not torch.cuda.is_available() or torch.cuda.get_device_capability(
            device
        ) >= (8, 0)
    probes = (
        getattr(torch.cpu, name, None)
        for name in ("_is_amx_tile_supported", "_is_avx512_bf16_supported")
    )
    # torch may lack the probes
    return device.type == "cpu" and any(
        probe is not None and probe() for probe in probes
    )


@contextlib.contextmanager
def computing(device: torch.device) -> Iterator[None]:
    """Sets what the bits of a result depend on, whatever this process has set, and restores it when the context ends.

    Products of fp32 tensors are fp32, never TF32; autocast, inference mode, and another default dtype or device of the
    program do not reach the run. On a GPU, sums are added up in one order wherever torch has such an
    algorithm. Raises MemoryBudgetError in place of torch's error if the memory of the device is used up."""
    with contextlib.ExitStack() as stack:

        def put(part: object, name: str, value: object) -> None:
            stack.callback(setattr, part, name, getattr(part, name))
            setattr(part, name, value)

        stack.enter_context(torch.random.fork_rng([]))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.callback(torch.set_default_dtype, torch.get_default_dtype())
        torch.set_default_dtype(torch.float32)
        # else nothing, since the context slows every call
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        for part in ("cuda.matmul", "cudnn.conv", "mkldnn.matmul"):
            put(attrgetter(part)(torch.backends), "fp32_precision", "ieee")
        if device.type == "cuda":
            # the current one, on which libraries put what they make
            stack.enter_context(torch.cuda.device(device))
            lenient = torch.is_deterministic_algorithms_warn_only_enabled()
            before = torch.are_deterministic_algorithms_enabled()
            stack.callback(
                torch.use_deterministic_algorithms, before, warn_only=lenient
            )
            torch.use_deterministic_algorithms(True, warn_only=True)
            put(torch.utils.deterministic, "fill_uninitialized_memory", False)
            # read by cuBLAS when it starts
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            stack.enter_context(warnings.catch_warnings())
            warnings.filterwarnings(
                "ignore", ".*does not have a deterministic implementation"
            )
        try:
            yield
        except RuntimeError as error:
            said_by_cublas = "ALLOC_FAILED" in str(error)
            if not isinstance(error, torch.OutOfMemoryError) and not said_by_cublas:
                raise
            raise MemoryBudgetError(
                f"the device has no memory left ({one_line(error)[:160]}); "
                "lower batch_tokens, seq_len or device_memory, or take device cpu"
            ) from error


def pinned(size: int) -> Tensor | None:
    """Memory that a GPU can access while it computes, uint8 ``(size,)``; None, with a note, if the system refuses."""
    try:
        return torch.empty(size, dtype=torch.uint8, pin_memory=True)
    except RuntimeError as error:
        said = f"memory cannot be pinned, so copies wait for the GPU ({one_line(error)[:160]})"
        warnings.warn(said, Note, stacklevel=2)
        return None


def held_rss() -> int:
    """The memory that this process holds now, in bytes."""
    return int(psutil.Process().memory_info().rss)


def peak_rss() -> int:
    """The peak memory of this process so far, in bytes."""
    return max(_forgotten_peak, _known_peak())


def recent_peak_rss() -> int:
    """The peak memory of this process since the last call, in bytes; where the system cannot forget a peak, the peak so
    far."""
    global _forgotten_peak
    peak = _known_peak()
    _forgotten_peak = max(_forgotten_peak, peak)
    with (
        contextlib.suppress(OSError),
        open("/proc/self/clear_refs", "w", encoding="ascii") as references,
    ):
        references.write("5")  # sets the peak to what the process holds
    return peak


def _known_peak() -> int:
    """The peak that the system knows; getrusage would also count what the parent of the process held at the fork."""
    with (
        contextlib.suppress(OSError),
        open("/proc/self/status", encoding="ascii", errors="replace") as status,
    ):
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":
        return peak
    return peak * 1024


def free_memory() -> int:
    """Bytes that this process can still allocate: the machine's free memory, or the limit of its control group."""
    return max(0, min([psutil.virtual_memory().available, *_control_group_rooms()]))


def trim() -> None:
    """Returns the free part of the C heap to the system, where glibc is the C library: tokenising a text leaves a
    hundred times its size in holes that no tensor fits into."""
    with contextlib.suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def keeping_freed() -> Iterator[None]:
    """Until the context ends, the C heap keeps what is freed, where glibc is the C library: for work that takes and
    frees the same gigabytes again and again, since the system clears every page that it gives out."""
    libc = ctypes.CDLL(None)
    with contextlib.suppress(AttributeError):
        libc.mallopt(_MMAP_THRESHOLD, 32 << 20)  # the largest that glibc takes
        libc.mallopt(_TRIM_THRESHOLD, (1 << 31) - 1)
    try:
        yield
    finally:
        with contextlib.suppress(AttributeError):
            libc.mallopt(_TRIM_THRESHOLD, 64 << 20)
        trim()


def _control_group_rooms() -> list[int]:
    """The bytes that each memory limit of this process's control group, and of the groups around it (version 2 or 1),
    still leaves; empty without a limit. The page cache counts as free, as it does for the machine."""
    rooms = []
    groups = {"": "/", "memory": "/"}  # by controller; version 2 names none
    with contextlib.suppress(OSError):
        for line in (PROC / "self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            groups |= {name: path for name in controllers.split(",") if name in groups}
    for name, limit, usage, total in (
        ("", "memory.max", "memory.current", ""),
        ("memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_"),
    ):
        innermost = PurePosixPath(groups[name])
        # In a container, paths of the machine do not exist.
        for group in (innermost, *innermost.parents):
            folder = CONTROL_GROUPS / name / group.relative_to("/")
            with contextlib.suppress(OSError, ValueError):  # no such file, or "max"
                most, used = (
                    int((folder / file).read_text()) for file in (limit, usage)
                )
                rooms.append(most - used)
                counts = dict(
                    line.split()
                    for line in (folder / "memory.stat").read_text().splitlines()
                )
                rooms[-1] += sum(
                    int(counts.get(f"{total}{part}_file", 0))
                    for part in ("active", "inactive")
                )
    return rooms
