"""A pretend CUDA device: tensors that say they are on ``cuda:0`` and are computed by the CPU.

    from tests.pretend.device import counted, cuda   # before torch is imported
    with cuda(), counted() as traffic:
        x = torch.ones(3, device="cuda") + 1
    traffic                                          # Counter({"launches": 2})

Each operation on such a tensor passes :func:`_run`. It raises what CUDA raises (tensors on two devices, a generator of
the CPU, operators without a kernel), and counts launches and synchronisations. There are no streams,
no asynchrony and no memory of the device; numbers are the CPU's and not those of cuBLAS."""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import importlib.util
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

SOURCE = Path(__file__).with_name("card.cpp")


def _tell_torch() -> None:
    """Compiles and loads the library that registers the device, once for each release of torch."""
    if "torch" in sys.modules:
        raise ImportError("tests.pretend.device must be imported before torch")
    spec = importlib.util.find_spec("torch")
    assert spec is not None
    assert spec.origin is not None
    torch_root = Path(spec.origin).parent
    version = (torch_root / "version.py").read_text()
    name = hashlib.sha256((SOURCE.read_text() + version).encode()).hexdigest()[:16]
    library = Path(__file__).parent / "__pycache__" / f"card-{name}.so"
    if not library.exists():
        library.parent.mkdir(exist_ok=True)
        made = library.with_suffix(f".{os.getpid()}")
        options = ["-std=c++20", "-fPIC", "-shared", f"-I{torch_root}/include"]
        subprocess.run(["g++", *options, str(SOURCE), "-o", str(made)], check=True)
        made.rename(library)
    torch_libraries = [
        torch_root / "lib" / f"lib{name}.so" for name in ("c10", "torch_cpu")
    ]
    for path in (*torch_libraries, library):
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)


_tell_torch()

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402
from torch.utils._python_dispatch import TorchDispatchMode  # noqa: E402
from triton.runtime.interpreter import GridExecutor  # noqa: E402

CARD = torch.device("cuda", 0)
MEMORY = 80 << 30


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


COPIES = _names("copy_ _to_copy")
# Their indices may be on the CPU.
BY_INDEX = _names("index index_put index_put_ _index_put_impl_ _unsafe_index")
NO_SCALARS_OF_CPU = _names(
    "mm bmm addmm addmv cat stack gather scatter index_select embedding"
)
# Operators that wait for the device: their result is on the host, or its shape depends on values.
WAITS = _names(
    "_local_scalar_dense is_nonzero equal nonzero masked_select bincount"
    " repeat_interleave _unique2 unique_dim unique_consecutive"
    " _linalg_check_errors _linalg_eigh linalg_lstsq"
)
WHOLE = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.bool}
# They multiply floats alone.
PRODUCTS = _names("mm bmm addmm addmm_ addmv addmv_ baddbmm mv dot")
ONLY_CPU = ("mkldnn", "for_cpu", "fbgemm", "quantized::")
# What only describes memory: no kernel runs.
FREE = _names(
    "_unsafe_view empty empty_like empty_strided new_empty new_empty_strided"
    " lift_fresh view"
)

# A kernel of CUDA's own, without which autograd would decompose the operator; :func:`_run` takes its place.
_KERNELS = torch.library.Library("aten", "IMPL")
_KERNELS.impl("silu_backward", lambda *_: None, "CUDA")

TRAFFIC: Counter[str] = Counter()  # launches and syncs


