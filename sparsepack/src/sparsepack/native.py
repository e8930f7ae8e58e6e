"""The compiled kernels on the CPU: products with a packed weight, and rounding.

The kernels are a small C++ extension without torch; this module checks the tensors and passes their addresses. Kernels
sum in fp32. A row is never split between threads, and its order of summation depends only on the instruction set. So
the number of threads and the other tokens of a batch do not change a bit of a result.

``SPARSELLM_KERNEL`` in the environment chooses an instruction set by name, or ``torch`` for none.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType

import torch
from torch import Tensor

from sparsepack.codes import (
    VALUE_TYPES,
    Levels,
    nearest_levels,
    powers_of,
)
from sparsepack.compiled import NOT_BUILT, extension, instruction_sets
from sparsepack.errors import KernelError
from sparsepack.layout import PackedWeight

INTERFACE = 8  # what the extension takes; its sources have the same number
MAX_TOKENS = 16  # in one call; the kernels' own limit

# bf16, fp16, fp32, int8, int4 in kernels.h
_VALUE_TYPES = {name: number for number, name in enumerate(VALUE_TYPES)}
_ACTIVATIONS = {torch.bfloat16: 0, torch.float16: 1, torch.float32: 2}


@cache
def available() -> str | None:
    """The instruction set that products use, such as ``avx512amx``; None if there is no compiled kernel to use.

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
            ``sparsepack.validation.validate``; it is not checked again.
        x: ``(tokens, in)`` of fp32, bf16 or fp16, 1 to ``MAX_TOKENS`` tokens, on the CPU.
        rounded: round ``x`` to int8, see above.
        kernel: an instruction set other than ``available``'s.

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
    kind = _kind(x, "activations")
    x = x.contiguous()
    y = x.new_empty(len(x), packed.shape[0])
    numbers = [index, *addresses(packed)]
    numbers += [len(x), kind, x.data_ptr(), y.data_ptr(), torch.get_num_threads()]
    numbers.append(int(rounded and packed.scales is not None))
    _call(library.multiply, numbers)
    return y


def least_tokens(packed: PackedWeight, *, kernel: str | None = None) -> int | None:
    """The number of tokens from which ``multiply_tiles`` is faster than ``multiply``; None if it does not take
    the weight. It takes bf16, int8 and int4, where the processor multiplies bf16 itself."""
    library, index = _kernel(kernel)
    kind = _VALUE_TYPES[packed.value_type]
    tokens: int = library.least_tokens(index, kind)
    return tokens or None


