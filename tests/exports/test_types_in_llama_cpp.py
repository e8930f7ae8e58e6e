"""llama.cpp reads every type of GGUF that we write as the format's own library does."""

from __future__ import annotations

import ctypes

import gguf
import numpy as np
import pytest
import torch

from sparsellm.exports.blocks import to_blocks
from sparsepack.grid import codes_of, on_grid
from sparsepack.grids import GRIDS

xllamacpp = pytest.importorskip(
    "xllamacpp", reason="pip install xllamacpp, which needs no compiler"
)
TYPES = [name for name, grid in GRIDS.items() if grid.form == "gguf"]


class Traits(ctypes.Structure):
    """What ``ggml.h`` says of a type."""

    _fields_ = (
        ("name", ctypes.c_char_p),
        ("block", ctypes.c_int64),
        ("interleaved", ctypes.c_int64),
        ("bytes", ctypes.c_size_t),
        ("quantised", ctypes.c_bool),
        ("to_float", ctypes.c_void_p),
    )


def dequantised(data: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """The values of blocks by llama.cpp's own function."""
    library = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
    library.ggml_get_type_traits.restype = ctypes.POINTER(Traits)
    traits = library.ggml_get_type_traits(int(kind)).contents
    kinds = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64)
    to_float = ctypes.CFUNCTYPE(None, *kinds)(traits.to_float)
    values = np.empty(data.size // traits.bytes * traits.block, np.float32)
    to_float(data.ctypes.data, values.ctypes.data, values.size)
    return values


@pytest.mark.parametrize("name", TYPES)
def test_llama_cpp_reads_the_values_of_the_checkpoint(name: str) -> None:
    weight = torch.randn(16, 512, generator=torch.Generator().manual_seed(1)) * 0.05
    twin = on_grid(weight, name, torch.float32)
    codes, scales = codes_of(twin, GRIDS[name], "a")
    blocks = np.ascontiguousarray(to_blocks(codes, scales, GRIDS[name]))
    values = dequantised(blocks, gguf.GGMLQuantizationType[name.upper()])
    assert torch.equal(torch.from_numpy(values).view_as(twin), twin)