class CardTensor(Tensor):
    """A tensor on the card; ``held`` has its values."""

    held: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> CardTensor:
        layout = {
            "strides": held.stride(),
            "storage_offset": held.storage_offset(),
            "dtype": held.dtype,
        }
        made = Tensor._make_wrapper_subclass(cls, held.shape, device=CARD, **layout)  # type: ignore[attr-defined]
        made.held = held
        return made  # type: ignore[no-any-return]

    @classmethod
    def __torch_dispatch__(
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})

    def __repr__(self, **_: Any) -> str:
        return f"on the card: {self.held!r}"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if id(self) not in memo:
            copy = self.detach().clone()
            memo[id(self)] = (
                nn.Parameter(copy, self.requires_grad)
                if isinstance(self, nn.Parameter)
                else copy
            )
        return memo[id(self)]  # type: ignore[no-any-return]

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def data_ptr(self) -> int:
        return self.held.data_ptr()

    def untyped_storage(self) -> Any:
        return self.held.untyped_storage()

    @property
    def data(self) -> Tensor:
        return self.detach()

    @data.setter
    def data(self, value: CardTensor) -> None:
        Tensor.data.__set__(self, value)  # type: ignore[attr-defined]
        self.held = value.held


class _Factories(TorchDispatchMode):
    """Sees operations that have no tensor on the card among their arguments, such as those that make one."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing is compiled here, and torch's guard against it takes a sixth of the time

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _run(func, args, kwargs or {})


@functools.cache
def _facts(func: Any) -> tuple[str, bool, bool]:
    """An operator's name without its namespace; whether a kernel runs; and whether only the CPU has one."""
    name = func._schema.name
    short = name.rpartition("::")[2]
    return (
        short,
        not (func.is_view or short in FREE),
        any(part in name for part in ONLY_CPU),
    )


def _tensors(values: Iterable[Any]) -> list[Tensor]:
    """The tensors among the arguments of an operator, and in lists among them."""
    tensors: list[Tensor] = []
    for value in values:
        if isinstance(value, Tensor):
            tensors.append(value)
        elif isinstance(value, (list, tuple)):
            tensors += _tensors(value)
    return tensors


def _each(change: Callable[[Tensor], Any], value: Any) -> Any:
    """A value with its tensors changed."""
    if isinstance(value, (list, tuple)):
        return type(value)([_each(change, part) for part in value])
    return change(value) if isinstance(value, Tensor) else value


def _held(tensor: Tensor) -> Tensor:
    return tensor.held if isinstance(tensor, CardTensor) else tensor


def _run(func: Any, args: Any, kwargs: Any) -> Any:
    """The result of an operator, computed on the CPU."""
    tensors = _tensors((*args, *kwargs.values()))
    here = [tensor for tensor in tensors if isinstance(tensor, CardTensor)]
    device = kwargs.get("device")
    makes = device is not None and torch.device(device).type == "cuda"
    if not here and not makes:
        return func(*args, **kwargs)
    short, launches, only_cpu = _facts(func)
    if short in COPIES:
        there = makes if device is not None else bool(here)
        _count("syncs", _waits(short, args, kwargs, there))
    else:
        if only_cpu:
            raise NotImplementedError(f"{func} has no kernel for the CUDA backend")
        _refuse(short, args, tensors, kwargs.get("generator"))
    if launches:
        _count("launches")
        if short in WAITS or _selects(short, args):
            _count("syncs")
    of_held = {id(tensor.held): tensor for tensor in here}
    args, kwargs = (
        _each(_held, args),
        {name: _each(_held, value) for name, value in kwargs.items()},
    )
    if makes:
        kwargs.update(device=torch.device("cpu"))
    if kwargs.get("pin_memory"):
        kwargs.update(pin_memory=False)
    result = func(*args, **kwargs)
    if short == "_local_scalar_dense" or (device is not None and not makes):
        return result  # on the host now, or without values
    if short == "copy_" and id(args[0]) not in of_held:
        return result  # a tensor of the host that was written to
    for tensor in here:
        assert tensor.shape == tensor.held.shape, (
            f"{short} changes a shape in place, which this device cannot"
        )
    return _each(
        lambda made: of_held[id(made)] if id(made) in of_held else CardTensor(made),
        result,
    )


