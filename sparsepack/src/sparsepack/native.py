"""The compiled kernels on the CPU: products with a packed weight, one to sixteen tokens at a time, and rounding.

The kernels are a small C++ extension without torch; this module checks the tensors and passes their addresses. Kernels
sum in fp32. A row is never split between threads, and its order of summation depends only on the instruction set. So
the number of threads and the other tokens of a batch do not change a bit of a result.

``SPARSELLM_KERNEL`` in the environment chooses an instruction set by name, or ``torch`` for none.
"""

from __future__ import annotations

import ctypes
import os
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from sparsepack.codes import SCALES_OF, VALUE_TYPES, Levels, nearest_levels
from sparsepack.compiled import NOT_BUILT, extension, instruction_sets
from sparsepack.errors import KernelError
from sparsepack.layout import PackedWeight
from sparsepack.masks import mask_stride

MAX_TOKENS = 16  # in one call; the kernels' own limit

_VALUE_TYPES = {
    name: number for number, name in enumerate(VALUE_TYPES)
}  # bf16, fp16, fp32, int8, int4 in kernels.h
_ACTIVATIONS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


@cache
def available() -> str | None:
    """The instruction set that products use, such as ``avx512vbmi2``; None if there is no compiled kernel to use.

    Raises:
        KernelError: ``SPARSELLM_KERNEL`` names an instruction set that does not exist or cannot run here.
    """
    asked = os.environ.get("SPARSELLM_KERNEL", "").strip()
    if asked == "torch" or (not asked and _library() is None):
        return None
    if asked:
        _index(asked)
    return asked or instruction_sets()[0]


def multiply(
    packed: PackedWeight, x: Tensor, *, rounded: bool = False, kernel: str | None = None
) -> Tensor:
    """``x Wᵀ`` for a packed ``W``, summed in fp32: ``(tokens, out)`` in the type of ``x``.

    With ``rounded``, and where the weight is int8 or int4, sixteen columns of a token (four, and those 64, 128 and 192
    columns on) share a scale, their largest magnitude over 127, and are rounded to whole numbers of it. All instruction
    sets have the same bits then. An activation that is not finite makes the whole token NaN.

    Args:
        packed: ``W (out, in)`` in the layout ``bitmask`` or ``dense`` that passed
            :func:`sparsepack.validation.validate`; it is not checked again.
        x: ``(tokens, in)`` of fp32, bf16 or fp16, 1 to :data:`MAX_TOKENS` tokens, on the CPU.
        rounded: round ``x`` to int8, see above.
        kernel: an instruction set other than :func:`available`'s.

    Raises:
        KernelError: there is no such kernel here, or types, shapes or devices do not fit.
    """
    library, index = _kernel(kernel)
    if (
        x.dim() != 2
        or x.shape[1] != packed.shape[1]
        or not 1 <= x.shape[0] <= MAX_TOKENS
    ):
        raise KernelError(
            f"activations of shape {tuple(x.shape)}; the kernels take (1 to {MAX_TOKENS}, {packed.shape[1]})"
        )
    kind, x = _kind(x, "activations"), x.contiguous()
    y = x.new_empty(len(x), packed.shape[0])
    arguments = (x.shape[0], kind, x.data_ptr(), y.data_ptr(), torch.get_num_threads())
    library.multiply(
        index,
        *addresses(packed),
        *arguments,
        int(rounded and packed.value_type in SCALES_OF),
    )
    return y