def multiply_tiles(
    packed: PackedWeight, x: Tensor, *, kernel: str | None = None
) -> Tensor:
    """``x Wᵀ`` by tiles of bf16, for any number of tokens: ``(tokens, out)`` in bf16, summed in fp32.

    Sixteen rows of the weight are decoded at once and used for all tokens. Weights with scales of columns are rounded
    to bf16; those with a scale of the row are exact. Numbers below 2⁻¹²⁶ count as zero. Neither threads nor other
    tokens change a bit, but the order of sums is not that of ``multiply``.

    Args:
        packed: ``W (out, in)``, see ``multiply`` and ``least_tokens``.
        x: ``(tokens, in)`` of bf16, at least one token, on the CPU.
        kernel: an instruction set other than ``available``'s.

    Raises:
        KernelError: the instruction set has no tiles for this weight, or types, shapes or devices do not fit.
    """
    library, index = _kernel(kernel)
    if x.dim() != 2 or x.shape[1] != packed.shape[1] or len(x) == 0:
        raise KernelError(
            f"activations of shape {tuple(x.shape)}; tiles take (1 or more tokens, {packed.shape[1]})"
        )
    if x.dtype != torch.bfloat16 or not x.is_cpu:
        raise KernelError(
            f"activations are {x.dtype} on {x.device}; tiles take bf16 on the CPU"
        )
    if least_tokens(packed, kernel=kernel) is None:
        raise KernelError(
            f"no tiles for {packed.value_type} with {kernel or available()}; use multiply"
        )
    if packed.exponents is not None:
        x = x * powers_of(packed.exponents).to(x)
    x = x.contiguous()
    y = x.new_empty(len(x), packed.shape[0])
    numbers = [index, *addresses(packed)]
    numbers += [len(x), x.data_ptr(), y.data_ptr(), torch.get_num_threads()]
    _call(library.multiply_tiles, numbers)
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
    fp16 on the CPU. Values are rounded to its type once. Other arguments, errors: see ``multiply``."""
    library, index = _kernel(kernel)
    rows, columns = packed.shape
    if not 0 <= first <= last <= rows:
        raise KernelError(f"rows {first}:{last} of a weight with {rows} rows")
    if tuple(out.shape) != (last - first, columns) or not out.is_contiguous():
        raise KernelError(
            f"rows go into a contiguous {(last - first, columns)}, not into {tuple(out.shape)}"
        )
    kind = _kind(out, "rows")
    numbers = [index, *addresses(packed)]
    numbers += [first, last, kind, out.data_ptr(), torch.get_num_threads()]
    _call(library.unpack_rows, numbers)


def decode(plan: Tensor, steps: Tensor) -> None:
    """Passes a token of each sequence through the decoder that a plan of ``sparsepack.decode`` describes; ``steps
    (sequences, 4)`` has token, position, and capacity and address of the cache, in int64."""
    library, index = _kernel(None)
    numbers = [index, plan.data_ptr(), steps.data_ptr(), len(steps)]
    numbers.append(torch.get_num_threads())
    _call(library.decode, numbers)


def round_panel(
    parts: tuple[Tensor, ...],
    levels: Levels,
    dtype: torch.dtype,
    *,
    zero: bool,
    first: bool,
) -> tuple[Tensor, Tensor]:
    """Rounds a panel of at most 64 inputs to a grid, one after another in place, as ``round.h`` describes.

    ``parts`` are contiguous fp32 matrices on the CPU: half the slopes of the error, or the values to be rounded where
    ``first``; the rounded values, which change; the scales; 1 where a value may move, else 0, all ``(n, out)``; and the
    matrix of the error, or its factor, ``(n, n)``. ``zero`` says that 0 is a number like the others, ``dtype`` what
    values are stored in. Returns the moves ``(n, out)``, or the errors, and the gains ``(out,)``. A KernelError says
    that a matrix has another shape or type."""
    library, _ = _kernel(None)
    columns = parts[1]
    inputs, out = columns.shape
    shapes = [(inputs, out)] * 4 + [(inputs, inputs)]
    for part, shape in zip(parts, shapes, strict=True):
        if (
            part.shape != shape
            or part.dtype != torch.float32
            or not part.is_cpu
            or not part.is_contiguous()
        ):
            raise KernelError(
                f"{part.dtype} {tuple(part.shape)}: a panel takes contiguous fp32 on the CPU, {shape}"
            )
    moves = torch.empty_like(columns)
    gains = torch.empty_like(columns[0])
    table = None
    if not levels.even:
        table = nearest_levels(levels.numbers, columns.device)
    # A checkpoint in fp64 stores an fp32 value as it is.
    stored = _ACTIVATIONS.get(dtype, _ACTIVATIONS[torch.float32])
    numbers = [inputs, out]
    numbers += [tensor.data_ptr() for tensor in (*parts, moves, gains)]
    numbers.append(_address(table))
    numbers += [levels.lowest, levels.numbers[-1], int(zero), int(first), stored]
    numbers.append(torch.get_num_threads())
    _call(library.round_panel, numbers)
    return moves, gains


def _call(function: Callable[..., None], numbers: Sequence[int]) -> None:
    """Calls a function of the extension, which takes whole numbers alone, in the order that ``module.cpp`` reads."""
    function(*numbers)


def _address(tensor: Tensor | None) -> int:
    """The address of a tensor, or 0 for None, as the extension expects it."""
    return 0 if tensor is None else tensor.data_ptr()


def _kind(tensor: Tensor, what: str) -> int:
    """The extension's number for the type of activations."""
    if tensor.dtype not in _ACTIVATIONS or tensor.device.type != "cpu":
        raise KernelError(
            f"{what} are {tensor.dtype} on {tensor.device}; the kernels take fp32, bf16, fp16 on the CPU"
        )
    return _ACTIVATIONS[tensor.dtype]


def addresses(packed: PackedWeight) -> tuple[int, ...]:
    """The extension's arguments for a weight that passed ``sparsepack.validation.validate``.

    Raises:
        KernelError: it is not on the CPU, or has codes of N:M.
    """
    out, columns = packed.shape
    if packed.layout == "nm" or not all(
        tensor.is_cpu for tensor in packed.tensors.values()
    ):
        raise KernelError(
            f"layout {packed.layout} on {packed.mask.device}: the kernels take bitmasks on the CPU"
        )
    stride = packed.mask.shape[1]
    return (
        _VALUE_TYPES[packed.value_type],
        out,
        columns,
        stride,
        packed.mask.data_ptr(),
        packed.values.data_ptr(),
        packed.offsets.data_ptr(),
        _address(packed.scales),
        packed.group or 0,
        0 if packed.layout == "dense" else stride,
        _address(packed.exponents),
        _address(packed.levels),
    )


def _kernel(name: str | None) -> tuple[ModuleType, int]:
    """The extension, and the number of an instruction set in it."""
    library = _library()
    name = name or available()
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
    """The extension; None if it was not built. A KernelError says that it was built from other sources: it would read
    weights in another way."""
    library = extension()
    if library is not None:
        interface = getattr(library, "interface", None)
        if interface is None or interface() != INTERFACE:
            raise KernelError(
                "the compiled kernels are those of another release of sparsepack; install sparsepack again"
            )
    start = _openmp_of_torch()
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