def _refuse(
    short: str, args: Any, tensors: list[Tensor], generator: torch.Generator | None
) -> None:
    """Raises what CUDA raises for these arguments."""
    indices = set(map(id, _tensors(args[1]))) if short in BY_INDEX else set()
    for tensor in tensors:
        if isinstance(tensor, CardTensor) or tensor.is_meta:
            continue
        if id(tensor) in indices:
            _count("syncs")
        elif tensor.ndim or short in NO_SCALARS_OF_CPU:
            raise RuntimeError(
                f"{short}: all tensors must be on one device, and are on cuda:0 and {tensor.device}"
            )
    if short in PRODUCTS and WHOLE & {tensor.dtype for tensor in tensors}:
        raise NotImplementedError(f'"{short}_cuda" not implemented for whole numbers')
    if generator is not None and generator.device.type != "cuda":
        raise RuntimeError(
            f"{short}: expected a 'cuda' device type for generator but found 'cpu'"
        )


def _selects(short: str, args: Any) -> bool:
    """Whether an index is a mask whose places are looked up first; one that is filled with a number is not."""
    if short not in BY_INDEX or ("put" in short and args[2].numel() == 1):
        return False
    return any(index.dtype in (torch.bool, torch.uint8) for index in _tensors(args[1]))


def _waits(short: str, args: Any, kwargs: Any, there: bool) -> bool:
    """Whether a copy crosses between host and card, in either direction, while the host waits."""
    source = args[0]
    if short == "copy_":
        there = isinstance(source, CardTensor)
        source = args[1]
    at_once = not (kwargs.get("non_blocking") or args[2:] == (True,))
    return isinstance(source, CardTensor) != there and at_once


def _count(what: str, number: int = 1) -> None:
    TRAFFIC[what] += number


@contextlib.contextmanager
def counted() -> Iterator[Counter[str]]:
    """What the card does until the context ends; filled in then."""
    before = TRAFFIC.copy()
    traffic = Counter[str]()
    yield traffic
    traffic.update(TRAFFIC - before)


@contextlib.contextmanager
def cuda() -> Iterator[None]:
    """torch has one CUDA device until the context ends."""
    properties = SimpleNamespace(
        name="pretend", total_memory=MEMORY, major=9, minor=0, multi_processor_count=132
    )
    nothing = _names(
        "_lazy_init init set_device synchronize empty_cache reset_peak_memory_stats"
        " manual_seed manual_seed_all set_rng_state"
    )
    zero = _names(
        "memory_allocated max_memory_allocated memory_reserved current_device"
    )
    true = _names("is_available is_initialized is_bf16_supported")
    answers: dict[str, Any] = {
        **dict.fromkeys(nothing),
        **dict.fromkeys(zero, 0),
        **dict.fromkeys(true, True),
        "device_count": 1,
        "mem_get_info": (MEMORY, MEMORY),
        "get_device_name": properties.name,
        "get_device_capability": (properties.major, properties.minor),
        "get_device_properties": properties,
        "get_rng_state": torch.zeros(16, dtype=torch.uint8),
    }
    launch = GridExecutor.__call__

    def launched(
        *arguments: Any, **named: Any
    ) -> Any:  # a kernel of Triton's, which its interpreter runs
        _count("launches")
        return launch(*arguments, **named)

    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(GridExecutor, "__call__", launched))
        for name, answer in answers.items():
            stack.enter_context(
                mock.patch.object(
                    torch.cuda, name, lambda *_, answer=answer, **__: answer
                )
            )
        for name in ("Stream", "Event", "device", "device_of", "stream"):
            stack.enter_context(mock.patch.object(torch.cuda, name, mock.MagicMock()))
        stack.enter_context(
            mock.patch.object(Tensor, "pin_memory", lambda self, *_: self)
        )
        # `module.to` keeps its parameters
        torch.__future__.set_swap_module_params_on_conversion(True)
        stack.callback(torch.__future__.set_swap_module_params_on_conversion, False)
        # `torch.tensor` makes its values on the host, and moves them
        torch._C._set_only_lift_cpu_tensors(True)
        stack.callback(torch._C._set_only_lift_cpu_tensors, False)
        stack.enter_context(_Factories())
        yield