def unpack_rows(
    packed: PackedWeight,
    first: int,
    last: int,
    out: Tensor,
    *,
    kernel: str | None = None,
) -> None:
    """Writes rows ``first:last`` of a packed weight into ``out``: contiguous ``(last - first, in)`` of fp32, bf16 or
    fp16 on the CPU. Values are rounded to its type once. Other arguments, errors: see :func:`multiply`."""
    library, index = _kernel(kernel)
    rows, columns = packed.shape
    if not 0 <= first <= last <= rows:
        raise KernelError(f"rows {first}:{last} of a weight with {rows} rows")
    if tuple(out.shape) != (last - first, columns) or not out.is_contiguous():
        raise KernelError(
            f"rows go into a contiguous {(last - first, columns)}, not into {tuple(out.shape)}"
        )
    arguments = (
        first,
        last,
        _kind(out, "rows"),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    library.unpack_rows(index, *addresses(packed), *arguments)


def decode(plan: Tensor, token: int, position: int) -> None:
    """One token through the decoder that a plan of :mod:`sparsepack.decode` describes."""
    library, index = _kernel(None)
    library.decode(index, plan.data_ptr(), token, position, torch.get_num_threads())


def round_panel(
    parts: tuple[Tensor, ...],
    levels: Levels,
    dtype: torch.dtype,
    *,
    zero: bool,
    first: bool,
) -> tuple[Tensor, Tensor]:
    """Rounds a panel of at most 64 inputs to a grid, one after another in place; what ``round.h`` says of it.

    ``parts`` are contiguous fp32 matrices on the CPU: half the slopes of the error, or the values to be rounded where
    ``first``; the rounded values, which change; the scales; 1 where a value may move, else 0, all ``(n, out)``; and the
    matrix of the error, or its factor, ``(n, n)``. ``zero`` says that 0 is a number like the others, ``dtype`` what
    values are stored in. Returns the moves ``(n, out)``, or the errors, and the gains ``(out,)``. A KernelError says
    that a matrix has another shape or type."""
    (library, _), columns = _kernel(None), parts[1]
    for part, shape in zip(
        parts, (*[columns.shape] * 4, (len(columns),) * 2), strict=True
    ):
        if (
            part.shape != shape
            or part.dtype != torch.float32
            or not part.is_cpu
            or not part.is_contiguous()
        ):
            raise KernelError(
                f"{part.dtype} {tuple(part.shape)}: a panel takes contiguous fp32 on the CPU, {tuple(shape)}"
            )
    moves, gains = torch.empty_like(columns), torch.empty_like(columns[0])
    table = None if levels.even else nearest_levels(levels.numbers, columns.device)
    addresses = [
        0 if part is None else part.data_ptr() for part in (*parts, moves, gains, table)
    ]
    stored = _ACTIVATIONS.get(
        dtype, _ACTIVATIONS[torch.float32]
    )  # fp64 stores an fp32 value as it is
    modes = (levels.lowest, levels.numbers[-1], int(zero), int(first), stored)
    library.round_panel(*columns.shape, *addresses, *modes, torch.get_num_threads())
    return moves, gains


def _kind(tensor: Tensor, what: str) -> int:
    """The extension's number for the type of activations."""
    if tensor.dtype not in _ACTIVATIONS or tensor.device.type != "cpu":
        raise KernelError(
            f"{what} are {tensor.dtype} on {tensor.device}; the kernels take fp32, bf16, fp16 on the CPU"
        )
    return _ACTIVATIONS[tensor.dtype]


def addresses(packed: PackedWeight) -> tuple[int, ...]:
    """The extension's arguments for a weight that passed :func:`sparsepack.validation.validate`.

    Raises:
        KernelError: it is not on the CPU, or has codes of N:M.
    """
    (out, columns), scales, exponents, levels = (
        packed.shape,
        packed.scales,
        packed.exponents,
        packed.levels,
    )
    if packed.layout == "nm" or not all(
        tensor.is_cpu for tensor in packed.tensors.values()
    ):
        raise KernelError(
            f"layout {packed.layout} on {packed.mask.device}: the kernels take bitmasks on the CPU"
        )
    stride = mask_stride(columns)
    return (
        _VALUE_TYPES[packed.value_type],
        out,
        columns,
        stride,
        packed.mask.data_ptr(),
        packed.values.data_ptr(),
        packed.offsets.data_ptr(),
        0 if scales is None else scales.data_ptr(),
        packed.group or 0,
        0 if packed.layout == "dense" else stride,
        0 if exponents is None else exponents.data_ptr(),
        0 if levels is None else levels.data_ptr(),
    )


def _kernel(name: str | None) -> tuple[ModuleType, int]:
    """The extension, and the number of an instruction set in it."""
    library, name = _library(), name or available()
    if library is None or name is None:
        raise KernelError(
            f"SPARSELLM_KERNEL=torch is set, or the kernels were not built; {NOT_BUILT}"
        )
    return library, _index(name)


@cache
def _index(name: str) -> int:
    library = _library()
    if library is None:
        raise KernelError(
            f"instruction set {name!r:.100}: the kernels were not built; {NOT_BUILT}"
        )
    names = [known for known, _ in library.instruction_sets()]
    if name not in names:
        raise KernelError(
            f"unknown instruction set {name!r:.100}; choose one of {', '.join(names)}, torch"
        )
    if name not in instruction_sets():
        raise KernelError(
            f"this machine has no {name}; it can run {', '.join(instruction_sets())}, or torch"
        )
    return names.index(name)


@cache
def _library() -> ModuleType | None:
    library, start = extension(), _openmp_of_torch()
    if library is not None and start is not None:
        library.use_openmp(start)
    return library


def _openmp_of_torch() -> int | None:
    """The address of ``GOMP_parallel`` in the OpenMP library of torch, so that kernels and torch share threads.

    LLVM's and Intel's libraries have the function too. None if it is not available (macOS, Windows); the kernels then
    use their own threads."""
    if "OpenMP" not in torch.__config__.parallel_info():
        return None
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return None
    paths = {
        line.split(maxsplit=5)[5]
        for line in maps.splitlines()
        if "omp" in line.rpartition("/")[2]
    }
    folder = str(Path(torch.__file__).parent)  # torch's own library first
    for path in sorted(paths, key=lambda path: (not path.startswith(folder), path)):
        try:
            # RTLD_NOLOAD: only a library that is loaded already; a second OpenMP would have its own threads.
            function = ctypes.CDLL(
                path, mode=os.RTLD_NOLOAD | os.RTLD_NOW
            ).GOMP_parallel
        except (OSError, AttributeError):
            continue
        return ctypes.cast(function, ctypes.c_void_p).value
    return None
