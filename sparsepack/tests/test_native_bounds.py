"""No kernel touches a byte outside its buffers: each ends where a page without access begins, or starts where one ends.

A violation kills the process, so the check runs in a child."""

from __future__ import annotations

import ctypes
import dataclasses
import itertools
import mmap
import sys
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from extension import child
from reference import INTEGERS, VALUE_TYPES, activations, bound, random_weight
from sparsepack import native
from sparsepack.codes import GAPPED, PLAIN
from sparsepack.layout import PackedWeight

pytestmark = [
    pytest.mark.skipif(not native.instruction_sets(), reason="no compiled kernels"),
    pytest.mark.skipif(
        sys.platform != "linux", reason="pages are protected through mprotect of Linux"
    ),
]


class Guarded:
    """Copies of tensors between two pages that cannot be read or written."""

    def __init__(self, at_end: bool) -> None:
        self.at_end = at_end
        self.maps: list[mmap.mmap] = []
        self.libc = ctypes.CDLL(None, use_errno=True)

    def copy(self, tensor: Tensor) -> Tensor:
        size, page = tensor.numel() * tensor.element_size(), mmap.PAGESIZE
        body = max(1, -(-size // page)) * page
        memory = mmap.mmap(-1, body + 2 * page)
        self.maps.append(memory)
        address = ctypes.addressof(ctypes.c_char.from_buffer(memory))
        for guard in (address, address + page + body):
            assert (
                self.libc.mprotect(ctypes.c_void_p(guard), ctypes.c_size_t(page), 0)
                == 0
            )
        if size == 0:
            return tensor
        start = page + (body - size if self.at_end else 0)
        copy = torch.frombuffer(
            memory, dtype=tensor.dtype, count=tensor.numel(), offset=start
        ).view(tensor.shape)
        return copy.copy_(tensor)

    def weight(self, packed: PackedWeight) -> PackedWeight:
        tensors = {
            name: getattr(packed, name)
            for name in ("mask", "values", "offsets", "scales")
        }
        return dataclasses.replace(
            packed,
            **{n: None if t is None else self.copy(t) for n, t in tensors.items()},
        )


SHAPES = ((1, 1, False), (3, 7, False), (5, 65, True), (9, 200, False), (6, 513, True))


def run(kernel: str, at_end: bool) -> None:
    """Called in the child."""
    guarded = Guarded(at_end)
    library, index = native._kernel(kernel)
    for value_type, (out, columns, special_rows) in itertools.product(
        VALUE_TYPES, (*SHAPES, (4, 130, None))
    ):
        sparsity = 0.4 if special_rows is not None else -1  # the layout dense
        packed, dense = random_weight(
            out, columns, value_type, sparsity, out, special_rows=bool(special_rows)
        )
        held = guarded.weight(packed)
        address = (index, *native.addresses(held))
        for tokens, dtype in itertools.product(
            (1, 3, 8, 16), (torch.float32, torch.bfloat16)
        ):
            x = guarded.copy(activations(tokens, columns, dtype, seed=tokens))
            y = guarded.copy(torch.zeros(tokens, out, dtype=dtype))
            arguments = (
                tokens,
                native._ACTIVATIONS[dtype],
                x.data_ptr(),
                y.data_ptr(),
                2,
            )
            library.multiply(*address, *arguments, 0)
            assert bool(
                ((y.double() - x.double() @ dense.T).abs() <= bound(dense, x)).all()
            )
            if value_type in INTEGERS:
                library.multiply(*address, *arguments, 1)
                assert torch.equal(
                    y, native.multiply(packed, x, rounded=True, kernel="scalar")
                )
        for dtype in (torch.float32, torch.bfloat16):
            rows = guarded.copy(torch.zeros(out, columns, dtype=dtype))
            native.unpack_rows(held, 0, out, rows, kernel=kernel)
            assert torch.equal(rows, dense.float().to(dtype))
        if native.least_tokens(packed, kernel=kernel) is None:
            continue
        if packed.group is not None:  # decoded to bf16
            dense = dense.bfloat16().double()
        for tokens in (1, 16, 33):
            x = guarded.copy(activations(tokens, columns, torch.bfloat16, seed=tokens))
            y = guarded.copy(torch.zeros(tokens, out, dtype=torch.bfloat16))
            numbers = (tokens, x.data_ptr(), y.data_ptr(), 2)
            library.multiply_tiles(*address, *numbers)
            error = (y.double() - x.double() @ dense.T).abs()
            assert bool((error <= bound(dense, x)).all())
    for (out, inputs), levels in itertools.product(
        ((1, 1), (70, 3), (64, 64)), (PLAIN["int4"], GAPPED["int3"])
    ):
        parts = [guarded.copy(torch.ones(inputs, out)) for _ in range(4)]
        parts.append(guarded.copy(torch.eye(inputs)))
        with patch.object(
            torch, "empty_like", lambda tensor: guarded.copy(torch.zeros_like(tensor))
        ):
            moves, gains = native.round_panel(
                tuple(parts), levels, torch.float16, zero=False, first=at_end
            )
        assert bool(moves.isfinite().all() & gains.isfinite().all())


def test_no_byte_outside_the_buffers() -> None:
    done = child(
        "import resource; resource.setrlimit(resource.RLIMIT_CORE, (0, 0))\n"
        "from sparsepack import native\n"
        "from test_native_bounds import run\n"
        "for kernel in native.instruction_sets():\n"
        "    for at_end in (True, False):\n"
        "        print(kernel, at_end, flush=True)\n"
        "        run(kernel, at_end)\n"
        "print('end', flush=True)\n"
        "import ctypes, torch; from test_native_bounds import Guarded\n"
        "end = Guarded(True).copy(torch.zeros(5, dtype=torch.uint8))\n"
        "ctypes.string_at(end.data_ptr(), 6)  # the guard itself\n"
    )
    assert done.stdout.endswith("end\n"), done.stdout + done.stderr
    assert done.returncode < 0
